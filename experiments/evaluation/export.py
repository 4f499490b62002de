"""A run's model for other code bases, as a Hugging Face folder.

    python -m experiments.evaluation.export outputs/run FOLDER
    python -m experiments.evaluation.export --dense outputs/run FOLDER

A dense run becomes a folder that transformers loads. A sparse run's folder has the parameters and options of its
attention, which this code base reads (``attention=checkpoint``) and transformers by itself refuses
(``dashattn.integrations.transformers`` makes it load them); with ``--dense`` they are left out, and transformers
attends densely. README.md of the folder says which it was.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.arguments import parse
from experiments.errors import user_errors
from experiments.evaluation.card import model_card
from experiments.evaluation.target import locate
from experiments.files import TOKENIZER, WEIGHTS
from experiments.training.checkpoint import read_state
from experiments.training.weights import by_layer
from models.hf import read_tensors, write_folder


def export(run_dir: Path, folder: Path, *, dense: bool = False) -> list[str]:
    """Write a checkpoint, a run's latest one or that which is named, as a Hugging Face folder; returns the names of the
    weights left out.

    Args:
        dense: write a sparse run's weights as those of a dense model.

    Raises:
        ValueError: the run has no checkpoint, its model has no counterpart there, or the folder exists.
    """
    target = locate(str(run_dir), "cpu")  # with the knob that a target sparsity was met with
    config = target.train
    # None: of data that are no text, and of runs of before tokenizers were kept.
    tokenizer = target.tokenizer if (target.home / TOKENIZER).is_dir() else None
    card = model_card(target, dense=dense)

    def write_more(temporary: Path) -> None:
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.framing().write_files(temporary)

    return write_folder(
        folder,
        config.model,
        read_tensors(target.checkpoint / WEIGHTS),
        config.attention,
        step=read_state(target.checkpoint)["step"],
        dense=dense,
        token_ids=tokenizer and {"bos_token_id": tokenizer.named_bos_id, "eos_token_id": tokenizer.eos_id},
        write_more=write_more,
    )


def main(arguments: Sequence[str]) -> None:
    with user_errors():
        given = parse("experiments.evaluation.export", arguments)
        left_out = export(given.run, given.folder, dense=given.dense)
        print(f"{given.folder} written from {given.run}")
        if left_out:
            print(f"it attends densely; left out: {by_layer(left_out)}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""A run's model for other code bases, as a Hugging Face folder.

    python -m experiments.evaluation.export outputs/run FOLDER

Dense attention is all that transformers computes with it; weights of an attention backend are left out, and named.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

from data import TextTokenizer
from experiments.config import load_config
from experiments.errors import user_errors
from experiments.files import CONFIG, TOKENIZER
from experiments.training.weights import find_weights
from models.hf import write_folder


def export(run_dir: Path, folder: Path) -> list[str]:
    """Write the latest checkpoint of a run as a Hugging Face folder; returns the names of the weights left out.

    Raises:
        ValueError: the run has no checkpoint, its model has no counterpart there, or the folder exists.
    """
    if not (run_dir / CONFIG).exists():
        raise ValueError(f"{run_dir} is no run directory (it has no {CONFIG})")
    config = load_config(run_dir / CONFIG)
    weights = load_file(find_weights(run_dir))
    if not (run_dir / TOKENIZER).is_dir():  # data that are no text, or a run of before tokenizers were kept
        return write_folder(folder, config.model, weights)
    tokenizer = TextTokenizer.load(str(run_dir / TOKENIZER), config.data.eos_token)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return write_folder(folder, config.model, weights, token_ids=ids, write_more=tokenizer.write_files)


def main(arguments: Sequence[str]) -> None:
    with user_errors():
        if len(arguments) != 2:
            raise ValueError(
                "give a run directory and a new folder: python -m experiments.evaluation.export outputs/run FOLDER"
            )
        run_dir, folder = (Path(argument).expanduser() for argument in arguments)
        left_out = export(run_dir, folder)
        print(f"{folder} written from {run_dir}")
        if left_out:
            print(f"it attends densely; left out: {', '.join(left_out)}")


if __name__ == "__main__":
    main(sys.argv[1:])

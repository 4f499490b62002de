"""A ``Transformer`` as a Hugging Face folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from models.config import ModelConfig
from models.hf.config import their_config
from models.hf.families import FAMILIES
from models.hf.files import CONFIG, WEIGHTS
from models.hf.weights import their_weights


def write_folder(
    folder: Path,
    config: ModelConfig,
    weights: dict[str, Tensor],
    *,
    token_ids: dict[str, int] | None = None,
    write_more: Callable[[Path], None] = lambda folder: None,
) -> list[str]:
    """Write a folder of the family that computes what the model does, for transformers to load; weights keep their
    dtype.

    Args:
        weights: consolidated weights of a ``Transformer`` of the shape ``config``.
        token_ids: ``bos_token_id`` and ``eos_token_id``, as far as there are any.
        write_more: puts what else belongs there, a tokenizer, say, into the folder before it appears.

    Returns:
        Names of the weights left out: those of the attention backends, of which transformers' dense attention has none.

    Raises:
        ValueError: the folder exists, or no family has such a model.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists: give a new folder")
    dtype = str(weights["embedding.weight"].dtype).removeprefix("torch.")
    theirs = their_config(config, dtype) | {"bos_token_id": None, "eos_token_id": None} | (token_ids or {})
    family = FAMILIES[theirs["model_type"]]
    left_out = sorted(name for name in weights if ".attention.backend." in name)
    tensors = their_weights({name: tensor for name, tensor in weights.items() if name not in left_out}, family)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
    temporary.mkdir(parents=True)
    save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
    (temporary / CONFIG).write_text(json.dumps(theirs, indent=2) + "\n")
    write_more(temporary)
    temporary.rename(folder)
    return left_out

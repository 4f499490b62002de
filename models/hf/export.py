"""A ``Transformer`` as a Hugging Face folder."""

import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dashattn.backends import AttentionConfig
from models.config import ModelConfig
from models.hf.attention import KEY, STEP, is_sparse, their_attention
from models.hf.config import their_config
from models.hf.families import FAMILIES
from models.hf.files import CONFIG, WEIGHTS
from models.hf.weights import DIGEST, digest_of, their_weights


def write_folder(
    folder: Path,
    config: ModelConfig,
    weights: dict[str, Tensor],
    attention: AttentionConfig,
    *,
    step: int = 0,
    dense: bool = False,
    token_ids: dict[str, int | None] | None = None,
    write_more: Callable[[Path], None] = lambda folder: None,
) -> list[str]:
    """Write a folder of the family that computes what the model does; weights keep their dtype.

    A dense model is one that transformers loads. A sparse one has the backend's parameters and options besides, and a
    ``model_type`` that transformers refuses, unless ``dashattn.integrations.transformers`` has told it.

    Args:
        weights: consolidated weights of a ``Transformer`` of the shape ``config`` with ``attention``.
        step: of the training, for schedules of the attention.
        dense: write what a sparse model would be if it attended densely, for transformers to load; config.json still
            says what it was.
        token_ids: ``bos_token_id`` and ``eos_token_id``, as far as there are any.
        write_more: puts what else belongs there, a tokenizer, say, into the folder before it appears.

    Returns:
        Names of the weights left out: with ``dense`` those of the attention backends.

    Raises:
        ValueError: the folder exists or cannot be written, or no family has such a model.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists: give a new folder")
    dtype = str(weights["embedding.weight"].dtype).removeprefix("torch.")
    theirs = their_config(config, dtype) | {"bos_token_id": None, "eos_token_id": None} | (token_ids or {})
    kind = theirs["model_type"]
    if is_sparse(attention):
        sparse = their_attention(attention, kind, step)
        theirs |= {key: sparse[key] for key in (KEY, STEP)} if dense else sparse
    left_out = sorted(name for name in weights if ".attention.backend." in name) if dense else []
    kept = {name: tensor for name, tensor in weights.items() if name not in left_out}
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        tensors = their_weights(kept, FAMILIES[kind], config)
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt", DIGEST: digest_of(tensors)})
        (temporary / CONFIG).write_text(json.dumps(theirs, indent=2) + "\n")
        # safetensors leaves its file to its owner alone.
        (temporary / WEIGHTS).chmod((temporary / CONFIG).stat().st_mode)
        write_more(temporary)
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be written ({error}): make room, or name another place") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return left_out

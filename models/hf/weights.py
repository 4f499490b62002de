"""Tensors of a Hugging Face folder under our names, and back: safetensors only, no pickle and no code."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.config import ModelConfig
from models.hf.config import check_same_model, read_theirs
from models.hf.families import FUSED, Family
from models.hf.files import CONFIG, INDEX, WEIGHTS, check_whole, read_json

# Buffers that older checkpoints hold and that follow from the configuration.
_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DIGEST = "sha256"  # in a file's metadata: of its tensors
_HEAD, _TABLE = "lm_head.weight", "embedding.weight"


def read_weights(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """A folder's tensors under our names, in the dtype they are stored in; one that has no name here keeps its own.

    Raises:
        ValueError: the model of ``config`` is another one, files are missing, cut short or not safetensors, or tensors
            are no finite floats.
    """
    check_same_model(config, folder)
    _, family = read_theirs(folder)
    weights = {}
    for name, names in _files(folder).items():
        weights |= {our_name(key, family): tensor for key, tensor in _read_file(folder / name, names).items()}
    if config.tie_embeddings:
        head = weights.pop(_HEAD, None)  # some folders hold the tied table twice, or under this name only
        if head is not None and not torch.equal(head, weights.setdefault(_TABLE, head)):
            raise ValueError(
                f"{folder} ties its embeddings, but {_HEAD} is another table: untie them (tie_word_embeddings in its "
                f"{CONFIG})"
            )
    weights = _unfused(weights, config, folder) if family.is_fused else weights
    for name in weights:
        if name.endswith(".chunk_query"):  # [Hkv * D] there, [Hkv, D] here
            weights[name] = weights[name].reshape(-1, config.head_dim)
    return _reordered(weights, config, channel_halves(config))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Those of a safetensors file, by their own names.

    Raises:
        ValueError: it is missing, cut short or no safetensors, or tensors are no finite floats.
    """
    return _read_file(path, None)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, in hexadecimal."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def check_files(folder: Path) -> None:
    """Refuse a folder whose files are not all there, or cut short, without reading them.

    Raises:
        ValueError: as ``read_weights``.
    """
    for name, names in _files(folder).items():
        with _opened(folder / name, names):
            pass


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights. Raises ValueError as ``read_weights``."""
    return [folder / name for name in sorted(_files(folder))]


def _files(folder: Path) -> dict[str, set[str] | None]:
    """Names of the files to read -> those of the tensors to take from each, None = all."""
    if not (folder / INDEX).exists():
        if not (folder / WEIGHTS).exists():
            raise ValueError(f"{folder} has no {WEIGHTS}: weights are read from safetensors only")
        return {WEIGHTS: None}
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} has no weight_map: copy the file again")
    files: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{folder / INDEX} says that {tensor} is in {name!r}, which is no file name")
        files.setdefault(name, set()).add(tensor)
    missing = sorted(name for name in files if not (folder / name).exists())
    if missing:
        raise ValueError(f"{folder} has no {', '.join(missing)}: copy the missing files, weights are safetensors only")
    return files


def _read_file(path: Path, names: set[str] | None) -> dict[str, Tensor]:
    with _opened(path, names) as file:
        wanted = [name for name in sorted(names or file.keys()) if not name.endswith(_BUFFERS)]
        tensors = {name: _checked(path, name, file.get_tensor(name)) for name in wanted}
        digest, is_whole = (file.metadata() or {}).get(DIGEST), len(wanted) == len(file.keys())
    if digest is not None and is_whole and digest_of(tensors) != digest:
        raise ValueError(
            f"{path} holds other weights than were written ({DIGEST} in its metadata is of others): copy it again, or "
            "leave that entry out if they were changed on purpose"
        )
    return tensors


@contextmanager
def _opened(path: Path, names: set[str] | None) -> Iterator:
    """A safetensors file that has the tensors ``names``."""
    check_whole(path)
    try:
        with safe_open(path, framework="pt") as file:
            missing = sorted((names or set()) - set(file.keys()))
            if missing:
                raise ValueError(
                    f"{path} has no tensor {missing[0]} ({len(missing)} missing), which {INDEX} says it has"
                )
            yield file
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise ValueError(f"{path} is cut short or no safetensors file ({size} bytes; {error}): copy it again") from None


def _checked(path: Path, name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in _DTYPES:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{path}: {name} is {kind}, weights must be 16 or 32 bit floats: export the model unquantised")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{path}: {name} has values that are not finite: take another checkpoint")
    return tensor


def their_weights(weights: dict[str, Tensor], family: Family, config: ModelConfig) -> dict[str, Tensor]:
    """Tensors of a ``Transformer`` of the shape ``config`` under the names of a family."""
    weights = _reordered(weights, config, channel_halves(config).argsort())
    weights = _fused(weights) if family.is_fused else weights
    result = {their_name(name, family): tensor for name, tensor in weights.items()}
    for name in result:
        if name.endswith(".indexer_q"):
            result[name] = result[name].flatten()
    return result


def channel_halves(config: ModelConfig) -> Tensor:
    """Where our channels of a head stand in other code, int64 [D].

    There the first R channels are turned, i together with i + R/2, and the others follow. Here i always goes with
    i + D/2, so that each half has its part of those that are not turned.
    """
    turned, others = torch.arange(config.head_dim).split([config.rotary_dim, config.head_dim - config.rotary_dim])
    return torch.cat([part for both in zip(turned.chunk(2), others.tensor_split(2), strict=True) for part in both])


def _reordered(weights: dict[str, Tensor], config: ModelConfig, order: Tensor) -> dict[str, Tensor]:
    """With the channels of queries and keys in another order, which changes no product of the two."""
    if config.rotary_dim == config.head_dim:
        return weights

    def reorder(name: str, tensor: Tensor) -> Tensor:
        if name.endswith(".chunk_query"):
            return tensor[:, order]
        if ".q_proj." in name or ".k_proj." in name:
            return tensor.unflatten(0, (-1, config.head_dim))[:, order].flatten(0, 1)
        return tensor

    return {name: reorder(name, tensor) for name, tensor in weights.items()}


def _unfused(weights: dict[str, Tensor], config: ModelConfig, folder: Path) -> dict[str, Tensor]:
    """With the projections of ``FUSED`` apart."""
    query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows = {"qkv_proj": (query_size, kv_size, kv_size), "gate_up_proj": (config.intermediate_size,) * 2}
    result = {}
    for name, tensor in weights.items():
        fused = next((fused for fused in FUSED if f".{fused}." in name), None)
        if fused is None:
            result[name] = tensor
            continue
        if tensor.shape[0] != sum(rows[fused]):
            raise ValueError(
                f"{folder}: {name} has {tensor.shape[0]} rows, and {CONFIG} says {sum(rows[fused])}: copy the folder "
                "again"
            )
        parts = zip(FUSED[fused], tensor.split(rows[fused]), strict=True)
        result |= {name.replace(fused, part): own for part, own in parts}
    return result


def _fused(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    result = dict(weights)
    for fused, (first, *others) in FUSED.items():
        for name in [name for name in weights if f".{first}." in name]:
            parts = [result.pop(name.replace(first, part)) for part in (first, *others)]
            result[name.replace(first, fused)] = torch.cat(parts)
    return result


def their_name(name: str, family: Family) -> str:
    return _rename(name, family.names)


def our_name(name: str, family: Family) -> str:
    return _rename(name, [(theirs, ours) for ours, theirs in family.names])


def _rename(name: str, table: Iterable[tuple[str, str]]) -> str:
    """Replace a prefix, and of the parts that begin with a dot the first that stands in the name."""
    inner = False
    for old, new in table:
        if not old.startswith("."):
            name = re.sub("^" + re.escape(old), new, name)
        elif not inner and old in name:
            name, inner = name.replace(old, new, 1), True
    return name

"""What a Hugging Face folder's config.json says of sparse attention, read and written.

Three notations are read: that of our exports (``attention``: a backend's name and its options), that of the authors of
DashAttention (``chunk_size``, ``estimate_diagonal``, ``sigma``, ``scaling_factor`` beside Llama's keys, and
``self_attn.indexer_q`` [Hkv * D] among the tensors), and InfLLM v2's ``sparse_config`` of MiniCPM4.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from dashattn.backends import BACKENDS, AttentionConfig, DashConfig, InfLLMv2Config
from models.hf.files import CONFIG, read_json

KEY, STEP = "attention", "attention_step"
MODEL_TYPE, BASE_TYPE = "dashattn", "base_model_type"


def read_attention(folder: Path) -> AttentionConfig | None:
    """The attention that a folder's weights were trained for; None = dense, or nothing is said.

    The authors' format leaves open what their package and their training code do differently: taken is the package's
    (``summary_rope: none``, ``prior_heads: group``), and alpha 1.5. MiniCPM4's ``topk`` counts no block of the window,
    ours all blocks. Its ``dense_len``, below which whole sequences are attended densely, is no option here: ours are
    dense up to topk * block_size tokens, and ``check_same_attention`` refuses rows of lengths between.

    Raises:
        ValueError: an unknown backend, or options that it cannot have.
    """
    theirs = read_json(folder / CONFIG)
    try:
        if KEY in theirs:
            options = dict(theirs[KEY])
            if options.get("name") not in list(BACKENDS):
                raise ValueError(f"{options.get('name')!r} is none of {', '.join(BACKENDS)}")
            attention = BACKENDS[options["name"]][0](**options)
        elif "estimate_diagonal" in theirs:
            attention = _from_authors(theirs)
        elif theirs.get("sparse_config"):
            attention = _from_minicpm(dict(theirs["sparse_config"]))
        else:
            return None
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG} has no {error}, which its attention needs") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} has attention that cannot be mapped: {error}") from None
    return attention if is_sparse(attention) else None


def is_sparse(attention: AttentionConfig) -> bool:
    """Whether any layer attends otherwise than densely."""
    return attention.name != "full" or attention.layers is not None


def read_step(folder: Path) -> int:
    """The step of training at which an export's weights were saved, for schedules of its attention; 0 for others."""
    step = read_json(folder / CONFIG).get(STEP, 0)
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"{folder / CONFIG} has {STEP}={step!r}, which is no step: restore it from a copy")
    return step


def check_same_attention(attention: AttentionConfig, folder: Path, lengths: Sequence[int] = ()) -> None:
    """Refuse to attend otherwise than the folder's weights were trained for.

    Args:
        lengths: of the rows, in tokens. Documents packed into them are not looked at.

    Raises:
        ValueError: with what to set.
    """
    theirs = read_attention(folder)
    if theirs is None:
        return
    dense_len, longest = _dense_len(folder), max(lengths, default=math.inf)
    if not is_sparse(attention) and longest < dense_len:
        return
    if (theirs.name, theirs.layers) != (attention.name, attention.layers):
        by_layer = "" if theirs.layers is None else f" and attention.layers={theirs.layers}"
        raise ValueError(
            f"{folder} was trained with {theirs.name} attention{by_layer}, and attention={attention.name} makes "
            "another model of it: set attention=checkpoint to take its own, or any_attention=true to go on anyway"
        )
    between = [length for length in lengths if dense_len and attention.topk * attention.block_size < length < dense_len]
    if between:
        raise ValueError(
            f"{folder} attends densely to sequences of fewer than dense_len={dense_len} tokens, and here rows of "
            f"{between[0]} would be read sparsely: take attention=full for rows below it, longer rows, or "
            "any_attention=true to go on anyway"
        )


def _dense_len(folder: Path) -> int:
    """Tokens from which on MiniCPM4's own code is sparse, for a whole sequence at once; 0 for other folders."""
    theirs = read_json(folder / CONFIG)
    is_minicpm = not {KEY, "estimate_diagonal"} & theirs.keys() and theirs.get("sparse_config")
    return theirs["sparse_config"].get("dense_len", _DENSE_LEN) if is_minicpm else 0


def their_attention(attention: AttentionConfig, kind: str, step: int) -> dict:
    """What config.json of a sparse model holds besides; its ``model_type`` is one that transformers does not know,
    instead of a dense one's, with which it would compute another model without a word. A target is the training's: its
    knob is the one of ``attention``."""
    attention = replace(attention, target_sparsity=None)
    theirs = {
        **{"model_type": MODEL_TYPE, BASE_TYPE: kind, "architectures": ["DashAttnForCausalLM"]},
        **{KEY: asdict(attention), STEP: step},
    }
    if isinstance(attention, DashConfig):
        authors = {
            "chunk_size": attention.chunk_size,
            "estimate_diagonal": attention.prior == "tempered",
            "sigma": attention.sigma,
            "scaling_factor": attention.router_scale,
        }
        # How alpha came to be what it is, and whether the queries were trained, their format need not say.
        options = {name: getattr(attention, name) for name in ("impl", "learn_summary", "alpha_start", "alpha_steps")}
        options |= {"alpha_mode": "scheduled"} if attention.alpha_mode == "scheduled" else {}
        sigma = {"sigma": attention.sigma}
        if replace(_from_authors(authors), **options, **sigma) == attention:
            theirs |= authors
    return theirs


def _from_authors(theirs: dict) -> DashConfig:
    if not isinstance(theirs["estimate_diagonal"], bool):
        raise ValueError(f"estimate_diagonal={theirs['estimate_diagonal']!r} must be true or false")
    tempered = theirs["estimate_diagonal"]
    sigma = {"sigma": float(theirs["sigma"])} if tempered else {}
    return DashConfig(
        chunk_size=theirs["chunk_size"],
        prior="tempered" if tempered else "raw",
        router_scale=float(theirs.get("scaling_factor", 1.0)),
        **sigma,
    )


# MiniCPM4's values where ``sparse_config`` is silent.
_MINICPM = {"kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "block_size": 64, "window_size": 2048, "topk": 64}
_DENSE_LEN = 8192


def _from_minicpm(given: dict) -> InfLLMv2Config:
    if given.pop("use_nope", False):
        raise ValueError("use_nope: blocks are chosen by keys after RoPE here")
    dense_len = given.pop("dense_len", _DENSE_LEN)
    if not isinstance(dense_len, int) or isinstance(dense_len, bool):
        raise ValueError(f"dense_len={dense_len!r} must be an integer")
    unknown = sorted(given.keys() - _MINICPM.keys())
    if unknown:
        raise ValueError(f"sparse_config has {', '.join(map(str, unknown))}")
    values = _MINICPM | given
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise ValueError(f"{name}={value!r} must be an integer")
    values["topk"] += values["window_size"] // max(values["block_size"], 1)
    return InfLLMv2Config(**values)

"""The attentions that need no parameters of their own, as ``attn_implementation`` of transformers.

    from dashattn.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="dash_sink")
    model.config.dashattn = {"chunk_size": 32, "router_scale": 8.0}

The names are those of ``configs/attention``, with the same values, and those of the backends that installed packages
bring (``dashattn.plugins``). ``config.dashattn``, or ``dashattn`` in config.json, changes any option of the chosen one
(a field of its dataclass) and is read in every forward pass. DashAttention's chunk queries are zero, as in a model that
was dense.

An export of a sparse run (``experiments.evaluation.export``) loads without ``attn_implementation``, attends as its
``config.attention`` says, and has its chunk queries. Another one may be given.

Keys come from transformers' cache, whichever it is, and nothing is kept beside it: a step of generation makes the
summaries of all cached chunks anew and copies the keys, which costs O(S) a token. Under gradients it costs O(S^2).
Rows may be padded on either side, each as it would be alone; documents packed in rows are told by position_ids that
start anew. What is not computed is refused. Written for transformers 5.23, which requirements.lock names.

Shapes: B rows, T tokens of the query, S keys, H heads, D head size.
"""

import json
from dataclasses import fields, replace
from functools import cache, lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
)

from dashattn.backends import BACKENDS, AttentionBackend, AttentionConfig, AttentionShape, DashConfig, build_backends
from dashattn.checks import check

PRESETS: dict[str, AttentionConfig] = {
    **{name: BACKENDS[name][0]() for name in ("dash", "infllmv2", "nsa", "indexer", "sink_window", "oracle")},
    "dash_sink": DashConfig(init_chunks=1),
    "dash_topk": DashConfig(selector="topk", prior="raw"),
    "dash_topp": DashConfig(selector="topp", prior="raw"),
    "hils": DashConfig(selector="topk", prior="mass", local_chunks=1),
    "moba": DashConfig(selector="topk", prior="none", learn_summary=False),
}
# Others may bias, cap or window their logits.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3", "smollm3")
EXPORT = "dashattn"  # the model_type of exports
QUERIES = "indexer_q"  # of a layer of an export, [Hkv * D]
_NO_OPTIONS = {"name", "target_sparsity", "sparsity_count", "sparsity_control"}  # of those who train


def register() -> None:
    """Makes every name of ``PRESETS``, and of the backends of packages, an ``attn_implementation``; calling it again
    changes nothing.

    A forward pass raises ValueError for what is not computed: options that do not exist, attentions with parameters of
    their own, other architectures, rows longer than a sliding window, masks with holes or of four dimensions,
    attention dropout, attention weights as an output, and generation with a cache by a backend that has none.
    """
    for name in (*PRESETS, *BACKENDS.plugins()):
        AttentionInterface.register(name, partial(_attention, name))
        AttentionMaskInterface.register(name, _rows)
    AutoConfig.register(EXPORT, ExportConfig, exist_ok=True)


class ExportConfig(PreTrainedConfig):
    """What ``model_type`` in an export's config.json stands for: the configuration of its ``base_model_type``."""

    model_type = EXPORT

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        kind, attention = config_dict.get("base_model_type"), config_dict.get("attention")
        check(kind in MODEL_TYPES, f"config.json: base_model_type={kind!r} is none of {', '.join(MODEL_TYPES)}")
        name = attention.get("name") if isinstance(attention, dict) else None
        check(
            name in PRESETS or (isinstance(name, str) and name in BACKENDS.plugins()),
            f"config.json: attention {name!r} does not run in transformers: read the folder with evaluate.py",
        )
        return _export_config(kind).from_dict({**config_dict, "attn_implementation": name}, **kwargs)


@cache
def _export_config(kind: str) -> type[PreTrainedConfig]:
    """A configuration class of exports, known to ``AutoModelForCausalLM``."""
    base_config = CONFIG_MAPPING[kind]
    base_model = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]
    config_class = type(f"DashAttn{base_config.__name__}", (base_config,), {"model_type": EXPORT})

    class DashAttnForCausalLM(base_model):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.model.layers:
                weight = layer.self_attn.o_proj.weight  # [E, Hq * D]
                head_dim = weight.shape[1] // config.num_attention_heads
                shape = AttentionShape(
                    config.hidden_size, config.num_attention_heads, config.num_key_value_heads, head_dim
                )
                backend = _backend(config.attention["name"], layer.self_attn, shape, torch.float32, torch.device("cpu"))
                if hasattr(backend, "chunk_query"):
                    setattr(layer.self_attn, QUERIES, nn.Parameter(weight.new_zeros(backend.chunk_query.numel())))

        @classmethod
        def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
            missing = sorted(name for name in info["missing_keys"] if name.endswith(QUERIES))
            # Nobody would have given them a value.
            check(not missing, f"the checkpoint has no {', '.join(missing)}: export the run again")
            return (model, info) if output_loading_info else model

    DashAttnForCausalLM.config_class = config_class
    AutoModelForCausalLM.register(config_class, DashAttnForCausalLM)
    return config_class


def _rows(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **_,
) -> Tensor | None:
    """What transformers hands to every layer as its mask: int64 [B, 1, 1, 3], of each row the columns of its first
    token, behind its last one, and of the first new one; None where rows are whole and end with the keys.

    A mask of four dimensions is made by transformers only once; those of others are never int64.
    """
    new = int(q_offset)
    end = new + q_length
    check(kv_offset == 0, "the cache has dropped keys that left a sliding window: set config.sliding_window=None")
    check(not use_vmap, "mask functions of one's own are not computed: choose attn_implementation='sdpa'")
    if attention_mask is None:
        if end == kv_length:
            return None
        return torch.tensor([0, end, new]).expand(batch_size, 1, 1, 3)
    check(
        attention_mask.shape == (batch_size, attention_mask.shape[1]) and attention_mask.shape[1] >= end,
        f"attention_mask must have a column for each of {end} tokens, cached ones too; got "
        f"{tuple(attention_mask.shape)}",
    )
    mask_BS = attention_mask[:, :end].long()
    start_B = mask_BS.argmax(1)
    stop_B = start_B + mask_BS.sum(1)
    column_S = torch.arange(end, device=mask_BS.device)
    check(
        torch.equal(mask_BS.bool(), (column_S >= start_B[:, None]) & (column_S < stop_B[:, None])),
        "attention_mask has holes between a row's tokens: pad prompts on the left (tokenizer.padding_side='left')",
    )
    if end == kv_length and bool(mask_BS.all()):
        return None
    return torch.stack([start_B, stop_B, torch.full_like(start_B, new)], 1)[:, None, None]


def _attention(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    **options,
) -> tuple[Tensor, None]:
    """Transformers' signature: query [B, Hq, T, D], key and value [B, Hkv, S, D], ``attention_mask`` from ``_rows``.
    The result is [B, T, Hq, D]."""
    q_BTHD, k_BSHD, v_BSHD = (x.transpose(1, 2) for x in (query, key, value))
    (batch, num_tokens), num_keys = q_BTHD.shape[:2], k_BSHD.shape[1]
    _check_call(name, module.config, attention_mask, dropout, position_ids, options)
    shape = AttentionShape(module.config.hidden_size, query.shape[1], key.shape[1], query.shape[3])
    backend = _backend(name, module, shape, query.dtype, query.device)
    if attention_mask is None:
        rows_B3 = torch.tensor([0, num_keys, num_keys - num_tokens], device=query.device).expand(batch, 3)
    else:
        rows_B3 = attention_mask[:, 0, 0].to(query.device)
        num_keys = int(rows_B3[0, 2]) + num_tokens
        k_BSHD, v_BSHD = k_BSHD[:, :num_keys], v_BSHD[:, :num_keys]  # a static cache is longer
    check(
        sliding_window is None or num_keys <= sliding_window,
        f"rows of {num_keys} tokens outgrow the sliding window of {sliding_window}, and {name} sees the whole row: set "
        "config.sliding_window=None, or config.layer_types to full_attention",
    )
    position_BT = position_ids.to(query.device).expand(batch, num_tokens)
    cu_seqlens = None
    if attention_mask is None and num_tokens == num_keys:
        cu_seqlens = _documents(position_BT, options)
    else:
        _check_positions(position_BT, rows_B3)
    own = {}
    if hasattr(module, QUERIES) and hasattr(backend, "chunk_query"):
        own["backend.chunk_query"] = getattr(module, QUERIES).to(query.dtype).view_as(backend.chunk_query)
    return functional_call(_Layer(backend), own, (q_BTHD, k_BSHD, v_BSHD, rows_B3, cu_seqlens)), None


class _Layer(nn.Module):
    """A backend, whose parameters a call may exchange."""

    def __init__(self, backend: AttentionBackend):
        super().__init__()
        self.backend = backend

    def forward(self, q_BTHD, k_BSHD, v_BSHD, rows_B3, cu_seqlens):
        if cu_seqlens is None:
            return _attend(self.backend, q_BTHD, k_BSHD, v_BSHD, rows_B3)
        packed = (x.flatten(0, 1)[None] for x in (q_BTHD, k_BSHD, v_BSHD))
        return self.backend(*packed, cu_seqlens=cu_seqlens).view_as(q_BTHD)


def _attend(backend: AttentionBackend, q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, rows_B3: Tensor) -> Tensor:
    """Attention of the last T tokens of rows that are padded on either side."""
    batch, num_keys = k_BSHD.shape[:2]
    before = num_keys - q_BTHD.shape[1]
    check(
        before == 0 or backend.capabilities.decode,
        f"attn_implementation={backend.config.name!r} has no cache: pass use_cache=False",
    )
    start_B = rows_B3[:, 0]
    column_S = torch.arange(num_keys, device=q_BTHD.device)

    def turned(x: Tensor, by_B: Tensor) -> Tensor:
        """Rows begin ``by_B`` columns later in ``x``: what stood before comes behind the last token, which sees it."""
        return x.take_along_dim(((column_S + by_B[:, None]) % num_keys)[:, :, None, None], 1)

    starts = start_B.tolist()
    if any(starts):
        k_BSHD, v_BSHD = turned(k_BSHD, start_B), turned(v_BSHD, start_B)
    differentiates = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BTHD, k_BSHD, v_BSHD))
    if before > 0 and max(starts) <= before and not differentiates:
        cache = backend.new_cache(batch, num_keys, dtype=k_BSHD.dtype, device=k_BSHD.device)
        backend.write(k_BSHD, v_BSHD, cache.layers[0])
        cache.advance([before - start for start in starts])
        return backend.attend(q_BTHD, cache.layers[0])
    q_BSHD = F.pad(q_BTHD, (0, 0, 0, 0, before, 0))
    if any(starts):
        out_BSHD = turned(backend(turned(q_BSHD, start_B), k_BSHD, v_BSHD), -start_B)
    else:
        out_BSHD = backend(q_BSHD, k_BSHD, v_BSHD)
    return out_BSHD[:, before:]


def _documents(position_BT: Tensor, options: dict) -> Tensor | None:
    """cu_seqlens of all rows behind one another; None where each row is one document."""
    begins_BT = F.pad(position_BT.diff(dim=1) != 1, (1, 0), value=True)
    if int(begins_BT.sum()) == len(begins_BT):
        return None
    check(
        not options.get("use_cache", True),
        "position_ids start anew within a row, and packed documents cannot be continued: pass use_cache=False, or "
        "consecutive position_ids",
    )
    ends = torch.tensor([begins_BT.numel()], device=begins_BT.device)
    return torch.cat([begins_BT.flatten().nonzero()[:, 0], ends]).int()


def _check_positions(position_BT: Tensor, rows_B3: Tensor) -> None:
    """Refuses packed documents beside padding or a cache."""
    start_B1, stop_B1, new_B1 = rows_B3.split(1, dim=1)
    column_BT = new_B1 + torch.arange(position_BT.shape[1], device=position_BT.device)
    is_own_BT = (column_BT >= start_B1) & (column_BT < stop_B1)
    shift_BT = column_BT - position_BT
    follows = ((shift_BT == 0) | ~is_own_BT).all(1) | ((shift_BT == start_B1) | ~is_own_BT).all(1)
    check(
        bool(follows.all()),
        "position_ids must count on from 0, padding included or not, in rows that are padded or cached: give packed "
        "documents without either, with use_cache=False",
    )


def _check_call(name, config, attention_mask, dropout, position_ids, options) -> None:
    check(
        config.model_type in (*MODEL_TYPES, EXPORT),
        f"attn_implementation={name!r} is for {', '.join(MODEL_TYPES)}, not {config.model_type}: choose 'sdpa'",
    )
    check(
        getattr(config, "is_causal", True) and options.get("is_causal") is not False,
        f"attn_implementation={name!r} is causal: choose 'sdpa' for is_causal=False",
    )
    check(
        attention_mask is None or attention_mask.dtype == torch.int64,
        f"attn_implementation={name!r} takes attention_mask [B, S] of 0 and 1: choose 'sdpa' for other masks",
    )
    check(dropout == 0, f"attn_implementation={name!r} has no dropout: set config.attention_dropout=0")
    check(
        not (options.get("output_attentions") or config.output_attentions),
        f"attn_implementation={name!r} makes no matrix of weights: set output_attentions=False, or choose 'eager'",
    )
    check(position_ids is not None, "the model's layers hand over no position_ids: call the model, not a layer")
    for given, mend in (("cu_seq_lens_q", "pass position_ids alone"), ("cache", "call generate")):
        check(options.get(given) is None, f"attn_implementation={name!r} does not take {given}: {mend}")


def _backend(name, module: nn.Module, shape: AttentionShape, dtype, device) -> AttentionBackend:
    """That of the layer whose attention ``module`` is."""
    config = module.config
    options = getattr(config, "dashattn", None) or {}
    if config.model_type == EXPORT and config.attention["name"] == _preset(name).name:
        check(
            not options,
            "config.dashattn is not read where config.attention has the options of an export: set them there",
        )
        options = {option: value for option, value in config.attention.items() if option not in _NO_OPTIONS}
    check(isinstance(options, dict), f"config.dashattn must be a mapping of options; got {options!r}")
    settings = json.dumps(options, sort_keys=True)
    return _backends(name, settings, shape, config.num_hidden_layers, dtype, device)[module.layer_idx]


def _preset(name: str) -> AttentionConfig:
    return PRESETS[name] if name in PRESETS else BACKENDS[name][0]()


@lru_cache(maxsize=64)
def _backends(name, settings, shape, num_layers, dtype, device) -> list[AttentionBackend]:
    """One a layer. They hold no state: the same for every model of this shape."""
    preset, options = _preset(name), json.loads(settings)
    allowed = {field.name for field in fields(preset)} - _NO_OPTIONS
    unknown = sorted(set(options) - allowed)
    check(
        not unknown,
        f"config.dashattn: {name} has no option {', '.join(unknown)}; it has {', '.join(sorted(allowed))}",
    )
    config = replace(preset, **options)
    with torch.inference_mode(False), torch.device("cpu"):  # whatever a model is being built under
        backends = build_backends(config, shape, num_layers)
        for backend in backends:
            _check_config(backend.config)
            check(
                backend.source is None,
                "config.dashattn: transformers hands no selection from layer to layer: leave share_selection_from out "
                "of layers, or read the checkpoint with train.py init_from",
            )
            own = {parameter for parameter, _ in backend.named_parameters()} - {"chunk_query"}
            check(
                not own,
                f"attn_implementation={name!r}: {backend.config.name} has parameters of its own "
                f"({', '.join(sorted(own))}), which a checkpoint of transformers does not hold: choose dash_sink, "
                "infllmv2 or another without, or read the checkpoint with train.py init_from",
            )
            backend.requires_grad_(False).to(device, dtype)
    return backends


def _check_config(config: AttentionConfig) -> None:
    """Refuses what a layer would have to be told beside its keys and values."""
    check(
        getattr(config, "alpha_mode", "fixed") != "scheduled",
        "config.dashattn: alpha_mode=scheduled is for training steps: set alpha_mode=fixed and alpha",
    )
    check(
        getattr(config, "summary_keys", "rotated") == "rotated" and getattr(config, "summary_rope", "none") == "none",
        "config.dashattn: transformers hands over no rotary tables: set summary_keys=rotated and summary_rope=none",
    )

"""The attentions as ``attn_implementation`` of transformers: those that need no parameters of their own in any
checkpoint, and all in exports of sparse runs.

    from dashattn.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="dash_sink")
    model.config.dashattn = {"chunk_size": 32, "router_scale": 8.0}

The names are those of ``configs/attention``, with the same values, and those of the backends that installed packages
bring (``dashattn.plugins``). ``config.dashattn``, or ``dashattn`` in config.json, changes any option of the chosen one
(a field of its dataclass) and is read in every forward pass. DashAttention's chunk queries are zero, as in a model that
was dense.

An export of a sparse run (``experiments.evaluation.export``) loads without ``attn_implementation``, attends as its
``config.attention`` says, and has its parameters: ``self_attn.indexer_q`` (chunk queries), and ``self_attn.backend``
(gates, compression, index). Another attention may be given. Learned parameters see where a key stands in its row, so
that the position_ids of its padded rows must not count the padding; ``generate`` makes them so.

Keys come from transformers' cache, whichever it is, and nothing is kept beside it: a step of generation makes the
summaries of all cached chunks anew and copies the keys, which costs O(S) a token. Under gradients it costs O(S^2).
The index keys of ``indexer`` are made of hidden states, which no cache of transformers holds: ``use_cache=False``.
Rows may be padded on either side, each as it would be alone; documents packed in rows are told by position_ids that
start anew. What is not computed is refused. Written for transformers 5.23, which requirements.lock names.

Shapes: B rows, T tokens of the query, S keys, H heads, D head size, E hidden size.
"""

import json
from copy import deepcopy
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
from dashattn.integrations.transformers_rows import check_positions, documents, rows

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
OWN = "backend"  # of a layer of an export: a module of the attention's other parameters
_CACHED = ("dash", "nsa")  # of those with parameters of their own, what makes its cache of keys and values alone
_NO_OPTIONS = {"name", "target_sparsity", "sparsity_count", "sparsity_control"}  # of those who train


def register() -> None:
    """Makes every name of ``PRESETS``, and of the backends of packages, an ``attn_implementation``; calling it again
    changes nothing.

    A forward pass raises ValueError for what is not computed: options that do not exist, attentions with parameters of
    their own in what is no export of theirs, other architectures, rows longer than a sliding window, masks with holes
    or of four dimensions, attention dropout, attention weights as an output, and generation with a cache by a backend
    that has none or would need hidden states of cached tokens.
    """
    for name in _names():
        AttentionInterface.register(name, partial(_attention, name))
        AttentionMaskInterface.register(name, rows)
    AutoConfig.register(EXPORT, ExportConfig, exist_ok=True)


def _names() -> list[str]:
    return [*PRESETS, *BACKENDS.plugins()]


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
                if _own_names(backend):
                    own = deepcopy(backend).to(weight.device, weight.dtype).requires_grad_(True)
                    if hasattr(own, "chunk_query"):
                        del own.chunk_query
                    setattr(layer.self_attn, OWN, own)
                    layer.self_attn.register_forward_pre_hook(_hand_over_hidden, with_kwargs=True)

        @classmethod
        def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
            missing = sorted(name for name in info["missing_keys"] if {QUERIES, OWN} & set(name.split(".")))
            # Nobody would have given them a value.
            check(not missing, f"the checkpoint has no {', '.join(missing)}: export the run again")
            return (model, info) if output_loading_info else model

    DashAttnForCausalLM.config_class = config_class
    AutoModelForCausalLM.register(config_class, DashAttnForCausalLM)
    return config_class


def _hand_over_hidden(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Gives ``_attention`` the input of the layer's attention; other implementations are not told."""
    if module.config._attn_implementation in _names():
        kwargs = {**kwargs, "hidden": kwargs["hidden_states"]}
    return args, kwargs


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
    hidden: Tensor | None = None,
    **options,
) -> tuple[Tensor, None]:
    """Transformers' signature: query [B, Hq, T, D], key and value [B, Hkv, S, D], ``attention_mask`` from ``rows``.
    ``hidden`` [B, T, E] comes from layers of exports. The result is [B, T, Hq, D]."""
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
        cu_seqlens = documents(position_BT, options)
    own = _own_parameters(backend, module)
    if attention_mask is not None or num_tokens != num_keys:
        check_positions(position_BT, rows_B3, learned=bool(own))
    own = {f"backend.{parameter}": value.to(query.dtype) for parameter, value in own.items()}
    hidden_BTE = None if hidden is None or not _own_names(backend) else hidden.to(query.dtype)
    return functional_call(_Layer(backend), own, (q_BTHD, k_BSHD, v_BSHD, rows_B3, cu_seqlens, hidden_BTE)), None


def _own_names(backend: AttentionBackend) -> set[str]:
    """Names of the parameters that are not chunk queries, which are zero where a checkpoint has none."""
    return {name for name, _ in backend.named_parameters()} - {"chunk_query"}


def _own_parameters(backend: AttentionBackend, module: nn.Module) -> dict[str, Tensor]:
    """What the layer ``module`` has learned of the parameters of its backend."""
    own = {}
    if hasattr(module, QUERIES) and hasattr(backend, "chunk_query"):
        own["chunk_query"] = getattr(module, QUERIES).view_as(backend.chunk_query)
    wanted = _own_names(backend)
    if not wanted:
        return own
    given = dict(getattr(module, OWN).named_parameters()) if hasattr(module, OWN) else {}
    shapes = {name: parameter.shape for name, parameter in backend.named_parameters() if name in wanted}
    check(
        shapes == {name: parameter.shape for name, parameter in given.items()},
        "config.attention is not that of the layer's parameters: change only what has no part in their shapes",
    )
    check(
        getattr(backend.config, "gradient", None) != "kl"
        or not (module.training and torch.is_grad_enabled() and any(x.requires_grad for x in given.values())),
        "the loss by which the index learns (gradient=kl) is not added here: train with train.py init_from, or freeze "
        f"the parameters of self_attn.{OWN}",
    )
    return own | given


class _Layer(nn.Module):
    """A backend, whose parameters a call may exchange."""

    def __init__(self, backend: AttentionBackend):
        super().__init__()
        self.backend = backend

    def forward(self, q_BTHD, k_BSHD, v_BSHD, rows_B3, cu_seqlens, hidden_BTE):
        if cu_seqlens is None:
            return _attend(self.backend, q_BTHD, k_BSHD, v_BSHD, rows_B3, hidden_BTE)
        packed = (x.flatten(0, 1)[None] for x in (q_BTHD, k_BSHD, v_BSHD))
        hidden = None if hidden_BTE is None else hidden_BTE.flatten(0, 1)[None]
        return self.backend(*packed, hidden=hidden, cu_seqlens=cu_seqlens).view_as(q_BTHD)


def _attend(
    backend: AttentionBackend,
    q_BTHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    rows_B3: Tensor,
    hidden_BTE: Tensor | None,
) -> Tensor:
    """Attention of the last T tokens of rows that are padded on either side."""
    batch, num_keys = k_BSHD.shape[:2]
    before = num_keys - q_BTHD.shape[1]
    check(
        before == 0 or backend.capabilities.decode,
        f"attn_implementation={backend.config.name!r} has no cache: pass use_cache=False",
    )
    check(
        before == 0 or hidden_BTE is None or backend.config.name in _CACHED,
        f"attn_implementation={backend.config.name!r} needs the hidden states of cached tokens, which no cache of "
        "transformers holds: pass use_cache=False",
    )
    start_B = rows_B3[:, 0]
    column_S = torch.arange(num_keys, device=q_BTHD.device)

    def turned(x: Tensor, by_B: Tensor) -> Tensor:
        """Rows begin ``by_B`` columns later in ``x``: what stood before comes behind the last token, which sees it."""
        index_BS = (column_S + by_B[:, None]) % num_keys
        return x.take_along_dim(index_BS.view(*index_BS.shape, *[1] * (x.dim() - 2)), 1)

    starts = start_B.tolist()
    if any(starts):
        k_BSHD, v_BSHD = turned(k_BSHD, start_B), turned(v_BSHD, start_B)
    differentiates = torch.is_grad_enabled() and any(
        x.requires_grad for x in (q_BTHD, k_BSHD, v_BSHD, *backend.parameters())
    )
    if before > 0 and max(starts) <= before and not differentiates:
        cache = backend.new_cache(batch, num_keys, dtype=k_BSHD.dtype, device=k_BSHD.device)
        backend.write(k_BSHD, v_BSHD, cache.layers[0])
        cache.advance([before - start for start in starts])
        return backend.attend(q_BTHD, cache.layers[0], hidden=hidden_BTE)
    # Tokens of the cache have no hidden state here; nobody reads what they attend to.
    q_BSHD = F.pad(q_BTHD, (0, 0, 0, 0, before, 0))
    hidden_BSE = None if hidden_BTE is None else F.pad(hidden_BTE, (0, 0, before, 0))
    if any(starts):
        hidden_BSE = None if hidden_BSE is None else turned(hidden_BSE, start_B)
        out_BSHD = turned(backend(turned(q_BSHD, start_B), k_BSHD, v_BSHD, hidden=hidden_BSE), -start_B)
    else:
        out_BSHD = backend(q_BSHD, k_BSHD, v_BSHD, hidden=hidden_BSE)
    return out_BSHD[:, before:]


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
    is_export = config.model_type == EXPORT and config.attention["name"] == _preset(name).name
    if is_export:
        check(
            not options,
            "config.dashattn is not read where config.attention has the options of an export: set them there",
        )
        options = {option: value for option, value in config.attention.items() if option not in _NO_OPTIONS}
    check(isinstance(options, dict), f"config.dashattn must be a mapping of options; got {options!r}")
    settings = json.dumps(options, sort_keys=True)
    backend = _backends(name, settings, shape, config.num_hidden_layers, dtype, device)[module.layer_idx]
    own = _own_names(backend)
    check(
        is_export or not own,
        f"attn_implementation={name!r}: {backend.config.name} has parameters of its own ({', '.join(sorted(own))}), "
        "which the checkpoint does not hold: choose dash_sink, infllmv2 or another without, or read the checkpoint "
        "with train.py init_from",
    )
    rope = getattr(config, "rope_parameters", None) or {}
    check(
        not own or backend.config.name in ("dash", "indexer") or rope.get("partial_rotary_factor", 1.0) == 1.0,
        f"partial_rotary_factor: {backend.config.name} has learned of channels in another order: read the folder with "
        "evaluate.py",
    )
    return backend


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
    check(
        getattr(config, "shared_kv", True),
        "nsa with shared_kv=false needs the rotary tables of cached tokens: read the folder with evaluate.py",
    )

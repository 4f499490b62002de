"""Attention backends and their registry. A new backend is a config, a module and a line in ``_OWN``, or in the entry
points ``dashattn.backends`` of a package."""

from dashattn.backends.base import (
    ALL_HEADS,
    AttentionBackend,
    AttentionShape,
    Capabilities,
    HeadShare,
    check_model_shape,
)
from dashattn.backends.controls import OracleBackend, OracleConfig, SinkWindowBackend, SinkWindowConfig
from dashattn.backends.dash import DashBackend, DashConfig
from dashattn.backends.full import FullBackend, FullConfig
from dashattn.backends.indexer import IndexerBackend, IndexerConfig
from dashattn.backends.infllmv2 import InfLLMv2Backend, InfLLMv2Config
from dashattn.backends.layers import layer_configs
from dashattn.backends.nsa import NSABackend, NSAConfig
from dashattn.backends.options import AttentionConfig
from dashattn.backends.sharing import SharingBackend
from dashattn.checks import check
from dashattn.plugins import Registry

_Backend = tuple[type[AttentionConfig], type[AttentionBackend]]
_OWN: dict[str, _Backend] = {
    "full": (FullConfig, FullBackend),
    "nsa": (NSAConfig, NSABackend),
    "infllmv2": (InfLLMv2Config, InfLLMv2Backend),
    "dash": (DashConfig, DashBackend),
    "indexer": (IndexerConfig, IndexerBackend),
    "sink_window": (SinkWindowConfig, SinkWindowBackend),
    "oracle": (OracleConfig, OracleBackend),
}
# What configs/attention has beside them, backends with other values, and what Hydra knows as attention_schema.
_PRESETS = (
    *("attention", "checkpoint", "dash_fine", "dash_sink", "dash_topk", "dash_topp", "hils", "infllmv2_fine", "moba"),
    *("nsa_fine", "nsa_minicpm"),
)


def _checked(name: str, found: object) -> _Backend:
    """What a package calls a backend of this name. Raises ValueError where it is none."""
    try:
        config, backend = found
        is_pair = issubclass(config, AttentionConfig) and issubclass(backend, AttentionBackend)
    except (TypeError, ValueError):
        is_pair = False
    check(is_pair, f"it must be (a subclass of AttentionConfig, one of AttentionBackend); it is {found!r}")
    own_name = config().name
    check(
        own_name == name, f"{config.__name__}.name must be {name!r}, as the entry point is called; it is {own_name!r}"
    )
    return config, backend


BACKENDS: Registry[_Backend] = Registry("dashattn.backends", _OWN, _checked, reserved=_PRESETS)
# The others are there to be evaluated with.
TRAINABLE = tuple(name for name, (_, backend) in _OWN.items() if backend.capabilities.train)


def build_backend(config: AttentionConfig, shape: AttentionShape) -> AttentionBackend:
    """Builds the backend that ``config`` names.

    Raises:
        ValueError: unknown backend, or a model shape that it cannot serve.
    """
    if config.name not in BACKENDS or not isinstance(config, BACKENDS[config.name][0]):
        raise ValueError(
            f"attention must be one of {', '.join(BACKENDS)} with its own config; "
            f"got name {config.name!r} with {type(config).__name__}"
        )
    backend = BACKENDS[config.name][1]
    check_model_shape(shape, backend.capabilities, config.name)
    return backend(config, shape)


def build_backends(config: AttentionConfig, shape: AttentionShape, num_layers: int) -> list[AttentionBackend]:
    """A backend for each of ``num_layers`` layers, as ``config`` and its ``layers`` say.

    Raises:
        ValueError: as ``build_backend``, or ``layers`` that cannot be read, or a selection that cannot be taken over.
    """
    backends: list[AttentionBackend] = []
    for layer in layer_configs(config, num_layers, BACKENDS):
        if layer.source is None:
            backends.append(build_backend(layer.config, shape))
            continue
        able = [name for name, (_, backend) in BACKENDS.own.items() if backend.capabilities.hands_on]
        check(
            backends[layer.source].capabilities.hands_on,
            f"attention.layers: layer {layer.source} has no selection that another layer could take over, since its "
            f"attention is {layer.config.name}{' with prior=mass' if layer.config.name in able else ''}: "
            f"share_selection_from works with {', '.join(able)}",
        )
        backends.append(SharingBackend(layer.config, shape, layer.source))
    return backends


__all__ = [
    "ALL_HEADS",
    "BACKENDS",
    "TRAINABLE",
    "AttentionBackend",
    "AttentionConfig",
    "AttentionShape",
    "Capabilities",
    "DashConfig",
    "FullConfig",
    "HeadShare",
    "IndexerConfig",
    "InfLLMv2Config",
    "NSAConfig",
    "OracleConfig",
    "SharingBackend",
    "SinkWindowConfig",
    "build_backend",
    "build_backends",
]

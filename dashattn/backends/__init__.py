"""Attention backends and their registry. A new backend is a config, a module and a line in ``BACKENDS``."""

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

BACKENDS: dict[str, tuple[type[AttentionConfig], type[AttentionBackend]]] = {
    "full": (FullConfig, FullBackend),
    "nsa": (NSAConfig, NSABackend),
    "infllmv2": (InfLLMv2Config, InfLLMv2Backend),
    "dash": (DashConfig, DashBackend),
    "indexer": (IndexerConfig, IndexerBackend),
    "sink_window": (SinkWindowConfig, SinkWindowBackend),
    "oracle": (OracleConfig, OracleBackend),
}


# The others are there to be evaluated with.
TRAINABLE = tuple(name for name, (_, backend) in BACKENDS.items() if backend.capabilities.train)


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
    known = {name: kind for name, (kind, _) in BACKENDS.items()}
    backends: list[AttentionBackend] = []
    for layer in layer_configs(config, num_layers, known):
        if layer.source is None:
            backends.append(build_backend(layer.config, shape))
            continue
        able = [name for name, (_, backend) in BACKENDS.items() if backend.capabilities.hands_on]
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

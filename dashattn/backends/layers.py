"""Attention by layer: what ``AttentionConfig.layers`` says, made into one configuration a layer.

    {0-1: full}                                         the first two layers dense, the others as chosen
    {*/4: full}                                         every fourth layer, from layer 0 on
    {0: full, 1-31/2: {name: sink_window}, "*": dash}   several; a layer takes the first entry that names it
    {0-3: {chunk_size: 32}}                             other options of the same backend

A key is ``*`` or a range ``FIRST-LAST`` or ``LAYER``, with ``/STEP`` for every STEP-th of them, or several of these
with blanks between. A value is a backend's name, with its default options, or a mapping of options; without ``name``
those are changes of the chosen backend.
"""

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from dashattn.backends.options import AttentionConfig
from dashattn.checks import check

_OF_ALL_LAYERS = {"layers", "target_sparsity", "sparsity_count", "sparsity_control"}
_RANGE = re.compile(r"(?:\*|(\d+)(?:-(\d+))?)(?:/(\d+))?")


def layer_configs(
    config: AttentionConfig, num_layers: int, known: Mapping[str, type[AttentionConfig]]
) -> list[AttentionConfig]:
    """The configuration of each layer, without ``layers``.

    Args:
        known: the config class of each backend's name.

    Raises:
        ValueError: a layer that does not exist, an unknown backend or option, or a key that is no range.
    """
    check(
        config.layers is None or isinstance(config.layers, Mapping),
        f"attention.layers={config.layers!r}: give a mapping, as in {{0-1: full}}",
    )
    chosen = replace(config, layers=None)
    found: list[AttentionConfig | None] = [None] * num_layers
    for key, value in (config.layers or {}).items():
        own = _config(chosen, str(key), value, known)
        for layer in _layers(str(key), num_layers):
            if found[layer] is None:
                found[layer] = own
    return [chosen if own is None else own for own in found]


def _layers(key: str, num_layers: int) -> list[int]:
    layers = []
    for part in key.split():
        match = _RANGE.fullmatch(part)
        check(
            match is not None,
            f"attention.layers has the key {key!r}: give layers as 3, 0-1, */4 or 1-31/2, several with blanks between",
        )
        first, last, step = match.groups()
        start = 0 if first is None else int(first)
        end = num_layers - 1 if first is None else int(last or first)
        check(
            start <= end < num_layers,
            f"attention.layers names {part}: the model's layers are 0 to {num_layers - 1}",
        )
        check(step is None or int(step) > 0, f"attention.layers names {part}: a step is at least 1")
        layers += range(start, end + 1, int(step or 1))
    check(bool(layers), "attention.layers has an empty key: name a layer, or * for all")
    return layers


def _config(
    chosen: AttentionConfig, key: str, value: Any, known: Mapping[str, type[AttentionConfig]]
) -> AttentionConfig:
    options = {"name": value} if isinstance(value, str) else value
    check(
        isinstance(options, Mapping),
        f"attention.layers {key}: give a backend's name or a mapping of options, not {value!r}",
    )
    name = options.get("name", chosen.name)
    check(name in known, f"attention.layers {key}: no backend is called {name!r}; choose one of {', '.join(known)}")
    config = chosen if name == chosen.name else known[name](impl=chosen.impl)
    allowed = {f.name for f in fields(config)} - _OF_ALL_LAYERS
    unknown = sorted(set(options) - allowed)
    check(
        not unknown,
        f"attention.layers {key}: {name} has no option {', '.join(map(str, unknown))}; it has "
        f"{', '.join(sorted(allowed))}",
    )
    for option, given in options.items():
        kind = type(getattr(config, option))
        fits = isinstance(given, kind) or (kind is float and isinstance(given, int))
        check(
            fits and (kind is bool or not isinstance(given, bool)),
            f"attention.layers {key}: {option}={given!r} is no {kind.__name__}",
        )
    config = replace(config, **options)
    check(
        config.name != chosen.name or config.knob == chosen.knob,
        f"attention.layers {key}: {name} with these options cannot be beside the other layers, which one knob turns: "
        f"its knob would be {config.knob}, that of the others {chosen.knob}",
    )
    return config

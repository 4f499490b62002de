"""Attention by layer: what ``AttentionConfig.layers`` says, made into one configuration a layer.

    {0-1: full}                                         the first two layers dense, the others as chosen
    {*/4: full}                                         every fourth layer, from layer 0 on
    {0: full, 1-31/2: {name: sink_window}, "*": dash}   several; a layer takes the first entry that names it
    {0-3: {chunk_size: 32}}                             other options of the same backend
    {*/4: dash, "*": {share_selection_from: -1}}        a router in every fourth layer, for the three that follow, too

A key is ``*`` or a range ``FIRST-LAST`` or ``LAYER``, with ``/STEP`` for every STEP-th of them, or several of these
with blanks between; YAML has * in quotes, a command line without. A value is a backend's name, with its default
options, or a mapping of options; without ``name`` those are changes of the chosen backend.

``share_selection_from`` names an earlier layer, or counts back from the layer's own with a negative number. The layer
has no router: each token attends to the blocks that it attended to there, with this layer's queries, keys and values.
What the router added to the logits is added here, too, and so the layer's gradient teaches that router; an index that
learns by KL learns from the masses of its own layer alone. A selection that was taken over may be taken over again.
"""

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

from dashattn.backends.options import AttentionConfig
from dashattn.checks import check

_OF_ALL_LAYERS = {"layers", "target_sparsity", "sparsity_count", "sparsity_control"}
_RANGE = re.compile(r"(?:\*|(\d+)(?:-(\d+))?)(?:/(\d+))?")
_SHARE = "share_selection_from"


class LayerAttention(NamedTuple):
    """What a layer attends with.

    Attributes:
        config: without ``layers``; that of ``source``, if there is one.
        source: the layer whose selection it takes over; None: it has one of its own, or none.
    """

    config: AttentionConfig
    source: int | None = None


def layer_configs(
    config: AttentionConfig, num_layers: int, known: Mapping[str, tuple[type[AttentionConfig], Any]]
) -> list[LayerAttention]:
    """The configuration of each layer.

    Args:
        known: by a backend's name its config class, and another thing: ``BACKENDS``.

    Raises:
        ValueError: a layer that does not exist, an unknown backend or option, or a key that is no range.
    """
    check(
        config.layers is None or isinstance(config.layers, Mapping),
        f"attention.layers={config.layers!r}: give a mapping, as in {{0-1: full}}",
    )
    chosen = replace(config, layers=None)
    found: list[AttentionConfig | int | None] = [None] * num_layers
    for key, value in (config.layers or {}).items():
        shares = isinstance(value, Mapping) and _SHARE in value
        own = _shared_layer(str(key), value) if shares else _config(chosen, str(key), value, known)
        for layer in _layers(str(key), num_layers):
            if found[layer] is None:
                found[layer] = own
    layers: list[LayerAttention] = []
    for layer, own in enumerate(found):
        if not isinstance(own, int):
            layers.append(LayerAttention(chosen if own is None else own))
            continue
        source = own if own >= 0 else layer + own
        check(
            0 <= source < layer,
            f"attention.layers: {_SHARE}={own} names layer {source} for layer {layer}: take an earlier one, or give "
            f"layer {layer} an attention of its own",
        )
        of_source = layers[source]
        layers.append(of_source if of_source.source is not None else LayerAttention(of_source.config, source))
    return layers


def _shared_layer(key: str, options: Mapping) -> int:
    """The layer that ``share_selection_from`` names, as it is written."""
    layer = options[_SHARE]
    check(
        isinstance(layer, int) and not isinstance(layer, bool),
        f"attention.layers {key}: {_SHARE}={layer!r} is no layer: give its number, or -1 for the one before",
    )
    others = sorted(map(str, options.keys() - {_SHARE}))
    check(
        not others,
        f"attention.layers {key}: a layer with {_SHARE} attends with the options of that one: leave out "
        f"{', '.join(others)}",
    )
    return layer


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
    chosen: AttentionConfig, key: str, value: Any, known: Mapping[str, tuple[type[AttentionConfig], Any]]
) -> AttentionConfig:
    options = {"name": value} if isinstance(value, str) else value
    check(
        isinstance(options, Mapping),
        f"attention.layers {key}: give a backend's name or a mapping of options, not {value!r}",
    )
    name = options.get("name", chosen.name)
    check(name in known, f"attention.layers {key}: no backend is called {name!r}; choose one of {', '.join(known)}")
    config = chosen if name == chosen.name else known[name][0](impl=chosen.impl)
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

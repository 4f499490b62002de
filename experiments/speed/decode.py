"""The passes of the speed benchmark that decode: one token's attention in a layer, and a whole model's step.

Sequences end half a chunk before the length, so that the step completes no chunk, as 63 of 64 do not. Several layers
with caches of their own run one after the other in one CUDA graph: what a layer reads has left the L2 cache when its
turn comes again. The time of a layer holds everything between the projections, writing the token included. The layers
of a whole model are compiled, as somebody's who waits for tokens; their attention stays as it is.

Before it is timed a method is compared with the reference at the length itself and, if it is ours, with sequences of
different length up to ``check_length``.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec

import torch

from dashattn.cache import DecodeCache
from experiments.speed.config import SpeedConfig
from experiments.speed.decode_steps import (
    DENSE_BASELINES,
    SPARSE_BASELINES,
    Inputs,
    assess,
    build,
    expected_of,
    fill,
    make_inputs,
    new_config,
    recorded_step,
    turn_knob,
)
from experiments.speed.inputs import Shape
from experiments.speed.measure import failed_check, graph_times, measure, run_jax, summary
from experiments.speed.methods import explain
from experiments.speed.rows import DECODE, DENSE, FLASH_3, FULL, MODEL_DECODE, WHOLE
from models.flops import count_parameters
from models.generate import decode_step
from models.transformer import Transformer

CHECK_BATCH = 8
REPLAYS = 40  # at least: one takes about a millisecond
# What the layers of a case read together, at the least: more than twice the L2 cache of an H100.
ACTIVE_BYTES = 128 * 2**20
LAYERS = (6, 32)  # fewest and most
VOCABULARY = 32768  # of a model that leaves it to the data


@dataclass(frozen=True)
class Result:
    """A row's part that is not the same for all; ``name`` and ``stage`` as of a ``Method``.

    Attributes:
        length, batch: tokens that a sequence's cache holds, and sequences.
        target: causal sparsity asked for; None for dense attention.
        values: columns of the row.
    """

    name: str
    stage: str
    pass_: str
    length: int
    batch: int
    target: float | None
    values: dict


class Decoding:
    """Yields the results of one configuration."""

    def __init__(self, config: SpeedConfig, shape: Shape, device: str, deadline: float):
        self.config = config
        self.shape = shape
        self.device = device
        self.deadline = deadline

    def results(self) -> Iterator[Result]:
        if self.config.decode and "flash_attention_3" in self.config.baselines:
            yield from self.flash_attention_3()
        for length, batch in self.config.decode:
            yield from self.layers(length, batch)
        for length, batch in self.config.decode_model:
            for name in (FULL, *self.config.backends):
                yield from self.model(name, length, batch)

    def layers(self, length: int, batch: int) -> Iterator[Result]:
        """Every method's step of a layer."""
        config, shape = self.config, self.shape
        row_bytes = 4 * shape.kv_heads * shape.head_dim  # of 16-bit keys and values
        active = length * batch * row_bytes * (1 - max(config.sparsities, default=0))
        layers = min(max(math.ceil(ACTIVE_BYTES / active), LAYERS[0]), LAYERS[1])
        lengths = [length - shape.chunk_size // 2] * batch
        inputs = cache(partial(make_inputs, shape, layers, length, lengths, config.seed, self.device))
        dense, sparse = (
            [table[name] for name in config.baselines if name in table] for table in (DENSE_BASELINES, SPARSE_BASELINES)
        )
        for target in (None, *config.sparsities):
            ours = [FULL] if target is None else config.backends
            methods = [(name, partial(build, name), True) for name in ours]
            methods += [(*method, False) for method in (dense if target is None else sparse)]
            for name, prepare, is_ours in methods:
                stage = DENSE if target is None else WHOLE
                result = Result(name, stage, DECODE, length, batch, target, {})
                yield replace(result, values=self.attempt(self.layer, inputs, prepare, target, is_ours))

    @torch.no_grad()
    def attempt(self, measured: Callable[..., dict], *arguments) -> dict:
        """What a measurement gives, or why there is none."""
        if time.monotonic() > self.deadline:
            return {"status": "out of time", "detail": "raise time_budget"}
        try:
            return measured(*arguments)
        except Exception as error:  # what breaks must not take the others' measurements with it
            status, detail = explain(error)
            return {"status": status, "detail": detail}
        finally:
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def layer(self, make: Callable[[], Inputs], prepare, target: float | None, is_ours: bool) -> dict:
        inputs = make()
        tolerance = self.config.tolerance if is_ours else self.config.baseline_tolerance
        errors: dict[str, float] = {}
        if is_ours:
            # sequences of different length, shorter than a chunk the first
            most = self.config.check_length
            lengths = [i * (most - 1) // (CHECK_BATCH - 1) for i in range(CHECK_BATCH)]
            small = make_inputs(inputs.shape, 1, most, lengths, self.config.seed + 1, self.device)
            errors, _ = prepare(small, target)[0].check(small.device_lengths)
            failed = failed_check(errors, DECODE, tolerance)
            if failed:
                return failed | {"errors": errors}
        step, knob = prepare(inputs, target)
        errors, sparsity = step.check(inputs.device_lengths)
        values = {"errors": errors, "causal_sparsity": sparsity, "knob": knob, "layers": len(inputs.caches)}
        failed = failed_check(errors, DECODE, tolerance)
        if failed:
            return values | failed
        times = graph_times(step.run, self.config.warmup, max(REPLAYS, self.config.repetitions))
        return values | {"status": "ok"} | summary([ms / len(inputs.caches) for ms in times])

    def flash_attention_3(self) -> Iterator[Result]:
        """Through JAX, with the number of splits that is fastest; the token is not written."""
        config = self.config
        packages = [name for name in ("flash_attn3_jax", "jax") if find_spec(name) is None]
        replies, failure = [], f"the package {packages[0]} is not installed" if packages else ""
        if not packages:
            names = ("heads", "kv_heads", "head_dim", "dtype", "seed", "warmup", "repetitions", "check_length")
            options = {name: getattr(config, name) for name in names}
            options |= {"decode": [list(case) for case in config.decode], "layers": LAYERS[0]}
            options["package"] = "flash_attn3_jax"  # dew_flash_attn does not decode
            replies, failure = run_jax(options, self.deadline - time.monotonic())
        errors = replies[0]["errors"] if replies else {}
        found = {(reply["length"], reply["batch"]): reply for reply in replies[1:]}
        failed = failed_check(errors, DECODE, config.baseline_tolerance)
        for length, batch in config.decode:
            reply = found.get((length, batch), {"error": failure or "no answer"})
            values = {"errors": errors, "layers": LAYERS[0]}
            if packages:
                values |= {"status": "not installed", "detail": failure}
            elif failed:
                values |= failed
            elif "error" in reply:
                values |= {"status": "error", "detail": reply["error"]}
            else:
                detail = f"flash_attn3_jax {replies[0]['package']}, JAX {replies[0]['jax']}, {reply['splits']} splits"
                values |= {"status": "ok", "detail": detail} | {key: reply[key] for key in ("ms", "ms_min", "ms_max")}
            yield Result(FLASH_3, DENSE, DECODE, length, batch, None, values)

    def model(self, name: str, length: int, batch: int) -> Iterator[Result]:
        """The whole model's step with one backend: everything from a token to the next token's logits."""
        targets, stage = ([None], DENSE) if name == FULL else (self.config.sparsities, WHOLE)
        filled = cache(partial(self.filled_model, name, length, batch))  # once for all sparsities
        shape = self.config.model
        known = {"heads": shape.num_heads, "kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
        known["layers"] = shape.num_layers
        for target in targets:
            values = known | self.attempt(self.model_step, filled, target)
            yield Result(name, stage, MODEL_DECODE, length, batch, target, values)

    def filled_model(self, name: str, length: int, batch: int) -> tuple[Transformer, DecodeCache]:
        """A model with random weights, compiled, and its caches; their keys and values are the same in all layers."""
        config, size = self.config, self.shape.chunk_size
        model_config = replace(config.model, vocab_size=config.model.vocab_size or VOCABULARY)
        torch.manual_seed(config.seed)
        with torch.device(self.device):
            model = Transformer(model_config, new_config(name, size)).to(self.shape.dtype)
        sequences = model.new_cache(batch, length)
        kinds = (model_config.num_heads, model_config.num_kv_heads, model_config.head_dim)
        lengths = [length - size // 2] * batch
        inputs = make_inputs(Shape(*kinds, size, self.shape.dtype), 1, length, lengths, config.seed, self.device)
        fill(model.backends, sequences, inputs.caches * len(model.backends), lengths)
        torch.compiler.reset()  # else what was compiled for one backend counts against another's limit
        model.compile_layers()
        return model, sequences

    def model_step(self, filled: Callable[[], tuple[Transformer, DecodeCache]], target: float | None) -> dict:
        config, (model, sequences) = self.config, filled()
        batch = len(sequences.host_lengths)
        token_B = torch.zeros(batch, dtype=torch.int64, device=self.device)
        knob = None
        if target is not None:
            backends, queries, layers, hidden, _ = zip(*recorded_step(model, sequences, token_B), strict=True)
            knob = turn_knob(backends, queries, layers, hidden, target)
        backends, queries, layers, hidden, outs = zip(*recorded_step(model, sequences, token_B), strict=True)
        expected, selections = expected_of(zip(backends, queries, layers, hidden, strict=True))
        errors, sparsity = assess(outs, expected, selections, sequences.lengths)
        values = {"errors": errors, "causal_sparsity": sparsity, "knob": knob}
        values |= {"parameters": count_parameters(model)}
        failed = failed_check(errors, DECODE, config.tolerance)
        if failed:
            return values | failed
        step = decode_step(model, sequences)
        times = measure(lambda: step(token_B), config.warmup, max(REPLAYS, config.repetitions))
        found = summary(times)
        return values | {"status": "ok", "compiled": True, "tokens_per_second": batch / found["ms"] * 1e3} | found

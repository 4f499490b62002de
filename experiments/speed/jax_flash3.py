"""FlashAttention-3 through JAX, in a process of its own so that JAX and PyTorch do not share GPU memory.

``python -m experiments.speed.jax_flash3 '{"package": "flash_attn3_jax", "lengths": [1024], ...}'`` prints one JSON
object a line: first the errors against a float32 reference, then a time for each length and pass, or with ``"decode":
[[tokens, sequences], ...]`` for each of these the time of one token's attention. It imports nothing of the rest.
"""

import json
import statistics
import sys
import time
from functools import partial
from importlib import import_module
from importlib.metadata import packages_distributions, version

import jax
import jax.numpy as jnp

PASSES = ("forward", "forward+backward")
LEAST_SECONDS = 0.01  # of one timing, so that starting it does not count
ROUNDS, CALLS = 4, 8  # of decoding: through all layers in a compiled call, and such calls in a timing
DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16}


def inputs(length, options):
    keys = jax.random.split(jax.random.PRNGKey(options["seed"]), 4)
    heads = (options["heads"], options["kv_heads"], options["kv_heads"], options["heads"])
    dtype = DTYPES[options["dtype"]]
    return [
        jax.random.normal(key, (1, length, count, options["head_dim"]), dtype)
        for key, count in zip(keys, heads, strict=True)
    ]


def attend(q, k, v, options):
    return import_module(options["package"]).flash_mha(q, k, v, is_causal=True)


def attend_reference(q, k, v):
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    causal = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def results(function, q, k, v, grad):
    out, backward = jax.vjp(function, q, k, v)
    return [out, *backward(grad)]


def errors(options):
    """Relative RMS errors of output and gradients."""
    tensors = inputs(options["check_length"], options)
    found = jax.jit(lambda *x: results(partial(attend, options=options), *x))(*tensors)
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(lambda *x: results(attend_reference, *x))(*(x.astype(jnp.float32) for x in tensors))

    def norm(x):
        return float(jnp.linalg.norm(x.astype(jnp.float32).ravel()))

    return {
        name: norm(x.astype(jnp.float32) - y) / norm(y)
        for name, x, y in zip(("out", "q", "k", "v"), found, wanted, strict=True)
    }


def seconds(function, tensors):
    start = time.perf_counter()
    jax.block_until_ready(function(*tensors))
    return time.perf_counter() - start


def measure(backward, tensors, options):
    """Milliseconds of a call, one for each repetition."""

    attention = partial(attend, options=options)

    def chained(count):
        # Each call reads the one before, or the compiler would keep one of them only.
        def forward(q, k, v, grad):
            for _ in range(count):
                q = attention(q, k, v)
            return q

        def both(q, k, v, grad):
            for _ in range(count):
                out, *grads = results(attention, q, k, v, grad)
                q = grads[0]
            return out, grads

        return jax.jit(both if backward else forward)

    once = chained(1)
    for _ in range(options["warmup"]):
        estimate = seconds(once, tensors)
    count = min(64, max(1, round(LEAST_SECONDS / estimate)))
    repeated = chained(count)
    for _ in range(options["warmup"]):
        seconds(repeated, tensors)
    return [seconds(repeated, tensors) / count * 1e3 for _ in range(options["repetitions"])]


def decode_inputs(length, batch, layers, options):
    """q of one token, and keys and values of every layer."""
    keys = jax.random.split(jax.random.PRNGKey(options["seed"]), 2 * layers + 1)
    size, dtype = (batch, length, options["kv_heads"], options["head_dim"]), DTYPES[options["dtype"]]
    q = jax.random.normal(keys[0], (batch, 1, options["heads"], options["head_dim"]), dtype)
    caches = [jax.random.normal(key, size, dtype) for key in keys[1:]]
    return q, list(zip(caches[::2], caches[1::2], strict=True))


def attend_cache(q, k, v, splits, options):
    return import_module(options["package"]).flash_mha_with_kvcache(q, k, v, num_splits=splits)


def decode_errors(options):
    q, [(k, v)] = decode_inputs(options["check_length"], 2, 1, options)
    found = jax.jit(lambda *x: attend_cache(*x, splits=4, options=options))(q, k, v)
    with jax.default_matmul_precision("highest"):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        q = q.reshape(2, options["kv_heads"], -1, q.shape[-1])
        weights = jax.nn.softmax(jnp.einsum("bhgd,bshd->bhgs", q, k) * q.shape[-1] ** -0.5, axis=-1)
        wanted = jnp.einsum("bhgs,bshd->bhgd", weights, v).reshape(found.shape)
    return {"out": float(jnp.linalg.norm(found.astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted))}


def measure_decode(length, batch, options):
    """(splits, milliseconds of a layer for each repetition), with the number of splits that is fastest."""
    layers = options["layers"]
    q, caches = decode_inputs(length, batch, layers, options)
    # about one program for each multiprocessor, half as many, or a few times as many; the kernel takes up to 256
    processors = getattr(jax.devices()[0], "core_count", 132)
    fill = max(2, processors // (batch * options["kv_heads"]))
    best = None
    for splits in sorted({min(256, fill * factor // 2) for factor in (1, 2, 4, 8)}):

        def forward(q, caches, splits=splits):
            for _ in range(ROUNDS):
                for k, v in caches:  # each layer reads the one before
                    q = attend_cache(q, k, v, splits, options)
            return q

        forward = jax.jit(forward)

        def calls(q, caches, forward=forward):
            for _ in range(CALLS):  # launching the next while one runs
                q = forward(q, caches)
            return q

        for _ in range(options["warmup"]):
            seconds(calls, (q, caches))
        times = [seconds(calls, (q, caches)) / (CALLS * ROUNDS * layers) * 1e3 for _ in range(options["repetitions"])]
        if best is None or statistics.median(times) < statistics.median(best[1]):
            best = (splits, times)
    return best


def row_of(times):
    return {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times)}


def decode(options):
    for length, batch in options["decode"]:
        row = {"length": length, "batch": batch}
        try:
            splits, times = measure_decode(length, batch, options)
            row |= {"splits": splits} | row_of(times)
        except Exception as error:
            row |= {"error": str(error).splitlines()[0][:300]}
        print(json.dumps(row), flush=True)


def prefill(options):
    for length in options["lengths"]:
        tensors = inputs(length, options)
        for name in PASSES:
            row = {"length": length, "pass": name}
            try:
                row |= row_of(measure(name != "forward", tensors, options))
            except Exception as error:  # out of memory has no class of its own; the next length may still fit
                row |= {"error": str(error).splitlines()[0][:300]}
            print(json.dumps(row), flush=True)


def main(options):
    capability = jax.devices()[0].compute_capability
    if capability != "9.0":  # elsewhere dew_flash_attn takes FlashAttention-2
        raise SystemExit(f"FlashAttention-3 is of Hopper, compute capability 9.0; this GPU's is {capability}")
    found = decode_errors(options) if "decode" in options else errors(options)
    package = version(packages_distributions()[options["package"]][0])
    print(json.dumps({"errors": found, "jax": version("jax"), "package": package}), flush=True)
    (decode if "decode" in options else prefill)(options)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

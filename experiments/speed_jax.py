"""FlashAttention-3 through JAX, in a process of its own so that JAX and PyTorch do not share GPU memory.

``python -m experiments.speed_jax '{"lengths": [1024], ...}'`` prints one JSON object a line: first the errors against
a float32 reference, then a time for each length and pass. It imports nothing of the rest.
"""

import json
import statistics
import sys
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp
from flash_attn3_jax import flash_mha

PASSES = ("forward", "forward+backward")
LEAST_SECONDS = 0.01  # of one timing, so that starting it does not count


def inputs(length, options):
    keys = jax.random.split(jax.random.PRNGKey(options["seed"]), 4)
    heads = (options["heads"], options["kv_heads"], options["kv_heads"], options["heads"])
    dtype = {"bf16": jnp.bfloat16, "fp16": jnp.float16}[options["dtype"]]
    return [
        jax.random.normal(key, (1, length, count, options["head_dim"]), dtype)
        for key, count in zip(keys, heads, strict=True)
    ]


def attend(q, k, v):
    return flash_mha(q, k, v, is_causal=True)


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
    found = jax.jit(lambda *x: results(attend, *x))(*tensors)
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

    def chained(count):
        # Each call reads the one before, or the compiler would keep one of them only.
        def forward(q, k, v, grad):
            for _ in range(count):
                q = attend(q, k, v)
            return q

        def both(q, k, v, grad):
            for _ in range(count):
                out, *grads = results(attend, q, k, v, grad)
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


def main(options):
    print(json.dumps({"errors": errors(options), "jax": version("jax"), "package": version("flash-attn3-jax")}))
    for length in options["lengths"]:
        tensors = inputs(length, options)
        for name in PASSES:
            row = {"length": length, "pass": name}
            try:
                times = measure(name != "forward", tensors, options)
                row |= {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times)}
            except Exception as error:  # out of memory has no class of its own; the next length may still fit
                row |= {"error": str(error).splitlines()[0][:300]}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

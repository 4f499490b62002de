"""Compiles the kernels for sm_90 on a machine without a GPU, and prints one line of JSON for each.

Run as a script, by test_sm90_compile.py. With the argument ``every``, of each tuned kernel every one of its options;
else the first one, and of each kernel's variants only the first goes beyond LLVM's input, which already says how much
shared memory it takes and what it multiplies with.
"""

import json
import re
import sys

import kernel_launches as launches
from triton._C.libtriton import llvm
from triton.backends.nvidia.compiler import CUDABackend

from dashattn.ops import tuning

EVERY = sys.argv[1:] == ["every"]
kernels = []
compiled_options, finished, unfinished = set(), set(), {}
optimise, write, assemble = llvm.optimize_module, CUDABackend.make_ptx, CUDABackend.make_cubin


def compile_options(run, options, call):
    """In place of the first option that fits: the first one, or of every kernel once all of them."""
    for option in options if EVERY and call["kernel"] not in compiled_options else options[:1]:
        run(option)
    compiled_options.add(call["kernel"])
    return options[0]


def optimise_once(module, level):
    """LLVM and the assembler take half the time. The latter decides whether registers that a kernel names suffice."""
    text = str(module)
    name = re.search(r"^define .*@(\w+)\(", text, re.MULTILINE).group(1)
    if not EVERY and name in finished and "setmaxnreg" not in text:
        unfinished[text] = name
        return
    finished.add(name)
    optimise(module, level)


def write_finished(backend, text, metadata, *rest):
    if text not in unfinished:
        return write(backend, text, metadata, *rest)
    metadata["name"] = unfinished[text]
    return ""


def assemble_finished(backend, ptx, *rest):
    return assemble(backend, ptx, *rest) if ptx else b""


tuning._launch_first_that_fits = compile_options
llvm.optimize_module, CUDABackend.make_ptx, CUDABackend.make_cubin = optimise_once, write_finished, assemble_finished
launches.compile_launches(kernels.append)
sizes = dict(heads=32, kv_heads=2, dim=128)

launches.prefill_and_training(256, **sizes)
launches.hopper_attention(256, **sizes)
known = set(map(id, kernels))
# Triton would take 1 for a constant, and multiples of 16 for a case of their own.
for length, init_chunks in ((1, 1), (300, 2), (2064, 16)):
    launches.prefill_and_training(length, init_chunks=init_chunks, **sizes)
    launches.hopper_attention(length, **sizes)
again = {kernel.metadata.name for kernel in kernels if id(kernel) not in known}

launches.decoding(**sizes)
launches.largest_tiles()
launches.hopper_sizes()
launches.index_selection(256, kv_heads=2)

for kernel in {id(kernel): kernel for kernel in kernels}.values():
    report = dict(
        name=kernel.metadata.name,
        shared=kernel.metadata.shared,
        options=dict(warps=kernel.metadata.num_warps, stages=kernel.metadata.num_stages),
        wgmma="wgmma.mma_async" in kernel.asm["llir"],
        tma="cp.async.bulk.tensor" in kernel.asm["llir"],
        again=kernel.metadata.name in again,
    )
    print(json.dumps(report))

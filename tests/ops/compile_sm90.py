"""Compiles the kernels for sm_90 on a machine without a GPU, and prints one line of JSON for each.

Run as a script, by test_sm90_compile.py. With the argument ``every``, of each tuned kernel every one of its options;
else the first one, and of each kernel's variants only the first goes on to LLVM and the assembler: what all go through
already says how much shared memory they take and what they multiply with.
"""

import json
import os
import sys

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # a tenth of the time

import kernel_launches as launches
from triton._C.libtriton import llvm
from triton.backends.nvidia.compiler import CUDABackend

from dashattn.ops import tuning

EVERY = sys.argv[1:] == ["every"]
kernels = []
compiled_options, finished = set(), set()
lower, start_llvm, write, assemble = (
    CUDABackend.make_llir,
    llvm.init_targets,
    CUDABackend.make_ptx,
    CUDABackend.make_cubin,
)


class LoweredError(Exception):
    """To LLVM's dialect, which is enough."""


def compile_options(run, options, call):
    """In place of the first option that fits: the first one, or of every kernel once all of them."""
    for option in options if EVERY and call["kernel"] not in compiled_options else options[:1]:
        run(option)
    compiled_options.add(call["kernel"])
    return options[0]


def stop():
    raise LoweredError


def lower_once(backend, module, metadata, *rest):
    """LLVM and the assembler take half the time. The latter decides whether registers that a kernel names suffice."""
    name = module.get_entry_func_name()
    llvm.init_targets = start_llvm if EVERY or name not in finished or "requestedRegisters" in str(module) else stop
    try:
        text = lower(backend, module, metadata, *rest)
    except LoweredError:
        metadata |= dict(name=name, shared=module.get_int_attr("ttg.shared"))
        return ""
    finished.add(name)
    return text


def write_finished(backend, text, *rest):
    return text and write(backend, text, *rest)


def assemble_finished(backend, ptx, *rest):
    return assemble(backend, ptx, *rest) if ptx else b""


tuning._launch_first_that_fits = compile_options
CUDABackend.make_llir, CUDABackend.make_ptx, CUDABackend.make_cubin = lower_once, write_finished, assemble_finished
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
        wgmma="warp_group_dot " in kernel.asm["ttgir"],
        tma="async_tma_copy" in kernel.asm["ttgir"],
        again=kernel.metadata.name in again,
    )
    print(json.dumps(report))

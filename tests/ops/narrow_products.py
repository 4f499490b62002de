"""Finds 32-bit products in the kernels that a long context can drive past 2**31, and prints each as a line of JSON.

Run as a script, by test_offsets.py. Types of a kernel's values are seen in Triton's intermediate representation alone,
so that it is this that is read: of every kernel, at the first stage of its compilation. How large a value can become is
seen from where it comes:

- bounded: a constant, an element of a range, a remainder by a constant; a program id of the second or third dimension,
  of which CUDA allows 2**16; the quotient of a program id and a size, which is a head or a window.
- index: all others. A token, a slot, a place in a list, a size or stride: 2**31 is allowed, of tokens at least.

A product of an index with another, or with what is not constant, can leave 32 bits; so can a token's number times heads
or channels. Indices of tiles times the tokens of a tile are tokens. To tell the two apart the kernels are compiled for
3 KV heads of 15 query heads and 40 channels: of such groups 2, 4 or 8 tokens make a tile, a power of two, or three
tiles of 4 do.
"""

import json
import re
from pathlib import Path

import kernel_launches as launches
import torch
import triton
import triton.compiler
import triton.language as tl
from triton._C.libtriton import ir
from triton.compiler.compiler import make_backend

LARGEST_TILE = 64
THREE_TILES = 12
LARGEST_GRID = 2**16
LIMIT = 2**31

CONSTANT = re.compile(r"arith\.constant (?:dense<)?(-?\d+)>? : ")
OPERATION = re.compile(r"\s*%([\w#]+) = ([\w.]+)(.*)")
OPERAND = re.compile(r"%([\w#]+)")
SAME_VALUE = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "ttg.convert_layout")


def is_int32(line):
    return re.search(r"(: |x)i32(>|, #[^>]*>+)?( loc\(.*\))?$", line) is not None


class Locations:
    """Which line of source an operation comes from."""

    def __init__(self, text):
        self.definitions = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE))

    def source(self, line):
        where = re.search(r"loc\((.*)\)$", line).group(1)
        while True:
            place = re.match(r'"([^"]+\.py)":(\d+):\d+', where)
            if place:
                path, number = Path(place.group(1)), int(place.group(2))
                return f"{path.parent.name}/{path.name}", path.read_text().splitlines()[number - 1].strip()
            inner = re.search(r"#loc\d*", where)  # of a call: where the function called has it
            if inner is None:
                return "", where
            where = self.definitions[inner.group(0)]


class Bounded(int):
    """At most this."""


class Index(float):
    """At most 2**31 / LARGEST_TILE times this."""


ANY = Index(1)


def product(a, b):
    """What a product is, and whether it can leave 32 bits."""
    if isinstance(a, Bounded) and isinstance(b, Bounded):
        return Bounded(a * b), a * b >= LIMIT
    if isinstance(a, Index) and isinstance(b, Index):
        return ANY, True
    size, index = (a, b) if isinstance(a, Bounded) else (b, a)
    scale = Index(index * size)
    fits = size.constant and (size & (size - 1) == 0 or size == THREE_TILES) and scale <= LARGEST_TILE
    return (scale if fits else ANY), not fits


def largest(values):
    """Of values that are added or chosen from."""
    indices = [value for value in values if isinstance(value, Index)]
    if indices:
        return max(indices)
    return bounded(sum(values))


def bounded(limit, constant=False):
    value = Bounded(limit)
    value.constant = constant
    return value


def narrow_products(text):
    """(file, line of source) of each."""
    locations, found = Locations(text), set()
    values, captured, ids = {}, [], set()

    def of(name):
        return values.get(name, ANY)

    for line in text.splitlines():
        if "ttg.warp_specialize(" in line:
            captured = OPERAND.findall(line.split("ttg.warp_specialize(")[1].split(")")[0])
        partition = re.match(r"\s*partition\d+\((.*)\) num_warps", line)
        if partition:
            for name, source in zip(re.findall(r"%(\w+):", partition.group(1)), captured, strict=True):
                values[name] = of(source)
        loop = re.search(r"scf\.for %(\w+) = %\w+ to %(\w+) step", line)
        if loop:
            values[loop.group(1)] = of(loop.group(2))
        match = OPERATION.match(line)
        if not match:
            continue
        name, operation, rest = match.groups()
        operands = OPERAND.findall(rest.split(" : ")[0])
        values.pop(name, None)
        ids.discard(name)
        constant = CONSTANT.match(f"{operation}{rest}")
        if constant:
            values[name] = bounded(abs(int(constant.group(1))), constant=True)
        elif operation == "tt.get_program_id":
            if rest.strip().startswith("x"):
                ids.add(name)
            else:
                values[name] = bounded(LARGEST_GRID)
        elif operation == "tt.make_range":
            values[name] = bounded(int(re.search(r"end = (\d+)", rest).group(1)))
        elif operation in SAME_VALUE:
            values[name] = of(operands[0])
        elif not is_int32(line):
            continue
        elif operation == "arith.muli":
            value, is_narrow = product(*map(of, operands))
            values[name] = bounded(value) if isinstance(value, Bounded) else value
            if is_narrow:
                found.add(locations.source(line))
        elif operation in ("arith.addi", "arith.subi", "arith.maxsi", "arith.select"):
            values[name] = largest([of(x) for x in operands[operation == "arith.select" :]])
        elif operation == "arith.minsi":
            values[name] = min((of(x) for x in operands), key=lambda x: (isinstance(x, Index), x))
        elif operation == "arith.divsi":
            dividend, divisor = map(of, operands)
            if operands[0] in ids:
                ids.add(name)  # a quotient of a program id, of which a size may still be divided
            if isinstance(divisor, Bounded):
                values[name] = dividend if isinstance(dividend, Bounded) else Index(dividend / divisor)
            elif operands[0] in ids:
                values[name] = bounded(LARGEST_GRID)
        elif operation == "arith.remsi" and isinstance(of(operands[1]), Bounded):
            values[name] = bounded(of(operands[1]))
        elif operation == "arith.andi":
            limits = [of(x) for x in operands if isinstance(of(x), Bounded)]
            if limits:
                values[name] = bounded(min(limits))
        elif operation == "arith.extui":
            values[name] = bounded(1)
    return found


def first_stage(src, target=None, options=None, _env_vars=None):
    """In place of Triton's compiler: the text of the intermediate representation, all functions inlined."""
    backend = make_backend(target)
    options = backend.parse_options(dict(options, **src.parse_options()))
    stages = {}
    backend.add_stages(stages, options, src.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    implementation = backend.get_codegen_implementation(options)
    module = src.make_ir(target, options, implementation, backend.get_module_map(), context)
    module = next(iter(stages.values()))(module, dict(options.__dict__))
    return src.name, str(module)


@triton.jit(do_not_specialize=["capacity", "num_slots"])
def faulty(x, capacity, num_slots, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr):
    kv_head = tl.program_id(0) // num_slots
    slot = tl.program_id(0) % num_slots
    token = slot * TOKENS + tl.arange(0, TOKENS)
    tl.store(x + kv_head * HEAD_DIM + tl.program_id(1) * HEADS, 0.0)
    tl.store(x + kv_head.to(tl.int64) * capacity + slot, 0.0)
    tl.store(x + (token.to(tl.int64) * HEADS + kv_head) * HEAD_DIM, 0.0)
    tl.store(x + kv_head * capacity, 0.0)  # faulty
    tl.store(x + (tl.program_id(1) * num_slots + slot), 0.0)  # faulty
    tl.store(x + token * HEADS, 0.0)  # faulty
    tl.store(x + token.to(tl.int64) + slot * (2 * TOKENS) * TOKENS, 0.0)  # faulty
    tl.store(x + (tl.arange(0, TOKENS) * capacity).to(tl.int64), 0.0)  # faulty
    if slot * capacity < num_slots:  # faulty
        tl.store(x, 0.0)


if __name__ == "__main__":
    compiled = []
    triton.compiler.compile = first_stage
    launches.compile_launches(compiled.append)
    sizes = dict(heads=45, kv_heads=3)
    launches.prefill_and_training(300, **sizes, dim=40)
    for dim in (64, 128):  # tiles with and without idle rows
        launches.hopper_attention(300, **sizes, dim=dim)
    launches.decoding(**sizes, dim=40)
    faulty[(1,)](torch.zeros(1), 7, 7, HEADS=3, HEAD_DIM=40, TOKENS=16)
    reports = {}
    for name, text in compiled:
        reports.setdefault(name, set()).update(narrow_products(text))
    for name, found in reports.items():
        print(json.dumps(dict(kernel=name, products=sorted(found))))

"""No kernel multiplies, in 32 bits, what a long context can drive past 2**31."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent

# 32-bit products that stay within 2**31 for another reason than ``narrow_products`` can see.
BOUNDED = {
    # Tokens of a document, from the number of a tile of compressed keys.
    "first_seen = tile * KEYS * STRIDE + SIZE - 1",
    # Bit patterns of numbers that are not negative, between two of which these lie.
    "probes += (low + (i + 1) * step,)",
    # At most the number of blocks.
    "first_block = step // RATIO * (KEYS - AGAIN) - AGAIN",
    # Tiles: as many as programs of other kernels, of which CUDA allows 2**31.
    "while tile < num_slots * KV_HEADS:",
    # At most the number of blocks and one share more.
    "begin = tl.minimum(split * share, count)",
    # Checked where it is launched.
    "tile = in_block[:, None] * token_stride + dim[None, :]",
    # Counts bits: the upper ones are meant to be lost.
    "return ((x * 0x01010101) >> 24).to(tl.int32)",
}


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    """Of each kernel the source lines of its narrow products."""
    root = HERE.parent.parent
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "PYTHONPATH": str(root),
    }
    run = subprocess.run(
        [sys.executable, HERE / "narrow_products.py"],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return {report["kernel"]: report["products"] for report in map(json.loads, run.stdout.splitlines())}


def test_every_kernel_is_seen(products):
    sources = "".join(path.read_text() for path in (HERE.parent.parent / "dashattn").rglob("*.py"))
    assert products.keys() - {"faulty"} == set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))


def test_no_product_can_leave_32_bits(products):
    found = {source for kernel, lines in products.items() if kernel != "faulty" for _, source in lines}
    assert found == BOUNDED, f"make one factor 64 bits wide, .to(tl.int64): {found - BOUNDED}; gone: {BOUNDED - found}"


def test_what_is_to_be_found_is_found(products):
    """A kernel with every kind of fault, and lines without one."""
    faults = [source for _, source in products["faulty"]]
    text = (HERE / "narrow_products.py").read_text()
    assert faults == sorted(line.strip() for line in text.splitlines() if line.endswith("  # faulty"))

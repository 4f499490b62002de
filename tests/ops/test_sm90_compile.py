"""Every kernel of the main path compiles for Hopper, once, fits its shared memory and multiplies with wgmma."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
SHARED_MEMORY = 232_448  # bytes a block can have on sm_90


@pytest.mark.long
@pytest.mark.parametrize("options", ["first", pytest.param("every", marks=pytest.mark.slow)])
def test_kernels_compile_for_hopper(tmp_path, options):
    """Tuned kernels with the first of their options, or with every one."""
    root = HERE.parent.parent
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, HERE / "compile_sm90.py", options],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert all(kernel["shared"] <= SHARED_MEMORY for kernel in kernels)
    assert not [kernel["name"] for kernel in kernels if kernel["again"]]  # compiled anew for another length
    sources = "".join(path.read_text() for path in (root / "dashattn").rglob("*.py"))
    assert {kernel["name"] for kernel in kernels} == set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))
    multiplying = {k["name"]: k for k in kernels if k["wgmma"]}
    wanted = {
        "forward_kernel",
        "query_grad_kernel",
        "key_grad_kernel",
        "backward_kernel",
        "threshold_kernel",
        "softmax_kernel",
        "prior_kernel",
        "query_kernel",
        "summary_kernel",
        "band_kernel",
        "band_query_grad_kernel",
        "band_key_grad_kernel",
        "select_kernel",
    }
    assert wanted <= multiplying.keys()
    if options == "every":
        tuned = wanted - {"backward_kernel"}
        tried = {(k["name"], what, value) for k in kernels for what, value in k["options"].items()}
        assert {(name, "warps", number) for name in tuned for number in (4, 8)} <= tried
        assert {(name, "stages", number) for name in tuned for number in (1, 2)} <= tried
    gathering = {"key_grad_kernel", "backward_kernel", "band_key_grad_kernel", "query_kernel", "summary_kernel"}
    assert all(multiplying[name]["tma"] for name in wanted - gathering)

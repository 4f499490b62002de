"""The kernels read and write nothing but their tensors, by compute-sanitizer; some minutes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SANITIZER = shutil.which("compute-sanitizer")


@pytest.mark.slow
@pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer, of the CUDA toolkit")
def test_no_access_out_of_bounds():
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [SANITIZER, "--tool", "memcheck", sys.executable, str(ROOT / "tests/gpu/small_run.py")],
        env=os.environ | {"PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-8000:]
    assert "ERROR SUMMARY: 0 errors" in said, said[-8000:]

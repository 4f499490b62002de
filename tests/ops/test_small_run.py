"""What compute-sanitizer runs on a GPU runs here in Triton's interpreter, so that it keeps up with the library."""

import pytest
import torch

pytest.importorskip("triton")

from small_run import SmallRun


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_memcheck.py runs it on the GPU")
def test_the_program_for_compute_sanitizer():
    SmallRun("cpu", shrink=128, dtype=torch.float32).run()

"""These tests need a GPU; without one they are skipped."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")

"""Which implementation of an operation runs: the Triton kernels or PyTorch's reference."""

import os
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor

from dashattn import checks
from dashattn.checks import check

IMPLS = ("auto", "triton", "reference")
R = TypeVar("R")
HAS_TRITON = find_spec("triton") is not None  # here: torch.compile does not trace a search for modules


def kernels_can_run(*, on_cuda: bool) -> bool:
    """On a GPU, or in Triton's interpreter."""
    return on_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def use_kernels(impl: str, q: Tensor, block_size: int, unsupported: str | None = None) -> bool:
    """Whether the Triton kernels run: ``auto`` takes them where they fit, ``triton`` insists and says what does not.

    Args:
        unsupported: why they cannot, if the operation already knows.
    """
    checks.check_choice("impl", impl, IMPLS)
    if impl == "reference" or (impl == "auto" and not q.is_cuda):
        return False
    can_run = kernels_can_run(on_cuda=q.is_cuda)
    try:
        check(can_run, f"impl='triton' needs tensors on a GPU, q is on {q.device}: use impl='auto' or 'reference'")
        check(HAS_TRITON, "impl='triton' needs Triton: pip install triton, or use impl='reference'")
        check(unsupported is None, f"impl='triton': {unsupported}; use impl='auto' or 'reference'")
        from dashattn.ops.block_sparse.triton import check_kernels_fit

        check_kernels_fit(q, block_size)
    except ValueError:
        if impl == "triton":
            raise
        return False
    return True


def without_autocast(attention: Callable[..., R]) -> Callable[..., R]:
    """Inputs decide the precision: autocast would take the float32 sums inside to 16 bits."""

    @wraps(attention)
    def wrapped(q: Tensor, *args, **kwargs) -> R:
        if not torch.is_autocast_enabled(q.device.type):  # asking is faster than forbidding
            return attention(q, *args, **kwargs)
        with torch.autocast(q.device.type, enabled=False):
            return attention(q, *args, **kwargs)

    return wrapped

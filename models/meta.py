"""Modules without memory of their own: shapes are all that counting takes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _Unfilled(TorchFunctionMode):
    """Weights are left as they are allocated: to fill those on the meta device, PyTorch imports its compiler."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def without_memory() -> Iterator[None]:
    """What is built in here has shapes and types, and lies on the meta device."""
    with torch.device("meta"), _Unfilled():
        yield

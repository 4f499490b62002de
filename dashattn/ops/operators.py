"""Operators that torch.compile takes as they are, and that cost an eager call little beside what they do."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PLAIN = (Tensor, torch.nn.Parameter)


class Operator:
    """A function on tensors, and the custom operator of PyTorch that it is.

    Compiled, or given tensors of another kind (fake ones, say), a call is one of ``op``. Otherwise it is one of the
    function, with autograd around it: PyTorch's dispatcher of Python operators takes as long as the host needs for the
    rest of a short call, and fills gradients with zeros of outputs that nobody has used.
    """

    def __init__(self, name: str, function: Callable):
        self.function = function
        self.op = torch.library.custom_op(f"dashattn::{name}", function, mutates_args=())
        self.register_fake = self.op.register_fake
        self._differentiable: Callable | None = None

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """As of a ``custom_op``; gradients of outputs that were not used are None."""

        def forward(ctx, *inputs):
            output = self.function(*inputs)
            ctx.set_materialize_grads(False)
            setup_context(ctx, inputs, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
        self.op.register_autograd(backward, setup_context=setup_context)
        self._differentiable = type(self.function.__name__, (torch.autograd.Function,), methods).apply

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """``options`` are for an operator without gradients."""
        if torch.compiler.is_compiling() or type(inputs[0]) not in PLAIN:
            return self.op(*inputs, **options)
        if torch.is_grad_enabled():
            if self._differentiable is not None:
                return self._differentiable(*inputs, **options)
            if any(isinstance(x, Tensor) and x.requires_grad for x in (*inputs, *options.values())):
                return self.op(*inputs, **options)  # whose backward says that there is none
        with torch.no_grad():
            return self.function(*inputs, **options)


def operator(name: str) -> Callable[[Callable], Operator]:
    """Decorator: the function as the operator ``dashattn::name``, which changes none of its inputs."""
    return lambda function: Operator(name, function)

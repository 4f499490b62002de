"""Cross-entropy from hidden states, without logits of all tokens at once.

N tokens, E hidden size, V vocabulary. At V = 128k the float32 logits of 8k tokens alone are 4 GiB, and the gradient as
much again. Here the output head runs over chunks of tokens, and the gradient of a chunk is taken while its logits
exist: nothing is recomputed.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
CHUNK_LOGITS = 2**27  # of a chunk: 512 MiB in float32; each adds once to the weight's gradient, as large as the weight


def chunk_loss(logits_NV: Tensor, labels_N: Tensor, *, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """The loss of each token, 0 where ignored, and the gradient of its sum over the logits, in their dtype.

    Rows of ignored labels hold anything in the gradient, and the logits may be overwritten with it. Passes over
    [N, V] are what it costs: compiled, one reads the logits, and one reads them and writes the gradient.
    """
    log_p = logits_NV.log_softmax(-1, dtype=torch.promote_types(logits_NV.dtype, torch.float32))
    losses = F.nll_loss(log_p, labels_N, ignore_index=IGNORE, reduction="none")
    if not with_grad:
        return losses, None
    # Rounded as it is written, a pass less; where the logits were, except that compiled this would take one more.
    out = logits_NV.new_empty(logits_NV.shape) if torch.compiler.is_compiling() else logits_NV
    grad = torch.exp(log_p, out=out)
    token = torch.arange(len(labels_N), device=labels_N.device)
    grad[token, labels_N.clamp(min=0)] = torch.expm1(-losses).to(grad.dtype)  # p - 1, then rounded
    return losses, grad


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, rounded to the wider type of ``total`` alone and in one kernel, where there is such."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def cross_entropy(
    hidden_BTE: Tensor,
    weight_VE: Tensor,
    labels_BT: Tensor,
    targets: Tensor | None = None,
    *,
    chunk_loss: Callable = chunk_loss,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean loss over the labels that are not -100 (0 when there is none), the loss of every token, and whether its
    label is the likeliest token.

    Args:
        hidden_BTE: what the output head reads.
        weight_VE: the output head, in the same dtype.
        labels_BT: int64; -100 is ignored.
        targets: over how many the mean is, where there are others elsewhere; None = those in ``labels_BT``.
        chunk_loss: the function of this name, or what it was compiled to.

    Returns:
        Scalar, differentiable; [B, T] in nats without gradient, 0 where ignored. Both float32, float64 for float64.
        Bool [B, T], False where ignored; None where gradients are taken, which nobody asks this.
    """
    is_likeliest = None
    if not torch.is_grad_enabled():  # which the function below cannot tell
        hidden_BTE, weight_VE = hidden_BTE.detach(), weight_VE.detach()
        is_likeliest = torch.zeros(labels_BT.shape, dtype=torch.bool, device=labels_BT.device)
    inputs = (hidden_BTE.flatten(0, 1), weight_VE, labels_BT.flatten())
    total, token_losses = _SumOfLosses.apply(*inputs, chunk_loss, is_likeliest)
    if targets is None:
        targets = (labels_BT != IGNORE).sum()
    return total / targets.clamp(min=1), token_losses.view_as(labels_BT), is_likeliest


class _SumOfLosses(torch.autograd.Function):
    """The gradient of the sum is the same for every scale of the loss, so the forward pass can take it."""

    @staticmethod
    def forward(ctx, hidden_NE, weight_VE, labels_N, chunk_loss, is_likeliest):
        chunks = range(0, len(hidden_NE), max(1, CHUNK_LOGITS // len(weight_VE)))
        size = chunks.step
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        accumulator = torch.promote_types(weight_VE.dtype, torch.float32)
        token_losses = hidden_NE.new_empty(len(hidden_NE), dtype=accumulator)
        grad_hidden = torch.empty_like(hidden_NE) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VE, dtype=accumulator) if needs_weight else None
        for start in chunks:
            part = slice(start, start + size)
            hidden, labels = hidden_NE[part], labels_N[part]
            logits = F.linear(hidden, weight_VE)
            if is_likeliest is not None:
                is_likeliest.view(-1)[part] = logits.argmax(-1) == labels
            token_losses[part], grad = chunk_loss(logits, labels, with_grad=needs_hidden or needs_weight)
            ignored = (labels == IGNORE)[:, None]  # masks what is multiplied with, which is narrower
            if needs_hidden:
                grad_hidden[part] = (grad @ weight_VE).masked_fill_(ignored, 0)
            if needs_weight:
                _add_product(grad_weight, grad.T, hidden.masked_fill(ignored, 0))
            del logits, grad  # before the next chunk's come
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VE.dtype
        ctx.mark_non_differentiable(token_losses)
        return token_losses.sum(), token_losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_total).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None

"""alpha-entmax in PyTorch, the definition (Peters et al. 2019; gradients: Correia et al. 2019, arXiv 1909.00015).

p = max((alpha - 1) s - tau, 0) ** (1 / (alpha - 1)),   tau such that sum p = 1
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MIN_ALPHA, MAX_ALPHA = 1.01, 2.0
_TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13}
_SERIES_TERMS = {torch.float32: 10, torch.float64: 24}
_MAX_STEPS = 64


def entmax(scores: Tensor, alpha: float | Tensor, candidates: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """alpha-entmax over the last dimension.

    Args:
        scores: float32 or float64 [..., N].
        alpha: in [1.01, 2]; a float, or a tensor that broadcasts against ``scores`` with last dimension 1.
        candidates: bool, broadcasts to ``scores``; the others get probability 0. None: all are candidates.

    Returns:
        ``(p, log_p)``, each [..., N]. ``sum p = 1`` to 1e-5 (float32) or 1e-12 (float64); a row without candidates
        is all 0. ``log_p`` is -inf off the support, and nowhere else: ask it rather than p, which underflows on much
        of the support of a small alpha. Differentiate ``log_p`` rather than ``p.log()`` too: near the edge of the
        support ``1 / p`` overflows where the gradient of ``log_p`` does not.
    """
    if candidates is not None:
        scores = scores.masked_fill(~candidates, -torch.inf)
    alpha = torch.as_tensor(alpha, dtype=scores.dtype, device=scores.device)
    return _Entmax.apply(scores, alpha)


def _solve(scores: Tensor, alpha: Tensor) -> Tensor:
    """``z = max((alpha - 1) s - tau, 0)`` with ``sum z ** (1 / (alpha - 1)) = 1``; rows of -inf give 0.

    Newton's method on the convex, decreasing ``f(tau) = sum p - 1`` from the left end of the bracket, where it
    cannot overshoot. Scores are shifted by their maximum first, or flat rows of large scores lose the digits.
    """
    highest = scores.amax(-1, keepdim=True)
    empty = highest == -torch.inf
    x = (alpha - 1) * (scores - highest.masked_fill(empty, 0))
    exponent = 1 / (alpha - 1)
    if alpha.ndim == 0:
        exponent = exponent.item()  # torch's pow is much faster for a constant exponent of 1 or 2
    tau = torch.full_like(highest, -1.0)
    for _ in range(_MAX_STEPS):
        z = (x - tau).clamp_min(0)
        slope = z ** (exponent - 1)
        excess = ((slope * z).sum(-1, keepdim=True) - 1).masked_fill(empty, 0)
        unsolved = ~(excess.abs() <= _TOLERANCE[scores.dtype])  # of a row that is not finite, too
        if not unsolved.any():
            break
        step = excess / (exponent * slope.masked_fill(z == 0, 0).sum(-1, keepdim=True)).masked_fill(empty, 1)
        tau = torch.where(unsolved, tau + step, tau)  # a row's result does not depend on those beside it
    return (x - tau).clamp_min(0)


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, alpha):
        z = _solve(scores, alpha) if scores.numel() else scores.clone()
        log_p = z.log() / (alpha - 1)
        p = log_p.exp()
        ctx.save_for_backward(z, p, alpha)
        return p, log_p

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_p, grad_log_p):
        # On the support z = p ** (alpha - 1) = x - tau with |tau| >= N ** (1 - alpha), so that in float32
        # 1 / z = p ** (1 - alpha) is at most 2 ** 24 * N; 1 / p has no such bound. With u = p ** (2 - alpha) = p / z:
        # ds = u g - u sum(u g) / sum(u).
        z, p, alpha = ctx.saved_tensors
        support = z > 0
        reciprocal = torch.where(support, 1 / torch.where(support, z, 1), 0)
        u = p * reciprocal
        u_sum = u.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
        grad_log_p = grad_log_p.masked_fill(~support, 0)
        ug = u * grad_p + reciprocal * grad_log_p
        grad_scores = ug - u * ug.sum(-1, keepdim=True) / u_sum

        grad_alpha = None
        if ctx.needs_input_grad[1]:
            # dlog p = (sum(u k) / sum(u) - k) / (z (alpha - 1) ** 2) with k = 1 - z + z log z: equation 8 of Correia et
            # al. rearranged, whose terms nearly cancel at small alpha, where z is close to 1.
            k = _entropy_gap(z)
            mean = (u * k).sum(-1, keepdim=True) / u_sum
            grad_alpha = ((ug * (mean - k)) / (alpha - 1) ** 2).sum_to_size(alpha.shape)
        return grad_scores, grad_alpha


def _entropy_gap(z: Tensor) -> Tensor:
    """1 - z + z log z for z in [0, 1], to relative precision also near 1, where it is (1 - z) ** 2 / 2."""
    t = 1 - z
    series = torch.zeros_like(t)
    for n in range(2 + _SERIES_TERMS[t.dtype], 1, -1):
        series = series * t + 1 / (n * (n - 1))
    return torch.where(t < 0.25, t * t * series, t + torch.special.xlogy(z, z))

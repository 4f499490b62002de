"""Dense causal attention through PyTorch's SDPA. Shapes: B batch, T tokens, Hq / Hkv heads, D head size."""

import warnings
from contextlib import nullcontext
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dashattn.documents import per_document

# cuDNN's kernels are the fastest that PyTorch brings for Hopper, but plan each new shape. PyTorch's own choice differs
# with the heads.
PLANLESS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, *PLANLESS]
ROW_UNIT = 128  # tokens; rows of a data set have a multiple of it
LARGE = 2**39  # query-key pairs times channels, over all heads and rows
HALVES = (torch.bfloat16, torch.float16)


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Causal softmax attention of q [B, T, Hq, D] over k, v [B, T, Hkv, D].

    Packed documents in 16 bits on a GPU are one call of FlashAttention, elsewhere one of SDPA each. Not cuDNN's ragged
    batches: PyTorch 2.11 plans them anew in every call, which takes 48 ms, and their backward takes the head size for
    the longest document.
    """
    if cu_seqlens is not None and q.is_cuda and q.dtype in HALVES and q.shape[-1] in range(8, 257, 8):
        from dashattn.ops.full.varlen import GROUPED, varlen_attn

        longest = q.shape[1] if max_seqlen is None else max_seqlen
        documents = (cu_seqlens, cu_seqlens, longest, longest)
        out = varlen_attn(q[0], k[0], v[0], *documents, scale=scale, window_size=(-1, 0), **GROUPED)
        return out[None]

    def attend(*qkv_BTHD):
        q_BHTD, k_BHTD, v_BHTD = (x.transpose(1, 2) for x in qkv_BTHD)
        with sdpa_kernel(kernels, set_priority=True) if q.is_cuda else nullcontext():
            out = F.scaled_dot_product_attention(
                q_BHTD, k_BHTD, v_BHTD, is_causal=True, scale=scale, enable_gqa=q.shape[2] != k.shape[2]
            )
        return out.transpose(1, 2)

    kernels = dense_kernels(q, cu_seqlens)
    return torch.cat(per_document(attend, cu_seqlens, q, k, v), dim=1)


def dense_kernels(q: Tensor, cu_seqlens: Tensor | None) -> list[SDPBackend]:
    """What SDPA may take, first what it should."""
    if flash_attention_3_is_active() and q.dtype in HALVES:
        return PLANLESS
    return CUDNN_FIRST if cu_seqlens is None and pays_for_a_plan(q.shape) else PLANLESS


def flash_attention_3_is_active() -> bool:
    """Whether PyTorch's FlashAttention is version 3 in this process, which on Hopper is faster than cuDNN."""
    return getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)() == "FA3"


def use_flash_attention_3(device: torch.device) -> None:
    """Lets PyTorch's FlashAttention be version 3, for the whole process, where flash_attn_interface is installed and
    ``device`` is a Hopper. For programs, not for libraries; a package that PyTorch cannot use is warned of."""
    has_impls = hasattr(torch.nn.attention, "activate_flash_attention_impl")  # from PyTorch 2.11 on
    if device.type != "cuda" or not has_impls or find_spec("flash_attn_interface") is None:
        return
    if torch.cuda.get_device_capability(device)[0] != 9:
        return
    try:
        torch.nn.attention.activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError, OSError) as error:
        warnings.warn(f"flash_attn_interface is installed, but PyTorch cannot use it: {error}", stacklevel=2)


def pays_for_a_plan(shape_BTHD: torch.Size) -> bool:
    """Whether cuDNN's kernels are worth the plan of about 50 ms that they take for every new shape of the queries.

    In training they are, and for the rows of a data set: those are alike, and their length is a multiple of
    ``ROW_UNIT``. A prompt's length mostly is not, and comes once: there they are where a pass or two through the layers
    of a model gain what the plan takes. Only the shape and the mode decide, so that equal inputs give equal outputs.
    """
    if torch.is_grad_enabled():
        return True
    batch, length, heads, dim = shape_BTHD
    return length % ROW_UNIT == 0 or batch * heads * length * length * dim >= LARGE

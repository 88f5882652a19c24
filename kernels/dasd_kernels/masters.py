"""fp32 master weights in the four bytes that they need: the nearest bf16, which a model computes with, and the sixteen
bits beyond it. A copy in bf16 beside fp32 masters would take six.

    high, low = split(weight)                    # join(high, low) is weight, bit for bit
    adamw(high, low, exp_avg, exp_avg_sq, grad, ...)

`high` is rounded to nearest; a tie, half way between two bf16, goes away from zero, so that `low` fits an int16.
"""

import torch
from torch import Tensor

from dasd_kernels import _C
from dasd_kernels.pointwise import bf16


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """(high bf16, low int16) of fp32 `x`, finite, in its shape."""
    bits = x.contiguous().view(torch.int32)
    high, low = (torch.empty_like(bits, dtype=torch.int16) for _ in range(2))
    for h, rest, b in zip(*(t.view(-1).split(1 << 20) for t in (high, low, bits)), strict=True):  # small temporaries
        h.copy_((b + 0x8000) >> 16)
        rest.copy_(b)
    return high.view(torch.bfloat16), low


def join(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 tensor that `split` took apart."""
    return high.view(torch.int16).to(torch.int32).bitwise_left_shift_(16).add_(low).view(torch.float32)


def adamw(
    high: Tensor,
    low: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: float = 1.0,
) -> None:
    """A step of AdamW (arXiv 1711.05101), the `step`-th from 1, in place: weights `high` bf16 and `low` int16, moments
    fp32, for gradients `grad`, bf16 or fp32, times `scale`; contiguous tensors of one shape on the CPU. One pass over
    memory, computed in fp32.
    """
    beta1, beta2 = betas
    options = (
        scale, beta1, beta2, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, eps, 1 - lr * weight_decay,
    )  # fmt: skip
    _C.adamw(
        high.data_ptr(), low.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), grad.data_ptr(), options,
        grad.numel(), bf16(grad), torch.get_num_threads(),
    )  # fmt: skip

"""fp32 master weights in the four bytes that they need: the nearest bf16, which a model computes with, and the sixteen
bits beyond it. A copy in bf16 beside fp32 masters would take six.

    high, low = split(weight)          # join(high, low) is weight, bit for bit
    adamw(high, ..., low=low)          # dasd_kernels.adamw

`high` is rounded to nearest; a tie, half way between two bf16, goes away from zero, so that `low` fits an int16.
"""

import torch
from torch import Tensor


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

"""fp32 master weights of a process that trains alone in bf16: its parameters are bf16, the sixteen bits that they lack
lie beside them (dasd_kernels.masters), and there is no second copy of the weights to hold or make."""

import torch
from torch import Tensor

from dasd_kernels import masters


def split_masters(model: torch.nn.Module) -> None:
    """From here on the fp32 parameters of `model` are bf16, and `low_bits` has the rest of each."""
    for p in model.parameters():
        p.data, low = masters.split(p.data)
        setattr(p, "low_bits", low)  # noqa: B010


def low_bits(p: Tensor) -> Tensor | None:
    """int16, in the shape of a parameter that was split; None for others."""
    return getattr(p, "low_bits", None)


def master(p: Tensor) -> Tensor:
    """The fp32 value of a parameter: itself, or a copy where it was split."""
    low = low_bits(p)
    return p.detach() if low is None else masters.join(p.detach(), low)

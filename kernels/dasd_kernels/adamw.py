"""AdamW (arXiv 1711.05101) in one pass over memory, on fp32 weights, whole or in the halves of dasd_kernels.masters,
with moments in fp32 or in three bytes a weight:

    first, second = moments(weight, compact=True)
    adamw(weight, first, second, grad, step=1, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

Compact moments are the second one, v, in bf16, and the first one as its ratio to the root of v in eight bits. An update
is that ratio up to a constant, so it has one scale everywhere, |ratio| <= (1 - β1) / √((1 - β2)(1 - β1²/β2)), and needs
no scales of blocks. The eight bits are a sign and the bits of |ratio| + 2^-11 past those of 2^-11, from the third of
the mantissa up: steps of 2^-14 near zero, of 1/16 to 1/8 of the ratio above 2^-11, up to 30. Rounding is
stochastic, up as often as the value is near the upper neighbour; to nearest, a moment would not decay that loses less
than half a step of its format at a time. The random bits are a hash of the step and of each weight's place, so that
neither threads nor how ranks cut a tensor leave a trace.
"""

import torch
from torch import Tensor

from dasd_kernels import _C
from dasd_kernels.pointwise import bf16


def moments(weight: Tensor, *, compact: bool) -> tuple[Tensor, Tensor]:
    """Those of no step yet, in the shape of `weight`, a DTensor's too: fp32, or int8 and bf16."""
    dtypes = (torch.int8, torch.bfloat16) if compact else (torch.float32, torch.float32)
    first, second = (torch.zeros_like(weight, dtype=dtype) for dtype in dtypes)
    return first, second


def adamw(
    weight: Tensor,
    first: Tensor,
    second: Tensor,
    grad: Tensor,
    *,
    low: Tensor | None = None,
    place: int = 0,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: float = 1.0,
) -> None:
    """The `step`-th step, from 1, in place, for gradients `grad` times `scale`; computed in fp32.

    Args:
        weight: fp32, or bf16 where the rest is in `low`, int16, as masters.split has it (CPU).
        first, second: as `moments` made them; fp32 ones on a CPU alone, since torch's fused AdamW has them elsewhere.
        grad: fp32 or bf16. All are contiguous, of one shape and on one device.
        place: number of the first weight, for the rounding of compact moments: of a piece, where it begins.

    Raises:
        ValueError: tensors that are not so; says which.
    """
    check(weight, low, first, second, grad)
    options, seed = constants(step, lr, betas, eps, weight_decay, scale)
    compact, place = first.dtype == torch.int8, place & 0x7FFFFFFF
    if weight.device.type != "cpu":
        from dasd_kernels.triton_adamw import launch

        launch(weight, first, second, grad, options, place, seed)
        return
    _C.adamw(
        weight.data_ptr(), 0 if low is None else low.data_ptr(), first.data_ptr(), second.data_ptr(), compact,
        grad.data_ptr(), options, place, seed, grad.numel(), bf16(grad), torch.get_num_threads(),
    )  # fmt: skip


def check(weight: Tensor, low: Tensor | None, first: Tensor, second: Tensor, grad: Tensor) -> None:
    """ValueError for what the kernels would misread."""
    named = {"weight": weight, "first": first, "second": second, "grad": grad} | ({} if low is None else {"low": low})
    for name, t in named.items():
        if t.shape != weight.shape or t.device != weight.device or not t.is_contiguous():
            raise ValueError(
                f"{name} {tuple(t.shape)} on {t.device}, strides {t.stride()}: must be contiguous and like weight "
                f"{tuple(weight.shape)} on {weight.device}"
            )
    wanted = torch.float32 if low is None else torch.bfloat16
    if weight.dtype != wanted or (low is not None and (low.dtype != torch.int16 or weight.device.type != "cpu")):
        raise ValueError(f"weight {weight.dtype}: must be float32, or bfloat16 beside `low`, int16, on a CPU")
    if (first.dtype, second.dtype) not in ((torch.float32, torch.float32), (torch.int8, torch.bfloat16)):
        raise ValueError(f"moments {first.dtype} and {second.dtype}: must be as `moments` makes them")
    if first.dtype == torch.float32 and weight.device.type != "cpu":
        raise ValueError("fp32 moments are for weights on a CPU; elsewhere take torch.optim.AdamW(fused=True)")
    if grad.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"grad {grad.dtype}: must be float32 or bfloat16")


def constants(
    step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, scale: float
) -> tuple[tuple[float, ...], int]:
    """What a step is to the kernels, and the seed of its stochastic rounding."""
    beta1, beta2 = betas
    rate, root = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    return (scale, beta1, beta2, rate, root, eps, 1 - lr * weight_decay), (step * 0x9E3779B1) & 0x7FFFFFFF

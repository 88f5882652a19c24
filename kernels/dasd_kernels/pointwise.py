"""A decoder's operations between its matrix products, each one pass over memory forward and one backward, on the CPU.

    y = rms_norm(x, weight, eps);  q = rotate(q, cos, sin);  y = swiglu(gate, up)

fp32 and bf16, computed in fp32 and rounded once; torch computes them as five to twenty operations with copies in fp32
between. Other devices take torch's operations.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dasd_kernels import _C


def usable(*tensors: Tensor) -> bool:
    """On the CPU, all of one dtype, fp32 or bf16."""
    x = tensors[0]
    kind = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    return kind and all(t.dtype == x.dtype for t in tensors)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last axis (arXiv 1910.07467): x [..., D], weight [D], in x's dtype."""
    if not usable(x, weight):
        return F.rms_norm(x, weight.shape, weight, eps)
    return norm(x, weight, eps)[0]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202), tensors of one shape and dtype."""
    return silu_times(gate, up) if usable(gate, up) else SiluTimes.apply(gate, up)


def rotate(x_THK: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    """Rotates the pairs (i, i + K // 2) of every head (arXiv 2104.09864): x [T, H, K], cos and sin fp32 [T, 1, K // 2];
    computed in fp32, returned in x's dtype. cos and sin are constants."""
    if usable(x_THK) and cos_T1R.dtype == torch.float32 and 2 * cos_T1R.shape[-1] == x_THK.shape[-1]:
        return turn(x_THK, cos_T1R, sin_T1R, 1.0)
    a, b = x_THK.chunk(2, dim=-1)
    return torch.cat((a * cos_T1R - b * sin_T1R, b * cos_T1R + a * sin_T1R), dim=-1).to(x_THK.dtype)


def sum_of_squares(x: Tensor) -> float:
    """In float64, whatever x's dtype and however many threads: the same number on every run."""
    if usable(x) and x.is_contiguous():
        return _C.sum_of_squares(x.data_ptr(), x.numel(), bf16(x), torch.get_num_threads())
    return torch.linalg.vector_norm(x, dtype=torch.float64).square().item()


def bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


@torch.library.custom_op("dasd_kernels::rms_norm", mutates_args=())
def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, 1 / rms a row)."""
    x, weight = x.contiguous(), weight.contiguous()
    y, width = torch.empty_like(x), x.shape[-1]
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    _C.rms_norm(
        x.data_ptr(), weight.data_ptr(), rstd.numel(), width, bf16(x), eps, y.data_ptr(), rstd.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y, rstd


@norm.register_fake
def _(x, weight, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("dasd_kernels::rms_norm_backward", mutates_args=())
def norm_backward(x: Tensor, weight: Tensor, rstd: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, weight, dy = x.contiguous(), weight.contiguous(), dy.contiguous()
    dx, dweight, width = torch.empty_like(x), torch.empty_like(weight), x.shape[-1]
    partial = x.new_empty(_C.norm_parts, width, dtype=torch.float32)
    _C.rms_norm_backward(
        x.data_ptr(), weight.data_ptr(), rstd.numel(), width, bf16(x), rstd.data_ptr(), dy.data_ptr(), dx.data_ptr(),
        dweight.data_ptr(), partial.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dx, dweight


@norm_backward.register_fake
def _(x, weight, rstd, dy):
    contiguous = torch.contiguous_format
    return torch.empty_like(x, memory_format=contiguous), torch.empty_like(weight, memory_format=contiguous)


def norm_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def norm_gradients(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None, None, None) if dy is None else (*norm_backward(*ctx.saved_tensors, dy), None)


norm.register_autograd(norm_gradients, setup_context=norm_setup)


@torch.library.custom_op("dasd_kernels::swiglu", mutates_args=())
def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    width = y.shape[-1] if y.dim() else 1
    rows = y.numel() // max(width, 1)
    _C.swiglu(gate.data_ptr(), up.data_ptr(), y.data_ptr(), rows, width, bf16(y), torch.get_num_threads())
    return y


@silu_times.register_fake
def _(gate, up):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@torch.library.custom_op("dasd_kernels::swiglu_backward", mutates_args=())
def silu_times_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    gate, up, dy = gate.contiguous(), up.contiguous(), dy.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    _C.swiglu_backward(
        gate.data_ptr(), up.data_ptr(), dy.data_ptr(), dgate.data_ptr(), dup.data_ptr(), dy.numel(), bf16(dy),
        torch.get_num_threads(),
    )  # fmt: skip
    return dgate, dup


@silu_times_backward.register_fake
def _(gate, up, dy):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))


silu_times.register_autograd(
    lambda ctx, dy: silu_times_backward(*ctx.saved_tensors, dy),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class SiluTimes(torch.autograd.Function):
    """The same of torch's operations, which by themselves would keep silu(gate) for backward as well."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)


@torch.library.custom_op("dasd_kernels::rotate", mutates_args=())
def turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    tokens, heads, width = x.shape
    if x.stride()[1:] != (width, 1):
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _C.rotate(
        x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr(), sign, y.data_ptr(), tokens, heads, width, bf16(x),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


@turn.register_fake
def _(x, cos, sin, sign):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def turn_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, cos, sin, ctx.sign = inputs
    ctx.save_for_backward(cos, sin)


turn.register_autograd(
    lambda ctx, dy: (turn(dy, *ctx.saved_tensors, -ctx.sign), None, None, None), setup_context=turn_setup
)

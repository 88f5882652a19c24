"""Causal attention inside documents on a CPU, forward and backward: fp32 (csrc/decode), and bf16 where the CPU has
AVX512-BF16 (csrc/attention).

    out = document_attention(q, k, v, lengths)          # [T, H, K], [T, G, K], [T, G, K] -> [T, H, K]

torch's own attention on a CPU is called a document at a time; this takes the whole pack as it lies and skips what the
mask hides. docs/dev/LOG.md has both times. The forward is a generator's, to the bit: `dasd_kernels.decode`.
"""

from typing import Any

import torch
from torch import Tensor

from dasd_kernels import _C, decode


def supported(q: Tensor) -> bool:
    """Whether `document_attention` can take these queries [T, H, K]: fp32 with K a multiple of 16, or bf16 with K a
    multiple of 64 on a CPU with AVX512-BF16."""
    if q.device.type != "cpu":
        return False
    if q.dtype == torch.float32:
        return q.shape[-1] % 16 == 0
    return q.dtype == torch.bfloat16 and q.shape[-1] % 64 == 0 and _C.attention_supported()


def document_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, lengths: tuple[int, ...], *, scale: float | None = None
) -> Tensor:
    """Causal attention inside each document: [T, H, K] in q's dtype.

    `q_THK` [T, H, K]; `k_TGK`, `v_TGK` [T, G, K], H a multiple of G, all fp32 with K a multiple of 16, or bf16 with K a
    multiple of 64; `lengths` of the documents, whose sum is T; `scale` multiplies the scores, by default 1/sqrt(K). Of
    bf16, probabilities and their gradients are rounded to bf16 between products; all sums are fp32. A document's
    results depend on nothing beside it.

    ValueError for other shapes, dtypes or lengths, and for bf16 on a CPU without AVX512-BF16.
    """
    tokens, heads, width = q_THK.shape
    groups, dtypes = k_TGK.shape[1], [x.dtype for x in (q_THK, k_TGK, v_TGK)]
    if len(set(dtypes)) > 1 or dtypes[0] not in (torch.float32, torch.bfloat16):
        raise ValueError(f"q, k, v must be all fp32 or all bf16, are {', '.join(map(str, dtypes))}")
    whole = 16 if dtypes[0] == torch.float32 else 64
    if k_TGK.shape != (tokens, groups, width) or v_TGK.shape != k_TGK.shape or heads % groups or width % whole:
        raise ValueError(
            f"q [T, H, K] and k, v [T, G, K], H a multiple of G and K of {whole}, are {list(q_THK.shape)}, "
            f"{list(k_TGK.shape)}, {list(v_TGK.shape)}"
        )
    if not supported(q_THK):
        raise ValueError("attention in bf16 needs a CPU with AVX512-BF16: give it fp32")
    if sum(lengths) != tokens or min(lengths, default=0) < 0:
        raise ValueError(f"lengths {lengths} do not add up to the pack's {tokens} tokens")
    return attend(q_THK, k_TGK, v_TGK, list(lengths), width**-0.5 if scale is None else scale)[0]


@torch.library.custom_op("dasd_kernels::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> tuple[Tensor, Tensor]:
    """(out [T, H, K] in q's dtype, lse [H, T] fp32, of natural logarithms)."""
    if q.dtype == torch.float32:
        lse = q.new_empty(q.shape[1], q.shape[0])
        return decode.attend_pack(q, k, v, lengths, scale, lse_HT=lse), lse
    q, k, v = (readable(x) for x in (q, k, v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    _C.attention_forward(
        lengths, shape(q, k, scale), where(q), where(k), where(v), where(out), lse.data_ptr(), torch.get_num_threads()
    )
    return out, lse


@attend.register_fake
def _(q, k, v, lengths, scale):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("dasd_kernels::attend_backward", mutates_args=())
def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, lengths: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq [T, H, K], dk, dv [T, G, K]), in q's dtype."""
    if q.dtype == torch.float32:
        return decode.attend_pack_backward(q, k, v, out, lse, dout, lengths, scale)
    q, k, v, out, dout = (readable(x) for x in (q, k, v, out, dout))
    dq, dk, dv = gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    partial = q.new_empty(2, q.shape[1], q.shape[0], q.shape[2], dtype=torch.float32)
    _C.attention_backward(
        lengths, shape(q, k, scale), tuple(map(where, (q, k, v, out, dout))), lse.data_ptr(),
        tuple(map(where, gradients)), partial.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dq, dk, dv


@attend_backward.register_fake
def _(q, k, v, out, lse, dout, lengths, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def readable(x: Tensor) -> Tensor:
    """`x` itself where its heads' rows are contiguous and even steps apart, else a copy."""
    return x if x.stride(2) == 1 and x.stride(0) % 2 == 0 and x.stride(1) % 2 == 0 else x.contiguous()


def where(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def shape(q: Tensor, k: Tensor, scale: float) -> tuple[int, int, int, float]:
    return q.shape[1], k.shape[1], q.shape[2], scale


def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.lengths, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def backward(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 5
    return *attend_backward(*ctx.saved_tensors, dout, ctx.lengths, ctx.scale), None, None


attend.register_autograd(backward, setup_context=setup_context)

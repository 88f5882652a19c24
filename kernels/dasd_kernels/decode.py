"""A decoder that generates on the CPU: csrc/decode's kernels on tensors.

Tensors are fp32 or bf16. A row's result depends on that row (and its cache) alone, bit for bit, whatever stands
beside it and however many threads run; and it is the one that the same row has in a pack: `add_rms_norm`, `rotate_` and
`swiglu` are those of `dasd_kernels.pointwise`, `attend_next` is `attend_pack`, or `dasd_kernels.attention` where that
runs, and `linear` is `F.linear`. `name` picks kernels: "avx512_bf16", "avx512",
"avx2" or "portable"; "" is the first of these that the CPU has. Shape suffixes: T rows, D width, H query heads, G
key-value heads, K head dimension, R = K / 2.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dasd_kernels import _C

TILE = 64  # tokens: a cache's room is a multiple of it


def supported(x: Tensor) -> bool:
    """Whether the kernels take such a tensor."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def add_rms_norm(x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float, name: str = "") -> Tensor:
    """x += delta, in place; returns x / sqrt(mean(x^2) + eps) * weight, [T, D] in x's dtype."""
    assert x_TD.is_contiguous() and weight_D.dtype == x_TD.dtype
    assert delta_TD is None or (delta_TD.is_contiguous() and delta_TD.dtype == x_TD.dtype)
    out = torch.empty_like(x_TD)
    delta = 0 if delta_TD is None else delta_TD.data_ptr()
    _C.decode_add_rms_norm(
        name, x_TD.data_ptr(), delta, weight_D.data_ptr(), out.data_ptr(), len(x_TD), x_TD.shape[1], eps, *_how(x_TD)
    )  # fmt: skip
    return out


def rotate_(
    x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor, norm_K: Tensor | None = None, eps: float = 0.0, name: str = ""
) -> None:
    """Rotates the pairs (i, i + K/2) of every head in place, by fp32 tables, after an RMS norm with this weight."""
    assert cos_TR.is_contiguous() and sin_TR.is_contiguous() and cos_TR.dtype == sin_TR.dtype == torch.float32
    norm = 0 if norm_K is None else norm_K.data_ptr()
    _C.decode_rotate(name, _heads(x_THK), cos_TR.data_ptr(), sin_TR.data_ptr(), norm, eps, *_how(x_THK))


def append_(
    k_TGK: Tensor, v_TGK: Tensor, source: Tensor, rows: Tensor, slots: Tensor, keys: Tensor, values: Tensor,
    name: str = "",
) -> None:  # fmt: skip
    """Writes keys and values of tokens `source` to `slots` of cache rows `rows`, int64 [n] each.

    `keys`, `values`: [cache rows, G, room, K] in k's dtype, inside whose TILEs of tokens the kernels of a name have an
    order of their own. Slots of a row come in rising order.
    """
    assert k_TGK.dtype == v_TGK.dtype == keys.dtype and len(source) == len(rows) == len(slots)
    _C.decode_append(
        name, _heads(k_TGK), _heads(v_TGK), source.data_ptr(), rows.data_ptr(), slots.data_ptr(), len(rows),
        _cache(keys, values), *_how(k_TGK),
    )  # fmt: skip


def attend_next(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, last_T: Tensor, keys: Tensor, values: Tensor, scale: float,
    name: str = "",
) -> Tensor:  # fmt: skip
    """[T, H, K]: row i's key and value go to slot `last_T[i]` (int64) of cache row i, and its queries attend to slots
    0 to `last_T[i]`."""
    assert q_THK.dtype == k_TGK.dtype == v_TGK.dtype == keys.dtype and len(last_T) == len(q_THK) <= len(keys)
    out = q_THK.new_empty(q_THK.shape)
    _C.decode_attend_next(
        name, _heads(q_THK), _heads(k_TGK), _heads(v_TGK), last_T.data_ptr(), _cache(keys, values), scale,
        out.data_ptr(), *_how(q_THK),
    )  # fmt: skip
    return out


def attend_pack(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, lengths: Sequence[int], scale: float, name: str = "",
    lse_HT: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[T, H, K]: causal attention inside documents of these lengths, whose sum is T. Writes the natural log-sum-exp of
    scores to `lse_HT` [H, T] fp32. `dasd_kernels.attention` has its gradients."""
    q_THK, k_TGK, v_TGK = (with_whole_heads(x) for x in (q_THK, k_TGK, v_TGK))
    assert q_THK.dtype == k_TGK.dtype == v_TGK.dtype and sum(lengths) == len(q_THK) == len(k_TGK) == len(v_TGK)
    bounds = torch.tensor([0, *accumulate(lengths)])
    out = q_THK.new_empty(q_THK.shape)
    _C.decode_attend_pack(
        name, _heads(q_THK), _heads(k_TGK), _heads(v_TGK), bounds.data_ptr(), len(lengths), scale, out.data_ptr(),
        0 if lse_HT is None else lse_HT.data_ptr(), *_how(q_THK),
    )  # fmt: skip
    return out


def attend_pack_backward(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, out_THK: Tensor, lse_HT: Tensor, dout_THK: Tensor,
    lengths: Sequence[int], scale: float, name: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq [T, H, K], dk, dv [T, G, K]) of `attend_pack`, fp32, K a multiple of 16; `out_THK` and `lse_HT` are what it
    gave."""
    q_THK, k_TGK, v_TGK = (with_whole_heads(x) for x in (q_THK, k_TGK, v_TGK))
    out_THK, dout_THK = out_THK.contiguous(), dout_THK.contiguous()
    assert q_THK.dtype == torch.float32 and q_THK.shape[2] % 16 == 0 and sum(lengths) == len(q_THK)
    bounds = torch.tensor([0, *accumulate(lengths)])
    dq, dk, dv = (x.new_empty(x.shape) for x in (q_THK, k_TGK, v_TGK))
    partial = q_THK.new_empty(2 * q_THK.numel() if q_THK.shape[1] != k_TGK.shape[1] else 0)
    _C.decode_attend_pack_backward(
        name, _heads(q_THK), _heads(k_TGK), _heads(v_TGK), bounds.data_ptr(), len(lengths), scale,
        (out_THK.data_ptr(), lse_HT.data_ptr(), dout_THK.data_ptr()),
        (dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), partial.data_ptr()), torch.get_num_threads(),
    )  # fmt: skip
    return dq, dk, dv


def with_whole_heads(x_THK: Tensor) -> Tensor:
    """`x_THK` itself where each token's heads lie one behind the other, else a copy."""
    return x_THK if x_THK.stride()[1:] == (x_THK.shape[2], 1) else x_THK.contiguous()


def swiglu(gate_up: Tensor, name: str = "") -> Tensor:
    """silu(gate) * up of [T, 2 width], the gates first."""
    assert gate_up.is_contiguous()
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    _C.decode_swiglu(name, gate_up.data_ptr(), len(out), out.shape[1], out.data_ptr(), *_how(gate_up))
    return out


class Packed(NamedTuple):
    """Weights as `linear` reads them."""

    panels: Tensor
    bias: Tensor | None  # [width], or [2, width] where gated
    width: int
    gated: bool


def can_multiply(weight: Tensor) -> bool:
    """Whether to `pack` this weight [width, D]: bf16, an even D, on a CPU with AVX512-BF16. Not with AMX, by which
    `F.linear` multiplies in another order."""
    even = weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0
    return even and supported(weight) and _C.decode_panel() > 0 and not torch.cpu._is_amx_tile_supported()


def pack(weight: Tensor, bias: Tensor | None = None, gated: bool = False) -> Packed:
    """A copy of `weight` [width, D]; gated: of [2 width, D], the gates first."""
    weight = weight.contiguous()
    turns, depth = 1 + gated, weight.shape[1]
    width = len(weight) // turns
    panel = _C.decode_panel()
    panels = weight.new_empty(-(-width // panel) * turns, panel * depth)
    _C.decode_pack(weight.data_ptr(), width, depth, gated, panels.data_ptr(), torch.get_num_threads())
    return Packed(panels, None if bias is None else bias.contiguous(), width, gated)


def linear(x_TD: Tensor, packed: Packed, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[T, width] of dtype bf16 or fp32 (not gated): x weightᵀ + bias; gated: `swiglu` of it, bf16. For few rows: the
    weights are read once, every row with each of them."""
    assert x_TD.is_contiguous() and x_TD.dtype == torch.bfloat16 and not (packed.gated and dtype != torch.bfloat16)
    out = x_TD.new_empty(len(x_TD), packed.width, dtype=dtype)
    _C.decode_linear(
        x_TD.data_ptr(), len(x_TD), x_TD.shape[1], packed.width, packed.panels.data_ptr(),
        0 if packed.bias is None else packed.bias.data_ptr(), packed.gated, out.data_ptr(), dtype == torch.float32,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _heads(x_THK: Tensor) -> tuple[int, ...]:
    assert x_THK.stride()[1:] == (x_THK.shape[2], 1)
    return x_THK.data_ptr(), x_THK.stride(0), *x_THK.shape


def _cache(keys: Tensor, values: Tensor) -> tuple[int, int, int]:
    assert keys.dtype == values.dtype and keys.is_contiguous() and values.is_contiguous() and keys.shape[2] % TILE == 0
    return keys.data_ptr(), values.data_ptr(), keys.shape[2]


def _how(x: Tensor) -> tuple[bool, int]:
    return x.dtype == torch.bfloat16, torch.get_num_threads()

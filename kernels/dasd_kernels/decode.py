"""What lies between a decoder's matrix products when it generates on the CPU: csrc/decode's kernels on tensors.

Tensors are fp32 or bf16. A row's result depends on that row (and its cache) alone, bit for bit, whatever stands
beside it and however many threads run. `name` picks the kernels of a vector width, "avx512", "avx2" or "portable";
"" is the widest that the CPU has. Shape suffixes: T rows, D width, H query heads, G key-value heads, K head dimension,
R = K / 2.
"""

import torch
from torch import Tensor

from dasd_kernels import _C

DTYPES = (torch.float32, torch.bfloat16)
TILE = 16  # tokens: a cache's room is a multiple of it


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

    `keys`, `values`: [cache rows, G, room, K] in k's dtype. Keys lie in tiles of 16 tokens, inside which those of one
    dimension are neighbours: `attend` reads them.
    """
    assert k_TGK.dtype == v_TGK.dtype == keys.dtype and len(source) == len(rows) == len(slots)
    _C.decode_append(
        name, _heads(k_TGK), _heads(v_TGK), source.data_ptr(), rows.data_ptr(), slots.data_ptr(), len(rows),
        _cache(keys, values), *_how(k_TGK),
    )  # fmt: skip


def attend(q_THK: Tensor, last_T: Tensor, keys: Tensor, values: Tensor, scale: float, name: str = "") -> Tensor:
    """[T, H, K]: the queries of row i attend to slots 0 to `last_T[i]` (int64) of cache row i."""
    assert q_THK.dtype == keys.dtype and len(last_T) == len(q_THK) <= len(keys)
    out = q_THK.new_empty(q_THK.shape)
    _C.decode_attend(
        name, _heads(q_THK), keys.shape[1], last_T.data_ptr(), _cache(keys, values), scale, out.data_ptr(),
        *_how(q_THK),
    )  # fmt: skip
    return out


def swiglu(gate_up: Tensor, name: str = "") -> Tensor:
    """silu(gate) * up of [T, 2 width], the gates first."""
    assert gate_up.is_contiguous()
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    _C.decode_swiglu(name, gate_up.data_ptr(), len(out), out.shape[1], out.data_ptr(), *_how(gate_up))
    return out


def _heads(x_THK: Tensor) -> tuple[int, ...]:
    assert x_THK.stride()[1:] == (x_THK.shape[2], 1)
    return x_THK.data_ptr(), x_THK.stride(0), *x_THK.shape


def _cache(keys: Tensor, values: Tensor) -> tuple[int, int, int]:
    assert keys.dtype == values.dtype and keys.is_contiguous() and values.is_contiguous() and keys.shape[2] % TILE == 0
    return keys.data_ptr(), values.data_ptr(), keys.shape[2]


def _how(x: Tensor) -> tuple[bool, int]:
    return x.dtype == torch.bfloat16, torch.get_num_threads()

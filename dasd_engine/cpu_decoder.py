"""A decoder's forward for generating on the CPU, where a step has few rows: the weights should come from memory once,
and all the rest counts.

Queries, keys and values are one product, gate, up and SwiGLU another, with bf16 weights in memory as the kernels of
`dasd_kernels.decode` read them, where the CPU multiplies bf16; else products are `F.linear`. Between them stand the
other kernels of that module. A row's bits are those that `Decoder.forward` gives it in a pack, whatever stands beside
it. The weights' copies take as much memory as the model.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dasd_engine.model import Block, Decoder, RMSNorm
from dasd_kernels import decode

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q_THK, k_TGK, v_TGK -> [T, H, K]


class CpuDecoder:
    @torch.no_grad()
    def __init__(self, model: Decoder):
        self.model = model
        self.layers = [_Layer(cast(Block, layer)) for layer in model.layers]
        self.scores = decode.can_multiply(model.head_weight)  # whether logits are fp32, and those of `token_logprobs`
        self.head = _head(model.head_weight)

    @staticmethod
    def serves(model: Decoder) -> bool:
        """Whether the model is whole, on the CPU, in a dtype of the kernels."""
        weight = model.embed_tokens.weight
        return decode.supported(weight) and not isinstance(weight, DTensor)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """Hidden states [T, D] after the final norm, with attention by `attend`."""
        cos_T1R, sin_T1R = self.model.rotary(positions_T)
        x_TD, added_TD = self.model.embed_tokens(tokens_T), None
        for index, layer in enumerate(self.layers):
            q_THK, k_TGK, v_TGK = layer.qkv(_norm(layer.first_norm, x_TD, added_TD), cos_T1R, sin_T1R)
            added_TD = layer.out(attend(index, q_THK, k_TGK, v_TGK).flatten(1))
            added_TD = layer.down(layer.gate_up(_norm(layer.second_norm, x_TD, added_TD)))
        return _norm(self.model.norm, x_TD, added_TD)


class _Layer:
    """A block's weights as they are multiplied."""

    def __init__(self, block: Block):
        attention, mlp = block.self_attn, block.mlp
        self.first_norm, self.second_norm = block.input_layernorm, block.post_attention_layernorm
        self.head_norms = [norm if isinstance(norm, RMSNorm) else None for norm in (attention.q_norm, attention.k_norm)]
        self.head_dim = attention.head_dim
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.heads = [projection.out_features // attention.head_dim for projection in projections]
        self.project = _fused(*projections)
        self.out = _fused(attention.o_proj)
        self.gate_up = _fused(mlp.gate_proj, mlp.up_proj, gated=True)
        self.down = _fused(mlp.down_proj)

    def qkv(self, x_TD: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> tuple[Tensor, ...]:
        """`Attention.qkv`: three views of one product."""
        heads = self.project(x_TD).unflatten(1, (-1, self.head_dim))
        q_THK, k_TGK, v_TGK = heads.split(self.heads, dim=1)
        if self.head_norms[0] is None:
            decode.rotate_(heads[:, : -self.heads[2]], cos_T1R, sin_T1R)
            return q_THK, k_TGK, v_TGK
        for part, norm in zip((q_THK, k_TGK), self.head_norms, strict=True):
            assert norm is not None  # both or none
            decode.rotate_(part, cos_T1R, sin_T1R, norm.weight, norm.eps)
        return q_THK, k_TGK, v_TGK


def _norm(norm: RMSNorm, x_TD: Tensor, added_TD: Tensor | None) -> Tensor:
    return decode.add_rms_norm(x_TD, added_TD, norm.weight, norm.eps)


def _fused(*layers: nn.Linear, gated: bool = False) -> Callable[[Tensor], Tensor]:
    """The layers' products below one another; gated: SwiGLU of both."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    if decode.can_multiply(weight):
        packed = decode.pack(weight, bias, gated)
        return lambda x: decode.linear(x, packed)
    if gated:
        return lambda x: decode.swiglu(F.linear(x, weight, bias))
    return lambda x: F.linear(x, weight, bias)


def _head(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Logits, in fp32 where the product is ours."""
    if decode.can_multiply(weight):
        packed = decode.pack(weight)
        return lambda x: decode.linear(x, packed, torch.float32)
    return lambda x: F.linear(x, weight)

"""A decoder's forward for generating on the CPU, where a step has few rows, so that all between the products counts.

Queries, keys and values are one product, gate and up another, with bf16 weights in memory as oneDNN's kernels read them
(`F.linear` brings them there in every call, a quarter of its time for 32 rows); between the products stand the compiled
kernels of `dasd_kernels.decode`. All of it rounds where `Decoder.forward` does, and to the same bits for a row whatever
stands beside it. The weights' copies take as much memory as the model.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dasd_engine.model import Block, Decoder, RMSNorm
from dasd_kernels import decode

_ROWS = 64  # for which oneDNN's layout is chosen; it serves any number

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q_THK, k_TGK, v_TGK -> [T, H, K]


class CpuDecoder:
    def __init__(self, model: Decoder):
        self.model = model
        self.layers = [_Layer(cast(Block, layer)) for layer in model.layers]
        self.head = _linear([model.head_weight], [None])

    @staticmethod
    def serves(model: Decoder) -> bool:
        """Whether the model is whole, on the CPU, in a dtype of the kernels."""
        weight = model.embed_tokens.weight
        return weight.device.type == "cpu" and weight.dtype in decode.DTYPES and not isinstance(weight, DTensor)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """Hidden states [T, D] after the final norm, with attention by `attend`."""
        cos_T1R, sin_T1R = self.model.rotary(positions_T)
        x_TD, added_TD = self.model.embed_tokens(tokens_T), None
        for index, layer in enumerate(self.layers):
            q_THK, k_TGK, v_TGK = layer.qkv(_norm(layer.first_norm, x_TD, added_TD), cos_T1R, sin_T1R)
            added_TD = layer.out(attend(index, q_THK, k_TGK, v_TGK).flatten(1))
            gate_up = layer.gate_up(_norm(layer.second_norm, x_TD, added_TD))
            added_TD = layer.down(decode.swiglu(gate_up))
        return _norm(self.model.norm, x_TD, added_TD)


class _Layer:
    """A block's weights as they are multiplied."""

    def __init__(self, block: Block):
        attention, mlp = block.self_attn, block.mlp
        self.first_norm, self.second_norm = block.input_layernorm, block.post_attention_layernorm
        self.head_norms = [norm if isinstance(norm, RMSNorm) else None for norm in (attention.q_norm, attention.k_norm)]
        self.head_dim = attention.head_dim
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.widths = [projection.out_features for projection in projections]
        self.project = _fused(*projections)
        self.out = _fused(attention.o_proj)
        self.gate_up = _fused(mlp.gate_proj, mlp.up_proj)
        self.down = _fused(mlp.down_proj)

    def qkv(self, x_TD: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> list[Tensor]:
        """`Attention.qkv`: three views of one product."""
        parts = [
            part.unflatten(1, (-1, self.head_dim)) for part in self.project(x_TD).split(self.widths, dim=1)
        ]
        for part, norm in zip(parts, self.head_norms, strict=False):
            weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
            decode.rotate_(part, cos_T1R, sin_T1R, weight, eps)
        return parts


def _norm(norm: RMSNorm, x_TD: Tensor, added_TD: Tensor | None) -> Tensor:
    return decode.add_rms_norm(x_TD, added_TD, norm.weight, norm.eps)


def _fused(*layers: nn.Linear) -> Callable[[Tensor], Tensor]:
    return _linear([layer.weight for layer in layers], [layer.bias for layer in layers])


def _linear(weights: list[Tensor], biases: list[Tensor | None]) -> Callable[[Tensor], Tensor]:
    """x -> x weightᵀ + bias for the weights below one another."""
    weight = torch.cat(weights).detach() if len(weights) > 1 else weights[0].detach()
    bias = None if biases[0] is None else torch.cat(cast(list[Tensor], biases)).detach()
    if weight.dtype != torch.bfloat16 or not _can_pack():
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _can_pack() -> bool:
    needed = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in needed):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

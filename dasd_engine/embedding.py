"""The input embedding of a model whose head is the same matrix, in a process that trains alone.

Its gradient is a row for each token that occurs. torch makes a matrix of it, [V, D], most of it zeros, and the sum with
the head's is a third one; for a small model with a large vocabulary these are the largest tensors of a step.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Embedding):
    """weight[tokens]: int64 [T] -> [T, D] in the weight's dtype. `in_place`: backward adds its rows to
    `weight.grad`, each a sum in fp32 that is rounded once, instead of handing autograd a gradient; so hooks of the
    weight and torch.autograd.grad do not see them."""

    in_place = False

    def forward(self, tokens: Tensor) -> Tensor:
        if not (self.in_place and torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(tokens)
        return Rows.apply(tokens, self, torch.zeros((), requires_grad=True))


class Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_T: Tensor, module: Embedding, anchor: Tensor) -> Tensor:
        """The weight is no input: its gradient would wait for this one. `anchor` is a leaf in its place, without which
        backward would not come here."""
        ctx.save_for_backward(tokens_T)
        ctx.weight = module.weight
        return F.embedding(tokens_T, ctx.weight.detach())

    @staticmethod
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[None, None, None]:
        (tokens_T,), weight = ctx.saved_tensors, ctx.weight
        present, place_T = tokens_T.unique(return_inverse=True)
        sums = torch.zeros(len(present), weight.shape[1], device=dout_TD.device).index_add_(0, place_T, dout_TD.float())
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)
        weight.grad.index_copy_(0, present, (weight.grad[present] + sums).to(weight.grad.dtype))
        return None, None, None

"""AdamW and its learning rate: the published configuration (arXiv 2601.09088), a fresh pair for each stage."""

import math

import torch

from dasd_engine.config import TrainOptions
from dasd_engine.masters import low_bits
from dasd_kernels.masters import adamw


def make_optimizer(model: torch.nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """Fused AdamW over fp32 masters. Matrices decay; norms and biases (one dimension) do not.

    Moments are made at once: made at the first step they would take the places that its activations leave in the heap.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)
    for p in parameters:
        moments = {name: torch.zeros_like(p, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer


def update(optimizer: torch.optim.AdamW, rate: float, norm: float, clip: float) -> None:
    """A step at learning rate `rate`, the gradients, whose norm is `norm`, scaled down to `clip` where that is less."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if low_bits(parameters[0]) is None:
        total = torch.tensor(norm, dtype=torch.float32, device=parameters[0].device)
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, total)
        optimizer.step()
        return
    scale = min(1.0, clip / (norm + 1e-6))  # as clip_grads_with_norm_ has it
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            state, low = optimizer.state[p], low_bits(p)
            assert low is not None
            state["step"] += 1
            adamw(
                p.detach(), low, state["exp_avg"], state["exp_avg_sq"], p.grad.contiguous(), step=int(state["step"]),
                lr=rate, betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"], scale=scale,
            )  # fmt: skip


def learning_rate(step: int, steps: int, options: TrainOptions) -> float:
    """Linear warm-up over the first `warmup` share of `steps`, then a cosine from `lr` to `min_lr` at the last step.

    `step` counts from 0; the first step already has a rate above zero.
    """
    warm = round(options.warmup * steps)
    if step < warm:
        return options.lr * (step + 1) / warm
    progress = (step - warm) / max(1, steps - 1 - warm)
    return options.min_lr + (options.lr - options.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

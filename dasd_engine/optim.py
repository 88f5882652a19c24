"""AdamW and its learning rate: the published configuration (arXiv 2601.09088), a fresh pair for each stage."""

import math

import torch

from dasd_engine.config import TrainOptions


def make_optimizer(model: torch.nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """Fused AdamW over fp32 masters. Matrices decay; norms and biases (one dimension) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)


def learning_rate(step: int, steps: int, options: TrainOptions) -> float:
    """Linear warm-up over the first `warmup` share of `steps`, then a cosine from `lr` to `min_lr` at the last step.

    `step` counts from 0; the first step already has a rate above zero.
    """
    warm = round(options.warmup * steps)
    if step < warm:
        return options.lr * (step + 1) / warm
    progress = (step - warm) / max(1, steps - 1 - warm)
    return options.min_lr + (options.lr - options.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate

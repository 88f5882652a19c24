"""AdamW and its learning rate: the published configuration (arXiv 2601.09088), a fresh pair for each stage."""

import itertools
import math

import torch

from dasd_engine.config import TrainOptions
from dasd_engine.distributed import first_weight, local
from dasd_engine.masters import low_bits
from dasd_kernels.adamw import adamw, moments


def make_optimizer(model: torch.nn.Module, options: TrainOptions, *, compact: bool = False) -> torch.optim.AdamW:
    """AdamW over fp32 masters, with moments in fp32 or `compact` (dasd_kernels.adamw). Matrices decay; norms and biases
    (one dimension) do not.

    Moments are made at once: made at the first step they would take the places that its activations leave in the heap.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)
    for p in parameters:
        first, second = moments(p.detach(), compact=compact)
        step = torch.zeros((), device="cpu" if compact else p.device)  # where it is read
        optimizer.state[p] = {"step": step, "ratio" if compact else "exp_avg": first, "exp_avg_sq": second}
    return optimizer


def update(optimizer: torch.optim.AdamW, rate: float, norm: float, clip: float) -> None:
    """A step at learning rate `rate`, the gradients, whose norm is `norm`, scaled down to `clip` where that is less."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if low_bits(parameters[0]) is None and "ratio" not in optimizer.state[parameters[0]]:  # as torch knows them
        total = torch.tensor(norm, dtype=torch.float32, device=parameters[0].device)
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, total)
        optimizer.step()
        return
    scale = min(1.0, clip / (norm + 1e-6))  # as clip_grads_with_norm_ has it
    places = dict(zip(parameters, itertools.accumulate((p.numel() for p in parameters), initial=0), strict=False))
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            state = optimizer.state[p]
            state["step"] += 1
            first = state["ratio"] if "ratio" in state else state["exp_avg"]
            weight, first, second, grad = (local(t) for t in (p.detach(), first, state["exp_avg_sq"], p.grad))
            adamw(
                weight, first, second, grad.contiguous(), low=low_bits(p), place=places[p] + first_weight(p),
                step=int(state["step"]), lr=rate, betas=group["betas"], eps=group["eps"],
                weight_decay=group["weight_decay"], scale=scale,
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

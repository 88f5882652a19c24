"""Which code computes the rows of a linear head: Triton on GPUs, C++ on CPUs, plain torch elsewhere; checks and
ignored rows, which all have in common.

DASD_KERNELS=reference selects the plain definition (in the callers), =chunked plain torch by chunks, and portable,
avx2, avx512 or avx512_bf16 one of the C++ kernels. DASD_DEBUG=1 checks labels on every device, which stalls it.
"""

import os
from typing import Any

import torch
from torch import Tensor

from dasd_kernels import chunked, cpu
from dasd_kernels.chunked import Result, Row

try:
    from dasd_kernels import triton_ce
except ImportError:  # Triton is not built for this platform: only CPUs are served
    triton_ce = None  # type: ignore[assignment]

DEFAULT_WORKSPACE = 224 << 20


def backend() -> str:
    return os.environ.get("DASD_KERNELS", "")


def on_triton(hidden: Tensor) -> bool:
    return triton_ce is not None and backend() == "" and triton_ce.wanted(hidden)


def cpu_kernels(hidden: Tensor, weight: Tensor, row: Row) -> str | None:
    """The C++ kernels that serve a call, or None; from types and devices alone."""
    asked = backend()
    if asked == "chunked" or (row.label_smoothing and row.softcap):
        return None
    return cpu.choose(hidden, weight, asked)


def default_workspace(hidden: Tensor) -> int:
    return triton_ce.WORKSPACE if on_triton(hidden) else DEFAULT_WORKSPACE


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    token_weight: Tensor | None,
    temperature: float | Tensor,
) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if type(tensor).__name__ == "DTensor":
            raise ValueError(
                f"{name} is a DTensor: pass {name}.full_tensor(), or call the loss while FSDP holds it gathered"
            )
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, not {tensor.dtype}")
    if weight.numel() == 0:
        raise ValueError(
            f"weight is empty, {list(weight.shape)}: gather it first (ZeRO-3: deepspeed.zero.GatheredParameters)"
        )
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden is [N, D] and weight [V, D] of one D; got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels is int64 [N] with N = {hidden.shape[0]}; got {labels.dtype} {list(labels.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is [V] with V = {weight.shape[0]}; got {list(bias.shape)}")
    for name, value in (("token_weight", token_weight), ("temperature", temperature)):
        if isinstance(value, Tensor) and value.shape != labels.shape:
            raise ValueError(f"{name} is [N] with N = {hidden.shape[0]}; got {list(value.shape)}")
    if isinstance(temperature, Tensor):
        if temperature.requires_grad:
            raise ValueError("temperature is a constant here: pass temperature.detach()")
    elif not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")


def check_labels(labels: Tensor, ignore_index: int, vocab: int) -> None:
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if bad.any():
        index = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"labels[{index}] = {int(labels[index])} is outside [0, {vocab}) and is not ignore_index = {ignore_index}"
        )


def valid_rows(labels: Tensor, ignore_index: int, vocab: int) -> Tensor | None:
    """Indices of the rows to compute, or None for all of them. On CPU also checks the labels; elsewhere every
    row is computed and ignored ones masked, since their number is not known without waiting for the device."""
    if labels.device.type != "cpu":
        return None
    check_labels(labels, ignore_index, vocab)
    valid = labels != ignore_index
    return None if valid.all() else valid.nonzero()[:, 0]


def take(tensor: Tensor | None, rows: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or rows is None else tensor.index_select(0, rows)


def spread(values: Tensor, rows: Tensor | None, n: int, fill: float = 0.0) -> Tensor:
    """Per computed row -> per token."""
    if rows is None:
        return values
    return torch.full((n, *values.shape[1:]), fill, dtype=values.dtype).index_copy_(0, rows, values)


def compute(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    row: Row,
    ignore_index: int,
    workspace_bytes: int,
    coefficient: Tensor | None = None,
    needs: tuple[bool, bool, bool] = (False, False, False),
    entropy: bool = False,
    rank: bool = False,
    over: bool = False,
) -> Result:
    """Run the device's backend on the valid rows and put its results, [N], where they belong. over: cpu.Plan's."""
    n, vocab = len(labels), len(weight)
    if temperature is not None and temperature.device.type == "cpu" and not bool((temperature > 0).all()):
        raise ValueError(f"temperature must be positive; its smallest entry is {float(temperature.min())}")
    if os.environ.get("DASD_DEBUG") == "1":
        check_labels(labels, ignore_index, vocab)
    if on_triton(hidden) and triton_ce.supports(hidden, weight, row, coefficient is not None):
        return triton_ce.run(
            hidden, weight, labels, bias, temperature, row, ignore_index, workspace_bytes,
            coefficient=coefficient, needs=needs, entropy=entropy, rank=rank,
        )  # fmt: skip
    rows = valid_rows(labels, ignore_index, vocab)
    safe = take(labels, rows) if rows is not None else labels.clamp(0, vocab - 1)
    assert safe is not None
    x, t, c = take(hidden, rows), take(temperature, rows), take(coefficient, rows)
    assert x is not None
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ValueError(f"hidden must be bf16, fp16, fp32 or fp64, not {x.dtype}")
    name = cpu_kernels(hidden, weight, row)
    options: dict[str, Any] = {"coefficient": c, "needs": needs, "entropy": entropy, "rank": rank}
    if name is None:
        r = chunked.run(x, weight, safe, bias, t, row, workspace_bytes, **options)
    else:
        plan = cpu.Plan.of(name, n, weight, workspace_bytes, gradients=c is not None, head=needs[1], over=over)
        r = cpu.run(plan, x, weight, safe, bias, t, row, **options)
    if labels.device.type == "cpu":
        fields = [r.target, r.nll, r.lse, r.mean, r.entropy]
        target, nll, lse, mean, entropies = (None if f is None else spread(f, rows, n) for f in fields)
    else:
        ignored = labels == ignore_index
        lost = ~ignored & ((labels < 0) | (labels >= vocab))
        fields = [r.target, r.nll.masked_fill(lost, float("nan")), r.lse, r.mean, r.entropy]
        target, nll, lse, mean, entropies = (None if f is None else f.masked_fill(ignored, 0) for f in fields)
    assert target is not None and nll is not None and lse is not None
    return Result(
        target, nll, lse, mean, entropies,
        None if r.rank is None else spread(r.rank, rows, n, -1).masked_fill(labels == ignore_index, -1),
        None if r.grad_hidden is None else spread(r.grad_hidden, rows, n),
        r.grad_weight, r.grad_bias, r.state,
    )  # fmt: skip

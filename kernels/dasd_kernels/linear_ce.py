"""Cross-entropy of a linear head without its logits: the op, its gradients, and the choice of a backend.

    from dasd_kernels import linear_cross_entropy
    loss = linear_cross_entropy(hidden, model.lm_head.weight, labels)      # [N, D], [V, D], [N] -> scalar
    loss.backward()

The gradients of "mean" and "sum" are computed with the loss (three products of 2NDV FLOPs) and scaled in
backward; "none" computes them in backward (four products), when the upstream gradients are known.
On CPUs with AVX2 the work is done by csrc/linear_ce (cpu.py), elsewhere and with label smoothing by chunked.py.
DASD_KERNELS=reference selects the plain definition, =chunked plain torch by chunks, and portable, avx2, avx512 or
avx512_bf16 one of the C++ kernels.
"""

import functools
import os
from typing import Any

import torch
from torch import Tensor

from dasd_kernels import chunked, cpu, reference
from dasd_kernels.chunked import Result, Row

try:
    from dasd_kernels import triton_ce
except ImportError:  # Triton is not built for this platform: only CPUs are served
    triton_ce = None  # type: ignore[assignment]

DEFAULT_WORKSPACE = 128 << 20


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    grad_weight_out: Tensor | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    """Cross-entropy of softmax(hidden · weightᵀ) against labels; the [N, V] logits never exist.

    z = softcap(hidden · weightᵀ + bias) ÷ temperature, softcap(z) = c·tanh(z/c); a row's loss is
    token_weight · (lse − (1−label_smoothing)·z_label − label_smoothing·mean(z) + z_loss·lse²).

    hidden [N, D], weight [V, D], bias [V]: bf16, fp16 or fp32 (float64 too, for checks), any strides.
    labels [N] int64; rows labelled `ignore_index` cost nothing and give 0. token_weight [N], a constant.
    temperature: positive, a float or [N]. reduction: "mean" (÷ the sum of the valid rows' token weights; 0
    when that is 0), "sum" or "none" ([N]). Returns fp32.

    Gradients reach hidden, weight and bias. The weight's is accumulated in fp32 and rounded once; with
    `grad_weight_out`, [V, D] fp32, backward adds it there instead and weight.grad is left alone.
    workspace_bytes bounds what is held besides the inputs, the gradients and one fp32 copy of the weight's.

    Raises ValueError for wrong shapes, a DTensor or empty weight and, on the CPU, for a label outside
    [0, V); on other devices such a row gives NaN, since looking would stall the device.
    """
    check_inputs(hidden, weight, labels, bias, token_weight, temperature)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is "mean", "sum" or "none", not {reduction!r}')
    if token_weight is not None and token_weight.requires_grad:
        raise ValueError("token_weight is a constant here: pass token_weight.detach()")
    if grad_weight_out is not None and (
        grad_weight_out.shape != weight.shape or grad_weight_out.dtype != torch.float32
    ):
        raise ValueError(
            f"grad_weight_out is fp32 and shaped like weight, {list(weight.shape)}; got "
            f"{grad_weight_out.dtype} {list(grad_weight_out.shape)}"
        )
    if backend() == "reference":
        if grad_weight_out is not None:
            raise ValueError("grad_weight_out does not work with DASD_KERNELS=reference")
        return reference.linear_cross_entropy(
            hidden, weight, labels, bias=bias, token_weight=token_weight, ignore_index=ignore_index,
            reduction=reduction, z_loss=z_loss, label_smoothing=label_smoothing, softcap=softcap,
            temperature=temperature,
        )  # fmt: skip
    grad = torch.is_grad_enabled()
    per_token = temperature if isinstance(temperature, Tensor) else None
    loss, *_ = linear_ce(
        hidden, weight, labels, bias, token_weight, per_token, grad_weight_out, ignore_index, reduction,
        z_loss, label_smoothing, softcap or 0.0, 1.0 if per_token is not None else float(temperature),
        default_workspace(hidden) if workspace_bytes is None else workspace_bytes,
        [grad and t is not None and t.requires_grad for t in (hidden, weight, bias)],
    )  # fmt: skip
    return loss


def backend() -> str:
    return os.environ.get("DASD_KERNELS", "")


def on_triton(hidden: Tensor) -> bool:
    return triton_ce is not None and backend() == "" and triton_ce.wanted(hidden)


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


def valid_rows(labels: Tensor, ignore_index: int, vocab: int) -> Tensor | None:
    """Indices of the rows to compute, or None for all of them. On CPU also checks the labels; elsewhere every
    row is computed and ignored ones masked, since their number is not known without waiting for the device."""
    if labels.device.type != "cpu":
        return None
    valid = labels != ignore_index
    bad = valid & ((labels < 0) | (labels >= vocab))
    if bad.any():
        index = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"labels[{index}] = {int(labels[index])} is outside [0, {vocab}) and is not ignore_index = {ignore_index}"
        )
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
) -> Result:
    """Run the device's backend on the valid rows and put its results, [N], where they belong."""
    vocab = len(weight)
    if temperature is not None and temperature.device.type == "cpu" and not bool((temperature > 0).all()):
        raise ValueError(f"temperature must be positive; its smallest entry is {float(temperature.min())}")
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
    asked = backend()
    name = None if asked == "chunked" or row.label_smoothing else cpu.choose(x, weight, asked)
    run = chunked.run if name is None else functools.partial(cpu.run, name)
    r = run(x, weight, safe, bias, t, row, workspace_bytes, coefficient=c, needs=needs, entropy=entropy, rank=rank)
    n = len(labels)
    if labels.device.type == "cpu":
        fields = [r.target, r.nll, r.lse, r.mean, r.entropy]
        target, nll, lse, mean, chaos = (None if f is None else spread(f, rows, n) for f in fields)
    else:
        ignored = labels == ignore_index
        lost = ~ignored & ((labels < 0) | (labels >= vocab))
        fields = [r.target, r.nll.masked_fill(lost, float("nan")), r.lse, r.mean, r.entropy]
        target, nll, lse, mean, chaos = (None if f is None else f.masked_fill(ignored, 0) for f in fields)
    assert target is not None and nll is not None and lse is not None
    return Result(
        target, nll, lse, mean, chaos,
        None if r.rank is None else spread(r.rank, rows, n, -1).masked_fill(labels == ignore_index, -1),
        None if r.grad_hidden is None else spread(r.grad_hidden, rows, n),
        r.grad_weight, r.grad_bias,
    )  # fmt: skip


def row_weights(
    labels: Tensor, token_weight: Tensor | None, ignore_index: int, reduction: str, dtype: torch.dtype
) -> Tensor:
    """What multiplies each row's loss before the sum: 0 where ignored."""
    weights = (labels != ignore_index).to(dtype)
    if token_weight is not None:
        weights = token_weight.to(dtype).masked_fill(labels == ignore_index, 0)
    if reduction == "mean":
        total = weights.sum()
        weights = weights / total.where(total != 0, 1)
    return weights


@torch.library.custom_op("dasd_kernels::linear_ce", mutates_args=())
def linear_ce(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    token_weight: Tensor | None,
    temperature: Tensor | None,
    grad_weight_out: Tensor | None,
    ignore_index: int,
    reduction: str,
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    temperature_all: float,
    workspace_bytes: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and, for "mean" and "sum", its gradients for a unit upstream gradient (empty where not needed)."""
    row = Row(softcap or None, temperature_all, label_smoothing, z_loss)
    acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    weights = row_weights(labels, token_weight, ignore_index, reduction, acc)
    now = any(needs) and reduction != "none"
    r = compute(
        hidden, weight, labels, bias, temperature, row, ignore_index, workspace_bytes,
        weights if now else None, (needs[0], needs[1], needs[2]) if now else (False, False, False),
    )  # fmt: skip
    loss = r.nll
    if label_smoothing:
        assert r.mean is not None
        loss += label_smoothing * (r.target - r.mean)
    if z_loss:
        loss += z_loss * r.lse.square()
    loss *= weights
    nothing = hidden.new_empty(0)
    return (
        loss if reduction == "none" else loss.sum(),
        nothing if r.grad_hidden is None else r.grad_hidden,
        hidden.new_empty(0) if r.grad_weight is None else r.grad_weight,
        hidden.new_empty(0) if r.grad_bias is None else r.grad_bias,
    )


@linear_ce.register_fake
def _(
    hidden, weight, labels, bias, token_weight, temperature, grad_weight_out, ignore_index, reduction, z_loss,
    label_smoothing, softcap, temperature_all, workspace_bytes, needs,
):  # fmt: skip
    acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    now = reduction != "none"
    nothing = lambda: hidden.new_empty(0)  # noqa: E731
    return (
        hidden.new_empty(labels.shape if reduction == "none" else (), dtype=acc),
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if now and needs[0] else nothing(),
        hidden.new_empty(weight.shape, dtype=acc) if now and needs[1] else nothing(),
        hidden.new_empty(weight.shape[0], dtype=acc) if now and needs[2] else nothing(),
    )


@torch.library.custom_op("dasd_kernels::linear_ce_gradients", mutates_args=())
def linear_ce_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    coefficient: Tensor,
    temperature: Tensor | None,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    temperature_all: float,
    workspace_bytes: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(coefficient * loss), coefficient [N]: what backward needs for reduction "none"."""
    row = Row(softcap or None, temperature_all, label_smoothing, z_loss)
    r = compute(
        hidden, weight, labels, bias, temperature, row, ignore_index, workspace_bytes,
        coefficient, (needs[0], needs[1], needs[2]),
    )  # fmt: skip
    found = (r.grad_hidden, r.grad_weight, r.grad_bias)
    dx, dw, db = (hidden.new_empty(0) if g is None else g for g in found)
    return dx, dw, db


@linear_ce_gradients.register_fake
def _(
    hidden, weight, labels, bias, coefficient, temperature, ignore_index, z_loss, label_smoothing, softcap,
    temperature_all, workspace_bytes, needs,
):  # fmt: skip
    acc = coefficient.dtype
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else hidden.new_empty(0),
        hidden.new_empty(weight.shape if needs[1] else (0,), dtype=acc),
        hidden.new_empty(weight.shape[0] if needs[2] else 0, dtype=acc),
    )


@torch.library.custom_op("dasd_kernels::add_scaled", mutates_args=("total",))
def add_scaled(total: Tensor, gradient: Tensor, scale: Tensor) -> None:
    """total += scale * gradient, without a temporary."""
    total.addcmul_(gradient, scale)


def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    (hidden, weight, labels, bias, token_weight, temperature, total, ignore_index, reduction, z_loss,
     label_smoothing, softcap, temperature_all, workspace_bytes, needs) = inputs  # fmt: skip
    _, *gradients = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*gradients)
    ctx.needs, ctx.reduction, ctx.ignore_index = needs, reduction, ignore_index
    ctx.total = total
    ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
    ctx.row = (ignore_index, z_loss, label_smoothing, softcap, temperature_all, workspace_bytes)
    if reduction == "none":
        ctx.save_for_backward(hidden, weight, labels, bias, token_weight, temperature)
    else:
        ctx.save_for_backward(*gradients)


def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dx = dw = db = None
    if upstream is not None:
        if ctx.reduction == "none":
            hidden, weight, labels, bias, token_weight, temperature = ctx.saved_tensors
            weights = row_weights(labels, token_weight, ctx.ignore_index, "none", upstream.dtype)
            found = linear_ce_gradients(
                hidden, weight, labels, bias, weights * upstream, temperature, *ctx.row, ctx.needs
            )
            scale = torch.ones((), dtype=upstream.dtype, device=upstream.device)
        else:
            found, scale = ctx.saved_tensors, upstream
        unit_dx, unit_dw, unit_db = found
        if ctx.needs[0]:
            dx = (unit_dx * scale).to(unit_dx.dtype)
        if ctx.needs[1] and ctx.total is not None:
            add_scaled(ctx.total, unit_dw, scale)
        elif ctx.needs[1]:
            dw = (unit_dw * scale).to(ctx.dtypes[0])
        if ctx.needs[2]:
            db = (unit_db * scale).to(ctx.dtypes[1])
    return dx, dw, None, db, *(None,) * 11


linear_ce.register_autograd(backward, setup_context=setup_context)

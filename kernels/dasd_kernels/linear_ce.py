"""Cross-entropy of a linear head without its logits: the op, its gradients, and the choice of a backend.

    from dasd_kernels import linear_cross_entropy
    loss = linear_cross_entropy(hidden, model.lm_head.weight, labels)      # [N, D], [V, D], [N] -> scalar
    loss.backward()

The gradients of "mean" and "sum" are computed with the loss (three products of 2NDV FLOPs) and scaled in
backward; "none" computes them in backward (four products), when the upstream gradients are known. On a CPU the last
chunk's part of the weight's gradient waits for backward as well, and a second backward is as dear as "none"'s (cpu.py
says why). dispatch.py chooses what computes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dasd_kernels import cpu, reference
from dasd_kernels.chunked import Row
from dasd_kernels.dispatch import (
    backend,
    check_inputs,
    compute,
    cpu_kernels,
    default_workspace,
    on_triton,
    take,
    valid_rows,
)


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
    [0, V); on other devices such a row gives NaN, since looking would stall the device (DASD_DEBUG=1 looks).
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss and, for "mean" and "sum", for a unit upstream gradient: dX, and dW and db or what head_gradient makes them
    of (empty where not needed)."""
    row = Row(softcap or None, temperature_all, label_smoothing, z_loss)
    acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    weights = row_weights(labels, token_weight, ignore_index, reduction, acc)
    now = any(needs) and reduction != "none"
    r = compute(
        hidden, weight, labels, bias, temperature, row, ignore_index, workspace_bytes,
        weights if now else None, (needs[0], needs[1], needs[2]) if now else (False, False, False),
        over=now and needs[1] and grad_weight_out is None,
    )  # fmt: skip
    loss = r.nll
    if label_smoothing:
        assert r.mean is not None
        loss += label_smoothing * (r.target - r.mean)
    if z_loss:
        loss += z_loss * r.lse.square()
    loss *= weights
    nothing = lambda dtype=hidden.dtype: hidden.new_empty(0, dtype=dtype)  # noqa: E731
    partial = r.grad_weight
    plan = memory_plan(hidden, weight, grad_weight_out, row, workspace_bytes, needs) if now else None
    if partial is None and now and needs[1] and (plan is None or len(hidden) > plan.rows):
        partial = hidden.new_empty(weight.shape, dtype=acc)  # never touched: fewer rows are valid than shapes tell
    return (
        loss if reduction == "none" else loss.sum(),
        nothing() if r.grad_hidden is None else r.grad_hidden,
        nothing(acc) if partial is None else partial,
        nothing(acc) if r.grad_bias is None else r.grad_bias,
        nothing(torch.uint8) if r.state is None else r.state,
    )


def memory_plan(
    hidden: Tensor, weight: Tensor, total: Tensor | None, row: Row, workspace_bytes: int, needs: list[bool]
) -> cpu.Plan | None:
    """linear_ce's on a CPU, with gradients: where one chunk has all rows, its State stands for dW, which is empty."""
    name = None if on_triton(hidden) else cpu_kernels(hidden, weight, row)
    if name is None:
        return None
    over = needs[1] and total is None
    return cpu.Plan.of(name, len(hidden), weight, workspace_bytes, gradients=True, head=needs[1], over=over)


@linear_ce.register_fake
def _(
    hidden, weight, labels, bias, token_weight, temperature, grad_weight_out, ignore_index, reduction, z_loss,
    label_smoothing, softcap, temperature_all, workspace_bytes, needs,
):  # fmt: skip
    row = Row(softcap or None, temperature_all, label_smoothing, z_loss)
    acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    now = reduction != "none"
    nothing = lambda dtype=hidden.dtype: hidden.new_empty(0, dtype=dtype)  # noqa: E731
    plan = memory_plan(hidden, weight, grad_weight_out, row, workspace_bytes, needs)
    state = nothing(torch.uint8)
    if plan is not None and now and (needs[1] or needs[2]):
        state = hidden.new_empty(plan.size, dtype=torch.uint8)
    whole = now and needs[1] and (plan is None or len(hidden) > plan.rows)
    return (
        hidden.new_empty(labels.shape if reduction == "none" else (), dtype=acc),
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if now and needs[0] else nothing(),
        hidden.new_empty(weight.shape, dtype=acc) if whole else nothing(acc),
        hidden.new_empty(weight.shape[0], dtype=acc) if now and needs[2] else nothing(acc),
        state,
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
    """Gradients of sum(coefficient * loss), coefficient [N]: what backward needs for reduction "none". dW and db in
    the accumulation dtype."""
    row = Row(softcap or None, temperature_all, label_smoothing, z_loss)
    r = compute(
        hidden, weight, labels, bias, temperature, row, ignore_index, workspace_bytes,
        coefficient, (needs[0], needs[1], needs[2]),
    )  # fmt: skip
    dw, db = r.grad_weight, r.grad_bias
    if r.state is not None:
        partial = dw  # finished where it is
        dw = hidden.new_empty(weight.shape, dtype=coefficient.dtype) if needs[1] and dw is None else dw
        finish_head(hidden, weight, labels, partial, r.state, ignore_index, 1.0, dw, db, add=False)
    dx, dw, db = (hidden.new_empty(0) if g is None else g for g in (r.grad_hidden, dw, db))
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


@torch.library.custom_op("dasd_kernels::head_gradient", mutates_args=("total",))
def head_gradient(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    coefficient: Tensor,
    temperature: Tensor | None,
    partial: Tensor,
    partial_bias: Tensor,
    state: Tensor,
    scale: Tensor,
    total: Tensor | None,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    temperature_all: float,
    workspace_bytes: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """scale * dW, rounded once to weight's dtype or added to `total`, and scale * db, from linear_ce's results. The
    first call may spend `state` or `partial`; later ones then compute all of it again, from linear_ce's own inputs."""
    if cpu.spent(state) or cpu.spent(partial):
        _, partial, partial_bias = linear_ce_gradients(
            hidden, weight, labels, bias, coefficient, temperature, ignore_index, z_loss, label_smoothing, softcap,
            temperature_all, workspace_bytes, [False, needs[1], needs[2]],
        )  # fmt: skip
        state = state.new_empty(0)
    dw = None
    if needs[1] and total is None:
        dw = cpu.claim(state, partial, weight) if state.numel() else None
        dw = weight.new_empty(weight.shape) if dw is None else dw
    db = partial_bias * scale if needs[2] else None
    out = (dw if total is None else total) if needs[1] else None
    if state.numel():
        whole = partial if partial.numel() else None
        finish_head(hidden, weight, labels, whole, state, ignore_index, float(scale), out, db, add=total is not None)
    elif out is not None:
        for part in slabs(weight):
            if total is not None:
                total[part].addcmul_(partial[part], scale)
            else:
                out[part] = partial[part] * scale
    return hidden.new_empty(0) if dw is None else dw, hidden.new_empty(0) if db is None else db


@head_gradient.register_fake
def _(
    hidden, weight, labels, bias, coefficient, temperature, partial, partial_bias, state, scale, total, ignore_index,
    z_loss, label_smoothing, softcap, temperature_all, workspace_bytes, needs,
):  # fmt: skip
    return (
        weight.new_empty(weight.shape if needs[1] and total is None else (0,)),
        partial_bias.new_empty(weight.shape[0]) if needs[2] else hidden.new_empty(0),
    )


def finish_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, partial: Tensor | None, state: Tensor, ignore_index: int,
    scale: float, out: Tensor | None, out_bias: Tensor | None, *, add: bool,
) -> None:  # fmt: skip
    """cpu.head_gradient for all rows of a call, ignored ones among them."""
    rows = valid_rows(labels, ignore_index, len(weight))
    x, y = take(hidden, rows), take(labels, rows)
    assert x is not None and y is not None
    cpu.head_gradient(state, x, weight, y, partial, scale, out, add, out_bias)


def slabs(weight: Tensor) -> Iterator[slice]:
    """Rows of about 4 M elements, so that a scaled copy takes no [V, D] temporary."""
    size = max(1, (4 << 20) // max(1, weight.shape[1]))
    return (slice(begin, begin + size) for begin in range(0, len(weight), size))


def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    (hidden, weight, labels, bias, token_weight, temperature, total, ignore_index, reduction, z_loss,
     label_smoothing, softcap, temperature_all, workspace_bytes, needs) = inputs  # fmt: skip
    _, *gradients = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*gradients)
    ctx.needs, ctx.reduction, ctx.ignore_index, ctx.total = needs, reduction, ignore_index, total
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.row = (ignore_index, z_loss, label_smoothing, softcap, temperature_all, workspace_bytes)
    given = (hidden, weight, labels, bias, token_weight, temperature)
    ctx.save_for_backward(*given, *(() if reduction == "none" else gradients))


def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 15
    hidden, weight, labels, bias, token_weight, temperature, *gradients = ctx.saved_tensors
    weights = row_weights(labels, token_weight, ctx.ignore_index, ctx.reduction, upstream.dtype)
    if ctx.reduction == "none":
        dx, partial, partial_bias = linear_ce_gradients(
            hidden, weight, labels, bias, weights * upstream, temperature, *ctx.row, ctx.needs
        )
        scale = torch.ones((), dtype=upstream.dtype, device=upstream.device)
        state = hidden.new_empty(0, dtype=torch.uint8)
    else:
        dx, partial, partial_bias, state = gradients
        scale = upstream
        dx = (dx * scale).to(dx.dtype)
    dw = db = None
    if ctx.needs[1] or ctx.needs[2]:
        dw, db = head_gradient(
            hidden, weight, labels, bias, weights, temperature, partial, partial_bias, state, scale, ctx.total,
            *ctx.row, ctx.needs,
        )  # fmt: skip
    return (
        dx if ctx.needs[0] else None,
        dw if ctx.needs[1] and ctx.total is None else None,
        None,
        db.to(ctx.bias_dtype) if db is not None and ctx.needs[2] else None,
        *(None,) * 11,
    )


linear_ce.register_autograd(backward, setup_context=setup_context)

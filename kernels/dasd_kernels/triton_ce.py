"""The loss, its gradients and the scores on a GPU: the kernels of triton_score and triton_rows around cuBLAS.

`run` has chunked.run's results and takes every row with its label: valid rows are brought to the front by a stable
sort on the device, whose count the host never learns. A chunk of C rows, set by the workspace, goes

    gather -> pivot -> sums, E (2NDV) -> again where a sum overflowed -> rows' results, v, residuals
           -> dX = v (E W) + residual (2NDV, cuBLAS) -> dW += Eᵀ (v X) + residual (2NDV, cuBLAS, fp32 in place)

Scores stop after the rows' results. Our kernels return at once for rows past the valid ones; cuBLAS cannot, so its
two products are over all N rows: ignored rows save a third of a training step, not all of it. E is the input's
dtype, [C, V] with V rounded up to 64, and is the only large buffer.

Bytes of a training step, from HBM: E written once and read twice, dW read and written once a chunk in fp32, the head
read twice a chunk and more (triton_score.py), 24 ND for the rows. At N, D, V = 32768, 2560, 151936 and WORKSPACE that
is some 98 GB on sm_90 for 76.5 TFLOP, as compile_report counts; nothing was timed here.

What goes the plain way of chunked.py instead (`supports`): training in fp16, whose range E leaves; label smoothing
under a softcap, which has no rank-1 form; mixed dtypes; float64.

A sum over 2^64, or NaN, means that the pivot was some 44 nats too low: the row's true maximum is then found and its
block of rows computed again, by launches that return at once in every other block. Rows that hold NaN stay NaN.
Under TRITON_INTERPRET=1 all of it runs on CPU tensors, the products of bf16 through fp32.
"""

import torch
import triton
from torch import Tensor

from dasd_kernels import triton_rows as rows_
from dasd_kernels.chunked import Result, Row
from dasd_kernels.reference import SegmentScores
from dasd_kernels.triton_score import Head, Rows, find_pivot, interpreting, splits, sum_exponentials

BLOCK = 64
WORKSPACE = 1 << 30  # fewer, longer chunks: dW is read and written once a chunk


def supports(hidden: Tensor, weight: Tensor, row: Row, training: bool) -> bool:
    """Whether `run` takes these inputs."""
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    return not (row.softcap and row.label_smoothing) and not (training and hidden.dtype == torch.float16)


def wanted(tensor: Tensor) -> bool:
    """Whether this tensor's device is ours: a GPU, or the CPU under TRITON_INTERPRET=1."""
    return tensor.is_cuda or (tensor.device.type == "cpu" and interpreting())


def architecture(device: torch.device) -> str:
    if device.type == "cpu":
        return "sm_90"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def run(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    row: Row,
    ignore_index: int,
    workspace_bytes: int,
    *,
    coefficient: Tensor | None = None,
    needs: tuple[bool, bool, bool] = (False, False, False),
    entropy: bool = False,
    rank: bool = False,
) -> Result:
    """Score the rows whose label is not ignore_index, and with `coefficient` [N] fp32 those gradients of
    sum(coefficient * loss) that `needs` names. Ignored rows hold 0 (rank: -1) and have zero gradients; a label
    outside [0, V) makes its row's nll NaN, and the gradients that it takes part in."""
    n, (vocab, width) = len(labels), weight.shape
    valid = labels != ignore_index
    lost = valid & ((labels < 0) | (labels >= vocab))
    order = torch.argsort(~valid, stable=True)
    count = valid.sum().reshape(1)
    zeros = lambda *shape, dtype=torch.float32: torch.zeros(shape, dtype=dtype, device=hidden.device)  # noqa: E731
    grad = coefficient is not None and any(needs)
    out = Result(
        zeros(n), zeros(n), zeros(n),
        zeros(n) if row.label_smoothing else None, zeros(n) if entropy else None,
        torch.full((n,), -1, dtype=torch.int64, device=hidden.device) if rank else None,
        torch.zeros_like(hidden, memory_format=torch.contiguous_format) if grad and needs[0] else None,
        zeros(vocab, width) if grad and needs[1] else None, zeros(vocab) if grad and needs[2] else None,
    )  # fmt: skip
    if n == 0:
        return out
    inverse = torch.full((n,), 1 / row.temperature, device=hidden.device) if temperature is None else 1 / temperature
    inverse = inverse.float()
    if coefficient is not None:
        coefficient = coefficient.float().masked_fill(lost, float("nan"))
    safe = labels.clamp(0, vocab - 1)
    flat_bias = None if bias is None else bias.contiguous()
    head = Head(weight, flat_bias, row.softcap or 0.0, architecture(hidden.device), entropy, rank)
    mean_row = weight.mean(0, dtype=torch.float32) if row.label_smoothing else None
    mean_bias = bias.mean(dtype=torch.float32).reshape(1) if bias is not None and row.label_smoothing else None
    pitch = triton.cdiv(vocab, 64) * 64
    size = chunk_rows(n, width, pitch if grad else 0, hidden.element_size(), workspace_bytes)
    buffer = torch.empty((size, pitch) if grad else (1, 0), dtype=hidden.dtype, device=hidden.device)
    for begin in range(0, n, size):
        part = order[begin : begin + size]
        c = gather(hidden, safe, inverse, part, count, begin, head, buffer)
        find_pivot(head, c)
        settle(head, c, "store" if grad else "score")
        factor = finish(head, c, part, row, out, coefficient if grad else None)
        if mean_row is not None:
            rows_.mean_logit_kernel[(len(part),)](
                c.hidden, mean_row, mean_bias, c.inverse, part, count, begin, out.mean, width,
                BLOCK=1024, BIAS=bias is not None,
            )  # fmt: skip
        if grad:
            gradients(head, c, part, row, out, coefficient, factor, mean_row)
    if grad and row.label_smoothing:
        smooth(hidden, coefficient, valid, inverse, row.label_smoothing / vocab, out)
    out.nll.masked_fill_(lost, float("nan"))
    return out


def chunk_rows(n: int, width: int, pitch: int, element: int, workspace_bytes: int) -> int:
    """Rows of a chunk: whole tiles of 128 within the workspace, of about equal number."""
    row_bytes = element * (pitch + 2 * width) + 4 * width + 512
    limit = max(1, workspace_bytes // (row_bytes * 128)) * 128
    even = triton.cdiv(n, triton.cdiv(n, limit))
    return min(n, triton.cdiv(even, 128) * 128)


def gather(
    hidden: Tensor, labels: Tensor, inverse: Tensor, part: Tensor, count: Tensor, begin: int, head: Head, buffer: Tensor
) -> Rows:
    size, parts = len(part), splits(len(head.weight))
    empty = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=hidden.device)  # noqa: E731
    return Rows(
        hidden.index_select(0, part), labels.index_select(0, part), inverse.index_select(0, part),
        empty(size), empty(size), empty(size, dtype=torch.int8), count, begin,
        empty(size, parts), empty(size), empty(size, parts if head.entropy else 0),
        empty(size, parts if head.rank else 0, dtype=torch.int32), buffer[:size] if buffer.numel() else buffer,
    )  # fmt: skip


def settle(head: Head, c: Rows, mode: str) -> None:
    """Sums of exponentials, once more for blocks in which one overflowed."""
    n, parts = c.sums.shape
    grid, shape = (triton.cdiv(n, BLOCK),), {"PARTS": parts, "WIDTH": triton.next_power_of_2(parts), "BLOCK": BLOCK}
    sum_exponentials(head, c, mode, retry=False)
    rows_.check_kernel[grid](c.sums, c.poison, c.count, c.begin, n, **shape)
    sum_exponentials(head, c, "max", retry=True)
    rows_.raise_kernel[grid](c.sums, c.pivot, c.reference, c.poison, n, **shape)
    sum_exponentials(head, c, mode, retry=True)


def finish(
    head: Head, c: Rows, part: Tensor, row: Row, out: Result, coefficient: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    n, parts = c.sums.shape
    factor, rest, hit = torch.empty(3, n, device=c.sums.device).unbind()
    rows_.finish_kernel[(triton.cdiv(n, BLOCK),)](
        c.sums, c.target, c.entropy, c.rank, c.pivot, c.inverse, c.label, part, coefficient, c.count, c.begin, n,
        out.target, out.nll, out.lse, out.entropy, out.rank, c.e, c.e.stride(0), factor, rest, hit,
        head.softcap, row.z_loss, row.label_smoothing,
        PARTS=parts, WIDTH=triton.next_power_of_2(parts), BLOCK=BLOCK, ENTROPY=head.entropy, RANK=head.rank,
        GRAD=coefficient is not None, SOFTCAP=head.softcap > 0,
    )  # fmt: skip
    return factor, rest, hit


def gradients(
    head: Head, c: Rows, part: Tensor, row: Row, out: Result, coefficient: Tensor | None,
    scales: tuple[Tensor, Tensor, Tensor], mean_row: Tensor | None,
) -> None:  # fmt: skip
    factor, rest, hit = scales
    n, (vocab, width) = len(part), head.weight.shape
    e = c.e[:, :vocab]
    grid = (n, triton.cdiv(width, 1024))
    if out.grad_hidden is not None:
        product = multiply(e, head.weight)
        rows_.grad_hidden_kernel[grid](
            product, head.weight, c.label, factor, rest, coefficient, c.inverse, part, mean_row, row.label_smoothing,
            c.count, c.begin, out.grad_hidden, width, *head.weight.stride(), BLOCK=1024, SMOOTH=mean_row is not None,
        )  # fmt: skip
    if out.grad_weight is None and out.grad_bias is None:
        return
    xs = torch.empty_like(c.hidden)
    if out.grad_weight is not None:
        rows_.scale_rows_kernel[grid](c.hidden, factor, xs, width, BLOCK=1024)
        accumulate(out.grad_weight, e, xs)
    if out.grad_bias is not None:
        high = factor.to(e.dtype)  # two columns hold v to 16 bits
        pair = torch.stack([high, (factor - high.float()).to(e.dtype), *[torch.zeros_like(high)] * 6], 1)
        out.grad_bias.add_(multiply(e.t(), pair).sum(1))
    rows_.grad_label_kernel[grid](
        c.hidden, xs, c.label, torch.argsort(c.label, stable=True), factor, rest, hit, out.grad_weight, out.grad_bias,
        n, width, BLOCK=1024, WEIGHT=out.grad_weight is not None, BIAS=out.grad_bias is not None,
    )  # fmt: skip


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 from operands of one dtype."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def accumulate(total: Tensor, e: Tensor, xs: Tensor) -> None:
    """total += eᵀ @ xs in fp32, in place."""
    if e.dtype == torch.float32 or not e.is_cuda:
        total.addmm_(e.t().float(), xs.float())
    else:
        torch.addmm(total, e.t(), xs, out_dtype=torch.float32, out=total)


def smooth(
    hidden: Tensor, coefficient: Tensor | None, valid: Tensor, inverse: Tensor, share: float, out: Result
) -> None:
    """Label smoothing's part of dW and db is the same for every entry of the vocabulary."""
    assert coefficient is not None
    scale = (coefficient * inverse * share).where(valid, 0)
    if out.grad_weight is not None:
        out.grad_weight.sub_((scale[:, None] * hidden).where(valid[:, None], 0).sum(0))
    if out.grad_bias is not None:
        out.grad_bias.sub_(scale.sum())


def segment_scores(logprob: Tensor, offsets: Tensor) -> SegmentScores:
    """segments.segment_scores for contiguous offsets [S+1] on the device; nothing is checked, offsets are trusted."""
    size, dtype = len(offsets) - 1, torch.float64 if logprob.dtype == torch.float64 else torch.float32
    count = torch.empty(size, dtype=torch.int64, device=logprob.device)
    total, mean, geometric = torch.empty(3, size, dtype=dtype, device=logprob.device).unbind()
    if size:
        rows_.segment_kernel[(size,)](
            logprob.contiguous(), offsets.contiguous(), count, total, mean, geometric, BLOCK=1024, num_warps=4
        )
    return SegmentScores(count, total, mean, geometric)


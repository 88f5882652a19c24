"""The losses and scores in plain torch, a chunk of tokens at a time: any device, never an [N, V] object.

A chunk of C tokens takes one [C, V] buffer in fp32 (two under softcap), reused by every chunk: logits z, then in
place E = exp(z - max). Rows are never normalised; 1/sum(E) is folded into a factor a row, on the [C, D] side of
the two gradient products dX = diag(v) (E W) and dW += Eᵀ (diag(v) X). Costs 2NDV FLOPs for scores and 6NDV for a
loss with its gradients; E is swept six times (max, subtract, exp, sum and the two products).

On a CPU, products of low-precision operands go through fp32 copies made a slab of the vocabulary at a time, since
a bf16 matmul without AVX512-BF16 or AMX runs hundreds of times slower than fp32. On CUDA they are torch.mm with
fp32 output. `run` is the whole interface; callers pass valid tokens only.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SLAB_BYTES = 16 << 20  # fp32 copy of a part of a low-precision head
CACHE_BYTES = 16 << 20  # a chunk that fits the last-level cache is swept at its speed ...
CACHE_ROWS = 256  # ... but fewer rows than this starve the matrix products


@dataclass(frozen=True)
class Row:
    """What makes logits of a product and a loss of logits; see linear_cross_entropy."""

    softcap: float | None = None
    temperature: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0


@dataclass(frozen=True)
class Result:
    """Per row, [n]: the label's logit, -log p(label), log-sum-exp, and what was asked for. Gradients: dX in hidden's
    dtype, dW [V, D] and db [V] in the accumulation dtype."""

    target: Tensor
    nll: Tensor  # not lse - target: that would round at the logits' magnitude
    lse: Tensor
    mean: Tensor | None = None  # mean logit
    entropy: Tensor | None = None
    rank: Tensor | None = None
    grad_hidden: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    state: Tensor | None = None  # of cpu.run: the last chunk, whose part of dW and db is still to be made


def run(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    row: Row,
    workspace_bytes: int,
    *,
    coefficient: Tensor | None = None,
    needs: tuple[bool, bool, bool] = (False, False, False),
    entropy: bool = False,
    rank: bool = False,
) -> Result:
    """Score every row; with `coefficient` [n] also those gradients of sum(coefficient * loss) that `needs`
    names (hidden, weight, bias). `temperature` [n] replaces row.temperature."""
    n, vocab = len(hidden), len(weight)
    acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    empty = lambda *shape, dtype=acc: torch.empty(shape, dtype=dtype, device=hidden.device)  # noqa: E731
    out = Result(
        target=empty(n),
        nll=empty(n),
        lse=empty(n),
        mean=empty(n) if row.label_smoothing else None,
        entropy=empty(n) if entropy else None,
        rank=empty(n, dtype=torch.int64) if rank else None,
        grad_hidden=torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None,
        grad_weight=empty(*weight.shape) if needs[1] else None,
        grad_bias=torch.zeros(vocab, dtype=acc, device=hidden.device) if needs[2] else None,
    )
    if n == 0 and out.grad_weight is not None:
        out.grad_weight.zero_()
    buffers = 2 if coefficient is not None and row.softcap else 1
    size = chunk_rows(n, vocab, buffers * acc.itemsize, workspace_bytes)
    buffer = empty(buffers, size, vocab)
    for begin in range(0, n, size):
        part = slice(begin, min(begin + size, n))
        inverse = 1 / temperature[part].to(acc) if temperature is not None else 1 / row.temperature
        x, y = hidden[part], labels[part, None]
        z = buffer[0, : len(x)]
        multiply(x, weight, z, transpose=True)
        slope = finish_logits(z, bias, row.softcap, inverse, buffer[1, : len(x)] if buffers == 2 else None)
        chunk_scores(z, y, part, out)
        if coefficient is not None:
            chunk_gradients(z, slope, x, y, weight, coefficient[part], inverse, row, part, out)
    return out


def chunk_rows(n: int, vocab: int, row_bytes: int, workspace_bytes: int) -> int:
    """Rows of a chunk: what the workspace allows, or less where the cache holds them; of even size."""
    limit = max(1, workspace_bytes // (row_bytes * vocab))
    limit = min(limit, max(CACHE_ROWS, CACHE_BYTES // (row_bytes * vocab)))
    return max(1, -(-n // max(1, -(-n // limit))))


def finish_logits(
    z: Tensor, bias: Tensor | None, softcap: float | None, inverse: Tensor | float, slope: Tensor | None
) -> Tensor | None:
    """Product -> logits, in place; fills `slope` with the derivative of the softcap."""
    if bias is not None:
        z += bias
    if softcap:
        z.div_(softcap).tanh_()
        if slope is not None:
            torch.square(z, out=slope).neg_().add_(1)
        z.mul_(softcap)
    if isinstance(inverse, Tensor):
        z.mul_(inverse[:, None])
    elif inverse != 1:
        z.mul_(inverse)
    return slope


def chunk_scores(z: Tensor, y: Tensor, part: slice, out: Result) -> None:
    """Logits -> E = exp(z - max) in place, and the scores of these rows."""
    target = z.gather(1, y)
    if out.mean is not None:
        torch.mean(z, 1, out=out.mean[part])
    if out.rank is not None:
        torch.sum(z > target, 1, out=out.rank[part])
    top = z.amax(1, keepdim=True)
    shifted = z.sub_(top)
    if out.entropy is not None:
        weighted = (shifted.exp() * shifted).sum(1)
    distance = target[:, 0] - top[:, 0]
    total = z.exp_().sum(1)
    out.target[part] = target[:, 0]
    out.nll[part] = total.log() - distance
    out.lse[part] = top[:, 0] + total.log()
    if out.entropy is not None:
        out.entropy[part] = total.log() - weighted / total


def chunk_gradients(
    e: Tensor,
    slope: Tensor | None,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    coefficient: Tensor,
    inverse: Tensor | float,
    row: Row,
    part: slice,
    out: Result,
) -> None:
    """E -> S dloss/dz in place, with S the row's sum, then the products. Since E = S p,
    S dloss/dz = (1 + 2 z_loss lse) E - S ((1 - label_smoothing) onehot + label_smoothing / V)."""
    total = e.sum(1, keepdim=True)
    if row.z_loss:
        e.mul_(1 + 2 * row.z_loss * out.lse[part, None])
    if row.label_smoothing:
        e.sub_(total * (row.label_smoothing / e.shape[1]))
    e.scatter_add_(1, y, total * (row.label_smoothing - 1))
    if slope is not None:
        e.mul_(slope)
    factor = (coefficient * inverse)[:, None] / total
    if out.grad_hidden is not None:
        grad = torch.empty(x.shape, dtype=e.dtype, device=e.device)
        multiply(e, weight, grad)
        torch.mul(grad, factor, out=out.grad_hidden[part])
    if out.grad_weight is not None:
        multiply(e.t(), x.to(e.dtype) * factor, out.grad_weight, add=part.start > 0)
    if out.grad_bias is not None:
        out.grad_bias.addmv_(e.t(), factor[:, 0])


def multiply(a: Tensor, b: Tensor, out: Tensor, *, transpose: bool = False, add: bool = False) -> None:
    """out (+)= a @ b, or a @ bᵀ, accumulated in the precision of `out`; b is the one that may be large."""
    if a.dtype == b.dtype == out.dtype:
        b = b.t() if transpose else b
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.is_cuda and b.dtype in (torch.bfloat16, torch.float16):
        b = b.t() if transpose else b
        out.copy_(torch.mm(a.to(b.dtype), b, out_dtype=out.dtype))
    else:
        a = a.to(out.dtype)
        for part, slab in slabs(b, out.dtype):
            if transpose:
                torch.mm(a, slab.t(), out=out[:, part])
            elif part.start == 0:
                torch.mm(a[:, part], slab, out=out)
            else:
                out.addmm_(a[:, part], slab)


def slabs(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Parts of `weight` converted to `dtype`, in one reused buffer."""
    rows, width = weight.shape
    size = min(rows, max(64, SLAB_BYTES // (dtype.itemsize * max(1, width))))
    buffer = torch.empty(size, width, dtype=dtype, device=weight.device)
    for begin in range(0, rows, size):
        part = slice(begin, min(begin + size, rows))
        yield part, buffer[: part.stop - begin].copy_(weight[part])

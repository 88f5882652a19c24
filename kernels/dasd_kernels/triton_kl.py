# mypy: allow-incomplete-defs, allow-untyped-defs
"""Both Kullback-Leibler divergences of a teacher and a student over the whole vocabulary, without logits (Triton).

With base-2 exponents t and s of the teacher's and the student's logits over their pivots,

    S_t = sum 2^t,  S_s = sum 2^s,  A = sum 2^t (t - s),  B = sum 2^s (s - t)                       kl_kernel
    forward = sum p_t log(p_t / p_s) = ln 2 (A / S_t + log2(S_s / S_t)); reverse has the roles swapped

A program takes BM rows and one of `splits(V)` parts of the vocabulary, as exp_kernel does: per tile one product over
the teacher's width and one over the student's, two fp32 accumulators, four sums a row; no maximum, lock or atomic, and
a row's bits do not depend on the others. Blocks of rows in which a sum overflowed are computed again from the rows'
true maxima, which exp_kernel finds.

2N(D_t + D_s)V FLOPs and, an element of the vocabulary, two exp2 and eight multiply-adds, adds or multiplies; bytes as
exp_kernel's for each model, partials 16 bytes a row and part.

Only compiled, never timed, here (`python -m dasd_kernels.compile_report`). With triton 3.7.1, bf16 on sm_90: 128 x 128
tiles, 232 registers, no stack, 98 KB of shared memory, 4 HGMMA and 85 other instructions a pass of either loop over D
(2.1 MFLOP), 1648 beside them a tile of 168 MFLOP at D_t = D_s = 2560; with a bias and a softcap 128 x 64 tiles, 2016.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from dasd_kernels import triton_rows as rows_
from dasd_kernels.triton_ce import BLOCK, architecture, chunk_rows, gather
from dasd_kernels.triton_score import (
    LOG2E,
    NEVER,
    Head,
    Rows,
    Tile,
    descriptor,
    find_pivot,
    generation,
    has_tma,
    splits,
    squash,
    sum_exponentials,
    tile_product,
    tma_ready,
)

LN2 = tl.constexpr(0.6931471805599453)


def kl_tile(dtype: torch.dtype, arch: str, options: bool, aligned: bool) -> Tile:
    """Two accumulators take twice the registers of exp_tile's."""
    fp32, chip = dtype == torch.float32, generation(arch)
    if not aligned:
        return Tile(64, 32, 32, 8 if fp32 else 4, 2) if chip >= 90 or not fp32 else Tile(32, 32, 16, 4, 2)
    if fp32:
        return Tile(64, 32 if chip == 80 else 64, 32, 8, 2)
    if chip == 0:
        return Tile(128, 128, 64, 8, 1)
    return Tile(128, 128 if chip >= 90 and not options else 64, 64 if chip >= 90 else 32, 8, 3)


@triton.jit
def exponents(
    x, w, bias, scale, pivot, row0, col0, rows, V, D, stride_xn, stride_xd, stride_wv, stride_wd, softcap,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One model's tile of exponents over the pivot."""
    z = tile_product(
        x, w, row0, col0, rows, V, D, stride_xn, stride_xd, stride_wv, stride_wd,
        BM, BN, BK, TMA, EVEN, WIDEN, PRECISION,
    )  # fmt: skip
    if BIAS:
        col = col0 + tl.arange(0, BN)
        z += tl.load(bias + col, mask=col < V, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        z = squash(z, softcap)
    return z * scale[:, None] - pivot[:, None]


@triton.jit
def kl_kernel(
    x, w, bias, pivot, poison, x2, w2, bias2, pivot2, poison2, inverse, count, begin,
    out_sum, out_sum2, out_a, out_b, rows, V, D, D2,
    stride_xn, stride_xd, stride_wv, stride_wd, stride_xn2, stride_xd2, stride_wv2, stride_wd2, softcap, softcap2,
    SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, BIAS2: tl.constexpr, SOFTCAP: tl.constexpr, SOFTCAP2: tl.constexpr, RETRY: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums [rows, SPLITS] of S_t, S_s, A and B; row `i` is valid while begin + i < count[0]. The student's
    arguments end in 2. RETRY: only blocks of rows that hold a poisoned row."""
    pid = tl.program_id(0)
    split = pid % SPLITS
    row0 = (pid // SPLITS) * BM
    tiles = tl.cdiv(tl.cdiv(V, BN), SPLITS)
    first = split * tiles * BN
    last = tl.minimum(first + tiles * BN, V)
    row = row0 + tl.arange(0, BM)
    inside = row < rows
    left = tl.load(count) - begin
    if row0 >= left:
        return
    if RETRY:
        bad = tl.load(poison + row, mask=inside, other=0) | tl.load(poison2 + row, mask=inside, other=0)
        if tl.max(bad, 0) == 0:
            return
    scale = tl.load(inverse + row, mask=inside, other=0.0) * LOG2E
    r = tl.load(pivot + row, mask=inside, other=0.0)
    r2 = tl.load(pivot2 + row, mask=inside, other=0.0)
    total = tl.zeros((BM,), dtype=tl.float32)
    total2 = tl.zeros((BM,), dtype=tl.float32)
    a = tl.zeros((BM,), dtype=tl.float32)
    b = tl.zeros((BM,), dtype=tl.float32)
    for col0 in range(first, last, BN):
        t = exponents(
            x, w, bias, scale, r, row0, col0, rows, V, D, stride_xn, stride_xd, stride_wv, stride_wd, softcap,
            BM, BN, BK, TMA, EVEN, BIAS, SOFTCAP, WIDEN, PRECISION,
        )  # fmt: skip
        s = exponents(
            x2, w2, bias2, scale, r2, row0, col0, rows, V, D2, stride_xn2, stride_xd2, stride_wv2, stride_wd2,
            softcap2, BM, BN, BK, TMA, EVEN, BIAS2, SOFTCAP2, WIDEN, PRECISION,
        )  # fmt: skip
        if (col0 + BN > V) | (row0 + BM > left):
            keep = (row < left)[:, None] & (col0 + tl.arange(0, BN) < V)[None, :]
            t = tl.where(keep, t, NEVER)
            s = tl.where(keep, s, NEVER)
        e = tl.exp2(t)
        e2 = tl.exp2(s)
        gap = t - s
        total += tl.sum(e, 1)
        total2 += tl.sum(e2, 1)
        a += tl.sum(e * gap, 1)
        b += tl.sum(e2 * gap, 1)
    at = row.to(tl.int64) * SPLITS + split
    tl.store(out_sum + at, total, mask=inside)
    tl.store(out_sum2 + at, total2, mask=inside)
    tl.store(out_a + at, a, mask=inside)
    tl.store(out_b + at, -b, mask=inside)


@triton.jit
def kl_finish_kernel(
    sums, sums2, sums_a, sums_b, order, count, begin, rows, out_forward, out_reverse,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partials -> divergences in nats at out[order[i]]. The logarithm is taken of a quotient, which is near 1 where
    the models agree; what rounding leaves below zero is zero, NaN stays."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = (row < rows) & (row + begin < tl.load(count))
    part = tl.arange(0, WIDTH)
    at = row.to(tl.int64)[:, None] * PARTS + part[None, :]
    keep = valid[:, None] & (part < PARTS)[None, :]
    total = tl.sum(tl.load(sums + at, mask=keep, other=0.0), 1)
    total2 = tl.sum(tl.load(sums2 + at, mask=keep, other=0.0), 1)
    a = tl.sum(tl.load(sums_a + at, mask=keep, other=0.0), 1)
    b = tl.sum(tl.load(sums_b + at, mask=keep, other=0.0), 1)
    total = tl.where(valid, total, 1.0)
    total2 = tl.where(valid, total2, 1.0)
    between = tl.log2(total2 / total)
    forward = (a / total + between) * LN2
    reverse = (b / total2 - between) * LN2
    to = tl.load(order + row, mask=valid, other=0)
    tl.store(out_forward + to, tl.where(forward < 0, 0.0, forward), mask=valid)
    tl.store(out_reverse + to, tl.where(reverse < 0, 0.0, reverse), mask=valid)


def supports(*tensors: Tensor) -> bool:
    """Whether `run` takes hidden states and heads of these types: one of them for all four."""
    dtypes = {t.dtype for t in tensors}
    return len(dtypes) == 1 and dtypes <= {torch.bfloat16, torch.float16, torch.float32}


def run(
    teacher: tuple[Tensor, Tensor, Tensor | None, float],
    student: tuple[Tensor, Tensor, Tensor | None, float],
    labels: Tensor,
    inverse: Tensor,
    ignore_index: int,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Forward and reverse divergence [N] fp32 of the rows whose label is not ignore_index; the others hold 0. A model
    is (hidden [N, D], weight [V, D], bias or None, softcap or 0); inverse [N] fp32 temperatures. Labels only steer
    the pivots."""
    hidden, hidden2, n, vocab = teacher[0], student[0], len(labels), len(teacher[1])
    valid = labels != ignore_index
    order, count = torch.argsort(~valid, stable=True), valid.sum().reshape(1)
    forward, reverse = torch.zeros(n, device=hidden.device), torch.zeros(n, device=hidden.device)
    if n == 0:
        return forward, reverse
    safe = labels.clamp(0, vocab - 1)
    arch, nothing = architecture(hidden.device), hidden.new_empty(1, 0)
    heads = [
        Head(w, None if bias is None else bias.contiguous(), softcap, arch, False, False)
        for _, w, bias, softcap in (teacher, student)
    ]
    size = chunk_rows(n, hidden.shape[1] + hidden2.shape[1], 0, hidden.element_size(), workspace_bytes)
    for begin in range(0, n, size):
        part = order[begin : begin + size]
        t, s = (
            gather(x, safe, inverse, part, count, begin, head, nothing)
            for x, head in zip((hidden, hidden2), heads, strict=True)
        )
        a, b = torch.empty(2, *t.sums.shape, device=hidden.device).unbind()
        rows, parts = t.sums.shape
        grid, shape = (triton.cdiv(rows, BLOCK),), {"PARTS": parts, "WIDTH": triton.next_power_of_2(parts)}
        for head, c in zip(heads, (t, s), strict=True):
            find_pivot(head, c)
        sum_pair(heads[0], t, heads[1], s, a, b, retry=False)
        for head, c in zip(heads, (t, s), strict=True):
            rows_.check_kernel[grid](c.sums, c.poison, count, begin, rows, **shape, BLOCK=BLOCK)
            top = replace(c, sums=torch.empty_like(c.sums))  # its blocks may be taller than sum_pair's
            sum_exponentials(head, top, "max", retry=True)
            rows_.raise_kernel[grid](top.sums, c.pivot, c.reference, c.poison, rows, **shape, BLOCK=BLOCK)
        sum_pair(heads[0], t, heads[1], s, a, b, retry=True)
        kl_finish_kernel[grid](
            t.sums, s.sums, a, b, part, count, begin, rows, forward, reverse, **shape, BLOCK=BLOCK
        )  # fmt: skip
    return forward, reverse


def sum_pair(head: Head, t: Rows, head2: Head, s: Rows, a: Tensor, b: Tensor, retry: bool) -> None:
    dtype, vocab = head.weight.dtype, len(head.weight)
    biased, capped = head2.bias is not None, head2.softcap > 0
    options = biased or capped or head.bias is not None or head.softcap > 0
    operands = (t.hidden, head.weight, s.hidden, head2.weight)
    tma = has_tma(head.arch, dtype)
    aligned = all(tma_ready(x) and (tma or x.shape[1] % 64 == 0) for x in operands)
    tma = tma and aligned
    tile = kl_tile(dtype, head.arch, options, aligned)
    boxes = (tile.bm, tile.bn, tile.bm, tile.bn)
    views = [descriptor(m, side, tile.bk) if tma else m for m, side in zip(operands, boxes, strict=True)]
    x, w, x2, w2 = views
    kl_kernel[(triton.cdiv(len(t.hidden), tile.bm) * splits(vocab),)](
        x, w, head.bias, t.pivot, t.poison, x2, w2, head2.bias, s.pivot, s.poison, t.inverse, t.count, t.begin,
        t.sums, s.sums, a, b, len(t.hidden), vocab, t.hidden.shape[1], s.hidden.shape[1],
        *t.hidden.stride(), *head.weight.stride(), *s.hidden.stride(), *head2.weight.stride(),
        head.softcap, head2.softcap,
        SPLITS=splits(vocab), BM=tile.bm, BN=tile.bn, BK=tile.bk, TMA=tma,
        EVEN=all(m.shape[1] % tile.bk == 0 for m in operands), BIAS2=biased, SOFTCAP2=capped,
        RETRY=retry, num_warps=tile.warps, num_stages=tile.stages, **head.switches(),
    )  # fmt: skip

# mypy: allow-incomplete-defs, allow-untyped-defs
"""What surrounds the two big products: rows' results, scaled rows, the labels' residual, sums of segments (Triton).

Each is one sweep over [C], [C, D] or [N] data, bound by memory: finish 4 x splits bytes a row; scale_rows reads and
writes C·D elements; grad_hidden reads the fp32 product and one row of the head a token and writes dX once; grad_label
reads two rows of D a token and updates one row of dW a distinct label. Nothing uses atomics, every sum has one order.

The residual: dloss/dz of the label, q = v e_y - c (1 - label_smoothing), cancels; in bf16 its rounding is most of the
gradient's error. E keeps a = bf16(q / v) there and the exact rest is added in fp32: dX_i += (q - a v) W[y_i] and
dW[y_i] += q x_i - a bf16(v x_i).

Only compiled, never timed, here. With triton 3.7.1 all take 48 registers at most, no stack, 4 KB of shared memory at
most, and load 128 bits at a time on Nvidia's chips (segments, summed in float64: 64).
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LARGEST = tl.constexpr(1.8446744073709552e19)  # 2^64: a sum above this is computed again from the row's own maximum


@triton.jit
def check_kernel(sums, poison, count, begin, rows, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """poison = 1 where a valid row's sum is NaN, infinite or so large that its products with W might overflow."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = (row < rows) & (row + begin < tl.load(count))
    part = tl.arange(0, WIDTH)
    at = row.to(tl.int64)[:, None] * PARTS + part[None, :]
    total = tl.sum(tl.load(sums + at, mask=valid[:, None] & (part < PARTS)[None, :], other=0.0), 1)
    good = total < LARGEST
    tl.store(poison + row, tl.where(valid & (good == 0), 1, 0).to(tl.int8), mask=row < rows)


@triton.jit
def raise_kernel(
    sums, pivot, reference, poison, rows, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Poisoned rows take the largest exponent, found by exp_kernel's "max" mode, for their pivot."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    bad = inside & (tl.load(poison + row, mask=inside, other=0) != 0)
    part = tl.arange(0, WIDTH)
    at = row.to(tl.int64)[:, None] * PARTS + part[None, :]
    top = tl.max(tl.load(sums + at, mask=bad[:, None] & (part < PARTS)[None, :], other=-1e30), 1)
    tl.store(pivot + row, tl.load(pivot + row, mask=bad, other=0.0) + top, mask=bad)
    tl.store(reference + row, tl.load(reference + row, mask=bad, other=0.0) - top, mask=bad)


@triton.jit
def finish_kernel(
    sums, targets, entropies, ranks, pivot, inverse, label, order, coefficient, count, begin, rows,
    out_target, out_nll, out_lse, out_entropy, out_rank, e_out, stride_e, factor, rest, hit,
    softcap, z_loss, smoothing,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ENTROPY: tl.constexpr, RANK: tl.constexpr,
    GRAD: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Partials -> results at out[order[i]]. GRAD: also v (`factor`, 0 for rows that are not valid), `rest` = q - a v,
    `hit` = a, and a into E[i, label]."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    valid = inside & (row + begin < tl.load(count))
    part = tl.arange(0, WIDTH)
    at = row.to(tl.int64)[:, None] * PARTS + part[None, :]
    keep = valid[:, None] & (part < PARTS)[None, :]
    total = tl.sum(tl.load(sums + at, mask=keep, other=0.0), 1)
    total = tl.where(valid, total, 1.0)
    t = tl.load(targets + row, mask=valid, other=0.0)
    r = tl.load(pivot + row, mask=valid, other=0.0)
    to = tl.load(order + row, mask=valid, other=0)
    log_total = tl.log2(total)
    nll = (log_total - t) * LN2
    lse = (r + log_total) * LN2
    z = (r + t) * LN2
    tl.store(out_nll + to, nll, mask=valid)
    tl.store(out_lse + to, lse, mask=valid)
    tl.store(out_target + to, z, mask=valid)
    if ENTROPY:
        weighted = tl.sum(tl.load(entropies + at, mask=keep, other=0.0), 1)
        tl.store(out_entropy + to, (log_total - weighted / total) * LN2, mask=valid)
    if RANK:
        rank = tl.sum(tl.load(ranks + at, mask=keep, other=0), 1)
        tl.store(out_rank + to, rank.to(tl.int64), mask=valid)
    if GRAD:
        scale = tl.load(inverse + row, mask=valid, other=1.0)
        c = tl.load(coefficient + to, mask=valid, other=0.0) * scale
        v = c * (1 + 2 * z_loss * lse) / total
        q = v * tl.exp2(t) - c * (1 - smoothing)
        if SOFTCAP:
            raw = z / scale / softcap
            q *= 1 - raw * raw
        a = tl.where(v == 0, 0.0, q / tl.where(v == 0, 1.0, v)).to(e_out.dtype.element_ty)
        y = tl.load(label + row, mask=valid, other=0)
        tl.store(e_out + row.to(tl.int64) * stride_e + y, a, mask=valid)
        tl.store(factor + row, v, mask=inside)
        tl.store(rest + row, q - a.to(tl.float32) * v, mask=inside)
        tl.store(hit + row, a.to(tl.float32), mask=inside)


@triton.jit
def scale_rows_kernel(x, factor, out, D, BLOCK: tl.constexpr):
    """out = factor * x, [C, D], rounded to `out`; rows whose factor is 0 give exact zeros."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(factor + row)
    values = tl.load(x + row * D + col, mask=col < D, other=0.0).to(tl.float32) * v
    tl.store(out + row * D + col, tl.where(v == 0, 0.0, values).to(out.dtype.element_ty), mask=col < D)


@triton.jit
def mean_logit_kernel(
    x, mean_row, mean_bias, inverse, order, count, begin, out, D, BLOCK: tl.constexpr, BIAS: tl.constexpr
):
    """out[order[i]] = (x_i · mean_row + mean_bias) * inverse_i, the mean of a row's logits without a softcap."""
    row = tl.program_id(0).to(tl.int64)
    if row + begin >= tl.load(count):
        return
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for d in range(0, D, BLOCK):
        col = d + tl.arange(0, BLOCK)
        a = tl.load(x + row * D + col, mask=col < D, other=0.0).to(tl.float32)
        total += a * tl.load(mean_row + col, mask=col < D, other=0.0)
    z = tl.sum(total, 0)
    if BIAS:
        z += tl.load(mean_bias)
    tl.store(out + tl.load(order + row), z * tl.load(inverse + row))


@triton.jit
def grad_hidden_kernel(
    product, w, label, factor, rest, coefficient, inverse, order, mean_row, smoothing, count, begin, out, D,
    stride_wv, stride_wd, BLOCK: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """dX[order[i]] = v_i (E W)_i + rest_i W[label_i] - c_i smoothing mean_row, rounded once. Other rows stay."""
    row = tl.program_id(0).to(tl.int64)
    if row + begin >= tl.load(count):
        return
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = col < D
    own = tl.load(w + tl.load(label + row) * stride_wv + col.to(tl.int64) * stride_wd, mask=keep, other=0.0)
    grad = tl.load(product + row * D + col, mask=keep, other=0.0) * tl.load(factor + row)
    grad += own.to(tl.float32) * tl.load(rest + row)
    to = tl.load(order + row)
    if SMOOTH:
        c = tl.load(coefficient + to) * tl.load(inverse + row) * smoothing
        grad -= c * tl.load(mean_row + col, mask=keep, other=0.0)
    tl.store(out + to * D + col, grad.to(out.dtype.element_ty), mask=keep)


@triton.jit
def grad_label_kernel(
    x, xs, label, by_label, factor, rest, hit, dw, db, rows, D,
    BLOCK: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """dW[y] += sum over the rows of label y of q x - a xs; db[y] += the sum of q - a v. `by_label` lists the rows in
    the order of their labels (stable): the program of a label's first row adds all of that label's, in row order."""
    place = tl.program_id(0)
    row = tl.load(by_label + place)
    y = tl.load(label + row)
    if place > 0:
        before = tl.load(by_label + place - 1)
        if tl.load(label + before) == y:
            return
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    surplus = 0.0
    more = place < rows
    while more:
        v = tl.load(factor + row)
        left = tl.load(rest + row)
        a = tl.load(hit + row)
        surplus += left
        if WEIGHT:
            values = tl.load(x + row * D + col, mask=col < D, other=0.0).to(tl.float32)
            scaled = tl.load(xs + row * D + col, mask=col < D, other=0.0).to(tl.float32)
            total += (left + a * v) * values - a * scaled
        place += 1
        more = place < rows
        if more:
            row = tl.load(by_label + place)
            more = tl.load(label + row) == y
    if WEIGHT:
        at = dw + y * D + col
        tl.store(at, tl.load(at, mask=col < D, other=0.0) + total, mask=col < D)
    if BIAS and tl.program_id(1) == 0:
        tl.store(db + y, tl.load(db + y) + surplus)


@triton.jit
def segment_kernel(logprob, offsets, count, total, mean, geometric, BLOCK: tl.constexpr):
    """One segment a program: count, sum, mean and exp(mean), summed in float64 in blocks of BLOCK tokens from the
    segment's start, so that its bits depend on its own tokens only."""
    segment = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets + segment).to(tl.int64)
    last = tl.load(offsets + segment + 1).to(tl.int64)
    lanes = tl.zeros((BLOCK,), dtype=tl.float64)
    for begin in range(first, last, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        lanes += tl.load(logprob + at, mask=at < last, other=0.0).to(tl.float64)
    value = tl.sum(lanes, 0)
    average = value / (last - first).to(tl.float64)
    tl.store(count + segment, last - first)
    tl.store(total + segment, value.to(total.dtype.element_ty))
    tl.store(mean + segment, average.to(mean.dtype.element_ty))
    tl.store(geometric + segment, tl.exp(average).to(geometric.dtype.element_ty))

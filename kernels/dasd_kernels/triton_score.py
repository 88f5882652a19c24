# mypy: allow-incomplete-defs, allow-untyped-defs
"""The pivoted-exponential GEMM: per-row sums of exp(logits - pivot) of a head, without the logits (Triton).

    r_i = max(z[i, y_i], max over 256 sampled columns)                   pivot_kernel, 320 of V columns' work
    S_i = sum_j exp2((z_ij - r_i) log2e), optionally sum e t, ranks, E    exp_kernel, 2NDV FLOPs

A pivot that is merely near the row's largest logit is enough, since fp32 and bf16 span 2^±126: the tiles of a row are
independent, with no running maximum, rescaling, lock or atomic. Logits live in fp32 accumulators only. One program
takes BM rows and one of `splits(V)` contiguous parts of the vocabulary, and writes one partial sum a row; the parts
depend on V alone, so the bits of a row do not depend on which rows come with it. Programs that run together (one
a multiprocessor: 132 on an H100) share every part and about 8 row blocks, whose hidden states stay in L2.

Bytes, besides E: hidden once and the head once for every ~8 row blocks from HBM, (BM + BN) D elements a tile from L2;
partials, 4-16 bytes a row and part. The report adds them up: at N, D, V = 32768, 2560, 151936 in bf16 on sm_90 a score
reads 25 GB from HBM and 299 GB from L2 for 25.6 TFLOP. Column masks and the target's pick run only in tiles that need
them; an element of any other tile costs a multiply-add, an exp2 and an add (more under a bias or a softcap).

Only compiled, never timed, here (`python -m dasd_kernels.compile_report`). With triton 3.7.1, bf16 on sm_90: 254
registers, no stack, 147 KB of shared memory, 4 HGMMA and 77 other instructions a pass of the loop over D (4.2 MFLOP),
1659 beside it a 128 x 256 tile of 168 MFLOP at D = 2560; storing E, 128 x 128, 202 registers, 84 and 1044.

On sm_90+ operands come by TMA descriptors; elsewhere, and where the strides or alignment forbid TMA, by pointers. fp32
operands are multiplied as three TF32 products. The interpreter reads bf16 operands of tl.dot as integers, so under
TRITON_INTERPRET=1, and only there, operands are widened to fp32 (constexpr WIDEN).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
SAMPLES = 256
NEVER = tl.constexpr(-1e30)  # exponent of a column beyond V: exp2 gives 0, and 0 * NEVER is 0


@dataclass(frozen=True)
class Tile:
    """Tuning of one kernel: rows, columns and depth of a tile, warps and pipeline stages."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


def generation(arch: str) -> int:
    """80 or 90 or 100, the chip's way of multiplying; 0 for AMD's. sm_86, sm_89 and sm_120 multiply as sm_80 does."""
    if arch.startswith("gfx"):
        return 0
    major = int(arch.removeprefix("sm_")) // 10
    return 80 if major in (8, 12) else 10 * major


def exp_tile(dtype: torch.dtype, arch: str, store: bool, options: bool, aligned: bool) -> Tile:
    """By arithmetic: a 128 x 256 tile reads 48 KB a step for 4.2 MFLOP, the least L2 traffic whose fp32 accumulator
    fits the registers (128 a thread of 8 warps); three stages hide the latency in 147 KB of sm_90's 227 KB. Only sums
    without `options` (bias, softcap, entropy, rank) leave room for it, and only there: the other epilogues spill at
    that size, and on sm_80 and sm_100 those of stored E with options at 128 x 128 too. TF32x3 holds every operand
    twice. Without alignment the addresses and masks of narrow loads take the registers: a small tile, and slow."""
    fp32, chip = dtype == torch.float32, generation(arch)
    if not aligned:
        return Tile(64, 32, 32, 8 if fp32 else 4, 2) if chip >= 90 or not fp32 else Tile(32, 32, 32, 4, 2)
    if fp32:
        return Tile(64, 32 if chip == 80 else 64, 32, 4, 2)
    if chip == 0:
        return Tile(128, 128, 64, 8, 1)
    columns = 64 if store and options and chip != 90 else 128
    if chip < 90:
        return Tile(128, columns, 32, 8, 3)
    return Tile(128, 256 if chip == 90 and not store and not options else columns, 64, 8, 3)


def pivot_tile(dtype: torch.dtype, arch: str, aligned: bool) -> Tile:
    """Rows, as many columns, and depth of the pivot's products; wgmma and tcgen05 take 64 rows at least."""
    if dtype != torch.float32:
        return Tile(64, 64, 64 if aligned else 32, 4, 2)
    return Tile(32, 32, 32, 4, 2) if generation(arch) < 90 else Tile(64, 64, 32, 8, 2)


def splits(vocab: int) -> int:
    """Parts of the vocabulary, from V alone."""
    return min(16, triton.cdiv(vocab, 1024))


@triton.jit
def squash(z, softcap):
    """softcap * tanh(z / softcap) by exp2, without overflow at either end."""
    t = tl.exp2(tl.abs(z) * (-2 * LOG2E / softcap))
    magnitude = softcap * (1 - t) / (1 + t)
    return tl.where(z < 0, -magnitude, magnitude)


@triton.jit
def tile_product(
    x, w, row0, col0, rows, V, D, stride_xn, stride_xd, stride_wv, stride_wd,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden[row0:, :] @ weight[col0:, :]^T in fp32; zeros beyond the ends."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if TMA:
        for k in range(0, D, BK):
            a = x.load([row0, k])
            b = w.load([col0, k])
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    else:
        ks = tl.arange(0, BK)
        m = tl.minimum(row0 + tl.arange(0, BM), rows - 1).to(tl.int64)
        n = tl.minimum(col0 + tl.arange(0, BN), V - 1).to(tl.int64)
        a_ptr = x + m[:, None] * stride_xn + ks[None, :] * stride_xd
        b_ptr = w + n[:, None] * stride_wv + ks[None, :] * stride_wd
        for k in range(0, D, BK):
            if EVEN:
                a = tl.load(a_ptr)
                b = tl.load(b_ptr)
            else:
                a = tl.load(a_ptr, mask=ks[None, :] < D - k, other=0.0)
                b = tl.load(b_ptr, mask=ks[None, :] < D - k, other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
            a_ptr += BK * stride_xd
            b_ptr += BK * stride_wd
    return acc


@triton.jit
def exp_kernel(
    x, w, bias, label, inverse, pivot, reference, poison, count, begin,
    out_sum, out_target, out_entropy, out_rank, e_out,
    rows, V, D, stride_xn, stride_xd, stride_wv, stride_wd, stride_e, softcap,
    SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MODE: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    RANK: tl.constexpr, RETRY: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums [rows, SPLITS] of this chunk of rows; row `i` is valid while begin + i < count[0].

    MODE "score", "store" (also E [rows, stride_e], times the softcap's slope, zeros from V on: a pitch of a multiple
    of 16 is what lets stores be 128 bits wide) or "max" (out_sum is the largest exponent
    instead). RETRY: only blocks of rows that hold a poisoned row. Exponents t are in base 2, relative to the pivot:
    t = z * inverse * log2e - pivot; out_target [rows] gets the label's, written by the part that holds it.
    """
    pid = tl.program_id(0)
    split = pid % SPLITS
    row0 = (pid // SPLITS) * BM
    tiles = tl.cdiv(tl.cdiv(V, BN), SPLITS)
    first = split * tiles * BN
    last = tl.minimum(first + tiles * BN, V)
    row = row0 + tl.arange(0, BM)
    inside = row < rows
    offset = row.to(tl.int64)
    left = tl.load(count) - begin
    if row0 >= left:  # no valid row: E must still be finite, as it meets zeros in dW
        if MODE == "store":
            for col0 in range(first, last, BN):
                col = col0 + tl.arange(0, BN)
                keep = inside[:, None] & (col < stride_e)[None, :]
                zero = tl.zeros((BM, BN), dtype=e_out.dtype.element_ty)
                tl.store(e_out + offset[:, None] * stride_e + col[None, :], zero, mask=keep)
        return
    if RETRY:  # noqa: SIM102 (a compile-time branch: the load exists only in the retry)
        if tl.max(tl.load(poison + row, mask=inside, other=0), 0) == 0:
            return
    y = tl.load(label + row, mask=inside, other=-1)
    scale = tl.load(inverse + row, mask=inside, other=0.0) * LOG2E
    r = tl.load(pivot + row, mask=inside, other=0.0)
    if RANK:
        above = tl.load(reference + row, mask=inside, other=0.0)
        ranks = tl.zeros((BM,), dtype=tl.int32)
    total = tl.zeros((BM,), dtype=tl.float32)
    if MODE == "max":
        total += NEVER
    if ENTROPY:
        weighted = tl.zeros((BM,), dtype=tl.float32)
    for col0 in range(first, last, BN):
        z = tile_product(
            x, w, row0, col0, rows, V, D, stride_xn, stride_xd, stride_wv, stride_wd,
            BM, BN, BK, TMA, EVEN, WIDEN, PRECISION,
        )  # fmt: skip
        col = col0 + tl.arange(0, BN)
        if BIAS:
            z += tl.load(bias + col, mask=col < V, other=0.0).to(tl.float32)[None, :]
        if SOFTCAP:
            z = squash(z, softcap)
            if MODE == "store":
                slope = 1 - (z / softcap) * (z / softcap)
        t = z * scale[:, None] - r[:, None]
        if (col0 + BN > V) | (row0 + BM > left):
            t = tl.where((row < left)[:, None] & (col < V)[None, :], t, NEVER)
        if MODE == "max":
            total = tl.maximum(total, tl.max(t, 1))
        else:
            if tl.max(((y >= col0) & (y < col0 + BN)).to(tl.int32), 0) > 0:
                mine = (y >= col0) & (y < col0 + BN)
                picked = tl.sum(tl.where(col[None, :] == y[:, None], t, 0.0), 1)
                tl.store(out_target + row, picked, mask=inside & mine)
                if RANK:  # `reference` comes from another product: the label may not outrank itself
                    ranks -= (mine & (picked > above)).to(tl.int32)
            e = tl.exp2(t)
            total += tl.sum(e, 1)
            if ENTROPY:
                weighted += tl.sum(e * t, 1)
            if RANK:
                ranks += tl.sum((t > above[:, None]).to(tl.int32), 1)
            if MODE == "store":
                if SOFTCAP:
                    e *= slope
                keep = inside[:, None] & (col < stride_e)[None, :]
                tl.store(e_out + offset[:, None] * stride_e + col[None, :], e.to(e_out.dtype.element_ty), mask=keep)
    at = offset * SPLITS + split
    tl.store(out_sum + at, total, mask=inside)
    if ENTROPY:
        tl.store(out_entropy + at, weighted, mask=inside)
    if RANK:
        tl.store(out_rank + at, ranks, mask=inside)


@triton.jit
def pivot_kernel(
    x, w, bias, label, inverse, pivot, reference, count, begin, rows, V, D,
    stride_xn, stride_xd, stride_wv, stride_wd, softcap,
    SAMPLES: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """pivot [rows] = max(label's exponent, those of SAMPLES columns spread over V); reference [rows] = the label's
    less the pivot. Labels' logits are the diagonal of a product, so that tensor cores do them."""
    row0 = tl.program_id(0) * BM
    if row0 + begin >= tl.load(count):
        return
    row = row0 + tl.arange(0, BM)
    inside = row < rows
    y = tl.load(label + row, mask=inside, other=0)
    scale = tl.load(inverse + row, mask=inside, other=0.0) * LOG2E
    ks = tl.arange(0, BK)
    a0 = x + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * stride_xn + ks[None, :] * stride_xd
    top = tl.zeros((BM,), dtype=tl.float32) + NEVER
    own = tl.zeros((BM,), dtype=tl.float32)
    for part in tl.static_range(SAMPLES // BM + 1):
        if part == 0:  # noqa: SIM108 (a compile-time branch)
            col = y
        else:
            col = ((part - 1) * BM + tl.arange(0, BM)).to(tl.int64) * V // SAMPLES
        a_ptr = a0
        b_ptr = w + col.to(tl.int64)[:, None] * stride_wv + ks[None, :] * stride_wd
        acc = tl.zeros((BM, BM), dtype=tl.float32)
        for k in range(0, D, BK):
            if EVEN:
                a = tl.load(a_ptr)
                b = tl.load(b_ptr)
            else:
                a = tl.load(a_ptr, mask=ks[None, :] < D - k, other=0.0)
                b = tl.load(b_ptr, mask=ks[None, :] < D - k, other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
            a_ptr += BK * stride_xd  # k * stride may pass 2^31 in a column-major head
            b_ptr += BK * stride_wd
        if BIAS:
            acc += tl.load(bias + col).to(tl.float32)[None, :]
        if SOFTCAP:
            acc = squash(acc, softcap)
        acc = acc * scale[:, None]
        if part == 0:  # noqa: SIM108 (a compile-time branch)
            diagonal = tl.arange(0, BM)[:, None] == tl.arange(0, BM)[None, :]
            own = tl.sum(tl.where(diagonal, acc, 0.0), 1)
            top = own
        else:
            top = tl.maximum(top, tl.max(acc, 1))
    tl.store(pivot + row, top, mask=inside)
    tl.store(reference + row, own - top, mask=inside)


def tma_ready(tensor: Tensor) -> bool:
    """TMA takes unit-stride rows that start at multiples of 16 bytes."""
    row_bytes = tensor.stride(0) * tensor.element_size()
    return tensor.stride(1) == 1 and row_bytes % 16 == 0 and tensor.data_ptr() % 16 == 0 and row_bytes > 0


def has_tma(arch: str, dtype: torch.dtype) -> bool:
    return not arch.startswith("gfx") and int(arch.removeprefix("sm_")) >= 90 and dtype != torch.float32


def descriptor(tensor: Tensor, rows: int, depth: int) -> object:
    """TMA's view of a matrix, in boxes of [rows, depth]."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, depth])


def interpreting() -> bool:
    return triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Head:
    """What of a call does not change over its chunks. `arch`: "sm_90", "gfx942"; the interpreter stands for sm_90."""

    weight: Tensor
    bias: Tensor | None
    softcap: float
    arch: str
    entropy: bool
    rank: bool

    def switches(self) -> dict[str, object]:
        fp32 = self.weight.dtype == torch.float32
        precision = "ieee" if not fp32 or interpreting() or self.arch.startswith("gfx") else "tf32x3"
        return {
            "BIAS": self.bias is not None, "SOFTCAP": self.softcap > 0, "WIDEN": interpreting(),
            "PRECISION": precision,
        }  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """One chunk: hidden [C, D], label [C] int64 in [0, V), inverse temperature, pivot and reference [C] fp32, poison
    [C] int8; partials [C, splits]; E [C, V] or [1, 0]. `count` [1] int64 valid rows in all, `begin` of them before."""

    hidden: Tensor
    label: Tensor
    inverse: Tensor
    pivot: Tensor
    reference: Tensor
    poison: Tensor
    count: Tensor
    begin: int
    sums: Tensor
    target: Tensor
    entropy: Tensor
    rank: Tensor
    e: Tensor


def find_pivot(head: Head, c: Rows) -> None:
    n, (vocab, width) = len(c.hidden), head.weight.shape
    aligned = tma_ready(c.hidden) and tma_ready(head.weight) and width % 64 == 0
    tile = pivot_tile(head.weight.dtype, head.arch, aligned)
    pivot_kernel[(triton.cdiv(n, tile.bm),)](
        c.hidden, head.weight, head.bias, c.label, c.inverse, c.pivot, c.reference, c.count, c.begin, n, vocab, width,
        *c.hidden.stride(), *head.weight.stride(), head.softcap,
        SAMPLES=SAMPLES, BM=tile.bm, BK=tile.bk, EVEN=width % tile.bk == 0, num_warps=tile.warps,
        num_stages=tile.stages, **head.switches(),
    )  # fmt: skip


def sum_exponentials(head: Head, c: Rows, mode: str, retry: bool) -> None:
    n, (vocab, width) = len(c.hidden), head.weight.shape
    options = head.bias is not None or head.softcap > 0 or head.entropy or head.rank
    tma = has_tma(head.arch, head.weight.dtype)
    aligned = tma_ready(c.hidden) and tma_ready(head.weight) and (tma or width % 64 == 0)
    tma = tma and aligned
    tile = exp_tile(head.weight.dtype, head.arch, mode == "store", options, aligned)
    x = descriptor(c.hidden, tile.bm, tile.bk) if tma else c.hidden
    w = descriptor(head.weight, tile.bn, tile.bk) if tma else head.weight
    plain = mode != "max"
    exp_kernel[(triton.cdiv(n, tile.bm) * splits(vocab),)](
        x, w, head.bias, c.label, c.inverse, c.pivot, c.reference, c.poison, c.count, c.begin,
        c.sums, c.target, c.entropy, c.rank, c.e, n, vocab, width,
        *c.hidden.stride(), *head.weight.stride(), c.e.stride(0), head.softcap,
        SPLITS=splits(vocab), BM=tile.bm, BN=tile.bn, BK=tile.bk, MODE=mode, TMA=tma, EVEN=width % tile.bk == 0,
        ENTROPY=head.entropy and plain, RANK=head.rank and plain, RETRY=retry,
        num_warps=tile.warps, num_stages=tile.stages, **head.switches(),
    )  # fmt: skip

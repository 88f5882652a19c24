# mypy: allow-incomplete-defs, allow-untyped-defs
"""AdamW with moments of three bytes a weight (Triton): dasd_kernels.adamw, which says what they are.

One sweep: an fp32 weight, its gradient and moments are read, and all but the gradient written, 18 bytes a weight (fp32
moments: 28), some 70 operations: bound by memory. Only compiled, never timed, here: with triton 3.7.1 it takes 72
registers at most, no stack, and loads 128 bits at a time.
"""

import triton
import triton.language as tl

LEAST = tl.constexpr(2.0**-11)
LEAST_BITS = tl.constexpr((127 - 11) << 23)
BLOCK = 1024


@triton.jit
def bits_of(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def random_bits(place, seed):
    h = (place * 0x9E3779B1) ^ seed
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def ratio_of(code):
    size = tl.abs(code.to(tl.int32)).to(tl.uint32)
    ratio = ((size << 20) + LEAST_BITS).to(tl.float32, bitcast=True) - LEAST
    return tl.where(code < 0, -ratio, ratio)


@triton.jit
def code_of(ratio, random20):
    size = tl.minimum((bits_of(tl.abs(ratio) + LEAST) - LEAST_BITS + random20) >> 20, 127).to(tl.int32)
    return tl.where(ratio < 0, -size, size).to(tl.int8)


@triton.jit(do_not_specialize=["place", "seed"])
def adamw_kernel(
    weights, first, second, grads, elements, place, seed, scale, first_decay, second_decay, rate, root, eps, decay,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    g = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32) * scale
    w = tl.load(weights + at, mask=inside, other=0.0)
    was = tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
    m = ratio_of(tl.load(first + at, mask=inside, other=0)) * tl.sqrt_rn(was)
    m += (g - m) * (1 - first_decay)
    v = was * second_decay + g * g * (1 - second_decay)
    random = random_bits((at + place).to(tl.uint32), seed.to(tl.uint32))
    tl.store(weights + at, w * decay - rate * m / (tl.sqrt_rn(v) * root + eps), mask=inside)
    kept = (bits_of(v) + (random & 0xFFFF)) & 0xFFFF0000
    divisor = tl.sqrt_rn(kept.to(tl.float32, bitcast=True))
    ratio = tl.where(divisor > 0, m / tl.where(divisor > 0, divisor, 1.0), 0.0)
    tl.store(second + at, (kept >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    tl.store(first + at, code_of(ratio, random >> 12), mask=inside)


def launch(weight, first, second, grad, options, place, seed) -> None:
    """A step in place; `options` as the C++ kernel takes them."""
    elements = weight.numel()
    grid = (triton.cdiv(elements, BLOCK),)
    adamw_kernel[grid](weight, first, second, grad, elements, place, seed, *options, BLOCK=BLOCK)

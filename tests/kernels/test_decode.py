"""The CPU kernels between a decoder's products: torch's results, whatever the width of the registers or the batch."""

import pytest
import torch
import torch.nn.functional as F

from dasd_kernels import _C, decode

NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(not _C.decode_supports(name), reason=f"this CPU has no {name}"))
    for name in ("portable", "avx2", "avx512")
]
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}  # relative: some roundings of fp32, one of bf16

pytestmark = [pytest.mark.parametrize("name", NAMES), pytest.mark.parametrize("dtype", DTYPES, ids=str)]


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(got: torch.Tensor, exact: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), exact.double(), rtol=TOLERANCE[got.dtype], atol=TOLERANCE[got.dtype] / 2)


@pytest.mark.parametrize("width", [1, 16, 48, 75])
def test_add_rms_norm(name, dtype, width):
    x, delta, weight = (randn(5, width, dtype=dtype, seed=i) for i in range(3))
    weight, added = weight[0].clone(), x + delta
    expected = F.rms_norm(added.double(), (width,), weight.double(), 1e-5)
    check(decode.add_rms_norm(x, delta, weight, 1e-5, name), expected)
    assert torch.equal(x, added)  # the residual is rounded as torch rounds it
    check(decode.add_rms_norm(x, None, weight, 1e-5, name), expected)
    assert torch.equal(x, added)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("size", [6, 32, 64, 80])
def test_rotate(name, dtype, size, normed):
    """Heads that stand between others in one product: these alone are rotated."""
    product = randn(4, 5 * size, dtype=dtype)
    before = product.clone()
    x = product[:, size : 4 * size].unflatten(1, (3, size))
    angle, norm = randn(4, size // 2, dtype=torch.float32, seed=1), randn(size, dtype=dtype, seed=2)
    expected = x.double()
    if normed:
        expected = F.rms_norm(expected, (size,), norm.double(), 1e-5).to(dtype).double()
    a, b = expected.chunk(2, dim=-1)
    cos, sin = angle.double().cos()[:, None], angle.double().sin()[:, None]
    decode.rotate_(x, angle.cos(), angle.sin(), norm if normed else None, 1e-5, name)
    exact = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    # Where the norm stood on the edge of a rounding, bf16 comes out a unit off in one of two terms.
    slack = 4 if normed and dtype == torch.bfloat16 else 1
    torch.testing.assert_close(x.double(), exact, rtol=slack * TOLERANCE[dtype], atol=slack * TOLERANCE[dtype])
    for other in (slice(size), slice(4 * size, None)):
        assert torch.equal(product[:, other], before[:, other])


@pytest.mark.parametrize("width", [1, 40, 1536])
def test_swiglu(name, dtype, width):
    gate_up = randn(3, 2 * width, dtype=dtype) * 4
    gate, up = gate_up.double().chunk(2, dim=-1)
    check(decode.swiglu(gate_up, name), F.silu(gate).to(dtype).double() * up)


@pytest.mark.parametrize("heads,groups,size", [(3, 3, 8), (9, 3, 64), (10, 2, 40), (7, 1, 128)])
def test_attention_over_the_cache(name, dtype, heads, groups, size):
    """Rows of 1 to 70 tokens, written in pieces, as softmax(q k / sqrt(K)) v over what each row holds; what no row has
    written is NaN and must not matter. The first rows alone give the same bits."""
    lengths, room = [1, 15, 16, 17, 40, 70], 80
    keys, values = (torch.full((len(lengths), groups, room, size), float("nan"), dtype=dtype) for _ in range(2))
    k, v = (randn(sum(lengths), groups, size, dtype=dtype, seed=i) for i in (1, 2))
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    slots = torch.cat([torch.arange(length) for length in lengths])
    for source in torch.arange(len(rows)).split(50):
        decode.append_(k, v, source, rows[source], slots[source], keys, values, name)
    q = randn(len(lengths), heads, size, dtype=dtype) * 3
    last = torch.tensor(lengths) - 1
    got = decode.attend(q, last, keys, values, size**-0.5, name)
    for row in range(len(lengths)):
        mine = rows == row
        shared = (x[mine].double().transpose(0, 1).repeat_interleave(heads // groups, 0) for x in (k, v))
        expected = F.scaled_dot_product_attention(q[row].double()[:, None], *shared)[:, 0]
        torch.testing.assert_close(got[row].double(), expected, rtol=TOLERANCE[dtype], atol=4e-6)
    assert torch.equal(decode.attend(q[:2], last[:2], keys, values, size**-0.5, name), got[:2])


def test_nan_stays_nan(name, dtype):
    x = torch.ones(2, 32, dtype=dtype)
    x[0, 3] = torch.nan
    out = decode.add_rms_norm(x, None, torch.ones(32, dtype=dtype), 1e-5, name)
    assert out[0].isnan().all() and not out[1].isnan().any()
    assert decode.swiglu(x, name)[0, 3].isnan()

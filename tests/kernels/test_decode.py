"""The CPU kernels between a decoder's products: torch's results, whatever the width of the registers or the batch, and
attention to the bits that it has in a pack."""

import pytest
import torch
import torch.nn.functional as F

from dasd_kernels import _C, decode
from dasd_kernels.attention import document_attention

NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(not _C.decode_supports(name), reason=f"this CPU has no {name}"))
    for name in ("portable", "avx2", "avx512", "avx512_bf16")
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


def check_attention(got: torch.Tensor, exact: torch.Tensor) -> None:
    """In bf16 probabilities may be rounded too: each by 2^-9, of an average whose values are under 4."""
    slack = 4e-6 if got.dtype == torch.float32 else 4 * 2**-9
    torch.testing.assert_close(got.double(), exact, rtol=TOLERANCE[got.dtype], atol=slack)


HEADS = [(3, 3, 8), (9, 3, 64), (10, 2, 40), (7, 1, 128)]


@pytest.mark.parametrize("heads,groups,size", HEADS)
def test_attention_over_the_cache(name, dtype, heads, groups, size):
    """Rows of 1 to 70 tokens, the older ones written in pieces, as softmax(q k / sqrt(K)) v over what each row holds;
    what no row has written is NaN and must not matter. The first rows alone give the same bits."""
    lengths, room = [1, 15, 16, 17, 40, 70], 128
    keys, values = (torch.full((len(lengths), groups, room, size), float("nan"), dtype=dtype) for _ in range(2))
    k, v = (randn(sum(lengths), groups, size, dtype=dtype, seed=i) for i in (1, 2))
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    slots = torch.cat([torch.arange(length) for length in lengths])
    newest = torch.tensor(lengths).cumsum(0) - 1
    older = torch.ones(len(rows), dtype=torch.bool).index_fill(0, newest, False).nonzero()[:, 0]
    for source in older.split(50):
        decode.append_(k, v, source, rows[source], slots[source], keys, values, name)
    q = randn(len(lengths), heads, size, dtype=dtype) * 3
    last, new = torch.tensor(lengths) - 1, (k[newest], v[newest])
    got = decode.attend_next(q, *new, last, keys, values, size**-0.5, name)
    for row in range(len(lengths)):
        mine = rows == row
        shared = (x[mine].double().transpose(0, 1).repeat_interleave(heads // groups, 0) for x in (k, v))
        expected = F.scaled_dot_product_attention(q[row].double()[:, None], *shared)[:, 0]
        check_attention(got[row], expected)
    few = (x[:2] for x in (q, *new, last))
    assert torch.equal(decode.attend_next(*few, keys, values, size**-0.5, name), got[:2])


@pytest.mark.parametrize("heads,groups,size", HEADS)
def test_attention_is_the_same_bits_in_a_pack_and_over_a_cache(name, dtype, heads, groups, size):
    """Documents of 1 to 700 tokens, beyond one strip of keys: their last tokens one after another over a cache that the
    others filled, and all of them at once."""
    lengths, alone = [700, 65, 64, 3, 130], 3
    tokens, room = sum(lengths), 704
    q, k, v = (randn(tokens, n, size, dtype=dtype, seed=i) for i, n in enumerate((3 * heads, groups, groups)))
    q = q[:, heads : 2 * heads]  # heads between others
    if name == "avx512_bf16" and dtype == torch.bfloat16 and size % 64 == 0:
        pack = document_attention(q, k, v, tuple(lengths))
    else:
        pack = decode.attend_pack(q, k, v, lengths, size**-0.5, name)
    exact = torch.cat([
        F.scaled_dot_product_attention(*(x.double().transpose(0, 1) for x in part), is_causal=True, enable_gqa=True)
        for part in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    ], dim=1).transpose(0, 1)  # fmt: skip
    check_attention(pack, exact)
    keys, values = (torch.full((len(lengths), groups, room, size), float("nan"), dtype=dtype) for _ in range(2))
    first = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths) - alone)
    slots = torch.cat([torch.arange(length - alone) for length in lengths])
    decode.append_(k, v, first[rows] + slots, rows, slots, keys, values, name)
    for ahead in range(alone):
        last = torch.tensor(lengths) - alone + ahead
        now = first + last
        got = decode.attend_next(q[now], k[now], v[now], last, keys, values, size**-0.5, name)
        assert torch.equal(got, pack[now])


def test_nan_stays_nan(name, dtype):
    x = torch.ones(2, 32, dtype=dtype)
    x[0, 3] = torch.nan
    out = decode.add_rms_norm(x, None, torch.ones(32, dtype=dtype), 1e-5, name)
    assert out[0].isnan().all() and not out[1].isnan().any()
    assert decode.swiglu(x, name)[0, 3].isnan()

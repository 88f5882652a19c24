"""A row that is decoded with a few others has the bits that it has in a pack: products, and what lies between them."""

import pytest
import torch
import torch.nn.functional as F

from dasd_kernels import decode, pointwise


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_between_the_products(dtype):
    x, delta, weight = (randn(40, 600, dtype=dtype, seed=i) * 3 for i in range(3))
    expected = pointwise.rms_norm(x + delta, weight[0], 1e-5)
    assert torch.equal(decode.add_rms_norm(x.clone(), delta, weight[0].clone(), 1e-5), expected)
    assert torch.equal(decode.swiglu(torch.cat([x, delta], dim=1)), pointwise.swiglu(x, delta))
    heads, angle = randn(40, 3, 64, dtype=dtype), randn(40, 1, 32, dtype=torch.float32, seed=1)
    norm = randn(64, dtype=dtype, seed=2)
    expected = pointwise.rotate(pointwise.rms_norm(heads, norm, 1e-5), angle.cos(), angle.sin())
    decode.rotate_(heads, angle.cos(), angle.sin(), norm, 1e-5)
    assert torch.equal(heads, expected)


OURS = decode.can_multiply(torch.zeros(1, 2, dtype=torch.bfloat16))


@pytest.mark.skipif(not OURS, reason="without AVX512-BF16, and with AMX, products are torch's own")
@pytest.mark.parametrize("depth,width", [(64, 128), (576, 960), (1024, 49), (1026, 100), (1536, 48), (2560, 256)])
def test_products(depth, width):
    """Of 1 to 130 rows, with a bias and as SwiGLU of two: F.linear's over many rows."""
    weight, bias, x = (randn(*shape, dtype=torch.bfloat16, seed=i) for i, shape in enumerate([
        (width, depth), (width,), (130, depth)
    ]))  # fmt: skip
    both, biases = torch.cat([weight, weight.flip(0)]), torch.cat([bias, -bias])
    plain, biased, gated = decode.pack(weight), decode.pack(weight, bias), decode.pack(both, biases, gated=True)
    expected = F.linear(x, weight, bias), pointwise.swiglu(*F.linear(x, both, biases).chunk(2, dim=1))
    logits = decode.linear(x, plain, torch.float32)
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().T, rtol=2e-6, atol=2e-6 * depth**0.5)
    for rows in (1, 3, 8, 17, 130):
        assert torch.equal(decode.linear(x[:rows], biased), expected[0][:rows])
        assert torch.equal(decode.linear(x[:rows], gated), expected[1][:rows])
        assert torch.equal(decode.linear(x[:rows], plain, torch.float32), logits[:rows])

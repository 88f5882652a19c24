"""RMS norm, rotation and SwiGLU: as exact as torch's own, forward and backward, and the same on any threads."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dasd_kernels import pointwise

DTYPES = [torch.float32, torch.bfloat16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_gradients(function, *tensors: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    out.backward(normal(*out.shape, seed=9).to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves)]


def check(ours, theirs, *tensors: Tensor) -> None:
    """Errors against float64 at most 1.5 x those of torch in the same dtype, or one rounding of the largest value."""
    exact = with_gradients(theirs, *(x.double() for x in tensors))
    for mine, other, right in zip(with_gradients(ours, *tensors), with_gradients(theirs, *tensors), exact, strict=True):
        assert mine.dtype == tensors[0].dtype and mine.shape == right.shape
        rounding = torch.finfo(mine.dtype).eps * right.abs().max()
        assert (mine.double() - right).abs().max() <= max(1.5 * (other.double() - right).abs().max(), rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 576), (3, 4, 64), (130, 17), (1, 3)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = normal(*shape).to(dtype), (1 + normal(shape[-1], seed=1)).to(dtype)
    check(lambda x, w: pointwise.rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    gate = torch.cat((20 * normal(33, 70), torch.tensor([[-100.0, 100.0, 0.0, -87.5, 88.0] * 14]))).to(dtype)
    check(pointwise.swiglu, lambda g, u: F.silu(g) * u, gate, normal(34, 70, seed=1).to(dtype))


def test_swiglu_keeps_its_inputs_alone() -> None:
    """Where torch's operations compute it (here in float64), as where the compiled kernel does."""
    gate, up = normal(5, 8).double(), normal(5, 8, seed=1).double()
    ours, theirs = (with_gradients(f, gate, up) for f in (pointwise.swiglu, lambda g, u: F.silu(g) * u))
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pointwise.swiglu(gate.requires_grad_(), up.requires_grad_())
    assert {t.data_ptr() for t in saved} == {gate.data_ptr(), up.data_ptr()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate(dtype: torch.dtype) -> None:
    angle = 10 * normal(21, 1, 24, seed=1)
    cos, sin = angle.cos(), angle.sin()

    def plain(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    check(lambda x: pointwise.rotate(x, cos, sin), plain, normal(21, 3, 48).to(dtype))
    whole = normal(21, 5, 48).to(dtype)  # heads of a wider projection
    assert torch.equal(pointwise.rotate(whole[:, 1:4], cos, sin), pointwise.rotate(whole[:, 1:4].clone(), cos, sin))


def test_threads_leave_no_trace() -> None:
    x, weight, up = normal(300, 256).bfloat16(), normal(256, seed=1).bfloat16(), normal(300, 256, seed=2).bfloat16()
    angle = normal(300, 1, 32, seed=3)

    def everything() -> list[Tensor]:
        return [
            *with_gradients(lambda x, w: pointwise.rms_norm(x, w, 1e-5), x, weight),
            *with_gradients(pointwise.swiglu, x, up),
            *with_gradients(lambda x: pointwise.rotate(x.view(300, 4, 64), angle.cos(), angle.sin()), x),
            torch.tensor(pointwise.sum_of_squares(x.float())),
        ]

    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(everything())
    torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_of_squares_does_not_round_in_fp32(dtype: torch.dtype) -> None:
    x = normal(100_003).to(dtype)
    x[0] = 1e4
    assert pointwise.sum_of_squares(x) == pytest.approx(x.double().square().sum().item(), rel=1e-13)
    assert pointwise.sum_of_squares(x[:0]) == 0.0


def test_a_nan_stays_one() -> None:
    x = torch.full((2, 4), torch.nan, dtype=torch.bfloat16)
    assert pointwise.swiglu(x, x).isnan().all() and pointwise.rms_norm(x, x[0], 1e-5).isnan().all()


def test_the_operators_are_what_their_fakes_say() -> None:
    x, weight = normal(6, 4, 8).requires_grad_(), normal(8, seed=1).requires_grad_()
    ops = torch.ops.dasd_kernels
    torch.library.opcheck(ops.rms_norm.default, (x, weight, 1e-5))
    torch.library.opcheck(ops.swiglu.default, (x, x.detach().clone().requires_grad_()))
    torch.library.opcheck(ops.rotate.default, (x, normal(6, 1, 4), normal(6, 1, 4, seed=1), 1.0))

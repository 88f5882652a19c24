"""AdamW of our own: on whole and on halved weights it is AdamW, and moments of three bytes are right on average."""

import math

import pytest
import torch
from torch import Tensor

from dasd_kernels import masters
from dasd_kernels.adamw import adamw, moments

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
LEAST = 2.0**-11


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ratios(codes: Tensor) -> Tensor:
    """What the codes, int8, stand for, fp32."""
    size = codes.to(torch.int32).abs()
    return codes.sign() * (((size << 20) + torch.tensor(LEAST).view(torch.int32)).view(torch.float32) - LEAST)


def halved(weight: Tensor) -> dict[str, Tensor]:
    high, low = masters.split(weight)
    return {"weight": high, "low": low}


def whole(tensors: dict[str, Tensor]) -> Tensor:
    return masters.join(tensors["weight"], tensors["low"]) if "low" in tensors else tensors["weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("halves", [True, False])
def test_a_step_is_adamw(halves: bool, dtype: torch.dtype) -> None:
    """Ten steps beside torch's in float64: as near as torch's in fp32, within a half."""
    start = normal(70_001)
    weight = halved(start) if halves else {"weight": start.clone()}
    states = moments(start, compact=False)
    others = {d: torch.nn.Parameter(start.to(d)) for d in (torch.float32, torch.float64)}
    optimizers = {d: torch.optim.AdamW([p], fused=True, **OPTIONS) for d, p in others.items()}
    for step in range(1, 11):
        grad = normal(70_001, seed=step).to(dtype)
        adamw(weight["weight"], *states, grad, low=weight.get("low"), step=step, scale=0.5, **OPTIONS)
        for d, p in others.items():
            p.grad = grad.to(d) * 0.5
            optimizers[d].step()
    exact = others[torch.float64].detach()
    assert (whole(weight) - exact).abs().max() <= 1.5 * (others[torch.float32].detach() - exact).abs().max()
    if halves:
        assert torch.equal(weight["weight"], masters.split(whole(weight))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("halves", [True, False])
def test_a_compact_step_is_adamw_on_what_was_kept(halves: bool, dtype: torch.dtype) -> None:
    """The weight's step is exact; each moment is kept as one of its two neighbours; three bytes a weight."""
    start, size = normal(70_001), 70_001
    weight = halved(start) if halves else {"weight": start.clone()}
    first, second = moments(start, compact=True)
    assert first.element_size() + second.element_size() == 3
    (beta1, beta2), lr = OPTIONS["betas"], OPTIONS["lr"]
    for step in range(1, 6):
        before, v = whole(weight).double(), second.double()
        m = ratios(first).double() * v.sqrt()
        grad = (normal(size, seed=step) * 10.0 ** (2 * normal(size, seed=9))).to(dtype)
        g = grad.double() * 0.5
        adamw(weight["weight"], first, second, grad, low=weight.get("low"), step=step, scale=0.5, **OPTIONS)
        m, v = m * beta1 + g * (1 - beta1), v * beta2 + g * g * (1 - beta2)
        update = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + OPTIONS["eps"])
        expected = before * (1 - lr * OPTIONS["weight_decay"]) - lr * update
        torch.testing.assert_close(whole(weight).double(), expected, rtol=1e-6, atol=1e-6)
        assert ((second.double() - v).abs() <= v * 1.001 * 2.0**-7).all()
        ratio = m / second.double().sqrt()
        assert (ratio.abs() < 30).all()
        step_of_format = torch.maximum(2.0 ** torch.floor(torch.log2(ratio.abs() + LEAST)), torch.tensor(LEAST)) / 8
        assert ((ratios(first) - ratio).abs() <= 1.01 * step_of_format).all()


def test_rounding_is_fair() -> None:
    """Many weights of one gradient: what is kept is right on average, to five of its standard errors."""
    size, beta1, beta2 = 1 << 18, *OPTIONS["betas"]
    for value in (1e-5, 0.013, 0.7, 3.3):
        weight, grad = normal(size), torch.full((size,), value)
        first, second = moments(weight, compact=True)
        m, v = 0.0, 0.0
        for step in (1, 2, 3):
            adamw(weight, first, second, grad, step=step, **OPTIONS)
            grad = -0.7 * grad
        g = torch.tensor([value, -0.7 * value, 0.49 * value], dtype=torch.float64)
        for x in g.tolist():
            m, v = beta1 * m + (1 - beta1) * x, beta2 * v + (1 - beta2) * x * x
        kept = ratios(first).double() * second.double().sqrt()
        for name, of, exact in (("first", kept, m), ("second", second.double(), v)):
            assert abs(of.mean() - exact) <= 5 * of.std() / size**0.5 + 1e-6 * abs(exact), name


def test_moments_decay_where_gradients_end() -> None:
    """To nearest, bf16 would stop at a second moment that loses 0.1 % a step."""
    weight, options = normal(1 << 14), OPTIONS | {"betas": (0.9, 0.999)}
    first, second = moments(weight, compact=True)
    adamw(weight, first, second, torch.ones_like(weight), step=1, **options)
    for step in range(2, 502):
        adamw(weight, first, second, torch.zeros_like(weight), step=step, **options)
    assert second.double().mean() == pytest.approx(1e-3 * 0.999**500, rel=0.01)
    assert (first == 0).all()


@pytest.mark.parametrize("betas, most", [((0.9, 0.95), 0.03), ((0.9, 0.999), 0.03)])
def test_a_long_way_is_that_of_fp32_moments(betas: tuple[float, float], most: float) -> None:
    """500 steps of noise around a direction, of every size: how far apart the two end, over how far they went."""
    size, options = 20_000, OPTIONS | {"betas": betas, "weight_decay": 0.0, "lr": 1e-3}
    direction, sizes = 0.3 * normal(size), torch.exp(3 * normal(size, seed=1))
    ends = {}
    for compact in (False, True):
        weight = torch.zeros(size)
        states = moments(weight, compact=compact)
        for step in range(1, 501):
            adamw(weight, *states, sizes * (direction + normal(size, seed=step)), step=step, **options)
        ends[compact] = weight
    assert (ends[True] - ends[False]).norm() <= most * ends[False].norm()


def test_nothing_comes_of_nothing() -> None:
    """No gradient yet, or one whose square is nothing in fp32."""
    weight = torch.ones(1000)
    first, second = moments(weight, compact=True)
    for value in (0.0, 1e-30):
        adamw(weight, first, second, torch.full((1000,), value), step=1, **OPTIONS | {"weight_decay": 0.0})
        assert not first.any() and not second.any() and torch.equal(weight, torch.ones(1000))


@pytest.mark.parametrize("compact", [False, True])
def test_threads_and_cuts_leave_no_trace(compact: bool) -> None:
    """One thread and three, and the tensor in two pieces, as ranks hold it."""
    before, results = torch.get_num_threads(), []
    grad, start = normal(50_000, seed=1).bfloat16(), normal(50_000)
    for threads, cut in ((1, 50_000), (3, 50_000), (3, 17_003)):
        torch.set_num_threads(threads)
        high, low = masters.split(start)
        tensors = (high, *moments(start, compact=compact), low)
        for step in (1, 2):
            for part in (slice(0, cut), slice(cut, 50_000)):
                weight, first, second, rest = (t[part] for t in tensors)
                adamw(weight, first, second, grad[part], low=rest, place=part.start, step=step, **OPTIONS)
        results.append(tensors)
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_bound_of_the_ratio() -> None:
    """|m| / sqrt(v) stays below the format's largest: the worst gradients are those that grow by beta2 / beta1."""
    for beta1, beta2 in ((0.9, 0.95), (0.9, 0.999), (0.95, 0.999), (0.9, 0.9999)):
        bound = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
        m, v, g = 0.0, 0.0, 1.0
        for _ in range(400):
            g *= beta2 / beta1
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        assert m / math.sqrt(v) == pytest.approx(bound, rel=0.02)
        assert bound < float(ratios(torch.tensor([127], dtype=torch.int8)))


def test_what_kernels_would_misread_is_refused() -> None:
    weight = torch.zeros(4, 6)
    first, second = moments(weight, compact=True)
    good = {"weight": weight, "first": first, "second": second, "grad": torch.zeros(4, 6)}
    for wrong, told in (
        ({"grad": torch.zeros(6, 4)}, r"grad \(6, 4\)"),
        ({"grad": torch.zeros(6, 4).T}, r"grad .*contiguous"),
        ({"grad": torch.zeros(4, 6).half()}, "grad torch.float16"),
        ({"first": torch.zeros(4, 6)}, "moments torch.float32 and torch.bfloat16"),
        ({"weight": weight.bfloat16()}, "weight torch.bfloat16"),
        ({"low": torch.zeros(4, 6, dtype=torch.int16)}, "weight torch.float32"),
    ):
        with pytest.raises(ValueError, match=told):
            adamw(**good | wrong, step=1, **OPTIONS)

"""fp32 masters in two halves: nothing is lost, and AdamW on them is AdamW."""

import pytest
import torch
from torch import Tensor

from dasd_kernels import masters

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_halves_are_the_whole() -> None:
    """Every lower half, under exponents from the smallest to the largest, both signs."""
    low = torch.arange(1 << 16, dtype=torch.int32)
    for high in (0x0000, 0x0001, 0x3F80, 0x3F81, 0x7F7E, -0x8000, -0x4080, -0x0082):
        x = ((torch.tensor(high, dtype=torch.int32) << 16) | low).view(torch.float32)
        near, rest = masters.split(x)
        assert near.dtype == torch.bfloat16 and rest.dtype == torch.int16
        assert torch.equal(masters.join(near, rest).view(torch.int32), x.view(torch.int32))
        ties = low == 0x8000
        assert torch.equal(near[~ties], x[~ties].bfloat16())
        assert (near[ties].double().abs() > x[ties].double().abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_adamw(dtype: torch.dtype) -> None:
    """Ten steps beside torch's in float64: as near as torch's in fp32, within a half."""
    weight, states = normal(70_001), [torch.zeros(70_001) for _ in range(2)]
    high, low = masters.split(weight)
    others = {d: torch.nn.Parameter(weight.to(d)) for d in (torch.float32, torch.float64)}
    optimizers = {d: torch.optim.AdamW([p], fused=True, **OPTIONS) for d, p in others.items()}
    for step in range(1, 11):
        grad = normal(70_001, seed=step).to(dtype)
        masters.adamw(high, low, *states, grad, step=step, scale=0.5, **OPTIONS)
        for d, p in others.items():
            p.grad = grad.to(d) * 0.5
            optimizers[d].step()
    exact = others[torch.float64].detach()
    error = (masters.join(high, low) - exact).abs()
    assert error.max() <= 1.5 * (others[torch.float32].detach() - exact).abs().max()
    assert torch.equal(high, masters.split(masters.join(high, low))[0])


def test_threads_leave_no_trace() -> None:
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        high, low = masters.split(normal(50_000))
        states = [torch.zeros(50_000) for _ in range(2)]
        masters.adamw(high, low, *states, normal(50_000, seed=1).bfloat16(), step=1, **OPTIONS)
        results.append((high, low, *states))
    torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)

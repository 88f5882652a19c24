"""AdamW with compact moments, the Triton kernel beside the C++ one that test_adamw.py tests; run as triton_cases.py."""

import pytest
import torch
from triton_setup import DEVICE, Guarded

from dasd_kernels import triton_adamw
from dasd_kernels.adamw import adamw, constants, moments

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("size", [0, 1, 1023, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_kernels_do_the_same(size, dtype):
    """From the same state: weights within a rounding, and the same moments but where that tips their rounding."""
    guard, random = Guarded(), torch.Generator().manual_seed(0)
    weight = torch.randn(size, generator=random)
    states = moments(weight, compact=True)
    for step in (1, 2, 50):
        grad = (torch.randn(size, generator=random) * torch.exp(3 * torch.randn(size, generator=random))).to(dtype)
        theirs = [guard(t.to(DEVICE)) for t in (weight, *states)]
        options, seed = constants(step, **OPTIONS, scale=0.5)
        triton_adamw.launch(*theirs, guard(grad.to(DEVICE)), options, 77, seed)
        adamw(weight, *states, grad, place=77, step=step, scale=0.5, **OPTIONS)
        guard.check()
        torch.testing.assert_close(theirs[0].cpu(), weight, rtol=1e-6, atol=1e-6)
        for a, b in zip(theirs[1:], states, strict=True):
            assert (a.cpu() != b).sum() <= 1 + size // 1000

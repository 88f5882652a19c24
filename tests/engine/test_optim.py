"""The learning rate's shape and which parameters decay."""

import pytest
import torch

from dasd_engine.config import TrainOptions
from dasd_engine.optim import learning_rate, make_optimizer

OPTIONS = TrainOptions(lr=5e-5, min_lr=1e-5, warmup=0.1)


def test_rate_warms_up_peaks_and_ends_at_the_minimum():
    rates = [learning_rate(s, 100, OPTIONS) for s in range(100)]
    assert rates[0] == pytest.approx(5e-6)
    assert rates[:10] == pytest.approx([5e-6 * (i + 1) for i in range(10)])
    assert rates[10] == max(rates) == pytest.approx(5e-5)
    assert rates[-1] == min(rates[10:]) == pytest.approx(1e-5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    middle = learning_rate(55, 101, TrainOptions(lr=5e-5, min_lr=1e-5, warmup=0.1))
    assert middle == pytest.approx(3e-5, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_short_runs_have_a_positive_rate_within_bounds(steps, warmup):
    options = TrainOptions(lr=1e-3, min_lr=1e-4, warmup=warmup)
    for step in range(steps):
        assert 0 < learning_rate(step, steps, options) <= 1e-3


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.RMSNorm(4))
    optimizer = make_optimizer(model, TrainOptions(weight_decay=0.1))
    decayed, kept = optimizer.param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 4)] and decayed["weight_decay"] == 0.1
    assert {p.ndim for p in kept["params"]} == {1} and kept["weight_decay"] == 0.0

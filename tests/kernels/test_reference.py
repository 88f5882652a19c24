"""The reference against torch's own cross-entropy, by differentiation, and by hand."""

import math

import torch
import torch.nn.functional as F

from dasd_kernels import linear_cross_entropy, reference, token_logprobs


def make(n=7, d=5, v=11):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((n, d), (v, d)))
    labels = torch.randint(0, v, (n,), generator=g)
    labels[2] = -100
    return hidden, weight, labels


def test_it_is_torchs_cross_entropy():
    hidden, weight, labels = make()
    for reduction in ("mean", "sum", "none"):
        for smoothing in (0.0, 0.2):
            ours = reference.linear_cross_entropy(
                hidden, weight, labels, reduction=reduction, label_smoothing=smoothing
            )
            theirs = F.cross_entropy(hidden @ weight.t(), labels, reduction=reduction, label_smoothing=smoothing)
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradcheck_with_every_option():
    hidden, weight, labels = make()
    bias = torch.linspace(-1, 1, 11, dtype=torch.float64, requires_grad=True)
    options = {"z_loss": 0.1, "label_smoothing": 0.1, "softcap": 2.0, "token_weight": torch.linspace(0, 2, 7)}
    temperature = torch.linspace(0.5, 2, 7)
    for reduction in ("mean", "none"):

        def f(h, w, b, reduction=reduction):
            return reference.linear_cross_entropy(
                h, w, labels, bias=b, reduction=reduction, temperature=temperature, **options
            )

        assert torch.autograd.gradcheck(f, (hidden, weight, bias))


def test_scores_by_hand():
    hidden, weight = torch.tensor([[math.log(2.0)], [0.0]]), torch.tensor([[1.0], [2.0], [0.0]])
    got = reference.token_logprobs(hidden, weight, torch.tensor([0, -100]), entropy=True, rank=True)
    assert abs(got.logprob[0] - math.log(2 / 7)) < 1e-6 and abs(got.lse[0] - math.log(7)) < 1e-6
    p = [2 / 7, 4 / 7, 1 / 7]
    assert abs(got.entropy[0] + sum(x * math.log(x) for x in p)) < 1e-6
    assert got.rank.tolist() == [1, -1] and got.logprob[1] == got.lse[1] == got.entropy[1] == 0


def test_the_environment_selects_it(monkeypatch):
    """DASD_KERNELS=reference goes through these very functions, in the input's own precision."""
    monkeypatch.setenv("DASD_KERNELS", "reference")
    hidden, weight, labels = make()
    assert torch.equal(
        linear_cross_entropy(hidden, weight, labels), reference.linear_cross_entropy(hidden, weight, labels)
    )
    half = token_logprobs(hidden.bfloat16(), weight.bfloat16(), labels)
    assert half.logprob.dtype == torch.bfloat16 and not half.logprob.requires_grad

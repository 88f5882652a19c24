"""The embedding of a tied head: the gradient that torch's has, without a matrix of its own."""

import torch
import torch.nn.functional as F

from dasd_engine.embedding import Embedding
from dasd_kernels import linear_cross_entropy

V, D = 4096, 64


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A tied weight; tokens, few of them often; labels."""
    r = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 40, (500,), generator=r) ** 2
    return torch.randn(V, D, generator=r).to(dtype) / 8, tokens, torch.randint(0, V, (500,), generator=r)


def gradient(weight: torch.Tensor, tokens: torch.Tensor, labels: torch.Tensor, in_place: bool, steps: int = 1):
    embedding = Embedding(V, D, _weight=weight.clone())
    embedding.in_place = in_place
    for _ in range(steps):
        loss = linear_cross_entropy(torch.tanh(embedding(tokens) * 3), embedding.weight, labels, reduction="sum")
        loss.backward()
    return embedding.weight.grad


def test_fp32_has_the_bits_of_torch() -> None:
    """Of one backward; gradients of several add up in another order."""
    assert torch.equal(*(gradient(*inputs(torch.float32), in_place) for in_place in (False, True)))
    torch.testing.assert_close(*(gradient(*inputs(torch.float32), in_place, 3) for in_place in (False, True)))


def test_bf16_is_nearer_to_float64_than_torch() -> None:
    """The sum of a frequent token's rows is rounded once."""
    weight, tokens, labels = inputs(torch.bfloat16)
    wide = weight.double().requires_grad_()
    F.cross_entropy(torch.tanh(F.embedding(tokens, wide) * 3) @ wide.T, labels, reduction="sum").backward()
    theirs, ours = ((gradient(weight, tokens, labels, i) - wide.grad).norm() for i in (False, True))
    assert ours < theirs


def test_nothing_as_large_as_the_weight_is_made_but_the_gradient() -> None:
    weight, tokens, labels = inputs(torch.float32)
    large = {}
    for in_place in (False, True):
        with torch.profiler.profile(profile_memory=True) as profile:
            gradient(weight, tokens, labels, in_place)
        large[in_place] = sum(e.self_cpu_memory_usage >= weight.nbytes for e in profile.events())
    assert large[True] <= large[False] - 1


def test_without_a_gradient_from_elsewhere_it_makes_one() -> None:
    weight, tokens, _ = inputs(torch.float32)
    embedding = Embedding(V, D, _weight=weight)
    embedding.in_place = True
    embedding(tokens).sum().backward()
    counts = torch.bincount(tokens, minlength=V)
    assert torch.equal(embedding.weight.grad, counts[:, None].expand(V, D).float())


def test_no_gradient_where_none_is_wanted() -> None:
    weight, tokens, _ = inputs(torch.float32)
    embedding = Embedding(V, D, _weight=weight)
    embedding.in_place = True
    with torch.no_grad():
        assert not embedding(tokens).requires_grad
    embedding.weight.requires_grad_(False)
    assert not embedding(tokens).requires_grad
    assert torch.equal(embedding(tokens), weight[tokens])

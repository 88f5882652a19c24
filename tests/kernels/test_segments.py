"""segment_scores against plain sums of the slices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_kernels import reference, segment_scores


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, 500), min_size=1, max_size=30), dtype=st.sampled_from([torch.int32, torch.int64]))
def test_scores_of_any_segments(cuts, dtype):
    logprob = -torch.rand(500, generator=torch.Generator().manual_seed(0)) * 5
    offsets = torch.tensor(sorted(cuts), dtype=dtype)
    got, want = segment_scores(logprob, offsets), reference.segment_scores(logprob.double(), offsets)
    assert torch.equal(got.count, want.count) and got.count.dtype == torch.int64
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-6, atol=0, equal_nan=True)


def test_empty_segments():
    got = segment_scores(torch.tensor([-1.0, -3.0]), torch.tensor([0, 0, 2, 2]))
    assert got.count.tolist() == [0, 2, 0] and got.sum.tolist() == [0.0, -4.0, 0.0]
    assert got.mean[1] == -2 and got.mean.isnan().tolist() == [True, False, True]
    assert got.geometric_mean[1] == torch.tensor(-2.0).exp() and got.geometric_mean[0].isnan()
    assert segment_scores(torch.zeros(0), torch.tensor([0])).count.shape == (0,)


def test_a_segments_bits_do_not_depend_on_the_others():
    logprob = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = segment_scores(logprob, torch.tensor([0, 13, 400, 990]))
    alone = segment_scores(logprob[13:400].clone(), torch.tensor([0, 387]))
    assert all(torch.equal(a[1:2], b) for a, b in zip(whole, alone, strict=True))


def test_long_segments_keep_their_precision():
    logprob = torch.full((1_000_000,), -0.1)
    assert abs(segment_scores(logprob, torch.tensor([0, 1_000_000])).mean.item() / logprob[0].item() - 1) < 1e-7


def test_infinite_and_missing_scores_show():
    got = segment_scores(torch.tensor([-1.0, -float("inf"), float("nan")]), torch.tensor([0, 1, 2, 3]))
    assert got.geometric_mean[1] == 0 and got.mean[2].isnan() and got.mean[0] == -1


@pytest.mark.parametrize(
    ("logprob", "offsets", "message"),
    [
        (torch.zeros(3), torch.tensor([0, 2, 1]), "must rise"),
        (torch.zeros(3), torch.tensor([0, 4]), "<= 3"),
        (torch.zeros(3), torch.tensor([-1, 2]), ">= 0"),
        (torch.zeros(3), torch.tensor([0.0, 2.0]), "int32 or int64"),
        (torch.zeros(3), torch.zeros(0, dtype=torch.int64), r"\[S\+1\]"),
        (torch.zeros(3, 2), torch.tensor([0, 2]), r"logprob is floating point \[N\]"),
        (torch.zeros(3, dtype=torch.int64), torch.tensor([0, 2]), "floating point"),
    ],
)
def test_wrong_arguments(logprob, offsets, message):
    with pytest.raises(ValueError, match=message):
        segment_scores(logprob, offsets)

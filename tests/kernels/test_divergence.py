"""kl_divergence on the CPU (plain torch by chunks) against the float64 definition and torch's own kl_div."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from dasd_kernels import kl_divergence, reference


def models(n, widths, vocabs, dtype=torch.float32, seed=0, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    found = []
    for d, v in zip(widths, vocabs, strict=True):
        found.append(torch.randn(n, d, generator=g).to(dtype))
        found.append((torch.randn(v, d, generator=g) * scale / d**0.5).to(dtype))
    return found


def check(inputs, tolerance=1e-5, **options):
    got = kl_divergence(*inputs, **options)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    want = reference.kl_divergence(*(t.double() for t in inputs), **wide)
    for a, b in zip(got, want, strict=True):
        assert a.shape == inputs[0].shape[:1] and not a.requires_grad and (a >= 0).all()
        assert ((a - b).abs() <= tolerance * b.clamp(min=1)).all(), (a - b).abs().max()
    return got


def test_the_definition_is_torchs():
    th, tw, sh, sw = models(20, (16, 24), (300, 300), torch.float64)
    log_p, log_q = (th @ tw.t()).log_softmax(1), (sh @ sw.t()).log_softmax(1)
    want = reference.kl_divergence(th, tw, sh, sw)
    torch.testing.assert_close(want.forward, F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1))
    torch.testing.assert_close(want.reverse, F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(1))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 40), widths=st.tuples(st.integers(1, 50), st.integers(1, 50)), vocab=st.integers(1, 400),
    surplus=st.integers(0, 20), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    ignored=st.sampled_from([0.0, 0.4, 1.0]), seed=st.integers(0, 99), transposed=st.booleans(),
    workspace=st.sampled_from([1, 20_000, 1 << 26]),
)  # fmt: skip
def test_any_shape(n, widths, vocab, surplus, dtype, ignored, seed, transposed, workspace):
    """Chunks of one row and of all rows alike; the teacher's surplus entries are padding."""
    inputs = models(n, widths, (vocab + surplus, vocab), dtype, seed)
    if transposed:
        inputs = [t.t().contiguous().t() for t in inputs]
    labels = torch.where(torch.rand(n, generator=torch.Generator().manual_seed(seed)) < ignored, -100, 0)
    got = kl_divergence(*inputs, labels=labels, vocab_size=vocab, workspace_bytes=workspace)
    want = check(inputs, labels=labels, vocab_size=vocab)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert not a[labels == -100].any()


@pytest.mark.parametrize("temperature", [0.6, torch.linspace(0.5, 2, 30)])
@pytest.mark.parametrize("caps", [(None, None), (5.0, 30.0)])
def test_options(temperature, caps):
    bias = torch.linspace(-3, 3, 500)
    check(models(30, (16, 40), (500, 500)), temperature=temperature, teacher_softcap=caps[0], student_softcap=caps[1],
          teacher_bias=bias, student_bias=-bias)  # fmt: skip


def test_equal_models_diverge_by_nothing_and_near_ones_keep_their_digits():
    hidden, weight, _, other = models(40, (16, 16), (300, 300))
    assert not any(kl.any() for kl in kl_divergence(hidden, weight, hidden, weight))
    assert 1e-5 < check((hidden, weight, hidden, weight + 0.01 * other), 1e-6).forward.mean() < 1e-3


def test_one_entry_far_above_the_rest():
    bias = torch.zeros(300).index_fill_(0, torch.tensor([299]), 1000.0)
    got = check(models(20, (16, 16), (300, 300)), 1e-5, teacher_bias=bias)
    assert (got.reverse > 500).all() and got.forward.isfinite().all()


def test_what_is_not_finite_stays_in_its_row():
    inputs = models(20, (16, 16), (300, 300))
    inputs[0][4, 3] = float("nan")
    for kl in kl_divergence(*inputs):
        assert kl.isnan().nonzero()[:, 0].tolist() == [4]


def test_memory_stays_within_the_workspace():
    """All that is allocated during the call is counted: three buffers of 32 rows, instead of one of 512."""
    inputs, workspace = models(512, (8, 8), (20_000, 20_000)), 8 << 20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        kl_divergence(*inputs, workspace_bytes=workspace)
    sizes = [event.cpu_memory_usage for event in log.events() if event.cpu_memory_usage > 0]
    assert max(sizes) <= workspace < 512 * 20_000 * 4
    assert kl_divergence(*inputs).forward.shape == (512,)


def test_one_graph_under_compile():
    inputs = models(20, (16, 24), (300, 300), torch.bfloat16)
    inputs[2].requires_grad_()
    compiled = torch.compile(lambda *a: kl_divergence(*a, temperature=0.7), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*inputs), kl_divergence(*inputs, temperature=0.7), strict=True):
        assert torch.equal(a, b) and not a.requires_grad


def test_the_op_keeps_its_contract():
    th, tw, sh, sw = models(5, (4, 6), (30, 30))
    arguments = (th, tw, None, 0.0, sh, sw, None, 0.0, torch.zeros(5, dtype=torch.int64), -100, None, 1.0, 1 << 20)
    torch.library.opcheck(torch.ops.dasd_kernels.kl_divergence.default, arguments)


def test_wrong_arguments_are_named(monkeypatch):
    th, tw, sh, sw = models(6, (8, 4), (60, 50))
    with pytest.raises(ValueError, match="teacher's head has 60 rows, the student's 50: pass vocab_size"):
        kl_divergence(th, tw, sh, sw)
    with pytest.raises(ValueError, match="vocab_size = 51 is not between 1 and 50"):
        kl_divergence(th, tw, sh, sw, vocab_size=51)
    with pytest.raises(ValueError, match="teacher_hidden has 5 tokens, student_hidden 6"):
        kl_divergence(th[:5], tw, sh, sw, vocab_size=50)
    with pytest.raises(ValueError, match=r"student: hidden is \[N, D\] and weight \[V, D\] of one D"):
        kl_divergence(th, tw, th, sw, vocab_size=50)
    with pytest.raises(ValueError, match=r"labels is int64 \[N\]"):
        kl_divergence(th, tw, sh, sw, vocab_size=50, labels=torch.zeros(6))
    with pytest.raises(ValueError, match="temperature must be positive"):
        kl_divergence(th, tw, sh, sw, vocab_size=50, temperature=torch.zeros(6))
    monkeypatch.setenv("DASD_KERNELS", "reference")
    check((th, tw, sh, sw), vocab_size=50)

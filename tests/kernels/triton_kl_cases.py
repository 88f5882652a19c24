"""kl_divergence's Triton kernel against the float64 reference; run like triton_cases.py."""

import pytest
import torch
from triton_setup import DEVICE, Guarded, make, marked

from dasd_kernels import kl_divergence, reference, triton_kl

NAMES = "forward", "reverse"


def pair(n, widths, vocab, dtype=torch.float32, **kw):
    """Teacher and student of two widths, and labels."""
    return *make(n, widths[0], vocab, dtype, seed=1)[:2], *make(n, widths[1], vocab, dtype, seed=2, **kw)


def run(th, tw, sh, sw, labels, *, tb=None, sb=None, caps=(0.0, 0.0), temperature=1.0, workspace=1 << 20):
    inverse = torch.ones(len(labels), device=DEVICE) / temperature
    teacher, student = (th, tw, tb, caps[0]), (sh, sw, sb, caps[1])
    return triton_kl.run(teacher, student, labels, inverse, -100, workspace)


def check(inputs, tolerance=1e-5, **options):
    """Absolute error in nats, times the divergence where that is above 1."""
    got = run(*inputs, **options)
    th, tw, sh, sw, labels = inputs
    caps, wide = options.get("caps", (None, None)), lambda t: t if t is None else t.double()
    want = reference.kl_divergence(
        th.double(), tw.double(), sh.double(), sw.double(), labels=labels, teacher_bias=wide(options.get("tb")),
        student_bias=wide(options.get("sb")), teacher_softcap=caps[0], student_softcap=caps[1],
        temperature=options.get("temperature", 1.0),
    )  # fmt: skip
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.dtype == torch.float32 and a.shape == labels.shape and (a >= 0).all()
        assert ((a - b).abs() <= tolerance * b.clamp(min=1)).all(), f"{name} {(a - b).abs().max()}"
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths, vocab", [((64, 128), 1100), ((24, 40), 127), ((19, 7), 2)])
def test_within_1e5_nats(dtype, widths, vocab):
    """1100 takes two parts of the vocabulary; 64 and 128 whole tiles, the others ends; 19 and 7 no alignment."""
    check(pair(37, widths, vocab, dtype, ignored=0.3))


@pytest.mark.parametrize("n, ignored", [(0, 0.0), (1, 0.0), (129, 0.5), (70, 1.0)])
def test_any_number_of_rows(n, ignored):
    forward, reverse = check(pair(n, (16, 24), 300, torch.float16, ignored=ignored))
    if ignored == 1:
        assert not forward.any() and not reverse.any()


@pytest.mark.parametrize("caps", [(0.0, 0.0), (5.0, 0.0), (0.0, 5.0)])
@pytest.mark.parametrize("each", [False, True])
def test_options_of_the_logits(caps, each):
    temperature = torch.linspace(0.5, 2, 37, device=DEVICE) if each else 0.6
    biases = torch.linspace(-3, 3, 500, device=DEVICE), torch.linspace(1, -1, 500, device=DEVICE)
    inputs = pair(37, (32, 16), 500, ignored=0.3)
    check(inputs, caps=caps, temperature=temperature, tb=biases[0] if each else None, sb=biases[1])


def test_equal_models_diverge_by_nothing():
    hidden, weight, labels = make(40, 16, 300, torch.bfloat16)
    forward, reverse = run(hidden, weight, hidden, weight, labels)
    assert not forward.any() and not reverse.any()


def test_near_models_keep_their_digits():
    """Where divergences are 1e-4, their errors are a hundred times smaller."""
    hidden, weight, labels = make(40, 16, 300)
    near = weight + 0.01 * make(1, 16, 300, seed=5)[1]
    inputs = hidden, weight, hidden, near, labels
    assert 1e-5 < check(inputs, 1e-6)[0].mean() < 1e-3


@pytest.mark.parametrize(
    "who, gap, dtype", [("teacher", 60, torch.float32), ("student", 1000, torch.bfloat16), ("both", 85, torch.bfloat16)]
)
def test_rows_far_above_the_pivot_are_computed_again(who, gap, dtype):
    """As triton_cases' test of this name; a divergence is then up to some thousand nats."""
    th, tw, sh, sw, labels = pair(70, (16, 24), 1100, dtype)
    labels[labels == 999] = 5
    for name, hidden, weight in (("teacher", th, tw), ("student", sh, sw)):
        hidden[:, 0] = 0
        if who in (name, "both"):
            hidden[7, 0] = hidden[66, 0] = 4
            weight[999] = 0
            weight[999, 0] = gap / 4
    check((th, tw, sh, sw, labels), 2e-5)


def test_a_rows_bits_depend_on_its_own_inputs(monkeypatch):
    """Rows in another order, fewer rows, rows of which another is computed again, and other chunks."""
    inputs = pair(150, (64, 16), 1100, torch.bfloat16)
    if DEVICE == "cpu":
        inputs = *((2 * t).round() / (1 if len(t) == 150 else 8) for t in inputs[:4]), inputs[4]
    whole = run(*inputs)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    th, tw, sh, sw, labels = inputs
    moved = run(th[order], tw, sh[order], sw, labels[order])
    some = run(th[5:18], tw, sh[5:18], sw, labels[5:18])
    monkeypatch.setattr(triton_kl, "chunk_rows", lambda *_: 64)
    wild = th.clone()
    wild[20] = 1000 * tw[999]
    chunks = run(wild, tw, sh, sw, labels)
    calm = torch.arange(150, device=DEVICE) != 20
    for a, b, c, d in zip(whole, moved, some, chunks, strict=True):
        assert torch.equal(a[order], b) and torch.equal(a[5:18], c) and torch.equal(a[calm], d[calm])


def test_what_is_not_finite_is_loud_and_stays_in_its_row():
    inputs = pair(20, (16, 16), 300)
    inputs[0][4, 3], inputs[2][6, 1] = float("nan"), float("inf")
    for values in run(*inputs):
        assert values.isnan().nonzero()[:, 0].tolist() == [4, 6]


@pytest.mark.parametrize("dtype, widths, vocab", [(torch.float32, (19, 40), 127), (torch.bfloat16, (64, 24), 1100)])
def test_nothing_outside_the_tensors_is_read_into_results_or_written(dtype, widths, vocab, monkeypatch):
    """As triton_cases' test of this name. The last column makes every row of the teacher's computed twice."""
    inputs = pair(100, widths, vocab, dtype, ignored=0.75)
    bias = torch.linspace(-1, 1, vocab, device=DEVICE)
    bias[-1] = 60
    plain, guard = check(inputs, 2e-5, tb=bias), Guarded()
    real_empty, real_zeros = torch.empty, torch.zeros
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", lambda *a, **k: guard(real_zeros(*a, **k)))
        patch.setattr(torch, "empty", lambda *a, **k: guard(marked(real_empty(*a, **k))))
        got = run(*map(guard, inputs[:4]), inputs[4], tb=guard(bias))
    guard.check()
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_the_public_function_uses_this_kernel_where_it_can(monkeypatch):
    calls = []
    real = triton_kl.run
    monkeypatch.setattr(triton_kl, "run", lambda *a: calls.append(1) or real(*a))
    th, tw, sh, sw, labels = pair(30, (16, 24), 200, torch.float16, ignored=0.3)
    wide = [t.double() for t in (th, tw[:190], sh, sw[:190])]
    want = reference.kl_divergence(*wide, labels=labels)
    for student, used in (((sh, sw), 1), ((sh.float(), sw), 0)):
        calls.clear()
        got = kl_divergence(th, tw, *student, labels=labels, vocab_size=190)
        assert len(calls) == used
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(got, want, strict=True))
    every = kl_divergence(th, tw, sh, sw)
    assert (every.forward > 0).all() and (every.reverse > 0).all()

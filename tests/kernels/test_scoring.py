"""token_logprobs and log_ratio of every backend against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_kernels import linear_cross_entropy, log_ratio, reference, token_logprobs
from dasd_kernels.cpu import describe

BACKENDS = ["chunked", *filter(describe, ("portable", "avx2", "avx512", "avx512_bf16"))]  # what this CPU can run


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv("DASD_KERNELS", request.param)
    return request.param


def make(n, d, v, dtype=torch.float32, *, ignored=0.0, scale=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g).to(dtype)
    weight = (torch.randn(v, d, generator=g) * scale / d**0.5).to(dtype)
    labels = torch.randint(0, v, (n,), generator=g)
    labels[torch.rand(n, generator=g) < ignored] = -100
    return hidden, weight, labels


def check(inputs, tolerance=1e-5, **options):
    """Absolute error in nats against float64 on the same inputs; ranks exact, but for ties within the tolerance."""
    hidden, weight, labels = inputs
    got = token_logprobs(hidden, weight, labels, entropy=True, rank=True, **options)
    options = {k: v.double() if k == "bias" and v is not None else v for k, v in options.items()}
    wide = (hidden.double(), weight.double(), labels)
    want = reference.token_logprobs(*wide, entropy=True, rank=True, **options)
    for name in ("logprob", "lse", "entropy"):
        a, b = getattr(got, name), getattr(want, name)
        assert a.dtype in (torch.float32, torch.float64) and a.shape == labels.shape
        assert (a - b).abs().max() <= tolerance if len(a) else True, f"{name}: {(a - b).abs().max():.1e}"
    z = reference.logits(*wide[:2], options.get("bias"), options.get("softcap"), options.get("temperature", 1.0))
    target = z.gather(1, labels.clamp(0)[:, None])
    low, high = (z > target + tolerance).sum(1), (z > target - tolerance).sum(1)
    valid = labels != options.get("ignore_index", -100)
    assert ((got.rank >= low) & (got.rank <= high) | ~valid).all() and (got.rank[~valid] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [2, 127, 1000, 5003])
def test_scores_are_within_1e5_nats(backend, dtype, vocab):
    """Also in bf16 and fp16: logits are never rounded to the input's precision."""
    check(make(37, 64, vocab, dtype, ignored=0.3))


@pytest.mark.parametrize("vocab", [50257, 128256, 129920, 151936])
def test_vocabularies_of_real_models(backend, vocab):
    check(make(5, 16, vocab, torch.bfloat16, ignored=0.2))


def test_more_logits_than_32_bits_count(monkeypatch):
    """N V = 2^31 + 163,842: the last rows' bits are those that they have alone."""
    monkeypatch.setenv("DASD_KERNELS", BACKENDS[-1])
    hidden, weight, labels = make(32770, 2, 65537, torch.bfloat16)
    whole, few = token_logprobs(hidden, weight, labels), token_logprobs(hidden[-5:], weight, labels[-5:])
    assert torch.equal(whole.logprob[-5:], few.logprob) and bool(whole.logprob.isfinite().all())


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6, torch.linspace(0.5, 2, 37)])
@pytest.mark.parametrize("bias", [None, torch.linspace(-3, 3, 500)])
def test_options(backend, softcap, temperature, bias):
    check(make(37, 64, 500, ignored=0.3), softcap=softcap, temperature=temperature, bias=bias)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 50), d=st.integers(1, 70), v=st.integers(1, 300), seed=st.integers(0, 99),
    ignored=st.sampled_from([0.0, 0.4, 1.0]), transposed=st.booleans(),
)  # fmt: skip
@pytest.mark.parametrize("name", BACKENDS)
def test_any_shape(name, n, d, v, seed, ignored, transposed):
    hidden, weight, labels = make(n, d, v, ignored=ignored, seed=seed)
    if transposed:
        hidden, weight = hidden.t().contiguous().t(), weight.t().contiguous().t()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DASD_KERNELS", name)
        check((hidden, weight, labels))


@pytest.mark.parametrize("level", [-200.0, 200.0])
def test_logits_far_from_zero(backend, level):
    """Within a few of fp32's spacings at 200, 1.5e-5."""
    check(make(20, 16, 300), 6e-5, bias=torch.full((300,), level))


@pytest.mark.parametrize("gap", [50.0, 90.0, 1000.0])
def test_one_entry_far_above_the_rest(backend, gap):
    for entry in (0, 450, 998):
        check(make(20, 16, 999), 1e-4, bias=torch.zeros(999).index_fill_(0, torch.tensor([entry]), gap))


def test_they_are_the_negated_loss(backend):
    hidden, weight, labels = make(50, 32, 700, ignored=0.3)
    loss = linear_cross_entropy(hidden, weight, labels, reduction="none")
    assert torch.equal(token_logprobs(hidden, weight, labels).logprob, -loss)


def test_a_rows_bits_depend_on_its_own_inputs(backend):
    """Subsets and another order of the rows give the same bits. Exact for the C++ kernels. torch.mm may choose another
    kernel for another number of rows: the chunked backend is held to equal bits for permutations only, else to 2e-6."""
    hidden, weight, labels = make(64, 48, 900)
    whole = token_logprobs(hidden, weight, labels, entropy=True, rank=True)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    moved = token_logprobs(hidden[order], weight, labels[order], entropy=True, rank=True)
    some = token_logprobs(hidden[5:18], weight, labels[5:18], entropy=True, rank=True)
    for a, b, c in zip(whole, moved, some, strict=True):
        assert torch.equal(a[order], b)
        assert torch.equal(a[5:18], c) if backend != "chunked" else (a[5:18] - c).abs().max() < 2e-6


def test_nothing_is_differentiable_and_compile_takes_one_graph(backend):
    hidden, weight, labels = make(20, 16, 300, ignored=0.2)
    hidden.requires_grad_()
    plain = token_logprobs(hidden, weight, labels, entropy=True)
    assert not plain.logprob.requires_grad and plain.rank is None
    compiled = torch.compile(
        lambda *a: token_logprobs(*a, entropy=True, rank=True), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(hidden, weight, labels).entropy, plain.entropy)


def test_labels_outside_the_vocabulary_are_named(backend):
    hidden, weight, labels = make(6, 8, 50)
    labels[2] = 50
    with pytest.raises(ValueError, match=r"labels\[2\] = 50 is outside"):
        token_logprobs(hidden, weight, labels)


def test_log_ratio_of_models_of_different_width_and_padding(backend):
    """The student's vocabulary ends at 500; the teacher's 12 rows of padding, however large, have probability zero."""
    teacher_hidden, teacher_weight, _ = make(40, 48, 512, torch.bfloat16, seed=1)
    student_hidden, student_weight, labels = make(40, 16, 500, ignored=0.2, seed=2)
    teacher_bias, student_bias = torch.linspace(-1, 40, 512), torch.linspace(1, -1, 500)
    options = {"temperature": torch.linspace(0.5, 1.5, 40), "teacher_softcap": 30.0, "entropy": True}
    got = log_ratio(
        teacher_hidden, teacher_weight, student_hidden, student_weight, labels,
        teacher_bias=teacher_bias, student_bias=student_bias, **options,
    )  # fmt: skip
    want = reference.log_ratio(
        teacher_hidden.double(), teacher_weight.double(), student_hidden.double(), student_weight.double(), labels,
        teacher_bias=teacher_bias.double(), student_bias=student_bias.double(), **options,
    )  # fmt: skip
    z = reference.logits(
        teacher_hidden.double(), teacher_weight.double(), teacher_bias.double(), 30.0, options["temperature"]
    )
    z[:, 500:] = -float("inf")
    valid = labels >= 0
    assert (z.log_softmax(1).gather(1, labels.clamp(0)[:, None])[:, 0] - got.teacher.logprob)[valid].abs().max() < 2e-5
    assert (got.log_ratio - want.log_ratio).abs().max() < 2e-5 and not got.log_ratio[~valid].any()
    assert (got.student.entropy - want.student.entropy).abs().max() < 1e-5
    labels[3] = 505
    with pytest.raises(ValueError, match=r"labels\[3\] = 505 is outside \[0, 500\)"):
        log_ratio(teacher_hidden, teacher_weight, student_hidden, student_weight, labels)

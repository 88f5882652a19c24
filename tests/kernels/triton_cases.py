"""The Triton kernels against the float64 reference; run by test_triton_interpreted.py under TRITON_INTERPRET=1, and
on a machine with a GPU by `pytest tests/kernels/triton_cases.py`.

The rule: error against float64 below k times that of plain torch in the inputs' precision, plus a few roundings.
The interpreter multiplies by numpy, whose bits for a row depend on where the row lies; tests of equal bits take
integers, whose products are exact, there. triton_setup.py checks every access of every kernel.
"""

import pytest
import torch
import triton
import triton.language as tl
from triton_setup import DEVICE, INTERPRETED, Guarded, error, make, marked, run

from dasd_kernels import linear_cross_entropy, log_ratio, reference, triton_ce, triton_rows
from dasd_kernels.chunked import Row

FLOOR = {torch.float32: 2e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def check_scores(hidden, weight, labels, tolerance=1e-5, **options):
    got = run(hidden, weight, labels, entropy=True, rank=True, **options)
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    want = reference.token_logprobs(hidden.double(), weight.double(), labels, entropy=True, rank=True, **wide)
    pairs = (got.nll, -want.logprob), (got.lse, want.lse), (got.entropy, want.entropy)
    for name, (a, b) in zip(("nll", "lse", "entropy"), pairs, strict=True):
        assert a.shape == labels.shape and a.dtype == torch.float32
        if len(a):
            assert not (a - b).abs().isnan().any() and (a - b).abs().max() <= tolerance, f"{name} {(a - b).abs().max()}"
    shape = wide.get("bias"), wide.get("softcap"), wide.get("temperature", 1.0)
    z = reference.logits(hidden.double(), weight.double(), *shape)
    target = z.gather(1, labels.clamp(0)[:, None])
    low, high = (z > target + tolerance).sum(1), (z > target - tolerance).sum(1)
    ignored = labels == -100
    assert (((got.rank >= low) & (got.rank <= high)) | ignored).all() and (got.rank[ignored] == -1).all()
    return got


def check_gradients(hidden, weight, labels, k, *, bias=None, coefficient=None, workspace=1 << 20, **options):
    """dX, dW, db of sum(coefficient * loss)."""
    n = len(labels)
    if coefficient is None:
        coefficient = torch.linspace(0.5, 1.5, n, device=DEVICE)

    def plain(dtype):
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
        kw = {key: v.to(dtype) if isinstance(v, torch.Tensor) else v for key, v in options.items()}
        loss = reference.linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2], reduction="none", **kw)
        (loss * coefficient.to(dtype)).sum().backward()
        return [None if t is None else t.grad for t in leaves]

    low, exact = plain(hidden.dtype), plain(torch.float64)
    r = run(hidden, weight, labels, bias=bias, coefficient=coefficient, needs=(True, True, bias is not None),
            workspace=workspace, **options)  # fmt: skip
    floor = FLOOR[hidden.dtype]
    for name, a, b, c in zip(("dX", "dW", "db"), (r.grad_hidden, r.grad_weight, r.grad_bias), low, exact, strict=True):
        if c is not None and n:
            k = 1.0 if name == "dX" and k < 1 else k
            assert error(a, c) <= k * error(b, c) + floor, f"{name}: {error(a, c):.1e}, plain torch {error(b, c):.1e}"
    return r


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [2, 127, 1000, 2307])
def test_scores_within_1e5_nats(dtype, vocab):
    """2307 takes three parts of the vocabulary with a ragged end, as 50257 and 151936 take sixteen."""
    check_scores(*make(37, 64, vocab, dtype, ignored=0.3))


@pytest.mark.parametrize("n", [0, 1, 64, 129])
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
def test_any_number_of_rows(n, ignored):
    check_scores(*make(n, 16, 300, torch.float16, ignored=ignored))
    r = check_gradients(*make(n, 16, 300, ignored=ignored), k=3)
    if ignored == 1.0:
        assert not r.grad_hidden.any() and not r.grad_weight.any() and not r.nll.any()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_options_of_the_logits(softcap, each, biased):
    temperature = torch.linspace(0.5, 2, 37, device=DEVICE) if each else 0.6
    bias = torch.linspace(-3, 3, 500, device=DEVICE) if biased else None
    inputs = make(37, 32, 500, ignored=0.3)
    check_scores(*inputs, softcap=softcap, temperature=temperature, bias=bias)
    check_gradients(*inputs, k=3, softcap=softcap, temperature=temperature, bias=bias, z_loss=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [{}, {"z_loss": 0.1, "label_smoothing": 0.2}, {"softcap": 3.0}])
@pytest.mark.parametrize("vocab", [127, 1100])
def test_gradients(dtype, loss, vocab):
    """k = 3 in fp32, where only the order of sums differs; 0.6 in bf16, or 1 for dX, which is rounded."""
    bias = torch.randn(vocab, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    check_gradients(*make(50, 64, vocab, dtype, ignored=0.3), k=3 if dtype == torch.float32 else 0.6, bias=bias, **loss)


def test_the_residual_makes_the_labels_part_of_the_gradient_exact():
    """Near-uniform rows: dW of a label's row is its one-hot part. In bf16 alone it would err by 2^-9 or so."""
    hidden, weight, labels = make(40, 16, 600, torch.bfloat16, scale=0.01)
    r = run(hidden, weight, labels, coefficient=torch.ones(40, device=DEVICE), needs=(False, True, False))
    want = torch.zeros(600, 16, dtype=torch.float64, device=DEVICE)
    p = (hidden.double() @ weight.double().t()).softmax(1)
    want = (p - torch.nn.functional.one_hot(labels, 600)).t() @ hidden.double()
    assert error(r.grad_weight[labels], want[labels]) < 1e-4


def test_duplicated_labels_and_zero_weights():
    hidden, weight, labels = make(80, 16, 100)
    labels = labels % 3
    coefficient = torch.linspace(-1, 1, 80, device=DEVICE)
    coefficient[::4] = 0
    check_gradients(hidden, weight, labels, k=3, coefficient=coefficient)
    check_gradients(*make(80, 16, 100, torch.bfloat16)[:2], labels, k=0.6, coefficient=coefficient)


@pytest.mark.parametrize("level", [-200.0, 200.0])
def test_logits_far_from_zero(level):
    check_scores(*make(20, 16, 300), 6e-5, bias=torch.full((300,), level, device=DEVICE))


@pytest.mark.parametrize("dtype, gap", [(torch.float32, 60), (torch.float32, 1000), (torch.bfloat16, 85)])
def test_rows_far_above_the_pivot_are_computed_again(dtype, gap):
    """Column 999 of 1100 is no sample (those are floor(1100 i / 256)) and no label; only some rows reach it. 60 nats
    are over the limit, 85 over what fp32 can sum, 1000 over what it can hold."""
    hidden, weight, labels = make(70, 64, 1100, dtype, scale=0.5)
    labels[labels == 999] = 5
    hidden[:, 0] = 0
    hidden[7, 0] = hidden[66, 0] = 4
    weight[999] = 0
    weight[999, 0] = gap / 4
    check_scores(hidden, weight, labels, 3e-4 if gap == 1000 else 2e-5)
    check_gradients(hidden, weight, labels, k=3 if dtype == torch.float32 else 0.6)


def test_a_raised_pivot_leaves_the_other_rows_bits():
    hidden, weight, labels = make(100, 64, 1100, scale=0.5)
    hidden[:, 0] = 0
    weight[999, 0] = 100
    calm = run(hidden, weight, labels)
    hidden = hidden.clone()
    hidden[3, 0] = 4
    wild = run(hidden, weight, labels)
    others = torch.arange(100) != 3
    assert torch.equal(calm.nll[others], wild.nll[others]) and wild.lse[3] > 300


def test_confident_rows():
    hidden, weight, labels = make(30, 16, 200, scale=0.1)
    weight[:30] += 3 * hidden
    labels = torch.arange(30, device=DEVICE)
    got = check_scores(hidden, weight, labels)
    assert (got.nll.min() >= 0) and got.nll.min() < 1e-3
    check_gradients(hidden, weight, labels, k=4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_loud_and_stays_in_its_row(bad):
    hidden, weight, labels = make(20, 16, 300)
    hidden[4, 3] = bad
    got = run(hidden, weight, labels)
    assert got.nll[4].isnan() and got.nll.isnan().sum() == 1


def test_labels_outside_the_vocabulary_give_nan_rows():
    hidden, weight, labels = make(20, 16, 300)
    labels[2], labels[5] = 300, -7
    got = run(hidden, weight, labels)
    assert got.nll.isnan().nonzero()[:, 0].tolist() == [2, 5]


def test_labels_outside_the_vocabulary_are_named_when_debugging(monkeypatch):
    hidden, weight, labels = make(20, 16, 300)
    labels[2] = 300
    assert linear_cross_entropy(hidden, weight, labels).isnan()
    monkeypatch.setenv("DASD_DEBUG", "1")
    with pytest.raises(ValueError, match=r"labels\[2\] = 300 is outside \[0, 300\)"):
        linear_cross_entropy(hidden, weight, labels)


def test_strides():
    hidden, weight, labels = make(40, 33, 300, torch.float16)
    column_major = [t.t().contiguous().t() for t in (hidden, weight)]
    wide = [torch.cat([t, t], 1)[:, : t.shape[1]] for t in (hidden, weight)]
    want = run(hidden, weight, labels)
    for x, w in (column_major, wide):
        check_scores(x, w, labels)
        assert torch.equal(run(x, w, labels).nll, want.nll)  # 33 columns: none is aligned


def test_heads_off_their_alignment():
    """One element off 16 bytes, a head is read by pointers, in smaller tiles."""
    hidden, weight, labels = make(40, 64, 300, torch.float16)
    moved = torch.empty(weight.numel() + 1, dtype=weight.dtype, device=DEVICE)[1:].view_as(weight).copy_(weight)
    check_scores(hidden, moved, labels)
    check_gradients(hidden.float(), moved.float(), labels, k=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_depend_on_its_own_inputs(dtype):
    hidden, weight, labels = make(200, 64, 1100, dtype)
    if DEVICE == "cpu":
        hidden, weight = (2 * hidden).round(), (2 * weight).round() / 8
    whole = run(hidden, weight, labels, entropy=True, rank=True)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    moved = run(hidden[order], weight, labels[order], entropy=True, rank=True)
    some = run(hidden[5:18], weight, labels[5:18], entropy=True, rank=True, workspace=1)
    for name in ("nll", "lse", "target", "entropy", "rank"):
        a, b, c = (getattr(r, name) for r in (whole, moved, some))
        assert torch.equal(a[order], b) and torch.equal(a[5:18], c), name


def test_chunks_repeat_and_leave_the_scores_bits(monkeypatch):
    """Of 128 rows outside tests; 24 make three chunks of few rows, one of them part ignored."""
    inputs = make(70, 16, 300, torch.bfloat16, ignored=0.2)
    kw = {"coefficient": torch.ones(70, device=DEVICE), "needs": (True, True, False)}
    one, again = run(*inputs, **kw), run(*inputs, **kw)
    assert triton_ce.chunk_rows(1000, 16, 320, 2, 1) == 128
    monkeypatch.setattr(triton_ce, "chunk_rows", lambda *_: 24)
    many = run(*inputs, **kw)
    for name in ("nll", "grad_hidden", "grad_weight"):
        assert torch.equal(getattr(one, name), getattr(again, name))
    assert torch.equal(one.nll, many.nll) and torch.equal(one.grad_hidden, many.grad_hidden)
    check_gradients(*inputs, k=0.6)


def test_inputs_stay_as_they_are():
    inputs = make(50, 16, 300, ignored=0.2)
    copies = [t.clone() for t in inputs]
    run(*inputs, coefficient=torch.ones(50, device=DEVICE), needs=(True, True, False))
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_segments():
    g = torch.Generator().manual_seed(0)
    logprob = -torch.rand(3000, generator=g).to(DEVICE)
    offsets = torch.tensor([0, 1, 1, 1500, 2999, 3000], device=DEVICE)
    got, want = triton_ce.segment_scores(logprob, offsets), reference.segment_scores(logprob.double(), offsets)
    assert torch.equal(got.count, want.count.to(DEVICE))
    for name in ("sum", "mean", "geometric_mean"):
        a, b = getattr(got, name), getattr(want, name)
        assert torch.allclose(a.double(), b, rtol=1e-6, equal_nan=True), name
    alone = triton_ce.segment_scores(logprob[1:1500], torch.tensor([0, 1499], device=DEVICE))
    assert torch.equal(alone.sum[0], got.sum[2])


@pytest.mark.parametrize(
    "dtype, vocab, width, loss",
    [
        (torch.float32, 127, 19, {}),
        (torch.bfloat16, 127, 19, {"label_smoothing": 0.1}),
        (torch.float32, 1100, 64, {}),
        (torch.bfloat16, 1100, 64, {"softcap": 20.0}),
        (torch.bfloat16, 300, 24, {"z_loss": 0.1}),
    ],
)
def test_nothing_outside_the_tensors_is_read_into_results_or_written(dtype, vocab, width, loss, monkeypatch):
    """Inputs and every buffer that `run` makes lie between guards, and buffers start as NaN: a value read from a
    guard, or before it was written, would make a result wrong. The last column, no sample of the pivot's, is so high
    that every row is computed twice, unless a softcap bounds it."""
    guard = Guarded()
    hidden, weight, labels = make(100, width, vocab, dtype, ignored=0.75)
    bias = torch.linspace(-1, 1, vocab, device=DEVICE)
    bias[-1] = 60
    ones = torch.ones(100, device=DEVICE)
    real_empty, real_zeros = torch.empty, torch.zeros
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", lambda *a, **k: guard(real_zeros(*a, **k)))
        patch.setattr(torch, "empty", lambda *a, **k: guard(marked(real_empty(*a, **k))))
        r = run(guard(hidden), guard(weight), labels, bias=guard(bias), entropy=True, rank=True, coefficient=ones,
                needs=(True, True, True), **loss)  # fmt: skip
    assert torch.empty is real_empty
    guard.check()
    leaves = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    want = reference.token_logprobs(
        *leaves[:2], labels, bias=leaves[2], entropy=True, rank=True, softcap=loss.get("softcap")
    )
    reference.linear_cross_entropy(*leaves[:2], labels, bias=leaves[2], reduction="sum", **loss).backward()
    assert (r.nll + want.logprob).abs().max() < 1e-4 and (r.entropy - want.entropy).abs().max() < 1e-4
    assert (r.lse - want.lse).abs().max() < 1e-4 and (r.rank - want.rank).abs().max() <= 1
    for a, leaf in zip((r.grad_hidden, r.grad_weight, r.grad_bias), leaves, strict=True):
        assert error(a, leaf.grad) < 1e-2


@triton.jit
def reads_or_writes_one_too_far(x, out, N: tl.constexpr, READ: tl.constexpr):
    at = tl.arange(0, 16)
    values = tl.load(x + at, mask=at < (N + 1 if READ else N), other=0.0)
    tl.store(out + at, values, mask=at < (N if READ else N + 1))


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's accesses are checked, a GPU's are not")
@pytest.mark.parametrize("read", [True, False])
def test_an_access_outside_the_tensors_is_found(read):
    room = torch.zeros(4, 16)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="load" if read else "store"):
        reads_or_writes_one_too_far[(1,)](room[0, :9], room[2, :9], N=9, READ=read)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_public_functions_use_these_kernels(reduction, monkeypatch):
    """retain_graph twice, a non-unit upstream gradient, a frozen head, dW added to a given buffer."""
    calls = []
    real = triton_ce.run
    monkeypatch.setattr(triton_ce, "run", lambda *a, **k: calls.append(1) or real(*a, **k))
    hidden, weight, labels = make(30, 16, 200, ignored=0.3)
    total = torch.zeros(200, 16, device=DEVICE)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    wide = [t.double().requires_grad_() for t in (hidden, weight)]
    loss = linear_cross_entropy(*leaves, labels, reduction=reduction, grad_weight_out=total)
    for x in (loss, reference.linear_cross_entropy(*wide, labels, reduction=reduction)):
        (3 * x).sum().backward(retain_graph=True)
    assert calls and leaves[1].grad is None
    assert error(leaves[0].grad, wide[0].grad) < 1e-6 and error(total, wide[1].grad) < 1e-6
    once = leaves[0].grad.clone()
    (3 * loss).sum().backward()
    assert torch.equal(leaves[0].grad, 2 * once) and error(total, 2 * wide[1].grad) < 1e-6
    frozen = hidden.clone().requires_grad_()
    linear_cross_entropy(frozen, weight, labels).backward()
    assert frozen.grad.isfinite().all() and frozen.grad.any()


def test_log_ratio_of_two_widths():
    hidden, weight, labels = make(40, 16, 300, torch.bfloat16, ignored=0.3)
    teacher, head, _ = make(40, 24, 320, torch.float16, seed=1)
    got = log_ratio(teacher, head, hidden, weight, labels)
    want = reference.log_ratio(teacher.double(), head.double(), hidden.double(), weight.double(), labels)
    assert (got.log_ratio - want.log_ratio).abs().max() < 1e-5


def test_supports_says_what_goes_the_plain_way():
    h16, h32 = torch.empty(1, 1, dtype=torch.float16), torch.empty(1, 1)
    assert triton_ce.supports(h32, h32, Row(), True) and triton_ce.supports(h16, h16, Row(), False)
    assert not triton_ce.supports(h16, h16, Row(), True) and not triton_ce.supports(h16, h32, Row(), False)
    assert not triton_ce.supports(h32, h32, Row(softcap=1.0, label_smoothing=0.1), True)
    assert triton_rows.LARGEST.value == 2.0**64

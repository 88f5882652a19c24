"""The Triton kernels against the float64 reference; run by test_triton_interpreted.py under TRITON_INTERPRET=1, and
on a machine with a GPU by `pytest tests/kernels/triton_cases.py`.

The rule: error against float64 below k times that of plain torch in the inputs' precision, plus a few roundings.
Triton 3.7's interpreter truncates fp32 to bf16 where devices round to nearest, so its conversion is replaced here.
It also multiplies by numpy, whose bits for a row depend on where the row lies; tests of equal bits take integers,
whose products are exact, there.
"""

import os

import pytest
import torch
import triton.language as tl

from dasd_kernels import linear_cross_entropy, log_ratio, reference, triton_ce, triton_rows
from dasd_kernels.chunked import Row

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    convert_any = interpreter._convert_float

    def convert_float(data, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype("uint32") << 16
        return convert_any(data, source, target, rounding)

    interpreter._convert_float = convert_float

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def make(n, d, v, dtype=torch.float32, *, ignored=0.0, scale=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g).to(dtype)
    weight = (torch.randn(v, d, generator=g) * scale / d**0.5).to(dtype)
    labels = torch.randint(0, v, (n,), generator=g)
    labels[torch.rand(n, generator=g) < ignored] = -100
    return hidden.to(DEVICE), weight.to(DEVICE), labels.to(DEVICE)


def run(hidden, weight, labels, *, bias=None, temperature=1.0, workspace=1 << 20, coefficient=None,
        needs=(False, False, False), entropy=False, rank=False, ignore_index=-100, **loss):  # fmt: skip
    per_token = temperature if isinstance(temperature, torch.Tensor) else None
    row = Row(loss.get("softcap"), 1.0 if per_token is not None else temperature, loss.get("label_smoothing", 0.0),
              loss.get("z_loss", 0.0))  # fmt: skip
    return triton_ce.run(hidden, weight, labels, bias, per_token, row, ignore_index, workspace,
                         coefficient=coefficient, needs=needs, entropy=entropy, rank=rank)  # fmt: skip


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


def error(a, b):
    return (a.double() - b).norm().item() / max(b.norm().item(), 1e-30)


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


@pytest.mark.parametrize("gap", [60.0, 85.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_far_above_the_pivot_are_computed_again(gap, dtype):
    """Column 999 of 1100 is no sample (those are floor(1100 i / 256)) and no label; only some rows reach it."""
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


def test_chunks_repeat_and_leave_the_scores_bits():
    inputs = make(150, 16, 300, torch.bfloat16, ignored=0.2)
    kw = {"coefficient": torch.ones(150, device=DEVICE), "needs": (True, True, False)}
    one, again, many = run(*inputs, **kw), run(*inputs, **kw), run(*inputs, workspace=1, **kw)
    for name in ("nll", "grad_hidden", "grad_weight"):
        assert torch.equal(getattr(one, name), getattr(again, name))
    assert torch.equal(one.nll, many.nll)
    check_gradients(*inputs, k=0.6, workspace=1)


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


def marked(tensor):
    return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)


class Guarded:
    """Tensors between stretches of NaN (or a marker) that reads must not reach and writes must not change."""

    def __init__(self):
        self.kept = []

    def __call__(self, tensor):
        pad = 4096
        memory = marked(tensor.new_empty(tensor.numel() + 2 * pad))
        inner = memory[pad : pad + tensor.numel()].view(tensor.shape)
        inner.copy_(tensor)
        self.kept.append((memory, pad))
        return inner

    def check(self):
        for memory, pad in self.kept:
            edge = torch.cat([memory[:pad], memory[-pad:]])
            assert (edge.isnan() if edge.is_floating_point() else edge == 77).all(), "a write beyond the end"


@pytest.mark.parametrize("vocab, width", [(127, 19), (1100, 64), (300, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_outside_the_tensors_is_read_into_results_or_written(vocab, width, dtype, monkeypatch):
    """Inputs and every buffer that `run` makes lie between guards, and buffers start as NaN: a value read from a
    guard, or before it was written, would make a result NaN."""
    guard = Guarded()
    hidden, weight, labels = make(100, width, vocab, dtype, ignored=0.75)
    bias = guard(torch.linspace(-1, 1, vocab, device=DEVICE))
    real_empty, real_zeros = torch.empty, torch.zeros
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", lambda *a, **k: guard(real_zeros(*a, **k)))
        patch.setattr(torch, "empty", lambda *a, **k: guard(marked(real_empty(*a, **k))))
        r = run(guard(hidden), guard(weight), labels, bias=bias, entropy=True, rank=True,
                coefficient=torch.ones(100, device=DEVICE), needs=(True, True, True))  # fmt: skip
    assert torch.empty is real_empty
    guard.check()
    plain = run(hidden, weight, labels, bias=bias, entropy=True, rank=True,
                coefficient=torch.ones(100, device=DEVICE), needs=(True, True, True))  # fmt: skip
    for name in ("nll", "lse", "entropy", "rank", "grad_hidden", "grad_weight", "grad_bias"):
        assert torch.equal(getattr(r, name), getattr(plain, name)), name


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

"""linear_cross_entropy of every backend against the float64 reference.

Tolerances follow one rule: our error against float64 is below k times the error of what plain torch gives in the
input's precision (`reference` on the same inputs), plus a floor of a few roundings; k is written at each test.
"""

import copy
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_kernels import linear_cross_entropy, reference
from dasd_kernels._C import Workspace
from dasd_kernels.cpu import describe, new_memory

BACKENDS = ["chunked", *filter(describe, ("portable", "avx2", "avx512", "avx512_bf16"))]  # what this CPU can run
FLOOR = 1e-6


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv("DASD_KERNELS", request.param)
    return request.param


def make(n, d, v, dtype=torch.float32, *, ignored=0.0, scale=1.0, seed=0, bias=False):
    """Inputs whose logits have a standard deviation of about `scale`."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g).to(dtype)
    weight = (torch.randn(v, d, generator=g) * scale / d**0.5).to(dtype)
    labels = torch.randint(0, v, (n,), generator=g)
    labels[torch.rand(n, generator=g) < ignored] = -100
    return hidden, weight, labels, torch.randn(v, generator=g).to(dtype) if bias else None


def evaluate(f, hidden, weight, labels, bias=None, upstream=1.0, **kw):
    """(loss, dX, dW, db) of fresh leaves; None for what has no gradient."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (hidden, weight, bias)]
    loss = f(leaves[0], leaves[1], labels, bias=leaves[2], **kw)
    (loss * upstream).sum().backward()
    return [loss.detach(), *(None if t is None else t.grad for t in leaves)]


def exact(hidden, weight, labels, bias=None, **kw):
    wide = [None if t is None else t.double() for t in (hidden, weight, bias)]
    return evaluate(reference.linear_cross_entropy, wide[0], wide[1], labels, wide[2], **kw)


def error(a, b):
    """Norm of the difference over the norm of b; 0 for two zeros."""
    return (a.double() - b.double()).norm().item() / max(b.double().norm().item(), 1e-30)


def check(inputs, k, floor=FLOOR, workspace_bytes=None, **kw):
    ours = evaluate(linear_cross_entropy, *inputs, workspace_bytes=workspace_bytes, **kw)
    plain = evaluate(reference.linear_cross_entropy, *inputs, **kw)
    want = exact(*inputs, **kw)
    for name, a, b, c in zip(("loss", "dX", "dW", "db"), ours, plain, want, strict=True):
        if c is not None:
            slack = floor + (5e-7 / max(c.norm().item(), 1e-9) if name == "loss" else 0)  # half a millionth of a nat
            assert error(a, c) <= k * error(b, c) + slack, f"{name}: {error(a, c):.2e}, plain torch {error(b, c):.2e}"


SWITCHES = list(
    itertools.product(
        ("mean", "sum", "none"), (0.0, 0.1), (0.0, 1e-2), (None, 3.0), ("one", "all", "each"), (False, True)
    )
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_combination_of_options(backend, dtype):
    """k = 1 in bf16 and fp16, where plain torch rounds its logits; 3 in fp32 and fp64, where only the order differs."""
    low = dtype in (torch.bfloat16, torch.float16)
    for i, (reduction, smoothing, z_loss, softcap, temperature, weighted) in enumerate(SWITCHES):
        n = 23
        inputs = make(n, 16, 127, dtype, ignored=0.3, seed=i, bias=weighted)
        options = {"reduction": reduction, "label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap}
        options["temperature"] = {"one": 1.0, "all": 0.7, "each": torch.linspace(0.5, 1.5, n)}[temperature]
        if weighted:
            options["token_weight"] = torch.linspace(-0.5, 2, n)
        upstream = torch.linspace(0.5, -1.5, n) if reduction == "none" else 0.75
        # The outputs are rounded once to the input's precision, and once more by an upstream factor.
        floor = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: FLOOR, torch.float64: 1e-12}[dtype]
        check(inputs, 1 if low else 3, floor, upstream=upstream, **options)


@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 1000, 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabulary_sizes_and_tails(backend, vocab, dtype):
    """k = 3 in fp32 (order of sums); 0.6 in bf16, where plain torch rounds every logit. V = 1 has gradient 0."""
    inputs = make(19, 48, vocab, dtype, ignored=0.2, scale=3.0)
    if vocab == 1:
        _, dx, dw, _ = evaluate(linear_cross_entropy, *inputs)
        assert dx.abs().max() < 1e-6 and dw.abs().max() < 1e-6
    else:
        check(inputs, 3 if dtype == torch.float32 else 0.6, 1e-6 if dtype == torch.float32 else 2.5e-3)


@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 127, 300])
@pytest.mark.parametrize("workspace", [1, 300 * 1000 * 4 // 3, None])
def test_numbers_of_tokens_and_chunks(backend, n, workspace):
    """k = 3. A workspace of one byte still computes, in the smallest chunks."""
    if n == 0:
        inputs = make(0, 32, 1000)
        for reduction, shape in (("mean", ()), ("sum", ()), ("none", (0,))):
            loss, dx, dw, _ = evaluate(linear_cross_entropy, *inputs, reduction=reduction)
            assert loss.shape == shape and loss.sum() == 0 and dx.shape == (0, 32) and not dw.any()
    elif n <= 17 or workspace != 1:
        check(make(n, 32, 1000, ignored=0.0), 3, workspace_bytes=workspace)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 60), d=st.integers(1, 70), v=st.integers(2, 300), ignored=st.sampled_from([0.0, 0.4, 1.0]),
    strides=st.sampled_from(["plain", "transposed", "sliced", "expanded"]), seed=st.integers(0, 99),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)  # fmt: skip
@pytest.mark.parametrize("name", BACKENDS)
def test_any_shape_stride_and_share_of_ignored_labels(name, n, d, v, ignored, strides, seed, reduction):
    """k = 3, on views as on copies."""
    hidden, weight, labels, _ = make(n, d, v, ignored=ignored, seed=seed)
    if strides == "transposed":
        hidden, weight = hidden.t().contiguous().t(), weight.t().contiguous().t()
    elif strides == "sliced":
        hidden, weight = torch.stack([hidden, hidden * 9], 2)[:, :, 0], torch.cat([weight, weight], 1)[:, d:]
        labels = torch.stack([labels, labels], 1)[:, 1]
    elif strides == "expanded" and n:
        hidden = hidden[:1].expand(n, d)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DASD_KERNELS", name)
        check((hidden, weight, labels), 3, 2e-6, reduction=reduction)


def test_all_ignored_is_zero_and_keeps_the_graph(backend):
    hidden, weight, labels, _ = make(9, 8, 50)
    for reduction in ("mean", "sum", "none"):
        loss, dx, dw, _ = evaluate(linear_cross_entropy, hidden, weight, labels.fill_(-100), reduction=reduction)
        assert not loss.any() and not dx.any() and not dw.any() and torch.isfinite(dx).all()


def test_ignored_rows_do_not_matter(backend):
    """Whatever they hold, NaN included; any value may mean "ignored"."""
    hidden, weight, labels, _ = make(20, 8, 50, ignored=0.5)
    ignored = labels == -100
    want = evaluate(linear_cross_entropy, hidden, weight, labels)
    poisoned = hidden.clone()
    poisoned[ignored] = float("nan")
    got = evaluate(linear_cross_entropy, poisoned, weight, labels.masked_fill(ignored, 7777), ignore_index=7777)
    assert all(torch.equal(a, b) for a, b in zip(want[:3], got[:3], strict=True))
    token_weight = torch.ones(20).masked_fill(ignored, float("nan"))
    assert torch.equal(evaluate(linear_cross_entropy, poisoned, weight, labels, token_weight=token_weight)[1], want[1])


def test_token_weights_that_sum_to_zero_give_zero(backend):
    hidden, weight, labels, _ = make(6, 8, 50)
    loss, dx, dw, _ = evaluate(linear_cross_entropy, hidden, weight, labels, token_weight=torch.zeros(6))
    assert loss == 0 and not dx.any() and not dw.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confident_tokens(backend, dtype):
    """p > 0.999 at the labels: the gradient is a small difference, p - 1. k = 3 in fp32, 1 in bf16."""
    hidden, weight, _, _ = make(32, 64, 500, dtype)
    labels = torch.arange(32)
    weight[:32] = (hidden.float() * 0.25).to(dtype)
    lse = (hidden.double() @ weight.double().t()).log_softmax(1)
    assert (lse[labels, labels].exp() > 0.999).float().mean() > 0.5
    check((hidden, weight, labels), 3 if dtype == torch.float32 else 1, 2e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("level", [-200.0, 200.0])
def test_logits_far_from_zero(backend, level):
    """All logits near +-200, where exp overflows. k = 3; floor: fp32's spacing at 200 over the loss."""
    hidden, weight, labels, _ = make(20, 16, 300)
    hidden, weight = torch.cat([hidden, torch.ones(20, 1)], 1), torch.cat([weight, torch.full((300, 1), level)], 1)
    check((hidden, weight, labels), 3, 2e-5)


@pytest.mark.parametrize("gap", [30.0, 60.0, 85.0, 100.0, 300.0])
def test_one_entry_far_above_all_others(backend, gap):
    """A single vocabulary entry towers over the label and everything else: finite, and right. k = 3."""
    hidden, weight, labels, _ = make(24, 16, 999)
    labels[:] = torch.arange(24) * 7
    for entry in (1, 500, 998):
        bias = torch.zeros(999).index_fill_(0, torch.tensor([entry]), gap)
        check((hidden, weight, labels, bias), 3, 2e-6)
        check((hidden, weight, labels, bias), 3, 2e-6, reduction="none", upstream=torch.linspace(-1, 1, 24))


def test_entries_with_a_bias_of_minus_infinity_have_no_mass(backend):
    hidden, weight, labels, _ = make(24, 16, 100)
    labels %= 90
    bias = torch.zeros(100).index_fill_(0, torch.arange(90, 100), -float("inf"))
    masked = evaluate(linear_cross_entropy, hidden, weight, labels, bias)
    cut = evaluate(linear_cross_entropy, hidden, weight[:90], labels)
    assert error(masked[0], cut[0]) < 1e-6 and error(masked[1], cut[1]) < 1e-5
    assert error(masked[2][:90], cut[2]) < 1e-5 and not masked[2][90:].any()


def test_repeated_labels_add_up(backend):
    """k = 3: many rows with one label, whose row of dW collects them all."""
    hidden, weight, labels, _ = make(200, 16, 100)
    check((hidden, weight, labels.fill_(3)), 3)


def test_labels_outside_the_vocabulary_are_named(backend):
    hidden, weight, labels, _ = make(6, 8, 50)
    for bad in (50, -1, 1 << 40):
        labels[4] = bad
        with pytest.raises(ValueError, match=rf"labels\[4\] = {bad} is outside \[0, 50\)"):
            linear_cross_entropy(hidden, weight, labels)


@pytest.mark.parametrize("workspace", [None, 12_000])
def test_backward_twice_and_inputs_untouched(backend, workspace):
    for reduction in ("mean", "none"):
        hidden, weight, labels, _ = make(30, 16, 300, ignored=0.2)
        before = copy.deepcopy((hidden, weight, labels))
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        loss = linear_cross_entropy(*leaves, labels, reduction=reduction, workspace_bytes=workspace).sum()
        (loss * 3).backward(retain_graph=True)
        first = [t.grad.clone() for t in leaves]
        for t in leaves:
            t.grad = None
        (loss * 3).backward(retain_graph=True)
        assert all(torch.equal(t.grad, g) for t, g in zip(leaves, first, strict=True))
        (loss * 3).backward()  # accumulates
        assert all(error(t.grad, 2 * g) < 1e-6 for t, g in zip(leaves, first, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(before, (hidden.detach(), weight.detach(), labels), strict=True))


CHUNKS = pytest.mark.parametrize("workspace", [None, 30_000])  # one, or several: dW lies where it was added up


@CHUNKS
def test_losses_alive_at_once_do_not_share_their_memory(backend, workspace):
    """And memory that comes back from one holds nothing for the next."""
    small, large = make(30, 16, 300), make(90, 16, 700, seed=1)
    want = [evaluate(linear_cross_entropy, *inputs, workspace_bytes=workspace)[2] for inputs in (small, large)]
    for order in ((0, 1), (1, 0)):
        leaves = [inputs[1].clone().requires_grad_() for inputs in (small, large)]
        losses = [
            linear_cross_entropy(x[0], w, x[2], workspace_bytes=workspace)
            for x, w in zip((small, large), leaves, strict=True)
        ]
        for i in order:
            losses[i].backward()
        assert all(torch.equal(w.grad, g) for w, g in zip(leaves, want, strict=True))
        del losses


@CHUNKS
def test_gradients_keep_their_memory_while_later_losses_come_and_go(backend, workspace):
    """dW lies in its loss's own memory: nobody else's, for any backward of this loss or another."""
    hidden, weight, labels, _ = make(90, 16, 700)
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, workspace_bytes=workspace)
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    want = first.clone()
    (second,) = torch.autograd.grad(loss, weight)
    other = linear_cross_entropy(hidden * 2, weight, labels, workspace_bytes=workspace)
    del loss
    (third,) = torch.autograd.grad(other, weight)
    assert torch.equal(first, want) and torch.equal(second, want) and not torch.equal(third, want)


@pytest.fixture
def training_process():
    """What a training process asks for, at a small size."""
    before = Workspace.keep, Workspace.keep_from
    Workspace.keep, Workspace.keep_from = 0, 1 << 20
    Workspace.release()
    yield
    Workspace.release()
    Workspace.keep, Workspace.keep_from = before


def test_a_large_workspace_stays_where_small_ones_go(training_process):
    """And has room for one a little larger. A gradient's part and the exponentials' stay together."""
    place = Workspace(40 << 20).address
    Workspace(4096)
    assert Workspace((40 << 20) + 4096).address == place
    assert Workspace.keeps(40 << 20) and not Workspace.keeps(4096)
    state, partial = new_memory(30 << 20, 10 << 20)
    assert partial.data_ptr() == place and state.data_ptr() == place + (10 << 20)


@CHUNKS
def test_saved_tensors_may_be_copies(backend, workspace):
    """As hooks make them that keep what backward needs elsewhere, such as torch.autograd.graph.save_on_cpu."""
    inputs = make(90, 16, 700)
    want = evaluate(linear_cross_entropy, *inputs, workspace_bytes=workspace)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        got = evaluate(linear_cross_entropy, *inputs, workspace_bytes=workspace)
    assert all(torch.equal(a, b) for a, b in zip(want[:3], got[:3], strict=True))


def test_frozen_sides_get_nothing_and_change_nothing(backend):
    hidden, weight, labels, bias = make(30, 16, 300, bias=True)
    for reduction in ("sum", "none"):
        _, dx, dw, db = evaluate(linear_cross_entropy, hidden, weight, labels, bias, reduction=reduction)
        for frozen in itertools.product((False, True), repeat=3):
            leaves = [t.detach().requires_grad_(not f) for t, f in zip((hidden, weight, bias), frozen, strict=True)]
            loss = linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2], reduction=reduction)
            assert loss.requires_grad != all(frozen)
            if loss.requires_grad:
                loss.sum().backward()
            for t, f, g in zip(leaves, frozen, (dx, dw, db), strict=True):
                assert t.grad is None if f else torch.equal(t.grad, g)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden.requires_grad_(), weight, labels).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grad_weight_out_receives_the_sum_in_fp32(backend, dtype):
    """Micro-batches accumulate: nothing is added before backward, weight.grad stays empty. k = 3 in fp32, 1 in bf16."""
    total = torch.ones(300, 16)
    want, plain = total.double(), total.double()
    hidden, weight, _, _ = make(30, 16, 300, dtype)
    weight.requires_grad_()
    for seed, reduction in enumerate(("mean", "sum", "none")):
        x, _, labels, _ = make(30, 16, 300, dtype, seed=seed)
        x.requires_grad_()
        before = total.clone()
        loss = linear_cross_entropy(x, weight, labels, reduction=reduction, grad_weight_out=total)
        assert torch.equal(before, total)
        (loss * 0.3).sum().backward()
        assert weight.grad is None and x.grad is not None
        want += exact(x, weight, labels, reduction=reduction, upstream=0.3)[2]
        plain += evaluate(reference.linear_cross_entropy, x, weight, labels, reduction=reduction, upstream=0.3)[2]
    low = dtype == torch.bfloat16
    assert error(total, want) <= (1 if low else 3) * error(plain, want) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_runs_have_equal_bits(backend, dtype):
    inputs = make(100, 32, 700, dtype, ignored=0.2, bias=True)
    runs = [evaluate(linear_cross_entropy, *inputs, z_loss=1e-3, softcap=20.0) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_threads_leave_no_trace(backend):
    """One thread and two give the same bits (the C++ kernels; torch.mm cuts its sums as it likes)."""
    if backend == "chunked":
        pytest.skip("torch.mm promises no such thing")
    inputs = make(150, 200, 3000, ignored=0.1)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(evaluate(linear_cross_entropy, *inputs)[:3])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_a_rows_gradient_does_not_depend_on_its_neighbours(backend):
    if backend == "chunked":
        pytest.skip("torch.mm may choose another kernel for another number of rows")
    hidden, weight, labels, _ = make(70, 33, 700)
    whole = evaluate(linear_cross_entropy, hidden, weight, labels, reduction="sum")[1]
    some = evaluate(linear_cross_entropy, hidden[9:20], weight, labels[9:20], reduction="sum")[1]
    assert torch.equal(whole[9:20], some)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of the resident set")
@pytest.mark.parametrize("train", [False, True])
def test_peak_memory_is_bounded(backend, train):
    """The logits would take 160 MB in fp32, twice that with their gradient; a workspace of 24 MB does."""
    code = f"""if True:
        import torch, pathlib
        from dasd_kernels import linear_cross_entropy, token_logprobs
        torch.set_num_threads(1)
        hidden, weight = torch.randn(2000, 16), torch.randn(20000, 16)
        labels = torch.randint(0, 20000, (2000,))
        kilobytes = lambda key: int(pathlib.Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])
        linear_cross_entropy(hidden[:4], weight, labels[:4])  # the first call loads what it needs
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = kilobytes("VmRSS")
        if {train}:
            hidden.requires_grad_(), weight.requires_grad_()
            linear_cross_entropy(hidden, weight, labels, workspace_bytes=24 << 20).backward()
        else:
            token_logprobs(hidden, weight, labels)
        print((kilobytes("VmHWM") - before) / 1024)
    """
    peak = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert peak < (24 + 12 if train else 64), f"{peak:.0f} MiB"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of the resident set")
@pytest.mark.parametrize(("tokens", "most"), [(128, 72), (512, 64 + 24)])
def test_peak_memory_of_the_heads_gradient_is_not_added_to_the_exponentials(backend, tokens, most):
    """64 and 72 MiB in fp32, whose rows are an odd number of cache lines; 8 for all else. In several chunks dW is made
    once, beside one chunk's 24."""
    if backend == "chunked":
        pytest.skip("it holds both")
    code = f"""if True:
        import torch, pathlib
        from dasd_kernels import linear_cross_entropy
        torch.set_num_threads(1)
        hidden, weight = torch.randn({tokens}, 128), torch.randn(1 << 17, 128).requires_grad_()
        labels = torch.randint(0, 1 << 17, ({tokens},))
        kilobytes = lambda key: int(pathlib.Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])
        linear_cross_entropy(hidden[:4], weight[:4], labels[:4] % 4).backward()  # the first call loads what it needs
        weight.grad = None
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = kilobytes("VmRSS")
        linear_cross_entropy(hidden, weight, labels, workspace_bytes=16 << 20).backward()
        print((kilobytes("VmHWM") - before) / 1024)
    """
    peak = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert peak < most + 8, f"{peak:.0f} MiB"


def test_mixed_dtypes(backend):
    """A bf16 hidden state against an fp32 head: both as they are, gradients in each one's dtype."""
    hidden, weight, labels, _ = make(40, 32, 500)
    hidden = hidden.bfloat16()
    loss, dx, dw, _ = evaluate(linear_cross_entropy, hidden, weight, labels)
    want = exact(hidden, weight, labels)
    assert dx.dtype == torch.bfloat16 and dw.dtype == torch.float32
    assert error(loss, want[0]) < 1e-6 and error(dx, want[1]) < 4e-3 and error(dw, want[2]) < 1e-5


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_compiles_in_one_graph(backend, reduction, accumulate):
    torch._dynamo.reset()  # each case is a program of its own, not one more recompilation
    hidden, weight, labels, _ = make(30, 16, 300, ignored=0.3)

    def step(hidden, weight, labels, total):
        loss = linear_cross_entropy(hidden * 2, weight, labels, reduction=reduction, grad_weight_out=total)
        return (loss * 1.5).sum()

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        total = torch.ones(300, 16) if accumulate else None
        loss = f(*leaves, labels, total)
        loss.backward()
        results.append([loss.detach(), leaves[0].grad, total if accumulate else leaves[1].grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operators_pass_torchs_own_checks(backend):
    from dasd_kernels.linear_ce import linear_ce, linear_ce_gradients

    hidden, weight, labels, bias = make(12, 8, 50, ignored=0.3, bias=True)
    for reduction in ("mean", "none"):
        args = (hidden.requires_grad_(), weight.requires_grad_(), labels, bias, None, None, None, -100, reduction)
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(linear_ce, (*args, 0.0, 0.0, 0.0, 1.0, 1 << 20, [True, True, False]), test_utils=checks)
    args = (hidden.detach(), weight.detach(), labels, bias, torch.ones(12), None, -100, 0.0, 0.0, 0.0, 1.0, 1 << 20)
    torch.library.opcheck(linear_ce_gradients, (*args, [True, True, True]))


def test_gradcheck_in_float64(backend):
    hidden, weight, labels, bias = make(5, 4, 7, torch.float64, ignored=0.2, bias=True)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "z_loss": 0.1, "label_smoothing": 0.1, "softcap": 2.0, "temperature": 0.8}
        assert torch.autograd.gradcheck(
            lambda h, w, b, o=options: linear_cross_entropy(h, w, labels, bias=b, **o), leaves
        )


def test_wrong_arguments_say_what_to_do(backend):
    hidden, weight, labels, _ = make(6, 8, 50)
    call = linear_cross_entropy

    class DTensor(torch.Tensor):
        pass

    cases = [
        (lambda: call(hidden, weight[:, :7], labels), r"of one D; got \[6, 8\] and \[50, 7\]"),
        (lambda: call(hidden, weight[:0], labels), "weight is empty.*gather it first"),
        (
            lambda: call(hidden, weight.as_subclass(DTensor), labels),
            r"weight is a DTensor: pass weight.full_tensor\(\)",
        ),
        (lambda: call(hidden, weight, labels[:5]), r"labels is int64 \[N\] with N = 6"),
        (lambda: call(hidden, weight, labels.int()), "labels is int64"),
        (lambda: call(hidden.long(), weight, labels), "hidden must be floating point"),
        (lambda: call(hidden, weight, labels, bias=torch.zeros(6)), r"bias is \[V\] with V = 50"),
        (lambda: call(hidden, weight, labels, token_weight=torch.ones(5)), r"token_weight is \[N\]"),
        (
            lambda: call(hidden, weight, labels, token_weight=torch.ones(6, requires_grad=True)),
            "pass token_weight.detach",
        ),
        (lambda: call(hidden, weight, labels, temperature=0.0), "temperature must be positive"),
        (lambda: call(hidden, weight, labels, temperature=-torch.ones(6)), "temperature must be positive"),
        (lambda: call(hidden, weight, labels, reduction="avg"), "not 'avg'"),
        (lambda: call(hidden, weight, labels, grad_weight_out=torch.zeros(50, 8).half()), "grad_weight_out is fp32"),
    ]
    for f, message in cases:
        with pytest.raises(ValueError, match=message):
            f()

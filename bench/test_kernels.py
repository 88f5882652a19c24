"""linear_cross_entropy and token_logprobs beside the matrix products they replace and their peers.

    python -m bench.table kernels                           # the full shapes: some ten minutes on two cores
    DASD_BENCH_SCALE=16 python -m bench.table kernels       # vocabularies 16 times smaller
    DASD_BENCH_DTYPE=bf16 python -m bench.table kernels     # the default where the CPU multiplies bf16, else fp32

The floor of a score is the one torch.mm that makes the logits, of a loss with its gradients the three torch.mm calls
that make logits, dX and dW, timed in the same rounds, times the share of valid tokens. Peak memory is the growth of the
process's resident set in one call from its inputs, gradients included. The error is the largest of logprob (absolute,
scores) or the larger relative error of dX and dW (losses) against float64, where that is quick to compute. With random
labels on a random head, as the losses have, gradients are nearly all one-hot, which any logits give; the errors on a
head and labels like a trained model's are a case of their own.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.compare import compare
from dasd_kernels import _C, linear_cross_entropy, reference, token_logprobs
from dasd_kernels.cpu import describe

SCALE = int(os.environ.get("DASD_BENCH_SCALE", "1"))
NAME = os.environ.get("DASD_BENCH_DTYPE", "bf16" if describe("avx512_bf16") else "fp32")
DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[NAME]
SHAPES = [(4096, 192, 2048), (1024, 1024, 32768), (2048, 576, 49152), (512, 2560, 151936)]


def make(n: int, d: int, v: int, ignored: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=g).to(DTYPE).requires_grad_()
    weight = (torch.randn(v, d, generator=g) * 2 / d**0.5).to(DTYPE).requires_grad_()
    labels = torch.randint(0, v, (n,), generator=g)
    labels[torch.rand(n, generator=g) < ignored] = -100
    return hidden, weight, labels


def make_realistic(n: int, d: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    """Frequencies by Zipf's law, logits to about 10, 3.8 nats of entropy, labels drawn from the model."""
    hidden, weight, _ = (t.detach() for t in make(n, d, v))
    hidden[:, 0] = 1
    weight *= 1.7
    weight[:, 0] = -torch.arange(v).log1p().to(DTYPE)
    p = (hidden.float() @ weight.float().t()).softmax(1)
    labels = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(1))[:, 0]
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def peak_bytes(f: Callable[[], Any], inputs: tuple[Tensor, ...] = ()) -> int:
    """Growth of the resident set's peak over one call, the gradients of `inputs` included; 0 where the system does not
    tell."""
    for tensor in inputs:
        tensor.grad = None
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return 0
    kilobytes = lambda key: int(status.read_text().split(key + ":")[1].split()[0])  # noqa: E731
    _C.Workspace.release()  # what earlier calls freed must not be there to be used
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = kilobytes("VmRSS")
    result = f()
    peak = kilobytes("VmHWM") - before
    del result
    return peak * 1024


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def exact_gradients(inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """dX and dW in float64."""
    leaves = [t.detach().double().requires_grad_() for t in inputs[:2]]
    reference.linear_cross_entropy(leaves[0], leaves[1], inputs[2]).backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def gradient_error(step: Callable[[], Any], inputs: tuple[Tensor, Tensor, Tensor], exact: list[Tensor]) -> float:
    step()
    return max(relative(t.grad, g) for t, g in zip(inputs[:2], exact, strict=True) if t.grad is not None)


def gradient_step(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: tuple[Tensor, Tensor, Tensor]
) -> Callable[[], Any]:
    hidden, weight, labels = inputs

    def step() -> None:
        hidden.grad = weight.grad = None
        loss(hidden, weight, labels).backward()

    return step


def loss_peers() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor] | str]:
    """Peers as (hidden, weight, labels) -> mean loss, or why they are skipped."""

    def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.t()).float(), labels)

    peers: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor] | str] = {
        "torch eager": eager,
        "torch compiled": torch.compile(eager),
        "F.linear_cross_entropy": getattr(F, "linear_cross_entropy", "not in this torch"),
    }
    try:
        from cut_cross_entropy import linear_cross_entropy as cut

        peers["cut-cross-entropy"] = lambda h, w, y: cut(h, w, y, impl="torch_compile")
    except ImportError as error:
        peers["cut-cross-entropy"] = str(error)
    return peers


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_loss_and_gradients(benchmark: Any, shape: tuple[int, int, int], ignored: float) -> None:
    n, d, v = shape[0], shape[1], max(64, shape[2] // SCALE)
    if ignored and shape != SHAPES[1]:
        pytest.skip("ignored labels are measured at one shape")
    inputs = make(n, d, v, ignored)
    hidden, weight = inputs[0].detach(), inputs[1].detach()
    valid = (inputs[2] != -100).float().mean().item()
    e = torch.empty(n, v, dtype=DTYPE)

    def products() -> None:
        torch.mm(hidden, weight.t(), out=e)
        torch.mm(e, weight)
        torch.mm(e.t(), hidden)

    peers: dict[str, Callable[[], Any] | str] = {"three torch.mm": products}
    for name, peer in loss_peers().items():
        peers[name] = peer if isinstance(peer, str) else gradient_step(peer, inputs)
    ours = gradient_step(linear_cross_entropy, inputs)
    ours()
    peak = peak_bytes(ours, inputs)
    compare(
        benchmark, ours, peers, rounds=3 if n * d * v > 1 << 32 else 7,
        case=f"loss, dX, dW {NAME} {[n, d, v]} {1 - valid:.1%} ignored",
        work=[6 * n * d * v * valid / 1e9, "GFLOP"], peak_bytes=peak,
    )  # fmt: skip
    results = benchmark.extra_info["peers"]
    benchmark.extra_info["floor"] = results["three torch.mm"]["seconds"] * valid
    fixed = hidden.numel() * hidden.element_size() + weight.numel() * 4
    benchmark.extra_info["notes"] = {"beyond dX and one fp32 dW": f"{max(0, peak - fixed) / 2**20:.0f} MiB"}
    for name, peer in loss_peers().items():
        if not isinstance(peer, str):
            results[name]["peak_bytes"] = peak_bytes(gradient_step(peer, inputs), inputs)
    if n * v <= 1 << 25:
        wide = exact_gradients(inputs)
        benchmark.extra_info["error"] = gradient_error(ours, inputs, wide)
        results["torch eager"]["error"] = gradient_error(peers["torch eager"], inputs, wide)  # type: ignore[arg-type]


def test_errors_of_gradients(benchmark: Any) -> None:
    n, d, v = 1024, 256, max(64, 16384 // SCALE)
    inputs = make_realistic(n, d, v)
    peers = {k: f if isinstance(f, str) else gradient_step(f, inputs) for k, f in loss_peers().items()}
    ours = gradient_step(linear_cross_entropy, inputs)
    compare(
        benchmark, ours, peers, case=f"gradients of a realistic head {NAME} {[n, d, v]}",
        work=[6 * n * d * v / 1e9, "GFLOP"],
    )  # fmt: skip
    wide = exact_gradients(inputs)
    benchmark.extra_info["error"] = gradient_error(ours, inputs, wide)
    for name, peer in peers.items():
        if not isinstance(peer, str):
            benchmark.extra_info["peers"][name]["error"] = gradient_error(peer, inputs, wide)
    total = torch.zeros(v, d)
    linear_cross_entropy(*inputs, grad_weight_out=total).backward()
    rounded = max(relative(g.to(DTYPE), g) for g in wide)
    benchmark.extra_info["notes"] = {
        "dW before its rounding": f"{relative(total, wide[1]):.1e}", "the exact gradients, rounded": f"{rounded:.1e}",
    }  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores(benchmark: Any, shape: tuple[int, int, int]) -> None:
    n, d, v = shape[0], shape[1], max(64, shape[2] // SCALE)
    hidden, weight, labels = (t.detach() for t in make(n, d, v))
    out = torch.empty(n, v, dtype=DTYPE)

    def eager() -> Tensor:
        return (hidden @ weight.t()).float().log_softmax(1).gather(1, labels[:, None])

    def ours() -> Any:
        return token_logprobs(hidden, weight, labels)

    peers: dict[str, Callable[[], Any] | str] = {
        "torch.mm": lambda: torch.mm(hidden, weight.t(), out=out),
        "torch eager": eager,
    }
    ours()
    peak = peak_bytes(ours)
    scores = compare(
        benchmark, ours, peers, rounds=3 if n * d * v > 1 << 32 else 7, case=f"scores {NAME} {[n, d, v]}",
        work=[2 * n * d * v / 1e9, "GFLOP"], peak_bytes=peak,
    )  # fmt: skip
    results = benchmark.extra_info["peers"]
    benchmark.extra_info["floor"] = results["torch.mm"]["seconds"]
    results["torch eager"]["peak_bytes"] = peak_bytes(eager)
    if n * v <= 1 << 25:
        want = reference.token_logprobs(hidden.double(), weight.double(), labels).logprob
        benchmark.extra_info["error"] = (scores.logprob - want).abs().max().item()
        results["torch eager"]["error"] = (eager()[:, 0] - want).abs().max().item()

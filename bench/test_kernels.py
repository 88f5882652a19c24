"""linear_cross_entropy and token_logprobs beside the matrix products they replace and their peers.

    python -m bench.table kernels                           # the full shapes: some ten minutes on two cores
    DASD_BENCH_SCALE=16 python -m bench.table kernels       # vocabularies 16 times smaller
    DASD_BENCH_DTYPE=bf16 python -m bench.table kernels     # the default where the CPU multiplies bf16, else fp32

The floor of a score is the one torch.mm that makes the logits, of a loss with its gradients the three torch.mm calls
that make logits, dX and dW, timed in the same rounds, times the share of valid tokens. Peak memory is the growth of the
process's resident set in one call from its inputs, gradients included. The error is the largest of logprob (absolute,
scores) or the larger relative error of dX and dW (losses) against float64, where that is quick to compute.
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
from dasd_kernels import linear_cross_entropy, reference, token_logprobs
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


def peak_bytes(f: Callable[[], Any], inputs: tuple[Tensor, ...] = ()) -> int:
    """Growth of the resident set's peak over one call, the gradients of `inputs` included; 0 where the system does not
    tell."""
    for tensor in inputs:
        tensor.grad = None
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return 0
    kilobytes = lambda key: int(status.read_text().split(key + ":")[1].split()[0])  # noqa: E731
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed must not be there to be used
    reset.write_text("5")
    before = kilobytes("VmRSS")
    result = f()
    peak = kilobytes("VmHWM") - before
    del result
    return peak * 1024


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


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
        case=f"loss, dX, dW {NAME} {[n, d, v]} {ignored:.0%} ignored",
        work=[6 * n * d * v * (1 - ignored) / 1e9, "GFLOP"], peak_bytes=peak,
    )  # fmt: skip
    results = benchmark.extra_info["peers"]
    benchmark.extra_info["floor"] = results["three torch.mm"]["seconds"] * (1 - ignored)
    fixed = hidden.numel() * hidden.element_size() + weight.numel() * 4
    benchmark.extra_info["notes"] = {"beyond dX and one fp32 dW": f"{max(0, peak - fixed) / 2**20:.0f} MiB"}
    for name, peer in loss_peers().items():
        if not isinstance(peer, str):
            results[name]["peak_bytes"] = peak_bytes(gradient_step(peer, inputs), inputs)
    if n * v <= 1 << 25:
        wide = (hidden.double().requires_grad_(), weight.double().requires_grad_(), inputs[2])
        reference.linear_cross_entropy(*wide).backward()

        def error(step: Callable[[], Any]) -> float:
            step()
            return max(relative(a.grad, b.grad) for a, b in zip(inputs[:2], wide[:2], strict=True))  # type: ignore[arg-type]

        benchmark.extra_info["error"] = error(ours)
        results["torch eager"]["error"] = error(peers["torch eager"])  # type: ignore[arg-type]


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

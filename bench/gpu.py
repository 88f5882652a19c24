"""Times losses, scores and divergences on a GPU beside the peers and the matrix products they replace.

    python -m bench.gpu [--shape 32768,2560,151936 ...] [--rounds 20] [--out bench/results]

Prints a table and writes it to bench/results/<gpu>.md and .json. Without a GPU it says what it could not measure and
writes nothing; `--device cpu --shape 64,32,1000 --out DIR` runs the same code on a CPU.

Times are medians over the rounds, between CUDA events; in every round all take one turn, after two turns unmeasured.
TFLOP/s are effective: the products that the task needs (6 N D V for a loss with its gradients over the valid tokens,
2 N D V a model for scores) over the time; "x ours" is a time over ours. "floor" is the products alone by cuBLAS, in
bf16. MiB is the peak of a call above its inputs. The error is against float64: the larger relative one of dX and dW,
or the largest absolute one of a score, of the first 512 tokens.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

import dasd_kernels
from bench.gpu_timing import Row, Shape, measure, table
from dasd_kernels import linear_cross_entropy, reference

SHAPES = [(8192, 2560, 151936), (32768, 2560, 151936), (16384, 4096, 128256)]
SUBSET = 512
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), labels)


def eager_logprobs(_: Any, __: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return (hidden @ weight.t()).float().log_softmax(1).gather(1, labels[:, None])[:, 0]


def eager_ratio(th: Tensor, tw: Tensor, sh: Tensor, sw: Tensor, labels: Tensor) -> Tensor:
    return eager_logprobs(0, 0, th, tw, labels) - eager_logprobs(0, 0, sh, sw, labels)


def eager_divergence(th: Tensor, tw: Tensor, sh: Tensor, sw: Tensor, _: Tensor) -> Tensor:
    log_p, log_q = (th @ tw.t()).float().log_softmax(1), (sh @ sw.t()).float().log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


# What is scored: models, ours in dasd_kernels or its reference, plain torch.
SCORES: dict[str, tuple[int, Callable[..., Tensor], Callable[..., Tensor]]] = {
    "token_logprobs": (1, lambda k, th, tw, sh, sw, y: k.token_logprobs(sh, sw, y).logprob, eager_logprobs),
    "log_ratio": (2, lambda k, th, tw, sh, sw, y: k.log_ratio(th, tw, sh, sw, y).log_ratio, eager_ratio),
    "kl_divergence": (2, lambda k, th, tw, sh, sw, y: k.kl_divergence(th, tw, sh, sw).forward, eager_divergence),
}
LOSSES = {"loss, dX, dW": 1, "loss, dX, dW, half ignored": 2}  # every how many-th label counts


def losses(device: str) -> dict[str, Loss | str]:
    """Mean losses of (hidden, weight, labels), or why one is skipped."""
    found: dict[str, Loss | str] = {"ours": linear_cross_entropy, "torch eager": eager}
    found["torch compiled"] = torch.compile(eager)
    found["F.linear_cross_entropy"] = getattr(F, "linear_cross_entropy", "not in this torch")
    names = {
        "Liger": ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
        "Cut Cross-Entropy": ("cut_cross_entropy", "linear_cross_entropy"),
        "QuACK": ("quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
    }
    for name, (module, function) in names.items():
        try:
            found[name] = getattr(__import__(module, fromlist=[function]), function)
        except Exception as missing:  # an installed peer may fail on import without a GPU
            found[name] = f"{type(missing).__name__}: {missing}"
        if device == "cpu" and not isinstance(found[name], str):
            found[name] = "needs a GPU"
    return found


def make(shape: Shape, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    n, d, v = shape
    g = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, device=device, dtype=torch.float32).bfloat16()
    weight = (torch.randn(v, d, generator=g, device=device) * 2 / d**0.5).bfloat16()
    return hidden, weight, torch.randint(0, v, (n,), generator=g, device=device)


def step_of(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    def step() -> tuple[Tensor, Tensor]:
        x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss(x, w, labels).backward()
        assert x.grad is not None and w.grad is not None
        return x.grad, w.grad

    return step


def relative(found: tuple[Tensor, ...], exact: list[Tensor]) -> float:
    """The larger relative error of dX and dW."""
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))


def measure_loss(task: str, shape: Shape, rounds: int, device: str) -> list[Row]:
    n, d, v = shape
    hidden, weight, labels = make(shape, device)
    valid = torch.arange(n, device=device) % LOSSES[task] == 0
    labels, few = labels.where(valid, -100), slice(0, SUBSET)
    leaves = hidden[few].double().requires_grad_(), weight.double().requires_grad_()
    reference.linear_cross_entropy(*leaves, labels[few]).backward()
    exact = [leaf.grad for leaf in leaves if leaf.grad is not None]
    x, e = hidden[valid], torch.empty(int(valid.sum()), v, dtype=hidden.dtype, device=device)

    def floor() -> None:
        torch.mm(x, weight.t(), out=e)
        torch.mm(e, weight)
        torch.mm(e.t(), x)

    calls: dict[str, Callable[[], Any] | str] = {}
    errors: dict[str, Callable[[], float]] = {}
    for name, loss in losses(device).items():
        calls[name] = loss if isinstance(loss, str) else step_of(loss, hidden, weight, labels)
        if not isinstance(loss, str):
            some = step_of(loss, hidden[few], weight, labels[few])
            errors[name] = lambda some=some: relative(some(), exact)  # type: ignore[misc]
    calls["floor: three torch.mm"] = floor
    return measure(task, shape, calls, errors, 6.0 * len(x) * d * v, rounds, device)


@torch.no_grad()
def measure_score(task: str, shape: Shape, rounds: int, device: str) -> list[Row]:
    models, ours, plain = SCORES[task]
    sh, sw, labels = make(shape, device)
    th, tw, _ = make(shape, device, seed=1)
    e, few = torch.empty(len(sh), len(sw), dtype=sh.dtype, device=device), slice(0, SUBSET)
    every, some = (th, tw, sh, sw, labels), (th[few], tw, sh[few], sw, labels[few])
    want = ours(reference, *(t.double() for t in some[:4]), some[4])
    functions: dict[str, Callable[..., Tensor]] = {"ours": partial(ours, dasd_kernels), "torch eager": plain}
    functions["torch compiled"] = torch.compile(plain)
    calls: dict[str, Callable[[], Any] | str] = {who: partial(f, *every) for who, f in functions.items()}
    calls[f"floor: {models} torch.mm"] = lambda: [torch.mm(sh, sw.t(), out=e) for _ in range(models)]
    error = lambda f: (f(*some) - want).abs().max().item()  # noqa: E731
    errors = {who: partial(error, f) for who, f in functions.items()}
    flop = 2.0 * models * shape[0] * shape[1] * shape[2]
    return measure(task, shape, calls, errors, flop, rounds, device)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", help="N,D,V; repeat for several")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    given = [tuple(map(int, text.split(","))) for text in options.shape or ()]
    if any(len(shape) != 3 or min(shape) < 1 for shape in given):
        parser.error("--shape is N,D,V, three positive numbers")
    shapes: list[Shape] = [(s[0], s[1], s[2]) for s in given] or SHAPES
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here: nothing was measured. On one this would time")
        print(
            "\n".join(f"  {task} at N, D, V = {', '.join(map(str, s))}" for s in shapes for task in (*LOSSES, *SCORES))
        )
        for name, peer in losses("cuda").items():
            print(f"peer not installed: {name} ({peer})" if isinstance(peer, str) else f"ready: {name}")
        return
    rows = []
    for shape in shapes:
        for task in (*LOSSES, *SCORES):
            rows += (measure_loss if task in LOSSES else measure_score)(task, shape, options.rounds, device)
    gpu = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    machine = f"{gpu}, torch {torch.__version__}, triton {triton.__version__}, {datetime.date.today().isoformat()}"
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".md")
    shown = table(rows, machine, " ".join((__doc__ or "").split("\n\n")[3].split()))
    path.write_text(shown)
    path.with_suffix(".json").write_text(json.dumps({"machine": machine, "rows": [asdict(r) for r in rows]}, indent=1))
    print(shown)
    print(f"written: {path} and {path.with_suffix('.json')}")


if __name__ == "__main__":
    main()

"""Calls timed by CUDA events, a turn of each in every round, with their memory and error, as rows and as Markdown."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Shape = tuple[int, int, int]


@dataclass
class Row:
    task: str
    shape: Shape
    who: str
    milliseconds: float | None = None  # None: not measured, `why` says why
    tflops: float | None = None
    mib: float | None = None
    error: float | None = None
    why: str = ""


def median_milliseconds(calls: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Each takes a turn a round; two rounds are not counted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 2):
        for name, call in calls.items():
            if device == "cpu":
                begin = time.perf_counter()
                call()
                taken[name].append(1000 * (time.perf_counter() - begin))
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            taken[name].append(start.elapsed_time(end))
    return {name: statistics.median(times[2:]) for name, times in taken.items()}


def peak_mib(call: Callable[[], Any], device: str) -> float | None:
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(
    task: str, shape: Shape, calls: Mapping[str, Callable[[], Any] | str], errors: Mapping[str, Callable[[], float]],
    flop: float, rounds: int, device: str,
) -> list[Row]:  # fmt: skip
    """A call that raises (out of memory, above all) is reported, and left out of the rounds."""
    rows = {name: Row(task, shape, name, why=call if isinstance(call, str) else "") for name, call in calls.items()}
    ready: dict[str, Callable[[], Any]] = {}
    for name, call in calls.items():
        if isinstance(call, str):
            continue
        try:
            call()
            rows[name].mib = peak_mib(call, device)
            rows[name].error = errors[name]() if name in errors else None
            ready[name] = call
        except Exception as failure:
            rows[name].why = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"[:200]
        if device != "cpu":
            torch.cuda.empty_cache()
    for name, milliseconds in median_milliseconds(ready, rounds, device).items():
        rows[name].milliseconds, rows[name].tflops = milliseconds, flop / milliseconds * 1e-9
    return list(rows.values())


def table(rows: list[Row], machine: str, how: str) -> str:
    """Markdown; `how` says how it was measured."""
    show = lambda value, form: "" if value is None else format(value, form)  # noqa: E731
    lines = [f"# {machine}", "", f"`python -m bench.gpu`, bf16. {how}", ""]
    for task, shape in dict.fromkeys((row.task, row.shape) for row in rows):
        lines += [f"## {task}, N, D, V = {', '.join(map(str, shape))}", ""]
        lines += ["| | ms | x ours | TFLOP/s | MiB | error |", "|---|--:|--:|--:|--:|--:|"]
        group = [row for row in rows if (row.task, row.shape) == (task, shape)]
        ours = next((row.milliseconds for row in group if row.who == "ours"), None)
        for row in (row for row in group if row.milliseconds):
            ratio = row.milliseconds / ours if ours and row.milliseconds else None
            cells = [show(v, f) for v, f in ((row.milliseconds, ".3g"), (ratio, ".2f"), (row.tflops, ".3g"),
                                             (row.mib, ".0f"), (row.error, ".1e"))]  # fmt: skip
            lines.append(f"| {' | '.join([row.who, *cells])} |")
        missing = [f"{row.who} ({row.why})" for row in group if row.milliseconds is None]
        lines += ["", *([f"Not measured: {'; '.join(missing)}.", ""] if missing else [])]
    return "\n".join(lines)

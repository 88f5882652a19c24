"""What a run reports: one JSON line a step, TensorBoard when installed, a progress bar or plain lines.

Model FLOPs are counted over real documents: 6 a weight and token for the blocks, 6 a weight and *trained* token for the
head, and 6·layers·heads·head_dim·l² for causal attention over a document of l tokens. Nothing recomputed, padded or
masked counts.
"""

import contextlib
import importlib.util
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from dasd_engine.model import ModelConfig
from dasd_engine.records import replacing

# Dense bf16 peaks of the data sheets, in FLOP/s, by a part of the device's name.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
}


def flop_coefficients(config: ModelConfig) -> tuple[float, float, float]:
    """(c, a, h): FLOPs forward and backward of a document of l tokens, v of them trained, are c·l + a·l² + h·v."""
    c = config
    heads = c.num_attention_heads * c.head_dim
    block = c.hidden_size * (2 * heads + 2 * c.num_key_value_heads * c.head_dim + 3 * c.intermediate_size)
    layers = c.num_hidden_layers
    return 6.0 * layers * block, 6.0 * layers * heads, 6.0 * c.hidden_size * c.vocab_size


def document_flops(config: ModelConfig, lengths: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Model FLOPs of each document, float64 [D], from its tokens and trained tokens (see the module's formula)."""
    c, a, h = flop_coefficients(config)
    length = lengths.astype(np.float64)
    return c * length + a * length**2 + h * trained


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that utilisation is measured against: a GPU's data sheet, else the rate of a matrix product timed here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAKS.items():
            if part in name:
                return peak
    a, b = torch.randn(1024, 512, device=device, dtype=dtype), torch.randn(512, 1024, device=device, dtype=dtype)
    seconds = []
    for _ in range(20):  # the fastest: others may share the machine
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * 1024 * 512 * 1024 / min(seconds)


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held: on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)


def profile(steps: int, path: Path) -> torch.profiler.profile:
    """A started profiler whose `step()` ends a training step: the third to the `steps` + 2nd go into a Chrome trace."""
    profiler = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1),
        on_trace_ready=lambda done: done.export_chrome_trace(str(path)),
    )
    profiler.start()
    return profiler


class MetricsLog:
    """`metrics.jsonl`, one flushed line a step, and TensorBoard events when tensorboard is installed."""

    def __init__(self, out: Path, *, resume_after: int) -> None:
        """Rows of steps after `resume_after` are of work lost with a crash, which is done again: drop them."""
        self.path = out / "metrics.jsonl"
        if self.path.exists():
            rows = [line for line in self.path.read_text().splitlines() if _step_of(line) <= resume_after]
            with replacing(self.path) as file:
                file.writelines(f"{row}\n" for row in rows)
        self._file = self.path.open("a", buffering=1)
        self._failed = False
        self._board: Any = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=resume_after + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Append a step. A failure to write is told once and does not stop the training."""
        try:
            self._file.write(json.dumps(row) + "\n")
            if self._board is not None:
                for key, value in row.items():
                    if isinstance(value, int | float) and key not in ("step", "epoch"):
                        self._board.add_scalar(f"train/{key}", value, row["step"])
        except OSError as error:
            if not self._failed:
                print(f"warning: {self.path.parent}: metrics are not written: {error}", file=sys.stderr, flush=True)
            self._failed = True

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
            if self._board is not None:
                self._board.close()


def _step_of(line: str) -> float:
    """The step of a metrics row; a half-written last line (killed while writing) sorts after every step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Display:
    """Progress for a person: a bar on a terminal, else a line about every `interval` seconds. Silent off rank 0."""

    def __init__(self, is_main: bool, *, interval: float = 5.0) -> None:
        self.console = Console(quiet=not is_main, highlight=False, soft_wrap=True)
        self.interval, self._last = interval, 0.0
        self._bar: Progress | None = None
        self._task: Any = None

    def say(self, text: str = "") -> None:
        self.console.print(text, markup=False)

    @contextlib.contextmanager
    def stage(self, name: str, total: int, done: int) -> Iterator[None]:
        """Show a stage of `total` steps of which `done` are behind us."""
        if not self.console.is_terminal:
            yield
            return
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        ]
        with Progress(*columns, console=self.console) as self._bar:
            self._task = self._bar.add_task(name, total=total, completed=done, note="")
            try:
                yield
            finally:
                self._bar = None

    def step(self, row: dict[str, Any], total: int) -> None:
        note = (
            f"loss {row['loss']:.4f}  norm {row['grad_norm']:.2f}  lr {row['lr']:.1e}  "
            f"{row['tokens_per_s']:,.0f} tok/s  mfu {100 * row['mfu']:.0f}%"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=row["stage_step"], note=note)
        elif time.monotonic() - self._last >= self.interval or row["stage_step"] in (1, total):
            self._last = time.monotonic()
            self.say(f"{row['stage']}  step {row['stage_step']}/{total}  {note}")

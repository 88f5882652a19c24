"""Start-up of a stage on a set of any size: what opening, checking and planning it takes in time and memory.

    python -m bench.data [DOCUMENTS] [--epochs 6] [--sets 4]

Writes shard sets of 1/4 of the documents each to a temporary folder, lengths like those of the released distillation
data (lognormal, mean 16.6 K, up to 65,536), one span a document; the tokens are a sparse file, which nothing here
reads. Then, in this process: opens them, plans every epoch, and reads steps from the middle of the stage. Memory is
what the process holds itself (anonymous), sampled every 10 ms above where it began; maps of files are not counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from bench.lengths import lognormal
from dasd_engine.config import (
    CheckpointOptions,
    EvaluateOptions,
    ModelOptions,
    Recipe,
    RunOptions,
    Stage,
    TrainOptions,
)
from dasd_engine.corpus import Corpus
from dasd_engine.model import ModelConfig
from dasd_engine.plan import plan_stage
from dasd_engine.shards import FORMAT, MANIFEST, OFFSETS, SPANS, TOKENS, VERSION

MODEL = ModelConfig("qwen3", 151936, 2560, 9728, 36, 32, 8, 128)  # a 4B student, whose FLOPs are counted


def write_set(path: Path, documents: int, seed: int) -> None:
    """A shard set whose tokens are all 0 and take no room on the disk."""
    path.mkdir(parents=True)
    with open(path / OFFSETS, "wb") as offsets, open(path / SPANS, "wb") as spans:
        total = trained = 0
        offsets.write(np.zeros(1, dtype="<i8").tobytes())
        for begin in range(0, documents, 1 << 20):
            lengths = lognormal(min(1 << 20, documents - begin), 13_050, 65_536, seed + begin)
            prompt = np.minimum(lengths // 8, 500)
            offsets.write((total + np.cumsum(lengths)).astype("<i8").tobytes())
            rows = np.stack([np.arange(begin, begin + len(lengths)), prompt, lengths], axis=1)
            spans.write(rows.astype("<i4").tobytes())
            total, trained = total + int(lengths.sum()), trained + int((lengths - np.maximum(prompt, 1)).sum())
    with open(path / TOKENS, "wb") as tokens:
        tokens.truncate(4 * total)
    counts = {"documents": documents, "tokens": total, "trained_tokens": trained, "max_token_id": 0}
    files = {name: {"bytes": (path / name).stat().st_size, "sha256": ""} for name in (TOKENS, OFFSETS, SPANS)}
    manifest = {"format": FORMAT, "version": VERSION, "counts": counts, "files": files}
    (path / MANIFEST).write_text(json.dumps(manifest))


class Memory:
    """Context in which `peak` grows to the most anonymous bytes held above the start."""

    def __enter__(self) -> Memory:
        self.start, self.peak, self._stop = self._now(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, self._now() - self.start)

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("documents", nargs="?", type=int, default=10_000_000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--sets", type=int, default=4)
    options = parser.parse_args()
    stage = Stage("size", (), TrainOptions(epochs=options.epochs))
    recipe = Recipe(
        Path(), 0, Path(), ModelOptions(), RunOptions(), CheckpointOptions(), EvaluateOptions(), (stage,)
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for i in range(options.sets):
            write_set(Path(folder) / f"{i:04d}", options.documents // options.sets, i << 32)
        with Memory() as memory:
            start = time.perf_counter()
            corpus = Corpus.open([Path(folder)])
            opened = time.perf_counter()
            plan = plan_stage(recipe, stage, corpus, MODEL, 8)
            planned = time.perf_counter()
            digest = plan.digest
        print(f"{len(corpus):,} documents, {corpus.tokens:,} tokens, {plan.steps:,} steps in {options.epochs} epochs")
        print(f"opened in {opened - start:.2f} s, planned in {planned - opened:.2f} s (plan {digest}), at most "
              f"{memory.peak / 2**20:,.0f} MiB held")  # fmt: skip
        first = plan.epochs[0]
        print(f"fill {first.fill:.3%}, balance {first.balance:.4f} over 8 ranks")
        start, middle = time.perf_counter(), first.num_steps // 2
        for step in range(middle, middle + 20):
            plan.read(0, step, 0, torch.device("cpu"), equal=False)
        print(f"read 20 steps of a rank from the middle in {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()

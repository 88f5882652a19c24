"""Prepare: JSONL of long reasoning to token shards with the Qwen3 tokeniser, as the command, on all cores.

The peer encodes the same responses, already in memory, whole and with all threads of `tokenizers`: no JSON, no
template, no files. Memory is the resident set of all processes together, pages they share counted every time.
The tokeniser is looked up in ../shared/data/qwen3-tokenizer beside the clone; without it the suite is skipped.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from bench.compare import compare

TOKENIZER = Path(__file__).parents[2] / "shared" / "data" / "qwen3-tokenizer"
MEGABYTES = 32
PROSE = [
    sentence.replace("\n", " ")
    for topic in pydoc_data.topics.topics.values()
    for sentence in re.split(r"(?<=[.:]) +|\n\n+", topic)
    if 30 < len(sentence) < 400
]
NAMES = ["Ava", "Liam", "Noor", "Mateo", "Yuki", "Priya", "Chidi", "Ewa", "Olu", "Sofia"]
THINGS = ["apples", "tickets", "tiles", "marbles", "litres", "pages", "minutes", "steps"]


def step(r: random.Random) -> str:
    """A step of a solution: prose, sums, formulas, code. Its numbers are hardly ever the same twice."""
    a, b, c = r.randint(2, 99999), r.randint(2, 999), r.randint(2, 97)
    return r.choice(
        [
            r.choice(PROSE),
            r.choice(PROSE),
            f"So {r.choice(NAMES)} has {a} {r.choice(THINGS)}, and gives away {b} of them: {a} - {b} = {a - b}.",
            f"Let me find $x_{{{c}}} = \\frac{{{a}}}{{{b}}} \\approx {a / b:.4f}$, hence \\(x_{{{c}}} > {a // b}\\).",
            f"Wait, is {a} divisible by {c}? {a} mod {c} = {a % c}, so {'yes' if a % c == 0 else 'no'}.",
            f"Hmm, {a} × {b} = {a * b:,}; check: {a}·{b // 2} + {a}·{b - b // 2} = {a * b:,} ✓.",
            f"- Case {c}: if n ≡ {a % 7} (mod 7) then n² ≡ {(a % 7) ** 2 % 7} (mod 7).",
            f"```python\nvalue_{c} = [{a} * i + {b} for i in range({c})]\nprint(sum(value_{c}))\n```",
        ]
    )


def write_corpus(path: Path, megabytes: float) -> list[str]:
    """JSONL in the released shape, response lengths lognormal as in the released data; returns the responses."""
    r = random.Random(0)
    written, responses = 0, []
    with open(path, "w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            length, thinking = min(r.lognormvariate(10, 0.95), 150_000), ""
            while len(thinking) < length:
                thinking += step(r) + r.choice(["\n\n", "\n", " ", " "])
            responses.append(f"<think>\n{thinking}\n</think>\n\nThe answer is \\boxed{{{r.randint(0, 999)}}}.")
            row = {
                "uuid": str(len(responses)),
                "input": step(r),
                "output": responses[-1],
                "domain": "math",
                "meta": "{}",
            }
            written += file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return responses


def resident(pid: int) -> int:
    """Resident bytes of a process and its children, as Linux counts them."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0
    return 4096 * pages + sum(resident(int(child)) for child in children)


def prepare_command(sources: list[Path], out: Path, peaks: list[int]) -> Callable[[], None]:
    """Runs the command into a fresh directory and notes the peak of its memory."""

    def run() -> None:
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "dasd_engine.prepare", *sources, "--model", TOKENIZER, "--out", out, "--quiet"]
        process = subprocess.Popen([str(part) for part in command])
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.05):
                peaks.append(resident(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        ended.set()
        watcher.join()
        assert code == 0

    return run


@pytest.mark.skipif(not TOKENIZER.exists(), reason="the Qwen3 tokeniser is not on this machine")
@pytest.mark.parametrize("times", [1, 5])
def test_prepare(benchmark: Any, tmp_path: Path, times: int) -> None:
    source, out, peaks = tmp_path / "rows.jsonl", tmp_path / "out", list[int]()
    responses = write_corpus(source, MEGABYTES)
    tokenizer = tokenizers.Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))

    def encode_whole() -> None:
        for begin in range(0, len(responses), 64):
            tokenizer.encode_batch_fast(responses[begin : begin + 64], add_special_tokens=False)

    size = times * source.stat().st_size
    compare(
        benchmark,
        prepare_command([source] * times, out, peaks),
        {"tokenizers alone, whole responses": encode_whole} if times == 1 else {},
        rounds=2 if times == 1 else 1,
        case=f"prepare {size / 1e6:,.0f} MB of JSONL",
        work=[size / 1e6, "MB"],
    )
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    benchmark.extra_info["peak_bytes"] = max(peaks)
    benchmark.extra_info["notes"] = {
        "MB/min": f"{60 * size / 1e6 / benchmark.stats.stats.median:,.0f}",
        "tokens": f"{counts['tokens']:,}",
        "documents": f"{counts['documents']:,}",
    }

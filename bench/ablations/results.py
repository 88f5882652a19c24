"""From the answers of all runs to tables and claims, judged as docs/ablations-plan.md says."""

import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.ablations.arms import CLAIMS, SWEEP, Arm, Claim, Table
from bench.ablations.regimes import Regime, Size
from bench.ablations.worlds import SETS
from dasd_engine.evaluation_report import RESPONSES, read_responses, shares
from dasd_engine.paired import Array, Pair, against, compare, critical
from dasd_engine.problems import final_answer, is_right
from dasd_engine.questions import read_questions
from dasd_engine.records import MANIFEST, read_json, read_rows, write_json

BEGAN = "began.json"


def collect(regimes: Sequence[Regime], out: Path, size: Size) -> dict[str, Any]:
    """Everything that is committed as bench/results/ablations.json."""
    return {
        "command": "python -m bench.ablations", "problems": size.problems,
        "regimes": {regime.name: Measured(regime, out, size).result() for regime in regimes},
    }  # fmt: skip


def begin(regimes: Sequence[Regime], out: Path) -> None:
    """Writes down the commit of what is about to run; a later start of the same does not change it."""
    out.mkdir(parents=True, exist_ok=True)
    began = read_json(out / BEGAN) if (out / BEGAN).exists() else {}
    write_json(out / BEGAN, {regime.name: commit() for regime in regimes} | began)


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


class Measured:
    """The runs of a regime."""

    def __init__(self, regime: Regime, out: Path, size: Size):
        self.regime, self.here, self.size = regime, out / regime.name, size
        there = {(table.name, arm.name) for table in regime.tables for arm in table.arms}
        self.claims = [claim for claim in CLAIMS if {(claim.table, claim.a), (claim.table, claim.b)} <= there]
        self.ids = {
            name: [row["uuid"] for _, row in read_rows(regime.world.data(out) / f"{name}.jsonl")] for name in SETS
        }

    def result(self) -> dict[str, Any]:
        families = {table.name: self.family(table) for table in self.regime.tables}
        for step in self.regime.steps[1:]:
            families[f"sweep-{step}"] = self.family(SWEEP, step)
        return {
            "about": self.regime.about, "commit": read_json(self.here.parent / BEGAN)[self.regime.name],
            "seeds": len(self.seeds()), "rows": self.size.of(self.regime.rows),
            "base": {name: self.base(name) for name in SETS}, "starts": self.starts(), "families": families,
            "claims": [self.claim(claim) for claim in self.claims], "sweep": self.sweep(),
            "teacher": self.teacher(), "mixed_rows": self.mixed_rows(), "seconds": self.seconds(),
        }  # fmt: skip

    # ------------------------------------------------------------------------------------------ what was measured

    def seeds(self, step: int = 0) -> list[Path]:
        return [self.here / (f"s{seed}-{step}" if step else f"s{seed}") for seed in self.regime.students(self.size)]

    def right(self, directories: Sequence[Path], name: str) -> list[list[float]]:
        """Of each directory's evaluation and each problem of a set, the share of right samples."""
        found = [shares(read_responses(directory / RESPONSES)) for directory in directories]
        return [[right[id] for id in self.ids[name]] for right in found]

    def run(self, seed: Path, run: str) -> Path:
        directory = seed / "runs" / run
        return self.run(seed, told["instead"]) if "instead" in (told := read_json(directory / MANIFEST)) else directory

    def tokens(self, seed: Path, arm: Arm) -> int:
        """Of the responses that all its stages are trained on, once each."""
        told = read_json(seed / "runs" / arm.run / MANIFEST)
        return told.get("tokens", 0) + (self.tokens(seed, arm.before) if arm.before else 0)

    def right_ASQ(self, table: Table, name: str, step: int) -> Array:
        return np.array([
            self.right([self.run(seed, arm.run) / "evaluate" for seed in self.seeds(step)], name) for arm in table.arms
        ])  # fmt: skip

    def base(self, name: str, step: int = 0) -> float:
        return float(np.mean(self.right([seed / "base" for seed in self.seeds(step)], name)))

    def starts(self) -> dict[str, list[float]]:
        """Of every seed's student before any run."""
        return {name: np.mean(self.right([seed / "base" for seed in self.seeds()], name), 1).tolist() for name in SETS}

    # ------------------------------------------------------------------------------------------ tables

    def family(self, table: Table, step: int = 0) -> dict[str, Any]:
        names = [arm.name for arm in table.arms]
        tokens = {arm.name: float(np.mean([self.tokens(s, arm) for s in self.seeds(step)])) for arm in table.arms}
        sets = {}
        for name in SETS:
            right_ASQ = self.right_ASQ(table, name, step)
            pairs = against(compare(names, right_ASQ, len(self.regime.tables)), table.reference)
            sets[name] = {
                "base": self.base(name, step),
                "pass_at_1": dict(zip(names, right_ASQ.mean((1, 2)).tolist(), strict=True)),
                "by_seed": dict(zip(names, right_ASQ.mean(2).tolist(), strict=True)),
                "tokens": tokens,
                "pairs": [asdict(pair) for pair in pairs.values()],
            }
        title = f"{table.title}: {step:,} steps" if step else table.title
        return {"title": title, "reference": table.reference, "arms": names, "sets": sets}

    def pair(self, table: Table, a: str, b: str, name: str, step: int = 0) -> Pair:
        """Its variance pools how all runs of the table scatter over seeds."""
        names = [arm.name for arm in table.arms]
        return against(compare(names, self.right_ASQ(table, name, step)), a)[b]

    def claim(self, claim: Claim) -> dict[str, Any]:
        table = next(table for table in self.regime.tables if table.name == claim.table)
        found = {name: narrowed(self.pair(table, claim.a, claim.b, name), len(self.claims)) for name in SETS}
        (low, high), (low_b, high_b) = (found[name]["interval"] for name in SETS)
        verdict = "agrees" if low > 0 else "reversed" if high < 0 else "cannot tell"
        on_b = (low > 0 and low_b > 0) or (high < 0 and high_b < 0)
        return {**asdict(claim), "sets": found, "verdict": verdict, "also_on_B": on_b}

    def sweep(self) -> list[dict[str, Any]]:
        """By level of the students' first training, the contrasts that may turn."""
        first, *others = self.regime.steps
        return [
            {
                "step": step, "set": name, "base": self.base(name, own),
                "random": float(self.right_ASQ(SWEEP, name, own)[0].mean()),
                "above_random": {
                    arm.name: narrowed(self.pair(SWEEP, "random", arm.name, name, own), len(self.regime.steps))
                    for arm in SWEEP.arms[1:]
                },
            }
            for step in sorted(self.regime.steps) if others
            for own in [0 if step == first else step] for name in SETS
        ]  # fmt: skip

    # ------------------------------------------------------------------------------------------ beside

    def teacher(self) -> dict[str, float]:
        """Its share of right answers by temperature, from the candidates."""
        questions = read_questions([str(self.regime.asked(self.here.parent))])
        answers = {question.id: question.answer for question in questions}
        found: dict[str, list[bool]] = {}
        for _, row in read_rows(self.here / "sample" / "candidates.jsonl", without=("token_ids", "logprobs")):
            answer, expected = final_answer(row["text"]), answers[row["id"]]
            right = answer is not None and expected is not None and is_right(answer, expected)
            found.setdefault(f"{row['temperature']:g}", []).append(right)
        return {temperature: sum(right) / len(right) for temperature, right in found.items()}

    def mixed_rows(self) -> dict[str, list[int]]:
        """By choice of rollouts, how many mixed-policy rows each seed has."""
        found: dict[str, list[int]] = {}
        for seed in self.seeds():
            for directory in sorted((seed / "mix").glob("*")):
                path = directory / MANIFEST
                found.setdefault(directory.name, []).append(read_json(path)["counts"]["mixed"] if path.exists() else 0)
        return found

    def seconds(self) -> float:
        return sum(read_json(path).get("wall_seconds", 0.0) for path in self.here.glob("s*/runs/*/" + MANIFEST))


def narrowed(pair: Pair, comparisons: int) -> dict[str, Any]:
    """A difference with an interval of its own, at 1 − 0.05 ÷ comparisons."""
    half = critical(2, pair.df, comparisons) * pair.se
    return {"difference": pair.difference, "interval": [pair.difference - half, pair.difference + half]}

"""What one seed of a regime does: score its candidates by its own student, then every run of the tables.

    OUT/REGIME/sample/               the teacher's candidates, of all seeds
    OUT/REGIME/sSEED[-STEP]/score/   as dasd_engine.score
                           /base/    the evaluation of the student before any run
                           /select/  by rule and temperature
                           /mix/     the mixed-policy rows of a run, by the cap on its rollouts
                           /runs/    recipe, rows, metrics, answers; a run with a manifest.json is not done again
"""

import multiprocessing
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.ablations.arms import SWEEP, Arm, Slice, Table, runs
from bench.ablations.regimes import Regime, Size
from bench.ablations.worlds import SETS
from dasd_engine.bakeoff_arms import count_tokens, extra_rows, within
from dasd_engine.bakeoff_runs import Bench
from dasd_engine.chat import Chat
from dasd_engine.heap import keep_freed_memory
from dasd_engine.mix import NothingMixed, mix
from dasd_engine.mixed_policy import hash_uniform
from dasd_engine.records import MANIFEST, read_json, read_rows, write_json
from dasd_engine.sample import sample
from dasd_engine.score import score

CAPPED = 1.5  # times the teacher's length, as published


def begin_worker() -> None:
    """Ends with the process that began it, also where that is killed: the next start has the directory alone."""
    keep_freed_memory()
    parent = multiprocessing.parent_process()
    assert parent

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def ask_teacher(regime: Regime, out: Path) -> None:
    recipe = regime.distill_recipe(out, regime.seeds[0])
    s = recipe.sample
    sample(
        recipe.questions, recipe.teacher, out / regime.name / "sample", progress=False, candidates=s.candidates,
        temperatures=s.temperatures, top_p=s.top_p, top_k=s.top_k, max_new_tokens=s.max_new_tokens, seed=0,
        system=recipe.system,
    )  # fmt: skip


def measure(regime: Regime, out: Path, seed: int, step: int, size: Size) -> None:
    """What a process of the pool does."""
    SeedRuns(regime, out, seed, step, size).go()


class SeedRuns:
    """The runs of one seed, from the student as it is at `step` of its first training (0: where the regime begins)."""

    def __init__(self, regime: Regime, out: Path, seed: int, step: int, size: Size):
        self.recipe = regime.distill_recipe(out, seed, step)
        here, data = out / regime.name, regime.world.data(out)
        self.out, self.n = here / (f"s{seed}-{step}" if step else f"s{seed}"), size.of(regime.rows)
        self.tables: tuple[Table, ...] = (SWEEP,) if step else regime.tables
        self.bench = Bench(
            self.recipe, self.out, [str(data / f"{name}.jsonl") for name in SETS], len(SETS) * size.problems, 1, True
        )
        self.bench.scores = self.out / "score"
        score(here / "sample", self.recipe.student, self.bench.scores, dtype="fp32", threads=1, quiet=True)
        self.order = self.bench.order([row["uuid"] for _, row in read_rows(regime.asked(out))], 0)
        self.tokenizer = Chat.load(self.recipe.student).tokenizer

    def go(self) -> None:
        done = self.out / MANIFEST
        if done.exists():
            return
        self.bench.evaluate(self.recipe.student, self.out / "base", self.recipe.seed)
        for arm in runs(self.tables):
            print(f"{self.out.name} of {self.out.parent.name}: {arm.run}", flush=True)
            self._extra(arm) if arm.extra else self._stage(arm)
        for directory in (self.out / "runs").iterdir():
            self.bench.drop_weights(directory)
        write_json(done, {"runs": len(runs(self.tables))})

    def _stage(self, arm: Arm) -> None:
        rows, tokens = [], 0
        for part in arm.stages[-1]:
            chosen, of = self._questions(part), self.bench.rows(part.choice, 0)
            rows += of[part.temperature].read(chosen)
            tokens += count_tokens([(0, part.temperature, question) for question in chosen], of)
        self._run(arm, "stage", rows, tokens)

    def _questions(self, part: Slice) -> list[str]:
        """Block `part.block` of those that have a response."""
        found = self.bench.rows(part.choice, 0)[part.temperature].tokens
        usable = [question for question in self.order if question in found]
        return usable[part.block * self.n : (part.block + 1) * self.n]

    def _run(self, arm: Arm, name: str, rows: list[dict[str, Any]], tokens: int, masked: bool = False) -> None:
        options = self.recipe.train["mixed" if arm.extra else "low"]
        start = self._export(arm.before) if arm.before else self.recipe.student
        self.bench.run(self._directory(arm), start, [(name, options, rows)], 0, tokens, masked)

    def _directory(self, arm: Arm) -> Path:
        return self.out / "runs" / arm.run

    def _export(self, arm: Arm) -> Path:
        return self._directory(arm) / read_json(self._directory(arm) / MANIFEST)["export"]

    # ------------------------------------------------------------------------------------------ after stage 2

    def _extra(self, arm: Arm) -> None:
        if (self._directory(arm) / MANIFEST).exists():
            return
        assert arm.before
        own = self._directory(arm.before) / "stage.jsonl"
        try:
            mixed = self._mixed(arm.before, own, CAPPED if arm.extra == "capped" else None)
        except NothingMixed as error:
            # The run it starts from is in its place, as the plan says.
            write_json(self._directory(arm) / MANIFEST, {"instead": arm.before.run, "why": str(error)})
            return
        sets = extra_rows(mixed, own)
        rows = sets["plain" if arm.extra.startswith("plain") else "mixed"]
        if arm.extra == "plain_tokens":
            rows = self._as_many(rows, own, sum(map(self._length, sets["mixed"])))
        self._run(arm, "extra", rows, sum(map(self._length, rows)), arm.extra == "masked")

    def _mixed(self, arm: Arm, own: Path, cap: float | None) -> Path:
        out, options = self.out / "mix" / (arm.run + (f",{cap:g}" if cap else "")), self.recipe.mix
        asked = self.recipe.mix_options()
        if cap:  # few reach it: all are asked
            asked = replace(asked, cap=cap, questions=0)
        mix(own, self._export(arm), self.recipe.teacher, out, options=asked, batch_size=options.batch_size,
            dtype="fp32", quiet=True)  # fmt: skip
        return out / "mixed.jsonl"

    def _length(self, row: dict[str, Any]) -> int:
        return len(self.tokenizer.encode(row["output"]).ids)

    def _as_many(self, rows: list[dict[str, Any]], own: Path, tokens: int) -> list[dict[str, Any]]:
        """Rows of so many tokens: fewer of these, or more of the teacher's own responses behind them."""
        there = {row["uuid"] for row in rows}
        more = sorted(
            (row for _, row in read_rows(own) if row["uuid"] not in there),
            key=lambda row: hash_uniform(self.recipe.seed, row["uuid"], "plain_tokens"),
        )
        rows = [*rows, *more]
        return rows[: within([self._length(row) for row in rows], tokens)]

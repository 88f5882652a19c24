"""The runs of a bake-off: choose rows, train, evaluate. A run with a manifest.json is finished and not done again.

    select/CHOICE-TEMPERATURE[-sSEED]     the rows of a way to choose; `random` draws anew for every seed
    probe                                 a short run whose speed the plan is made from
    runs/sSEED/DESIGN/ARM                 rows, shards, recipe.toml (of dasd_engine.train), metrics, answers
    mix/sSEED                             of the arms with mixed-policy rows

Weights are dropped once a run is evaluated: there would be a hundred of them.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from dasd_engine import distributed
from dasd_engine.bakeoff_arms import (
    DESIGNS,
    HIGH,
    LOW,
    SCHEDULES,
    Arm,
    Choice,
    Group,
    Pick,
    Rows,
    Training,
    count_tokens,
    extra_rows,
    pick,
    shortened,
    stage_rows,
    usable,
    within,
)
from dasd_engine.bakeoff_plan import LEAST_ROWS, Cost
from dasd_engine.chat import Chat
from dasd_engine.config import TrainOptions, load_recipe
from dasd_engine.distill_config import TRAINED, DistillRecipe
from dasd_engine.distill_stages import compute_dtype, launch
from dasd_engine.errors import InputError
from dasd_engine.estimate import CUT_OFF
from dasd_engine.evaluate import evaluate
from dasd_engine.evaluation_report import RESPONSES, EvalReport, read_responses, shares
from dasd_engine.mix import NothingMixed, mix
from dasd_engine.mixed_policy import hash_uniform
from dasd_engine.prepare import prepare
from dasd_engine.records import MANIFEST, read_json, read_rows, write_json, write_rows
from dasd_engine.select import select
from dasd_engine.sources import response_of
from dasd_engine.teachers import TeacherOptions
from dasd_engine.train import train

LEAST_USABLE = 4  # questions: two shares for each of two seeds


@dataclass(frozen=True)
class Base:
    """An evaluation."""

    report: EvalReport
    right: dict[str, float]  # of each problem, the share of right samples
    seconds: float
    tokens: int  # generated


@dataclass(frozen=True)
class Measured:
    """A run."""

    right: dict[str, float]
    tokens: int  # of the student, in the responses it was trained on, once each
    seconds: float


Seed = dict[str, dict[str, Measured]]  # by design and Arm.run
StageRows = tuple[str, TrainOptions, list[dict[str, Any]]]


class Bench:
    """Where the runs of a bake-off are made. `full`: questions of the whole recipe, by which a short run is scaled."""

    scores: Path  # of the candidates: set once they are there

    def __init__(self, recipe: DistillRecipe, out: Path, problems: list[str], development: int, full: int, quiet: bool):
        self.recipe, self.out, self.problems, self.development = recipe, out, problems, development
        self.full, self.quiet = full, quiet
        self.left_out: dict[str, str] = {}  # arms and groups, and why
        self._rows: dict[tuple[Choice, int], dict[str, Rows]] = {}
        self._most = 0  # runs of a seed

    # ------------------------------------------------------------------------------------------ parts of a run

    def evaluate(self, model: Path, out: Path, seed: int) -> Base:
        """As [evaluate] of the recipe says, on the development problems."""
        e, r = self.recipe.evaluate, self.recipe
        options = TeacherOptions(
            path=str(model), dtype=compute_dtype(r) or "auto", batch_size=128, threads=r.run.threads
        )
        (report,) = evaluate(
            options, self.problems, out, progress=False, samples=e.samples, temperatures=(e.temperature,),
            max_new_tokens=e.max_new_tokens, seed=seed, limit=self.development, system=r.system,
        )  # fmt: skip
        manifest = read_json(out / MANIFEST)
        right = shares(read_responses(out / RESPONSES))
        return Base(report, right, manifest["wall_seconds"], manifest["counts"]["tokens"])

    def train(self, directory: Path, training: Training) -> None:
        """In this process where there is one rank: a short run is over before another process has started."""
        path, log = directory / "recipe.toml", directory / "train.log"
        path.write_text(training.recipe(self.recipe), encoding="utf-8")
        if self.recipe.ranks > 1:
            launch(self.recipe, "dasd_engine.train", [str(path)], log)
            return
        loaded = load_recipe(path)
        with (
            open(log, "a", encoding="utf-8") as file,
            contextlib.redirect_stdout(file),
            distributed.start(loaded.run) as world,
        ):
            train(loaded, world)

    def run(
        self, directory: Path, start: Path, stages: Sequence[StageRows], seed: int, tokens: int, masked: bool = False
    ) -> Measured:
        """Train `start` on the rows of each stage and evaluate it, unless that has been done."""
        r, manifest = self.recipe, directory / MANIFEST
        if not manifest.exists():
            began = time.monotonic()
            directory.mkdir(parents=True, exist_ok=True)
            parts = []
            for name, options, rows in stages:
                source, shards = directory / f"{name}.jsonl", directory / f"prepare-{name}"
                write_rows(source, rows)
                prepare([source], r.student, shards, context=options.context, system=r.system, mask_prefix=masked,
                        quiet=True)  # fmt: skip
                parts.append((name, shards, shortened(options, len(rows), self.full)))
            training = Training(start, directory / "train", r.seed + seed, tuple(parts))
            self.train(directory, training)
            steps = sum(row["step_s"] for _, row in read_rows(directory / "train" / "metrics.jsonl"))
            found = self.evaluate(training.export, directory / "evaluate", r.seed + seed)
            seconds = time.monotonic() - began
            write_json(manifest, {
                "rows": [len(rows) for _, _, rows in stages], "tokens": tokens, "pass_at_1": found.report.pass_at_1,
                "wall_seconds": seconds, "step_seconds": steps, "evaluate_seconds": found.seconds,
                "export": str(training.export.relative_to(directory)),
            })  # fmt: skip
        written = read_json(manifest)
        right = shares(read_responses(directory / "evaluate" / RESPONSES))
        return Measured(right, written["tokens"], written["wall_seconds"])

    def drop_weights(self, directory: Path) -> None:
        for name in ("checkpoints", "export"):
            shutil.rmtree(directory / "train" / name, ignore_errors=True)

    # ------------------------------------------------------------------------------------------ rows

    def rows(self, choice: Choice, seed: int) -> dict[str, Rows]:
        """The chosen responses at each temperature. InputError where the filters leave none."""
        seed = seed if choice.rule == "random" else 0
        if (choice, seed) not in self._rows:
            r, found = self.recipe, {}
            for name, temperature in zip((LOW, HIGH), r.sample.temperatures, strict=True):
                filters = r.filters_of(name)
                out = self.out / "select" / f"{choice.name}-{name}{f'-s{seed}' if choice.rule == 'random' else ''}"
                select(
                    self.scores, out, rule=choice.rule, beta=r.select.beta, temperature=temperature, student=r.student,
                    context=filters.context, thinking=filters.thinking, right_only=choice.right_only,
                    repetition=filters.repetition, seed=r.seed + seed, quiet=True,
                )  # fmt: skip
                found[name] = Rows(out / "selected.jsonl")
            self._rows[choice, seed] = found
        return self._rows[choice, seed]

    def order(self, ids: Sequence[str], seed: int) -> list[str]:
        return sorted(ids, key=lambda id: (hash_uniform(self.recipe.seed + seed, id, "bakeoff order"), id))

    def choose(self, groups: Sequence[Group], ids: Sequence[str]) -> list[Group]:
        """Choose by every rule. Right answers only is left out, and told, where too few questions have any."""
        for arm in runs_of(groups):
            optional = arm.name == "right_only"
            try:
                if len(usable(arm, self.rows(arm.choice, 0), ids)) >= LEAST_USABLE:
                    continue
            except InputError:
                if not optional:
                    raise
            if not optional:
                raise InputError(f"{arm.name}: the filters leave responses to fewer than {LEAST_USABLE} questions; see "
                                 f"{self.out / 'select'}/*/dropped.jsonl")  # fmt: skip
            self.left_out[arm.name] = f"fewer than {LEAST_USABLE} questions have a right response at both temperatures"
        return [replace(g, arms=tuple(arm for arm in g.arms if arm.name not in self.left_out)) for g in groups]

    # ------------------------------------------------------------------------------------------ speed

    def probe(self, groups: Sequence[Group], ids: Sequence[str], base: Base) -> tuple[Cost, int]:
        """(what a seed of all arms costs, the most rows of a run), from one short run of the first reference."""
        arms = runs_of(groups)
        first = [arm for arm in arms if not arm.extra]
        rows = {arm.run: self.rows(arm.choice, 0) for arm in arms}
        most = min(len(usable(arm, rows[arm.run], ids)) for arm in first) // 2
        most = max(2, most - most % 2)
        arm, count = first[0], min(LEAST_ROWS, most)
        picks = pick(arm, rows[arm.run], self.order(ids, 0), count)
        directory = self.out / "probe"
        self.run(directory, self.recipe.student, self._stages(arm, picks, rows[arm.run]), 0, 0)
        self.drop_weights(directory)
        told = read_json(directory / MANIFEST)
        trained = self._epoch_tokens(arm, rows[arm.run]) * count
        second = told["step_seconds"] / max(1.0, trained)  # of a token of a response
        once = told["wall_seconds"] - told["step_seconds"]
        per_row = {arm.run: self._epoch_tokens(arm, rows[arm.run]) for arm in first}
        tokens = sum(per_row.values()) + len(first) * min(per_row.values())
        cost = Cost(len(DESIGNS) * len(first) * once, second * tokens)
        if extras := [arm for arm in arms if arm.extra]:
            high = rows[extras[0].run][HIGH].tokens
            length = sum(high.values()) / len(high)
            written = base.seconds / max(1, base.tokens) * length * (self.recipe.mix.cap + CUT_OFF)
            learned = second * length * self.recipe.train["mixed"].epochs * len(DESIGNS) * len(extras)
            # Half of the questions are stage 2's; of the plain and mixed rows together there are about as many.
            cost = Cost(cost.fixed + len(DESIGNS) * len(extras) * once, cost.per_row + (written + learned) / 2)
        return cost, most

    def _epoch_tokens(self, arm: Arm, rows: dict[str, Rows]) -> float:
        """Tokens that a row of a run costs, all epochs together, in the mean."""
        slots = arm.slots
        means = {name: sum(rows[name].tokens.values()) / len(rows[name].tokens) for name in rows}
        return sum(means[t] * self.recipe.train[TRAINED[stage]].epochs for stage, t in slots) / len(slots)

    # ------------------------------------------------------------------------------------------ a seed

    def seconds(self, seed: int) -> float | None:
        """That a seed has taken, None while it is not finished."""
        path = self.out / "runs" / f"s{seed}" / MANIFEST
        return read_json(path)["seconds"] if path.exists() else None

    def seed(self, seed: int, groups: Sequence[Group], ids: Sequence[str], count: int) -> Seed:
        """All runs of a seed: by design and Arm.run."""
        arms = runs_of(groups)
        self._most = len(DESIGNS) * len(arms)  # arms that agree are one run
        found = self._first_runs([arm for arm in arms if not arm.extra], seed, self.order(ids, seed), count)
        extras = [arm for arm in arms if arm.extra]
        if extras and "mix" not in self.left_out:
            for design, more in self._extra_runs(extras, seed).items():
                found[design] |= more
        runs, mixed = self.out / "runs" / f"s{seed}", self.out / "mix" / f"s{seed}" / MANIFEST
        for directory in runs.glob("*/*"):
            self.drop_weights(directory)
        seconds = sum(one.seconds for design in found.values() for one in design.values())
        seconds += read_json(mixed)["wall_seconds"] if mixed.exists() else 0.0
        write_json(runs / MANIFEST, {"seconds": seconds})
        return found

    def _first_runs(self, arms: Sequence[Arm], seed: int, order: list[str], count: int) -> Seed:
        """Rules often agree: arms with the same rows, in whichever design, are one run."""
        arms = sorted(arms, key=lambda arm: not self._keep(arm))  # the reference's is the one that others may be
        rows = {arm.run: self.rows(arm.choice, seed) for arm in arms}
        picks = {arm.run: pick(arm, rows[arm.run], order, count) for arm in arms}
        least = min(count_tokens(picks[arm.run], rows[arm.run]) for arm in arms)
        found: Seed = {design: {} for design in DESIGNS}
        made: dict[str, Measured] = {}
        for design in DESIGNS:
            for arm in arms:
                of = rows[arm.run]
                taken = picks[arm.run] if design == "samples" else pick(arm, of, order, count, least)
                stages, tokens = self._stages(arm, taken, of), count_tokens(taken, of)
                content = _hash(stages)
                if content in made:
                    found[design][arm.run] = replace(made[content], seconds=0.0)
                    continue
                directory = self._begin(seed, design, arm)
                made[content] = found[design][arm.run] = self.run(directory, self.recipe.student, stages, seed, tokens)
                if not (design == "samples" and self._keep(arm)):
                    self.drop_weights(directory)
        return found

    def _stages(self, arm: Arm, picks: Sequence[Pick], rows: dict[str, Rows]) -> list[StageRows]:
        found = stage_rows(arm, picks, rows)
        return [(f"stage{i + 1}", self.recipe.train[TRAINED[i]], part) for i, part in enumerate(found)]

    def _extra_runs(self, arms: Sequence[Arm], seed: int) -> Seed:
        """Behind the reference with equal samples. What mix cannot make is told, and its group left out."""
        start = self._directory(seed, "samples", arms[0].start)
        own, mixed = start / f"stage{len(SCHEDULES[arms[0].schedule])}.jsonl", self.out / "mix" / f"s{seed}"
        options = replace(self.recipe.mix_options(), seed=self.recipe.seed + seed)
        try:
            if not all((self._directory(seed, d, arm) / MANIFEST).exists() for d in DESIGNS for arm in arms):
                export = start / read_json(start / MANIFEST)["export"]
                mix(own, export, self.recipe.teacher, mixed, options=options, batch_size=self.recipe.mix.batch_size,
                    dtype=compute_dtype(self.recipe), quiet=True)  # fmt: skip
        except NothingMixed as error:
            self.left_out["mix"] = str(error)
            return {}
        sets = extra_rows(mixed / "mixed.jsonl", own)
        chat = Chat.load(self.recipe.student)
        length = {id(row): len(chat.tokenizer.encode(response_of(row)).ids) for rows in sets.values() for row in rows}
        least = min(sum(length[id(row)] for row in rows) for rows in sets.values())
        found: Seed = {design: {} for design in DESIGNS}
        for design in DESIGNS:
            for arm in arms:
                rows = _shuffled(sets["plain" if arm.extra == "plain" else "mixed"], options.seed)
                if design == "tokens":
                    rows = rows[: within([length[id(row)] for row in rows], least)]
                directory = self._begin(seed, design, arm)
                export = start / read_json(start / MANIFEST)["export"]
                tokens = sum(length[id(row)] for row in rows)
                stages = [("extra", self.recipe.train["mixed"], rows)]
                found[design][arm.run] = self.run(directory, export, stages, seed, tokens, arm.extra == "masked")
                self.drop_weights(directory)
        return found

    def _directory(self, seed: int, design: str, arm: Arm) -> Path:
        return self.out / "runs" / f"s{seed}" / design / arm.run

    def _keep(self, arm: Arm) -> bool:
        """The reference's weights, which extra stages start from."""
        own = Choice(self.recipe.select.rule, self.recipe.filters.right_only)
        return (arm.choice, arm.schedule) == (own, "low_high")

    def _begin(self, seed: int, design: str, arm: Arm) -> Path:
        directory = self._directory(seed, design, arm)
        if not self.quiet and not (directory / MANIFEST).exists():
            done = sum(1 for _ in directory.parents[1].glob(f"*/*/{MANIFEST}"))
            print(f"seed {seed + 1}, run {done + 1} of at most {self._most}, equal {design}: {arm.run}", flush=True)
        return directory


def runs_of(groups: Sequence[Group]) -> list[Arm]:
    """One arm of each run."""
    return list({arm.run: arm for group in groups for arm in group.arms}.values())


def _hash(stages: Sequence[StageRows]) -> str:
    said = [[(row["uuid"], response_of(row)) for row in rows] for _, _, rows in stages]
    return sha256(json.dumps(said).encode()).hexdigest()


def _shuffled(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    places = [(hash_uniform(seed, str(i), "bakeoff extra"), i) for i in range(len(rows))]
    return [rows[i] for _, i in sorted(places)]

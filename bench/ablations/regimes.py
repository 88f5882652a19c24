"""The world of the ablations, and its regimes: one teacher each, and students that have come more or less far.

    OUT/data/      REGIME.jsonl (questions), A.jsonl, B.jsonl (problems), student.jsonl (what is learnt first)
    OUT/starts/    sSEED: a student's first training; sSEED-STEP: the student at that step of it
    OUT/noisy/     the noisy teacher

It is the quickstart's: sums of two-digit numbers. All of it comes from fixed seeds; reasons: docs/ablations-plan.md.
"""

import contextlib
import importlib
import random
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from bench.ablations.arms import TABLES, Table, only
from dasd_engine import distributed
from dasd_engine.config import load_recipe
from dasd_engine.distill_config import DistillRecipe, load_distill_recipe
from dasd_engine.export import DTYPES, export
from dasd_engine.records import read_rows, write_rows
from dasd_engine.train import train

HERE = Path(__file__).parent
QUICKSTART = HERE.parents[1] / "recipes" / "quickstart"
sys.path.append(str(QUICKSTART))
quickstart = importlib.import_module("make_data")

SETS = {"A": (2, 3), "B": (3,)}  # steps of a problem; the questions have those of A
NOISE = 1.4  # the noisy teacher's T = 1 is the quickstart teacher's T = 1.4


@dataclass(frozen=True)
class Size:
    """What --quick makes smaller."""

    seeds: int = 10  # of a regime, at most
    problems: int = 100  # of each set
    share: float = 1.0  # of questions, of rows, and of what students learn first

    def of(self, count: int) -> int:
        return round(self.share * count)


QUICK = Size(seeds=2, problems=16, share=0.1)


@dataclass(frozen=True)
class Regime:
    """`steps`: of a student's first training. The first is where the ablations begin, the others are the sweep."""

    name: str
    about: str
    steps: tuple[int, ...]
    noisy: bool = False  # its teacher's logits are divided by NOISE
    questions: int = 1000
    rows: int = 300  # of a stage
    epochs: int = 5
    lr: float = 2e-3
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tables: tuple[Table, ...] = TABLES

    def students(self, size: Size) -> tuple[int, ...]:
        return self.seeds[: size.seeds]

    def teacher(self, out: Path) -> Path:
        return (out / "noisy" if self.noisy else QUICKSTART) / "teacher"

    def distill_recipe(self, out: Path, seed: int, step: int = 0) -> DistillRecipe:
        """Of a seed: with its own student, and `seed` as the seed of every draw."""
        recipe = load_distill_recipe(HERE / "recipe.toml", [
            f"seed={seed}",
            f"model.path={start(out, seed, step or self.steps[0]).resolve()}",
            f"teacher.path={self.teacher(out).resolve()}",
            f"train.epochs={self.epochs}",
            f"train.lr={self.lr}",
        ])  # fmt: skip
        questions = str((out / "data" / f"{self.name}.jsonl").resolve())
        return replace(recipe, sample=replace(recipe.sample, questions=(questions,)))


REGIMES = (
    Regime("clean", "a teacher right in nine of ten at T = 1, students whose own way fails", (4000, 1000, 6000, 8000)),
    Regime("noisy", "a teacher that slips at T = 1, students whose own way mostly suffices", (8000, 4000), noisy=True),
    Regime(
        "long", "clean with 3.6 times the training", (4000,), questions=1300, rows=600, epochs=9, lr=3e-3,
        tables=TABLES[:2],
    ),
    Regime(
        "again", "long with ten other students", (4000,), questions=1300, rows=600, epochs=9, lr=3e-3,
        seeds=tuple(range(5, 15)), tables=(
            only(TABLES[0], "low", "high2", "low_high", "high_low", "shuffled"),
            only(TABLES[1], "random", "teacher_count", "longest", "min_count"),
        ),
    ),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------- models


def start(out: Path, seed: int, step: int) -> Path:
    return out / "starts" / f"s{seed}-{step}"


def make_starts(out: Path, seed: int) -> None:
    """A student's first training, recipes/student.toml, and what it is on the way; the seed is of weights and order."""
    steps = {step for regime in REGIMES if seed in regime.seeds for step in regime.steps}
    missing = [step for step in steps if not (start(out, seed, step) / "config.json").exists()]
    if not missing:
        return
    own, data = out / "starts" / f"s{seed}", out / "data" / "student.jsonl"
    recipe = load_recipe(QUICKSTART.parent / "student.toml", [
        f"seed={seed}", f"out={own}", f"stage.0.data={data.resolve()}", 'evaluate.problems=""',
        "checkpoint.every=1000", "checkpoint.keep=20",
    ])  # fmt: skip
    own.mkdir(parents=True, exist_ok=True)
    with (
        open(own / "train.log", "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        distributed.start(recipe.run) as world,
    ):
        train(recipe, world)
    for step in missing:
        export(own, start(out, seed, step), checkpoint=_nearest(own, step), dtype=DTYPES["fp32"])


def _nearest(run: Path, step: int) -> str:
    """The checkpoint at a step; --quick has none so late, and its last one stands for it."""
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    return min(names, key=lambda name: abs(int(name.removeprefix("step-")) - step))


def make_noisy_teacher(out: Path) -> None:
    """The quickstart's, its logits divided by NOISE: the head's input is, by the weights of the last norm."""
    made = out / "noisy" / "teacher"
    if made.exists():
        return
    part = made.with_name("teacher.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(QUICKSTART / "teacher", part)
    weights = load_file(part / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] / NOISE
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    part.rename(made)


# ---------------------------------------------------------------------------------------------- data


def write_data(out: Path, size: Size) -> None:
    """Problems of neither set are in any other file, in whatever words."""
    data, part = out / "data", out / "data.part"
    if data.exists():
        return
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    shipped = {name: [row for _, row in read_rows(QUICKSTART / f"{name}.jsonl")] for name in quickstart.ASKED}
    corpus = list(quickstart.student_rows(random.Random(f"{quickstart.SEED} student"), _expressions()))
    for regime in REGIMES:
        write_rows(part / f"{regime.name}.jsonl", shipped["questions"][: size.of(regime.questions)])
    write_rows(part / "student.jsonl", corpus[: size.of(len(corpus))])
    known = {_numbers(row["input"]) for rows in (*shipped.values(), corpus) for row in rows}
    for name, steps in SETS.items():
        rng, rows = random.Random(f"ablations {name}"), list[dict[str, str]]()
        while len(rows) < size.problems:
            row = quickstart.make_row(quickstart.make_problem(rng, steps))
            if (said := _numbers(row["input"])) not in known:
                known.add(said)
                rows.append(row)
        write_rows(part / f"{name}.jsonl", rows)
    part.rename(data)


def _expressions() -> set[str]:
    """Of all that the quickstart asks, as make_data.py draws it: its corpus keeps away from these."""
    asked: set[str] = set()
    for name, count in quickstart.ASKED.items():
        rng = random.Random(f"{quickstart.SEED} {name}")
        for _ in range(count):
            asked.add(quickstart.draw(rng, asked, quickstart.STEPS).expression)
    return asked


def _numbers(question: str) -> str:
    """Two problems with the same numbers count as the same."""
    return " ".join(re.findall(r"\d+", question))

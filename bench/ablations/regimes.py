"""The two regimes of the ablations: a teacher, five students before distillation, questions, two sets of problems.

    OUT/REGIME/data/      questions.jsonl (the teacher is asked), A.jsonl, B.jsonl (problems), what is learnt first
    OUT/REGIME/teacher/   the teacher, where it is none that ships
    OUT/REGIME/starts/    sSEED: a student's first training; sSEED-STEP: the student at that step of it

All of it comes from fixed seeds. The settings are those of docs/ablations-plan.md, written before any run.
"""

import contextlib
import importlib
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.ablations import pilot_task
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

SETS = ("A", "B")


@dataclass(frozen=True)
class Size:
    """What --quick makes smaller."""

    seeds: int = 5
    problems: int = 120  # of each set
    share: float = 1.0  # of questions, of rows, of what teacher and students learn first

    def of(self, count: int) -> int:
        return round(self.share * count)


QUICK = Size(seeds=2, problems=16, share=0.1)


@dataclass(frozen=True)
class Regime:
    """`steps`: of a student's first training. The first is where the ablations begin, the others are the sweep."""

    name: str
    about: str
    questions: int
    rows: int  # of a stage
    steps: tuple[int, ...]
    write_data: Callable[[Path, Size], None]
    overrides: tuple[str, ...] = ()  # of the students' first training
    recipe: Path = HERE / "pretrain.toml"  # of the same
    shipped: Path | None = None  # the teacher

    def teacher(self, out: Path) -> Path:
        return self.shipped or out / self.name / "teacher" / "export" / "corpus"

    def start(self, out: Path, seed: int, step: int = 0) -> Path:
        return out / self.name / "starts" / f"s{seed}-{step or self.steps[0]}"

    def distill_recipe(self, out: Path, seed: int, step: int = 0) -> DistillRecipe:
        """Of a seed: with its own student, and `seed` as the seed of every draw."""
        here = out / self.name
        recipe = load_distill_recipe(HERE / f"{self.name}.toml", [
            f"seed={seed}",
            f"model.path={self.start(out, seed, step).resolve()}",
            f"teacher.path={self.teacher(out).resolve()}",
        ])  # fmt: skip
        questions = str((here / "data" / "questions.jsonl").resolve())
        return replace(recipe, sample=replace(recipe.sample, questions=(questions,)))


# ---------------------------------------------------------------------------------------------- models


def make_teacher(regime: Regime, out: Path) -> None:
    if not (regime.teacher(out) / "config.json").exists():
        here = out / regime.name
        run(HERE / "pretrain.toml", here / "teacher", here / "data" / "teacher.jsonl", here / "data" / "teacher", 0)


def make_start(regime: Regime, out: Path, seed: int) -> None:
    """A student's first training, and what it is at each of `steps`; the seed decides its weights and its order."""
    missing = [step for step in regime.steps if not (regime.start(out, seed, step) / "config.json").exists()]
    if not missing:
        return
    here, own = out / regime.name, out / regime.name / "starts" / f"s{seed}"
    run(regime.recipe, own, here / "data" / "student.jsonl", here / "data" / "student", seed, regime.overrides)
    for step in missing:
        export(own, regime.start(out, seed, step), checkpoint=nearest(own, step), dtype=DTYPES["fp32"])


def run(recipe: Path, out: Path, data: Path, model: Path, seed: int, overrides: Sequence[str] = ()) -> None:
    """dasd_engine.train, in this process; its output goes into a file beside."""
    options = [f"seed={seed}", f"out={out}", f"model.path={model.resolve()}", f"stage.0.data={data.resolve()}",
               'evaluate.problems=""']  # fmt: skip
    loaded = load_recipe(recipe, [*options, *overrides])
    out.mkdir(parents=True, exist_ok=True)
    with (
        open(out / "train.log", "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        distributed.start(loaded.run) as world,
    ):
        train(loaded, world)


def nearest(run: Path, step: int) -> str:
    """The checkpoint at a step; with --quick there is none so late, and the last one stands for it."""
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    return min(names, key=lambda name: abs(int(name.removeprefix("step-")) - step))


# ---------------------------------------------------------------------------------------------- chance


def write_chance(data: Path, size: Size) -> None:
    """The quickstart's world: its teacher and its questions; problems of neither set are in any other file of it."""
    asked: set[str] = set()
    for name in quickstart.ASKED:
        rows = [row for _, row in read_rows(QUICKSTART / f"{name}.jsonl")]
        asked |= {numbers(row["input"]) for row in rows}
        if name == "questions":
            write_rows(data / "questions.jsonl", rows[: size.of(CHANCE.questions)])
    corpus = list(quickstart.student_rows(random.Random(f"{quickstart.SEED} student"), expressions()))
    write_rows(data / "student.jsonl", corpus[: size.of(len(corpus))])
    asked |= {numbers(row["input"]) for row in corpus}
    for name, lengths in zip(SETS, ((2, 3), (3,)), strict=True):
        rng, rows = random.Random(f"ablations {name}"), []
        while len(rows) < size.problems:
            row = quickstart.make_row(quickstart.make_problem(rng, lengths))
            if (said := numbers(row["input"])) not in asked:
                asked.add(said)
                rows.append(row)
        write_rows(data / f"{name}.jsonl", rows)
    quickstart.write_model(data / "student", quickstart.train_tokenizer(corpus[:4000]), quickstart.STUDENT)


def expressions() -> set[str]:
    """Of all that the quickstart asks, as make_data.py draws it."""
    asked: set[str] = set()
    for name, count in quickstart.ASKED.items():
        rng, drawn = random.Random(f"{quickstart.SEED} {name}"), 0
        while drawn < count:
            asked.add(quickstart.draw(rng, asked, quickstart.STEPS).expression)
            drawn += 1
    return asked


def numbers(question: str) -> str:
    """A problem in whatever words: two with the same numbers count as the same."""
    return " ".join(re.findall(r"\d+", question))


# ---------------------------------------------------------------------------------------------- the pilot's


def write_pilot(data: Path, size: Size) -> None:
    asked: set[str] = set()
    for name, count, lengths in (
        ("questions", size.of(PILOT.questions), (3, 4, 5)), ("A", size.problems, (3, 4, 5)), ("B", size.problems, (5,))
    ):  # fmt: skip
        write_rows(data / f"{name}.jsonl", list(pilot_task.rows(f"pilot {name}", count, lengths, asked, None)))

    def corpus(seed: str, count: int, lengths: tuple[int, ...], habits: pilot_task.Habits) -> list[dict[str, Any]]:
        return list(pilot_task.rows(f"pilot {seed}", size.of(count), lengths, asked, habits))

    teacher = corpus("teacher", 36_000, (1, 2, 3, 4, 5), pilot_task.TEACHER)
    easy = corpus("easy", 8_000, (1, 2), pilot_task.DIRECT)
    student = easy + corpus("mixed", 24_000, (1, 2, 3, 4), pilot_task.TEACHER)
    for name, rows, shape in (
        ("teacher", teacher, {**quickstart.TEACHER, "num_key_value_heads": 4}),
        ("student", student, {**quickstart.STUDENT, "hidden_size": 64, "intermediate_size": 192,
                              "num_attention_heads": 2, "num_key_value_heads": 2}),
    ):  # fmt: skip
        write_rows(data / f"{name}.jsonl", rows)
        quickstart.write_model(data / name, quickstart.train_tokenizer(rows[-4000:]), shape)


# ---------------------------------------------------------------------------------------------- both

CHANCE = Regime(
    "chance",
    "the quickstart's teacher (nine of ten right at T = 1, repairs direct steps), students that know single steps",
    1000,
    320,
    (4000, 1000, 6000, 8000),
    write_chance,
    ("checkpoint.every=1000", "checkpoint.keep=20"),
    QUICKSTART.parent / "student.toml",
    QUICKSTART / "teacher",
)
PILOT = Regime(
    "pilot",
    "the pilot's noisy teacher, and students taught by its like on shorter problems",
    1000,
    480,
    (1_000_000,),  # whenever it ends
    write_pilot,
)
REGIMES = (CHANCE, PILOT)

"""The two worlds of the ablations: what is asked, what is learnt first, and teachers that do not ship.

    ROOT/data/      A.jsonl, B.jsonl (problems), what students (and the pilot's teacher) learn first, questions
    ROOT/starts/    sSEED: a student's first training; sSEED-STEP: the student at that step of it

SUMS is the quickstart's, sums of two-digit numbers; its ROOT is OUT. PILOT is that of pilot_task.py; its ROOT is
OUT/pilot. All of it comes from fixed seeds; reasons: docs/ablations-plan.md.
"""

import contextlib
import importlib
import random
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from bench.ablations import pilot_task
from dasd_engine import distributed
from dasd_engine.config import load_recipe
from dasd_engine.export import DTYPES, export
from dasd_engine.records import read_rows, write_rows
from dasd_engine.train import train

HERE = Path(__file__).parent
RECIPES = HERE.parents[1] / "recipes"
QUICKSTART = RECIPES / "quickstart"
sys.path.append(str(QUICKSTART))
quickstart = importlib.import_module("make_data")

SETS = ("A", "B")
PROBLEMS = 100  # of each
NOISE = 1.4  # the noisy teacher's T = 1 is the quickstart teacher's T = 1.4
END = 10**9  # the step at which a first training ends

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class World:
    """`write(data, share, problems)` fills an empty `data`, `share` of what is learnt first. `recipe`: of a student's
    first training, `options(data)` fills it in."""

    root: str  # under OUT
    write: Callable[[Path, float, int], None]
    make_teachers: Callable[[Path], None]
    recipe: Path
    options: Callable[[Path], list[str]]

    def data(self, out: Path) -> Path:
        return out / self.root / "data"

    def start(self, out: Path, seed: int, step: int) -> Path:
        return out / self.root / "starts" / f"s{seed}-{step}"

    def write_data(self, out: Path, share: float = 1.0, problems: int = PROBLEMS) -> None:
        data = self.data(out)
        part = data.with_name("data.part")
        if data.exists():
            return
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        self.write(part, share, problems)
        part.rename(data)

    def make_starts(self, out: Path, seed: int, steps: Sequence[int]) -> None:
        """A student's first training, and what it is on the way; the seed is of weights and order."""
        missing = [step for step in steps if not (self.start(out, seed, step) / "config.json").exists()]
        if missing:
            own = out / self.root / "starts" / f"s{seed}"
            learn(self.recipe, own, [f"seed={seed}", *self.options(self.data(out).resolve())])
            for step in missing:
                export(own, self.start(out, seed, step), checkpoint=_nearest(own, step), dtype=DTYPES["fp32"])


def learn(recipe: Path, out: Path, options: list[str]) -> None:
    """dasd_engine.train, in this process; what it prints goes into a file."""
    loaded = load_recipe(recipe, [f"out={out}", 'evaluate.problems=""', *options])
    out.mkdir(parents=True, exist_ok=True)
    with (
        open(out / "train.log", "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        distributed.start(loaded.run) as world,
    ):
        train(loaded, world)


def _nearest(run: Path, step: int) -> str:
    """The checkpoint at a step; --quick has none so late, and its last one stands for it."""
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    return min(names, key=lambda name: abs(int(name.removeprefix("step-")) - step))


# ---------------------------------------------------------------------------------------------- sums


def _write_sums(data: Path, share: float, problems: int) -> None:
    """Problems of neither set are in any other file, in whatever words."""
    shipped = {name: [row for _, row in read_rows(QUICKSTART / f"{name}.jsonl")] for name in quickstart.ASKED}
    corpus = list(quickstart.student_rows(random.Random(f"{quickstart.SEED} student"), _expressions()))
    write_rows(data / "questions.jsonl", shipped["questions"])
    write_rows(data / "student.jsonl", corpus[: round(share * len(corpus))])
    known = {_numbers(row["input"]) for rows in (*shipped.values(), corpus) for row in rows}
    for name, steps in zip(SETS, ((2, 3), (3,)), strict=True):
        rng, rows = random.Random(f"ablations {name}"), Rows()
        while len(rows) < problems:
            row = quickstart.make_row(quickstart.make_problem(rng, steps))
            if (said := _numbers(row["input"])) not in known:
                known.add(said)
                rows.append(row)
        write_rows(data / f"{name}.jsonl", rows)


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


def _sums_options(data: Path) -> list[str]:
    return [f"stage.0.data={data / 'student.jsonl'}", "checkpoint.every=1000", "checkpoint.keep=20"]


SUMS = World("", _write_sums, make_noisy_teacher, RECIPES / "student.toml", _sums_options)


# ---------------------------------------------------------------------------------------------- the pilot's


def _write_pilot(data: Path, share: float, problems: int) -> None:
    asked: set[str] = set()
    like = (3, 4, 5)
    asking = {"dev": (100, like), "questions": (1800, like), "A": (problems, like), "B": (problems, (5,))}
    for name, (count, steps) in asking.items():
        write_rows(data / f"{name}.jsonl", list(pilot_task.rows(f"pilot {name}", count, steps, asked, None)))
    learnt = {
        "teacher": (72_000, (1, 2, 3, 4, 5), pilot_task.TEACHER),
        "easy": (30_000, (1, 2), pilot_task.DIRECT),
        "mixed": (66_000, (1, 2, 3, 4), pilot_task.TEACHER),
    }
    for name, (count, steps, habits) in learnt.items():
        rows = list(pilot_task.rows(f"pilot {name}", round(share * count), steps, asked, habits))
        write_rows(data / f"{name}.jsonl", rows)
        if name != "easy":
            shape = {"teacher": pilot_task.TEACHER_SHAPE, "mixed": pilot_task.STUDENT_SHAPE}[name]
            quickstart.write_model(data / name, quickstart.train_tokenizer(rows[-4000:]), shape)


def pilot_teacher(out: Path) -> Path:
    return out / "pilot" / "teacher"


def make_pilot_teacher(out: Path) -> None:
    made, own, data = pilot_teacher(out), out / "pilot" / "teacher-run", PILOT.data(out).resolve() / "teacher"
    if not (made / "config.json").exists():
        learn(HERE / "pilot_teacher.toml", own, [f"model.path={data}", f"stage.0.data={data}.jsonl"])
        export(own, made, checkpoint=_nearest(own, END), dtype=DTYPES["fp32"])


def _pilot_options(data: Path) -> list[str]:
    stages = (f"stage.{i}.data={data / name}.jsonl" for i, name in enumerate(("easy", "mixed")))
    return [f"model.path={data / 'mixed'}", *stages]


PILOT = World("pilot", _write_pilot, make_pilot_teacher, HERE / "pilot_student.toml", _pilot_options)

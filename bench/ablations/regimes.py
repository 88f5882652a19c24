"""The regimes of the ablations: a teacher, students that have come more or less far in a world, and how they train."""

from dataclasses import dataclass, replace
from pathlib import Path

from bench.ablations.arms import TABLES, Table, only
from bench.ablations.worlds import END, PILOT, PROBLEMS, QUICKSTART, SUMS, World, pilot_teacher
from dasd_engine.distill_config import DistillRecipe, load_distill_recipe
from dasd_engine.records import read_rows, write_rows

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Size:
    """What --quick makes smaller."""

    seeds: int = 10  # of a regime, at most
    problems: int = PROBLEMS  # of each set
    share: float = 1.0  # of questions, of rows, and of what is learnt first

    def of(self, count: int) -> int:
        return round(self.share * count)


QUICK = Size(seeds=2, problems=16, share=0.1)
AS_PILOT = (
    "train.packs_per_step=3", "train.epochs=4", "train.lr=1e-3", "train.min_lr=2e-4", "mixed.min_lr=6e-5",
    "mix.questions=293",
)  # fmt: skip
LONG = ("train.epochs=9", "train.lr=3e-3", "mix.questions=220")


@dataclass(frozen=True)
class Regime:
    """`steps`: of a student's first training. The first is where the ablations begin, the others are the sweep."""

    name: str
    about: str
    steps: tuple[int, ...]
    noisy: bool = False  # its teacher's logits are divided by NOISE
    world: World = SUMS
    questions: int = 1000
    rows: int = 300  # of a stage
    options: tuple[str, ...] = ()  # of recipe.toml
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tables: tuple[Table, ...] = TABLES

    def students(self, size: Size) -> tuple[int, ...]:
        return self.seeds[: size.seeds]

    def asked(self, out: Path) -> Path:
        """Its questions, once written."""
        return self.world.data(out) / f"{self.name}.jsonl"

    def write_data(self, out: Path, size: Size) -> None:
        self.world.write_data(out, size.share, size.problems)
        if not self.asked(out).exists():
            rows = [row for _, row in read_rows(self.world.data(out) / "questions.jsonl")]
            write_rows(self.asked(out), rows[: size.of(self.questions)])

    def teacher(self, out: Path) -> Path:
        if self.world == PILOT:
            return pilot_teacher(out)
        return (out / "noisy" if self.noisy else QUICKSTART) / "teacher"

    def distill_recipe(self, out: Path, seed: int, step: int = 0) -> DistillRecipe:
        """Of a seed: with its own student, and `seed` as the seed of every draw."""
        recipe = load_distill_recipe(HERE / "recipe.toml", [
            f"seed={seed}",
            f"model.path={self.world.start(out, seed, step or self.steps[0]).resolve()}",
            f"teacher.path={self.teacher(out).resolve()}",
            *self.options,
        ])  # fmt: skip
        return replace(recipe, sample=replace(recipe.sample, questions=(str(self.asked(out).resolve()),)))


_LATE = ("mix", "parts")  # tables of what comes behind a first stage
REGIMES = (
    Regime("clean", "a teacher right in nine of ten at T = 1, students whose own way fails", (4000, 1000, 6000, 8000)),
    Regime("noisy", "a teacher that slips at T = 1, students whose own way mostly suffices", (8000, 4000), noisy=True),
    Regime(
        "long", "clean with 3.6 times the training", (4000,), questions=1300, rows=600, options=LONG, tables=TABLES[:2],
    ),
    Regime(
        "again", "long with ten other students", (4000,), questions=1300, rows=600, options=LONG,
        seeds=tuple(range(5, 15)), tables=(
            only(TABLES[0], "low", "high2", "low_high", "high_low", "shuffled"),
            only(TABLES[1], "random", "teacher_count", "longest", "min_count"),
        ),
    ),
    Regime(
        "late", "what comes behind a first stage, with the training of long", (4000,), questions=1300, rows=600,
        options=LONG, tables=tuple(table for table in TABLES if table.name in _LATE),
    ),
    Regime(
        "pilot", "the pilot's task, teacher, students and training", (END,), world=PILOT, questions=1800, rows=800,
        options=AS_PILOT,
    ),
    Regime(
        "pilot_again", "pilot with other students, which have learnt to add", (END,), world=PILOT, questions=1800,
        rows=800, options=AS_PILOT, seeds=(6, 8, 10), tables=(  # of 5 to 10 those that can add, as the plan says
            only(TABLES[0], "low", "high", "high2", "low_high"),
            only(TABLES[1], "random", "teacher_count", "longest", "shortest", "min_count", "right_only"),
            only(TABLES[2], "random", "teacher_count", "min_count"),
        ),
    ),
)  # fmt: skip


def make_starts(out: Path, world: World, seed: int) -> None:
    """A student after each of the steps that some regime of its world needs."""
    own = [regime for regime in REGIMES if regime.world == world and seed in regime.seeds]
    world.make_starts(out, seed, sorted({step for regime in own for step in regime.steps}))

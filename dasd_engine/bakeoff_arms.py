"""The arms of a bake-off: the recipe with one thing changed, which rows each trains on, what to paste to take it.

| group | arms | reference |
|---|---|---|
| `rules` | every rule of selection.RULES, and the recipe's with right answers only | the recipe's rule |
| `temperatures` | low, high, low then high, high then low, both shuffled | low then high |
| `mix` | behind the reference's run: nothing, plain extra rows, mixed-policy rows, these, prefix masked | plain |

All arms of a seed see the same questions in the same order. Two stages share them: the first half for the first stage.
With equal samples all have the same number of rows, with equal tokens as many of these rows, in that order, as the arm
with the fewest tokens of the student has tokens. A plain extra set is the mixed one in which the teacher's own response
to a question stands in place of a mixed-policy one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from dasd_engine.config import TrainOptions
from dasd_engine.distill_config import DistillRecipe
from dasd_engine.distill_stages import toml_keys, toml_value
from dasd_engine.errors import InputError
from dasd_engine.records import read_rows
from dasd_engine.selection import RULES

GROUPS = ("rules", "temperatures", "mix")
DESIGNS = ("samples", "tokens")
LOW, HIGH = "low", "high"
SCHEDULES = {
    "low": ((LOW,),), "high": ((HIGH,),), "low_high": ((LOW,), (HIGH,)), "high_low": ((HIGH,), (LOW,)),
    "shuffled": ((LOW, HIGH),),
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """How a question's response is chosen."""

    rule: str
    right_only: bool

    @property
    def name(self) -> str:
        return self.rule + ("-right_only" if self.right_only else "")


@dataclass(frozen=True)
class Arm:
    """`schedule`: a key of SCHEDULES, whose value has the temperatures of each stage. `extra`: "plain", "mixed" or
    "masked": one more stage behind the run of the arm that is the same without it."""

    name: str
    choice: Choice
    schedule: str = "low_high"
    extra: str = ""

    @property
    def run(self) -> str:
        """Arms of two groups that are the same run have the same."""
        return ".".join(part for part in (self.choice.name, self.schedule, self.extra) if part)

    @property
    def slots(self) -> list[tuple[int, str]]:
        """(stage, temperature) of each share of the questions."""
        return [(i, t) for i, stage in enumerate(SCHEDULES[self.schedule]) for t in stage]

    @property
    def start(self) -> "Arm":
        """The arm behind whose run this one's extra stage comes."""
        return replace(self, extra="")


@dataclass(frozen=True)
class Group:
    name: str
    reference: str
    arms: tuple[Arm, ...]


def make_groups(recipe: DistillRecipe, wanted: Sequence[str], answers: bool) -> list[Group]:
    """`answers`: whether those of the training questions are known. InputError for a group that is none."""
    for name in wanted:
        if name not in GROUPS:
            raise InputError(f"--arms {name}: must be some of {','.join(GROUPS)}")
    own = Choice(recipe.select.rule, recipe.filters.right_only)
    rules = [Arm(rule, Choice(rule, own.right_only)) for rule in RULES]
    if answers and not own.right_only:
        rules.append(Arm("right_only", Choice(own.rule, True)))
    extras = {"none": "", "plain": "plain", "mixed": "mixed", "masked": "masked"}
    found = {
        "rules": Group("rules", own.rule, tuple(rules)),
        "temperatures": Group("temperatures", "low_high", tuple(Arm(name, own, name) for name in SCHEDULES)),
        "mix": Group("mix", "plain", tuple(Arm(name, own, extra=extra) for name, extra in extras.items())),
    }
    return [found[name] for name in GROUPS if name in wanted]


# ---------------------------------------------------------------------------------------------- rows


class Rows:
    """A selected.jsonl by question: the student's tokens of each row; its text is read when asked for."""

    def __init__(self, path: Path):
        self.path = path
        self.tokens: dict[str, int] = {}
        self._places: dict[str, int] = {}
        place = 0
        with open(path, "rb") as file:
            for line in file:
                row = json.loads(line)
                self.tokens[row["uuid"]] = json.loads(row["meta"])["student_tokens"]
                self._places[row["uuid"]] = place
                place += len(line)

    def read(self, questions: Sequence[str]) -> list[dict[str, Any]]:
        with open(self.path, "rb") as file:
            found = []
            for question in questions:
                file.seek(self._places[question])
                found.append(json.loads(file.readline()))
        return found


Pick = tuple[int, str, str]  # stage, temperature, question


def usable(arm: Arm, rows: Mapping[str, Rows], order: Sequence[str]) -> list[str]:
    """The questions that have a response at each temperature of the arm."""
    temperatures = {temperature for _, temperature in arm.slots}
    return [question for question in order if all(question in rows[t].tokens for t in temperatures)]


def pick(arm: Arm, rows: Mapping[str, Rows], order: Sequence[str], count: int, tokens: int | None = None) -> list[Pick]:
    """The first `count` questions' rows, in turn from each share; those before `tokens` are exceeded, where given."""
    slots = arm.slots
    size, questions = count // len(slots), usable(arm, rows, order)
    picks = [
        (stage, temperature, questions[share * size + i])
        for i in range(size) for share, (stage, temperature) in enumerate(slots)
    ]  # fmt: skip
    return picks if tokens is None else picks[: within([rows[t].tokens[q] for _, t, q in picks], tokens)]


def within(lengths: Sequence[int], tokens: int) -> int:
    """How many of them, from the first, have no more than so many tokens together."""
    return sum(total <= tokens for total in accumulate(lengths))


def count_tokens(picks: Sequence[Pick], rows: Mapping[str, Rows]) -> int:
    return sum(rows[temperature].tokens[question] for _, temperature, question in picks)


def stage_rows(arm: Arm, picks: Sequence[Pick], rows: Mapping[str, Rows]) -> list[list[dict[str, Any]]]:
    """The rows of each stage of training."""
    stages: list[list[dict[str, Any]]] = [[] for _ in SCHEDULES[arm.schedule]]
    for stage, temperature in arm.slots:
        stages[stage] += rows[temperature].read([q for s, t, q in picks if (s, t) == (stage, temperature)])
    return stages


def extra_rows(mixed: Path, own: Path) -> dict[str, list[dict[str, Any]]]:
    """{"mixed": the rows of a mixed.jsonl, "plain": `own` responses to the same questions}, in the same order."""
    rows = [row for _, row in read_rows(mixed)]
    responses = {row["uuid"]: row for _, row in read_rows(own)}
    return {"mixed": rows, "plain": [responses[row["uuid"]] if "prefix" in row else row for row in rows]}


# ---------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Training:
    """One run of dasd_engine.train: a stage is its name, its shards and its options."""

    student: Path
    out: Path
    seed: int
    stages: tuple[tuple[str, Path, TrainOptions], ...]

    def recipe(self, recipe: DistillRecipe) -> str:
        """The TOML text, by absolute paths; it runs alone too."""
        lines = toml_keys({"seed": self.seed, "out": str(self.out.resolve())})
        model = {"path": str(self.student.resolve()), "init": "pretrained"}
        for section, table in (
            ("model", model), ("run", asdict(recipe.run)), ("checkpoint", asdict(recipe.checkpoint))
        ):  # fmt: skip
            lines += ["", f"[{section}]", *toml_keys(table)]
        for name, data, options in self.stages:
            lines += ["", "[[stage]]", *toml_keys({"name": name, "data": str(data.resolve()), **asdict(options)})]
        return "\n".join(lines) + "\n"

    @property
    def export(self) -> Path:
        return self.out / "export" / self.stages[-1][0]


def shortened(options: TrainOptions, rows: int, of: int) -> TrainOptions:
    """Packs a step in proportion to the rows, so that a short run has about as many steps as the whole one."""
    return replace(options, packs_per_step=max(1, round(options.packs_per_step * rows / max(rows, of))))


def paste(group: Group, best: str, recipe: DistillRecipe) -> str:
    """The recipe lines that take an arm; where distill has no key for it, the recipe of train that does."""
    arm = next(arm for arm in group.arms if arm.name == best)
    if group.name == "rules":
        right = "\n[filters]\nright_only = true\n" if arm.choice.right_only != recipe.filters.right_only else ""
        return f"[select]\nrule = {toml_value(arm.choice.rule)}\n{right}"
    if group.name == "mix":
        return {
            "none": "[mix]\nenabled = false\n",
            "plain": "[mix]\nenabled = false  # more of the teacher's own responses did better\n",
            "mixed": "[mix]\nenabled = true\nmasked = false\n",
            "masked": "[mix]\nenabled = true\nmasked = true\n",
        }[best]
    if best == "low_high":
        low, high = recipe.sample.temperatures
        return f"[sample]\ntemperatures = [{low:g}, {high:g}]\n"
    head = (
        f"# distill trains low, then high. For {best}:\n"
        f"# python -m dasd_engine.distill {recipe.path} --until prepare-high\n# and then these stages"
        " in a recipe of dasd_engine.train, with distill's [model], [train] and [run]\n"
    )
    return head + "".join(
        f"[[stage]]\nname = {toml_value('_'.join(stage))}\n"
        f"data = {toml_value([str((recipe.out / f'prepare-{t}').resolve()) for t in stage])}\n"
        for stage in SCHEDULES[best]
    )

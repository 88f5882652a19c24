"""The arms of the ablations and the tables they stand in, as data: docs/ablations-plan.md in Python."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dasd_engine.bakeoff_arms import HIGH, LOW, Choice


@dataclass(frozen=True)
class Slice:
    """Responses to block `block` of a seed's questions, each of n."""

    choice: Choice
    temperature: str
    block: int

    @property
    def name(self) -> str:
        return f"{self.choice.name}-{self.temperature}-{self.block}"


Stage = tuple[Slice, ...]


@dataclass(frozen=True)
class Arm:
    """Stages of training from a seed's start. `extra`: one more behind them, a key of EXTRAS."""

    name: str
    stages: tuple[Stage, ...]
    extra: str = ""

    @property
    def run(self) -> str:
        """Arms of two tables that are the same run have the same."""
        stages = ["+".join(part.name for part in stage) for stage in self.stages]
        return ",".join([*stages, self.extra] if self.extra else stages)

    @property
    def before(self) -> "Arm | None":
        """The arm whose weights the last stage starts from, None for the seed's start."""
        if self.extra:
            return Arm(self.name, self.stages)
        return Arm(self.name, self.stages[:-1]) if len(self.stages) > 1 else None


EXTRAS = ("plain", "plain_tokens", "unmasked", "masked", "capped")


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    reference: str
    arms: tuple[Arm, ...]


RANDOM, DAS = Choice("random", False), Choice("teacher_count", False)
RULES = (
    RANDOM, DAS, Choice("ratio", False), Choice("longest", False), Choice("shortest", False),
    Choice("min_count", False), Choice("count_minus_length", False), Choice("random", True),
    Choice("token_matched", False),
)  # fmt: skip


def schedules(choice: Choice) -> dict[str, tuple[Stage, ...]]:
    low, high = ((Slice(choice, t, 0), Slice(choice, t, 1)) for t in (LOW, HIGH))
    return {
        "low": ((low[0],),), "high": ((high[0],),), "high2": (high,), "low_high": ((low[0],), (high[1],)),
        "high_low": ((high[0],), (low[1],)), "shuffled": ((low[0], high[1]),),
    }  # fmt: skip


def _rules(temperature: str) -> tuple[Arm, ...]:
    return tuple(
        Arm("right_only" if choice.right_only else choice.rule, ((Slice(choice, temperature, 0),),)) for choice in RULES
    )


_BEHIND, _DAS = schedules(RANDOM)["low_high"], schedules(DAS)
TABLES = (
    Table("temperature", "Temperatures, random responses", "low_high",
          tuple(Arm(name, stages) for name, stages in schedules(RANDOM).items())),
    Table("rules-low", "Selection rules at T = 0.6", "random", _rules(LOW)),
    Table("rules-high", "Selection rules at T = 1.0", "random", _rules(HIGH)),
    Table("mix", "After stage 2", "plain", (Arm("none", _BEHIND), *(Arm(extra, _BEHIND, extra) for extra in EXTRAS))),
    Table("parts", "The whole pipeline, less one part each", "full", (
        Arm("full", _DAS["low_high"], "unmasked"), Arm("less_selection", _BEHIND, "unmasked"),
        Arm("less_schedule", _DAS["high2"], "unmasked"), Arm("less_mix", _DAS["low_high"]),
    )),
)  # fmt: skip


def only(table: Table, *names: str) -> Table:
    return replace(table, arms=tuple(arm for arm in table.arms if arm.name in names))


SWEEP = Table("sweep", "Starts after more or less training", "random", tuple(
    [arm for arm in _rules(LOW) if arm.name in ("random", "teacher_count", "min_count")]
    + [Arm("high", schedules(RANDOM)["high"])]
))  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """That arm `b` is above arm `a` of a table; `published`: the figures behind it."""

    said: str
    table: str
    a: str
    b: str
    published: str


CLAIMS = (
    Claim("high temperature beats low", "temperature", "low", "high", "+1.4/+4.2"),
    Claim("twice as much of it is better", "temperature", "high", "high2", "0.0/+2.8"),
    Claim("low, then high beats as much of high", "temperature", "high2", "low_high", "+2.1/+2.4"),
    Claim("divergence-aware beats random, T = 0.6", "rules-low", "random", "teacher_count", "+1.6/+2.3"),
    Claim("divergence-aware beats random, T = 1.0", "rules-high", "random", "teacher_count", "+1.9/+3.1"),
    Claim("loss on the student's part too", "mix", "masked", "unmasked", "+2.5/+2.5"),
    Claim("mixed policy helps after stage 2", "mix", "none", "unmasked", "0.0/+0.6"),
    Claim("selection helps the whole", "parts", "less_selection", "full", "none"),
    Claim("the schedule helps the whole", "parts", "less_schedule", "full", "none"),
    Claim("the mixed policy helps the whole", "parts", "less_mix", "full", "+0.8/+0.3"),
)


def runs(tables: tuple[Table, ...]) -> list[Arm]:
    """Every run that the tables need, those that others start from first; one arm stands for those that share it."""

    def needed(arm: Arm) -> Iterator[Arm]:
        if arm.before:
            yield from needed(arm.before)
        yield arm

    return list({arm.run: arm for table in tables for wanted in table.arms for arm in needed(wanted)}.values())

"""What a bake-off can do inside its budget, from measured speed. Pure functions, but for the clock's file.

Rules, all ours: at least LEAST_SEEDS seeds, or there is no interval worth the name. Rows come first: as many as those
seeds leave time for, up to half of the questions there are, so that seeds draw different ones. Then seeds, up to
MOST_SEEDS. RESERVE of what is left is planned, for speed is measured on little. The runs go seed by seed; a seed is
begun only if the mean of those before it still fits, from LEAST_SEEDS on. No arm is dropped early.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dasd_engine.errors import InputError
from dasd_engine.records import read_json, write_json

LEAST_SEEDS, MOST_SEEDS = 3, 8
LEAST_ROWS = 64  # of a run, unless there are not so many
RESERVE = 0.9


@dataclass(frozen=True)
class Cost:
    """Seconds of one seed of all arms: `fixed` + `per_row` · rows."""

    fixed: float
    per_row: float

    def seconds(self, rows: int) -> float:
        return self.fixed + self.per_row * rows


@dataclass(frozen=True)
class Plan:
    rows: int  # of every run with equal samples
    seeds: int
    seconds: float  # of all seeds


def make_plan(cost: Cost, budget: float, spent: float, most_rows: int) -> Plan:
    """InputError, with the budget that is needed, where LEAST_SEEDS seeds of few rows do not fit."""
    left = RESERVE * (budget - spent)
    least = min(LEAST_ROWS, most_rows)
    fewest = LEAST_SEEDS * cost.seconds(least)
    if fewest > left:
        raise too_small(budget, spent + fewest / RESERVE, f"{LEAST_SEEDS} seeds of {least} rows")
    rows = most_rows
    if LEAST_SEEDS * cost.seconds(most_rows) > left:
        rows = max(least, int((left / LEAST_SEEDS - cost.fixed) / cost.per_row))
    rows -= rows % 2  # two shares of equal size
    seeds = min(MOST_SEEDS, int(left / cost.seconds(rows))) if cost.seconds(rows) else MOST_SEEDS
    return Plan(rows, max(LEAST_SEEDS, seeds), max(LEAST_SEEDS, seeds) * cost.seconds(rows))


def too_small(budget: float, needed: float, what: str) -> InputError:
    # Rounded up to what a person would type.
    minutes = int(needed / 60) + 1
    return InputError(
        f"--budget {duration(budget)}: too small for any comparison; {what} of these arms need about {minutes}m: give "
        "--budget that much, or fewer --arms, or fewer problems (--development)"
    )


def fits(done: Sequence[float], budget: float, spent: float) -> bool:
    """Whether another seed may begin, when those `done` took so many seconds each."""
    return len(done) < LEAST_SEEDS or spent + sum(done) / len(done) <= budget


_BUDGET = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


def parse_budget(text: str) -> float:
    """Seconds of 2h, 90m, 1h30m or 45s."""
    match = _BUDGET.fullmatch(text.strip())
    hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match else (0.0, 0.0, 0.0)
    total = 3600 * hours + 60 * minutes + seconds
    if not total:
        raise InputError(f"--budget {text!r}: write a time such as 2h, 90m or 1h30m")
    return total


def duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f}s" if minutes < 1 else f"{minutes:.1f}m" if minutes < 60 else f"{minutes / 60:.1f}h"


class Clock:
    """Seconds that the bake-off has taken over all its starts, up to what was last saved of an earlier one."""

    def __init__(self, path: Path):
        self.path = path
        self.before = read_json(path)["seconds"] if path.exists() else 0.0
        self._started = time.monotonic()

    @property
    def spent(self) -> float:
        return self.before + time.monotonic() - self._started

    def save(self) -> None:
        write_json(self.path, {"seconds": round(self.spent, 3)})

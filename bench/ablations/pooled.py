"""The exploratory estimates of docs/ablations.md: two regimes that differ in their students alone, taken together.

    python -m bench.ablations.pooled [OUT]        of the directories that `python -m bench.ablations --out OUT` has left

Each interval is a difference's own, at 95 %: no test, since the second regime was planned after the first was seen.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.ablations.regimes import REGIMES, Size
from bench.ablations.results import Measured, narrowed
from bench.ablations.tables import difference
from bench.ablations.worlds import SETS
from dasd_engine.errors import run_cli
from dasd_engine.paired import Array, against, compare

CAN_ADD = [0, 3, 4]  # of the students of `pilot`
POOLS = (("long", "again", slice(None)), ("pilot", "pilot_again", CAN_ADD))


def pooled(
    out: Path, first: str, second: str, of_first: slice | list[int]
) -> Iterator[tuple[str, str, list[str], Array]]:
    """(table, set, arms of both, share of right samples [arms, students, problems])"""
    a, b = (Measured(next(r for r in REGIMES if r.name == name), out, Size()) for name in (first, second))
    for table in b.regime.tables:
        whole = next(other for other in a.regime.tables if other.name == table.name)
        names, all_names = ([arm.name for arm in one.arms] for one in (table, whole))
        for name in SETS:
            right_ASQ = a.right_ASQ(whole, name, 0)[[all_names.index(arm) for arm in names]][:, of_first]
            yield table.name, name, names, np.concatenate([right_ASQ, b.right_ASQ(table, name, 0)], axis=1)


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/ablations")
    for first, second, of_first in POOLS:
        for table, name, names, right_ASQ in pooled(out, first, second, of_first):
            print(f"\n{first} and {second}, {right_ASQ.shape[1]} students, {table}, set {name}")
            pairs = compare(names, right_ASQ)
            for i, reference in enumerate(names):
                for arm in names[i + 1 :]:
                    print(f"  {arm} above {reference}: {difference(narrowed(against(pairs, reference)[arm], 1))}")


if __name__ == "__main__":
    run_cli(main)

"""What a bake-off prints: the plan before it, the comparisons and what to paste after it."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from dasd_engine.bakeoff_arms import Group
from dasd_engine.bakeoff_plan import Plan, duration
from dasd_engine.comparisons import Comparison, of_bakeoff, points
from dasd_engine.evaluation_report import EvalReport, percent, print_table
from dasd_engine.paired import POWER


def print_plan(
    groups: Sequence[Group], plan: Plan, base: EvalReport, planned: dict[str, float], budget: float, spent: float
) -> None:  # fmt: skip
    print(f"the student before training: {percent(base.pass_at_1)} of {base.count:,} development problems")
    print(
        f"plan: {plan.seeds} seeds, {plan.rows:,} rows a run, with equal samples and with equal tokens: about "
        f"{duration(plan.seconds)}, after {duration(spent)} so far, of {duration(budget)}"
    )
    for group in groups:
        arms = ", ".join(arm.name for arm in group.arms if arm.name != group.reference)
        print(f"  {group.name}: {arms}; beside {group.reference}")
        print(f"    a difference of {points(planned[group.name])} will be seen with {POWER:.0%} probability")
    print("  to see less: more questions with answers (problems), a longer --budget (seeds), fewer --arms")
    print("  no arm is dropped early; 95 % is for all intervals together", flush=True)


def print_result(result: dict[str, Any]) -> None:
    """`result`: what result.json holds."""
    print(
        f"{result['seeds']} seeds on {result['problems']:,} development problems, {duration(result['spent'])}; before "
        f"training {percent(result['base'])}"
    )
    if result["seeds"] < result["plan"]["seeds"]:
        print(f"the plan had {result['plan']['seeds']} seeds; another would have passed the budget")
    for comparison in of_bakeoff(result):
        _print_comparison(comparison)
        for line in comparison.said:
            print(f"  {line}")
    for name, reason in result["left_out"].items():
        print(f"left out: {name}: {reason}")
    print("\nrecipe lines:\n" + result["paste"])


def _print_comparison(comparison: Comparison) -> None:
    table = Table(title=f"{comparison.title}, 95 % for all intervals together", title_justify="left")
    table.add_column("arm")
    for one in comparison.series:
        for column in (f"{one.name}: pass@1", "difference", "interval", "tokens"):
            table.add_column(column, justify="right")
    for arm in comparison.arms:
        cells = []
        for one in comparison.series:
            difference, low, high = map(_signed, one.against.get(arm, (0.0, 0.0, 0.0)))
            above = [difference, f"{low} – {high}"] if arm in one.against else ["", ""]
            cells += [percent(one.pass_at_1[arm]), *above, f"{one.tokens[arm]:,.0f}"]
        table.add_row(arm, *cells)
    print_table(table)


def _signed(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f}"  # no −0.0

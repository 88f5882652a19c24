"""What a bake-off prints: the plan before it, the comparisons and what to paste after it."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dasd_engine.bakeoff_arms import DESIGNS, Group
from dasd_engine.bakeoff_plan import Plan, duration
from dasd_engine.comparisons import of_bakeoff, points
from dasd_engine.evaluation_report import EvalReport, percent
from dasd_engine.paired import POWER, Pair, against


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
    for (name, group), comparison in zip(result["groups"].items(), of_bakeoff(result), strict=True):
        _print_group(name, group)
        for line in comparison.said:
            print(f"  {line}")
    for name, reason in result["left_out"].items():
        print(f"left out: {name}: {reason}")
    print("\nrecipe lines:\n" + result["paste"])


def _print_group(name: str, group: dict[str, Any]) -> None:
    reference = group["reference"]
    table = Table(title=f"{name}: above {reference}, 95 % for all intervals together", title_justify="left")
    table.add_column("arm")
    for design in DESIGNS:
        for column in (f"equal {design}: pass@1", "difference", "interval", "tokens"):
            table.add_column(column, justify="right")
    found = {
        design: against([Pair(**{**pair, "interval": tuple(pair["interval"])}) for pair in pairs], reference)
        for design, pairs in group["pairs"].items()
    }
    for arm in group["pass_at_1"][DESIGNS[0]]:
        cells = []
        for design in DESIGNS:
            pair = found[design].get(arm)
            cells += [percent(group["pass_at_1"][design][arm])]
            cells += [_signed(pair.difference), _range(pair.interval)] if pair else ["", ""]
            cells += [f"{group['tokens'][design][arm]:,.0f}"]
        table.add_row(arm, *cells)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)  # a log has no width


def _range(interval: tuple[float, float]) -> str:
    return " – ".join(map(_signed, interval))


def _signed(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f}"  # no −0.0

"""What was compared with what, and what is said of it: read from the results of a bake-off or of the ablations.

    result.json of dasd_engine.bakeoff     a comparison for each group, with equal samples and with equal tokens
    bench/results/ablations.json           {"regimes": {NAME: {"about", "families": {FAMILY: {"title", "reference",
        "arms": [names], "sets": {SET: {"pass_at_1": {arm: mean}, "tokens": {arm: mean}, "pairs": [{"a", "b",
        "difference", "interval"}, ...]}}}}}}}: a comparison for each family, on each set of problems

`report` shows them, `forest` draws them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Difference = tuple[float, float, float]  # of pass@1, and the ends of its interval


@dataclass(frozen=True)
class Series:
    """One design, or one set of problems. By arm; the reference has no difference."""

    name: str
    pass_at_1: dict[str, float]
    tokens: dict[str, float]  # trained on
    against: dict[str, Difference]  # above the reference


@dataclass(frozen=True)
class Comparison:
    """`name` is for files. `said`: the verdict, and what could be seen, in words."""

    name: str
    title: str
    reference: str
    arms: list[str]
    series: list[Series]
    said: list[str]


def of_bakeoff(result: dict[str, Any]) -> list[Comparison]:
    """`result`: what result.json holds. KeyError or TypeError where it is none."""
    return [
        Comparison(f"bakeoff-{name}", name, group["reference"], *_arms(group, "equal "), said(group))
        for name, group in result["groups"].items()
    ]


def _arms(group: dict[str, Any], word: str) -> tuple[list[str], list[Series]]:
    series = [
        Series(word + name, group["pass_at_1"][name], group["tokens"][name], _against(pairs, group["reference"]))
        for name, pairs in group["pairs"].items()
    ]
    return list(series[0].pass_at_1), series


def of_ablations(results: dict[str, Any]) -> list[Comparison]:
    """`results`: what bench/results/ablations.json holds. KeyError or TypeError where it is none."""
    found = []
    for regime, value in results["regimes"].items():
        for name, family in value["families"].items():
            reference, arms = family["reference"], family["arms"]
            series = [
                Series(f"set {key}", one["pass_at_1"], one["tokens"], _against(one["pairs"], reference))
                for key, one in family["sets"].items()
            ]
            title = f"{regime}: {family['title']}"
            found.append(Comparison(f"{regime}-{name}", title, reference, arms, series, told(reference, arms, series)))
    return found


def _against(pairs: Sequence[dict[str, Any]], reference: str) -> dict[str, Difference]:
    """As `paired.against`, of pairs as they were written."""
    found: dict[str, Difference] = {}
    for pair in pairs:
        difference, (low, high) = pair["difference"], pair["interval"]
        if pair["a"] == reference:
            found[pair["b"]] = difference, low, high
        elif pair["b"] == reference:
            found[pair["a"]] = -difference, -high, -low
    return found


# ---------------------------------------------------------------------------------------------- in words


def said(group: dict[str, Any]) -> list[str]:
    """A bake-off's verdict on a group."""
    verdict, reference, seen = group["verdict"], group["reference"], group["detectable"]
    if verdict["best"] is None:
        lines = ["cannot tell"]
    elif verdict["best"] == reference:
        lines = [f"take {reference}: it is better than every other arm"]
    else:
        lines = [f"take {verdict['best']}: better than {reference} with equal samples and with equal tokens"]
        if alike := [arm for arm in verdict["alike"] if arm != reference]:
            lines.append(f"not told apart from it: {', '.join(alike)}")
    if verdict["partly"]:
        lines.append(f"better with equal samples or with equal tokens, not both: {', '.join(verdict['partly'])}")
    if verdict["worse"] and verdict["best"] != reference:
        lines.append(f"worse than {reference} in both: {', '.join(verdict['worse'])}")
    worst = max(seen["measured"].values())
    lines.append(f"could see a difference of {points(worst)} (planned {points(seen['planned'])})")
    return lines


def told(reference: str, arms: Sequence[str], series: Sequence[Series]) -> list[str]:
    """Which arms' intervals lie above 0 and which below, in all series or in one alone."""
    names = " and ".join(one.name for one in series)
    above, below = (
        {arm: [one.name for one in series if arm in one.against and sign * one.against[arm][end] > 0] for arm in arms}
        for sign, end in ((1, 1), (-1, 2))
    )
    lines = []
    for word, found in (("better", above), ("worse", below)):
        if everywhere := [arm for arm, where in found.items() if len(where) == len(series)]:
            lines.append(f"{word} than {reference} on {names}: {', '.join(everywhere)}")
        if some := [f"{arm} ({', '.join(w)})" for arm, w in found.items() if 0 < len(w) < len(series)]:
            lines.append(f"{word} on one alone: {', '.join(some)}")
    if rest := [arm for arm in arms if arm != reference and not above[arm] and not below[arm]]:
        lines.append(f"not told apart from {reference}: {', '.join(rest)}")
    return lines


def points(share: float) -> str:
    return f"{100 * share:.1f} points"

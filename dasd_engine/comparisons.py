"""What was compared with what, and what is said of it: read from the results of a bake-off or of the ablations.

    result.json of dasd_engine.bakeoff     a comparison for each group, with equal samples and with equal tokens
    bench/results/ablations.json           {"regimes": {NAME: {"about", "families": {FAMILY: {"title", "reference",
        "arms": [names], "sets": {SET: {"base": mean, "pass_at_1": {arm: mean}, "tokens": {arm: mean},
        "pairs": [{"a", "b", "difference", "interval"}, ...]}}},
        "claims": [{"said", "verdict", "sets": {SET: {"difference", "interval"}}}],
        "sweep": [{"set", "step", "base", "above_random": {arm: {"difference", "interval"}}}]}}}: a comparison for each
        family, on each set of problems; one for the claims and one a set for the sweep, where there are some

`report` shows them, `forest` draws them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dasd_engine.evaluation_report import percent

Difference = tuple[float, float, float]  # of pass@1, and the ends of its interval


@dataclass(frozen=True)
class Series:
    """One design, or one set of problems. By arm; the reference has no difference."""

    name: str
    against: dict[str, Difference]  # above the reference
    pass_at_1: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)  # trained on


@dataclass(frozen=True)
class Comparison:
    """`name` is for files. `said`: the verdict, and what could be seen, in words."""

    name: str
    title: str
    arms: list[str]
    series: list[Series]
    said: list[str]


def of_bakeoff(result: dict[str, Any]) -> list[Comparison]:
    """`result`: what result.json holds. KeyError or TypeError where it is none."""
    found = []
    for name, group in result["groups"].items():
        pass_at_1, tokens, reference = group["pass_at_1"], group["tokens"], group["reference"]
        series = [
            Series(f"equal {design}", _against(pairs, reference), pass_at_1[design], tokens[design])
            for design, pairs in group["pairs"].items()
        ]
        arms, base = list(series[0].pass_at_1), {one.name: result["base"] for one in series}
        words = said(group) + harmed(base, series)
        found.append(Comparison(f"bakeoff-{name}", f"{name}: above {reference}", arms, series, words))
    return found


def of_ablations(results: dict[str, Any]) -> list[Comparison]:
    """`results`: what bench/results/ablations.json holds. KeyError or TypeError where it is none."""
    found = []
    for regime, value in results["regimes"].items():
        if claims := value.get("claims"):
            found.append(_claims(regime, claims))
        for name, family in value["families"].items():
            reference, arms = family["reference"], family["arms"]
            series = [
                Series(f"set {key}", _against(one["pairs"], reference), one["pass_at_1"], one["tokens"])
                for key, one in family["sets"].items()
            ]
            title = f"{regime}: {family['title']}: above {reference}"
            base = {f"set {key}": one["base"] for key, one in family["sets"].items()}
            words = told(reference, arms, series) + harmed(base, series)
            found.append(Comparison(f"{regime}-{name}", title, arms, series, words))
        found += _sweep(regime, value.get("sweep", []))
    return found


def _claims(regime: str, claims: Sequence[dict[str, Any]]) -> Comparison:
    series = [
        Series(f"set {key}", {claim["said"]: _difference(claim["sets"][key]) for claim in claims})
        for key in claims[0]["sets"]
    ]
    verdicts: dict[str, list[str]] = {}
    for claim in claims:
        verdicts.setdefault(claim["verdict"], []).append(claim["said"])
    words = [f"{verdict}: {'; '.join(found)}" for verdict, found in verdicts.items()]
    return Comparison(f"{regime}-claims", f"{regime}: the claims", [claim["said"] for claim in claims], series, words)


def _sweep(regime: str, levels: Sequence[dict[str, Any]]) -> list[Comparison]:
    """Of each set of problems, what arms are above `random` for students that start better and better."""
    found = []
    for key in dict.fromkeys(level["set"] for level in levels):
        rows = {f"{v['step']:,} steps, {percent(v['base'])}": v["above_random"] for v in levels if v["set"] == key}
        arms = list(next(iter(rows.values())))
        series = [Series(arm, {row: _difference(above[arm]) for row, above in rows.items()}) for arm in arms]
        title = f"{regime}: above random, by where the students start, set {key}"
        found.append(Comparison(f"{regime}-sweep-{key}", title, list(rows), series, []))
    return found


def _difference(value: dict[str, Any]) -> Difference:
    low, high = value["interval"]
    return value["difference"], low, high


def _against(pairs: Sequence[dict[str, Any]], reference: str) -> dict[str, Difference]:
    """As `paired.against`, of pairs as they were written."""
    found: dict[str, Difference] = {}
    for pair in pairs:
        difference, low, high = _difference(pair)
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
    worst, planned = max(seen["measured"].values()), f"(planned {points(seen['planned'])})"
    same = "all arms gave the same answers, so what could be seen is not known"
    lines.append(f"could see a difference of {points(worst)} {planned}" if worst else f"{same} {planned}")
    return lines


def harmed(base: Mapping[str, float], series: Sequence[Series]) -> list[str]:
    """That no arm's training has helped: the best of them is then the one that harms least.

    `base`: by series, the pass@1 of the students before training.
    """
    worse = [f"{percent(base[s.name])}, {s.name}" for s in series if max(s.pass_at_1.values()) < base[s.name]]
    if not worse:
        return []
    return [f"every arm ends below the students before training ({'; '.join(worse)}): what is compared is how much "
            "each harms, not how much it helps"]  # fmt: skip


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

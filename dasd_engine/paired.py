"""Arms compared on the same questions and seeds: intervals, recommendation, and the difference that can be seen.

What was measured is right_ASQ [arms, seeds, questions]: of each question, the share of an arm's samples that are right.
All arms have the same questions, and a seed is the same draw of training questions for all, so that arms are compared
by differences. The model is a two-way one with both questions and seeds random (the quasi-F of Clark, 1973):

    right = arm + seed + question + seed·question + (arm·seed) + (arm·question) + (arm·seed·question)

in which the parts in brackets do not cancel in a difference of two arms. Its variance is estimated as

    V = variance over questions of the pair's difference, averaged over seeds, ÷ questions
      + 2 · (variance of arm·seed, pooled over all arms, what its answers scatter taken out) ÷ seeds

with Satterthwaite's degrees of freedom. Resampling questions alone, as `evaluate --compare` does for two given models,
would leave out the second line: what another seed would have given. It is pooled because three to ten seeds are too few
for a variance of each pair; so it is assumed that all arms scatter alike over seeds.

An interval is difference ± q/√2 · √V, q the point of the studentized range (Tukey, 1953) over the arms of a group, at
1 − 0.05 ÷ (number of groups and designs looked at, Bonferroni). So in 95 of 100 bake-offs every interval printed holds.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
ERROR = 0.05  # share of bake-offs in which an interval may miss
POWER = 0.8
_DRAWS = 200_000  # of the studentized range; its point at 95 % is then right to 0.3 %
_RUNS = 20_000  # drawn to plan with


@dataclass(frozen=True)
class Pair:
    """Arm `b` above arm `a`."""

    a: str
    b: str
    difference: float
    interval: tuple[float, float]  # simultaneous with those of all other pairs
    se: float
    df: float


@dataclass(frozen=True)
class Spread:
    """Standard deviations of an arm's share of right answers beside what it has in common with other arms."""

    seed: float  # of a run's mean
    question: float  # of a question's, over any number of seeds
    answer: float  # of one question under one seed: its samples are few


def compare(names: Sequence[str], right_ASQ: Array, families: int = 1) -> list[Pair]:
    """All pairs of arms. `families`: how many such sets of pairs are looked at together.

    ValueError for fewer than 2 arms, 2 seeds or 2 questions.
    """
    arms, seeds, questions = right_ASQ.shape
    if len(names) != arms or min(arms, seeds, questions) < 2:
        raise ValueError(f"{len(names)} names and shares of shape {right_ASQ.shape}: at least 2 of each are needed")
    mean_AQ, mean_A = right_ASQ.mean(1), right_ASQ.mean((1, 2))
    distinct_ASQ = _distinct(right_ASQ)
    runs = max(2, len(distinct_ASQ))
    seed_ms, answer_ms = _mean_squares(distinct_ASQ) if len(distinct_ASQ) > 1 else (0.0, 0.0)
    pairs = []
    for i, j in combinations(range(arms), 2):
        by_question = float((mean_AQ[j] - mean_AQ[i]).var(ddof=1)) / questions
        variance, df = _variance(by_question, seed_ms, answer_ms / questions, runs, seeds, questions)
        difference, se = float(mean_A[j] - mean_A[i]), math.sqrt(variance)
        half = critical(arms, df, families) * se
        pairs.append(Pair(names[i], names[j], difference, (difference - half, difference + half), se, float(df)))
    return pairs


def spread(right_ASQ: Array) -> Spread:
    """As measured; a variance that comes out negative is none."""
    distinct_ASQ = _distinct(right_ASQ)
    if len(distinct_ASQ) < 2:
        return Spread(0.0, 0.0, 0.0)
    _, seeds, questions = distinct_ASQ.shape
    seed_ms, answer_ms = _mean_squares(distinct_ASQ)
    by_question = _interaction(distinct_ASQ.mean(1))
    return Spread(
        math.sqrt(max(0.0, seed_ms - answer_ms / questions)),
        math.sqrt(max(0.0, by_question - answer_ms / seeds)),
        math.sqrt(answer_ms),
    )


def _distinct(right_ASQ: Array) -> Array:
    """Without the arms that are another's runs, as rules often agree: a copy says nothing of how runs scatter."""
    return np.stack(list({arm.tobytes(): arm for arm in right_ASQ}.values()))


def _mean_squares(right_ASQ: Array) -> tuple[float, float]:
    """Mean squares of arm·seed (of means over questions) and of arm·seed·question. Their expectations are
    σ²(arm·seed) + σ²(answer) ÷ questions, and σ²(answer)."""
    _, seeds, questions = right_ASQ.shape
    residual = right_ASQ - right_ASQ.mean(0)
    residual = residual - residual.mean(1, keepdims=True)
    residual = residual - residual.mean(2, keepdims=True)
    answer = float((residual**2).sum()) / ((len(right_ASQ) - 1) * (seeds - 1) * (questions - 1))
    return _interaction(right_ASQ.mean(2)), answer


def _interaction(mean_AX: Array) -> float:
    """Mean square of what arm and X do not explain by themselves."""
    residual = mean_AX - mean_AX.mean(0)
    residual = residual - residual.mean(1, keepdims=True)
    return float((residual**2).sum()) / ((mean_AX.shape[0] - 1) * (mean_AX.shape[1] - 1))


def _variance(
    by_question: Any, seed_ms: Any, answer: Any, arms: int, seeds: int, questions: int
) -> tuple[Any, Any]:  # fmt: skip
    """(variance of a pair's difference, Satterthwaite's degrees of freedom), of numbers or of arrays of them.

    `answer` (of a run's mean) is in both of the others, so it is taken out once. A difference of estimates may come out
    far too small, so half of the questions' part always stays. The half is ours: with all of it, intervals of runs that
    hardly scatter hold in 99 of 100 simulated bake-offs instead of 95 to 96; with half of it, in those of no size tried
    fewer than 94. Its degrees of freedom may come out near 0 as well, and the interval without end: they are never
    fewer than those of the part that has fewest.
    """
    free = (arms - 1) * (seeds - 1)
    seed, twice = 2 * seed_ms / seeds, 2 * answer / seeds
    variance = np.maximum(by_question + seed - twice, by_question / 2)
    parts = by_question**2 / (questions - 1) + seed**2 / free + twice**2 / (free * (questions - 1))
    df = np.maximum(variance**2 / np.maximum(parts, np.finfo(float).tiny), min(free, questions - 1))
    return variance, df * (parts > 0)


def critical(arms: int, df: float, families: int = 1) -> float:
    """Standard errors to either side of a difference, for all pairs of `arms` together."""
    return studentized_range(arms, max(1, round(min(df, 1000))), 1 - ERROR / families) / math.sqrt(2)


def _criticals(arms: int, df: Array, families: int) -> Array:
    """`critical` of many: between some degrees of freedom nearly a line over 1 ÷ df, which it rounds."""
    some = np.array([1000, 120, 60, 30, 20, 14, 10, 8, 6, 5, 4, 3, 2, 1])
    return np.interp(1 / np.maximum(np.round(df), 1), 1 / some, [critical(arms, one, families) for one in some])


@functools.cache
def studentized_range(arms: int, df: int, level: float) -> float:
    """The point below which (largest − smallest of `arms` normal numbers) ÷ s lies with probability `level`; s² is an
    independent estimate of their variance with `df` degrees of freedom. By simulation, always the same draws."""
    scale = np.sqrt(2 * np.random.default_rng(1).standard_gamma(df / 2, _DRAWS) / df)
    return float(np.quantile(_ranges(arms) / scale, level))


@functools.cache
def _ranges(arms: int) -> Array:
    draws = np.random.default_rng(0).standard_normal((_DRAWS, arms))
    return draws.max(1) - draws.min(1)


# ---------------------------------------------------------------------------------------------- power


def expected_spread(pass_at_1: float, samples: int) -> Spread:
    """What to plan with before any run, from the student's pass@1 before training; all of it ours.

    p (1 − p) is the variance of one answer, p kept within 0.2 and 0.8, as students end elsewhere than they began. Half
    of it is within questions (divided by `samples`), a tenth is how arms differ by question. Seeds scatter a run by
    1.5 points, as in our pilot.
    """
    p = min(max(pass_at_1, 0.2), 0.8)
    one = p * (1 - p)
    return Spread(seed=0.015, question=math.sqrt(0.1 * one), answer=math.sqrt(0.5 * one / samples))


def detectable(s: Spread, arms: int, seeds: int, questions: int, families: int = 1) -> float:
    """The true difference of two arms whose interval leaves out 0 with probability POWER.

    The interval's width is an estimate too, and with few arms and seeds a poor one: reckoned with the width that is
    expected, 80 % of two arms and three seeds are 61 to 74 % when simulated. So its mean squares are drawn (χ², always
    the same draws), and the difference found that exceeds half-width and error together with that probability.
    """
    rng = np.random.default_rng(2)
    by_question, answer = 2 * (s.question**2 + s.answer**2 / seeds) / questions, s.answer**2 / questions
    free = (arms - 1) * (seeds - 1)

    def drawn(expected: float, df: int) -> Array:
        return expected * rng.standard_gamma(df / 2, _RUNS) / (df / 2)

    found = drawn(by_question, questions - 1), drawn(s.seed**2 + answer, free), drawn(answer, free * (questions - 1))
    variance, df = _variance(*found, arms, seeds, questions)
    half = _criticals(arms, df, families) * np.sqrt(variance)
    error = math.sqrt(by_question + 2 * s.seed**2 / seeds) * rng.standard_normal(_RUNS)
    return float(np.quantile(half + error, POWER))


# ---------------------------------------------------------------------------------------------- what to take


@dataclass(frozen=True)
class Verdict:
    """`best`: the arm to take, None for "cannot tell". `alike`: arms that are not told from it, in any design.

    `partly`: arms above the reference in some designs only. `worse`: arms below the reference in all.
    """

    best: str | None
    alike: list[str]
    partly: list[str]
    worse: list[str]


def recommend(names: Sequence[str], designs: Mapping[str, Sequence[Pair]], reference: str) -> Verdict:
    """Take an arm only if its interval against `reference` is above 0 in every design: of several the one with the
    largest least difference. The reference itself is taken if every other arm is below it in every design."""
    against = {
        name: [_seen(pairs, reference, name) for pairs in designs.values()] for name in names if name != reference
    }
    above = {name: min(p.difference for p in found) for name, found in against.items() if _all_above(found)}
    worse = [name for name, found in against.items() if all(p.interval[1] < 0 for p in found)]
    partly = [n for n, found in against.items() if n not in above and any(p.interval[0] > 0 for p in found)]
    best = max(above, key=lambda name: above[name]) if above else None
    if best is None and len(worse) == len(against):
        best = reference
    if best is None:
        return Verdict(None, [], partly, worse)
    alike = [
        name for name in names
        if name != best and not any(_seen(pairs, best, name).interval[1] < 0 for pairs in designs.values())
    ]  # fmt: skip
    return Verdict(best, alike, partly, worse)


def _all_above(found: Sequence[Pair]) -> bool:
    return all(pair.interval[0] > 0 for pair in found)


def _seen(pairs: Sequence[Pair], a: str, b: str) -> Pair:
    """The pair as b − a, whichever way it was compared."""
    for pair in pairs:
        if (pair.a, pair.b) == (a, b):
            return pair
        if (pair.a, pair.b) == (b, a):
            low, high = pair.interval
            return Pair(a, b, -pair.difference, (-high, -low), pair.se, pair.df)
    raise ValueError(f"{a} and {b} are not compared")


def against(pairs: Sequence[Pair], reference: str) -> dict[str, Pair]:
    """Of every other arm, its difference from `reference`."""
    others: dict[str, Any] = dict.fromkeys(name for p in pairs for name in (p.a, p.b) if name != reference)
    return {name: _seen(pairs, reference, name) for name in others}

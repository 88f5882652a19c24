"""The rules that choose one response a question, and what can be said of a choice. Pure functions.

Divergence-aware sampling (arXiv 2601.09088, after arXiv 2512.20908) types every sentence by Δ = p_T − p_S, where p is
the geometric mean of its tokens' probabilities: a teacher sentence has Δ > β, a student sentence Δ < −β, any other is
common. `teacher_count` is the published rule; the others are controls, those marked [ours] our own:

    teacher_count       most teacher sentences
    min_count           fewest teacher sentences
    ratio               highest share of teacher sentences
    longest, shortest   most, fewest tokens of the student
    random              a draw that depends on seed, question, temperature and candidate alone
    count_minus_length  most teacher sentences for its length: count − b · tokens, b the slope of count on tokens within
                        questions (ordinary least squares with an intercept for each question) [ours]
    token_matched       most teacher sentences in all at the number of tokens that `random` takes in all [ours]

Each chooses among the candidates of one question at one temperature; ties go to the lowest candidate number. Sums and
comparisons are of whole numbers or exact fractions, so no order of the candidates changes a choice.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

RULES = {  # what each takes, for whoever reads what it took
    "teacher_count": "the one with the most teacher sentences",
    "min_count": "the one with the fewest teacher sentences",
    "ratio": "the one with the highest share of teacher sentences",
    "longest": "the one with the most tokens of the student",
    "shortest": "the one with the fewest tokens of the student",
    "random": "one drawn at random",
    "count_minus_length": "the one with the most teacher sentences for its length",
    "token_matched": "the one that makes the most teacher sentences in all, at the tokens of a random choice",
}
TYPES = ("teacher", "common", "student")
FOUR_TYPES = ("shared", "teacher", "student", "boosted")
BINS = 20  # of the histogram of Δ over [−1, 1]

Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Candidate:
    """What the rules see of a response. (number, source) tells the candidates of a question apart."""

    question: str
    temperature: float
    number: int
    source: int  # which scores directory, from 0
    row: int  # of the arrays that hold more about it
    digest: int  # equal texts, equal digests
    teacher_tokens: int
    student_tokens: int
    teacher: int  # sentences of each type
    common: int
    student: int

    @property
    def sentences(self) -> int:
        return self.teacher + self.common + self.student

    @property
    def ratio(self) -> float:
        return self.teacher / self.sentences if self.sentences else 0.0


Questions = Mapping[str, Sequence[Candidate]]  # the candidates of each question at one temperature, at least one
Choice = dict[str, Candidate]


def choose(questions: Questions, rule: str, seed: int = 0) -> Choice:
    """The candidate of every question that a rule of RULES takes."""
    if rule == "token_matched":
        return _token_matched(questions, seed)
    score = _scorer(questions, rule, seed)
    return {
        question: min(candidates, key=lambda c: (-score(c), c.number, c.source))
        for question, candidates in questions.items()
    }


def tied(questions: Questions, rule: str, choice: Choice, seed: int = 0) -> int:
    """Questions in which the rule's best value is that of several candidates, so that their numbers decided."""
    if rule == "token_matched":  # the value of a step along the hull is not one candidate's
        return sum(
            sum((c.teacher, c.student_tokens) == (choice[q].teacher, choice[q].student_tokens) for c in candidates) > 1
            for q, candidates in questions.items()
        )
    score = _scorer(questions, rule, seed)
    return sum(sum(score(c) == score(choice[q]) for c in candidates) > 1 for q, candidates in questions.items())


def _scorer(questions: Questions, rule: str, seed: int) -> Any:
    """Candidate -> what the rule wants most of."""
    match rule:
        case "teacher_count":
            return lambda c: c.teacher
        case "min_count":
            return lambda c: -c.teacher
        case "ratio":
            return lambda c: c.ratio  # division is correctly rounded: equal shares are equal floats
        case "longest":
            return lambda c: c.student_tokens
        case "shortest":
            return lambda c: -c.student_tokens
        case "random":
            return lambda c: _draw(seed, c.question, c.temperature, c.number, c.source)
        case "count_minus_length":
            slope = length_slope(questions)
            return lambda c: c.teacher * slope.denominator - c.student_tokens * slope.numerator
    raise ValueError(f"unknown rule {rule!r}")


def _draw(*key: object) -> int:
    """64 random-looking bits that depend on nothing but the key."""
    return int.from_bytes(blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def length_slope(questions: Questions) -> Fraction:
    """Teacher sentences a token: least squares within questions; 0 where all their candidates are of one length."""
    above: Counter[int] = Counter()  # by number of candidates, so that the sums stay whole
    below: Counter[int] = Counter()
    for candidates in questions.values():
        n, x, y = len(candidates), [c.student_tokens for c in candidates], [c.teacher for c in candidates]
        above[n] += n * sum(a * b for a, b in zip(x, y, strict=True)) - sum(x) * sum(y)
        below[n] += n * sum(a * a for a in x) - sum(x) ** 2
    variance = sum((Fraction(value, n) for n, value in below.items()), Fraction())
    return sum((Fraction(value, n) for n, value in above.items()), Fraction()) / variance if variance else Fraction()


def _token_matched(questions: Questions, seed: int) -> Choice:
    """Start with every question's shortest candidate and lengthen where a token buys most teacher sentences, while the
    sum of tokens stays within that of `random`; end at the first step that would not.

    A step goes along the upper hull of a question's (tokens, count) points, so after any number of steps no choice
    has a higher sum of count − λ · tokens, λ being the last step's gain: the most teacher sentences at these tokens.
    """
    budget = sum(c.student_tokens for c in choose(questions, "random", seed).values())
    hulls = {question: _hull(candidates) for question, candidates in questions.items()}
    chosen = {question: hull[0] for question, hull in hulls.items()}
    spent = sum(c.student_tokens for c in chosen.values())
    steps = [
        (-_gain(a, b), _draw(seed, question), question, b)
        for question, hull in hulls.items()
        for a, b in zip(hull, hull[1:], strict=False)
    ]
    for _, _, question, longer in sorted(steps, key=lambda step: (*step[:3], step[3].student_tokens)):
        spent += longer.student_tokens - chosen[question].student_tokens
        if spent > budget:
            break
        chosen[question] = longer
    return chosen


def _hull(candidates: Sequence[Candidate]) -> list[Candidate]:
    """From the shortest to the longest, those on the upper concave hull of (tokens, count)."""
    hull: list[Candidate] = []
    for c in sorted(candidates, key=lambda c: (c.student_tokens, -c.teacher, c.number, c.source)):
        if hull and c.student_tokens == hull[-1].student_tokens:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) < _gain(hull[-1], c):
            hull.pop()
        hull.append(c)
    return hull


def _gain(a: Candidate, b: Candidate) -> float:
    """Teacher sentences a further token. Exact in order: quotients of whole numbers below 2²⁶ differ as floats."""
    return (b.teacher - a.teacher) / (b.student_tokens - a.student_tokens)


# ---------------------------------------------------------------------------------------------- sentences


def count_types(teacher: Array, student: Array, lengths: Counts, beta: float) -> tuple[Counts, Counts]:
    """([R, 3] sentences of each of TYPES, [R, BINS] histogram of Δ) of R responses of `lengths` sentences.

    `teacher`, `student` [sum of lengths]: p_T and p_S, linear. A bin holds lower edge <= Δ < upper edge.
    """
    delta = teacher - student
    kind = np.where(delta > beta, 0, np.where(delta < -beta, 2, 1))
    # Rounded, as 0.3 − 0.2 < 0.1 in binary; the types above are not.
    bins = np.clip(np.floor(np.round((delta + 1) * (BINS / 2), 9)), 0, BINS - 1).astype(np.int64)
    return _by_row(kind, lengths, 3), _by_row(bins, lengths, BINS)


def count_four_types(
    teacher: Array, student: Array, distilled: Array, lengths: Counts, beta: float, alpha: float
) -> Counts:
    """[R, 4] sentences of each of FOUR_TYPES, with the distilled model's probabilities (arXiv 2512.20908).

    Shared where no two of the three differ by more than α; else teacher where p_T − p_S > β, student where
    p_S − p_T > β, and boosted otherwise: teacher and untrained student agree, the distilled model differs.
    """
    delta = teacher - student
    apart = np.maximum(np.abs(delta), np.maximum(np.abs(teacher - distilled), np.abs(student - distilled)))
    kind = np.where(apart <= alpha, 0, np.where(delta > beta, 1, np.where(-delta > beta, 2, 3)))
    return _by_row(kind, lengths, 4)


def _by_row(kind: npt.NDArray[np.int64], lengths: Counts, kinds: int) -> Counts:
    row = np.repeat(np.arange(len(lengths)), lengths)
    return np.bincount(row * kinds + kind, minlength=len(lengths) * kinds).reshape(len(lengths), kinds)


# ---------------------------------------------------------------------------------------------- what a choice is like


def describe(candidates: Sequence[Candidate]) -> dict[str, float]:
    """Lengths and teacher sentences of some responses; zeros of none."""
    count = max(len(candidates), 1)
    teacher, student = ([getattr(c, f"{who}_tokens") for c in candidates] for who in ("teacher", "student"))
    sentences = sum(c.sentences for c in candidates)
    return {
        "responses": len(candidates),
        "student_tokens": sum(student),
        "student_tokens_mean": sum(student) / count,
        "student_tokens_median": float(median(student or [0])),
        "teacher_tokens_mean": sum(teacher) / count,
        "teacher_tokens_median": float(median(teacher or [0])),
        "sentences_mean": sentences / count,
        "teacher_sentences_mean": sum(c.teacher for c in candidates) / count,
        "teacher_share": sum(c.teacher for c in candidates) / max(sentences, 1),
    }


def length_correlation(questions: Questions) -> float | None:
    """Pearson's correlation of teacher sentences and tokens within questions: each question's means taken out."""
    x, y = [], []
    for candidates in questions.values():
        points = np.array([(c.student_tokens, c.teacher) for c in candidates], float)
        x.append(points[:, 0] - points[:, 0].mean())
        y.append(points[:, 1] - points[:, 1].mean())
    if not x:
        return None
    a, b = np.concatenate(x), np.concatenate(y)
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else None


def overlap(choices: Mapping[str, Choice], questions: Sequence[str]) -> dict[str, dict[str, float]]:
    """Share of `questions` in which two rules take the same candidate; an empty dict of none."""
    if not questions:
        return {}
    shares: dict[str, dict[str, float]] = {rule: {rule: 1.0} for rule in choices}
    for a, b in combinations(choices, 2):
        same = sum(choices[a][question] is choices[b][question] for question in questions)
        shares[a][b] = shares[b][a] = same / len(questions)
    return shares

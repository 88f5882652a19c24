"""What `select` reports of a choice: as JSON, and as text of at most 100 columns."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dasd_engine.filters import REASONS
from dasd_engine.scored import Pool
from dasd_engine.selection import (
    BINS,
    FOUR_TYPES,
    RULES,
    TYPES,
    Candidate,
    Choice,
    Questions,
    describe,
    length_correlation,
    length_slope,
    overlap,
    tied,
)

SHORT = dict(zip(RULES, ("count", "min", "ratio", "long", "short", "rand", "c-len", "match"), strict=True))
BAR = 22  # columns of the longest


def report(
    pool: Pool, temperature: float, questions: Questions, choices: Mapping[str, Choice], rule: str, seed: int
) -> dict[str, Any]:
    """The section of one temperature. `questions`: what the filters left; `choices`: what each rule takes of it."""
    read = [c for c in pool.read if c.temperature == temperature]
    kept = [c for candidates in questions.values() for c in candidates]
    chosen = list(choices[rule].values())
    several = [q for q, candidates in questions.items() if len(candidates) > 1]
    reasons = Counter(row["reason"] for row in pool.dropped if row["temperature"] == temperature)
    groups = {"scored": read, "kept": kept, "random": list(choices["random"].values()), "selected": chosen}
    return {
        "temperature": temperature,
        "rule": rule,
        "candidates": {
            "read": len(kept) + reasons.total(),
            "dropped": {reason: reasons[reason] for reason in REASONS if reasons[reason]},
            "kept": len(kept),
        },
        "questions": {
            "read": len(pool.asked[temperature]),
            "kept": len(questions),
            "one_candidate": len(questions) - len(several),
            "choice": len(several),
            "different_texts": sum(len({c.digest for c in questions[q]}) > 1 for q in several),
            "tied": tied({q: questions[q] for q in several}, rule, choices[rule], seed),
        },
        "lengths": {name: describe(group) for name, group in groups.items()},
        "length_correlation": length_correlation(questions),
        "length_slope": float(length_slope(questions)),
        "sentences": {name: _types(group) for name, group in (("kept", kept), ("selected", chosen))},
        "histogram": {
            "edges": [round(2 * i / BINS - 1, 6) for i in range(BINS + 1)],
            **{name: _sum(pool, group, "histogram") for name, group in (("kept", kept), ("selected", chosen))},
        },
        "four_types": _four_types(pool, kept, chosen),
        "rules": {name: describe(list(choice.values())) for name, choice in choices.items()},
        "overlap": overlap(choices, several),
    }


def _types(group: Sequence[Candidate]) -> dict[str, int]:
    return {name: sum(getattr(c, name) for c in group) for name in TYPES}


def _sum(pool: Pool, group: Sequence[Candidate], table: str) -> list[int]:
    """The table's rows of these candidates, added up."""
    total: Any = 0
    for index, scores in enumerate(pool.scores):
        rows = [c.row for c in group if c.source == index]
        total = total + np.asarray(getattr(scores, table))[rows].sum(axis=0)
    return [int(value) for value in total]


def _four_types(pool: Pool, kept: Sequence[Candidate], chosen: Sequence[Candidate]) -> dict[str, Any] | None:
    if any(scores.four_types is None for scores in pool.scores):
        return None
    groups = {"kept": kept, "selected": chosen}
    return {name: dict(zip(FOUR_TYPES, _sum(pool, group, "four_types"), strict=True)) for name, group in groups.items()}


# ---------------------------------------------------------------------------------------------- text


def render(whole: dict[str, Any]) -> list[str]:
    """Lines of at most 100 columns."""
    lines = []
    for section in whole["temperatures"]:
        title = f"── temperature {section['temperature']:g}, rule {section['rule']} "
        lines += ["", title.ljust(100, "─")]
        parts = (_filters, _choice, _lengths, _sentences, _histogram, _four, _rules)
        for part in parts if section["candidates"]["kept"] else parts[:1]:
            if text := part(section, whole["parameters"]):
                lines += ["", *text]
    return lines


def _filters(section: dict[str, Any], parameters: dict[str, Any]) -> list[str]:
    counts, questions = section["candidates"], section["questions"]
    read = counts["read"]
    lines = [f"Filters    {read:>9,}          candidates to {_plural(questions['read'], 'question')}"]
    for reason, count in counts["dropped"].items():
        lines.append(f"           {count:>9,}  {_percent(count, read)}  {reason:<16} {REASONS[reason]}")
    lines.append(f"           {counts['kept']:>9,}  {_percent(counts['kept'], read)}  left")
    if parameters["student"] is None:
        lines.append("           The scores name no student: prompts were not counted against the context.")
    return lines


def _choice(section: dict[str, Any], parameters: dict[str, Any]) -> list[str]:
    q = section["questions"]
    lines = [f"Choice     {q['kept']:>9,}          questions have a response"]
    if q["read"] > q["kept"]:
        lines.append(f"           {q['read'] - q['kept']:>9,}          lost every candidate to the filters")
    lines += [
        f"           {q[key]:>9,}  {_percent(q[key], q['kept'])}  {text}"
        for key, text in (
            ("one_candidate", "had one candidate left: no choice"),
            ("choice", f"had several, with different texts in {q['different_texts']:,}"),
            ("tied", "had several of the best value: the lowest number was taken"),
        )
    ]
    return lines


def _lengths(section: dict[str, Any], parameters: dict[str, Any]) -> list[str]:
    names = {
        "scored": "all scored", "kept": "left by the filters", "random": "random of those",
        "selected": f"chosen: {section['rule']}",
    }  # fmt: skip
    lines = [
        "Length                         responses   student tokens     teacher tokens     teacher sentences",
        "                                           median     mean    median     mean      mean      share",
    ]
    for name, label in names.items():
        d = section["lengths"][name]
        tokens = "  ".join(
            f"{_number(d[f'{who}_tokens_median'])} {_number(d[f'{who}_tokens_mean'])}" for who in ("student", "teacher")
        )
        sentences = f"{_number(d['teacher_sentences_mean'])}   {_percent(d['teacher_share'], 1)}"
        lines.append(f"  {label:<28} {d['responses']:>9,} {tokens}  {sentences}")
    ratio = section["lengths"]["selected"]["student_tokens"] / max(section["lengths"]["random"]["student_tokens"], 1)
    lines.append(f"  The choice has {ratio:.2f} times the tokens of a random one.")
    if (correlation := section["length_correlation"]) is not None:
        lines.append(f"  Teacher sentences and tokens correlate by {correlation:.2f} within questions.")
    return lines


def _sentences(section: dict[str, Any], parameters: dict[str, Any]) -> list[str]:
    beta = parameters["beta"]
    meaning = {"teacher": f"Δ > {beta:g}", "common": "", "student": f"Δ < −{beta:g}"}
    title = "Sentences  Δ = p_T − p_S"
    return _two_columns(title, section["sentences"], meaning)


def _four(section: dict[str, Any], parameters: dict[str, Any]) -> list[str]:
    if section["four_types"] is None:
        return []
    meaning = {"shared": f"all three within {parameters['alpha']:g}", "boosted": "p_D alone differs"}
    return _two_columns("With the distilled model's p_D", section["four_types"], meaning)


def _two_columns(title: str, columns: dict[str, dict[str, int]], meaning: dict[str, str]) -> list[str]:
    lines = [f"{title:<34}{'left by the filters':>24}{'chosen':>24}"]
    for name in columns["kept"]:
        line = f"  {name:<9}{meaning.get(name, ''):<23}"
        for column in ("kept", "selected"):
            count = columns[column][name]
            line += f"{count:>15,}  {_percent(count, sum(columns[column].values()))}"
        lines.append(line)
    return lines


def _histogram(section: dict[str, Any], parameters: dict[str, Any]) -> list[str]:
    h = section["histogram"]
    kept, chosen = (np.array(h[name]) / max(sum(h[name]), 1) for name in ("kept", "selected"))
    used = np.flatnonzero(kept + chosen)
    if not len(used):
        return []
    top = max(kept.max(), chosen.max())
    lines = [f"Δ{'share of sentences left by the filters':>54}{'chosen':>30}"]
    for i in range(used[0], used[-1] + 1):
        low, high = (f"{edge:.1f}".replace("-", "−") for edge in h["edges"][i : i + 2])
        line = f"  {low:>5} … {high:>4}"
        for share in (kept[i], chosen[i]):
            line += f"    {_percent(share, 1) if share else '':7}  {'█' * round(BAR * share / top):<{BAR}}"
        lines.append(line.rstrip())
    return lines


def _rules(section: dict[str, Any], parameters: dict[str, Any]) -> list[str]:
    choice = section["questions"]["choice"]
    lines = [
        "Rules               student tokens  teacher sent.   "
        f"same candidate, % of {_plural(choice, 'question')} with a choice",
        "                     mean ÷ random   mean   share " + "".join(f"{SHORT[name]:>6}" for name in RULES),
    ]
    budget = max(section["rules"]["random"]["student_tokens"], 1)
    for name, d in section["rules"].items():
        row = section["overlap"].get(name, {})
        same = "".join("     –" if other == name or not row else f"{100 * row[other]:>6.0f}" for other in RULES)
        lines.append(
            f"  {name:<18}{_number(d['student_tokens_mean'])}{d['student_tokens'] / budget:>7.2f}"
            f"{_number(d['teacher_sentences_mean'])}{_percent(d['teacher_share'], 1):>8}{same}"
        )
    return lines


def _percent(count: float, of: float) -> str:
    return f"{100 * count / of if of else 0:5.1f} %"


def _number(value: float) -> str:
    """In 8 columns."""
    if value >= 1e6:
        return f"{value / 1e6:>7,.1f}M"
    return f"{value:>8,.0f}" if value >= 1e4 else f"{value:>8,.1f}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"

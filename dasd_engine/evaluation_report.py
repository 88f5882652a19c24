"""What `evaluate` reports: pass@1 with intervals, lengths and cut-off rate by task; two evaluations, paired."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dasd_engine.errors import InputError
from dasd_engine.records import MANIFEST, differences, read_json, read_rows

RESPONSES = "responses.jsonl"
FAILED = "failed"  # finish reason of a request that the model has not answered
_RESAMPLES = 2000  # of the bootstrap
_LEVEL = 0.02  # ours: an interval within this of 0 or 1 leaves no room to tell two students apart

Interval = tuple[float, float]
Key = tuple[str, float, int]  # question, temperature, sample


@dataclass(frozen=True)
class Response:
    """One judged response. `error`: why there is none (finish reason "failed"), or what the scorer raised."""

    id: str  # of the question
    task: str
    temperature: float
    sample: int
    question: str  # its last turn
    answer: str  # what was judged
    correct: bool
    finish_reason: str
    length: int  # tokens, the one that ends the turn included
    output: str
    error: str | None = None

    @property
    def key(self) -> Key:
        return self.id, self.temperature, self.sample


@dataclass(frozen=True)
class Score:
    """Shares are of 1. A response that failed, or whose scorer raised, is wrong, and told beside the score."""

    pass_at_1: float  # mean over problems of the share of right samples
    interval: Interval  # 95 % of pass_at_1: percentile bootstrap over problems
    count: int  # problems
    mean_length: float  # tokens of a response
    cut_off_rate: float  # share of responses that reached the longest length


@dataclass(frozen=True)
class EvalReport(Score):
    """One temperature's."""

    temperature: float
    samples: int  # of each problem
    by_task: dict[str, Score]
    failed: dict[str, int]  # requests without a response, by reason
    scorer_errors: dict[str, int]  # by task and what was raised


def as_report(value: dict[str, Any]) -> EvalReport:
    """A report that was written as JSON. TypeError, KeyError or AttributeError for what is none."""
    tasks = {task: Score(**{**score, "interval": tuple(score["interval"])}) for task, score in value["by_task"].items()}
    return EvalReport(**{**value, "interval": tuple(value["interval"]), "by_task": tasks})


def summarize(responses: Sequence[Response]) -> list[EvalReport]:
    """A report for each temperature, in the order in which they come."""
    reports = []
    for temperature in dict.fromkeys(r.temperature for r in responses):
        rows = [r for r in responses if r.temperature == temperature]
        failed = Counter(r.error or "" for r in rows if r.finish_reason == FAILED)
        raised = Counter(f"{r.task}: {r.error}" for r in rows if r.error and r.finish_reason != FAILED)
        tasks = {task: _score([r for r in rows if r.task == task]) for task in sorted({r.task for r in rows})}
        reports.append(EvalReport(
            **vars(_score(rows)), temperature=temperature, samples=max(r.sample for r in rows) + 1, by_task=tasks,
            failed=dict(failed), scorer_errors=dict(raised),
        ))  # fmt: skip
    return reports


def _score(rows: Sequence[Response]) -> Score:
    right = np.array(list(shares(rows).values()))
    answered = [r for r in rows if r.finish_reason != FAILED]
    return Score(
        pass_at_1=float(right.mean()),
        interval=bootstrap(right),
        count=len(right),
        mean_length=float(np.mean([r.length for r in answered])) if answered else 0.0,
        cut_off_rate=float(np.mean([r.finish_reason == "length" for r in rows])),
    )


def shares(rows: Sequence[Response]) -> dict[str, float]:
    """Of each question, the share of its samples that are right."""
    found: dict[str, list[bool]] = {}
    for r in rows:
        found.setdefault(r.id, []).append(r.correct)
    return {id: sum(right) / len(right) for id, right in found.items()}


def bootstrap(scores: np.ndarray) -> Interval:
    """95 % percentile interval of the mean of `scores` [problems], resampling problems; always the same draws."""
    picks = np.random.default_rng(0).integers(len(scores), size=(_RESAMPLES, len(scores)))
    low, high = np.percentile(scores[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


def levels(report: EvalReport) -> list[str]:
    """A floor or a ceiling, in words: its interval is narrow because nothing varies, not because much is known."""
    lines = []
    for name, score in _rows(report).items():
        if score.interval[1] < _LEVEL:
            word, all_alike, harder = "floor", "none of {} problems is ever right (up to {} may be)", "easier"
        elif score.interval[0] > 1 - _LEVEL:
            word, all_alike, harder = "ceiling", "each of {} problems is always right (up to {} may not be)", "harder"
        else:
            continue
        # Were a share s of such problems otherwise, n of them would all miss it with (1 - s)^n = 5 %.
        hidden = percent(1 - 0.05 ** (1 / score.count))
        text = all_alike.format(score.count, hidden) if score.pass_at_1 in (0, 1) else percent(score.pass_at_1)
        lines.append(f"{word} on {name}: {text}; take {harder} problems to see a difference")
    return lines


# ---------------------------------------------------------------------------------------------- two of them


@dataclass(frozen=True)
class PairedDifference:
    """Of the problems that both have answered: what B is above A, with its paired interval."""

    temperature: float
    task: str  # "all" for all of them
    count: int
    a: float
    b: float
    difference: float  # b - a
    interval: Interval  # 95 % of the difference: percentile bootstrap over problems, which keep their pairs
    better: int  # problems on which B is right more often
    worse: int


def compare(a: Path, b: Path) -> tuple[list[PairedDifference], list[str]]:
    """Two directories of `evaluate`, by temperature and task; and what a reader must know about the pairing.

    Raises InputError for a directory that is none, or is not finished, and where no problem is in both.
    """
    (settings_a, rows_a), (settings_b, rows_b) = _read(a), _read(b)
    notes = [f"measured differently: {change}" for change in differences(settings_a, settings_b)]
    found = []
    for temperature in sorted({r.temperature for r in rows_a} & {r.temperature for r in rows_b}, reverse=True):
        of_a, of_b = ([r for r in rows if r.temperature == temperature] for rows in (rows_a, rows_b))
        right_a, right_b = shares(of_a), shares(of_b)
        both = [id for id in right_a if id in right_b]
        if not both:
            raise InputError(f"{a} and {b}: no problem is in both; evaluate them on the same problems")
        if alone := len(right_a) + len(right_b) - 2 * len(both):
            notes.append(f"temperature {temperature:g}: {alone} problems are in one of the two only, and left out")
        pairs = {id: (right_a[id], right_b[id]) for id in both}
        tasks = {r.id: r.task for r in of_a}
        found.append(_pair(temperature, "all", list(pairs.values())))
        names = sorted({tasks[id] for id in both})
        for task in names if len(names) > 1 else []:
            found.append(_pair(temperature, task, [pairs[id] for id in both if tasks[id] == task]))
    if not found:
        raise InputError(f"{a} and {b}: have no temperature in common; evaluate them at the same ones")
    return found, notes


def _pair(temperature: float, task: str, pairs: Sequence[tuple[float, float]]) -> PairedDifference:
    a, b = np.array(pairs).T
    return PairedDifference(
        temperature, task, len(a), float(a.mean()), float(b.mean()), float((b - a).mean()), bootstrap(b - a),
        int((b > a).sum()), int((b < a).sum()),
    )  # fmt: skip


def _read(directory: Path) -> tuple[dict, list[Response]]:
    """What was asked in how many samples, and the responses."""
    if not (directory / MANIFEST).exists() or not (directory / RESPONSES).exists():
        raise InputError(
            f"{directory}: holds no {MANIFEST} and {RESPONSES}: it is no finished directory of dasd_engine.evaluate "
            "(its --out, or evaluate-* of a distillation)"
        )
    manifest = read_json(directory / MANIFEST)
    return manifest["parameters"], read_responses(directory / RESPONSES)


def read_responses(path: Path) -> list[Response]:
    found = []
    for number, row in read_rows(path):
        try:
            found.append(Response(**row))
        except TypeError:
            raise InputError(f"{path}:{number}: is no response of dasd_engine.evaluate; evaluate anew") from None
    if not found:
        raise InputError(f"{path}: holds no responses; evaluate anew")
    return found


# ---------------------------------------------------------------------------------------------- text


def print_report(reports: Sequence[EvalReport], title: str, as_json: bool = False) -> None:
    """The tables a person reads, or the reports as JSON, to stdout."""
    if as_json:
        print(json.dumps(list(map(asdict, reports)), indent=1))
        return
    table = Table(title=title, title_justify="left")
    for name in ("temperature", "task", "problems", "pass@1", "95 % interval", "mean tokens", "cut off"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for report in reports:
        for name, score in _rows(report).items():
            table.add_row(
                f"{report.temperature:g}", name, f"{score.count:,}", percent(score.pass_at_1), _range(score.interval),
                f"{score.mean_length:,.1f}", percent(score.cut_off_rate),
            )  # fmt: skip
        table.add_section()
    print_table(table)
    for report in reports:
        at = f"temperature {report.temperature:g}"
        print(f"{at}: {report.samples} sample{'s' * (report.samples > 1)} a problem")
        for reason, count in report.failed.items():
            print(f"  {count} failed and count as wrong: {reason}")
        for raised, count in report.scorer_errors.items():
            print(f"  the scorer raised {count} times, which counts as wrong: {raised}")
        for line in levels(report):
            print(f"  {line}")


def print_comparison(
    names: Sequence[Path], found: Sequence[PairedDifference], notes: Sequence[str], as_json: bool = False
) -> None:
    if as_json:
        print(json.dumps({"comparisons": list(map(asdict, found)), "notes": notes}, indent=1))
        return
    table = Table(title=f"A {names[0]}\nB {names[1]}", title_justify="left")
    for name in ("temperature", "task", "problems", "A", "B", "B − A", "95 % interval", "better", "worse", ""):
        table.add_column(name, justify="left" if name in ("task", "") else "right")
    for c in found:
        low, high = c.interval
        verdict = "B is better" if low > 0 else "A is better" if high < 0 else "cannot tell"
        table.add_row(
            f"{c.temperature:g}", c.task, f"{c.count:,}", percent(c.a), percent(c.b), f"{100 * c.difference:+.1f}",
            f"{100 * low:+.1f} – {100 * high:+.1f}", str(c.better), str(c.worse), verdict,
        )  # fmt: skip
    print_table(table)
    for line in notes:
        print(line)
    if len(found) > 1:
        print(f"{len(found)} comparisons, each interval for itself: one in twenty misses by chance")


def _rows(report: EvalReport) -> dict[str, Score]:
    """The tasks, and behind several all of them."""
    return {**report.by_task, **({"all": report} if len(report.by_task) > 1 else {})}


def print_table(table: Table) -> None:
    """To stdout, in the width of the terminal, or one that lines do not break in."""
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)  # a log has no width


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _range(interval: Interval) -> str:
    return f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}"

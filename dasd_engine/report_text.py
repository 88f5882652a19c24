"""The texts that the report shows: candidates by sentence, as teacher and student see them, and answers over training.

A run may have scored terabytes; a page has room for some. Sentences are counted over the first `ROWS` candidates, and
the questions shown are spread evenly over theirs, up to `SENTENCES` in all. What was left out is told.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dasd_engine.errors import InputError
from dasd_engine.evaluation_report import Response, read_responses
from dasd_engine.questions import spread
from dasd_engine.records import read_rows
from dasd_engine.sources import response_of

ROWS = 20_000  # candidates whose sentences are counted
SENTENCES = 5_000  # shown
CHARACTERS = 1_200_000  # shown, of all texts
PLACES = 20  # parts of a response that are told apart
SAMPLES = 12  # problems whose answers are shown over training

_QUESTION = re.compile(rb'\{"(?:uuid|id)": ("(?:[^"\\]|\\.)*")')  # first in a row of select or mix

Key = tuple[str, float, int]  # question, temperature, candidate


@dataclass
class Texts:
    """`questions`: {"id", "question", "candidates": [{"temperature", "candidate", "chosen", "dropped", "finish",
    "pieces"}], and where there is one "mixed": {"student", "teacher": the text of each, "tokens": of both, "cut",
    "cap", "masked"}}. "chosen" is a stage, "dropped" a filter's reason. `rule`: what chose, "" where nothing has yet.

    A piece is text outside of sentences, or [text, p_T, p_S, n_T, n_S(, p_D)]. `places`: of each temperature the share
    of each type of sentence in each part of a response, [3][PLACES], None where none lies. `lengths`: the student's
    tokens of candidates, by group.
    """

    beta: float
    rule: str = ""
    teacher: str = ""
    questions: list[dict[str, Any]] = field(default_factory=list)
    places: list[dict[str, Any]] = field(default_factory=list)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_texts(directory: Path, manifests: dict[str, dict[str, Any]]) -> Texts:
    """Of a distillation that has scored. Raises InputError naming file and line of a row that is none."""
    selects = [name for name in manifests if name.startswith("select-") and manifests[name]]
    asked: dict[str, Any] = next((manifests[name]["parameters"] for name in selects), {"beta": 0.1, "rule": ""})
    texts = Texts(asked["beta"], asked["rule"])
    score = scoring(manifests)
    rows = _scores(directory / score / "scores.jsonl")
    scored = manifests[score]["counts"]["scored"]
    if len(rows) < scored:
        texts.notes.append(f"sentences and lengths are those of the first {len(rows):,} of {scored:,} scored responses")
    for temperature in sorted({row["temperature"] for row in rows}):
        group = [row for row in rows if row["temperature"] == temperature]
        texts.lengths[f"candidates at {temperature:g}"] = np.array([row["student_tokens"] for row in group])
        texts.places.append({"temperature": temperature, "shares": _places(group, texts.beta)})
    shown = _shown(rows)
    ids = {row["id"] for row in shown.values()}
    if len(ids) < (count := len({row["id"] for row in rows})):
        texts.notes.append(f"{len(ids):,} of {count:,} questions can be read here, spread evenly over them")
    fates = {
        "chosen": _chosen([directory / name / "selected.jsonl" for name in selects], ids),
        "dropped": _dropped([directory / name / "dropped.jsonl" for name in selects], ids),
    }
    candidates = directory / "sample" / "candidates.jsonl"
    texts.questions = _questions(candidates, shown, fates)
    mixed = _mixed(directory / "mix" / "mixed.jsonl", ids) if manifests.get("mix") else {}
    masked = manifests.get("prepare-mixed", {}).get("parameters", {}).get("mask_prefix", False)
    for question in texts.questions:
        if question["id"] in mixed:
            question["mixed"] = {**mixed[question["id"]], "masked": masked}
    texts.teacher = next((row["teacher"]["name"] for _, row in _lines(candidates, {1})), "")
    return texts


def scoring(manifests: dict[str, dict[str, Any]]) -> str:
    """The finished scoring that is shown, "" for none: before others one that has p_D, the trained student's."""
    found = [name for name, manifest in manifests.items() if name.partition("-")[0] == "score" and manifest]
    return max(found, key=lambda name: bool(manifests[name].get("inputs", {}).get("distilled")), default="")


def _scores(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in islice(read_rows(path), ROWS) if row.get("error") is None]


def _places(rows: Sequence[dict[str, Any]], beta: float) -> list[list[float | None]]:
    """Shares of the types over the response: where a sentence's middle lies, from 0 to 1 of the last one's end."""
    middle, delta = [], []
    for row in rows:
        sentences = row["sentences"]
        middle += [(s[0] + s[1]) / 2 / max(sentences[-1][1], 1) for s in sentences]
        delta += [s[2] - s[3] for s in sentences]
    place = np.minimum((np.array(middle) * PLACES).astype(int), PLACES - 1)
    change = np.array(delta)
    kinds = (change > beta, abs(change) <= beta, change < -beta)
    counts = np.array([np.bincount(place[kind], minlength=PLACES) for kind in kinds], dtype=float)
    total = counts.sum(0)
    shares = np.round(counts / np.maximum(total, 1), 4).tolist()
    return [[value if here else None for value, here in zip(row, total, strict=True)] for row in shares]


def _shown(rows: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Line of candidates.jsonl -> its scores, of as many questions as there is room for."""
    by_question: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_question.setdefault(row["id"], []).append(row)
    count = sum(len(row["sentences"]) for row in rows)
    size = sum(row["sentences"][-1][1] for row in rows if row["sentences"])
    part = min(1.0, SENTENCES / max(count, 1), CHARACTERS / max(size, 1))
    questions = spread(list(by_question.values()), max(1, int(part * len(by_question))))
    return {row["source"]: row for question in questions for row in question}


def _chosen(paths: Sequence[Path], wanted: set[str]) -> dict[Key, str]:
    """Which candidates are trained on, and in which stage."""
    found: dict[Key, str] = {}
    for path in paths:
        for row in _about(path, wanted):
            meta = json.loads(row["meta"])
            found[row["uuid"], meta["temperature"], meta["candidate"]] = path.parent.name.partition("-")[2]
    return found


def _dropped(paths: Sequence[Path], wanted: set[str]) -> dict[Key, str]:
    """Which candidates a filter has dropped, and why."""
    return {
        (row["id"], row["temperature"], row["candidate"]): f"{row['reason']}, {row['detail']}"
        for path in paths for row in _about(path, wanted)
    }  # fmt: skip


def _about(path: Path, wanted: set[str]) -> Iterator[dict[str, Any]]:
    """Rows about these questions. Most are not, and need not be parsed."""
    with open(path, "rb") as file:
        for line in file:
            begins = _QUESTION.match(line)
            if begins and json.loads(begins[1]) in wanted:
                yield json.loads(line)


def _questions(
    path: Path, shown: dict[int, dict[str, Any]], fates: dict[str, dict[Key, str]]
) -> list[dict[str, Any]]:  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for number, row in _lines(path, set(shown)):
        scores = shown[number]
        key = (row["id"], row["temperature"], row["candidate"])
        if key != (scores["id"], scores["temperature"], scores["candidate"]):
            raise InputError(f"{path}:{number}: is not the candidate that was scored; score it anew")
        asked = {"id": row["id"], "question": row["messages"][-1]["content"], "answer": row.get("answer")}
        found.setdefault(row["id"], {**asked, "candidates": []})["candidates"].append({
            "temperature": row["temperature"], "candidate": row["candidate"],
            **{name: of.get(key) for name, of in fates.items()},
            "finish": row["finish_reason"], "pieces": _pieces(row["text"], scores["sentences"]),
        })  # fmt: skip
    return list(found.values())


def _mixed(path: Path, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """Of these questions, the responses that the student began and the teacher finished."""
    found: dict[str, dict[str, Any]] = {}
    for row in _about(path, wanted):
        if "prefix" not in row:
            continue  # the teacher's alone
        output, meta = response_of(row), json.loads(row["meta"])
        found[row["uuid"]] = {
            "student": row["prefix"], "teacher": output[len(row["prefix"]) :],
            "tokens": [meta["cut"], meta["continuation_tokens"]], "cut": meta["share"], "cap": meta["cap"],
        }  # fmt: skip
    return found


def _lines(path: Path, wanted: set[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of these line numbers; the others are not parsed, and those behind the last not read."""
    last = max(wanted, default=0)
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(islice(file, last), 1):
                if number in wanted:
                    yield number, json.loads(line)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: is not JSON Lines: {error}") from None


def _pieces(text: str, sentences: Sequence[Sequence[float]]) -> list[Any]:
    data, at, pieces = text.encode("utf-8", "replace"), 0, list[Any]()
    for begin, end, p_t, p_s, n_t, n_s, *p_d in sentences:
        if begin > at:
            pieces.append(_text(data[at : int(begin)]))
        sentence = _text(data[int(begin) : int(end)])
        pieces.append([sentence, round(p_t, 4), round(p_s, 4), n_t, n_s, *(round(p, 4) for p in p_d)])
        at = int(end)
    return [*pieces, _text(data[at:])] if at < len(data) else pieces


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


# ---------------------------------------------------------------------------------------------- before and after


@dataclass
class Samples:
    """`problems`: {"question", "task", "answers": {label: {"output", "correct", "finish"}}}; of `total` problems."""

    labels: list[str]
    total: int
    problems: list[dict[str, Any]]


def read_samples(files: Sequence[tuple[str, Path]]) -> Samples | None:
    """The first answer at the first temperature to problems spread over all, not picked, from (label, file)."""
    answers: dict[str, dict[str, Response]] = {}
    for label, path in files:
        if path.exists() and path.stat().st_size:
            rows = _responses(path)
            first = rows[0].temperature if rows else 0.0
            answers[label] = {r.id: r for r in rows if r.sample == 0 and r.temperature == first}
    if not answers or not any(answers.values()):
        return None
    ids = list(dict.fromkeys(id for found in answers.values() for id in found))
    problems = []
    for id in spread(ids, SAMPLES):
        given = {label: found[id] for label, found in answers.items() if id in found}
        one = next(iter(given.values()))
        problems.append({
            "question": one.question, "task": one.task,
            "answers": {label: {"output": r.output, "correct": r.correct, "finish": r.finish_reason}
                        for label, r in given.items()},
        })  # fmt: skip
    return Samples(list(answers), len(ids), problems)


def _responses(path: Path) -> list[Response]:
    """None of an evaluation that is half-written or of another form: the page is made without it."""
    try:
        return read_responses(path)
    except InputError:
        return []

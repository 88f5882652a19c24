"""Scored candidates, read and filtered for a choice: what is kept of each are its counts, not its text.

A row of scores.jsonl is {"id", "candidate", "temperature", "source": line of candidates.jsonl, "teacher_tokens",
"student_tokens", "sentences": [[begin, end, p_T, p_S, n_T, n_S(, p_D)], ...]}, or has "error" for the last three.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from dasd_engine.chat import DEFAULT_SYSTEM, Chat
from dasd_engine.errors import InputError
from dasd_engine.filters import Drop, Filters, examine
from dasd_engine.progress import progress_bar
from dasd_engine.records import read_rows
from dasd_engine.selection import BINS, TYPES, Candidate, Counts, count_four_types, count_types

EXAMPLES = 3  # of each reason, with their text
EXCERPT = 300  # characters of either end of an example
CHUNK = 1 << 16  # sentences counted together

Key = tuple[str, float, int]  # question, temperature, candidate


@dataclass
class Scores:
    """Rows in the order of the file; arrays have one row each."""

    path: Path
    line: list[int] = field(default_factory=list)  # of scores.jsonl
    source: list[int] = field(default_factory=list)  # line of candidates.jsonl
    key: list[Key] = field(default_factory=list)
    tokens: list[tuple[int, int]] = field(default_factory=list)  # of teacher and student
    types: Counts = field(default_factory=lambda: np.zeros((0, len(TYPES)), np.int64))
    histogram: Counts = field(default_factory=lambda: np.zeros((0, BINS), np.int64))
    four_types: Counts | None = None  # where the rows have p_D
    row: dict[int, int] = field(default_factory=dict)  # source -> index of the above
    errors: dict[int, str] = field(default_factory=dict)  # source -> why the student could not score it


def read_scores(path: Path, beta: float, alpha: float) -> Scores:
    """All of a scores.jsonl, its sentences typed by β and, where there is a distilled model's p_D, by α.

    Raises InputError naming file and line, of a row that is not as above or holds a probability outside [0, 1].
    """
    scores = Scores(path)
    chunk = _Chunk(path, beta, alpha)
    for line, row in read_rows(path):
        where = f"{path}:{line}"
        source = _field(row, "source", int, where)
        if source in scores.row or source in scores.errors:
            raise InputError(f"{where}: line {source} of candidates.jsonl is scored twice; score it anew")
        if row.get("error") is not None:
            scores.errors[source] = str(row["error"])
            continue
        scores.row[source] = len(scores.line)
        scores.line.append(line)
        scores.source.append(source)
        scores.key.append(_key(row, where))
        tokens = [_field(row, name, int, where) for name in ("teacher_tokens", "student_tokens")]
        scores.tokens.append((tokens[0], tokens[1]))
        chunk.add(line, _field(row, "sentences", list, where))
    chunk.flush()
    if chunk.types:
        scores.types, scores.histogram = np.concatenate(chunk.types), np.concatenate(chunk.histogram)
        scores.four_types = np.concatenate(chunk.four_types) if chunk.four_types else None
    return scores


def _key(row: dict[str, Any], where: str) -> Key:
    temperature = float(_field(row, "temperature", float, where))
    return _field(row, "id", str, where), temperature, _field(row, "candidate", int, where)


def _field(row: dict[str, Any], name: str, kind: type, where: str) -> Any:
    value: Any = row.get(name)
    good = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if not good or (kind in (int, float) and not 0 <= value < math.inf):
        names = {int: "a whole number from 0", float: "a number from 0", str: "a string", list: "a list"}
        raise InputError(f"{where}: `{name}` must be {names[kind]}; make the file anew")
    return value


class _Chunk:
    """Sentences of consecutive rows, counted together: tiny rows would each cost more than their sentences."""

    def __init__(self, path: Path, beta: float, alpha: float):
        self.path, self.beta, self.alpha = path, beta, alpha
        self.types: list[Counts] = []
        self.histogram: list[Counts] = []
        self.four_types: list[Counts] = []
        self._width = 0  # of a sentence, 6 or 7
        self._clear()

    def _clear(self) -> None:
        self._lines: list[int] = []
        self._lengths: list[int] = []
        self._columns: list[list[float]] = [[], [], []]  # p_T, p_S, p_D

    def add(self, line: int, sentences: list[Any]) -> None:
        try:
            width = 7 if sentences and len(sentences[0]) > 6 else 6
            self._width = self._width or (width if sentences else 0)
            if sentences and width != self._width:
                raise IndexError
            for column, index in zip(self._columns, (2, 3, 6) if self._width == 7 else (2, 3), strict=False):
                column += [sentence[index] for sentence in sentences]
        except (TypeError, IndexError, KeyError):
            raise InputError(
                f"{self.path}:{line}: `sentences` must be lists [begin, end, p_T, p_S, n_T, n_S], all with a further "
                "p_D or none; score it anew"
            ) from None
        self._lines.append(line)
        self._lengths.append(len(sentences))
        if len(self._columns[0]) >= CHUNK:
            self.flush()

    def flush(self) -> None:
        if not self._lines:
            return
        lengths = np.array(self._lengths, np.int64)
        teacher, student, *distilled = (self._checked(c) for c in self._columns[: 3 if self._width == 7 else 2])
        types, histogram = count_types(teacher, student, lengths, self.beta)
        self.types.append(types)
        self.histogram.append(histogram)
        if distilled:
            four = count_four_types(teacher, student, distilled[0], lengths, self.beta, self.alpha)
            self.four_types.append(four)
        self._clear()

    def _checked(self, column: list[float]) -> Any:
        """As an array, once every value is known to be a probability."""
        try:
            values = np.array(column, np.float64)
            bad = ~((values >= 0) & (values <= 1 + 1e-6))  # so that NaN is bad
        except (TypeError, ValueError):
            bad = np.array([not isinstance(value, int | float) or not 0 <= value <= 1 + 1e-6 for value in column])
        if bad.any():
            at = int(np.argmax(bad))
            ends = np.cumsum(self._lengths)
            row = int(np.searchsorted(ends, at, side="right"))
            index = at - int(ends[row]) + self._lengths[row]
            raise InputError(
                f"{self.path}:{self._lines[row]}: sentences[{index}] holds {column[at]!r} where a probability should "
                "be; score it anew"
            )
        return values


# ---------------------------------------------------------------------------------------------- candidates


@dataclass
class Pool:
    """The candidates of all inputs, at one temperature or all, filtered.

    `chat` is the student's, `system` the prompt of questions that have none.
    """

    filters: Filters
    chat: Chat | None = None
    temperature: float | None = None
    system: str = DEFAULT_SYSTEM
    scores: list[Scores] = field(default_factory=list)  # of each input
    read: list[Candidate] = field(default_factory=list)  # all that are scored
    kept: list[Candidate] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)  # rows of dropped.jsonl
    asked: dict[float, set[str]] = field(default_factory=dict)  # questions at each temperature
    others: set[float] = field(default_factory=set)  # temperatures left out
    _messages: dict[str, tuple[int, str]] = field(default_factory=dict)  # of each question: digest, where it was
    _prompts: dict[str, int] = field(default_factory=dict)  # tokens
    _examples: Counter[str] = field(default_factory=Counter)

    def add(self, path: Path, scores: Scores, quiet: bool = True) -> None:
        """Read a candidates.jsonl beside its scores. Raises InputError naming file and line."""
        seen: set[Key] = set()
        number = 0
        for number, row in _with_bar(path, len(scores.row) + len(scores.errors), quiet):
            where = f"{path}:{number}"
            key = _key(row, where)
            if key in seen:
                raise InputError(f"{where}: candidate {key[2]} of question {key[0]!r} at {key[1]} stands there twice")
            seen.add(key)
            index = scores.row.get(number)
            if index is not None and scores.key[index] != key:
                raise InputError(
                    f"{scores.path}:{scores.line[index]}: scores {_named(scores.key[index])}, but {where} holds "
                    f"{_named(key)}; score it anew"
                )
            if self.temperature is None or key[1] == self.temperature:
                self._add(row, key, len(self.scores), scores, where, number)
            else:
                self.others.add(key[1])
        self.scores.append(scores)
        if beyond := [source for source in (*scores.row, *scores.errors) if not 1 <= source <= number]:
            line = f":{scores.line[scores.row[beyond[0]]]}" if beyond[0] in scores.row else ""
            raise InputError(
                f"{scores.path}{line}: scores line {beyond[0]} of {path}, which ends with line {number}; score it anew"
            )

    def questions(self, temperature: float) -> dict[str, list[Candidate]]:
        """What the filters left at a temperature: the candidates of each question, in an order of their own."""
        found: dict[str, list[Candidate]] = {}
        kept = [c for c in self.kept if c.temperature == temperature]
        for c in sorted(kept, key=lambda c: (c.question, c.number, c.source)):
            found.setdefault(c.question, []).append(c)
        return found

    def _add(self, row: dict[str, Any], key: Key, source: int, scores: Scores, where: str, number: int) -> None:
        question, temperature, candidate = key
        text = _field(row, "text", str, where)
        self._same_question(question, _field(row, "messages", list, where), where)
        self.asked.setdefault(temperature, set()).add(question)
        index, found = scores.row.get(number), None
        if index is not None:
            types, tokens = scores.types[index].tolist(), scores.tokens[index]
            found = Candidate(question, temperature, candidate, source, index, _digest(text), *tokens, *types)
            self.read.append(found)
        drop = self._examine(row, scores.tokens[index][1] if index is not None else None, where)
        if drop is None and (found is None or not found.sentences):
            drop = _unscored(scores.errors.get(number, "no row in scores.jsonl") if found is None else "no sentences")
        if drop is not None:
            self._drop(drop, key, where, text)
        elif found is not None:
            self.kept.append(found)

    def _drop(self, drop: Drop, key: Key, where: str, text: str) -> None:
        self._examples[drop.reason] += 1
        example = {"text": _excerpt(text)} if self._examples[drop.reason] <= EXAMPLES else {}
        self.dropped.append(
            {"id": key[0], "temperature": key[1], "candidate": key[2], "line": where, **vars(drop), **example}
        )

    def _same_question(self, question: str, messages: list[Any], where: str) -> None:
        text = json.dumps(messages, ensure_ascii=False)
        known, first = self._messages.setdefault(question, (_digest(text), where))
        if known != _digest(text):
            raise InputError(f"{where}: question {question!r} has other messages than in {first}; give it another id")
        if first == where:
            for message in messages or [None]:
                if not isinstance(message, dict) or {type(message.get(key)) for key in ("role", "content")} != {str}:
                    raise InputError(f"{where}: `messages` must be objects with a role and a content, at least one")
            if text.encode("utf-8", "replace").decode() != text:
                raise InputError(f"{where}: `messages` hold half a surrogate pair, which is not text")

    def _examine(self, row: dict[str, Any], student_tokens: int | None, where: str) -> Drop | None:
        """`student_tokens`: of the response; None when the student has not counted them."""
        return examine(
            row["text"],
            finish_reason=_field(row, "finish_reason", str, where),
            tokens=lambda output: 0 if student_tokens is None else self._length(row, student_tokens),
            answer=None if row.get("answer") is None else _field(row, "answer", str, where),
            filters=self.filters,
            stop_tokens=self.chat.stop_tokens if self.chat else (),
        )[1]

    def _length(self, row: dict[str, Any], student_tokens: int) -> int:
        """Tokens of the document that prepare makes of it: prompt (of a known student), response, end of turn."""
        if self.chat is not None and row["id"] not in self._prompts:
            self._prompts[row["id"]] = len(self.chat.prompt_ids(row["messages"], system=self.system))
        return self._prompts.get(row["id"], 0) + student_tokens + 1


def _unscored(error: str) -> Drop:
    """dasd_engine.score's reason as one of the filters', where it is one."""
    kind, _, detail = error.partition(": ")
    reason = {"context": "too_long", "template": "not_trainable"}.get(kind, "not_scored")
    return Drop(reason, error if reason == "not_scored" else detail)


def _named(key: Key) -> str:
    return f"candidate {key[2]} of question {key[0]!r} at {key[1]}"


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _excerpt(text: str) -> str:
    if len(text) > 2 * EXCERPT + 40:
        text = f"{text[:EXCERPT]} [... {len(text) - 2 * EXCERPT:,} characters ...] {text[-EXCERPT:]}"
    return text.encode("utf-8", "replace").decode()


def _with_bar(path: Path, total: int, quiet: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    with progress_bar("select", quiet=quiet) as bar:
        work = bar.add_task("", total=total)
        for number, row in read_rows(path, without=("token_ids", "logprobs", "token_ends")):
            yield number, row
            bar.advance(work)

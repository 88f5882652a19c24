"""What mix begins with: questions with the teacher's token count for each, and responses to put beside.

Read from a directory of dasd_engine.select, from one of dasd_engine.sample, or from a .jsonl of responses in the
released schema. Where several candidates answer a question, the mean length of the finished ones counts; where no
count of the teacher's tokens is known (the released rows have none), the student's tokenizer counts the response.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dasd_engine.chat import Chat, Message
from dasd_engine.errors import InputError
from dasd_engine.questions import Question, parse_question
from dasd_engine.records import read_finished, read_rows

SELECTED, CANDIDATES = "selected.jsonl", "candidates.jsonl"


@dataclass(frozen=True)
class Task:
    """A question; `teacher_tokens`: how long the teacher's response to it was."""

    id: str
    messages: list[Message]
    teacher_tokens: int
    answer: str | None = None
    task: str | None = None


@dataclass
class _Lengths:
    question: Question
    finished: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    file: Path
    responses: bool  # rows are responses to train on, not candidates

    def tasks(self, chat: Chat) -> list[Task]:
        """In the order in which questions first appear. InputError naming file and line."""
        found = list(self._of_responses(chat)) if self.responses else list(self._of_candidates())
        if not found:
            raise InputError(f"{self.file}: holds no finished response, so no question has a length to go by")
        return found

    def rows(self) -> Iterator[dict[str, Any]]:
        for _, row in read_rows(self.file):
            yield row

    def _of_responses(self, chat: Chat) -> Iterator[Task]:
        seen: dict[str, int] = {}
        for number, row in read_rows(self.file):
            where = f"{self.file}:{number}"
            question = _question(row, where, number)
            if question.id in seen:  # select without a temperature keeps a response of each
                continue
            seen[question.id] = number
            yield Task(question.id, question.messages, _length(row, chat, where), question.answer, question.task)

    def _of_candidates(self) -> Iterator[Task]:
        questions: dict[str, _Lengths] = {}
        for number, row in read_rows(self.file, without=("token_ends",)):
            lengths = questions.get(str(row.get("id")))
            if lengths is None:
                lengths = _Lengths(_question(row, f"{self.file}:{number}", number))
                questions[str(row.get("id"))] = lengths
            if row.get("finish_reason") == "stop":
                lengths.finished.append(len(row.get("logprobs") or row.get("token_ids") or ()))
        for lengths in questions.values():
            if lengths.finished:
                q, mean = lengths.question, sum(lengths.finished) / len(lengths.finished)
                yield Task(q.id, q.messages, max(1, round(mean)), q.answer, q.task)


def open_source(path: str | os.PathLike[str]) -> Source:
    given = Path(path)
    if given.is_file():
        if given.suffix != ".jsonl":
            raise InputError(f"{given}: is not named .jsonl; mix reads plain JSON Lines")
        return Source(given, responses=True)
    if (given / SELECTED).exists():
        read_finished(given, "select")
        return Source(given / SELECTED, responses=True)
    if (given / CANDIDATES).exists():
        read_finished(given, "sample")
        return Source(given / CANDIDATES, responses=False)
    raise InputError(f"{given}: holds neither {SELECTED} nor {CANDIDATES}; name what select or sample has written")


def _question(row: dict[str, Any], where: str, number: int) -> Question:
    try:
        return parse_question(row, f"row-{number}")
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _length(row: dict[str, Any], chat: Chat, where: str) -> int:
    meta = row.get("meta")
    try:
        meta = json.loads(meta) if isinstance(meta, str) and meta.lstrip().startswith("{") else meta
    except ValueError:
        meta = None
    count = meta.get("teacher_tokens") if isinstance(meta, dict) else None
    if isinstance(count, int) and not isinstance(count, bool) and count > 0:
        return count
    messages = row.get("messages")
    output = row.get("output") if not messages else messages[-1].get("content")
    if not isinstance(output, str) or not output.strip():
        raise InputError(f"{where}: has no response; expected `output`, or `messages` that end in one")
    return len(chat.tokenizer.encode(output, add_special_tokens=False).ids) + 1

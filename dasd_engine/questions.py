"""Questions for a teacher: rows of files and of hub data sets, or problems that reasoning-gym makes.

    questions.jsonl  questions.parquet  owner/name@revision:train/*    as dasd_engine.sources reads them
    gym:chain_sum:1000:7                                               a task, how many (100), its seed (0)

A row is asked by its first field of these: `messages` (up to the last turn that is not the assistant's), `input`,
`prompt` (a string or messages), `question`, `problem`. Its `uuid` or `id` names it, else file and line do. `answer` and
`task` (or `domain`) are kept for later judging where the row, or the JSON in its `meta`, has them.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from dasd_engine.chat import Message
from dasd_engine.errors import InputError
from dasd_engine.sources import Source, find_sources, parse_json, parse_row, read_batches

GYM = "gym:"
FIELDS = ("messages", "input", "prompt", "question", "problem")
_MORE = ("question", "problem", "id", "answer", "task")  # columns that only this module reads

Item = TypeVar("Item")


@dataclass(frozen=True)
class Question:
    """`messages` end with the turn to be answered; they hold a system prompt only where the row has one."""

    id: str
    messages: list[Message]
    answer: str | None = None
    task: str | None = None


@dataclass(frozen=True)
class Gym:
    """A reasoning-gym task: `count` problems of `seed`."""

    task: str
    count: int
    seed: int


def read_questions(names: Iterable[str]) -> list[Question]:
    """All questions, in order. InputError naming file and line for a bad row, and both places of an id used twice."""
    questions: list[Question] = []
    places: dict[str, str] = {}
    for question, place in _read(names):
        if question.id in places:
            raise InputError(
                f"{place}: the id {question.id!r} is that of {places[question.id]} too; an id names one question: "
                "make them differ"
            )
        places[question.id] = place
        questions.append(question)
    return questions


def identify(names: Iterable[str]) -> list[dict[str, Any]]:
    """What the questions are, for a manifest: hashes of files, revisions of hub data sets, tasks and their version."""
    found: list[dict[str, Any]] = []
    for name in names:
        if name.startswith(GYM):
            found.append({"gym": name.removeprefix(GYM), "reasoning_gym": version("reasoning-gym")})
        else:
            found += [source.identity() for source in find_sources([name])]
    return found


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """`limit` of them at even distances, so that a file sorted by task still gives every task; all without a limit."""
    if limit is None or limit >= len(items):
        return list(items)
    if limit < 1:
        raise InputError(f"limit = {limit}: must be at least 1")
    return [items[i * len(items) // limit] for i in range(limit)]


def _read(names: Iterable[str]) -> Iterator[tuple[Question, str]]:
    """(question, where it is from)."""
    for name in names:
        if name.startswith(GYM):
            yield from _make(parse_gym(name))
        else:
            for source in find_sources([name]):
                yield from _read_source(source)


def _read_source(source: Source) -> Iterator[tuple[Question, str]]:
    stem = Path(source.name).name.split(".")[0]
    for batch in read_batches(source, _MORE):
        for number, data in batch.rows:
            place = f"{source.name}:{number}"
            try:
                yield parse_question(data, f"{stem}-{number}"), place
            except InputError as error:
                raise InputError(f"{place}: {error}") from error


def parse_question(data: bytes | dict[str, Any], default_id: str) -> Question:
    """A raw line or a Parquet row. InputError names the field, not the file."""
    row = data if isinstance(data, dict) else parse_json(data, f"one of {', '.join(FIELDS)}")
    field = next((field for field in FIELDS if row.get(field) is not None), None)
    if field is None:
        has = ", ".join(row) or "(none)"
        raise InputError(f"has the fields {has}; a question is in one of {', '.join(FIELDS)}")
    if field == "messages" or (field == "prompt" and isinstance(row[field], list)):
        messages = parse_row({"messages": row[field]}).messages
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
    else:
        # `parse_row` reads a pair; the answer half is not needed here.
        messages = parse_row({"prompt": row[field], "completion": ""}).messages[:1]
    if not messages or messages[-1]["role"] == "system" or not messages[-1]["content"].strip():
        raise InputError(f"{field}: asks nothing; a question ends with a turn of the user that is not empty")
    meta = _meta(row.get("meta"))
    answer = _first(row, meta, "answer")
    task = _first(row, meta, "task") or _first(row, meta, "domain")
    return Question(_first(row, {}, "uuid") or _first(row, {}, "id") or default_id, messages, answer, task)


def _meta(value: Any) -> dict[str, Any]:
    """The row's `meta`: a JSON object, or text that holds one; anything else has nothing for us."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return {}
    return value if isinstance(value, dict) else {}


def _first(row: dict[str, Any], meta: dict[str, Any], key: str) -> str | None:
    """A string or number under `key`, as text."""
    for table in (row, meta):
        value = table.get(key)
        if isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip():
            return str(value)
    return None


def parse_gym(name: str) -> Gym:
    """`gym:TASK[:count[:seed]]`."""
    task, *numbers = name.removeprefix(GYM).split(":")
    good = task and len(numbers) <= 2 and all(number.isdecimal() for number in numbers)
    if not good or (numbers and int(numbers[0]) == 0):
        raise InputError(
            f"{name}: write gym:TASK, gym:TASK:COUNT or gym:TASK:COUNT:SEED, for example gym:chain_sum:200:1"
        )
    count, seed = [int(number) for number in (*numbers, *("100", "0")[len(numbers) :])]
    return Gym(task, count, seed)


def gym_dataset(gym: Gym) -> Any:
    """reasoning-gym's dataset: entries by index, and `score_answer`. InputError where it, or the task, is not there."""
    name = f"{GYM}{gym.task}:{gym.count}:{gym.seed}"
    try:
        import reasoning_gym
    except ImportError:
        raise InputError(f"{name}: needs the extra: pip install 'dasd-engine[tasks]'") from None
    try:
        return reasoning_gym.create_dataset(gym.task, size=gym.count, seed=gym.seed)
    except ValueError as error:
        raise InputError(f"{name}: reasoning-gym has no such task ({error})") from error


def _make(gym: Gym) -> Iterator[tuple[Question, str]]:
    problems = gym_dataset(gym)
    for index in range(gym.count):
        problem = problems[index]
        answer = problem["answer"]
        messages = [{"role": "user", "content": problem["question"]}]
        id, place = f"{gym.task}-{gym.seed}-{index}", f"{GYM}{gym.task}:{gym.count}:{gym.seed}, problem {index}"
        yield Question(id, messages, None if answer is None else str(answer), gym.task), place

"""The released DASD data, read as it is: responses as JSON Lines, and the file of the teacher's logprobs beside them.

    {"uuid": "…", "input": "question", "output": "<think>…</think>answer", "domain": "…", "meta": "…"}
    {"sample_uuid": "…", "token_ids": [...], "logprobs": [...]}

joined on the uuid. The ids are the teacher's own (o200k for gpt-oss); they begin with the first token of the analysis,
without a prompt, and hold harmony's delimiters where the output has <think> and </think>.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dasd_engine.errors import InputError
from dasd_engine.scorable import Candidate

_UUID = re.compile(rb'"sample_uuid"\s*:\s*("(?:[^"\\]|\\.)*+")')


class TeacherLogprobs:
    """Rows of the logprob files by uuid; in memory are only the places where they stand. A context manager."""

    def __init__(self, paths: Sequence[str | Path]):
        self._places: dict[str, tuple[int, int, int]] = {}  # uuid -> file, offset, line
        self._paths = [Path(path) for path in paths]
        self._files: list[BinaryIO] = []
        for path in self._paths:
            self._index(path)

    def _index(self, path: Path) -> None:
        try:
            self._files.append(open(path, "rb"))  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        file, offset = self._files[-1], 0
        for number, line in enumerate(file, 1):
            if line.strip():
                match = _UUID.search(line)
                try:
                    uuid = json.loads(match[1]) if match else None
                except ValueError:
                    uuid = None
                if uuid is None:
                    raise InputError(f"{path}:{number}: has no string `sample_uuid`; expected plain JSON Lines")
                if uuid in self._places:
                    other = self._paths[self._places[uuid][0]], self._places[uuid][2]
                    raise InputError(f"{path}:{number}: sample_uuid {uuid} stands in {other[0]}:{other[1]} already")
                self._places[uuid] = len(self._files) - 1, offset, number
            offset += len(line)

    def __contains__(self, uuid: str) -> bool:
        return uuid in self._places

    def row(self, uuid: str) -> dict[str, Any]:
        """The row of a uuid; InputError naming file and line where it is not JSON."""
        index, offset, number = self._places[uuid]
        self._files[index].seek(offset)
        try:
            return json.loads(self._files[index].readline())
        except ValueError as error:
            raise InputError(f"{self._paths[index]}:{number}: is not valid JSON: {error}") from None

    def __enter__(self) -> "TeacherLogprobs":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()


def is_released(row: dict[str, Any]) -> bool:
    return "output" in row and "messages" not in row


def read_released(row: dict[str, Any], logprobs: TeacherLogprobs | None, where: str) -> Candidate:
    """A row of the released data as a candidate; one without logprobs has none. InputError naming `where`."""
    for name in ("uuid", "input", "output"):
        if not isinstance(row.get(name), str):
            raise InputError(f"{where}: `{name}` must be a string")
    if logprobs is None:
        raise InputError(f"{where}: released data has its logprobs in another file: add --teacher-logprobs FILE")
    uuid = row["uuid"]
    found = logprobs.row(uuid) if uuid in logprobs else {}
    head = {"id": uuid, "candidate": 0, "temperature": _temperature(row.get("meta"))}
    messages = [{"role": "user", "content": row["input"]}]
    return Candidate(head, messages, row["output"], found.get("token_ids"), found.get("logprobs"))


def _temperature(meta: Any) -> float | None:
    """Where the row's meta, a JSON string, says one."""
    try:
        value = json.loads(meta).get("temperature")
    except (TypeError, ValueError, AttributeError):
        return None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

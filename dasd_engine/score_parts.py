"""What the ranks of score write, each a file of its own, and the merge of those into scores.jsonl.

A part file is appended row by row, so that a killed run keeps what it had; rows of any rank count for a run that goes
on with another number of ranks. The merge puts them in the order of the candidates.
"""

import json
import os
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dasd_engine.records import Appender

SCORES, LOGPROBS = "scores.jsonl", "student_logprobs.jsonl"
_PART = "part-*.jsonl"


class Place(NamedTuple):
    source: int  # line of the candidates
    file: Path
    offset: int
    length: int


def part_file(out: Path, rank: int) -> Path:
    return out / _PART.replace("*", f"{rank:05}")


def index(out: Path) -> list[Place]:
    """Every row in the part files, by source. Torn last lines are cut off."""
    found: dict[int, Place] = {}
    for path in sorted(out.glob(_PART)):
        Appender(path).close()
        offset = 0
        with open(path, "rb") as file:
            for line in file:
                source = json.loads(line)["source"]
                found[source] = Place(source, path, offset, len(line))
                offset += len(line)
    return [found[source] for source in sorted(found)]


def merge(out: Path) -> dict[str, Any]:
    """Write scores.jsonl, and the student's logprobs where rows have them, each complete or not at all; the counts."""
    counts: Counter[str] = Counter(candidates=0, scored=0, sentences=0, teacher=0, student=0, common=0)
    errors: Counter[str] = Counter()
    with ExitStack() as stack:
        files: dict[Path, BinaryIO] = {}
        partials = {name: out / f".{name}.partial" for name in (SCORES, LOGPROBS)}
        scores, logprobs = (stack.enter_context(open(path, "wb")) for path in partials.values())
        for place in index(out):
            if place.file not in files:
                files[place.file] = stack.enter_context(open(place.file, "rb"))
            files[place.file].seek(place.offset)
            row = json.loads(files[place.file].read(place.length))
            if (values := row.pop("student_logprobs", None)) is not None:
                logprobs.write(json.dumps({"source": place.source, "logprobs": values}).encode() + b"\n")
            scores.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            counts["candidates"] += 1
            if "error" in row:
                errors[row["error"].partition(":")[0]] += 1
                continue
            counts["scored"] += 1
            counts["sentences"] += len(row["sentences"])
            counts.update({**row["counts"], **{name: row[name] for name in ("teacher_tokens", "student_tokens")}})
        for file in (scores, logprobs):
            file.flush()
            os.fsync(file.fileno())
    for name, partial in partials.items():
        if name == SCORES or partial.stat().st_size:
            os.replace(partial, out / name)
        else:
            partial.unlink()
    return {**counts, "errors": dict(errors.most_common())}


def remove_parts(out: Path) -> None:
    for path in out.glob(_PART):
        path.unlink()

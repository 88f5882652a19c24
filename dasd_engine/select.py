"""Choose the responses to train on: filter a teacher's scored candidates, take one a question, report on the choice.

    python -m dasd_engine.select scores --out chosen --temperature 0.6
    python -m dasd_engine.select scores --out control --temperature 0.6 --rule random

SCORES are directories of dasd_engine.score; each names the candidates it was made from. A rule chooses among the
candidates of one question at one temperature (at every temperature without --temperature), after the filters, so that
every rule gives a training set of the same size. --out gets

    selected.jsonl   the choice: rows that dasd_engine.prepare reads
    dropped.jsonl    every candidate that the filters refused, with the reason, and the text of some
    report.json      the report that is printed, with more detail; manifest.json marks the directory complete

Rules, filters and the report are explained in docs/selection.md.
"""

import argparse
import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from dasd_engine.chat import DEFAULT_SYSTEM, Chat
from dasd_engine.errors import InputError, run_cli
from dasd_engine.filters import REASONS, Filters, Repetition, normalise
from dasd_engine.records import (
    ASKED,
    LOCK,
    OutputDirectory,
    read_finished,
    read_json,
    versions,
    write_json,
    write_rows,
)
from dasd_engine.scored import Pool, read_scores
from dasd_engine.selection import RULES, Candidate, choose
from dasd_engine.selection_report import render, report
from dasd_engine.shards import hash_file
from dasd_engine.sources import response_fields

SELECTED, DROPPED, REPORT = "selected.jsonl", "dropped.jsonl", "report.json"


def select(
    scores: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rule: str = "teacher_count",
    beta: float = 0.1,
    alpha: float = 0.1,
    temperature: float | None = None,
    student: str | os.PathLike[str] | None = None,
    context: int = 65536,
    thinking: bool = True,
    right_only: bool = False,
    repetition: Repetition | None = Repetition(),  # noqa: B008 (immutable)
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the directory `out` (see this module's docstring) and return its manifest.

    `rule`: one of selection.RULES. `beta`, `alpha`: thresholds of selection.count_types and count_four_types.
    `temperature`: None for all, each for itself. `student`: where the student that scored lies now (its tokenizer and
    template tell how long prepare's document will be), by default where it lay then. `context`, `thinking`,
    `right_only`, `repetition`: see filters.Filters. `seed`: of the rule `random`. Raises InputError for bad input.
    """
    filters = Filters(context, thinking, right_only, repetition)
    _check(rule, beta, alpha, filters)
    given = [scores] if isinstance(scores, str | os.PathLike) else list(scores)
    inputs = [_open(Path(directory)) for directory in given]
    folder = _student(student, inputs)
    chat = Chat.load(folder) if folder else None
    hashes = {f"{name} {i}": value for i, one in enumerate(inputs, 1) for name, value in one.hashes().items()}
    if len(set(hashes.values())) < len(hashes):
        raise InputError("two of the scores directories have the same scores or candidates; name each once")
    parameters = {"rule": rule, "beta": beta, "alpha": alpha, "temperature": temperature, "seed": seed}
    asked = {
        "command": "select",
        "inputs": hashes,
        "parameters": {**parameters, **asdict(filters), "student": _identity(folder, chat)},
    }
    with OutputDirectory(out, asked) as output:
        if output.manifest is None:
            try:
                system = inputs[0].manifest.get("parameters", {}).get("system", DEFAULT_SYSTEM)
                pool = Pool(filters, chat, temperature, system)
                for one in inputs:
                    pool.add(one.candidates, read_scores(one.scores, beta, alpha), quiet)
                _write(output, pool, inputs, rule, seed)
            except InputError:
                _forget(output)
                raise
        elif not quiet:
            print(f"{output.path}: already selected from these scores, nothing to do")
        if not quiet:
            text = "\n".join([*render(read_json(output.path / REPORT)), "", f"{output.path / SELECTED}"])
            print(text.encode(sys.stdout.encoding or "utf-8", "replace").decode(sys.stdout.encoding or "utf-8"))
        assert output.manifest is not None
        return output.manifest


def _check(rule: str, beta: float, alpha: float, filters: Filters) -> None:
    if rule not in RULES:
        raise InputError(f"rule {rule!r}: must be one of {', '.join(RULES)}")
    shares = {"beta": beta, "alpha": alpha}
    if (limits := filters.repetition) is not None:
        shares |= {"lines": limits.lines, "paragraphs": limits.paragraphs, "ngrams": limits.ngrams}
        if limits.loop < 2 or limits.characters < 1:
            raise InputError(f"repetition: loop {limits.loop} must be at least 2, characters at least 1")
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise InputError(f"{name} {value}: must be from 0 to 1")
    if filters.context < 2:
        raise InputError(f"context {filters.context}: a document needs at least 2 tokens")


@dataclass(frozen=True)
class _Input:
    scores: Path
    candidates: Path
    manifest: dict[str, Any]  # of dasd_engine.score

    def hashes(self) -> dict[str, str]:
        """Contents, not names: a directory that was moved is the same input."""
        found = {"scores": hash_file(self.scores), "candidates": hash_file(self.candidates)}
        if self.manifest.get("inputs", {}).get("candidates", found["candidates"]) != found["candidates"]:
            raise InputError(f"{self.candidates}: has changed since {self.scores} was made; score it anew")
        return found


def _open(directory: Path) -> _Input:
    """A finished directory of dasd_engine.score and the candidates that its manifest names."""
    manifest = read_finished(directory, "score")
    named = manifest.get("candidates")
    if not isinstance(named, str):
        raise InputError(f"{directory}/manifest.json: names no `candidates` directory; score the candidates anew")
    candidates = Path(named) / "candidates.jsonl"
    if not candidates.is_file():
        raise InputError(
            f"{candidates}: no such file, but {directory} was made from it; put it back (released data have one "
            "response a question: prepare reads them as they are)"
        )
    return _Input(directory / "scores.jsonl", candidates, manifest)


def _student(given: str | os.PathLike[str] | None, inputs: Sequence[_Input]) -> Path | None:
    """The directory of the student that made the scores; None where they do not say."""
    students = [one.manifest.get("inputs", {}).get("student") for one in inputs]
    for one, student in zip(inputs, students, strict=True):
        if student != students[0]:
            raise InputError(f"{one.scores}: has the scores of another student than {inputs[0].scores}; select apart")
    named = given if given is not None else inputs[0].manifest.get("student")
    if named is None:
        return None
    folder = Path(named)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such directory; name where the student of {inputs[0].scores} is: --student DIR")
    file = folder / "tokenizer.json"
    expected = (students[0] or {}).get(file.name)
    if expected is not None and file.is_file() and hash_file(file) != expected:
        raise InputError(f"{file}: is not the tokenizer that {inputs[0].scores} was made with; its tokens were counted")
    return folder


def _identity(student: Path | None, chat: Chat | None) -> dict[str, str] | None:
    if student is None or chat is None:
        return None
    template = sha256(chat.template.encode()).hexdigest()
    return {"tokenizer": hash_file(student / "tokenizer.json"), "template": template}


def _write(output: OutputDirectory, pool: Pool, inputs: Sequence[_Input], rule: str, seed: int) -> None:
    """All files of the directory, each complete or absent: a killed run is simply run again."""
    if not pool.asked:
        others = ", ".join(f"{t:g}" for t in sorted(pool.others)) or "none at all"
        raise InputError(f"temperature {pool.temperature}: no candidate has it; there are {others}")
    pool.dropped.sort(key=lambda row: (row["temperature"], row["id"], row["candidate"], row["line"]))
    write_rows(output.path / DROPPED, pool.dropped)
    reasons = Counter(row["reason"] for row in pool.dropped)
    dropped = {reason: reasons[reason] for reason in REASONS if reasons[reason]}
    if not pool.kept:
        said = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
        raise InputError(f"no candidate is left by the filters: {said}; see {output.path / DROPPED}")
    sections, chosen = [], []
    for temperature in sorted(pool.asked):
        questions = pool.questions(temperature)
        choices = {name: choose(questions, name, seed) for name in RULES}
        sections.append(report(pool, temperature, questions, choices, rule, seed))
        chosen += [choices[rule][question] for question in questions]
    write_rows(output.path / SELECTED, _selected_rows(chosen, pool, inputs, rule))
    write_json(output.path / REPORT, {"parameters": output.asked["parameters"], "temperatures": sections})
    counts = {
        "candidates": len(pool.kept) + len(pool.dropped), "kept": len(pool.kept), "dropped": dropped,
        "selected": len(chosen), "student_tokens": sum(c.student_tokens for c in chosen),
    }  # fmt: skip
    sources = [{"scores": str(one.scores), "candidates": str(one.candidates)} for one in inputs]
    made_by = {"python": platform.python_version(), **versions("dasd-engine")}
    output.finish({"counts": counts, "sources": sources, "versions": made_by})


def _forget(output: OutputDirectory) -> None:
    """Let a run that wrote nothing be followed by one with what was wrong put right."""
    if {path.name for path in output.path.iterdir()} <= {ASKED, LOCK}:
        (output.path / ASKED).unlink()


def _selected_rows(
    chosen: Sequence[Candidate], pool: Pool, inputs: Sequence[_Input], rule: str
) -> Iterator[dict[str, Any]]:
    """The chosen responses in the released schema, in the order of `chosen`, their texts read again one by one."""
    lines = [pool.scores[c.source].source[c.row] for c in chosen]
    places = [
        _places(one.candidates, {line for c, line in zip(chosen, lines, strict=True) if c.source == index})
        for index, one in enumerate(inputs)
    ]
    files = [open(one.candidates, "rb") for one in inputs]  # noqa: SIM115 (closed below)
    try:
        for candidate, line in zip(chosen, lines, strict=True):
            file = files[candidate.source]
            file.seek(places[candidate.source][line])
            yield _selected_row(json.loads(file.readline()), candidate, rule)
    finally:
        for file in files:
            file.close()


def _places(path: Path, lines: set[int]) -> dict[int, int]:
    """Byte offset of each of these lines."""
    found, offset = {}, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number in lines:
                found[number] = offset
            offset += len(line)
    return found


def _selected_row(row: dict[str, Any], candidate: Candidate, rule: str) -> dict[str, Any]:
    said = response_fields(row["messages"], normalise(row["text"]))
    meta = {
        "answer": row.get("answer"), "task": row.get("task"), "temperature": candidate.temperature,
        "candidate": candidate.number, "rule": rule,
        "counts": {"teacher": candidate.teacher, "common": candidate.common, "student": candidate.student},
        "student_tokens": candidate.student_tokens, "teacher_tokens": candidate.teacher_tokens,
        "teacher": row.get("teacher"),
    }  # fmt: skip
    return {
        "uuid": row["id"], **said, "domain": row.get("task") or "", "meta": json.dumps(meta, ensure_ascii=False)
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dasd_engine.select", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, r = parser.add_argument, Repetition()
    add("scores", nargs="+", metavar="SCORES", help="directories written by dasd_engine.score")
    add("--out", required=True, metavar="DIR", help="the directory to write")
    rules = f"one of {', '.join(RULES)} (%(default)s)"
    add("--rule", choices=RULES, default="teacher_count", metavar="RULE", help=rules)
    add("--beta", type=float, default=0.1, help="a teacher sentence has p_T - p_S above this (%(default)s)")
    add("--alpha", type=float, default=0.1, help="with a distilled model: shared sentences differ less (%(default)s)")
    add("--temperature", type=float, metavar="T", help="only candidates of this one (default: all, each for itself)")
    add("--student", metavar="DIR", help="where the student that scored is now (default: where it was)")
    add("--context", type=int, default=65536, metavar="N", help="longest document, in student tokens (%(default)s)")
    add("--no-thinking", action="store_false", dest="thinking", help="keep responses without a thinking part too")
    add("--right-only", action="store_true", help="keep right answers only; the question's answer must be known")
    group = parser.add_argument_group("repetition, in the thinking part or in the answer")
    group.add_argument("--no-repetition", action="store_true", help="keep responses that repeat themselves")
    for name, kind, text in (
        ("lines", float, "largest share of characters in lines said before"),
        ("paragraphs", float, "the same of paragraphs"),
        ("ngrams", float, "largest share of passages of 16 words and signs said before"),
        ("loop", int, "times that a passage may not come in a row"),
        ("characters", int, "less repeated text than this is kept"),
    ):
        default = getattr(r, name)
        group.add_argument(f"--repeated-{name}", type=kind, default=default, metavar="X", help=f"{text} ({default})")
    add("--seed", type=int, default=0, help="of the rule random (%(default)s)")
    add("--quiet", action="store_true", help="print nothing but errors")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = vars(_parser().parse_args(arguments))
    limits = {name: options.pop(f"repeated_{name}") for name in ("lines", "paragraphs", "ngrams", "loop", "characters")}
    repetition = None if options.pop("no_repetition") else Repetition(**limits)
    select(options.pop("scores"), options.pop("out"), repetition=repetition, **options)


if __name__ == "__main__":
    run_cli(main)

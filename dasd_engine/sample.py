"""Ask a teacher every question several times at several temperatures, keeping the logprob of every sampled token.

    python -m dasd_engine.sample questions.jsonl --teacher Qwen3-32B --candidates 8 --temperature 0.6 1.0 --out sampled
    python -m dasd_engine.sample gym:chain_sum:500 --teacher vllm:Qwen3-32B --out sampled
    python -m dasd_engine.sample q.jsonl --teacher http://a:8000/v1 http://b:8000/v1 --template Qwen3-32B --out sampled

A directory is asked with the engine's own generator, vllm:DIRECTORY with vLLM in this process, a URL over HTTP. OUT is
candidates.jsonl, a row a response (docs/sampling.md has its fields); failures.jsonl, what was asked in vain and why;
manifest.json, once everything has been asked. A response is in the file as soon as it is there: what was killed goes on
with the missing ones when it is started again. Finished, the rows are in the order of the questions.

The seed of a response is a hash of (--seed, question id, temperature, candidate), so more questions or candidates
change none of those that were there.
"""

import argparse
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dasd_engine.chat import DEFAULT_SYSTEM, with_system
from dasd_engine.errors import InputError, check_ranges, run_cli
from dasd_engine.progress import progress_bar
from dasd_engine.questions import Question, identify, read_questions, spread
from dasd_engine.records import MANIFEST, Appender, OutputDirectory, read_rows, versions
from dasd_engine.teachers import (
    Failed,
    Request,
    Sampled,
    Teacher,
    TeacherChat,
    TeacherOptions,
    identify_teacher,
    open_teacher,
    parse_teacher,
)

CANDIDATES, FAILURES = "candidates.jsonl", "failures.jsonl"
_NUMBERS = ("token_ids", "logprobs", "token_ends")  # most of a row
_HOPELESS = 32  # failures without a single response, after which nothing more is asked

Key = tuple[str, float, int]  # question, temperature, candidate


@dataclass(frozen=True)
class SampleOptions:
    """What is asked of the teacher."""

    candidates: int = 4
    temperatures: tuple[float, ...] = (0.6, 1.0)
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 32768
    seed: int = 0
    limit: int | None = None
    system: str = DEFAULT_SYSTEM


def sample(
    questions: str | Sequence[str],
    teacher: TeacherOptions,
    out: str | os.PathLike[str],
    *,
    progress: bool = True,
    retry_failed: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Write the directory `out` (see this module's docstring) and return its manifest.

    Args:
        questions: names as `questions.read_questions` takes them.
        options: fields of SampleOptions. candidates: responses a question and temperature. temperatures: 0 takes the
            likeliest tokens. top_p, top_k: see `draw.SamplingParams`. max_new_tokens: longest response. limit: that
            many questions, evenly spread. system: put in front of questions that have no system prompt ("" for none).
        progress: a bar on stderr, and a table at the end.
        retry_failed: ask once more what failed before, also of a finished directory.

    Raises:
        InputError: bad questions, options, teacher; a directory made of others; a teacher that answers nothing.
    """
    names = [questions] if isinstance(questions, str) else list(questions)
    asked = SampleOptions(**options)
    asked = replace(asked, temperatures=tuple(map(float, asked.temperatures)))
    _check(asked)
    found = spread(read_questions(names), asked.limit)
    wanted = {
        "command": "sample",
        "inputs": {"questions": identify(names), "teacher": identify_teacher(teacher)},
        "parameters": asdict(asked),
    }
    with OutputDirectory(out, wanted) as output:
        failures = output.path / FAILURES
        if retry_failed and failures.exists() and failures.stat().st_size:
            (output.path / MANIFEST).unlink(missing_ok=True)
            failures.unlink()
            output.manifest = None
        if output.manifest is not None:
            if progress:
                print(f"{output.path}: already sampled from these, nothing to do")
            return output.manifest
        _Sampling(output, found, asked, progress).run(teacher)
        counts = _finish(output.path, found, asked)
        if not counts["candidates"]:
            raise InputError(_hopeless(Counter(counts["failures"]), failures))
        manifest = output.finish({"counts": counts, "versions": versions("torch", "tokenizers", "numpy")})
        if progress:
            print_summary(output.path, manifest)
        return manifest


class _Sampling:
    """One run's work on a directory: what is missing is asked for and written."""

    def __init__(self, output: OutputDirectory, questions: list[Question], asked: SampleOptions, progress: bool):
        self.questions, self.asked, self.progress = questions, asked, progress
        self.candidates, self.failures = output.appender(CANDIDATES), output.appender(FAILURES)
        self.done, self.teacher_before = _done(self.candidates, self.failures)
        self.waiting: dict[str, tuple[Question, float, int]] = {}  # what the teacher has been asked, by key

    def run(self, options: TeacherOptions) -> None:
        total = len(self.questions) * len(self.asked.temperatures) * self.asked.candidates
        if len(self.done) == total:  # killed just before the end
            return
        bar = progress_bar("sample", "made", quiet=not self.progress)
        made = tokens = 0
        reasons: Counter[str] = Counter()
        with closing(open_teacher(options)) as teacher, bar:
            self._same_teacher(teacher)
            work = bar.add_task("", total=total, completed=len(self.done), made="")
            for request, result in teacher.sample(self._requests()):
                question, temperature, candidate = self.waiting.pop(request.key)
                head = {"id": question.id, "candidate": candidate, "temperature": temperature, "seed": request.seed}
                if isinstance(result, Failed):
                    self.failures.write(head | {"reason": result.reason})
                    reasons[_kind(result.reason)] += 1
                else:
                    self.candidates.write(head | _row(question, result, teacher))
                    made += 1
                    tokens += len(result.logprobs)
                elapsed = bar.tasks[0].elapsed or 1e-9
                failed = f", {reasons.total():,} failed" if reasons else ""
                bar.update(work, advance=1, made=f"{tokens / elapsed:,.0f} tokens/s{failed}")
                if not made and not self.candidates.path.stat().st_size and reasons.total() >= min(_HOPELESS, total):
                    raise InputError(_hopeless(reasons, self.failures.path))

    def _requests(self) -> Iterator[Request]:
        """What is missing, question by question."""
        for question in self.questions:
            messages = with_system(question.messages, self.asked.system)
            for temperature in self.asked.temperatures:
                for candidate in range(self.asked.candidates):
                    key = (question.id, temperature, candidate)
                    if key in self.done:
                        continue
                    name = json.dumps(key, ensure_ascii=False)
                    self.waiting[name] = (question, temperature, candidate)
                    yield Request(
                        name, messages, temperature, request_seed(self.asked.seed, *key), self.asked.max_new_tokens,
                        self.asked.top_p, self.asked.top_k,
                    )  # fmt: skip

    def _same_teacher(self, teacher: Teacher) -> None:
        before, now = self.teacher_before, {"name": teacher.name, "revision": teacher.revision}
        if before is not None and before != now:
            raise InputError(
                f"{self.candidates.path}: was begun with the teacher {before}, this is {now}; go on with that one or "
                "choose another --out"
            )


def _row(question: Question, result: Sampled, teacher: Teacher) -> dict[str, Any]:
    return {
        "messages": question.messages, "text": result.text, "token_ids": result.token_ids,
        # As many digits as fp32 has: half of the file's size.
        "logprobs": [float(str(logprob)) for logprob in np.array(result.logprobs, dtype=np.float32)],
        "token_ends": result.token_ends, "opened": result.opened, "finish_reason": result.finish_reason,
        "teacher": {"name": teacher.name, "revision": teacher.revision},
        "answer": question.answer, "task": question.task,
    }  # fmt: skip


def request_seed(seed: int, id: str, temperature: float, candidate: int) -> int:
    """53 bits, which every JSON reader keeps exactly."""
    digest = hashlib.sha256(json.dumps([seed, id, temperature, candidate]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 11


def _check(asked: SampleOptions) -> None:
    temperatures = asked.temperatures
    check_ranges(asked, {
        "candidates": asked.candidates >= 1,
        "temperatures": bool(temperatures) and all(0 <= t < float("inf") for t in temperatures),
        "top_p": 0 < asked.top_p <= 1,
        "top_k": asked.top_k >= 0,
        "max_new_tokens": asked.max_new_tokens >= 1,
    })  # fmt: skip
    if len(set(temperatures)) < len(temperatures):
        raise InputError(f"temperatures = {temperatures}: one is named twice; candidates gives more responses to each")
    if 0 in temperatures and asked.candidates > 1:
        raise InputError("temperature 0 always gives the same response: ask for one candidate, or another temperature")


def _done(candidates: Appender, failures: Appender) -> tuple[set[Key], dict[str, Any] | None]:
    """What has its result already, and the teacher that gave it."""
    done: set[Key] = set()
    teacher = None
    for file in (candidates, failures):
        for _, row in read_rows(file.path, without=_NUMBERS):
            done.add(_key(row))
            teacher = teacher or row.get("teacher")
    return done, teacher


def _key(row: dict[str, Any]) -> Key:
    return row["id"], row["temperature"], row["candidate"]


def _finish(directory: Path, questions: list[Question], asked: SampleOptions) -> dict[str, Any]:
    """Put the rows in the order of the questions, so that runs that were killed and went on end alike; count them."""
    order = {question.id: i for i, question in enumerate(questions)}
    rank = {temperature: i for i, temperature in enumerate(asked.temperatures)}
    by_temperature = {str(t): {"candidates": 0, "tokens": 0, "cut_off": 0, "failed": 0} for t in asked.temperatures}
    reasons: Counter[str] = Counter()
    for name in (CANDIDATES, FAILURES):
        lines: list[tuple[tuple[int, int, int], int]] = []
        for number, row in read_rows(directory / name, without=("token_ids", "logprobs")):
            id, temperature, candidate = _key(row)
            lines.append(((order[id], rank[temperature], candidate), number))
            counts = by_temperature[str(temperature)]
            if name == FAILURES:
                counts["failed"] += 1
                reasons[_kind(row["reason"])] += 1
            else:
                counts["candidates"] += 1
                counts["tokens"] += len(row["token_ends"])
                counts["cut_off"] += row["finish_reason"] == "length"
        _reorder(directory / name, [number for _, number in sorted(lines)])
    totals = {key: sum(counts[key] for counts in by_temperature.values()) for key in ("candidates", "tokens", "failed")}
    return {"questions": len(questions), **totals, "by_temperature": by_temperature, "failures": dict(reasons)}


def _reorder(path: Path, numbers: list[int]) -> None:
    """The file with its lines in this order; complete or not at all."""
    if numbers == sorted(numbers):
        return
    begins, at = [0], 0
    partial = path.with_name(f".{path.name}.partial")
    with open(path, "rb") as file, open(partial, "wb") as ordered:
        for line in file:
            at += len(line)
            begins.append(at)
        for number in numbers:
            file.seek(begins[number - 1])
            ordered.write(file.readline())
        ordered.flush()
        os.fsync(ordered.fileno())
    os.replace(partial, path)


def _kind(reason: str) -> str:
    """A reason without the numbers that make each one different; a status stays."""
    return re.sub(r"(?<!HTTP )\b\d[\d.,]*", "#", reason)


def _hopeless(reasons: Counter[str], path: Path) -> str:
    shown = "; ".join(f"{reason} ({count} times)" for reason, count in reasons.most_common(3)) or "see there"
    return f"the teacher has answered nothing so far: {shown}; mend that and go on with --retry-failed ({path})"


# ---------------------------------------------------------------------------------------------- command line


def print_summary(out: Path, manifest: dict[str, Any]) -> None:
    counts = manifest["counts"]
    table = Table(title=f"{out}: {counts['candidates']:,} responses to {counts['questions']:,} questions")
    for name in ("temperature", "responses", "mean tokens", "cut off", "failed"):
        table.add_column(name, justify="right")
    for temperature, row in counts["by_temperature"].items():
        made = max(row["candidates"], 1)
        table.add_row(
            temperature, f"{row['candidates']:,}", f"{row['tokens'] / made:,.1f}", f"{row['cut_off'] / made:.1%}",
            f"{row['failed']:,}",
        )  # fmt: skip
    Console().print(table)
    print(f"{counts['tokens']:,} tokens, {manifest['wall_seconds']:.1f} s")
    for reason, count in Counter(counts["failures"]).most_common(5):
        print(f"  failed, {count:,}: {reason}")


def print_plan(names: Sequence[str], teacher: TeacherOptions, out: Path, asked: SampleOptions) -> None:
    """What would be asked: nothing is opened but the questions, and the tokenizer where there is one."""
    _check(asked)
    questions = spread(read_questions(names), asked.limit)
    total = len(questions) * len(asked.temperatures) * asked.candidates
    tasks = Counter(question.task or "no task" for question in questions)
    shown = ", ".join(f"{task} {count:,}" for task, count in tasks.most_common(8))
    temperatures = ", ".join(f"{t:g}" for t in asked.temperatures)
    print(f"questions   {len(questions):,} ({shown}{', ...' if len(tasks) > 8 else ''})")
    print(f"requests    {total:,}: {asked.candidates} candidates at each temperature of {temperatures}")
    for name in (CANDIDATES, FAILURES):
        if (out / name).exists() and (there := sum(1 for _ in read_rows(out / name, without=_NUMBERS))):
            print(f"            {there:,} of them are in {out / name}")
    if teacher.path:
        chat = TeacherChat(teacher.path)
        lengths = []
        for question in questions:
            messages = with_system(question.messages, asked.system)
            lengths.append(len(chat.prompt(Request("", messages, 0.0, 0, 1))[0]))
        print(f"prompts     {np.mean(lengths):,.1f} tokens in the mean, {max(lengths):,} the longest")
    print(f"new tokens  at most {total * asked.max_new_tokens:,} ({asked.max_new_tokens:,} each)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dasd_engine.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "questions",
        nargs="+",
        help="files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet), hub data sets, gym:TASK[:N[:SEED]]",
    )
    add("--teacher", nargs="+", required=True, metavar="NAME", help="DIR, vllm:DIR, or URLs of one model's servers")
    add("--out", required=True, type=Path, metavar="DIR", help="the directory to write")
    add("--candidates", type=int, default=4, metavar="N", help="responses a question and temperature (default 4)")
    add("--temperature", type=float, nargs="+", default=[0.6, 1.0], metavar="T", help="default 0.6 1.0")
    add("--top-p", type=float, default=1.0, help="default 1")
    add("--top-k", type=int, default=0, help="default 0, for all tokens")
    add("--max-new-tokens", type=int, default=SampleOptions.max_new_tokens, metavar="N", help="default %(default)s")
    add("--seed", type=int, default=0, help="of the sampling (default 0)")
    add("--limit", type=int, metavar="N", help="that many questions, evenly spread")
    add("--system", default=DEFAULT_SYSTEM, help="system prompt, empty for none (default: %(default)r)")
    add("--retry-failed", action="store_true", help="ask once more what failed before")
    add("--dry-run", action="store_true", help="print what would be asked, and ask nothing")
    add("--quiet", action="store_true", help="print nothing but errors")
    group = parser.add_argument_group("teacher")
    group.add_argument("--template", metavar="DIR", default="", help="tokenizer and chat template of a server's model")
    for option in fields(TeacherOptions):
        if option.name not in ("kind", "path", "urls"):
            kind = {"choices": ("auto", "bf16", "fp32")} if option.name == "dtype" else {"type": type(option.default)}
            name = "--teacher-name" if option.name == "name" else "--" + option.name.replace("_", "-")
            shown = f" (default {option.default})" if option.default else ""
            text = option.metadata["doc"] + ("" if "default" in option.metadata["doc"] else shown)
            group.add_argument(name, default=option.default, help=text, **kind)
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = vars(_parser().parse_args(arguments))
    args["name"] = args.pop("teacher_name")
    named = parse_teacher(args.pop("teacher"))
    if args["template"] and named["kind"] != "server":
        raise InputError("--template is for servers; a directory has its own")
    named.setdefault("path", args.pop("template"))
    known = {option.name for option in fields(TeacherOptions)}
    teacher = TeacherOptions(**named, **{key: args.pop(key) for key in list(args) if key in known})
    args["temperatures"] = tuple(args.pop("temperature"))
    asked = {option.name: args.pop(option.name) for option in fields(SampleOptions)}
    if args["dry_run"]:
        print_plan(args["questions"], teacher, args["out"], SampleOptions(**asked))
        return
    sample(
        args["questions"], teacher, args["out"], progress=not args["quiet"], retry_failed=args["retry_failed"], **asked
    )


if __name__ == "__main__":
    run_cli(main)

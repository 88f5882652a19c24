"""Measure a model on verifiable problems: pass@1 averaged over samples, by task, with lengths and cut-off rate.

    python -m dasd_engine.evaluate runs/quickstart/export/high recipes/quickstart/heldout.jsonl
    python -m dasd_engine.evaluate Qwen3-4B aime.jsonl --samples 64 --temperature 1 0.6 0 --max-new-tokens 65536 --out b
    python -m dasd_engine.evaluate http://a:8000/v1 http://b:8000/v1 gym:chain_sum:200 --out served
    python -m dasd_engine.evaluate --compare a b

MODEL is any teacher: a directory is asked with the engine's own generator, vllm:DIRECTORY with vLLM, URLs over HTTP.
Problems are files with answers, hub data sets, or reasoning-gym tasks; how an answer is judged: docs/evaluate.md.

With --out a response is in responses.jsonl as soon as it is there: a run that was killed goes on with the missing ones
when it is started again. manifest.json, once all are there, has the reports. --compare pairs the problems of two such
directories. The seed of a response is a hash of (--seed, question id, temperature, sample): two models are asked with
the same draws, and more problems or samples change none of those that were there.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dasd_engine.chat import DEFAULT_SYSTEM, with_system
from dasd_engine.errors import InputError, check_ranges, run_cli
from dasd_engine.evaluation_report import (
    FAILED,
    RESPONSES,
    EvalReport,
    Key,
    Response,
    compare,
    print_comparison,
    print_report,
    read_responses,
    summarize,
)
from dasd_engine.problems import SCORERS, Problem, final_answer, read_problems
from dasd_engine.progress import progress_bar
from dasd_engine.questions import identify, spread
from dasd_engine.records import MANIFEST, OutputDirectory, write_rows
from dasd_engine.sample import request_seed
from dasd_engine.teachers import (
    Failed,
    Request,
    Sampled,
    Teacher,
    TeacherOptions,
    identify_teacher,
    open_teacher,
    teacher_options,
)


@dataclass(frozen=True)
class EvalOptions:
    """What is asked of the model. `samples` of each problem and temperature, but one at temperature 0."""

    samples: int = 4
    temperatures: tuple[float, ...] = (1.0,)
    top_p: float = 1.0
    max_new_tokens: int = 1024
    seed: int = 0
    limit: int | None = None  # problems, evenly spread
    system: str = DEFAULT_SYSTEM
    scorer: str = "auto"  # of problems that bring none

    def check(self) -> None:
        check_ranges(self, {
            "samples": self.samples >= 1,
            "temperatures": bool(self.temperatures) and all(0 <= t < float("inf") for t in self.temperatures),
            "top_p": 0 < self.top_p <= 1,
            "max_new_tokens": self.max_new_tokens >= 1,
        })  # fmt: skip
        if len(set(self.temperatures)) < len(self.temperatures):
            raise InputError(f"temperatures = {self.temperatures}: one is named twice; samples gives more responses")


def evaluate(
    model: TeacherOptions,
    problems: str | Sequence[str],
    out: str | os.PathLike[str],
    *,
    progress: bool = True,
    retry_failed: bool = False,
    **options: Any,
) -> list[EvalReport]:
    """Write the directory `out` (see this module's docstring); the reports of its temperatures.

    `options`: fields of EvalOptions. `retry_failed`: ask once more what was not answered, also of a finished directory.
    Raises InputError: bad problems, options, model; a directory made from others; a model that answers nothing.
    """
    names = [problems] if isinstance(problems, str) else list(problems)
    asked = EvalOptions(**options)
    asked = replace(asked, temperatures=tuple(map(float, asked.temperatures)))
    found = read(names, asked)
    wanted = {
        "command": "evaluate",
        "inputs": {"problems": identify(names), "model": identify_teacher(model)},
        "parameters": asdict(asked),
    }
    with OutputDirectory(out, wanted) as output:
        path, rows = output.path / RESPONSES, output.appender(RESPONSES)
        before = read_responses(path) if path.stat().st_size else []
        there = {r.key: r for r in before if not (retry_failed and r.finish_reason == FAILED)}
        if output.manifest is not None and len(there) == len(before):
            return summarize(before)
        (output.path / MANIFEST).unlink(missing_ok=True)
        with closing(open_teacher(model)) as teacher:
            for response in respond(teacher, found, asked, list(there.values()), progress):
                rows.write(asdict(response))
                there[response.key] = response
        ordered = in_order(there, found, asked)
        write_rows(path, map(asdict, ordered))
        reports = summarize(ordered)
        counts = {"problems": len(found), "responses": len(ordered), "tokens": sum(r.length for r in ordered)}
        output.finish({"reports": list(map(asdict, reports)), "counts": counts})
        return reports


def ask(teacher: Teacher, problems: Sequence[Problem], asked: EvalOptions, progress: bool = False) -> list[Response]:
    """The judged responses of a teacher that is open, in the order of `in_order`; nothing is written."""
    found = {response.key: response for response in respond(teacher, problems, asked, [], progress)}
    return in_order(found, problems, asked)


def respond(
    teacher: Teacher, problems: Sequence[Problem], asked: EvalOptions, there: Sequence[Response], progress: bool
) -> Iterator[Response]:
    """The judged responses that are not `there` yet, as they are finished. InputError if all there is has failed."""
    done = {r.key for r in there}
    waiting: dict[str, tuple[Problem, Key]] = {}
    reasons = Counter(r.error for r in there if r.finish_reason == FAILED)

    def requests() -> Iterator[Request]:
        for problem in problems:
            messages = with_system(problem.question.messages, asked.system)
            for key in _keys(problem, asked):
                if key not in done:
                    name = json.dumps(key, ensure_ascii=False)
                    waiting[name] = problem, key
                    yield Request(
                        name, messages, key[1], request_seed(asked.seed, *key), asked.max_new_tokens, asked.top_p
                    )

    total = sum(len(_keys(problem, asked)) for problem in problems)
    bar = progress_bar("evaluate", "right", quiet=not progress)
    right, made = sum(r.correct for r in there), len(there)
    with bar:
        work = bar.add_task("", total=total, completed=len(done), right="")
        for request, result in teacher.sample(requests()):
            response = _judge(*waiting.pop(request.key), result)
            right, made = right + response.correct, made + 1
            if response.finish_reason == FAILED:
                reasons[response.error] += 1
            bar.update(work, advance=1, right=f"{right / made:.0%} right")
            yield response
    if made and reasons.total() == made:
        shown = "; ".join(f"{reason} ({count} times)" for reason, count in reasons.most_common(3))
        raise InputError(f"the model has answered nothing: {shown}; mend that and go on with --retry-failed")


def _keys(problem: Problem, asked: EvalOptions) -> list[Key]:
    return [(problem.question.id, t, i) for t in asked.temperatures for i in range(asked.samples if t else 1)]


def in_order(there: dict[Key, Response], problems: Sequence[Problem], asked: EvalOptions) -> list[Response]:
    """By temperature, problem and sample as asked, so that runs that were killed and went on end alike."""
    keys = [key for problem in problems for key in _keys(problem, asked)]
    return [there[key] for temperature in asked.temperatures for key in keys if key[1] == temperature]


def _judge(problem: Problem, key: Key, result: Sampled | Failed) -> Response:
    id, temperature, sample = key
    question = problem.question.messages[-1]["content"]
    head: dict[str, Any] = {
        "id": id, "task": problem.task, "temperature": temperature, "sample": sample, "question": question
    }  # fmt: skip
    if isinstance(result, Failed):
        return Response(
            **head, answer="", correct=False, finish_reason=FAILED, length=0, output="", error=result.reason
        )  # fmt: skip
    answer, correct, error = final_answer(result.text), False, None
    try:
        correct = answer is not None and problem.judge(answer)
    except Exception as raised:  # scorers are foreign code: what they raise is counted and told
        error = f"{type(raised).__name__}: {raised}"
    return Response(
        **head, answer=answer or "", correct=correct, finish_reason=result.finish_reason, length=len(result.token_ends),
        output=result.text, error=error,
    )  # fmt: skip


def read(names: Sequence[str], asked: EvalOptions) -> list[Problem]:
    """The problems that the options ask for. InputError for bad options, too."""
    asked.check()
    return spread(read_problems(names, asked.scorer), asked.limit)


# ---------------------------------------------------------------------------------------------- command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dasd_engine.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="MODEL PROBLEMS", help="a teacher (or several URLs of one), then files or tasks")
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two directories of --out: B minus A, paired")
    add("--samples", type=int, default=EvalOptions.samples, help="responses a problem (default %(default)s; 1 at 0)")
    add("--temperature", type=float, nargs="+", default=[1.0], help="one or several; 0 takes the likeliest token (1)")
    add("--top-p", type=float, default=1.0, help="default 1")
    add("--max-new-tokens", type=int, default=EvalOptions.max_new_tokens, help="longest response (default %(default)s)")
    add("--scorer", choices=SCORERS, default="auto", help="of problems that are no reasoning-gym tasks (default auto)")
    add("--limit", type=int, help="that many problems, evenly spread")
    add("--seed", type=int, default=0, help="of the sampling (default 0)")
    add("--system", default=DEFAULT_SYSTEM, help="system prompt, empty for none (default: %(default)r)")
    add("--out", type=Path, help="directory for manifest.json and responses.jsonl")
    add("--model-option", action="append", default=[], metavar="KEY=VALUE", help="a key of a recipe's [teacher]: "
        "dtype=fp32, batch_size=128, path=DIR (tokenizer and template of a served model), ...")  # fmt: skip
    add("--retry-failed", action="store_true", help="ask again what --out says was not answered")
    add("--json", action="store_true", help="print JSON instead of the table")
    return parser


def _split(names: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """(model, problems): the first name, or all the URLs in front."""
    urls = next((i for i, name in enumerate(names) if not name.startswith(("http://", "https://"))), len(names))
    model, problems = names[: urls or 1], names[urls or 1 :]
    if not model or not problems:
        raise InputError("name a model and problems, python -m dasd_engine.evaluate MODEL problems.jsonl, or --compare")
    return model, problems


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    if args.compare:
        found, notes = compare(*args.compare)
        print_comparison(args.compare, found, notes, args.json)
        return
    names, problems = _split(args.names)
    model = teacher_options(names, args.model_option, "--model-option")
    asked = {f.name: getattr(args, f.name) for f in fields(EvalOptions) if f.name != "temperatures"}
    asked["temperatures"] = tuple(args.temperature)
    if args.out:
        reports = evaluate(model, problems, args.out, retry_failed=args.retry_failed, **asked)
    else:
        options = EvalOptions(**asked)
        wanted = read(problems, options)
        with closing(open_teacher(model)) as teacher:
            reports = summarize(ask(teacher, wanted, options, progress=True))
    print_report(reports, f"{' '.join(names)} on {' '.join(problems)}", as_json=args.json)


if __name__ == "__main__":
    run_cli(main)

"""Measure a model on verifiable problems: pass@1 averaged over samples, by task, with lengths and cut-off rate.

    python -m dasd_engine.evaluate runs/quickstart/export/high recipes/quickstart/heldout.jsonl
    python -m dasd_engine.evaluate Qwen3-4B aime.jsonl --samples 64 --temperature 1 --max-new-tokens 65536 --out scores

Problems are JSONL in the schema of the released DASD data: `input` is the question, and `meta` a JSON string that holds
{"answer": "42", "task": "chain_sum"} (without `task`, the row's `domain` names the group). With --out, manifest.json
gets the report and what it was measured on, responses.jsonl every response.

How an answer is judged. The answer of a response is what follows its last </think>; a response that opens <think> and
never closes it has none; one without thinking is all answer. If it holds a \\boxed{...}, the last one is the answer.
It is right when it equals the expected answer after normalisation (white space, letter case, $ signs and a final
period do not count) or as a number (1,200 = 1200.0; 1/2 = 0.5; exactly, without tolerance). Otherwise what follows the
last "answer is" or "answer:" is tried in the same way, and, where a number is expected, the last number of the answer.
"""

import argparse
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dasd_engine.chat import DEFAULT_SYSTEM, Chat
from dasd_engine.errors import InputError, run_cli
from dasd_engine.generate import Generation, generate
from dasd_engine.hf import load_model
from dasd_engine.model import Decoder
from dasd_engine.questions import spread

_RESAMPLES = 2000  # of the bootstrap
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Problem:
    uuid: str
    question: str
    answer: str
    task: str


@dataclass(frozen=True)
class EvalReport:
    """Shares are of 1, lengths in tokens of the response, stop token included."""

    pass_at_1: float  # mean over problems of the share of right samples
    interval: tuple[float, float]  # 95 % of pass_at_1: percentile bootstrap over problems
    count: int  # problems
    samples: int  # of each
    by_task: dict[str, float]  # pass@1 of each task
    count_by_task: dict[str, int]
    interval_by_task: dict[str, tuple[float, float]]
    mean_length: float
    cut_off_rate: float  # share of responses that reached max_new_tokens
    seconds: float


@dataclass(frozen=True)
class Response:
    uuid: str
    task: str
    sample: int
    answer: str
    correct: bool
    finish_reason: str
    length: int
    output: str


def evaluate(
    model: Decoder,
    chat: Chat,
    problems: Path | str,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 1024,
    seed: int = 0,
    limit: int | None = None,
    system: str = DEFAULT_SYSTEM,
    batch_size: int = 128,
    progress: bool = False,
) -> EvalReport:
    """Ask `model` every problem `samples` times and score the answers (rules: this module's docstring).

    `limit` takes problems evenly spread over the file. Raises InputError naming file and line.
    """
    found = spread(read_problems(Path(problems)), limit)
    started = time.monotonic()
    responses = respond(
        model, chat, found, samples=samples, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens,
        seed=seed, system=system, batch_size=batch_size, progress=progress,
    )  # fmt: skip
    return summarize(responses, samples, time.monotonic() - started)


def read_problems(path: Path) -> list[Problem]:
    """Every problem of a JSONL file; blank lines are skipped. Raises InputError naming file and line."""
    problems = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    problems.append(_parse(line, f"{path}:{number}", number))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if not problems:
        raise InputError(f"{path}: holds no problems")
    return problems


def _parse(line: bytes, where: str, number: int) -> Problem:
    row = _object(line, where)
    question = row.get("input")
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{where}: `input` must be the question, a non-empty string")
    if not isinstance(row.get("meta"), str):
        raise InputError(f'{where}: `meta` must be a JSON string such as "{{\\"answer\\": \\"42\\"}}"')
    meta = _object(row["meta"], f"{where}: meta")
    answer = meta.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise InputError(f"{where}: meta holds no `answer`, so nothing can be verified; this needs verifiable problems")
    task = meta.get("task") or row.get("domain") or "all"
    return Problem(str(row.get("uuid", number)), question, answer, str(task))


def _object(text: bytes | str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: is not UTF-8 (byte {error.start})") from error
    except ValueError as error:
        raise InputError(f"{where}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be a JSON object, not {type(value).__name__}")
    return value


def respond(
    model: Decoder, chat: Chat, problems: Sequence[Problem], *, samples: int, temperature: float, top_p: float,
    max_new_tokens: int, seed: int, system: str, batch_size: int, progress: bool,
) -> list[Response]:  # fmt: skip
    """`samples` judged responses to each problem, in order: all of the first problem's, then the second's."""
    if samples < 1:
        raise InputError(f"samples = {samples}: must be at least 1")
    prompts = [chat.prompt_ids([{"role": "user", "content": p.question}], system=system) for p in problems]
    bar = Progress(
        TextColumn("evaluate"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), disable=not progress, transient=True,
    )  # fmt: skip
    with bar:
        work = bar.add_task("", total=len(prompts) * samples)
        out = generate(
            model, [prompt for prompt in prompts for _ in range(samples)], max_new_tokens=max_new_tokens,
            temperature=temperature, top_p=top_p, stop_ids=chat.stop_ids, seed=seed, batch_size=batch_size,
            on_finish=lambda index, generation: bar.advance(work),
        )  # fmt: skip
    return [_judge(chat, problems[i // samples], i % samples, generation) for i, generation in enumerate(out)]


def _judge(chat: Chat, problem: Problem, sample: int, generation: Generation) -> Response:
    tokens = generation.tokens
    text = tokens[:-1] if generation.finish_reason == "stop" else tokens
    output = chat.tokenizer.decode(text, skip_special_tokens=False)
    answer = final_answer(output)
    return Response(
        problem.uuid, problem.task, sample, answer or "", answer is not None and is_right(answer, problem.answer),
        generation.finish_reason, len(tokens), output,
    )  # fmt: skip


def summarize(responses: Sequence[Response], samples: int, seconds: float) -> EvalReport:
    """The report of responses as `respond` orders them."""
    right = np.array([r.correct for r in responses], dtype=float).reshape(-1, samples).mean(1)
    tasks = np.array([r.task for r in responses])[::samples]
    groups = {str(task): right[tasks == task] for task in sorted(set(tasks))}
    return EvalReport(
        pass_at_1=float(right.mean()),
        interval=bootstrap(right),
        count=len(right),
        samples=samples,
        by_task={task: float(group.mean()) for task, group in groups.items()},
        count_by_task={task: len(group) for task, group in groups.items()},
        interval_by_task={task: bootstrap(group) for task, group in groups.items()},
        mean_length=float(np.mean([r.length for r in responses])),
        cut_off_rate=float(np.mean([r.finish_reason == "length" for r in responses])),
        seconds=seconds,
    )


def bootstrap(scores: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the mean of `scores` [problems], resampling problems; always the same draws."""
    picks = np.random.default_rng(0).integers(len(scores), size=(_RESAMPLES, len(scores)))
    low, high = np.percentile(scores[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


# ---------------------------------------------------------------------------------------------- judging an answer

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(
    rf"(?:(?<![\w)])[-+])?(?:{_INTEGER}(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?"  # "5-3" holds 3, not -3
)
_PHRASE = re.compile(r"answer(?:\s+is|\s*:)\s*:?", re.IGNORECASE)


def final_answer(output: str) -> str | None:
    """What follows the last </think>, or inside the last \\boxed{} there; None when the thinking never ended."""
    thinking, closed, answer = output.rpartition("</think>")
    if not closed and "<think>" in answer:
        return None
    boxed = answer.rfind("\\boxed{")
    if boxed < 0:
        return answer.strip()
    begin = boxed + len("\\boxed{")
    depth = 1
    for end in range(begin, len(answer)):
        depth += {"{": 1, "}": -1}.get(answer[end], 0)
        if depth == 0:
            return answer[begin:end].strip()
    return answer[begin:].strip()


def is_right(answer: str, expected: str) -> bool:
    """Whether `answer` gives `expected` (rules: this module's docstring)."""
    candidates = [answer]
    if phrases := list(_PHRASE.finditer(answer)):
        candidates.append(answer[phrases[-1].end() :])
    if _number(expected) is not None and (numbers := [m[0] for m in _NUMBER.finditer(answer)]):
        candidates.append(numbers[-1])
    return any(_equal(candidate, expected) for candidate in candidates)


def _equal(a: str, b: str) -> bool:
    x, y = _number(a), _number(b)
    return x == y if x is not None and y is not None else _normalize(a) == _normalize(b)


def _normalize(text: str) -> str:
    return " ".join(text.replace("$", " ").split()).casefold().removesuffix(".").rstrip()


def _number(text: str) -> Fraction | None:
    """The number that the whole text is, exactly; None when it is anything else."""
    text = _normalize(text)
    if not _NUMBER.fullmatch(text):
        return None
    over, _, under = text.replace(",", "").partition("/")
    try:
        return Fraction(over.strip()) / Fraction(under.strip() or 1)
    except (ValueError, ZeroDivisionError):
        return None


# ---------------------------------------------------------------------------------------------- command line


def print_report(report: EvalReport, title: str) -> None:
    """The table a person reads, to stdout."""
    table = Table(title=title, title_justify="left")
    for name in ("task", "problems", "pass@1", "95 % interval"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, score in report.by_task.items():
        table.add_row(task, str(report.count_by_task[task]), _percent(score), _range(report.interval_by_task[task]))
    table.add_section()
    table.add_row("all", str(report.count), _percent(report.pass_at_1), _range(report.interval))
    Console().print(table)
    print(
        f"{report.samples} sample{'s' * (report.samples > 1)} a problem, mean length {report.mean_length:.1f} tokens, "
        f"{_percent(report.cut_off_rate)} cut off, {report.seconds:.1f} s"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _range(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}"


def _write(out: Path, report: EvalReport, responses: Sequence[Response], args: argparse.Namespace) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "responses.jsonl", "w", encoding="utf-8") as file:
        for response in responses:
            file.write(json.dumps(asdict(response), ensure_ascii=False) + "\n")
    manifest = {
        "report": asdict(report),
        "problems": {"path": str(args.problems), "sha256": sha256(args.problems.read_bytes()).hexdigest()},
        "model": str(args.model),
        "parameters": {k: v for k, v in vars(args).items() if not isinstance(v, Path) and k != "json"},
        "versions": {"torch": torch.__version__},
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dasd_engine.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, help="Hugging Face directory: weights, config, tokenizer and chat template")
    add("problems", type=Path, help="JSONL of problems with answers")
    add("--samples", type=int, default=1, help="responses a problem (default 1)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default 0)")
    add("--top-p", type=float, default=1.0, help="default 1")
    add("--max-new-tokens", type=int, default=1024, help="longest response (default 1024)")
    add("--limit", type=int, help="that many problems, evenly spread over the file")
    add("--seed", type=int, default=0, help="of the sampling (default 0)")
    add("--system", default=DEFAULT_SYSTEM, help="system prompt, empty for none (default: %(default)r)")
    add("--batch-size", type=int, default=128, help="responses written together (default 128)")
    add("--dtype", choices=_DTYPES, help="of the weights (default: bf16 on a GPU, fp32 on the CPU)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    add("--out", type=Path, help="directory for manifest.json and responses.jsonl")
    add("--json", action="store_true", help="print the report as JSON instead of the table")
    return parser


def main() -> None:
    args = _parser().parse_args()
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    problems = spread(read_problems(args.problems), args.limit)
    model = load_model(args.model, dtype=_DTYPES[args.dtype], device=args.device)
    started = time.monotonic()
    responses = respond(
        model, Chat.load(args.model), problems, samples=args.samples, temperature=args.temperature, top_p=args.top_p,
        max_new_tokens=args.max_new_tokens, seed=args.seed, system=args.system, batch_size=args.batch_size,
        progress=True,
    )  # fmt: skip
    report = summarize(responses, args.samples, time.monotonic() - started)
    if args.out:
        _write(args.out, report, responses, args)
    if args.json:
        print(json.dumps(asdict(report), indent=1))
    else:
        print_report(report, f"{args.model} on {args.problems}")


if __name__ == "__main__":
    run_cli(main)

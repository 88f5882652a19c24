r"""Mixed-policy responses: the student begins, the teacher continues; joined with the teacher's own responses.

    python -m dasd_engine.mix selected --student runs/train-high/export/high --teacher teachers/Qwen3-32B --out mixed
    python -m dasd_engine.mix selected --student DIR --teacher http://node1:8000/v1 http://node2:8000/v1 \
        --teacher-option path=gpt-oss-120b --markers harmony --out mixed

SELECTED is a directory of dasd_engine.select (or of dasd_engine.sample, or a .jsonl of released responses). The student
answers each question under a cap of 1.5 times the teacher's token count for it. Responses that the cap cuts off are cut
again at a random token in their second half; the teacher continues from there, as a prefill of its own template. What
passes the filters is joined with SELECTED's own rows, 20 for every 7.7. --out gets

    rollouts.jsonl       the student's responses; continuations.jsonl the teacher's: a killed run goes on with these
    dropped.jsonl        what could not be used, with the reason
    mixed.jsonl          rows for dasd_engine.prepare; mixed-policy ones have their `prefix` and its token ids
    manifest.json        counts, parameters, inputs

Loss on the student's prefix is prepare's default; python -m dasd_engine.prepare --mask-prefix leaves it out.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from dasd_engine.chat import DEFAULT_SYSTEM, Chat, Prefix
from dasd_engine.errors import InputError, run_cli
from dasd_engine.filters import REASONS, Drop, Filters, Repetition, examine
from dasd_engine.hf import DTYPES, MODEL_FILES
from dasd_engine.mix_input import Source, Task, open_source
from dasd_engine.mix_sampling import CONTINUATIONS, ROLLOUTS, MixOptions, Sampling
from dasd_engine.mixed_policy import MARKERS, hash_uniform, join, token_cap
from dasd_engine.records import OutputDirectory, write_rows
from dasd_engine.shards import hash_file, hash_files
from dasd_engine.sources import response_fields
from dasd_engine.teachers import TeacherOptions, identify_teacher, teacher_options

DROPPED, MIXED = "dropped.jsonl", "mixed.jsonl"
_REASONS = ("no_room", "special_token", "teacher_failed", *REASONS, "prefix_changed")


class NothingMixed(InputError):
    """Everything was asked, and no mixed-policy response is left."""


def mix(
    source: str | os.PathLike[str],
    student_dir: str | os.PathLike[str],
    teacher: TeacherOptions,
    out: str | os.PathLike[str],
    *,
    options: MixOptions = MixOptions(),  # noqa: B008 (immutable)
    off_policy: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
    device: str | None = None,
    dtype: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the directory `out` (see this module's docstring) and return its manifest.

    `off_policy`: a directory or file as `source`, of which rows are put beside; by default `source` itself. `device`
    and `dtype` ("fp32", "bf16") are the student's. Raises InputError for bad input and for a teacher that is down.
    """
    options.check()
    given = open_source(source)
    beside = given if off_policy is None else open_source(off_policy)
    if not beside.responses:
        raise InputError(f"{beside.file}: are candidates, not responses to train on; name off-policy rows of select")
    student = Path(student_dir)
    chat = Chat.load(student)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("fp32" if device == "cpu" else "bf16")
    asked = {
        "command": "mix",
        "inputs": {
            "responses": hash_file(given.file), "off_policy": hash_file(beside.file),
            "student": hash_files(student, MODEL_FILES),
        },
        "parameters": {**asdict(options), "dtype": dtype, "teacher": identify_teacher(teacher)},
    }  # fmt: skip
    with OutputDirectory(out, asked) as output:
        if output.manifest is not None:
            if not quiet:
                print(f"{output.path}: already mixed from these, nothing to do")
            return output.manifest
        tasks = _chosen(given.tasks(chat), options)
        sampling = Sampling(output, chat, tasks, options, quiet)
        sampling.roll_out(student, device, dtype, batch_size)
        sampling.ask(teacher)
        counts = _Assembly(output.path, chat, tasks, options).assemble(beside)
        facts = {"counts": counts, "student": str(student.resolve()), "responses": str(given.file.resolve())}
        manifest = output.finish(facts)
        if not quiet:
            print(summary(output.path, counts))
        return manifest


class _Assembly:
    """Rollouts and continuations to rows for prepare."""

    def __init__(self, path: Path, chat: Chat, tasks: list[Task], options: MixOptions):
        self.path, self.chat, self.tasks, self.options = path, chat, tasks, options

    def assemble(self, beside: Source) -> dict[str, Any]:
        """Write mixed.jsonl and dropped.jsonl, in the order of the questions; returns the counts."""
        dropped: list[dict[str, Any]] = []
        counts: Counter[str] = Counter(mixed=0)

        def rows() -> Iterator[dict[str, Any]]:
            for task, rollout, continuation in self._pairs():
                counts["questions"] += 1
                counts["cut_off" if rollout.get("finish_reason") == "length" else "not_cut_off"] += 1
                counts["capped_by_context"] += rollout["cap"] < token_cap(task.teacher_tokens, self.options.cap)
                if "prefix" not in rollout and "reason" not in rollout:
                    continue
                output, drop = self._response(task, rollout, continuation)
                if drop is None:
                    counts["mixed"] += 1
                    counts["prefix_tokens"] += rollout["cut"]
                    counts["continuation_tokens"] += continuation["tokens"]
                    yield self._row(task, output, rollout, continuation)
                else:
                    dropped.append({"id": task.id, "reason": drop.reason, "detail": drop.detail})
            counts["off_policy_wanted"] = round(counts["mixed"] * self.options.ratio[0] / self.options.ratio[1])
            chosen = self._off_policy(beside, counts["off_policy_wanted"])
            counts["off_policy"] = len(chosen)
            yield from (row for i, row in enumerate(beside.rows()) if i in chosen)

        write_rows(self.path / MIXED, rows())
        write_rows(self.path / DROPPED, dropped)
        reasons = Counter(row["reason"] for row in dropped)
        found = {**counts, "dropped": {reason: reasons[reason] for reason in _REASONS if reasons[reason]}}
        if not counts["mixed"]:
            (self.path / MIXED).unlink()
            raise NothingMixed(
                f"{self.path}: no mixed-policy response is left of {counts['questions']:,} questions: "
                f"{counts['not_cut_off']:,} ended before the cap, dropped: {found['dropped'] or 0}; see {DROPPED}; "
                "run it again where the teacher failed, else give it more questions or a lower cap, in another --out"
            )
        return found

    def _pairs(self) -> Iterator[tuple[Task, dict[str, Any], dict[str, Any]]]:
        rollouts, continuations = _Lines(self.path / ROLLOUTS), _Lines(self.path / CONTINUATIONS)
        with closing(rollouts), closing(continuations):
            for task in self.tasks:
                yield task, rollouts[task.id], continuations[task.id]

    def _response(
        self, task: Task, rollout: dict[str, Any], continuation: dict[str, Any]
    ) -> tuple[str, Drop | None]:  # fmt: skip
        if "reason" in rollout:
            return "", Drop(rollout["reason"], rollout["detail"])
        if "failed" in continuation:
            return "", Drop("teacher_failed", continuation["failed"])
        o, prefix = self.options, rollout["prefix"]

        def tokens(output: str) -> int:
            written = Prefix(prefix, rollout["prefix_ids"]) if output.startswith(prefix) else None
            messages = [*task.messages, {"role": "assistant", "content": output}]
            untrained = range(len(task.messages))
            documents = self.chat.documents(messages, system=o.system, prefix=written, untrained=untrained)
            return len(documents[-1][0])

        text = join(prefix, continuation["text"], markers=o.markers, instructed=o.continuation == "instruct")
        output, drop = examine(
            text, finish_reason=continuation["finish_reason"], tokens=tokens, answer=task.answer, filters=o.filters,
            stop_tokens=self.chat.stop_tokens,
        )  # fmt: skip
        if drop is None and not output.startswith(prefix):
            drop = Drop("prefix_changed", "normalising the response changes what the student wrote")
        return output, drop

    def _row(
        self, task: Task, output: str, rollout: dict[str, Any], continuation: dict[str, Any]
    ) -> dict[str, Any]:  # fmt: skip
        meta = {
            "answer": task.answer, "task": task.task, "policy": "mixed", "share": rollout["share"],
            "cut": rollout["cut"], "cap": rollout["cap"], "teacher_tokens": task.teacher_tokens,
            "continuation_tokens": continuation["tokens"], "teacher": continuation["teacher"],
        }  # fmt: skip
        return {
            "uuid": task.id, **response_fields(task.messages, output), "prefix": rollout["prefix"],
            "prefix_ids": rollout["prefix_ids"], "domain": task.task or "",
            "meta": json.dumps(meta, ensure_ascii=False),
        }  # fmt: skip

    def _off_policy(self, beside: Source, wanted: int) -> set[int]:
        """Indices of the rows put beside, a seeded choice."""
        draws = [(hash_uniform(self.options.seed, str(i), "off-policy"), i) for i, _ in enumerate(beside.rows())]
        return {i for _, i in sorted(draws)[:wanted]}


class _Lines:
    """Rows of a JSON Lines file by their `id` (the last one), read when asked for: all may not fit in memory."""

    def __init__(self, path: Path):
        self._file = open(path, "rb")  # noqa: SIM115 (closed by close)
        self._offsets: dict[str, int] = {}
        offset = 0
        for line in self._file:
            self._offsets[json.loads(line)["id"]] = offset
            offset += len(line)

    def __getitem__(self, id: str) -> dict[str, Any]:
        """Nothing for an id that has no row."""
        if id not in self._offsets:
            return {}
        self._file.seek(self._offsets[id])
        return json.loads(self._file.readline())

    def close(self) -> None:
        self._file.close()


def _chosen(tasks: list[Task], options: MixOptions) -> list[Task]:
    """A seeded choice of `questions` of them, in their order."""
    if not options.questions or options.questions >= len(tasks):
        return tasks
    ranked = sorted(tasks, key=lambda task: (hash_uniform(options.seed, task.id, "question"), task.id))
    kept = {task.id for task in ranked[: options.questions]}
    return [task for task in tasks if task.id in kept]


def summary(out: Path, counts: dict[str, Any]) -> str:
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in counts["dropped"].items()) or "none"
    lines = [
        f"{out / MIXED}: {counts['mixed']:,} mixed-policy and {counts['off_policy']:,} off-policy rows",
        f"  {counts['questions']:,} questions, {counts['cut_off']:,} responses of the student cut off by the cap; "
        f"dropped: {dropped}",
        f"  {counts['prefix_tokens'] / counts['mixed']:,.0f} tokens of the student and "
        f"{counts['continuation_tokens'] / counts['mixed']:,.0f} of the teacher in the mean",
    ]
    if counts["off_policy"] < counts["off_policy_wanted"]:
        lines.append(f"  the ratio asks for {counts['off_policy_wanted']:,} off-policy rows; there are no more")
    if counts["capped_by_context"]:
        lines.append(f"  {counts['capped_by_context']:,} responses of the student had less room than the cap")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dasd_engine.mix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, o = parser.add_argument, MixOptions()
    add("source", metavar="SELECTED", help="directory of select or sample, or a .jsonl of responses")
    add("--student", required=True, metavar="DIR", help="the student as stage 2 left it")
    add(
        "--teacher", required=True, nargs="+", metavar="WHO", help="DIR, vllm:DIR, or URLs of OpenAI-compatible servers"
    )
    add("--teacher-option", action="append", default=[], metavar="KEY=VALUE", help="another key of a "
        "recipe's [teacher]: path=DIR (tokenizer and template of a served model), concurrency=128, ...")  # fmt: skip
    add("--out", required=True, metavar="DIR", help="the directory to write")
    add("--off-policy", metavar="SELECTED", help="rows to put beside (default: those of SELECTED)")
    add("--ratio", default="20:7.7", metavar="A:B", help="off-policy rows to mixed-policy rows (%(default)s)")
    add("--cap", type=float, default=o.cap, help="the student's tokens by the teacher's (%(default)s)")
    add("--questions", type=int, default=0, metavar="N", help="a seeded choice of so many (default: all)")
    add("--temperature", type=float, default=o.temperature, help="of the student (%(default)s)")
    add("--top-p", type=float, default=o.top_p, help="of both (%(default)s)")
    add("--teacher-temperature", type=float, default=o.teacher_temperature, help="%(default)s")
    add(
        "--max-new-tokens",
        type=int,
        default=0,
        metavar="N",
        help="of a continuation (default: what the context leaves)",
    )
    add("--markers", choices=MARKERS, default=o.markers, help="how the teacher delimits its thinking (%(default)s); "
        "harmony: gpt-oss")  # fmt: skip
    add("--continuation", choices=("prefill", "instruct"), default=o.continuation, help="instruct: for a teacher that "
        "cannot be prefilled, ask for the continuation in words (%(default)s)")  # fmt: skip
    add("--context", type=int, default=65536, metavar="N", help="longest document, in student tokens (%(default)s)")
    add("--no-thinking", action="store_false", dest="thinking", help="keep responses without a thinking part too")
    add("--right-only", action="store_true", help="keep right answers only; the question's answer must be known")
    add("--no-repetition", action="store_true", help="keep responses that repeat themselves")
    add("--system", default=DEFAULT_SYSTEM, help='system prompt of questions without one, "" for none (%(default)r)')
    add("--seed", type=int, default=0, help="of responses, cuts and choices (%(default)s)")
    add("--batch-size", type=int, default=64, help="responses of the student written together (%(default)s)")
    add("--device", help="of the student: cpu or cuda (default: cuda where there is one)")
    add("--dtype", choices=DTYPES, help="of the student's weights (default: bf16 on a GPU, fp32 on the CPU)")
    add("--quiet", action="store_true", help="print nothing but errors")
    return parser


def _ratio(text: str) -> tuple[float, float]:
    parts = text.split(":")
    try:
        off_policy, mixed = map(float, parts)
    except ValueError:
        raise InputError(f"--ratio {text}: write off-policy:mixed-policy, for example 20:7.7") from None
    return off_policy, mixed


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    teacher = teacher_options(args.teacher, args.teacher_option, "--teacher-option")
    repetition = None if args.no_repetition else Repetition()
    options = MixOptions(
        ratio=_ratio(args.ratio), filters=Filters(args.context, args.thinking, args.right_only, repetition),
        **{f.name: getattr(args, f.name) for f in fields(MixOptions) if f.name not in ("ratio", "filters")},
    )  # fmt: skip
    mix(
        args.source, args.student, teacher, args.out, options=options, off_policy=args.off_policy,
        batch_size=args.batch_size, device=args.device, dtype=args.dtype, quiet=args.quiet,
    )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)

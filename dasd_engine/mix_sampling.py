"""The two samplings of mix: the student's responses under their cap, and the teacher's continuations of those cut off.

Both append a row as it is finished, so that a killed run goes on with what is missing.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dasd_engine.chat import DEFAULT_SYSTEM, Chat, with_system
from dasd_engine.draw import SamplingParams
from dasd_engine.errors import InputError, check_ranges
from dasd_engine.filters import Drop, Filters
from dasd_engine.generate import Prompt, generate_stream
from dasd_engine.hf import DTYPES, load_model
from dasd_engine.mix_input import Task
from dasd_engine.mixed_policy import MARKERS, Cut, as_instruction, as_prefill, cut, hash_uniform, refusal, token_cap
from dasd_engine.progress import progress_bar
from dasd_engine.records import OutputDirectory, read_rows
from dasd_engine.teachers import Failed, Request, TeacherOptions, open_teacher

ROLLOUTS, CONTINUATIONS = "rollouts.jsonl", "continuations.jsonl"


@dataclass(frozen=True)
class MixOptions:
    """Defaults are the published choices; ◆ marks those that are ours."""

    cap: float = 1.5
    temperature: float = 1.0  # ◆ of the student
    top_p: float = 1.0  # ◆
    teacher_temperature: float = 1.0  # ◆
    ratio: tuple[float, float] = (20.0, 7.7)  # off-policy rows : mixed-policy rows
    continuation: str = "prefill"  # or "instruct" ◆
    markers: str = "think"
    questions: int = 0  # a seeded choice of so many, 0 for all
    max_new_tokens: int = 0  # of the teacher's continuation; 0: what the context leaves
    seed: int = 0
    system: str = DEFAULT_SYSTEM
    filters: Filters = field(default_factory=Filters)

    def check(self, where: str = "") -> None:
        """InputError naming the value that is out of range."""
        check_ranges(self, {
            "cap": self.cap > 0,
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "teacher_temperature": self.teacher_temperature >= 0,
            "ratio": self.ratio[0] >= 0 and self.ratio[1] > 0,
            "continuation": self.continuation in ("prefill", "instruct"),
            "markers": self.markers in MARKERS,
            "questions": self.questions >= 0,
            "max_new_tokens": self.max_new_tokens >= 0,
        }, where)  # fmt: skip


class Sampling:
    """Fills rollouts.jsonl and continuations.jsonl of an output directory, a row a question at most."""

    def __init__(self, output: OutputDirectory, chat: Chat, tasks: list[Task], options: MixOptions, quiet: bool):
        self.output, self.path, self.chat, self.options, self.quiet = output, output.path, chat, options, quiet
        self.tasks = {task.id: task for task in tasks}

    # ------------------------------------------------------------------------------------------ the student begins

    def roll_out(self, student: Path, device: str, dtype: str, batch_size: int) -> None:
        """Append a row a question to rollouts.jsonl, with the cut where the cap has ended the response."""
        rows = self.output.appender(ROLLOUTS)
        done = {row["id"] for _, row in read_rows(rows.path, without=("prefix_ids",))}
        missing = [task for task in self.tasks.values() if task.id not in done]
        if not missing:
            return
        model = load_model(student, dtype=DTYPES[dtype], device=device)
        context = min(self.options.filters.context, model.config.max_position_embeddings)
        running: dict[int, tuple[Task, int, str]] = {}

        def prompts() -> Iterator[Prompt]:
            for task in missing:
                ids, opened = self._prompt(task)
                cap = min(token_cap(task.teacher_tokens, self.options.cap), context - len(ids) - 1)
                if cap < 1:
                    detail = f"the prompt has {len(ids)} of {context} tokens"
                    rows.write({"id": task.id, "cap": 0, "length": 0, "reason": "no_room", "detail": detail})
                    continue
                running[len(running)] = task, cap, opened
                o, seed = self.options, int(hash_uniform(self.options.seed, task.id, "rollout") * 2**53)
                yield Prompt(ids, cap, SamplingParams(o.temperature, o.top_p, 0, seed))

        with self._progress("student", len(missing)) as advance:
            stream = generate_stream(model, prompts(), stop_ids=self.chat.stop_ids, batch_size=batch_size)
            for index, response in stream:
                task, cap, opened = running[index]
                if not all(map(math.isfinite, response.logprobs)):
                    raise InputError(f"{student}: gives no probabilities; are its weights damaged?")
                rows.write(self._rollout(task, cap, opened, response.tokens, response.finish_reason))
                advance()
        rows.sync()

    def _prompt(self, task: Task) -> tuple[list[int], str]:
        """Ids that ask the student, and what its generation prompt opens of the response."""
        messages = with_system(task.messages, self.options.system)
        opened = re.search(r"<think>\s*$", self.chat.render(messages, add_generation_prompt=True))
        return self.chat.prompt_ids(messages, system=""), opened[0] if opened else ""

    def _rollout(self, task: Task, cap: int, opened: str, tokens: list[int], finish_reason: str) -> dict[str, Any]:
        row = {"id": task.id, "teacher_tokens": task.teacher_tokens, "cap": cap, "length": len(tokens),
               "finish_reason": finish_reason}  # fmt: skip
        if finish_reason != "length":
            return row
        found = cut(tokens, self.options.seed, task.id, self.chat.tokenizer, opened)
        drop = found if isinstance(found, Drop) else refusal(found.text, self._special, self.options.filters.thinking)
        if drop is not None:
            return {**row, "reason": drop.reason, "detail": drop.detail}
        assert isinstance(found, Cut)
        return {**row, "share": found.share, "cut": found.tokens, "prefix": found.text,
                "prefix_ids": tokens[: found.tokens]}  # fmt: skip

    @cached_property
    def _special(self) -> list[str]:
        added = self.chat.tokenizer.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    # ------------------------------------------------------------------------------------------ the teacher goes on

    def ask(self, options: TeacherOptions) -> None:
        """Append the teacher's continuation of each cut-off response to continuations.jsonl."""
        rows = self.output.appender(CONTINUATIONS)
        done = {row["id"] for _, row in read_rows(rows.path) if "failed" not in row}  # what failed is asked again
        missing = sum(1 for _ in self._cut_off(done))
        if not missing:
            return
        with closing(open_teacher(options)) as teacher, self._progress("teacher", missing) as advance:
            for request, result in teacher.sample(self._request(row) for row in self._cut_off(done)):
                row = {"id": request.key, "teacher": {"name": teacher.name, "revision": teacher.revision}}
                if isinstance(result, Failed):
                    rows.write({**row, "failed": result.reason})
                else:
                    tokens = len(result.logprobs)
                    rows.write({**row, "text": result.text, "tokens": tokens, "finish_reason": result.finish_reason})
                advance()
        rows.sync()

    def _cut_off(self, done: Collection[str]) -> Iterator[dict[str, Any]]:
        for _, row in read_rows(self.path / ROLLOUTS):
            if "prefix" in row and row["id"] not in done:
                yield row

    def _request(self, row: dict[str, Any]) -> Request:
        o, task = self.options, self.tasks[row["id"]]
        room = o.filters.context - len(self._prompt(task)[0]) - row["cut"] - 1
        messages, prefix = with_system(task.messages, o.system), as_prefill(row["prefix"], o.markers)
        if o.continuation == "instruct":
            messages, prefix = as_instruction(messages, row["prefix"]), ""
        return Request(
            key=task.id, messages=messages, temperature=o.teacher_temperature, prefix=prefix, top_p=o.top_p,
            seed=int(hash_uniform(o.seed, task.id, "continuation") * 2**31),
            max_new_tokens=max(1, min(room, o.max_new_tokens or room)),
        )  # fmt: skip

    @contextmanager
    def _progress(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        with progress_bar(f"mix: {what}", quiet=self.quiet) as bar:
            work = bar.add_task("", total=total)
            yield lambda: bar.advance(work)

r"""Score a teacher's candidates by sentence: its probability beside the student's, from one forward pass over the text.

    python -m dasd_engine.score runs/candidates --student Qwen3-4B --out runs/scores
    torchrun --nproc-per-node 8 -m dasd_engine.score runs/candidates --student Qwen3-4B --out runs/scores
    python -m dasd_engine.score stage1.jsonl --teacher-logprobs logprobs.jsonl --teacher-tokenizer gpt-oss-120b \
        --student Qwen3-4B --out runs/scores

Candidates are a directory of dasd_engine.sample, a candidates.jsonl, or the released responses with the file of their
logprobs. OUT/scores.jsonl gets a row each, in their order:

    {"id", "candidate", "temperature", "source": line of the candidates, "teacher_tokens", "student_tokens",
     "sentences": [[begin, end, p_T, p_S, n_T, n_S(, p_D)], ...], "counts": {"teacher", "student", "common"}}

p is the geometric mean of a sentence's token probabilities, untempered, under the teacher (as sampled), the student and
the distilled model, each given the prompt and everything before; n are tokens; begin and end are bytes of `text`. A
sentence is the teacher's where p_T − p_S > β, the student's below −β. A candidate that cannot be scored has "error",
which is counted. Run again, a killed run goes on with what is missing, at any number of ranks, with the same result.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dasd_engine import distributed
from dasd_engine.chat import DEFAULT_SYSTEM, Chat, load_tokenizer
from dasd_engine.config import RunOptions
from dasd_engine.distributed import World
from dasd_engine.errors import InputError, run_cli
from dasd_engine.hf import DTYPES, MODEL_FILES, find_device, load_model
from dasd_engine.model_config import read_config
from dasd_engine.progress import progress_bar
from dasd_engine.records import Appender, OutputDirectory, read_finished, versions
from dasd_engine.released import TeacherLogprobs, is_released, read_released
from dasd_engine.scorable import PARTS, Candidate, Preparer, Scorable, Unscorable, read_candidate
from dasd_engine.score_parts import LOGPROBS, index, merge, part_file, remove_parts
from dasd_engine.sentence_scores import Scorer, score_row
from dasd_engine.shards import hash_file, hash_files

CANDIDATES = "candidates.jsonl"
LINE_BYTES = 64  # of the candidates' lines a token of a batch; a rank takes lines in chunks of about two batches


def score(
    candidates: str | os.PathLike[str],
    student_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    beta: float = 0.1,
    distilled_dir: str | os.PathLike[str] | None = None,
    teacher_tokenizer: str | os.PathLike[str] | None = None,
    teacher_logprobs: list[str] | None = None,
    part: str = "all",
    minimum_tokens: int = 3,
    system: str = DEFAULT_SYSTEM,
    tokens_per_batch: int = 16384,
    context: int | None = None,
    token_logprobs: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    threads: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the directory `out` (see this module's docstring) and return its manifest.

    Options as the command's. Under torchrun every rank calls it. Raises InputError for bad input, naming the file and
    line, and when `out` holds something else.
    """
    source = _source(Path(candidates))
    parameters = {
        "beta": beta, "part": part, "minimum_tokens": minimum_tokens, "system": system,
        "tokens_per_batch": tokens_per_batch, "context": context, "token_logprobs": token_logprobs,
    }  # fmt: skip
    _check(parameters)
    with distributed.start(RunOptions(threads=threads)) as world, ExitStack() as stack:
        where = find_device(device) if device else world.device
        parameters["dtype"] = dtype = dtype or ("bf16" if where.type == "cuda" else "fp32")
        preparer = _preparer(Path(student_dir), teacher_tokenizer, parameters)

        def open_output() -> OutputDirectory:
            inputs = _inputs(source, Path(student_dir), distilled_dir, teacher_tokenizer, teacher_logprobs or [])
            return stack.enter_context(OutputDirectory(out, {"inputs": inputs, "parameters": parameters}))

        output, manifest, done = _start(world, open_output)
        if manifest is not None:
            if world.is_main and not quiet:
                print(f"{out}: already scored from these inputs, nothing to do")
            return manifest
        scorer = _scorer(Path(student_dir), distilled_dir, where, DTYPES[dtype])
        teacher = stack.enter_context(TeacherLogprobs(teacher_logprobs)) if teacher_logprobs else None
        job = Job(source, Path(out), preparer, scorer, teacher, parameters)
        job.run(world, done, quiet)
        world.barrier()
        if output is not None:
            facts = {
                "candidates": str(source.parent.resolve()), "student": str(Path(student_dir).resolve()),
                "device": str(where), "ranks": world.size, "versions": versions("torch", "tokenizers", "numpy"),
                "counts": merge(Path(out)),
            }  # fmt: skip
            manifest = output.finish(facts)
            remove_parts(Path(out))
            if not quiet:
                print(_summary(Path(out), manifest))
        manifest = _broadcast(world, manifest)
    assert manifest is not None
    return manifest


class Job:
    """The share of one rank: lines of the candidates in, rows of its part file out."""

    def __init__(
        self, source: Path, out: Path, preparer: Preparer, scorer: Scorer, teacher: TeacherLogprobs | None,
        parameters: dict[str, Any],
    ) -> None:  # fmt: skip
        self.source, self.out, self.preparer, self.scorer, self.teacher = source, out, preparer, scorer, teacher
        self.beta, self.budget = parameters["beta"], parameters["tokens_per_batch"]
        self.with_logprobs = parameters["token_logprobs"]

    def run(self, world: World, done: set[int], quiet: bool) -> None:
        rows = Appender(part_file(self.out, world.rank))
        try:
            with progress_bar("score", "rate", quiet=quiet or not world.is_main, counted=False) as bar:
                work = bar.add_task("", total=max(self.source.stat().st_size, 1), rate="")
                tokens, started = 0, time.monotonic()
                for position, batch, finished in self._batches(world, done, rows):
                    for row in finished:
                        if row["source"] not in done:
                            rows.write(row)
                    tokens += sum(len(one.ids) for one in batch)
                    rate = f"{tokens / (time.monotonic() - started):,.0f} tokens/s" + " a rank" * (world.size > 1)
                    bar.update(work, completed=position, rate=rate)
            rows.sync()
        finally:
            rows.close()

    def _batches(
        self, world: World, done: set[int], rows: Appender
    ) -> Iterator[tuple[int, list[Scorable], list[dict[str, Any]]]]:
        """(bytes read, batch, its finished rows). A batch is prepared while the device computes the one before."""
        before: tuple[int, list[Scorable], Any] | None = None
        for number, (position, lines) in enumerate(_chunks(self.source, LINE_BYTES * self.budget)):
            # The same batches at any number of ranks, and in a run that goes on: their rounding is part of the result.
            if number % world.size != world.rank or all(line in done for line, _ in lines):
                continue
            for batch in self.prepared(lines, done, rows):
                launched = self.scorer.launch(batch)
                if before is not None:
                    yield before[0], before[1], self._finish(before[1], before[2])
                before = position, batch, launched
        if before is not None:
            yield before[0], before[1], self._finish(before[1], before[2])

    def prepared(self, lines: list[tuple[int, bytes]], done: set[int], rows: Appender | None) -> list[list[Scorable]]:
        """The lines as batches of at most `budget` tokens, about equal; what cannot be scored is written at once."""
        found: list[Scorable] = []
        for number, line in lines:
            candidate = self._read(line, f"{self.source}:{number}")
            head = {**candidate.head, "source": number}
            try:
                one = self.preparer.prepare(candidate)
                one.head.update(head)
                found.append(one)
            except Unscorable as error:
                if rows is not None and number not in done:
                    rows.write({**head, "error": str(error)})
        total = sum(len(one.ids) for one in found)
        size = total / max(1, -(-total // self.budget))
        batches: list[list[Scorable]] = []
        room = 0.0
        for one in found:
            if not batches or len(one.ids) > room:
                batches.append([])
                room = self.budget if len(one.ids) > size else size
            batches[-1].append(one)
            room -= len(one.ids)
        return batches

    def _read(self, line: bytes, where: str) -> Candidate:
        try:
            row = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError is one
            raise InputError(f"{where}: is not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: must be a JSON object, not {type(row).__name__}")
        return read_released(row, self.teacher, where) if is_released(row) else read_candidate(row, where)

    def _finish(self, batch: list[Scorable], launched: Any) -> list[dict[str, Any]]:
        results = self.scorer.finish(batch, launched)
        return [
            score_row(one, result, self.beta, self.with_logprobs) for one, result in zip(batch, results, strict=True)
        ]


def _chunks(source: Path, size: int) -> Iterator[tuple[int, list[tuple[int, bytes]]]]:
    """Consecutive (line number, line) of at least `size` bytes together, and the bytes read so far."""
    lines: list[tuple[int, bytes]] = []
    held = position = 0
    with open(source, "rb") as file:
        for number, line in enumerate(file, 1):
            position += len(line)
            if not line.strip():
                continue
            lines.append((number, line))
            held += len(line)
            if held >= size:
                yield position, lines
                lines, held = [], 0
    if lines:
        yield position, lines


# ---------------------------------------------------------------------------------------------- what is asked


def _source(candidates: Path) -> Path:
    if candidates.is_dir():
        read_finished(candidates, "sample")
        candidates = candidates / CANDIDATES
    if not candidates.is_file():
        raise InputError(f"{candidates}: no such file; name a directory of dasd_engine.sample or a JSON Lines file")
    if not candidates.stat().st_size:
        raise InputError(f"{candidates}: is empty")
    if candidates.suffix != ".jsonl":
        raise InputError(f"{candidates}: is not named .jsonl; score reads plain JSON Lines")
    return candidates


def _check(parameters: dict[str, Any]) -> None:
    for name, low, high in (("beta", 0, 1), ("minimum_tokens", 1, 1 << 20), ("tokens_per_batch", 1, 1 << 30)):
        if not low <= parameters[name] <= high:
            raise InputError(f"{name} {parameters[name]}: must be from {low} to {high}")
    context = parameters["context"]
    if context is not None and context < 2:
        raise InputError(f"context {context}: a document needs at least 2 tokens")
    if parameters["part"] not in PARTS:
        raise InputError(f"part {parameters['part']}: must be one of {', '.join(PARTS)}")


def _inputs(
    source: Path, student: Path, distilled: str | os.PathLike[str] | None, tokenizer: str | os.PathLike[str] | None,
    logprobs: list[str],
) -> dict[str, Any]:  # fmt: skip
    """All that is read, by its hashes."""
    return {
        "candidates": hash_file(source),
        "student": hash_files(student, MODEL_FILES),
        "distilled": hash_files(Path(distilled), MODEL_FILES) if distilled else None,
        "teacher_tokenizer": hash_file(_tokenizer_file(tokenizer)) if tokenizer else None,
        "teacher_logprobs": [hash_file(path) for path in logprobs],
    }


def _tokenizer_file(directory: str | os.PathLike[str]) -> Path:
    path = Path(directory)
    return path / "tokenizer.json" if path.is_dir() else path


def _preparer(student: Path, teacher: str | os.PathLike[str] | None, parameters: dict[str, Any]) -> Preparer:
    config = read_config(student)
    chat = Chat.load(student)
    largest = max(chat.tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= config.vocab_size:
        raise InputError(
            f"{student}: its tokenizer has id {largest}, its model {config.vocab_size} ids; they do not fit"
        )
    context = parameters["context"] or config.max_position_embeddings
    parameters["context"] = context
    return Preparer(
        chat, teacher=load_tokenizer(_tokenizer_file(teacher)) if teacher else None, system=parameters["system"],
        context=context, part=parameters["part"], minimum=parameters["minimum_tokens"],
    )  # fmt: skip


def _scorer(
    student: Path, distilled: str | os.PathLike[str] | None, device: torch.device, dtype: torch.dtype
) -> Scorer:
    models = [load_model(student, dtype=dtype, device=device)]
    if distilled:
        file = Path(distilled) / "tokenizer.json"
        if load_tokenizer(file).to_str() != load_tokenizer(student / "tokenizer.json").to_str():
            raise InputError(f"{file}: is not the student's tokenizer; --distilled is the same student after training")
        models.append(load_model(Path(distilled), dtype=dtype, device=device))
    return Scorer(models)


# ---------------------------------------------------------------------------------------------- ranks and files


def _start(world: World, open_output: Any) -> tuple[OutputDirectory | None, dict[str, Any] | None, set[int]]:
    """The output directory (first rank only), its manifest when finished, the lines scored so far: on every rank."""
    output, manifest, done, problem = None, None, set[int](), None
    if world.is_main:
        try:
            output = open_output()
            manifest = output.manifest
            if manifest is None:
                done = {source for source, *_ in index(output.path)}
            else:
                remove_parts(output.path)
        except InputError as error:
            problem = error
    manifest, done, failed = _broadcast(world, (manifest, done, problem is not None))
    if problem:
        raise problem
    if failed:
        sys.exit(2)  # the first rank says why
    return output, manifest, done


def _broadcast(world: World, value: Any) -> Any:
    """The first rank's value on every rank."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, group=world.host_group)
    return box[0]


# ---------------------------------------------------------------------------------------------- command line


def _summary(out: Path, manifest: dict[str, Any]) -> str:
    counts = manifest["counts"]
    sentences = max(counts["sentences"], 1)
    types = ", ".join(f"{name} {counts[name] / sentences:.1%}" for name in ("teacher", "common", "student"))
    lines = [
        f"{out}: {counts['scored']:,} of {counts['candidates']:,} candidates scored, {counts['sentences']:,} sentences "
        f"({types} at β = {manifest['parameters']['beta']}), in {manifest['wall_seconds']:.1f} s"
    ]
    lines += [f"  not scored, {kind}: {count:,}" for kind, count in counts["errors"].items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dasd_engine.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("candidates", help="a directory of dasd_engine.sample, a candidates.jsonl, or released responses (.jsonl)")
    add("--student", required=True, metavar="DIR", help="the student before distillation: weights, tokenizer, template")
    add("--out", required=True, metavar="DIR", help="the directory to write")
    add("--beta", type=float, default=0.1, help="threshold of Δ for `counts` (default 0.1)")
    add("--distilled", metavar="DIR", help="the student after training: adds p_D to every sentence")
    add("--teacher-tokenizer", metavar="DIR", help="for candidates without text or token_ends, and for released data")
    add("--teacher-logprobs", nargs="+", metavar="FILE", help="the logprob files of released data")
    add("--part", choices=PARTS, default="all", help="which sentences count (default all)")
    add("--minimum-tokens", type=int, default=3, metavar="N", help="shorter sentences join a neighbour (default 3)")
    add("--system", default=DEFAULT_SYSTEM, help="system prompt, empty for none (default: %(default)r)")
    add("--tokens-per-batch", type=int, default=16384, metavar="N", help="of one forward (default 16384)")
    add("--context", type=int, metavar="N", help="longest document in student tokens (default: the student's)")
    add("--token-logprobs", action="store_true", help=f"write the student's logprobs too, to {LOGPROBS}")
    add("--device", help="default: the GPU where there is one")
    add("--dtype", choices=DTYPES, help="of the weights (default: bf16 on a GPU, fp32 on the CPU)")
    add("--threads", type=int, default=0, help="CPU threads of a rank (default: torch's choice)")
    add("--quiet", action="store_true", help="print nothing but errors")
    options = vars(parser.parse_args(arguments))
    options |= {"student_dir": options.pop("student"), "distilled_dir": options.pop("distilled")}
    score(options.pop("candidates"), options.pop("student_dir"), options.pop("out"), **options)


if __name__ == "__main__":
    run_cli(main)

"""Turn conversations into token shards: rendered with the model's chat template, with the trained tokens recorded.

    python -m dasd_engine.prepare stage1.jsonl.zst --model Qwen/ --out shards/stage1

Rows that cannot be used stop the run with their file and line, or are written to bad.jsonl with --skip-bad. Run again
with the same inputs and parameters it does nothing.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

from dasd_engine.chat import DEFAULT_SYSTEM, Chat, Document
from dasd_engine.errors import InputError, run_cli
from dasd_engine.records import versions
from dasd_engine.shards import MANIFEST, ShardWriter, hash_file, read_manifest
from dasd_engine.sources import Batch, Source, find_sources, read_batches
from dasd_engine.workers import Result, Task, Workers, encode_batch

BAD = "bad.jsonl"
PACKAGES = ("dasd-engine", "tokenizers", "jinja2", "numpy")  # that make tokens of text
IN_PROCESS_BYTES = 8 << 20  # below this the workers' start would take longer than they save
PLAIN_SECONDS = 10.0  # between progress lines when stderr is not a terminal
SAMPLE_CHARACTERS = 300  # shown of either end of a long part of the sample


def prepare(
    sources: Sequence[str | os.PathLike[str]],
    model_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    context: int = 65536,
    system: str = DEFAULT_SYSTEM,
    skip_bad: bool = False,
    mask_prefix: bool = False,
    workers: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the shard set `out` (see shards.py) from `sources` (see sources.py) and return its manifest.

    Documents longer than `context` tokens are dropped and counted. `system` goes in front of conversations without a
    system message ("" for none). `mask_prefix` leaves what the student wrote of a mixed-policy response (a row's
    `prefix`) out of the loss. `workers`: processes, by default one a core, none for small inputs; the output is
    the same for any number. Raises InputError for bad input, and when `out` holds something else already.
    """
    started, now = time.monotonic(), datetime.now()
    out, names = Path(out), [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    if context < 2:
        raise InputError(f"context {context}: a document needs at least 2 tokens")
    files = find_sources(names)
    chat = Chat.load(model_dir, now=now)
    asked: dict[str, Any] = {
        "inputs": [source.identity() for source in files],
        "parameters": {"context": context, "system": system, "skip_bad": skip_bad},
        "tokenizer": _tokenizer_identity(Path(model_dir), chat),
    }
    if mask_prefix:
        asked["parameters"]["mask_prefix"] = True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        manifest = _check_existing(out, asked)
        if not quiet:
            print(f"{out}: already prepared from these inputs, nothing to do")
        return manifest
    task = Task(os.fspath(model_dir), system, context, now, mask_prefix)
    try:
        with ShardWriter(out) as writer:
            counts = _write(writer, files, chat, task, skip_bad, workers, quiet)
            _check_counts(writer, counts, context)
            manifest = writer.close(
                {
                    "counts": counts,
                    **asked,
                    "created": now.astimezone().isoformat(timespec="seconds"),
                    "versions": {"python": platform.python_version(), **versions(*PACKAGES)},
                    "wall_seconds": round(time.monotonic() - started, 3),
                }
            )
    except OSError as error:  # reading has its own errors
        raise InputError(f"{out}: cannot be written: {error}") from error
    if not quiet:
        print(_summary(out, manifest))
    return manifest


def _write(
    writer: ShardWriter, files: list[Source], chat: Chat, task: Task, skip_bad: bool, workers: int | None, quiet: bool
) -> dict[str, Any]:
    """Encode everything into the writer; the counts of rows and of what was dropped."""
    counts: dict[str, Any] = {"rows": 0, "split_rows": 0, "bad_rows": 0, "dropped": {"too_long": 0}}
    batches = _read_all(files)
    with ExitStack() as stack:
        progress = stack.enter_context(_Progress(files, quiet))
        results: Iterator[Result]
        if count := _worker_count(workers, files):
            results = stack.enter_context(Workers(count, task)).map(batches)
        else:
            results = (encode_batch(chat, task, batch) for batch in _singly(batches))
        for result in results:
            counts["rows"] += result.rows
            counts["split_rows"] += result.split
            counts["dropped"]["too_long"] += result.too_long
            counts["bad_rows"] += len(result.bad)
            _set_aside(writer, result, skip_bad)
            for document, meta in result.documents:
                if not writer.documents and not quiet:
                    progress.print(sample(chat, document, f"{meta['file']}:{meta['line']}"))
                writer.add(*document, meta)
            progress.update(result, writer.documents, writer.tokens)
    return counts


def _set_aside(writer: ShardWriter, result: Result, skip_bad: bool) -> None:
    """Bad rows go to bad.jsonl, or the first one ends the run."""
    if result.bad and not skip_bad:
        line, reason = result.bad[0]
        raise InputError(f"{result.file}:{line}: {reason} (--skip-bad leaves such rows out)")
    if result.bad:
        with open(writer.partial / BAD, "a", encoding="utf-8") as file:
            for line, reason in result.bad:
                file.write(json.dumps({"file": result.file, "line": line, "reason": reason}) + "\n")


def _check_counts(writer: ShardWriter, counts: dict[str, Any], context: int) -> None:
    if not writer.documents:
        raise InputError(
            f"no document is left of {counts['rows']} rows: {counts['bad_rows']} bad, "
            f"{counts['dropped']['too_long']} documents longer than the context of {context} tokens"
        )
    predicted = writer.tokens - writer.documents  # nothing predicts a document's first token
    if writer.trained_tokens in (0, predicted):
        share = "0" if writer.trained_tokens == 0 else "100"
        raise InputError(
            f"{share} % of the tokens would be trained: the chat template writes no prompt, or the rows have none; "
            "see what it renders with dasd_engine.chat.Chat.load(model).render(messages, add_generation_prompt=True)"
        )


def _check_existing(out: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The manifest of `out` when it is what is asked for; else an InputError that says what differs."""
    if not out.is_dir() or not (out / MANIFEST).exists():
        raise InputError(f"{out}: exists and is not a shard directory; remove it or choose another --out")
    manifest = read_manifest(out)
    changes = _differences(manifest, asked)
    if changes:
        raise InputError(
            f"{out}: was prepared differently ({'; '.join(changes)}); remove it to prepare it anew, or choose "
            "another --out"
        )
    return manifest


def _differences(manifest: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """In words, what in the manifest is not as asked. File names may change, contents may not."""
    changes = []
    before, after = manifest.get("inputs", []), asked["inputs"]
    if len(before) != len(after):
        changes.append(f"inputs: {len(before)} files then, {len(after)} now")
    for old, new in zip(before, after, strict=False):
        if {**old, "file": ""} != {**new, "file": ""}:
            same = old.get("file") == new["file"]
            changes.append(f"{new['file']}: " + ("its contents have changed" if same else f"was {old.get('file')}"))
    for section in ("parameters", "tokenizer"):
        for key, value in asked[section].items():
            old = manifest.get(section, {}).get(key)
            if old != value:
                shown = f"{old!r} then, {value!r} now" if section == "parameters" else "another one then"
                changes.append(f"{key}: {shown}")
    return changes


def _tokenizer_identity(model_dir: Path, chat: Chat) -> dict[str, Any]:
    return {
        "sha256": hash_file(model_dir / "tokenizer.json"),
        "vocab_size": chat.tokenizer.get_vocab_size(),
        "template": chat.template,
        "special_tokens": chat.special_tokens,
    }


def _worker_count(workers: int | None, files: list[Source]) -> int:
    """0 stands for this process."""
    if workers is not None:
        if workers < 1:
            raise InputError(f"workers {workers}: must be at least 1")
        return 0 if workers == 1 else workers
    # Compressed files hold several times their size.
    text = sum(source.size * (1 if source.name.endswith(".jsonl") else 4) for source in files)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if text <= IN_PROCESS_BYTES or cores == 1 else cores


def _read_all(files: list[Source]) -> Iterator[Batch]:
    """All batches, their positions counted over all files."""
    before = 0
    for source in files:
        for batch in read_batches(source):
            yield replace(batch, position=before + batch.position)
        before += source.size


def _singly(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Small batches, for a smoother bar when this process does the work itself."""
    for batch in batches:
        for begin in range(0, len(batch.rows), 64):
            yield Batch(batch.file, batch.rows[begin : begin + 64], batch.position)


def sample(chat: Chat, document: Document, where: str) -> Text:
    """A document's text, trained parts green and between brackets, long parts shortened."""
    ids, spans = document
    text = Text(f"A sample, {where}; trained tokens are ⟦green⟧:\n", style="bold")
    edges = [0, *(edge for span in spans for edge in span), len(ids)]
    for index, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
        part = chat.tokenizer.decode(ids[begin:end].tolist(), skip_special_tokens=False)
        if len(part) > 2 * SAMPLE_CHARACTERS + 40:
            left_out = f" [... {len(part) - 2 * SAMPLE_CHARACTERS:,} characters ...] "
            part = part[:SAMPLE_CHARACTERS] + left_out + part[-SAMPLE_CHARACTERS:]
        trained = index % 2 == 1
        text.append(f"⟦{part}⟧" if trained else part, style="not bold green" if trained else "not bold dim")
    return text


def _summary(out: Path, manifest: dict[str, Any]) -> str:
    counts = manifest["counts"]
    lines = [
        f"{out}: {counts['documents']:,} documents of {counts['rows']:,} rows, {counts['tokens']:,} tokens, "
        f"{counts['trained_tokens'] / counts['tokens']:.1%} of them trained, in {manifest['wall_seconds']:.1f} s"
    ]
    if counts["dropped"]["too_long"]:
        limit = manifest["parameters"]["context"]
        lines.append(f"  dropped, being longer than {limit:,} tokens: {counts['dropped']['too_long']:,} documents")
    if counts["bad_rows"]:
        lines.append(f"  left out {counts['bad_rows']:,} bad rows, listed in {out / BAD}")
    if counts["split_rows"]:
        lines.append(
            f"  {counts['split_rows']:,} conversations made several documents: the template re-writes earlier turns"
        )
    return "\n".join(lines)


class _Progress:
    """A bar over the bytes read on a terminal, a line every few seconds elsewhere, nothing when quiet."""

    def __init__(self, files: list[Source], quiet: bool):
        self.total = max(sum(source.size for source in files), 1)
        self.quiet = quiet
        self.console = Console(stderr=True)
        self.started = self.last = time.monotonic()
        columns = [TextColumn("prepare"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
        self.bar = Progress(*columns, TextColumn("{task.fields[made]}"), console=self.console)
        self.task = self.bar.add_task("", total=self.total, made="")

    def __enter__(self) -> "_Progress":
        if not self.quiet and self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar.live.is_started:
            self.bar.stop()

    def update(self, result: Result, documents: int, tokens: int) -> None:
        done = result.position
        made = f"{documents:,} documents, {tokens:,} tokens"
        if self.quiet:
            return
        if self.console.is_terminal:
            self.bar.update(self.task, completed=done, made=made)
        elif time.monotonic() - self.last > PLAIN_SECONDS:
            self.last = time.monotonic()
            rate = done / 1e6 / (self.last - self.started)
            print(f"prepare: {done / self.total:.0%} read at {rate:.1f} MB/s, {made}", file=sys.stderr)

    def print(self, text: Text) -> None:
        """Print to stdout without disturbing the bar."""
        console = Console()
        if console.is_terminal:
            (self.bar.console if self.console.is_terminal else console).print(text)
        else:
            encoding = sys.stdout.encoding or "utf-8"
            print(text.plain.encode(encoding, "replace").decode(encoding))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dasd_engine.prepare",
        description="Turn conversations into token shards for training.",
        epilog="example: python -m dasd_engine.prepare stage1.jsonl.zst more.parquet --model models/Qwen3-4B "
        "--out shards/stage1 --context 32768",
    )
    parser.add_argument(
        "sources", nargs="+", metavar="SRC", help="a .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, or a hub data set"
        " as owner/name[@revision][:files]",
    )  # fmt: skip
    parser.add_argument("--model", required=True, metavar="DIR", help="directory with tokenizer.json and template")
    parser.add_argument("--out", required=True, metavar="DIR", help="the shard directory to write")
    parser.add_argument(
        "--context", type=int, default=65536, metavar="N", help="longest document, in tokens (%(default)s)"
    )
    parser.add_argument(
        "--system", default=DEFAULT_SYSTEM, help='system prompt of rows that have none, "" for none ("%(default)s")'
    )
    parser.add_argument("--skip-bad", action="store_true", help="list bad rows in bad.jsonl instead of stopping")
    parser.add_argument(
        "--mask-prefix", action="store_true", help="no loss on the student's prefix of mixed-policy responses"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes, of some 200 MB each (one a core; none for small inputs)"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    options = vars(parser.parse_args(arguments))
    prepare(options.pop("sources"), options.pop("model"), options.pop("out"), **options)


if __name__ == "__main__":
    run_cli(main)

"""Worker processes for prepare: each loads the tokeniser once and turns batches of raw rows into token documents.

They are plain subprocesses that speak pickle over pipes, because multiprocessing's ways all have a catch here: fork
copies the threads' locks of torch and of the tokeniser in an unknown state, spawn and forkserver import the caller's
main module again in every worker (all of torch, when `train` calls prepare).
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import Any

from dasd_engine.chat import Chat, Document, Prefix
from dasd_engine.errors import InputError
from dasd_engine.sources import Batch, parse_row


@dataclass(frozen=True)
class Task:
    """What a worker needs beside the batches."""

    model_dir: str
    system: str
    context: int
    now: datetime  # for templates that write the date: one for all workers
    mask_prefix: bool = False


@dataclass
class Result:
    """A batch's documents, in order, and what became of its other rows."""

    file: str
    position: int
    rows: int
    documents: list[tuple[Document, dict[str, Any]]] = field(default_factory=list)  # with their meta entry
    bad: list[tuple[int, str]] = field(default_factory=list)  # (line, reason)
    too_long: int = 0  # documents
    split: int = 0  # rows that made several documents


def encode_batch(chat: Chat, task: Task, batch: Batch) -> Result:
    """Parse, render and tokenise a batch; rows with an InputError end up in `bad`."""
    result = Result(batch.file, batch.position, len(batch.rows))
    for line, data in batch.rows:
        try:
            row = parse_row(data)
            prefix = Prefix(row.prefix, row.prefix_ids, trained=not task.mask_prefix) if row.prefix else None
            documents = chat.documents(row.messages, system=task.system, prefix=prefix, untrained=row.untrained)
        except InputError as error:
            result.bad.append((line, str(error)))
            continue
        result.split += len(documents) > 1
        for part, document in enumerate(documents):
            if len(document[0]) > task.context:
                result.too_long += 1
                continue
            meta = {"file": batch.file, "line": line, **row.meta}
            if len(documents) > 1:
                meta["part"] = part
            result.documents.append((document, meta))
    return result


class Workers:
    """`count` processes; a context manager, which ends them whatever happens."""

    def __init__(self, count: int, task: Task):
        self.processes = [_start() for _ in range(count)]
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        for process in self.processes:
            with contextlib.suppress(BrokenPipeError):  # `_send` reports a process that is dead already
                pickle.dump(task, process.stdin)  # type: ignore[arg-type]
                process.stdin.flush()  # type: ignore[union-attr]
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(count)  # each waits for one process at a time

    def map(self, batches: Iterable[Batch]) -> Iterator[Result]:
        """Results in the order of the batches, of which only a few are read ahead."""
        ahead: deque[Future[Result]] = deque()
        for batch in batches:
            ahead.append(self._threads.submit(self._send, batch))
            if len(ahead) > 2 * len(self.processes):
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _send(self, batch: Batch) -> Result:
        process = self._idle.get()
        try:
            pickle.dump(batch, process.stdin)  # type: ignore[arg-type]
            process.stdin.flush()  # type: ignore[union-attr]
            return pickle.load(process.stdout)  # type: ignore[arg-type]
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = process.wait()
            raise RuntimeError(f"a worker of prepare ended with exit code {code} (-9: out of memory?)") from None
        finally:
            self._idle.put(process)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.kill()  # they hold nothing but memory; threads that wait for one see its pipe close
        self._threads.shutdown(cancel_futures=True)
        for process in self.processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()  # type: ignore[union-attr]


def _start() -> subprocess.Popen[bytes]:
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    # A worker is one busy thread: no pools of the tokeniser or of BLAS beside it.
    environment = {"TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", "from dasd_engine.workers import serve; serve()"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **environment, "PYTHONPATH": path}
    )


def serve() -> None:
    """A worker's life: the task, then batches from stdin to stdout until the caller closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's business
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # so that nothing printed gets between the results
    try:
        task: Task = pickle.load(source)
        chat = Chat.load(task.model_dir, now=task.now)
        while True:
            batch: Batch = pickle.load(source)
            pickle.dump(encode_batch(chat, task, batch), sink, protocol=pickle.HIGHEST_PROTOCOL)
            sink.flush()
    except (EOFError, pickle.UnpicklingError, BrokenPipeError):
        os._exit(0)  # the caller is gone; a normal exit would try to flush what it never read

"""Reads ahead of the training: the packs of the next step are made in a thread while this one is computed.

On CUDA they are copied and written on a stream of their own; the training's stream waits for it, the CPU does not.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from dasd_kernels import PackedBatch

At = TypeVar("At")
Read = TypeVar("Read")


def read_ahead(
    read: Callable[[At], Read], places: Iterable[At], ahead: int = 1
) -> Generator[tuple[At, Read, float], None, None]:
    """(place, read(place), seconds waited) for every place in order, `ahead` more being read meanwhile.

    What is ready has cost no wait: exactly 0.0 seconds. An error of `read` is raised where its place is reached.
    """
    pending: deque[tuple[At, Future[Read]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="reader") as thread:
        try:
            for place in places:
                pending.append((place, thread.submit(read, place)))
                if len(pending) > ahead:
                    yield _take(pending)
            while pending:
                yield _take(pending)
        finally:
            thread.shutdown(cancel_futures=True)


def _take(pending: deque[tuple[At, Future[Read]]]) -> tuple[At, Read, float]:
    place, future = pending.popleft()
    if future.done():
        return place, future.result(), 0.0
    start = time.perf_counter()
    return place, future.result(), time.perf_counter() - start


class SideStream:
    """Where the reader's copies and kernels run. On the CPU it does nothing."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, make: Callable[[], Read]) -> tuple[Read, torch.cuda.Event | None]:
        """What `make` returns, made on the side stream, and the event after which it is there."""
        if self.stream is None:
            return make(), None
        with torch.cuda.stream(self.stream):
            return make(), self.stream.record_event()

    def receive(self, batches: list[PackedBatch], made: torch.cuda.Event | None) -> None:
        """Let the current stream use the batches, once they are there, and their memory live until it has."""
        if made is None:
            return
        current = torch.cuda.current_stream(batches[0].tokens.device)
        current.wait_event(made)
        for batch in batches:
            for tensor in (batch.tokens, batch.labels, batch.positions, batch.cu_seqlens, batch.valid):
                tensor.record_stream(current)

"""Times ours and its peers in one process, a round of each in turn: a slow moment of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

SLOW = 10  # times ours: a peer that needs more is timed once


def compare(
    benchmark: Any,
    ours: Callable[[], Any],
    peers: Mapping[str, Callable[[], Any] | str] | None = None,
    *,
    rounds: int = 7,
    **extra_info: Any,
) -> Any:
    """Runs `ours` under the pytest-benchmark fixture, every peer before each of its rounds; returns ours' result.

    A peer is a callable, or a string that says why it is skipped. Ours and the peers get an untimed call first; a peer
    that is still SLOW times slower than ours in a second one is not called again, and that one counts. `extra_info` is
    what bench.table shows beside the times; its docstring lists the keys.
    """
    results: dict[str, Any] = {name: peer for name, peer in (peers or {}).items() if isinstance(peer, str)}
    callables = {name: peer for name, peer in (peers or {}).items() if not isinstance(peer, str)}
    ours()
    limit = SLOW * seconds_of(ours)
    for name, peer in list(callables.items()):
        if seconds_of(peer) > limit and (once := seconds_of(peer)) > limit:  # the first may compile
            results[name] = {"seconds": once}
            del callables[name]
    seconds: dict[str, list[float]] = {name: [] for name in callables}

    def time_peers() -> None:
        for name, peer in callables.items():
            seconds[name].append(seconds_of(peer))

    result = benchmark.pedantic(ours, setup=time_peers, rounds=rounds, warmup_rounds=1)
    results.update({name: {"seconds": statistics.median(times[1:])} for name, times in seconds.items()})
    benchmark.extra_info.update(extra_info, peers=results)
    return result


def seconds_of(f: Callable[[], Any]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start

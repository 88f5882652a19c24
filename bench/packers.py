"""How other trainers pack, for bench/test_packing.py: lengths and a capacity in, the number of packs out.

TRL's own code runs where it is installed. axolotl and LLaMA-Factory are not installed here; what stands for them is
written anew after what they describe, and named so.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable

import numpy as np


def trl_bfd(lengths: np.ndarray, capacity: int, rows: int = 1000) -> Callable[[], int] | str:
    """TRL's best fit decreasing, in batches of 1,000 rows as `datasets.map` calls it. It moves the tokens too: they are
    nulls here, of no bytes; its time includes what it does with them."""
    try:
        import pyarrow as pa
        from trl.data_utils import _pack_bfd
    except ImportError as error:
        return str(error)
    parts = [lengths[begin : begin + rows] for begin in range(0, len(lengths), rows)]
    nulls = pa.nulls(max(int(part.sum()) for part in parts))
    tables = []
    for part in parts:
        offsets = np.concatenate([[0], np.cumsum(part)]).astype(np.int32)
        column = pa.ListArray.from_arrays(pa.array(offsets), nulls[: int(offsets[-1])])
        tables.append(pa.table({"input_ids": column}))
    return lambda: sum(len(_pack_bfd(table, capacity, on_seq_length_overflow="split")) for table in tables)


def first_fit(lengths: np.ndarray, capacity: int, group: int = 100_000) -> int:
    """First fit in the order of the documents, in groups of 100,000, as axolotl does (there compiled by numba; here the
    search over the open packs is one numpy call a document)."""
    packs = 0
    for begin in range(0, len(lengths), group):
        room, used = np.zeros(group, dtype=np.int32), 0
        for length in lengths[begin : begin + group].tolist():
            fits = room[:used] >= length
            first = int(fits.argmax()) if used else 0
            if not used or not fits[first]:
                first, used = used, used + 1
                room[first] = capacity
            room[first] -= length
        packs += used
    return packs


def knapsacks(lengths: np.ndarray, capacity: int, batch: int = 1000) -> int:
    """Fills one pack after the other, each time with the longest document that still fits, in batches of 1,000, as
    LLaMA-Factory does."""
    packs = 0
    for begin in range(0, len(lengths), batch):
        left = sorted(lengths[begin : begin + batch].tolist())
        while left:
            room, packs = capacity, packs + 1
            while (i := bisect.bisect_right(left, room)) > 0:
                room -= left.pop(i - 1)
    return packs

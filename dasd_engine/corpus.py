"""A stage's documents: one or many shard sets, mapped into memory, their documents numbered through."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dasd_engine.shards import MANIFEST, Shards
from dasd_kernels import _C

Ints = npt.NDArray[np.int64]
PIECE = 1 << 20  # documents looked at together where all of them are


class Corpus:
    """Shard sets, one after the other. Document d is document d - first[s] of set s, the last with first[s] <= d.

    Nothing here grows with the number of documents: what is needed of them is read from the maps.
    """

    def __init__(self, sets: Sequence[Shards]):
        self.sets = tuple(sets)
        self.first: Ints = np.cumsum([0, *map(len, self.sets)])
        counts = [one.manifest["counts"] for one in self.sets]
        self.tokens, self.trained_tokens = (sum(c[key] for c in counts) for key in ("tokens", "trained_tokens"))
        self.arrays = [(one.tokens, one.offsets, one.loss_spans) for one in self.sets]  # as assemble_packs takes them

    @classmethod
    def open(cls, paths: Sequence[Path]) -> "Corpus":
        """Open and check (see Shards.open) the shard sets at `paths`, each one or a directory of several."""
        return cls([Shards.open(one) for path in paths for one in shard_sets(path) or [path]])

    def __len__(self) -> int:
        return int(self.first[-1])

    def lengths(self, begin: int, end: int) -> Ints:
        """Tokens of the documents begin..end-1."""
        parts = [np.empty(0, dtype=np.int64)]
        for s in range(int(np.searchsorted(self.first, begin, side="right")) - 1, len(self.sets)):
            if (first := int(self.first[s])) >= end:
                break
            parts.append(np.diff(self.sets[s].offsets[max(begin - first, 0) : end - first + 1]))
        return np.concatenate(parts)

    def pieces(self) -> Iterator[tuple[int, Ints]]:
        """(number of the first document, lengths) of `PIECE` documents at a time."""
        for begin in range(0, len(self), PIECE):
            yield begin, self.lengths(begin, min(begin + PIECE, len(self)))

    def describe(self, docs: Ints) -> tuple[Ints, Ints]:
        """Tokens and trained tokens (labels) of any documents, int64 [len(docs)] each."""
        lengths, trained = np.empty_like(docs), np.empty_like(docs)
        home = np.searchsorted(self.first, docs, side="right") - 1
        for s in np.unique(home):
            mine, one = home == s, self.sets[s]
            local = docs[mine] - self.first[s]
            lengths[mine] = one.offsets[local + 1] - one.offsets[local]
            trained[mine] = _C.label_counts(one.loss_spans, local)
        return lengths, trained

    def untrained(self) -> Ints:
        """The documents that yield no label, ascending: mostly none."""
        parts = [one.untrained() + first for one, first in zip(self.sets, self.first.tolist(), strict=False)]
        return np.concatenate([np.empty(0, dtype=np.int64), *parts])

    def where(self, doc: int) -> str:
        """A document as its set knows it, for messages."""
        s = int(np.searchsorted(self.first, doc, side="right")) - 1
        return f"{self.sets[s].path}: document {doc - self.first[s]}"

    def __str__(self) -> str:
        more = len(self.sets) - 1
        return f"{self.sets[0].path}" + (f" and {more} more" if more else "")


def shard_sets(path: Path) -> list[Path]:
    """`path` if it is a shard set, else those directly below it, by name; empty where there are none."""
    if (path / MANIFEST).exists():
        return [path]
    return sorted(entry for entry in path.iterdir() if (entry / MANIFEST).exists()) if path.is_dir() else []

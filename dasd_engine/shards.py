"""Token shards: what `prepare` writes and `train` reads.

A shard set is a directory:

    tokens.u32        uint32 [N], every document's tokens one after the other
    offsets.i64       int64 [D+1], document i is tokens[offsets[i]:offsets[i+1]]
    loss_spans.i32    int32 [K, 3], rows (document, begin, end): tokens begin..end-1 of the document
                      are trained; sorted by document then begin, disjoint
    meta.jsonl        a JSON object a document: where it came from
    manifest.json     counts, size and sha256 of each file above, and what the writer adds

The writer fills `.<name>.partial` beside the target and renames it at the end, so a killed run leaves
nothing that looks complete. The reader maps the files into memory.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from dasd_engine.errors import InputError
from dasd_engine.records import sync

FORMAT = "dasd-shards"
VERSION = 1
VERIFY_BELOW = 1 << 30  # bytes: smaller sets have their hashes checked on every open
PIECE = 1 << 18  # rows of an array that are checked together
TOKENS, OFFSETS, SPANS, META, MANIFEST = (
    "tokens.u32",
    "offsets.i64",
    "loss_spans.i32",
    "meta.jsonl",
    "manifest.json",
)


class ShardWriter:
    """Writes a shard set in bounded memory: `add` documents, then `close` with the manifest's other entries.

    As a context manager an exception inside removes the partial directory. Raises InputError when `path` is
    already there with something in it, or when another process is writing it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(f"{self.path}: is already there; remove it or choose another output directory")
        self.partial = self.path.parent / f".{self.path.name}.partial"
        _clear_partial(self.partial)
        self.partial.mkdir(parents=True)
        self._files = {name: _HashedFile(self.partial / name) for name in (TOKENS, OFFSETS, SPANS, META)}
        fcntl.flock(self._files[TOKENS].file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._files[OFFSETS].write(np.zeros(1, dtype="<i8").tobytes())
        self.documents = self.tokens = self.trained_tokens = self.spans = 0
        self.max_token_id = -1

    def add(
        self, tokens: Sequence[int] | npt.NDArray[Any], spans: Sequence[tuple[int, int]], meta: dict[str, Any]
    ) -> None:
        """Append a document: its token ids, its trained spans (begin, end), sorted and disjoint, its meta."""
        ids = np.asarray(tokens, dtype="<u4")
        rows = np.asarray(spans, dtype="<i4").reshape(-1, 2)
        edges = rows.ravel()  # begin, end, begin, end, ...
        if ids.ndim != 1 or not len(ids):
            raise ValueError(f"document {self.documents}: has no tokens")
        inside = not len(edges) or (edges[0] >= 0 and edges[-1] <= len(ids))
        if not inside or (np.diff(edges) < 0).any() or (rows[:, 0] == rows[:, 1]).any():
            raise ValueError(f"document {self.documents} of {len(ids)} tokens: spans {rows.tolist()} do not fit")
        self.tokens += len(ids)
        self._files[TOKENS].write(ids.tobytes())
        self._files[OFFSETS].write(np.asarray([self.tokens], dtype="<i8").tobytes())
        self._files[SPANS].write(np.insert(rows, 0, self.documents, axis=1).astype("<i4").tobytes())
        self._files[META].write((json.dumps(meta) + "\n").encode())
        self.documents += 1
        self.max_token_id = max(self.max_token_id, int(ids.max()))
        self.spans += len(rows)
        self.trained_tokens += int((rows[:, 1] - np.maximum(rows[:, 0], 1)).sum())

    def close(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Write manifest.json last, sync everything and rename into place. Returns the whole manifest."""
        if not self.documents:
            raise InputError(f"{self.path}: no document to write")
        counts = {
            "documents": self.documents,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "loss_spans": self.spans,
            "max_token_id": self.max_token_id,  # a model with a smaller vocabulary cannot train on this
        }
        files = {name: file.finish() for name, file in self._files.items()}
        extra = {key: value for key, value in manifest.items() if key != "counts"}
        whole = {
            "format": FORMAT,
            "version": VERSION,
            "counts": {**manifest.get("counts", {}), **counts},
            **extra,
            "files": files,
        }
        target = self.partial / MANIFEST
        with open(target, "w", encoding="utf-8") as file:
            json.dump(whole, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.rename(self.partial, self.path)
        sync(self.path.parent)
        return whole

    def abort(self) -> None:
        """Throw away what was written."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk has no room for what is still buffered either
                file.file.close()
        shutil.rmtree(self.partial, ignore_errors=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.partial.exists():  # not closed
            self.abort()


class Shards:
    """A shard set opened for reading.

    tokens uint32 [N], offsets int64 [D+1], loss_spans int32 [K, 3]: read-only memory maps.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest
        self.tokens = _map(path / TOKENS, "<u4")
        self.offsets = _map(path / OFFSETS, "<i8")
        self.loss_spans = _map(path / SPANS, "<i4").reshape(-1, 3)
        self._meta_ends: npt.NDArray[np.int64] | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool | None = None) -> "Shards":
        """Open and check a shard set; InputError names the file when it is unfinished or damaged.

        Sizes, offsets and spans are always checked, hashes when `verify`, by default below 1 GiB.
        """
        path = Path(path)
        manifest = read_manifest(path)
        for name, entry in manifest["files"].items():
            size = (path / name).stat().st_size if (path / name).is_file() else -1
            if size != entry["bytes"]:
                raise _damaged(path / name, "is missing" if size < 0 else f"has {size} bytes, not {entry['bytes']}")
        if verify or (verify is None and sum(entry["bytes"] for entry in manifest["files"].values()) < VERIFY_BELOW):
            for name, entry in manifest["files"].items():
                if hash_file(path / name) != entry["sha256"]:
                    raise _damaged(path / name, "does not match its sha256 in manifest.json")
        shards = cls(path, manifest)
        shards._check_offsets()
        shards._check_spans()
        return shards

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 [D]: tokens of each document."""
        return np.diff(self.offsets)

    def untrained(self) -> npt.NDArray[np.int64]:
        """The documents that yield no label, ascending."""
        last, found = -1, [np.empty(0, dtype=np.int64)]
        for rows in (*_pieces(self.loss_spans), np.array([[len(self), 0, 2]])):
            trained = rows[rows[:, 2] > np.maximum(rows[:, 1], 1), 0]
            missing = np.ones(int(trained.max(initial=last)) - last, dtype=np.bool_)
            missing[trained[trained > last] - last - 1] = False
            found.append(np.flatnonzero(missing) + last + 1)
            last += len(missing)
        return np.concatenate(found)

    def meta(self, index: int) -> dict[str, Any]:
        """The meta.jsonl entry of document `index` (file, line, uuid, ...)."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        if self._meta_ends is None:
            self._meta_ends = _line_ends(self.path / META)
            if len(self._meta_ends) != len(self):
                raise _damaged(self.path / META, f"has {len(self._meta_ends)} lines for {len(self)} documents")
        begin = int(self._meta_ends[index - 1]) if index else 0
        with open(self.path / META, "rb") as file:
            file.seek(begin)
            return json.loads(file.read(int(self._meta_ends[index]) - begin))

    def _check_offsets(self) -> None:
        counts = self.manifest["counts"]
        if len(self.offsets) != counts["documents"] + 1 or self.offsets[0] != 0:
            raise _damaged(self.path / OFFSETS, f"does not index {counts['documents']} documents")
        for begin in range(0, len(self), PIECE):
            bad = np.diff(self.offsets[begin : begin + PIECE + 1]) < 1
            if bad.any():
                raise _damaged(self.path / OFFSETS, f"is not increasing at document {begin + _first(bad)}")
        if self.offsets[-1] != len(self.tokens) or len(self.tokens) != counts["tokens"]:
            raise _damaged(self.path / OFFSETS, f"ends at {self.offsets[-1]}, but there are {len(self.tokens)} tokens")

    def _check_spans(self) -> None:
        first, last = 0, (0, 0)  # the piece's first row; document and end of the row before it
        for rows in _pieces(self.loss_spans):
            doc, begin, end = np.ascontiguousarray(rows.T)
            if doc.min() < 0 or doc.max() >= len(self):
                raise _damaged(self.path / SPANS, f"names a document outside 0..{len(self) - 1}")
            bad = (begin < 0) | (end <= begin) | (end > self.offsets[doc + 1] - self.offsets[doc])
            if bad.any():
                row = _first(bad)
                what = f"row {first + row}: span {begin[row]}..{end[row]} leaves document {doc[row]}"
                raise _damaged(self.path / SPANS, what)
            step = np.diff(doc, prepend=last[0])
            bad = (step < 0) | ((step == 0) & (begin < np.concatenate([[last[1]], end[:-1]])))
            if bad.any():
                what = f"row {first + _first(bad)}: out of order or overlapping the row before"
                raise _damaged(self.path / SPANS, what)
            first, last = first + len(rows), (int(doc[-1]), int(end[-1]))


def read_manifest(path: Path) -> dict[str, Any]:
    """manifest.json of a finished shard set; InputError when `path` is something else."""
    if not path.is_dir():
        raise InputError(f"{path}: no such shard directory; make it with python -m dasd_engine.prepare")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path}: has no {MANIFEST}: not a finished shard directory; run python -m dasd_engine.prepare"
        ) from None
    except ValueError as error:
        raise _damaged(path / MANIFEST, f"is not JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not {"counts", "files"} <= manifest.keys():
        raise InputError(f"{path / MANIFEST}: is not the manifest of a shard directory")
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{path}: shard format {manifest.get('version')}, this release reads {VERSION}; prepare it anew"
        )
    return manifest


def hash_file(path: str | os.PathLike[str]) -> str:
    """sha256 of a file, read in pieces. InputError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def hash_files(directory: Path, patterns: Sequence[str]) -> dict[str, str]:
    """sha256 of the files that fit, by name. Weights are long to read: once, while they stay the same."""
    files = sorted(file for pattern in patterns for file in directory.glob(pattern))
    return {file.name: _hash_once(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files}


@functools.cache
def _hash_once(file: Path, size: int, changed: int) -> str:
    return hash_file(file)


class _HashedFile:
    """A file written front to back, with its size and sha256 kept on the way."""

    def __init__(self, path: Path):
        self.file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115 (closed in finish or abort)
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)

    def finish(self) -> dict[str, Any]:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"bytes": self.size, "sha256": self.digest.hexdigest()}


def _clear_partial(partial: Path) -> None:
    """Remove what a killed run left; refuse while another run is writing (it holds a lock)."""
    if not partial.exists():
        return
    tokens = partial / TOKENS
    if tokens.exists():
        with open(tokens, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{partial}: another process is writing it; wait for it to end") from None
    shutil.rmtree(partial)


def _map(path: Path, dtype: str) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:  # mmap refuses empty files
        return np.zeros(0, dtype=dtype)
    try:
        return np.memmap(path, dtype=dtype, mode="r")
    except ValueError as error:
        raise _damaged(path, f"cannot be mapped ({error})") from None


def _pieces(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    for begin in range(0, len(array), PIECE):
        yield array[begin : begin + PIECE]


def _line_ends(path: Path) -> npt.NDArray[np.int64]:
    """Byte offset after each newline of a file, scanned in pieces."""
    ends: list[npt.NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        for begin in range(0, len(view), 1 << 24):
            piece = np.frombuffer(view[begin : begin + (1 << 24)], dtype=np.uint8)
            ends.append(np.flatnonzero(piece == 10).astype(np.int64) + (begin + 1))
    return np.concatenate(ends)


def _first(mask: npt.NDArray[np.bool_]) -> int:
    return int(np.argmax(mask))


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: {what}; the shard set is damaged: delete it and prepare again")

"""Shards: what is written is read back, damage is refused, a killed write is never complete."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from dasd_engine.errors import InputError
from dasd_engine.shards import Shards, ShardWriter

DOCUMENTS = [
    ([5, 6, 7, 8], [(2, 4)], {"file": "a.jsonl", "line": 1, "uuid": "ü-1"}),
    ([9], [], {"file": "a.jsonl", "line": 2}),
    ([1, 2, 3, 4, 5, 4_000_000_000], [(0, 2), (2, 3), (4, 6)], {"file": "b.jsonl", "line": 1}),
]


def write(path: Path) -> dict:
    with ShardWriter(path) as writer:
        for tokens, spans, meta in DOCUMENTS:
            writer.add(tokens, spans, meta)
        return writer.close({"parameters": {"context": 8}, "counts": {"rows": 4}})


def test_round_trip(tmp_path):
    manifest = write(tmp_path / "set")
    shards = Shards.open(tmp_path / "set")
    assert len(shards) == 3
    assert shards.manifest == manifest
    assert shards.manifest["parameters"] == {"context": 8}
    assert shards.manifest["counts"] == {
        "rows": 4, "documents": 3, "tokens": 11, "trained_tokens": 6, "loss_spans": 4, "max_token_id": 4_000_000_000,
    }  # fmt: skip
    assert shards.tokens.dtype == np.uint32 and shards.offsets.dtype == np.int64
    for index, (tokens, spans, meta) in enumerate(DOCUMENTS):
        begin, end = shards.offsets[index : index + 2]
        assert shards.tokens[begin:end].tolist() == tokens
        rows = shards.loss_spans[shards.loss_spans[:, 0] == index]
        assert [tuple(row) for row in rows[:, 1:].tolist()] == spans
        assert shards.meta(index) == meta
    assert shards.lengths.tolist() == [4, 1, 6]
    assert shards.untrained().tolist() == [1]
    assert isinstance(shards.tokens, np.memmap)
    with pytest.raises(ValueError):
        shards.tokens[0] = 1
    with pytest.raises(IndexError):
        shards.meta(3)


def test_a_set_without_any_span(tmp_path):
    with ShardWriter(tmp_path / "set") as writer:
        writer.add([1, 2], [], {})
        writer.close({})
    shards = Shards.open(tmp_path / "set")
    assert shards.loss_spans.shape == (0, 3) and shards.untrained().tolist() == [0]


@pytest.mark.parametrize("spans", [[(0, 5)], [(-1, 2)], [(2, 2)], [(3, 1)], [(2, 4), (0, 1)], [(0, 3), (2, 4)]])
def test_spans_that_do_not_fit_are_refused(tmp_path, spans):
    with ShardWriter(tmp_path / "set") as writer, pytest.raises(ValueError, match="document 0 of 4 tokens"):
        writer.add([1, 2, 3, 4], spans, {})


def test_empty_document_and_empty_set(tmp_path):
    with ShardWriter(tmp_path / "set") as writer:
        with pytest.raises(ValueError, match="no tokens"):
            writer.add([], [], {})
        with pytest.raises(InputError, match="no document"):
            writer.close({})
    assert list(tmp_path.iterdir()) == []  # an abandoned write leaves nothing


def test_existing_output_is_not_touched(tmp_path):
    write(tmp_path / "set")
    before = (tmp_path / "set" / "tokens.u32").read_bytes()
    with pytest.raises(InputError, match="already there"):
        ShardWriter(tmp_path / "set")
    assert (tmp_path / "set" / "tokens.u32").read_bytes() == before
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert len(Shards.open(tmp_path / "empty")) == 3


def damage(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("name", ["tokens.u32", "offsets.i64", "loss_spans.i32", "meta.jsonl"])
def test_damage_is_found_and_named(tmp_path, name):
    path = tmp_path / "set"
    write(path)
    whole = (path / name).read_bytes()
    damage(path / name, len(whole) - 1, bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=f"{name}.*sha256.*prepare again"):
        Shards.open(path)
    (path / name).write_bytes(whole[:-1])
    with pytest.raises(InputError, match=f"{name}: has {len(whole) - 1} bytes, not {len(whole)}"):
        Shards.open(path, verify=False)
    (path / name).unlink()
    with pytest.raises(InputError, match=f"{name}: is missing"):
        Shards.open(path, verify=False)


@pytest.mark.parametrize(
    "name, row, value, message",
    [
        ("offsets.i64", 0, 1, "does not index"),
        ("offsets.i64", 1, 7, "not increasing at document 1"),
        ("offsets.i64", 3, 10, "ends at 10, but there are 11 tokens"),
        ("loss_spans.i32", 0, 9, "names a document outside"),
        ("loss_spans.i32", 2, 5, "row 0: span 2..5 leaves document 0"),
        ("loss_spans.i32", 1, 4, "row 0: span 4..4"),
        ("loss_spans.i32", 7, 1, "row 2: out of order or overlapping"),
        ("loss_spans.i32", 3, 0, "row 1: out of order or overlapping"),
    ],
)
def test_damaged_arrays_are_found_without_hashes(tmp_path, name, row, value, message):
    path = tmp_path / "set"
    write(path)
    size = int(name[-2:]) // 8
    damage(path / name, row * size, value.to_bytes(size, "little"))
    with pytest.raises(InputError, match=message):
        Shards.open(path, verify=False)


def test_unfinished_or_foreign_directories(tmp_path):
    with pytest.raises(InputError, match="no such shard directory"):
        Shards.open(tmp_path / "none")
    with pytest.raises(InputError, match="not a finished shard directory"):
        Shards.open(tmp_path)
    write(tmp_path / "set")
    manifest = tmp_path / "set" / "manifest.json"
    entries = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**entries, "version": 99}))
    with pytest.raises(InputError, match="shard format 99"):
        Shards.open(tmp_path / "set")
    manifest.write_text('{"format": "other"}')
    with pytest.raises(InputError, match="not the manifest of a shard directory"):
        Shards.open(tmp_path / "set")
    manifest.write_text("{")
    with pytest.raises(InputError, match=r"manifest.json: is not JSON"):
        Shards.open(tmp_path / "set")


def write_until_killed(path: Path, ready) -> None:
    writer = ShardWriter(path)
    writer.add([1, 2, 3], [(1, 3)], {})
    ready.send(True)
    signal.pause()


def test_a_killed_write_never_looks_complete(tmp_path):
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=write_until_killed, args=(tmp_path / "set", theirs))
    process.start()
    ours.recv()
    with pytest.raises(InputError, match="another process is writing"):
        ShardWriter(tmp_path / "set")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "set").exists()
    write(tmp_path / "set")  # the left-over is cleared
    assert len(Shards.open(tmp_path / "set")) == 3
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["set"]

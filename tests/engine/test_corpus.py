"""A corpus of several shard sets is what one set of the same documents is; a large one is planned in blocks."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from runs import VOCABULARY, rows, run_here, write_recipe, write_shards, write_student

from dasd_engine import corpus as corpus_module
from dasd_engine import shards
from dasd_engine.corpus import Corpus, shard_sets
from dasd_engine.epochs import EpochPlan, Packing, count_epochs
from dasd_engine.shards import Shards, ShardWriter
from dasd_kernels import plan_packs


@pytest.fixture
def documents():
    """(tokens, spans) of 50 documents; some have no label, one because its span is its first token."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(50):
        length = int(rng.integers(4, 40))
        spans = {0: [], 1: [(0, 1)], 2: [(0, 2), (3, 4)]}.get(i % 9, [(length // 2, length)])
        made.append((rng.integers(0, VOCABULARY, length), spans))
    return made


@pytest.fixture
def split(documents, tmp_path):
    """The documents as one set, and as three in a directory of sets."""
    for name, begin, end in (("whole", 0, 50), ("many/a", 0, 7), ("many/b", 7, 8), ("many/c", 8, 50)):
        with ShardWriter(tmp_path / name) as writer:
            for tokens, spans in documents[begin:end]:
                writer.add(tokens, spans, {})
            writer.close({})
    return Corpus.open([tmp_path / "whole"]), Corpus.open([tmp_path / "many"])


def test_several_sets_are_one(split, documents, tmp_path):
    whole, many = split
    assert len(many.sets) == 3 and len(many) == len(whole) == 50
    assert (many.tokens, many.trained_tokens) == (whole.tokens, whole.trained_tokens)
    assert many.tokens == sum(len(tokens) for tokens, _ in documents)
    for begin, end in ((0, 50), (6, 9), (7, 8), (8, 50), (49, 50), (3, 3)):
        assert many.lengths(begin, end).tolist() == [len(tokens) for tokens, _ in documents[begin:end]]
    docs = np.array([49, 0, 7, 8, 6, 20, 7])
    for ours, theirs in zip(many.describe(docs), whole.describe(docs), strict=True):
        assert ours.tolist() == theirs.tolist()
    assert many.describe(np.arange(50))[1].sum() == many.trained_tokens
    expected = [i for i in range(50) if i % 9 in (0, 1)]
    assert many.untrained().tolist() == whole.untrained().tolist() == expected
    assert many.where(8) == f"{tmp_path}/many/c: document 0"
    assert shard_sets(tmp_path) == [tmp_path / "whole"]


def test_pieces_do_not_change_what_is_found(split, monkeypatch):
    monkeypatch.setattr(shards, "PIECE", 3)
    monkeypatch.setattr(corpus_module, "PIECE", 4)
    whole, _ = split
    again = Shards.open(whole.sets[0].path)
    assert again.untrained().tolist() == [i for i in range(50) if i % 9 in (0, 1)]
    assert np.concatenate([lengths for _, lengths in whole.pieces()]).tolist() == again.lengths.tolist()
    assert [begin for begin, _ in whole.pieces()] == list(range(0, 50, 4))


@pytest.mark.parametrize("row, column", [(2, 1), (3, 1), (3, 0), (4, 2)])
def test_damage_at_the_edge_of_a_piece_is_found(split, monkeypatch, row, column):
    """A span of an earlier document, one that overlaps, one that leaves its document: wherever a piece begins."""
    whole, _ = split
    rows_KC = np.array(whole.sets[0].loss_spans)
    bad = rows_KC.copy()
    bad[row, column] = {0: 0, 1: -1, 2: 1000}[column]
    for piece in (1, 2, 3, 1000):
        monkeypatch.setattr(shards, "PIECE", piece)
        whole.sets[0].loss_spans = rows_KC
        whole.sets[0]._check_spans()
        whole.sets[0].loss_spans = bad
        with pytest.raises(shards.InputError, match=f"row {row}: "):
            whole.sets[0]._check_spans()


def planned(corpus, packing, epoch=0):
    plan = EpochPlan(corpus, packing, epoch)
    count_epochs([plan], corpus.untrained())
    return plan


def test_one_block_is_the_plan_of_plan_packs(split):
    for corpus in split:
        plan = planned(corpus, Packing(64, 4, 2, seed=3, cost=(1.0, 0.1)), epoch=2)
        whole = plan_packs(corpus.lengths(0, 50), 64, pack_budget=4, ranks=2, seed=3, epoch=2, cost=(1.0, 0.1))
        assert plan.digest == whole.digest and plan.num_steps == whole.num_steps and plan.fill == whole.fill
        assert plan.balance == pytest.approx(np.mean([whole.balance(s) for s in range(whole.num_steps)]))


def test_blocks_hold_every_document_once_and_do_not_depend_on_ranks(split):
    packing = Packing(64, 4, 2, seed=3, cost=(1.0, 0.1), block=16, run=4)
    one, many = (planned(corpus, packing) for corpus in split)
    assert len(one.runs) == 4 and one.digest == many.digest
    steps = [many.documents(step) for step in range(many.num_steps)]
    assert sorted(np.concatenate(steps).tolist()) == list(range(50))
    assert [documents.tolist() for documents in steps] == [one.documents(s).tolist() for s in range(one.num_steps)]
    resumed = planned(split[0], packing)  # begins at the last step, without having planned those before it
    assert resumed.documents(many.num_steps - 1).tolist() == steps[-1].tolist()
    assert planned(split[0], replace(packing, ranks=3)).digest == one.digest
    others = [planned(split[0], packing, epoch=1), planned(split[0], replace(packing, seed=4))]
    assert len({plan.digest for plan in (one, *others)}) == 3
    assert others[0].documents(0).tolist() != one.documents(0).tolist()
    lengths = split[0].lengths(0, 50)
    for step in range(one.num_steps):
        plan, place = one.plan(step)
        for pack in range(plan.step_offsets[place], plan.step_offsets[place + 1]):
            assert lengths[plan.documents(pack)].sum() == plan.tokens[pack] <= 64
    assert one.fill == pytest.approx(lengths.sum() / (64 * one.num_packs))
    with pytest.raises(IndexError, match="does not exist"):
        one.plan(one.num_steps)


def test_a_step_without_a_trained_token_is_found_in_any_block(split):
    packing = Packing(40, 1, 1, seed=0, cost=(1.0, 0.0), block=16, run=4)
    plan = planned(split[0], packing)
    blank = [totals.blank.tolist() for totals in plan.totals if len(totals.blank)]
    untrained = set(split[0].untrained().tolist())
    steps = [set(plan.documents(s).tolist()) for s in range(plan.num_steps)]
    assert any(step <= untrained for step in steps) == bool(blank)
    assert all(set(documents) in steps and set(documents) <= untrained for documents in blank)


def test_training_on_several_sets_is_training_on_one(tmp_path):
    """The same losses, packs and resumable state, wherever the documents lie."""
    write_student(tmp_path / "student")
    write_shards(tmp_path / "data0", documents=24)
    whole = Shards.open(tmp_path / "data0")
    for i, part in enumerate((range(0, 5), range(5, 24))):
        with ShardWriter(tmp_path / "sets" / str(i)) as writer:
            for d in part:
                begin, end = whole.offsets[d : d + 2]
                writer.add(whole.tokens[begin:end], [tuple(whole.loss_spans[d, 1:])], {})
            writer.close({})
    recipe = write_recipe(tmp_path)
    one = rows(run_here(recipe, f"out={tmp_path}/one"))
    for name, data in (("a", '["sets/0", "sets/1"]'), ("b", '"sets"')):
        other = rows(run_here(recipe, f"stage.0.data={data}", f"out={tmp_path}/{name}"))
        for key in ("loss", "grad_norm", "tokens", "trained_tokens", "fill", "balance"):
            assert [row[key] for row in other] == [row[key] for row in one], key


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory through Linux's RLIMIT_DATA")
def test_planning_is_bounded_in_memory(tmp_path):
    """1.5 M documents planned by a process that may take 32 MB more, which one plan of them all exceeds."""
    code = f"""
import resource, sys
from pathlib import Path
from dasd_engine import epochs
from dasd_engine.corpus import Corpus
from dasd_engine.epochs import EpochPlan, Packing, count_epochs
epochs.WORKERS = 1
corpus = Corpus.open([Path({str(tmp_path / "set")!r})])
held = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (held + (32 << 20), held + (32 << 20)))
block = int(sys.argv[1])
plan = EpochPlan(corpus, Packing(4096, 8, 2, 0, (1.0, 0.0), block=block), 0)
count_epochs([plan], corpus.untrained())
print(plan.num_packs, len(plan.documents(plan.num_steps // 2)))
"""
    write_large(tmp_path / "set", 1_500_000)
    limited = [subprocess.run([sys.executable, "-c", code, str(block)], capture_output=True, text=True)
               for block in (1 << 15, 1 << 21)]  # fmt: skip
    assert limited[0].returncode == 0, limited[0].stderr
    assert limited[1].returncode != 0 and ("MemoryError" in limited[1].stderr or "bad_alloc" in limited[1].stderr)


def write_large(path, documents):
    """Documents of 300 to 427 tokens by their numbers alone; the tokens are a hole in the file."""
    path.mkdir()
    lengths = 300 + np.arange(documents) % 128
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    offsets.astype("<i8").tofile(path / shards.OFFSETS)
    ids = np.arange(documents)
    np.stack([ids, lengths // 2, lengths], axis=1).astype("<i4").tofile(path / shards.SPANS)
    with open(path / shards.TOKENS, "wb") as file:
        file.truncate(4 * int(offsets[-1]))
    names = (shards.TOKENS, shards.OFFSETS, shards.SPANS)
    counts = {"documents": documents, "tokens": int(offsets[-1]), "trained_tokens": 0, "max_token_id": 0}
    files = {name: {"bytes": (path / name).stat().st_size, "sha256": ""} for name in names}
    manifest = {"format": shards.FORMAT, "version": shards.VERSION, "counts": counts, "files": files}
    (path / shards.MANIFEST).write_text(json.dumps(manifest))

"""assemble_pack against a plain Python reference, and what the CUDA kernels do, on the CPU, against assemble_pack."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dasd_kernels import _C, assemble_pack, packing


@st.composite
def shards(draw):
    """(tokens, offsets, loss_spans, docs, capacity): documents with any number of disjoint spans."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    rows = []
    for doc, length in enumerate(lengths):
        trained = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        split = draw(st.booleans())  # spans that touch are allowed
        begin = None
        for i, is_trained in enumerate([*trained, False]):
            if begin is not None and (not is_trained or split):
                rows.append((doc, begin, i))
                begin = None
            if is_trained and begin is None:
                begin = i
    docs = draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, max_size=len(lengths)))
    used = sum(lengths[d] for d in docs)
    capacity = max(1, used + draw(st.integers(0, 5)))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(offsets[-1], dtype=np.uint32) + np.uint32(2**32 - 200)  # ids above 2**31 stay positive
    return tokens, offsets, np.array(rows, dtype=np.int32).reshape(-1, 3), docs, capacity


def expected(tokens, offsets, spans, docs, capacity):
    out_tokens, labels, positions, cu_seqlens = [], [], [], [0]
    for doc in docs:
        document = tokens[offsets[doc] : offsets[doc + 1]].tolist()
        trained = {i for d, begin, end in spans.tolist() if d == doc for i in range(begin, end)}
        out_tokens += document
        labels += [document[i + 1] if i + 1 in trained else -100 for i in range(len(document))]
        positions += range(len(document))
        cu_seqlens.append(len(out_tokens))
    padding = capacity - len(out_tokens)
    if padding:
        cu_seqlens.append(capacity)
    return out_tokens + [0] * padding, labels + [-100] * padding, positions + list(range(padding)), cu_seqlens


@given(shards())
def test_same_as_plain_python(shard):
    batch = assemble_pack(*shard)
    tokens, labels, positions, cu_seqlens = expected(*shard)
    for name, value in (("tokens", tokens), ("labels", labels), ("positions", positions)):
        tensor = getattr(batch, name)
        assert tensor.dtype == torch.int64 and tensor.is_contiguous() and tensor.tolist() == value, name
    assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_seqlens.tolist() == cu_seqlens
    assert batch.max_seqlen == max(np.diff(cu_seqlens))
    assert batch.valid.tolist() == [t for t, label in enumerate(labels) if label != -100]
    assert batch.num_valid == len(batch.valid)
    assert batch.num_tokens == sum(int(shard[1][d + 1] - shard[1][d]) for d in shard[3])


def assert_equal(batch, same):
    for name in ("tokens", "labels", "positions", "cu_seqlens", "valid"):
        assert getattr(batch, name).tolist() == getattr(same, name).tolist(), name
    assert batch.tokens.is_contiguous() and batch.tokens.data_ptr() % 16 == 0
    for name in ("max_seqlen", "num_valid", "num_tokens"):
        assert getattr(batch, name) == getattr(same, name), name


def expand(sets, packs, capacity):
    """The CUDA path with its kernel's threads in a loop: the same staging, the same functions of csrc/packing."""
    documents = [np.array(docs, dtype=np.int64) for docs in packs]
    return packing._expand(sets, documents, capacity, torch.device("cpu"), _C.run_jobs)


@given(shards())
def test_the_kernel_writes_the_same(shard):
    *arrays, docs, capacity = shard
    assert_equal(expand([tuple(arrays)], [docs], capacity)[0], assemble_pack(*shard))


@given(shards(), shards())
def test_several_packs_of_several_shards_in_one_launch(first, second):
    """Documents are numbered through; a document of the second shard gives what that shard alone gives."""
    sets, begin = [first[:3], second[:3]], len(first[1]) - 1
    packs = [first[3], [begin + doc for doc in second[3]], []]
    capacity = max(first[4], second[4])
    same = [assemble_pack(*shard[:4], capacity) for shard in (first, second)]
    same.append(assemble_pack(*first[:3], [], capacity))
    for assembled in (packing.assemble_packs(sets, packs, capacity), expand(sets, packs, capacity)):
        assert len(assembled) == 3
    for batch, other in zip(expand(sets, packs, capacity), same, strict=True):
        assert_equal(batch, other)
    for batch, other in zip(packing.assemble_packs(sets, packs, capacity), same, strict=True):
        assert batch.labels.tolist() == other.labels.tolist() and batch.valid.tolist() == other.valid.tolist()


@pytest.mark.parametrize("shift", range(4))
def test_documents_anywhere_in_a_shard_on_the_device(shift):
    """Tokens that are not staged lie at any multiple of 4 bytes; the kernel reads the two lines of 16 around them."""
    lengths = np.array([9, 6, 30, 1, 2, 17])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64) + shift
    memory = torch.arange(80, dtype=torch.int64).to(torch.uint32)  # aligned, and longer than the shard
    rows = [(d, 1, n) for d, n in enumerate(lengths.tolist()) if n > 1]
    loss_spans, total = spans(*rows), int(offsets[-1])
    docs = [4, 2, 0, 5, 3, 1]
    resident = [((memory.data_ptr(), total), offsets, loss_spans)]
    same = assemble_pack(memory.numpy()[:total], offsets, loss_spans, docs, 70)
    assert_equal(expand(resident, [docs], 70)[0], same)
    assert same.num_valid == sum(n - 1 for n in lengths)


TOKENS = np.arange(10, 20, dtype=np.uint32)
OFFSETS = np.array([0, 4, 4, 10], dtype=np.int64)  # documents of 4, 0 and 6 tokens
SPANS = np.array([[0, 2, 4], [2, 1, 3], [2, 4, 6]], dtype=np.int32)


def test_two_documents_and_padding():
    batch = assemble_pack(TOKENS, OFFSETS, SPANS, [2, 0], 12)
    assert batch.tokens.tolist() == [14, 15, 16, 17, 18, 19, 10, 11, 12, 13, 0, 0]
    assert batch.labels.tolist() == [15, 16, -100, 18, 19, -100, -100, 12, 13, -100, -100, -100]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 6, 10, 12]
    assert (batch.max_seqlen, batch.num_valid, batch.num_tokens) == (6, 6, 10)


def test_a_full_pack_has_no_padding_segment():
    assert assemble_pack(TOKENS, OFFSETS, SPANS, [2, 0], 10).cu_seqlens.tolist() == [0, 6, 10]


def test_no_documents_give_a_pack_of_padding():
    batch = assemble_pack(TOKENS, OFFSETS, SPANS, [], 3)
    assert batch.labels.tolist() == [-100] * 3 and batch.cu_seqlens.tolist() == [0, 3]
    assert (batch.num_valid, batch.num_tokens) == (0, 0)


def test_memory_mapped_shard(tmp_path):
    for name, array in (("tokens", TOKENS), ("offsets", OFFSETS), ("spans", SPANS)):
        array.tofile(tmp_path / name)
    tokens = np.memmap(tmp_path / "tokens", dtype=np.uint32, mode="r")
    offsets = np.memmap(tmp_path / "offsets", dtype=np.int64, mode="r")
    spans = np.memmap(tmp_path / "spans", dtype=np.int32, mode="r").reshape(-1, 3)
    batch, same = assemble_pack(tokens, offsets, spans, [0], 8), assemble_pack(TOKENS, OFFSETS, SPANS, [0], 8)
    assert batch.tokens.tolist() == same.tokens.tolist() and batch.labels.tolist() == same.labels.tolist()


@pytest.mark.skipif(packing._cuda_module() is None, reason="the package was built without nvcc (DASD_CUDA)")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA driver")
def test_the_cuda_part_imports_without_cuda_and_says_what_is_missing():
    with pytest.raises(RuntimeError, match="CUDA: "):
        packing._cuda_module().write_packs(0, 0, 1, 4, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    batch, same = (assemble_pack(TOKENS, OFFSETS, SPANS, [2, 0], 12, device=d) for d in ("cuda", "cpu"))
    assert_equal(batch, same)
    assert batch.tokens.is_cuda
    resident = assemble_pack(torch.from_numpy(TOKENS).cuda(), OFFSETS, SPANS, [2, 0], 12, device="cuda")
    assert_equal(resident, same)


def spans(*rows):
    return np.array(rows, dtype=np.int32).reshape(-1, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"docs": [0, 3]}, ValueError, "document 3 does not exist: the shard has 3 documents"),
        ({"docs": [-1]}, ValueError, "document -1 does not exist"),
        ({"docs": [1]}, ValueError, "document 1 has the offsets 4 to 4"),
        ({"docs": [0, 2], "capacity": 9}, ValueError, "document 2 of 6 tokens does not fit: 4 of 9 are taken"),
        ({"offsets": np.array([0, 4, 4, 11])}, ValueError, "document 2 has the offsets 4 to 11"),
        ({"loss_spans": spans([0, 2, 5])}, ValueError, r"document 0 has 4 tokens, but its loss span \(2, 5\) in row 0"),
        ({"loss_spans": spans([0, 2, 2])}, ValueError, r"document 0 has 4 tokens, but its loss span \(2, 2\)"),
        ({"loss_spans": spans([0, -1, 2])}, ValueError, r"document 0 has 4 tokens, but its loss span \(-1, 2\)"),
        ({"loss_spans": spans([0, 1, 3], [0, 2, 4])}, ValueError, r"loss span \(2, 4\) in row 1 is .* overlaps"),
        ({"loss_spans": np.zeros((1, 2), np.int32)}, ValueError, r"loss_spans must be \[K, 3\]"),
        ({"loss_spans": SPANS.astype(np.int64)}, TypeError, "loss_spans must be int32, not int64"),
        ({"tokens": TOKENS.astype(np.int32)}, TypeError, "tokens must be uint32, not int32"),
        ({"tokens": np.repeat(TOKENS, 2)[::2]}, ValueError, "tokens must be contiguous"),
        ({"offsets": OFFSETS[:0]}, ValueError, "offsets must have one entry more"),
        ({"capacity": 0}, ValueError, "capacity must be 1 to"),
    ],
)
def test_errors_name_the_document_or_the_array(change, error, message):
    arguments = {"tokens": TOKENS, "offsets": OFFSETS, "loss_spans": SPANS, "docs": [0, 2], "capacity": 16, **change}
    with pytest.raises(error, match=message):
        assemble_pack(**arguments)

"""Packing: which documents share a pack, a step and a rank (`plan_packs`), and a pack's tensors (`assemble_pack`).

    plan = plan_packs(lengths, 65_536, pack_budget=64, ranks=8, seed=0, epoch=0, cost=(24.1e9, 885e3))
    for step in range(plan.num_steps):
        for pack in plan.packs_of(step, rank):
            batch = assemble_pack(tokens, offsets, loss_spans, plan.documents(pack), plan.capacity, device="cuda")

Both run in C++ (csrc/packing) with the GIL released. A plan is a pure function of its arguments, the same on every
platform and every rank, so that nothing but (seed, epoch, step) needs to be stored to resume. Speed and fill are
printed by `python -m bench.table packing`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dasd_kernels import _C

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

__all__ = ["PackPlan", "PackedBatch", "assemble_pack", "assemble_packs", "plan_packs"]

INT32_MAX = 2**31 - 1  # cu_seqlens and, inside, document numbers are int32


@dataclass(frozen=True, eq=False)
class PackPlan:
    """P packs of n documents in S optimizer steps. Arrays are numpy and read-only; only `rank` depends on `ranks`."""

    docs: NDArray[np.int64]  # [n] document indices, pack after pack
    pack_offsets: NDArray[np.int64]  # [P + 1] into docs
    step_offsets: NDArray[np.int64]  # [S + 1] into packs
    rank: NDArray[np.int32]  # [P] who computes the pack
    cost: NDArray[np.float64]  # [P] sum of c*l + a*l*l over the pack's documents
    tokens: NDArray[np.int64]  # [P] real tokens, without padding
    capacity: int
    ranks: int

    @property
    def num_packs(self) -> int:
        return len(self.pack_offsets) - 1

    @property
    def num_steps(self) -> int:
        return len(self.step_offsets) - 1

    def documents(self, pack: int) -> NDArray[np.int64]:
        """The document indices of a pack, in the order in which they are laid out."""
        _check_index("pack", pack, self.num_packs)
        return self.docs[self.pack_offsets[pack] : self.pack_offsets[pack + 1]]

    def packs_of(self, step: int, rank: int) -> list[int]:
        """The packs that a rank computes in a step, ascending. Empty where a step has fewer packs than ranks."""
        _check_index("step", step, self.num_steps)
        _check_index("rank", rank, self.ranks)
        begin, end = self.step_offsets[step], self.step_offsets[step + 1]
        return (np.flatnonzero(self.rank[begin:end] == rank) + begin).tolist()

    @property
    def fill(self) -> float:
        """Real tokens over the tokens of all packs, 0..1; 1.0 for a plan without documents."""
        return float(self.tokens.sum() / (self.num_packs * self.capacity)) if self.num_packs else 1.0

    def balance(self, step: int) -> float:
        """Mean over max of the ranks' costs in a step, 0..1: the share of the step in which the ranks work."""
        _check_index("step", step, self.num_steps)
        return float(self.balances[step])

    @functools.cached_property
    def balances(self) -> NDArray[np.float64]:
        """`balance` of every step, [S]."""
        step = np.repeat(np.arange(self.num_steps), np.diff(self.step_offsets))
        loads = np.bincount(step * self.ranks + self.rank, weights=self.cost, minlength=self.num_steps * self.ranks)
        loads = loads.reshape(self.num_steps, self.ranks)
        most = loads.max(axis=1)
        return np.divide(loads.mean(axis=1), most, out=np.ones_like(most), where=most > 0)

    @property
    def digest(self) -> str:
        """SHA-256 of docs, pack_offsets, step_offsets and capacity in hex: equal for every `ranks`."""
        sizes = f"dasd-plan {self.capacity} {len(self.docs)} {self.num_packs} {self.num_steps}\n"
        sha = hashlib.sha256(sizes.encode())
        for array in (self.docs, self.pack_offsets, self.step_offsets):
            sha.update(np.ascontiguousarray(array, dtype="<i8").data)
        return sha.hexdigest()


def plan_packs(
    lengths: ArrayLike | torch.Tensor,
    capacity: int,
    *,
    pack_budget: int | None = None,
    ranks: int = 1,
    seed: int = 0,
    epoch: int = 0,
    window: int = 8192,
    cost: tuple[float, float] = (1.0, 0.0),
) -> PackPlan:
    """Packs whole documents, cuts the packs into optimizer steps, and balances each step over ranks.

    Documents are shuffled by (seed, epoch) and taken `window` at a time, longest first, each into the fullest pack that
    still has room (best fit decreasing); packs stay open over the windows. The packs are shuffled, cut into steps of
    `pack_budget`, and inside a step the dearest goes to the rank with the least to do (LPT). Who computes a pack leaves
    the step's summed gradient unchanged, so packs, their order and the steps never depend on `ranks`.

    lengths      [n] integers (array, tensor or list), tokens a document, 1..capacity
    capacity     tokens a pack, 1..2**31 - 1
    pack_budget  packs in one optimizer step over all ranks; the last step may have fewer. None: all packs in one step
    ranks        data-parallel ranks; a step with fewer packs than ranks leaves some ranks without one
    seed, epoch  the order; any integers (taken modulo 2**64)
    window       documents sorted together: larger fills a little better, smaller gives a document other company each
                 epoch (a window that holds all documents makes nearly the same packs every time)
    cost         (c, a): a document of l tokens costs c*l + a*l*l, for a transformer FLOPs a token and a token squared

    ValueError names the document that is empty or longer than the capacity, or the argument that is out of range.
    """
    array = _integers("lengths", lengths)
    budget = len(array) + 1 if pack_budget is None else pack_budget
    for name, value in (("pack_budget", budget), ("window", window), ("ranks", ranks), ("capacity", capacity)):
        _check_range(name, value)
    linear, quadratic = map(float, cost)
    if not (math.isfinite(linear) and math.isfinite(quadratic) and linear >= 0 and quadratic >= 0):
        raise ValueError(f"cost must be two finite numbers >= 0, not {cost}")
    _check_range("the number of documents + 1", len(array) + 1)
    if len(array) and not (array.min() >= 1 and array.max() <= capacity):
        doc = int(np.argmax((array < 1) | (array > capacity)))
        raise ValueError(f"document {doc} has {array[doc]} tokens; a pack takes documents of 1 to {capacity} tokens")
    seed, epoch = int(seed) % 2**64, int(epoch) % 2**64
    arrays = _C.plan_packs(array, capacity, budget, ranks, seed, epoch, window, linear, quadratic)
    for result in arrays:
        result.setflags(write=False)
    return PackPlan(*arrays, capacity=capacity, ranks=ranks)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One pack on a device. T = capacity; segments are the documents, then the padding if there is any."""

    tokens: torch.Tensor  # int64 [T]; 0 in the padding
    labels: torch.Tensor  # int64 [T]; the next token where it is trained, else -100
    positions: torch.Tensor  # int64 [T]; from 0 in each segment
    cu_seqlens: torch.Tensor  # int32 [segments + 1]; 0 first, T last
    valid: torch.Tensor  # int64 [num_valid]; where labels are not -100, ascending
    max_seqlen: int  # the longest segment, padding included, as attention kernels need it
    num_valid: int  # labels that are not -100
    num_tokens: int  # real tokens


def assemble_pack(
    tokens: ArrayLike | torch.Tensor,
    offsets: ArrayLike,
    loss_spans: ArrayLike,
    docs: ArrayLike | Sequence[int],
    capacity: int,
    *,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """Copies documents out of a shard into one pack of `capacity` tokens, with labels, positions and boundaries.

    tokens      uint32 [total], the shard's tokens; a np.memmap is read only where the documents lie. For a CUDA
                `device` also a uint32 tensor that lies there
    offsets     int64 [D + 1], document d is tokens[offsets[d]:offsets[d + 1]]
    loss_spans  int32 [K, 3], rows (document, begin, end): token indices inside the document, sorted by document, then
                begin, disjoint. labels[i] = tokens[i + 1] where i + 1 is in the same document and in a span, else -100;
                so the first token of a document is never a label
    docs        integers, in the order in which they are laid out; none gives a pack of padding only
    device      where the tensors go. For CUDA the documents' tokens are copied from pinned memory, 4 bytes each, and
                one kernel writes the pack, both on the current stream and without waiting (csrc/packing/pack.cu);
                without the compiled CUDA part the pack is written on the CPU and copied

    ValueError names the document that does not exist, is empty, does not fit, or has a wrong span. TypeError names the
    array whose dtype is another one: the arrays may be large, so nothing is converted.
    """
    return assemble_packs([(tokens, offsets, loss_spans)], [docs], capacity, device=device)[0]


def assemble_packs(
    shards: Sequence[tuple[ArrayLike | torch.Tensor, ArrayLike, ArrayLike]],
    packs: Sequence[ArrayLike | Sequence[int]],
    capacity: int,
    *,
    device: torch.device | str = "cpu",
) -> list[PackedBatch]:
    """`assemble_pack` for several packs, such as a step's, of several shards: on CUDA one copy and one launch for all.

    shards  (tokens, offsets, loss_spans) each; documents are numbered through, the second shard's after the first's
    packs   the documents of each pack
    """
    _check_range("capacity", capacity)
    device = torch.device(device)
    sets = [_shard(*shard, device) for shard in shards]
    documents = [_integers("docs", docs) for docs in packs]
    if device.type == "cuda" and (cuda := _cuda_module()):
        return _expand(sets, documents, capacity, device, cuda.write_packs)
    return [_assemble_on_cpu(sets, docs, capacity, device) for docs in documents]


def _assemble_on_cpu(sets: list, docs: NDArray[np.int64], capacity: int, device: torch.device) -> PackedBatch:
    out = torch.empty(3, capacity, dtype=torch.int64, pin_memory=device.type == "cuda")
    cu_seqlens, valid, max_seqlen, num_tokens = _C.assemble_pack(sets, docs, out.numpy())
    rows = out.to(device, non_blocking=True)  # one copy for the three
    boundaries, positions = (torch.from_numpy(array).to(device) for array in (cu_seqlens, valid))
    return PackedBatch(rows[0], rows[1], rows[2], boundaries, positions, max_seqlen, len(valid), num_tokens)


def _expand(
    sets: list, documents: list[NDArray[np.int64]], capacity: int, device: torch.device, write: Callable[..., None]
) -> list[PackedBatch]:
    """The packs written by `write` from one buffer that is copied to `device`. Tests run it on the CPU, with the
    kernel's arithmetic in a loop."""
    on_cuda = device.type == "cuda"
    stage = _C.Stage(sets, documents, capacity, any(isinstance(tokens, tuple) for tokens, _, _ in sets))
    facts = stage.describe()
    stride = -(-capacity // 4) * 4  # so that every row begins on 16 bytes
    host = torch.empty(stage.bytes, dtype=torch.uint8, pin_memory=on_cuda)
    staged = torch.empty(stage.bytes, dtype=torch.uint8, device=device)
    rows = torch.empty(len(documents), 3, stride, dtype=torch.int64, device=device)
    counts = [num_valid for _, _, _, num_valid, _ in facts]
    valid = torch.empty(sum(counts), dtype=torch.int64, device=device)
    stage.write(host.data_ptr(), staged.data_ptr(), rows.data_ptr(), stride, valid.data_ptr())
    staged.copy_(host, non_blocking=True)
    if on_cuda and documents:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device)
            write(stream.device_index, staged.data_ptr(), len(documents), capacity, stream.cuda_stream)
    elif documents:
        write(staged.data_ptr(), len(documents))
    batches = []
    for pack, own, (begin, segments, max_seqlen, num_valid, used) in zip(rows, valid.split(counts), facts, strict=True):
        tokens, labels, positions = pack[:, :capacity].unbind()
        cu_seqlens = staged[begin : begin + 4 * segments].view(torch.int32)
        batches.append(PackedBatch(tokens, labels, positions, cu_seqlens, own, max_seqlen, num_valid, used))
    return batches


@functools.cache
def _cuda_module() -> Any:
    """The compiled CUDA part, or None where the package was built without nvcc."""
    try:
        return importlib.import_module("dasd_kernels._cuda")
    except ImportError:
        return None


def _shard(tokens: Any, offsets: ArrayLike, loss_spans: ArrayLike, device: torch.device) -> tuple:
    spans = _typed("loss_spans", loss_spans, np.int32, 2)
    if spans.shape[1] != 3:
        raise ValueError(f"loss_spans must be [K, 3], rows (document, begin, end), not {list(spans.shape)}")
    offsets_array = _typed("offsets", offsets, np.int64, 1)
    if not len(offsets_array):
        raise ValueError("offsets must have one entry more than there are documents, but is empty")
    if isinstance(tokens, torch.Tensor) and tokens.device.type == "cuda":
        if tokens.device != torch.empty(0, device=device).device or not _cuda_module():
            raise ValueError(f"tokens lie on {tokens.device}: packs must be made there, by the compiled CUDA part")
        if tokens.dtype != torch.uint32 or tokens.ndim != 1 or not tokens.is_contiguous():
            raise TypeError(f"tokens must be contiguous uint32 [total], not {tokens.dtype} {list(tokens.shape)}")
        return (tokens.data_ptr(), len(tokens)), offsets_array, spans
    return _typed("tokens", tokens, np.uint32, 1), offsets_array, spans


def _integers(name: str, values: ArrayLike | Sequence[int] | torch.Tensor) -> NDArray[np.int64]:
    array = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, not the shape {list(array.shape)}")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, not {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.int64)


def _typed(name: str, values: ArrayLike, dtype: type[np.generic], ndim: int) -> NDArray:
    array = np.asarray(values)
    if array.dtype != dtype:
        raise TypeError(f"{name} must be {np.dtype(dtype).name}, not {array.dtype}")
    if array.ndim != ndim or not array.flags.c_contiguous:
        raise ValueError(f"{name} must be contiguous with {ndim} dimension(s), not the shape {list(array.shape)}")
    return array


def _check_range(name: str, value: int) -> None:
    if not 1 <= value <= INT32_MAX:
        raise ValueError(f"{name} must be 1 to {INT32_MAX}, not {value}")


def _check_index(name: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise IndexError(f"{name} {index} does not exist: the plan has {count}")

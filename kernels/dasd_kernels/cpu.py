"""The C++ kernels of csrc/linear_ce on CPU tensors: which of them, how many tokens at a time, in what memory.

`run` has chunked.run's interface. A chunk of C tokens holds E [V, C] in the kernel's element type (fp32, or bf16 where
the CPU multiplies bf16 and the inputs are), the packed hidden states and their gradient; everything else is small.
Up to 256 MB of that stay with the process for the next call: fresh memory costs a sixth of a training step.

The last chunk's part of dW is not computed by `run` but by `head_gradient` from the chunk's State, in backward: there
the upstream gradient is known, so dW is written once, scaled, in its own dtype. With one chunk no fp32 dW ever exists;
so one chunk may take an fp32 dW's memory besides the workspace. And dW is written over E, row by row behind what was
read, unless E is much the larger (`Plan`). With several, an fp32 weight's gradient is finished where the chunks before
the last have added it up. Either spends what `run` left; a second backward computes everything anew.
"""

import functools
import os
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dasd_kernels import _C
from dasd_kernels.chunked import Result, Row

THREADS = os.cpu_count() or 1  # most for dW, over E: a row is written so many blocks behind what was read
WORKSPACES: "weakref.WeakValueDictionary[int, _C.Workspace]" = weakref.WeakValueDictionary()  # by address
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def describe(name: str) -> tuple[int, int, int] | None:
    """(bytes of an element of E, tokens of a register tile, rows of dW that a thread makes at a time) of the named
    kernels; None where they cannot run."""
    return _C.linear_ce_describe(name)


def choose(hidden: Tensor, weight: Tensor, asked: str = "") -> str | None:
    """The kernels for these inputs: the asked ones, or the best the CPU has; None for none (older CPUs and float64
    are better served by the chunked backend)."""
    if hidden.device.type != "cpu" or hidden.dtype not in DTYPES or weight.dtype not in DTYPES:
        return None
    native = hidden.dtype == weight.dtype == torch.bfloat16
    if asked == "avx512_bf16" and not native:
        asked = "avx512"  # operands are never rounded to bf16
    if asked:
        if describe(asked) is None:
            raise ValueError(f"DASD_KERNELS={asked}: this CPU or build has no such kernels")
        return asked
    names = ["avx512_bf16", "avx512", "avx2"] if native else ["avx512", "avx2"]
    return next((name for name in names if describe(name)), None)


def run(
    plan: "Plan",
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    row: Row,
    *,
    coefficient: Tensor | None = None,
    needs: tuple[bool, bool, bool] = (False, False, False),
    entropy: bool = False,
    rank: bool = False,
) -> Result:
    """chunked.run by the kernels of `plan`, which is made for at least as many rows; no label smoothing under a
    softcap. The gradients of weight and bias lack the last chunk's part, which `head_gradient` makes of Result.state;
    grad_weight is None where that is all."""
    assert not (row.label_smoothing and row.softcap)
    name, n, (vocab, width) = plan.name, len(hidden), weight.shape
    size = plan.chunk_rows(n)
    last = max(0, -(-n // size) - 1) * size  # where the last chunk begins
    head_wanted = needs[1] or needs[2]
    partial = state = None
    if coefficient is not None:
        memory, room = new_memory(plan.size, 4 * weight.numel() if needs[1] and last else 0)
        state = State(plan, head_wanted, memory)
        partial = room.view(torch.float32).view(weight.shape) if room.numel() else None
    out = Result(
        target=hidden.new_empty(n, dtype=torch.float32),
        nll=hidden.new_empty(n, dtype=torch.float32),
        lse=hidden.new_empty(n, dtype=torch.float32),
        entropy=hidden.new_empty(n, dtype=torch.float32) if entropy else None,
        rank=labels.new_empty(n) if rank else None,
        grad_hidden=hidden.new_empty(n, width) if needs[0] else None,
        grad_weight=partial,
        grad_bias=hidden.new_zeros(vocab, dtype=torch.float32) if needs[2] else None,
        state=state.memory if state is not None and head_wanted else None,
    )
    inverse = hidden.new_full((n,), 1 / row.temperature, dtype=torch.float32)
    if temperature is not None:
        inverse = 1 / temperature.float()
    flat_bias = None if bias is None else bias.float().contiguous()
    head = describe_head(weight, flat_bias, row.softcap)
    smooth = Smoothing(hidden, weight, flat_bias, inverse, coefficient, row) if row.label_smoothing else None
    threads = torch.get_num_threads() if n * vocab * width > 1 << 20 else 1
    ld = padded(name, width)
    dx = hidden.new_empty(min(size, n), ld if needs[0] else 0, dtype=torch.float32)
    for begin in range(0, n, size):
        part = slice(begin, min(begin + size, n))
        x, y = hidden[part].contiguous(), labels[part].contiguous()
        factor = None if coefficient is None else coefficient[part].float().contiguous()
        rows = describe_rows(x, y, inverse[part], factor, row)
        scores = tuple(0 if f is None else address(f[part]) for f in (out.nll, out.lse, out.entropy, out.rank))
        if state is None:
            _C.linear_ce_forward(name, head, rows, scores, None, threads)
            continue
        buffers = state.addresses(len(x), address(dx) if needs[0] else 0)
        _C.linear_ce_forward(name, head, rows, scores, buffers, threads)
        if out.grad_hidden is not None:
            found = dx.view(-1)[: len(x) * ld].view(len(x), -1)[:, :width]
            out.grad_hidden[part] = found if smooth is None else smooth.take_from(found, part)
        if head_wanted and begin < last:
            target = (address(out.grad_weight), 0, 0, 0, 1.0, begin > 0, address(out.grad_bias))
            _C.linear_ce_weight_gradient(name, head, rows, buffers, target, threads)
    if state is not None:
        state.close(last, n - last, None if smooth is None else smooth.everywhere)
    if smooth is not None and out.grad_bias is not None:
        out.grad_bias.sub_(smooth.share.sum())
    torch.sub(out.lse, out.nll, out=out.target)
    return out if smooth is None else replace(out, mean=smooth.mean)


class Smoothing:
    """What label smoothing adds, without a softcap: the mean logit is linear in hidden, so that the loss and both
    gradients take terms of rank 1 and no logit (N D + V D multiply-adds).

    mean [n]: of each row's logits. share [n]: coefficient * label_smoothing / (V * temperature), what every entry of
    the vocabulary gives up. everywhere [D]: what every row of dW takes."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, inverse: Tensor, coefficient: Tensor | None, row: Row
    ):
        self.row = weight.mean(0, dtype=torch.float32)
        self.vocab = len(weight)
        wide = hidden.float()
        self.mean = (wide @ self.row + (0.0 if bias is None else bias.mean())) * inverse
        if coefficient is not None:
            self.share = coefficient.float() * inverse * (row.label_smoothing / self.vocab)
            self.everywhere = -(self.share @ wide)

    def take_from(self, grad_hidden: Tensor, part: slice) -> Tensor:
        return grad_hidden.addr_(self.share[part], self.row, alpha=-self.vocab)


def head_gradient(
    memory: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    partial: Tensor | None,
    scale: float,
    out: Tensor | None,
    add: bool,
    out_bias: Tensor | None,
) -> None:
    """out (+)= scale * (partial + the last chunk's part), [V, D] of a dtype of DTYPES; out_bias [V] fp32 += scale *
    that part. `memory` is Result.state, `partial` grad_weight; hidden and labels are the rows `run` was given. `out`
    may be what `claim` gave for `memory`."""
    state = State.reopen(memory, *weight.shape)
    if not state.count:  # no rows at all
        if out is not None and not add:
            out.zero_()
        return
    part = slice(state.begin, state.begin + state.count)
    x, y = hidden[part].contiguous(), labels[part].contiguous()
    kind = 0 if out is None else DTYPES[out.dtype]
    previous = address(partial) if state.begin else 0
    target = (address(out), kind, previous, state.everywhere, scale, add, address(out_bias))
    threads = min(torch.get_num_threads(), THREADS) if state.count * weight.numel() > 1 << 20 else 1
    _C.linear_ce_weight_gradient(
        state.plan.name, describe_head(weight, None, None), describe_rows(x, y, None, None, Row()),
        state.addresses(state.count), target, threads,
    )  # fmt: skip


def describe_head(weight: Tensor, bias: Tensor | None, softcap: float | None) -> tuple[Any, ...]:
    return (
        weight.data_ptr(), DTYPES[weight.dtype], *weight.stride(), address(bias), *weight.shape, softcap or 0.0,
    )  # fmt: skip


def describe_rows(
    x: Tensor, labels: Tensor, inverse: Tensor | None, coefficient: Tensor | None, row: Row
) -> tuple[Any, ...]:
    return (
        x.data_ptr(), DTYPES[x.dtype], len(x), labels.data_ptr(), address(inverse), address(coefficient), row.z_loss,
        row.label_smoothing,
    )  # fmt: skip


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def padded(name: str, count: int) -> int:
    """`count` in whole register tiles."""
    return -(-count // facts(name)[1]) * facts(name)[1]


def facts(name: str) -> tuple[int, int, int]:
    described = describe(name)
    assert described is not None
    return described


@dataclass(frozen=True)
class Plan:
    """What a call holds, from shapes alone: tokens of its largest chunk, and where a State's parts lie."""

    name: str
    rows: int  # of the largest chunk
    vocab: int
    width: int
    row_bytes: int  # of dW, where it is to be written over E; else 0

    @classmethod
    def of(
        cls, name: str, total: int, weight: Tensor, workspace_bytes: int, *,
        gradients: bool = False, head: bool = False, over: bool = False,
    ) -> "Plan":  # fmt: skip
        """For `total` rows, whether they count or not. gradients: any are wanted; head: dW is; over: dW in weight's
        dtype, which may be written over E."""
        (vocab, width), element = weight.shape, facts(name)[0]
        token_bytes = width * element + vocab // 16  # packed hidden states, and the sums of the vocabulary's parts
        if gradients:
            token_bytes += vocab * element + width * (element + 4)
        rows = max(1, workspace_bytes // token_bytes)  # as many as may be: dW is read and written once a chunk
        if head and total * token_bytes <= workspace_bytes + 4 * vocab * width:
            rows = max(rows, total)  # one chunk, and no fp32 dW
        if rows < total and weight.dtype == torch.float32:
            over = False  # dW is finished where it was added up
        plan = cls(name, min(rows, total), vocab, width, weight.element_size() * width if over else 0)
        # E's rest stays with dW as long as that lives: nobody else's loss where all of it is kept for the next call.
        dear = plan.e_row(plan.rows) > 2.25 * plan.row_bytes and not _C.Workspace.keeps(plan.size)
        return replace(plan, row_bytes=0) if dear else plan

    def chunk_rows(self, n: int) -> int:
        """Tokens of a chunk, about equal over the chunks and whole register tiles."""
        even = -(-n // max(1, -(-n // max(1, self.rows))))
        return max(1, min(self.rows, padded(self.name, even)))

    def e_row(self, count: int) -> int:
        """Bytes of a row of E: an odd number of cache lines."""
        return 64 * (-(-count * facts(self.name)[0] // 64) | 1)

    @functools.cached_property
    def offsets(self) -> tuple[int, int, int]:
        """Where factors, xs, and the room for E and dW begin."""
        factors = 64 + -(-4 * self.width // 64) * 64
        xs = factors + -(-12 * self.rows // 64) * 64
        tokens = padded(self.name, self.rows) + 1
        return factors, xs, xs + -(-padded(self.name, self.width) * tokens * facts(self.name)[0] // 64) * 64

    def e_begin(self, count: int) -> int:
        """Where E of `count` tokens begins: linear_ce.hpp says how far behind dW."""
        if not self.row_bytes:
            return self.offsets[2]
        e_row = self.e_row(count)
        ahead = THREADS * facts(self.name)[2] * max(self.row_bytes, e_row)
        ahead += max(0, self.vocab * (self.row_bytes - e_row))
        return self.offsets[2] + -(-ahead // 64) * 64

    @property
    def size(self) -> int:
        return self.e_begin(self.rows) + self.vocab * self.e_row(self.rows) + 64


class State:
    """The buffers of a chunk, sized as csrc/linear_ce/linear_ce.hpp says, in one tensor, [bytes] uint8, that can be
    kept from forward to backward: a header of 8 int64, `everywhere`, factor, hit and hit_saved, xs, and a room with E
    at its end. Every chunk uses it anew."""

    NAMES = ("portable", "avx2", "avx512", "avx512_bf16")

    def __init__(self, plan: Plan, keep: bool, memory: Tensor):
        self.plan, self.keep, self.memory = plan, keep, memory
        self.begin = self.count = self.everywhere = 0

    def addresses(self, count: int, dx: int = 0) -> tuple[int, ...]:
        base, step = self.memory.data_ptr(), 4 * self.plan.rows
        factors, xs, _ = self.plan.offsets
        parts = (base + factors + i * step for i in range(3))
        return (base + self.plan.e_begin(count), base + xs if self.keep else 0, dx, *parts)

    def close(self, begin: int, count: int, everywhere: Tensor | None) -> None:
        """Note what the last chunk was, and what every row of dW takes besides."""
        values = [self.NAMES.index(self.plan.name), self.plan.rows, self.plan.row_bytes, begin, count]
        self.memory[:48].view(torch.int64).copy_(torch.tensor([*values, everywhere is not None]))
        if everywhere is not None:
            self.memory[64 : 64 + 4 * self.plan.width].view(torch.float32).copy_(everywhere)

    @classmethod
    def reopen(cls, memory: Tensor, vocab: int, width: int) -> "State":
        name, rows, row_bytes, begin, count, everywhere = memory[:48].view(torch.int64).tolist()
        state = cls(Plan(cls.NAMES[name], rows, vocab, width, row_bytes), True, memory)
        state.begin, state.count = begin, count
        state.everywhere = memory.data_ptr() + 64 if everywhere else 0
        return state


def new_memory(state: int, partial: int) -> tuple[Tensor, Tensor]:
    """uint8 [state] and [partial], each from a cache line on: a State's memory, and room for the fp32 sum of dW over
    chunks, which `claim` can give out again as an fp32 weight's gradient. In one workspace where the process will keep
    that for the next call; else E, which lives shorter, has its own."""
    begin = -(-partial // 64) * 64
    if partial and _C.Workspace.keeps(begin + state):
        workspace = _C.Workspace(begin + state)
        return part_of(workspace, begin, state), part_of(workspace, 0, partial)
    room = part_of(_C.Workspace(partial), 0, partial) if partial else torch.empty(0, dtype=torch.uint8)
    return part_of(_C.Workspace(state), 0, state), room


def part_of(workspace: _C.Workspace, offset: int, size: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """[size / itemsize] from byte `offset` on, which keeps the workspace alive, and by which `spent` finds it."""
    part = torch.frombuffer(workspace, dtype=dtype, count=size // dtype.itemsize, offset=offset)
    WORKSPACES[part.data_ptr()] = workspace
    return part


def claim(memory: Tensor, partial: Tensor, weight: Tensor) -> Tensor | None:
    """Room for dW in what `run` left, which `head_gradient` spends with it: in `partial`, or over E in `memory`, a
    State's. None where there is none, as in a copy, which saved-tensor hooks may make."""
    plan = State.reopen(memory, *weight.shape).plan
    over = partial.numel() == 0 or partial.dtype != weight.dtype
    left = memory if over else partial
    workspace = WORKSPACES.get(left.data_ptr())
    if workspace is None or (over and not plan.row_bytes):
        return None
    workspace.spent = True
    place = left.data_ptr() - workspace.address + (plan.offsets[2] if over else 0)
    return part_of(workspace, place, weight.numel() * weight.itemsize, weight.dtype).view(weight.shape)


def spent(memory: Tensor) -> bool:
    """Whether what `run` left in `memory` was overwritten."""
    workspace = WORKSPACES.get(memory.data_ptr())
    return workspace is not None and workspace.spent

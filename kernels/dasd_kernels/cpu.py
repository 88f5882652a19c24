"""The C++ kernels of csrc/linear_ce on CPU tensors: which of them, how many tokens at a time, in what memory.

`run` has chunked.run's interface. A chunk of C tokens holds E [V, C] in the kernel's element type (fp32, or bf16 where
the CPU multiplies bf16 and the inputs are), the packed hidden states and their gradient; everything else is small.
"""

import functools

import torch
from torch import Tensor

from dasd_kernels.chunked import Result, Row

try:
    from dasd_kernels import _C
except ImportError:  # a source tree that was not built: the chunked backend does everything
    _C = None  # type: ignore[assignment]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CACHE_BYTES = 8 << 20  # E of a chunk is kept this small where that leaves ...
CHUNK_ROWS = 1024  # ... at least these rows, enough to hide the passes over dW


@functools.cache
def describe(name: str) -> tuple[int, int] | None:
    """(bytes of an element of E, tokens of a register tile) of the named kernels; None where they cannot run."""
    return None if _C is None else _C.linear_ce_describe(name)


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
    name: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    row: Row,
    workspace_bytes: int,
    *,
    coefficient: Tensor | None = None,
    needs: tuple[bool, bool, bool] = (False, False, False),
    entropy: bool = False,
    rank: bool = False,
) -> Result:
    """chunked.run by the kernels `name`; no label smoothing."""
    described = describe(name)
    assert described is not None and not row.label_smoothing
    n, (vocab, width) = len(hidden), weight.shape
    out = Result(
        target=hidden.new_empty(n, dtype=torch.float32),
        nll=hidden.new_empty(n, dtype=torch.float32),
        lse=hidden.new_empty(n, dtype=torch.float32),
        entropy=hidden.new_empty(n, dtype=torch.float32) if entropy else None,
        rank=labels.new_empty(n) if rank else None,
        grad_hidden=hidden.new_empty(n, width) if needs[0] else None,
        grad_weight=hidden.new_empty(vocab, width, dtype=torch.float32) if needs[1] else None,
        grad_bias=hidden.new_zeros(vocab, dtype=torch.float32) if needs[2] else None,
    )
    if n == 0 and out.grad_weight is not None:
        out.grad_weight.zero_()
    inverse = hidden.new_full((n,), 1 / row.temperature, dtype=torch.float32)
    if temperature is not None:
        inverse = 1 / temperature.float()
    flat_bias = None if bias is None else bias.float().contiguous()
    head = (
        weight.data_ptr(), DTYPES[weight.dtype], *weight.stride(), address(flat_bias), vocab, width, row.softcap or 0.0,
    )  # fmt: skip
    threads = torch.get_num_threads() if n * vocab * width > 1 << 20 else 1
    size = chunk_rows(n, vocab, width, described, workspace_bytes, coefficient is not None)
    memory = Memory(min(size, n), vocab, width, described, needs, hidden) if coefficient is not None else None
    for begin in range(0, n, size):
        part = slice(begin, min(begin + size, n))
        x, y = hidden[part].contiguous(), labels[part].contiguous()
        factor = None if coefficient is None else coefficient[part].float().contiguous()
        rows = (
            x.data_ptr(),
            DTYPES[x.dtype],
            len(x),
            y.data_ptr(),
            address(inverse[part]),
            address(factor),
            row.z_loss,
        )
        fields = (out.nll, out.lse, out.entropy, out.rank)
        scores = tuple(0 if f is None else address(f[part]) for f in fields)
        if memory is None:
            _C.linear_ce_forward(name, head, rows, scores, None, 0, threads)
            continue
        state = memory.addresses()
        _C.linear_ce_forward(name, head, rows, scores, state, memory.e_bytes, threads)
        if out.grad_hidden is not None:
            out.grad_hidden[part] = memory.dx.view(-1)[: len(x) * memory.ld].view(len(x), -1)[:, :width]
        if needs[1] or needs[2]:
            target = (address(out.grad_weight), 0, 0, 1.0, begin > 0, address(out.grad_bias))
            _C.linear_ce_weight_gradient(name, head, rows, state, target, threads)
    torch.sub(out.lse, out.nll, out=out.target)
    return out


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def chunk_rows(
    n: int, vocab: int, width: int, described: tuple[int, int], workspace_bytes: int, gradients: bool
) -> int:
    """Tokens of a chunk, about equal over the chunks and whole register tiles."""
    element, panel = described
    row_bytes = width * element + vocab // 16  # packed hidden states, and the sums of the vocabulary's parts
    if gradients:
        row_bytes += vocab * element + width * (element + 4)
    limit = max(1, workspace_bytes // row_bytes)
    if gradients:
        limit = min(limit, max(CHUNK_ROWS, CACHE_BYTES // (vocab * element)))
    even = -(-n // max(1, -(-n // limit)))
    return max(1, min(limit, -(-even // panel) * panel))


class Memory:
    """The buffers of a chunk, sized as csrc/linear_ce/linear_ce.hpp says; reused by every chunk."""

    def __init__(
        self,
        count: int,
        vocab: int,
        width: int,
        described: tuple[int, int],
        needs: tuple[bool, bool, bool],
        like: Tensor,
    ) -> None:
        element, panel = described
        tokens, self.ld = -(-count // panel) * panel, -(-width // panel) * panel
        self.e_bytes = vocab * (tokens * element + 64)
        self.e = like.new_empty(self.e_bytes + 64, dtype=torch.uint8)
        self.xs = like.new_empty(self.ld * (tokens + 1) * element if needs[1] else 0, dtype=torch.uint8)
        self.dx = like.new_empty(count, self.ld if needs[0] else 0, dtype=torch.float32)
        self.rows = like.new_empty(3, count, dtype=torch.float32)  # factor, hit, hit_saved

    def addresses(self) -> tuple[int, ...]:
        buffers = (self.e, self.xs, self.dx, *self.rows)
        return tuple(b.data_ptr() if b.numel() else 0 for b in buffers)

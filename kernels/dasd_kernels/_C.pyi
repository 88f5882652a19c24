import numpy as np
from numpy.typing import NDArray

def plan_packs(
    lengths: NDArray[np.int64],
    capacity: int,
    pack_budget: int,
    ranks: int,
    seed: int,
    epoch: int,
    window: int,
    linear: float,
    quadratic: float,
) -> tuple[
    NDArray[np.int64],  # docs
    NDArray[np.int64],  # pack_offsets
    NDArray[np.int64],  # step_offsets
    NDArray[np.int32],  # rank
    NDArray[np.float64],  # cost
    NDArray[np.int64],  # tokens
]: ...

# csrc/packing: sets are (tokens, offsets, loss_spans) each; tokens on a device come as (address, total).
def assemble_pack(
    sets: list[tuple], docs: NDArray[np.int64], out: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64], int, int]: ...  # cu_seqlens, valid, max_seqlen, num_tokens
def label_counts(loss_spans: NDArray[np.int32], docs: NDArray[np.int64]) -> NDArray[np.int64]: ...
def run_jobs(stage: int, packs: int) -> None: ...
def copy_rows(
    source: NDArray[np.uint32], valid: NDArray[np.int64], to: NDArray[np.uint32], scatter: bool
) -> None: ...

class Stage:
    def __init__(self, sets: list[tuple], packs: list[NDArray[np.int64]], capacity: int, resident: bool) -> None: ...
    @property
    def bytes(self) -> int: ...
    def describe(self) -> list[tuple[int, int, int, int, int]]: ...  # at, cu, max_seqlen, num_valid, tokens
    def write(self, host: int, device: int, rows: int, stride: int, valid: int) -> None: ...

# csrc/linear_ce: addresses and sizes, checked and laid out by dasd_kernels.cpu, their one caller.
class Workspace:
    keep: int  # bytes at most, of what calls leave to the next one
    keep_from: int  # bytes at least, of what they leave besides
    spent: bool  # overwritten by what was made of it
    def __init__(self, bytes: int) -> None: ...
    @property
    def address(self) -> int: ...
    def __buffer__(self, flags: int) -> memoryview: ...
    @staticmethod
    def keeps(size: int) -> bool: ...
    @staticmethod
    def release() -> None: ...

# Bytes of an element of E, tokens of a register tile, rows of dW that a thread makes at a time.
def linear_ce_describe(name: str) -> tuple[int, int, int] | None: ...
def linear_ce_forward(
    name: str, head: tuple, rows: tuple, scores: tuple, state: tuple | None, threads: int
) -> None: ...
def linear_ce_weight_gradient(name: str, head: tuple, rows: tuple, state: tuple, out: tuple, threads: int) -> None: ...

# csrc/decode: addresses and sizes, checked by dasd_kernels.decode, their one caller. Heads are (address, stride, rows,
# count, dim), a cache (keys, values, room).
def decode_supports(name: str) -> bool: ...
def decode_add_rms_norm(
    name: str, x: int, delta: int, weight: int, out: int, rows: int, width: int, eps: float, bf16: bool, threads: int, /
) -> None: ...
def decode_rotate(
    name: str, x: tuple, cos: int, sin: int, norm: int, eps: float, bf16: bool, threads: int, /
) -> None: ...
def decode_append(
    name: str, keys: tuple, values: tuple, source: int, rows: int, slots: int, count: int, cache: tuple, bf16: bool,
    threads: int, /,
) -> None: ...
def decode_attend_next(
    name: str, queries: tuple, keys: tuple, values: tuple, last: int, cache: tuple, scale: float, out: int, bf16: bool,
    threads: int, /,
) -> None: ...
def decode_attend_pack(
    name: str, queries: tuple, keys: tuple, values: tuple, bounds: int, documents: int, scale: float, out: int,
    lse: int, bf16: bool, threads: int, /,
) -> None: ...
def decode_attend_pack_backward(
    name: str, queries: tuple, keys: tuple, values: tuple, bounds: int, documents: int, scale: float,
    forward: tuple[int, int, int], gradients: tuple[int, int, int, int], threads: int, /,
) -> None: ...
def decode_swiglu(name: str, gate_up: int, rows: int, width: int, out: int, bf16: bool, threads: int, /) -> None: ...
def decode_panel() -> int: ...
def decode_pack(weight: int, width: int, depth: int, gated: bool, panels: int, threads: int, /) -> None: ...
def decode_linear(
    x: int, rows: int, depth: int, width: int, panels: int, bias: int, gated: bool, out: int, fp32: bool,
    threads: int, /,
) -> None: ...

# csrc/attention: tensors are (address, token stride, head stride), a shape (heads, groups, width, scale).
def attention_supported() -> bool: ...
def attention_forward(
    lengths: list[int], shape: tuple, q: tuple, k: tuple, v: tuple, out: tuple, lse: int, threads: int
) -> None: ...
def attention_backward(
    lengths: list[int], shape: tuple, inputs: tuple, lse: int, gradients: tuple, partial: int, threads: int
) -> None: ...

# csrc/pointwise: addresses and sizes, checked by dasd_kernels.pointwise, their one caller.
norm_parts: int
def rms_norm(
    x: int, weight: int, rows: int, width: int, bf16: bool, eps: float, y: int, rstd: int, threads: int, /
) -> None: ...
def rms_norm_backward(
    x: int, weight: int, rows: int, width: int, bf16: bool, rstd: int, dy: int, dx: int, dweight: int, partial: int,
    threads: int, /,
) -> None: ...
def swiglu(gate: int, up: int, y: int, rows: int, width: int, bf16: bool, threads: int, /) -> None: ...
def swiglu_backward(
    gate: int, up: int, dy: int, dgate: int, dup: int, count: int, bf16: bool, threads: int, /
) -> None: ...
def rotate(
    x: int, stride: int, cos: int, sin: int, sign: float, y: int, tokens: int, heads: int, dim: int, bf16: bool,
    threads: int, /,
) -> None: ...
def sum_of_squares(x: int, count: int, bf16: bool, threads: int, /) -> float: ...
def adamw(
    weight: int, low: int, first: int, second: int, compact: bool, grad: int, options: tuple[float, ...], place: int,
    seed: int, count: int, bf16: bool, threads: int, /,
) -> None: ...

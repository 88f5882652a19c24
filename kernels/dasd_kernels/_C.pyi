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
def assemble_pack(
    tokens: NDArray[np.uint32],
    offsets: NDArray[np.int64],
    loss_spans: NDArray[np.int32],
    docs: NDArray[np.int64],
    out: NDArray[np.int64],
    elementwise: bool = False,
) -> tuple[NDArray[np.int32], int, int, int]: ...  # cu_seqlens, max_seqlen, num_valid, num_tokens

# csrc/linear_ce: addresses and sizes, checked and laid out by dasd_kernels.cpu, their one caller.
def linear_ce_describe(name: str) -> tuple[int, int] | None: ...  # bytes of an element of E, tokens of a register tile
def linear_ce_forward(
    name: str, head: tuple, rows: tuple, scores: tuple, state: tuple | None, e_bytes: int, threads: int
) -> None: ...
def linear_ce_weight_gradient(name: str, head: tuple, rows: tuple, state: tuple, out: tuple, threads: int) -> None: ...

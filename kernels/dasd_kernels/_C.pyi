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

"""Document lengths to plan and pack."""

import numpy as np


def lognormal(n: int, median: float, capacity: int, seed: int = 0) -> np.ndarray:
    """n lengths, int64, lognormal with sigma 0.95; longer than the capacity is dropped, as prepare does."""
    lengths = np.random.default_rng(seed).lognormal(np.log(median), 0.95, size=2 * n).astype(np.int64)
    return lengths[(lengths >= 1) & (lengths <= capacity)][:n]

"""Drawing tokens from logits: temperature, top-p and top-k of each row's own, and random numbers that are hashes.

A row's token depends on its logits, its `SamplingParams` and its uniform number only, never on the rows beside it:
ties, sums and the number of candidates looked at are the same in any batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dasd_engine.errors import check_ranges

_CELL = 256  # columns that are summed in fp32 before fp64 takes over
_LIKELIEST = 1024  # columns that top-p sorts at first; most distributions need no more


@dataclass(frozen=True)
class SamplingParams:
    """How a request is sampled.

    temperature: logits are divided by it; 0 takes the likeliest token. top_p: the smallest set of likeliest tokens
    whose probability (after temperature, and top_k) reaches it; 1 for all. top_k: that many likeliest tokens; 0 for
    all. What is drawn depends on (seed, sample, step): `sample` tells requests of one seed apart.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    sample: int = 0

    def check(self) -> None:
        """Raises InputError naming the value that is out of range."""
        check_ranges(self, {
            "temperature": 0 <= self.temperature < float("inf"),
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
        })  # fmt: skip


def draw(logits_NV: Tensor, params: Sequence[SamplingParams], steps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One token a row and its natural log-probability under the logits themselves (temperature 1, nothing cut).

    `steps` are the tokens that each row has drawn before. Returns int64 [N] and fp32 [N].
    """
    count, vocabulary = logits_NV.shape
    # Whole cells; what is added has weight 0.
    shifted_NC = logits_NV.new_full((count, -(-vocabulary // _CELL) * _CELL), -torch.inf, dtype=torch.float32)
    shifted_NC[:, :vocabulary] = logits_NV
    shifted_NC -= shifted_NC.amax(-1, keepdim=True)
    weight_NC = shifted_NC.exp()
    lse_N = weight_NC.view(count, -1, _CELL).sum(-1).sum(-1, dtype=torch.float64).log()
    if all(p.temperature == 0 for p in params):
        tokens_N = shifted_NC.argmax(-1)
    else:
        if any(p.temperature != 1 for p in params):
            temperature_N = torch.tensor([p.temperature or 1.0 for p in params], device=logits_NV.device)
            torch.exp(shifted_NC / temperature_N[:, None], out=weight_NC)
        # A row of NaN may end among the columns that are added.
        tokens_N = _draw(weight_NC, params, steps).clamp_(max=vocabulary - 1)
        greedy = [row for row, p in enumerate(params) if p.temperature == 0]
        if greedy:
            tokens_N[greedy] = shifted_NC[greedy].argmax(-1)
    return tokens_N, shifted_NC.gather(1, tokens_N[:, None])[:, 0] - lse_N.float()


def _draw(weight_NC: Tensor, params: Sequence[SamplingParams], steps: Sequence[int]) -> Tensor:
    """A column of every row, in proportion to its weight among those that top-k and top-p leave."""
    seeds, samples = [p.seed for p in params], [p.sample for p in params]
    uniform_N = torch.from_numpy(uniforms(seeds, samples, steps)).to(weight_NC.device)
    cut: dict[int, list[int]] = {}  # rows by their top-k: how many are sorted never depends on other rows
    for row, p in enumerate(params):
        if p.top_k or p.top_p < 1:
            cut.setdefault(p.top_k, []).append(row)
    tokens_N = _invert_cells(weight_NC, uniform_N)
    for top_k, rows in cut.items():
        top_p_N = torch.tensor([params[row].top_p for row in rows], dtype=torch.float64, device=weight_NC.device)
        tokens_N[rows] = _draw_likeliest(weight_NC[rows], uniform_N[rows], top_p_N, top_k)
    return tokens_N


def _draw_likeliest(weight_NC: Tensor, uniform_N: Tensor, top_p_N: Tensor, top_k: int) -> Tensor:
    """The same among the `top_k` likeliest (0: all), and of those the fewest that hold `top_p_N` of the weight."""
    columns = weight_NC.shape[1]
    kept_NK, tokens_NK = weight_NC.topk(min(top_k or _LIKELIEST, columns))
    cumulative_NK = kept_NK.cumsum(-1, dtype=torch.float64)
    total_N = cumulative_NK[:, -1] if top_k else weight_NC.sum(-1, dtype=torch.float64)
    missing = cumulative_NK[:, -1] < top_p_N * total_N
    # The likeliest always stays: nothing stands before it.
    kept_NK = kept_NK.masked_fill(cumulative_NK - kept_NK >= (top_p_N * total_N)[:, None], 0)
    drawn_N = tokens_NK.gather(1, _invert(kept_NK, uniform_N)[:, None])[:, 0]
    if not top_k and columns > _LIKELIEST and missing.any():
        rest = weight_NC[missing]
        drawn_N[missing] = _draw_likeliest(rest, uniform_N[missing], top_p_N[missing], columns)
    return drawn_N


def _invert_cells(weight_NC: Tensor, uniform_N: Tensor) -> Tensor:
    """`_invert` over many columns: the cell first, then the column in it, so that fp64 sees few numbers."""
    weight_NXY = weight_NC.view(len(weight_NC), -1, _CELL)
    cells_NX = weight_NXY.sum(-1).double()
    cell_N = _invert(cells_NX, uniform_N)
    before_N = (cells_NX.cumsum(-1) - cells_NX).gather(1, cell_N[:, None])[:, 0]
    inside_N = (uniform_N * cells_NX.sum(-1) - before_N) / cells_NX.gather(1, cell_N[:, None])[:, 0]
    chosen_NY = weight_NXY[torch.arange(len(weight_NC), device=weight_NC.device), cell_N]
    return cell_N * _CELL + _invert(chosen_NY, inside_N.clamp(0, 1))


def _invert(weight_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Index of the first column whose running sum exceeds uniform x total: never one of weight 0. (Where the weights
    are NaN there is none, and the last is taken: the token's logprob, NaN as well, tells.)"""
    cumulative_NV = weight_NV.cumsum(-1, dtype=torch.float64)
    total_N = cumulative_NV[:, -1]
    below_N = torch.nextafter(total_N, torch.zeros_like(total_N))
    target_N = torch.minimum(uniform_N * total_N, below_N)
    found_N = torch.searchsorted(cumulative_NV, target_N[:, None], right=True)[:, 0]
    return found_N.clamp_(max=weight_NV.shape[1] - 1)


def uniforms(seed: int | Sequence[int], samples: Sequence[int], steps: Sequence[int]) -> np.ndarray:
    """float64 [n] in [0, 1): a hash of (seed, sample, step), by three rounds of SplitMix64's finaliser
    (Steele, Lea and Flood, OOPSLA 2014). `seed` is one for all or one each; its lowest 64 bits count."""
    seeds = [seed] * len(samples) if isinstance(seed, int) else seed
    state = np.array([each & (2**64 - 1) for each in seeds], dtype=np.uint64)
    for counter in (np.zeros(len(samples)), samples, steps):
        state = state + np.uint64(0x9E3779B97F4A7C15) + np.asarray(counter, dtype=np.uint64)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53

"""Scores of sentences, or any other runs of tokens, from scores of tokens."""

import torch
from torch import Tensor

from dasd_kernels.dispatch import on_triton, triton_ce
from dasd_kernels.reference import SegmentScores


def segment_scores(logprob: Tensor, offsets: Tensor) -> SegmentScores:
    """Segment s holds tokens offsets[s] to offsets[s + 1] (CSR): their count, sum, mean and exp(mean).

    logprob [N] floating point; offsets [S+1] int32 or int64, from >= 0, never falling, to <= N. Sums run in
    float64 in token order, so that a segment's bits depend on its own tokens only and repeat; the results are
    in logprob's dtype (float32 at least). An empty segment has count 0, sum 0, mean and geometric mean NaN.

    Raises ValueError for wrong shapes and, on the CPU, for offsets that fall or leave [0, N].
    """
    if logprob.dim() != 1 or not logprob.dtype.is_floating_point:
        raise ValueError(f"logprob is floating point [N]; got {logprob.dtype} {list(logprob.shape)}")
    if offsets.dim() != 1 or len(offsets) == 0 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offsets is int32 or int64 [S+1]; got {offsets.dtype} {list(offsets.shape)}")
    offsets = offsets.to(torch.int64)
    count = offsets.diff()
    if offsets.device.type == "cpu" and (
        bool((count < 0).any()) or int(offsets[0]) < 0 or int(offsets[-1]) > len(logprob)
    ):
        raise ValueError(f"offsets must rise from >= 0 to <= {len(logprob)}, the number of tokens")
    if on_triton(logprob):
        return triton_ce.segment_scores(logprob, offsets)
    dtype = torch.float64 if logprob.dtype == torch.float64 else torch.float32
    total = torch.segment_reduce(logprob.double(), "sum", offsets=offsets, initial=0, unsafe=True)
    mean = total / count
    return SegmentScores(count, total.to(dtype), mean.to(dtype), mean.exp().to(dtype))

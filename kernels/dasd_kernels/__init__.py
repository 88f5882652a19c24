"""Kernels for training on packed documents; depends on torch and triton only, usable with any trainer.

Each family is one module; the public functions are exported here.
"""

from dasd_kernels import reference
from dasd_kernels.divergence import kl_divergence
from dasd_kernels.linear_ce import linear_cross_entropy
from dasd_kernels.packing import PackedBatch, PackPlan, assemble_pack, assemble_packs, plan_packs
from dasd_kernels.reference import Divergences, RatioScores, SegmentScores, TokenScores
from dasd_kernels.rows import gather_rows
from dasd_kernels.scoring import log_ratio, token_logprobs
from dasd_kernels.segments import segment_scores

__all__ = [
    "Divergences",
    "PackPlan",
    "PackedBatch",
    "RatioScores",
    "SegmentScores",
    "TokenScores",
    "assemble_pack",
    "assemble_packs",
    "gather_rows",
    "kl_divergence",
    "linear_cross_entropy",
    "log_ratio",
    "plan_packs",
    "reference",
    "segment_scores",
    "token_logprobs",
]

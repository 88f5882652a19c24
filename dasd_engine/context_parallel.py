"""Context parallelism: several ranks share one pack, each with its own part of the tokens (DeepSpeed-Ulysses,
arXiv 2309.14509).

Everything but attention treats tokens one by one. Around attention one all-to-all turns [T/n tokens, all heads] into
[T tokens, H/n heads], and another turns the result back, so that each rank attends over whole documents with its own
heads. The loss of a part is the sum over its labels, which `assemble_pack` has already shifted; sums over ranks are
what they are without. Shape suffixes: as in model.py, C ranks of the group, P tokens of a part (T/C).
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from dasd_engine.errors import InputError
from dasd_engine.model_config import ModelConfig
from dasd_kernels import PackedBatch


def shares(ranks: int, config: ModelConfig) -> bool:
    """Whether the heads divide evenly. Query heads must; key-value heads must too, or are copied to the ranks whose
    queries read them."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    return heads % ranks == 0 and (groups % ranks == 0 or ranks % groups == 0)


def check(ranks: int, config: ModelConfig, contexts: Iterable[int]) -> None:
    """InputError where `ranks` cannot share the model's heads or a pack's tokens evenly."""
    if not shares(ranks, config):
        heads = config.num_attention_heads
        raise InputError(
            f"run.context_parallel = {ranks} does not share {heads} query and {config.num_key_value_heads} key-value "
            f"heads evenly; this model takes {', '.join(str(n) for n in range(1, heads + 1) if shares(n, config))}"
        )
    for context in contexts:
        if context % ranks:
            raise InputError(f"run.context_parallel = {ranks} does not divide the context of {context} tokens")


def part_of(batch: PackedBatch, rank: int, ranks: int) -> PackedBatch:
    """The tokens, labels and positions of `rank`, [P], and which of these labels are valid; the documents' boundaries
    and the counts stay the pack's. On CUDA it waits for the batch."""
    begin, end = (i * len(batch.tokens) // ranks for i in (rank, rank + 1))
    own = {name: getattr(batch, name)[begin:end] for name in ("tokens", "labels", "positions")}
    return replace(batch, **own, valid=batch.valid[(begin <= batch.valid) & (batch.valid < end)] - begin)


def scatter_heads(
    q_PHK: Tensor, k_PGK: Tensor, v_PGK: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """All heads of a part's tokens -> this rank's heads of all tokens: [T, H/C, K] and twice [T, G/C, K] (one each
    where there are fewer key-value heads than ranks)."""
    ranks = group.size()
    if k_PGK.shape[1] < ranks:
        copies = ranks // k_PGK.shape[1]
        k_PGK, v_PGK = (x.repeat_interleave(copies, dim=1) for x in (k_PGK, v_PGK))
    parts = [x.unflatten(1, (ranks, -1)) for x in (q_PHK, k_PGK, v_PGK)]
    mine = _exchange(torch.cat(parts, dim=2).transpose(0, 1), group).flatten(0, 1)
    q_THK, k_TGK, v_TGK = mine.split([part.shape[2] for part in parts], dim=1)
    return q_THK, k_TGK, v_TGK


def gather_heads(out_THK: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's heads of all tokens [T, H/C, K] -> all heads of its part's tokens [P, H, K]."""
    return _exchange(out_THK.unflatten(0, (group.size(), -1)), group).transpose(0, 1).flatten(1, 2)


def _exchange(x_CPHK: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Slice i of the first axis goes to rank i; slice i of the result came from there."""
    ones = [1] * group.size()
    return all_to_all_single_autograd(x_CPHK.contiguous(), ones, ones, group)

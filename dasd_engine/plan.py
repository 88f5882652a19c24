"""What a stage will do, known before its first step: its documents, its packs, its steps and their trained tokens.

Everything here is a pure function of the shards, the recipe and (for the share of each rank only) the world size.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from dasd_engine.config import Recipe, Stage
from dasd_engine.errors import InputError
from dasd_engine.metrics import document_flops, flop_coefficients
from dasd_engine.model import ModelConfig
from dasd_engine.shards import Shards
from dasd_kernels import PackedBatch, PackPlan, assemble_pack, plan_packs


@dataclass(frozen=True)
class StagePlan:
    stage: Stage
    shards: Shards
    epochs: tuple[PackPlan, ...]
    trained: np.ndarray  # trained tokens of each document, int64 [D]
    flops: np.ndarray  # model FLOPs of each document, float64 [D]

    @cached_property
    def steps(self) -> int:
        return sum(plan.num_steps for plan in self.epochs)

    @cached_property
    def digest(self) -> str:
        """Which documents are trained on in which order; independent of the world size."""
        return hashlib.sha256("".join(plan.digest for plan in self.epochs).encode()).hexdigest()[:16]

    def documents(self, epoch: int, step: int) -> np.ndarray:
        """Ids of all documents of a step, over all ranks."""
        plan = self.epochs[epoch]
        first, last = plan.step_offsets[step], plan.step_offsets[step + 1]
        return plan.docs[plan.pack_offsets[first] : plan.pack_offsets[last]]

    def trained_tokens(self, epoch: int, step: int) -> int:
        """Trained tokens of a step over all ranks: the divisor of its loss, known before the first forward."""
        return int(self.trained[self.documents(epoch, step)].sum())

    def micro_steps(self, epoch: int, step: int, rank: int, *, equal: bool) -> list[int | None]:
        """Packs that `rank` runs in a step, each an index into the plan; None is a pack without trained tokens.

        Ranks that meet at every layer (`equal`) need equally many; others need at least one, to meet at the end.
        """
        plan = self.epochs[epoch]
        mine: list[int | None] = list(plan.packs_of(step, rank))
        count = max(len(plan.packs_of(step, r)) for r in range(plan.ranks)) if equal else 1
        return mine + [None] * (count - len(mine))

    def batch(self, epoch: int, pack: int | None, device: torch.device) -> PackedBatch:
        """Assemble one pack on `device`; None gives one of padding only, which keeps a rank in step with the others."""
        o, s = self.stage.train, self.shards
        documents = self.epochs[epoch].documents(pack) if pack is not None else np.empty(0, dtype=np.int64)
        batch = assemble_pack(s.tokens, s.offsets, s.loss_spans, documents, o.context, device=device)
        if not o.isolate:
            length = len(batch.tokens)
            whole = torch.tensor([0, length], dtype=torch.int32, device=batch.cu_seqlens.device)
            positions = torch.arange(length, device=device)
            batch = replace(batch, cu_seqlens=whole, positions=positions, max_seqlen=length)
        return batch


def plan_stage(recipe: Recipe, stage: Stage, shards: Shards, config: ModelConfig, ranks: int) -> StagePlan:
    """Plan every epoch of `stage`.

    Raises:
        InputError: a document longer than the context, ids beyond the model's vocabulary, fewer packs than ranks, or
            a step without trained tokens; names the shards and what to change.
    """
    c, a, _ = flop_coefficients(config)
    o = stage.train
    _check_vocabulary(shards, config)
    longest = int(np.argmax(shards.lengths))
    if shards.lengths[longest] > o.context:
        raise InputError(
            f"{shards.path}: document {longest} has {shards.lengths[longest]} tokens, more than the context of "
            f"{o.context} (stage {stage.name}); raise `context` or prepare the data with --context {o.context}"
        )
    plans = tuple(
        plan_packs(
            shards.lengths,
            o.context,
            pack_budget=o.packs_per_step,
            ranks=ranks,
            seed=recipe.seed,
            epoch=epoch,
            cost=(c, a),
        )
        for epoch in range(o.epochs)
    )
    trained = shards.valid_counts
    result = StagePlan(stage, shards, plans, trained, document_flops(config, shards.lengths, trained))
    for epoch, plan in enumerate(plans):
        if plan.num_packs < ranks:
            raise InputError(
                f"{shards.path}: only {plan.num_packs} packs of {o.context} tokens for {ranks} ranks "
                f"(stage {stage.name}); use fewer ranks, a smaller `context`, or more data"
            )
        for step in range(plan.num_steps):
            if result.trained_tokens(epoch, step) == 0:
                names = ", ".join(map(str, result.documents(epoch, step)[:8]))
                raise InputError(
                    f"{shards.path}: step {step} of epoch {epoch} has no trained token (stage {stage.name}, "
                    f"documents {names}…); prepare the data again, or raise `packs_per_step`"
                )
    return result


def _check_vocabulary(shards: Shards, config: ModelConfig) -> None:
    largest = shards.manifest["counts"]["max_token_id"]
    if largest >= config.vocab_size:
        raise InputError(
            f"{shards.path}: token id {largest} does not fit the model's vocabulary of {config.vocab_size}; "
            "the data was prepared with another tokenizer: prepare it again with --model set to this student"
        )

"""What a stage will do, known before its first step: its documents, its packs, its steps and their trained tokens.

Everything here is a pure function of the shards, the recipe and (for the share of each rank only) the world size.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from dasd_engine.config import Recipe, Stage
from dasd_engine.corpus import Corpus
from dasd_engine.epochs import EpochPlan, Packing, count_epochs
from dasd_engine.errors import InputError
from dasd_engine.metrics import document_flops, flop_coefficients
from dasd_engine.model import ModelConfig
from dasd_kernels import PackedBatch, PackPlan, assemble_packs


@dataclass(frozen=True)
class Step:
    """What a rank needs of an optimizer step. The counts are over all ranks."""

    batches: list[PackedBatch]  # this rank's, one a micro-step
    documents: np.ndarray  # all ranks', int64
    tokens: int
    trained: int  # the divisor of the step's loss, known before its first forward
    flops: float
    fill: float
    balance: float


@dataclass(frozen=True)
class StagePlan:
    stage: Stage
    corpus: Corpus
    config: ModelConfig
    epochs: tuple[EpochPlan, ...]
    flops: float  # model FLOPs of an epoch

    @cached_property
    def steps(self) -> int:
        return sum(epoch.num_steps for epoch in self.epochs)

    @cached_property
    def digest(self) -> str:
        """Which documents are trained on in which order; independent of the world size."""
        return hashlib.sha256("".join(epoch.digest for epoch in self.epochs).encode()).hexdigest()[:16]

    def places(self, epoch: int, step: int) -> Iterator[tuple[int, int]]:
        """(epoch, step) of the steps from here to the end of the stage."""
        for later in range(epoch, len(self.epochs)):
            for left in range(step if later == epoch else 0, self.epochs[later].num_steps):
                yield later, left

    def micro_steps(self, epoch: int, step: int, rank: int, *, equal: bool) -> list[np.ndarray]:
        """The documents of each pack that `rank` runs in a step; none makes a pack without trained tokens.

        Ranks that meet at every layer (`equal`) need equally many, and alike ones at a time; others need at least one,
        to meet at the end.
        """
        plan, step = self.epochs[epoch].plan(step)
        if not equal:
            mine, count = plan.packs_of(step, rank), 1
        else:
            dearest = _dearest_first(plan, step)
            mine, count = dearest[rank :: plan.ranks].tolist(), -(-len(dearest) // plan.ranks)
        return [plan.documents(pack) for pack in mine] + [np.empty(0, dtype=np.int64)] * (count - len(mine))

    def read(self, epoch: int, step: int, rank: int, device: torch.device, *, equal: bool) -> Step:
        """A step with this rank's packs on `device`. Called in the reader's thread, ahead of the training."""
        packs = self.micro_steps(epoch, step, rank, equal=equal)
        batches = assemble_packs(self.corpus.arrays, packs, self.stage.train.context, device=device)
        if not self.stage.train.isolate:
            batches = [_joined(batch) for batch in batches]
        plan, place = self.epochs[epoch].plan(step)
        documents = self.epochs[epoch].documents(step)
        lengths, trained = self.corpus.describe(documents)
        tokens, count = int(lengths.sum()), int(plan.step_offsets[place + 1] - plan.step_offsets[place])
        flops = float(document_flops(self.config, lengths, trained).sum())
        fill = tokens / (count * plan.capacity)
        balance = plan.balance(place)
        if equal:  # they wait for the dearest pack of each micro-step
            cost = plan.cost[_dearest_first(plan, place)]
            balance = float(cost.sum() / (plan.ranks * cost[:: plan.ranks].sum()))
        return Step(batches, documents, tokens, int(trained.sum()), flops, fill, balance)


def _dearest_first(plan: PackPlan, step: int) -> np.ndarray:
    """The packs of a step by falling cost."""
    begin, end = plan.step_offsets[step : step + 2]
    return begin + np.argsort(-plan.cost[begin:end], kind="stable")


def _joined(batch: PackedBatch) -> PackedBatch:
    """The pack as one document, whose tokens all see each other."""
    length, device = len(batch.tokens), batch.tokens.device
    whole = torch.tensor([0, length], dtype=torch.int32, device=device)
    positions = torch.arange(length, device=device)
    return replace(batch, cu_seqlens=whole, positions=positions, max_seqlen=length)


def plan_stage(recipe: Recipe, stage: Stage, corpus: Corpus, config: ModelConfig, ranks: int) -> StagePlan:
    """Plan every epoch of `stage`, each block of documents once (see epochs.py).

    Raises:
        InputError: a document longer than the context, ids beyond the model's vocabulary, fewer packs than ranks, or
            a step without trained tokens; names the shards and what to change.
    """
    c, a, h = flop_coefficients(config)
    o = stage.train
    _check_vocabulary(corpus, config)
    squares = 0.0
    for begin, lengths in corpus.pieces():
        longest = int(np.argmax(lengths))
        if lengths[longest] > o.context:
            raise InputError(
                f"{corpus.where(begin + longest)} has {lengths[longest]} tokens, more than the context of "
                f"{o.context} (stage {stage.name}); raise `context` or prepare the data with --context {o.context}"
            )
        squares += float(np.square(lengths, dtype=np.float64).sum())
    packing = Packing(o.context, o.packs_per_step, ranks, recipe.seed, (c, a))
    epochs = tuple(EpochPlan(corpus, packing, epoch) for epoch in range(o.epochs))
    count_epochs(epochs, corpus.untrained())
    for plan in epochs:
        if plan.num_packs < ranks:
            raise InputError(
                f"{corpus}: only {plan.num_packs} packs of {o.context} tokens for {ranks} ranks "
                f"(stage {stage.name}); use fewer ranks, a smaller `context`, or more data"
            )
        for blank in (totals.blank for totals in plan.totals if len(totals.blank)):
            names = ", ".join(map(str, blank[:8]))
            raise InputError(
                f"{corpus}: a step of epoch {plan.epoch} has no trained token (stage {stage.name}, "
                f"documents {names}…); prepare the data again, or raise `packs_per_step`"
            )
    flops = c * corpus.tokens + a * squares + h * corpus.trained_tokens
    return StagePlan(stage, corpus, config, epochs, flops)


def _check_vocabulary(corpus: Corpus, config: ModelConfig) -> None:
    for shards in corpus.sets:
        largest = shards.manifest["counts"]["max_token_id"]
        if largest >= config.vocab_size:
            raise InputError(
                f"{shards.path}: token id {largest} does not fit the model's vocabulary of {config.vocab_size}; "
                "the data was prepared with another tokenizer: prepare it again with --model set to this student"
            )

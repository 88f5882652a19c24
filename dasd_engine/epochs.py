"""An epoch's packs, planned a block of documents at a time: memory does not grow with the data.

A set of up to `BLOCK` documents is one block, planned by `plan_packs` as it is. A larger one is cut into runs of `RUN`
neighbours, so that reading stays sequential; the runs are shuffled by (seed, epoch) and dealt to equal blocks, and a
block is planned like a small set, its documents shuffled among each other. A block's last step may have fewer packs
than the others, as an epoch's last step may.

The steps must be known before the first, so every block is packed once to be counted. Only an epoch's first block is
planned to the end there; of the others their number of packs and the lengths of their documents go into the digest.

Planning holds about 100 bytes a document of a block, for `WORKERS` blocks at a time and one block that is kept.
Everything is a pure function of the lengths, the arguments and (seed, epoch).
"""

import functools
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from dasd_engine.corpus import Corpus, Ints
from dasd_kernels import PackPlan, plan_packs

BLOCK = 1 << 20  # documents
RUN = 1 << 12
WORKERS = min(2, os.cpu_count() or 1)


@dataclass(frozen=True)
class Totals:
    """What remains of a block's plan once it was counted."""

    packs: int
    steps: int
    tokens: int
    balance: float  # mean over the steps of a first block, else 0
    digest: str
    blank: Ints  # documents of its first step without a trained token; empty: there is none


@dataclass(frozen=True)
class Packing:
    """What makes the plans of a stage's epochs, beside the documents. See `plan_packs`."""

    capacity: int
    pack_budget: int
    ranks: int
    seed: int
    cost: tuple[float, float]
    block: int = BLOCK
    run: int = RUN


class EpochPlan:
    """The packs of one epoch; `count_epochs` has counted it. `plan(step)` plans the step's block anew where needed."""

    def __init__(self, corpus: Corpus, packing: Packing, epoch: int):
        self.corpus, self.packing, self.epoch = corpus, packing, epoch
        blocks = -(-len(corpus) // packing.block)
        self.runs = np.array_split(self._shuffled_runs(), blocks) if blocks > 1 else [np.zeros(1, dtype=np.int64)]
        self.block = functools.lru_cache(maxsize=1)(self.plan_block)
        self.totals: list[Totals] = []
        self.first_step: Ints = np.zeros(1, dtype=np.int64)

    def _shuffled_runs(self) -> Ints:
        """By plan_packs, whose shuffle is the same on every platform: packs that hold one run each."""
        ones = np.ones(-(-len(self.corpus) // self.packing.run), dtype=np.int64)
        return plan_packs(ones, 1, seed=self.packing.seed, epoch=self.epoch).docs

    def _ranges(self, block: int) -> list[tuple[int, int]]:
        """The runs of a block, (first document, one past the last) each."""
        if len(self.runs) == 1:
            return [(0, len(self.corpus))]
        begins = np.sort(self.runs[block]) * self.packing.run
        return [(begin, min(begin + self.packing.run, len(self.corpus))) for begin in begins.tolist()]

    def _pack(self, block: int, ranges: list[tuple[int, int]], ranks: int) -> tuple[Ints, PackPlan]:
        """The lengths of a block's documents and their packs, documents numbered in the block."""
        p, lengths = self.packing, np.concatenate([self.corpus.lengths(*pair) for pair in ranges])
        epoch = self.epoch + (block << 32)  # a block has its own order
        return lengths, plan_packs(
            lengths, p.capacity, pack_budget=p.pack_budget, ranks=ranks, seed=p.seed, epoch=epoch, cost=p.cost
        )

    def plan_block(self, block: int) -> PackPlan:
        """The packs of a block, their documents numbered as in the corpus."""
        ranges = self._ranges(block)
        _, plan = self._pack(block, ranges, self.packing.ranks)
        if len(self.runs) == 1:
            return plan
        return replace(plan, docs=np.concatenate([np.arange(*pair) for pair in ranges])[plan.docs])

    def count(self, block: int, untrained: Ints) -> Totals:
        blank = np.empty(0, dtype=np.int64)
        if block and not len(untrained):
            lengths, plan = self._pack(block, self._ranges(block), 1)
            content = f"{plan.num_packs}\n".encode() + np.ascontiguousarray(lengths, "<i8").tobytes()
            digest = hashlib.sha256(content).hexdigest()
            return Totals(plan.num_packs, plan.num_steps, int(lengths.sum()), 0.0, digest, blank)
        plan = self.plan_block(block)
        if len(untrained):
            trains = ~np.isin(plan.docs, untrained)
            begins = plan.pack_offsets[plan.step_offsets[:-1]]
            if not (some := np.add.reduceat(trains, begins, dtype=np.int64) > 0).all():
                blank = _documents(plan, int(np.argmin(some)))
        tokens, balance = int(plan.tokens.sum()), float(plan.balances.mean())
        return Totals(plan.num_packs, plan.num_steps, tokens, balance, plan.digest, blank)

    def finish(self, totals: list[Totals]) -> None:
        self.totals = totals
        self.first_step = np.cumsum([0, *(t.steps for t in totals)])

    @property
    def num_packs(self) -> int:
        return sum(t.packs for t in self.totals)

    @property
    def num_steps(self) -> int:
        return int(self.first_step[-1])

    @property
    def fill(self) -> float:
        """Real tokens over the tokens of all packs."""
        return sum(t.tokens for t in self.totals) / (self.num_packs * self.packing.capacity)

    @property
    def balance(self) -> float:
        """Mean over max of the ranks' costs, averaged over the steps of the first block."""
        return self.totals[0].balance

    @property
    def digest(self) -> str:
        return "".join(t.digest for t in self.totals)

    def plan(self, step: int) -> tuple[PackPlan, int]:
        """The plan of the block that has this step, and the step's number there."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} does not exist: the epoch has {self.num_steps}")
        block = int(np.searchsorted(self.first_step, step, side="right")) - 1
        return self.block(block), step - int(self.first_step[block])

    def documents(self, step: int) -> Ints:
        """All documents of a step, over all ranks."""
        return _documents(*self.plan(step))


def _documents(plan: PackPlan, step: int) -> Ints:
    first, last = plan.step_offsets[step], plan.step_offsets[step + 1]
    return plan.docs[plan.pack_offsets[first] : plan.pack_offsets[last]]


def count_epochs(epochs: Sequence[EpochPlan], untrained: Ints) -> None:
    """Plan every block once, `WORKERS` at a time, and keep its totals: the steps must be known before the first."""
    jobs = [(epoch, block) for epoch in epochs for block in range(len(epoch.runs))]
    with ThreadPoolExecutor(WORKERS) as pool:
        totals = iter(list(pool.map(lambda job: job[0].count(job[1], untrained), jobs)))
    for epoch in epochs:
        epoch.finish([next(totals) for _ in epoch.runs])

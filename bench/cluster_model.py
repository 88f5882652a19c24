"""The time of training on W ranks, modelled: what a pack costs, how a step's packs are dealt, what crosses the wire.

Nothing here is measured. The rates are parameters (`Rates`), printed with the figures: replace them by measured ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch

from dasd_engine.config import RunOptions
from dasd_engine.context_parallel import shares
from dasd_engine.memory import GIB, USABLE, Setting, estimate, parameter_counts
from dasd_engine.metrics import flop_coefficients
from dasd_engine.model_config import ModelConfig
from dasd_kernels import PackPlan, plan_packs

FREE = "ours, fastest"
POLICIES = {
    FREE: "as ours, and several ranks share a pack (cp) where that is faster; below only where ranks outnumber packs",
    "ours": "dearest pack to the rank with the least to do (LPT); ranks meet once a step",
    "ours, by layer": "the step's packs sorted by cost and dealt in turn; ranks meet every micro-step (gather = layer)",
    "random, once": "packs as they come, equally many a rank; ranks meet once a step",
    "random": "packs as they come; ranks meet every micro-step",
    "length-sorted": "packs of all data sorted by cost, so that a step's are alike; ranks meet every micro-step",
}
EVERY_MICRO_STEP = ("ours, by layer", "random", "length-sorted")
Recompute = Literal["none", "selective", "full"]
Gather = Literal["step", "layer"]


@dataclass(frozen=True)
class Rates:
    """Of one rank. Defaults are assumptions for an H100 of eight in a node, not measurements."""

    linear: float = 550e12  # model FLOP/s of the blocks' matrices, forward and backward
    attention: float = 400e12  # model FLOP/s of causal attention, forward and backward
    head: float = 500e12  # model FLOP/s of the head with the loss
    micro_step: float = 0.02  # seconds of a micro-step besides: launches, norms, optimizer's share
    node: int = 8  # ranks joined by the fast links
    inside: float = 350e9  # bytes/s a rank sends in a collective inside a node
    outside: float = 40e9  # bytes/s between nodes
    hidden: float = 0.8  # share of a pass of computation behind which gathers and reductions hide
    memory: float = 79.6 * GIB


@dataclass(frozen=True)
class Layout:
    """How W ranks are used."""

    ranks: int
    context_parallel: int
    replicas: int
    recompute: Recompute

    @property
    def data_ranks(self) -> int:
        return self.ranks // self.context_parallel


@dataclass(frozen=True)
class Outcome:
    """Of an epoch: `balance` is mean over max of the ranks' work between two meetings; `bubble` the share of all
    ranks' time in which they do not compute: waiting, or communicating in the open."""

    layout: Layout
    balance: float
    bubble: float
    seconds: float
    tokens: int


@dataclass(frozen=True)
class Epoch:
    """An epoch's packs, with the numbers that decide what each costs. Padding is computed like any document."""

    plan: PackPlan
    squares: np.ndarray  # [P] sum of the squares of the documents' lengths
    trained: np.ndarray  # [P] trained tokens


def plan_epoch(lengths: np.ndarray, capacity: int, packs_per_step: int, ranks: int, cost: tuple[float, float]) -> Epoch:
    plan = plan_packs(lengths, capacity, pack_budget=packs_per_step, ranks=ranks, cost=cost)
    squares = np.add.reduceat(lengths[plan.docs].astype(np.float64) ** 2, plan.pack_offsets[:-1])
    return Epoch(plan, squares + (capacity - plan.tokens) ** 2.0, plan.tokens)


def pack_seconds(config: ModelConfig, epoch: Epoch, layout: Layout, rates: Rates) -> np.ndarray:
    """[P]: computation of each pack on each of the ranks that share it, and their all-to-alls."""
    c, a, h = flop_coefficients(config)
    again = {"none": 0.0, "selective": 0.0, "full": 1 / 3}[layout.recompute]  # selective: norms and products, no FLOPs
    blocks = c * epoch.plan.capacity / rates.linear + a * epoch.squares / rates.attention
    head = h * epoch.trained / rates.head
    shared = ((1 + again) * blocks + head) / layout.context_parallel
    return shared + rates.micro_step + all_to_all_seconds(config, epoch.plan.capacity, layout, rates)


def all_to_all_seconds(config: ModelConfig, context: int, layout: Layout, rates: Rates) -> float:
    """Around attention, in the open: q, k, v and the output, forward, backward, and forward again if recomputed."""
    n = layout.context_parallel
    if n == 1:
        return 0.0
    heads = 2 * config.num_attention_heads + 2 * max(config.num_key_value_heads, n)
    passes = 2 if layout.recompute == "none" else 3
    sent = config.num_hidden_layers * 2 * context / n * heads * config.head_dim * (n - 1) / n
    return passes * sent / (rates.inside if n <= rates.node else rates.outside)


def wire_seconds(size: int, layout: Layout, rates: Rates) -> tuple[float, float]:
    """(gather, reduce) of `size` parameters: bf16 over the shards of a replica; fp32 over them, then over replicas."""
    shards = layout.ranks // layout.replicas
    rate = rates.inside if shards <= rates.node else rates.outside
    share = (shards - 1) / shards
    replicas = 2 * 4 * size / shards * (layout.replicas - 1) / layout.replicas / rates.outside
    return 2 * size * share / rate, 4 * size * share / rate + replicas


def deal(policy: str, plan: PackPlan, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each pack, [P]: its step, which meeting of the step it comes before, and the rank that computes it."""
    sizes = np.diff(plan.step_offsets)
    step = np.repeat(np.arange(plan.num_steps), sizes)
    place = np.arange(plan.num_packs) - np.repeat(plan.step_offsets[:-1], sizes)
    if policy in (FREE, "ours"):
        return step, np.zeros_like(step), plan.rank
    if policy == "length-sorted":
        order = np.argsort(np.argsort(cost, kind="stable"))
        step, place = step[order], place[order]
    if policy == "ours, by layer":
        place[np.lexsort((-cost, step))] = place.copy()
    return step, place // plan.ranks * (policy in EVERY_MICRO_STEP), place % plan.ranks


def loads_of(policy: str, plan: PackPlan, seconds: np.ndarray) -> np.ndarray:
    """[S, M, R]: seconds that each rank works between the meetings of each step; zeros where it has nothing."""
    step, meeting, rank = deal(policy, plan, seconds)
    loads = np.zeros((plan.num_steps, int(meeting.max()) + 1, plan.ranks))
    np.add.at(loads, (step, meeting, rank), seconds)
    return loads


def run_epoch(policy: str, config: ModelConfig, size: int, epoch: Epoch, layout: Layout, rates: Rates) -> Outcome:
    """`epoch` planned for `layout.data_ranks`."""
    seconds = pack_seconds(config, epoch, layout, rates)
    loads = loads_of(policy, epoch.plan, seconds)
    longest = loads.max(axis=2)
    gather, reduce = wire_seconds(size, layout, rates)
    if policy in EVERY_MICRO_STEP:  # forward and backward gather, every micro-step
        meetings, passes = np.count_nonzero(longest, axis=1), [(gather, 1 / 3), (gather + reduce, 2 / 3)]
    else:
        meetings, passes = np.ones(len(loads)), [(gather, 1 / 3), (reduce, 2 / 3)]
    typical = seconds.mean()
    open_wire = sum(max(0.0, wire - rates.hidden * share * typical) for wire, share in passes)
    total = float(longest.sum() + open_wire * meetings.sum())
    work = float(loads.sum())
    tokens = int(epoch.plan.tokens.sum())
    ranks = layout.data_ranks
    return Outcome(layout, work / (ranks * float(longest.sum())), 1 - work / (ranks * total), total, tokens)


def layouts(config: ModelConfig, ranks: int, context: int, packs: int, rates: Rates, gather: Gather) -> list[Layout]:
    """Every way to use `ranks` that fits the device by the engine's own estimate."""
    result = []
    modes: tuple[Recompute, ...] = ("none", "selective", "full")
    for shared, mode in product((1, 2, 4, 8, 16, 32), modes):
        if ranks % shared or context % shared or not shares(shared, config):
            continue
        for replicas in sorted({1, max(1, ranks // rates.node)}):
            run = RunOptions(
                gather=gather, replicas=replicas, context_parallel=shared, activation_checkpointing=mode
            )
            needed = estimate(config, Setting(run, ranks, context, packs, torch.bfloat16, "cuda")).total
            if needed <= USABLE * rates.memory:
                result.append(Layout(ranks, shared, replicas, mode))
    return result


def fastest(
    policy: str, config: ModelConfig, lengths: np.ndarray, ranks: int, context: int, packs: int, rates: Rates
) -> Outcome | None:
    """An epoch under `policy`; None where no layout fits. `FREE` may spread packs over ranks as it likes; the others do
    only where there are more ranks than packs, and have the least recomputation and the replicas that suit them."""
    root, block = parameter_counts(config)
    size = root + config.num_hidden_layers * block
    c, a, _ = flop_coefficients(config)
    plans: dict[int, Epoch] = {}
    outcomes = []
    for layout in layouts(config, ranks, context, packs, rates, "layer" if policy in EVERY_MICRO_STEP else "step"):
        groups = layout.data_ranks
        if policy != FREE and layout.context_parallel != max(1, ranks // packs):
            continue
        if groups not in plans:
            plans[groups] = plan_epoch(lengths, context, packs, groups, (c, a))
        outcomes.append(run_epoch(policy, config, size, plans[groups], layout, rates))
    return min(outcomes, key=lambda outcome: outcome.seconds, default=None)


def shared_cores(loads: np.ndarray, cores: int) -> np.ndarray:
    """Seconds until the last of R processes ends that share `cores` evenly: [..., R] of work -> [...]."""
    ordered = np.sort(loads, axis=-1)
    steps = np.diff(ordered, axis=-1, prepend=0.0)
    active = np.arange(loads.shape[-1], 0, -1)
    return (steps * np.maximum(1.0, active / cores)).sum(axis=-1)

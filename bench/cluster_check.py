"""The cost model against real ranks: the same packs dealt in each way to two and to four gloo ranks on this machine.

    python -m bench.cluster --check

Predicted are the seconds of all steps, from what a rank needs for packs of another data set, fitted as o + a·Σl², and
from what a micro-step in which ranks with the same pack meet needs beyond one in which they do not. Ranks beyond the
machine's cores share them evenly. Measured is the engine's own step: its model, FSDP and loss; without data loading
and optimizer, which all ways have in common.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bench.cluster_model import EVERY_MICRO_STEP, FREE, POLICIES, deal, loads_of, plan_epoch, shared_cores
from dasd_engine import distributed
from dasd_engine.config import RunOptions
from dasd_engine.hf import init_weights
from dasd_engine.metrics import flop_coefficients
from dasd_engine.model import Decoder, ModelConfig
from dasd_kernels import PackedBatch, PackPlan, assemble_pack, linear_cross_entropy

# Attention is 2.6 times the rest over a whole context, as for Qwen3-4B at 65,536 tokens.
CONFIG = ModelConfig(
    model_type="qwen3", vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=3,
    num_attention_heads=2, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True,
)  # fmt: skip
CONTEXT, PACKS, DOCUMENTS = 2048, 12, 72
ROUNDS = 2  # of every way, interleaved; the quicker counts
MEETINGS = 7  # timed, of each kind; the median counts
WHOLE = "whole"  # a model that every rank has for itself
WAYS = [name for name in POLICIES if name != FREE]


def compare_with_ranks(as_json: bool = False, counts: tuple[int, ...] = (2, 4)) -> None:
    results = []
    for count in counts:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "-m", "bench.cluster_check"], stdout=subprocess.PIPE, text=True, env=environment
        )
        if done.returncode:
            raise SystemExit(f"error: {count} ranks failed; see above")
        results.append(json.loads(done.stdout))
    if as_json:
        print(json.dumps(results, indent=1))
        return
    row = "{:>5}  {:<14} {:>8} {:>9} {:>9} {:>10} {:>10}"
    print(row.format("ranks", "packs dealt", "balance", "predicted", "measured", "predicted", "measured"))
    for result in results:
        ours = result["ways"]["ours"]
        for name, way in result["ways"].items():
            print(row.format(
                result["ranks"], name, f"{way['balance']:.3f}", f"{way['predicted']:.2f} s", f"{way['measured']:.2f} s",
                f"{way['predicted'] / ours['predicted']:.2f} x", f"{way['measured'] / ours['measured']:.2f} x",
            ))  # fmt: skip
    print(f"{results[0]['packs']} packs of {CONTEXT:,} tokens, {PACKS} a step; x: over ours; one thread a rank, "
          f"{results[0]['cores']} cores, which ranks beyond their number share; fit of a pack's time within "
          f"{max(r['fit_error'] for r in results):.0%}")  # fmt: skip


class Data:
    """Documents of random tokens, all trained, and packs of them."""

    def __init__(self, seed: int, ranks: int):
        rng = np.random.default_rng(seed)
        lengths = np.exp(rng.normal(np.log(CONTEXT / 4), 0.95, 4 * DOCUMENTS)).astype(np.int64)
        self.lengths = lengths[(lengths >= CONTEXT // 64) & (lengths <= CONTEXT)][:DOCUMENTS]
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.tokens = rng.integers(0, CONFIG.vocab_size, self.offsets[-1], dtype=np.uint32)
        first = np.zeros_like(self.lengths)
        self.spans = np.stack([np.arange(DOCUMENTS), first, self.lengths], axis=1).astype(np.int32)
        epoch = plan_epoch(self.lengths, CONTEXT, PACKS, ranks, flop_coefficients(CONFIG)[:2])
        self.plan = whole_steps(epoch.plan)
        self.squares = epoch.squares[: self.plan.num_packs]

    def batch(self, pack: int) -> PackedBatch:
        return assemble_pack(self.tokens, self.offsets, self.spans, self.plan.documents(pack), CONTEXT)


def whole_steps(plan: PackPlan) -> PackPlan:
    """`plan` without a last step that has fewer packs: ranks that meet every micro-step need equally many."""
    steps = plan.num_packs // PACKS
    packs = steps * PACKS
    return replace(
        plan, docs=plan.docs[: plan.pack_offsets[packs]], pack_offsets=plan.pack_offsets[: packs + 1],
        step_offsets=plan.step_offsets[: steps + 1], rank=plan.rank[:packs], cost=plan.cost[:packs],
        tokens=plan.tokens[:packs],
    )  # fmt: skip


def micro_step(model: Decoder, batch: PackedBatch) -> None:
    hidden = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen)
    linear_cross_entropy(hidden, model.head_weight, batch.labels, reduction="sum").backward()


def seconds_of(policy: str, model: Decoder, options: RunOptions, data: Data, world: distributed.World) -> float:
    """All steps of `data` dealt by `policy`: seconds from a barrier to a barrier."""
    step, meeting, rank = deal(policy, data.plan, data.plan.cost)
    world.barrier()
    start = time.perf_counter()
    for s in range(data.plan.num_steps):
        mine = np.flatnonzero((step == s) & (rank == world.rank))
        mine = mine[np.argsort(meeting[mine], kind="stable")]
        for i, pack in enumerate(mine):
            distributed.last_micro_step(model, i == len(mine) - 1, options)
            micro_step(model, data.batch(int(pack)))
        model.zero_grad(set_to_none=True)
    world.barrier()
    return time.perf_counter() - start


def fit(model: Decoder, data: Data, busy: bool, world: distributed.World) -> tuple[float, float, float]:
    """(o, a, largest relative error) of o + a·Σl² seconds a pack, the means of the ranks that are `busy` at once."""
    micro_step(model, data.batch(0))
    chosen = np.argsort(data.squares)[:: max(1, data.plan.num_packs // 6)]
    seconds = np.zeros(len(chosen))
    world.barrier()
    for i, pack in enumerate(chosen):
        batch, start = data.batch(int(pack)), time.perf_counter()
        if busy:
            micro_step(model, batch)
            seconds[i] = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    seconds = np.array(world.sum([*seconds, float(busy)]))
    seconds = seconds[:-1] / seconds[-1]
    squares = data.squares[chosen]
    slope, offset = np.polyfit(squares, seconds, 1)
    return float(offset), float(slope), float(np.abs((offset + slope * squares) / seconds - 1).max())


def meeting_seconds(models: dict[str, Decoder], data: Data, world: distributed.World) -> dict[str, float]:
    """What a micro-step in which the ranks meet needs beyond one of a model that is whole, by `gather`: collectives and
    FSDP's work around them. All ranks have the same pack, so that none waits for work."""
    batch = data.batch(0)
    seconds: dict[str, list[float]] = {gather: [] for gather in models}
    for i in range(1 + MEETINGS):
        for gather, model in models.items():
            world.barrier()
            start = time.perf_counter()
            micro_step(model, batch)
            world.barrier()
            if i:  # the first of each is a warm-up
                seconds[gather].append(time.perf_counter() - start)
            model.zero_grad(set_to_none=True)
    median = {gather: float(np.median(each)) for gather, each in seconds.items()}
    means = [total / world.size for total in world.sum([median[gather] - median[WHOLE] for gather in models])]
    return dict(zip(models, means, strict=True))


def rank_main() -> None:
    options = {gather: RunOptions(gather=gather, compute="fp32", threads=1) for gather in ("step", "layer")}
    with distributed.start(options["step"]) as world:
        models = dict[str, Decoder]()
        for gather, option in options.items():
            with torch.device("meta"):
                model = Decoder(CONFIG)
            models[gather] = distributed.parallelize(model, world, option, torch.float32)
            model.to_empty(device="cpu")
            init_weights(model, 0)
            distributed.last_micro_step(model, True, option)
        with torch.device("meta"):
            alone = Decoder(CONFIG)
        alone.to_empty(device="cpu")
        init_weights(alone, 0)
        cores = os.cpu_count() or 1
        offset, slope, error = fit(alone, Data(1, world.size), world.rank < cores, world)
        meeting = meeting_seconds({WHOLE: alone, **models}, Data(1, world.size), world)
        data = Data(0, world.size)
        measured: dict[str, float] = dict.fromkeys(WAYS, float("inf"))
        for _ in range(ROUNDS):
            for policy in WAYS:
                gather = "layer" if policy in EVERY_MICRO_STEP else "step"
                measured[policy] = min(
                    measured[policy], seconds_of(policy, models[gather], options[gather], data, world)
                )
        ways: dict[str, Any] = {}
        for policy in WAYS:
            loads = loads_of(policy, data.plan, offset + slope * data.squares)
            meetings = np.count_nonzero(loads.max(axis=2))
            wire = meetings * meeting["layer" if policy in EVERY_MICRO_STEP else "step"]
            ways[policy] = {
                "balance": float(loads.sum() / (world.size * loads.max(axis=2).sum())),
                "predicted": float(shared_cores(loads, cores).sum() + wire), "measured": measured[policy],
            }  # fmt: skip
        if world.is_main:
            print(json.dumps({
                "ranks": world.size, "cores": cores, "packs": data.plan.num_packs, "fit_error": error,
                "meeting_s": meeting, "ways": ways,
            }))  # fmt: skip


if __name__ == "__main__":
    rank_main()

"""Packing: plan_packs on the lengths of the released distillation data and of chats, assemble_pack at 64 K tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench.compare import compare
from bench.lengths import lognormal
from bench.packers import first_fit, knapsacks, trl_bfd
from dasd_kernels import PackPlan, assemble_pack, plan_packs

MODEL_COST = (24.1e9, 885e3)  # a 4B decoder: FLOPs a token, FLOPs a token squared


def quality(plan: PackPlan) -> dict[str, str]:
    balance = plan.balances[: max(plan.num_steps - 1, 1)].mean()  # without the last step, which is not full
    return {"fill": f"{plan.fill:.3%}", "packs": f"{plan.num_packs:,}", "balance": f"{balance:.4f}"}


@pytest.mark.parametrize("window", [8192, 10**9])
def test_plan_of_the_released_lengths(benchmark: Any, window: int) -> None:
    lengths = lognormal(435_000, 13_050, 65_536)
    shown = f"windows of {window:,}" if window < len(lengths) else "one window"
    plan = compare(
        benchmark,
        lambda: plan_packs(lengths, 65_536, pack_budget=64, ranks=8, window=window, cost=MODEL_COST),
        case=f"plan 435 K documents of mean {lengths.mean():,.0f} into 65,536, {shown}",
        work=[len(lengths), "documents"],
    )
    benchmark.extra_info["notes"] = quality(plan)


def test_plan_beside_others(benchmark: Any) -> None:
    """Only fill and time: the others neither balance ranks nor cut steps. 100 K documents are a group of axolotl."""
    lengths, packs = lognormal(100_000, 13_050, 65_536), {}

    def counted(name: str, pack: Callable[[], int] | str) -> Callable[[], None] | str:
        return pack if isinstance(pack, str) else lambda: packs.update({name: pack()})

    plan = compare(
        benchmark,
        lambda: plan_packs(lengths, 65_536, pack_budget=64, ranks=8, cost=MODEL_COST),
        {
            name: counted(name, pack)
            for name, pack in {
                "TRL, best fit in batches of 1,000": trl_bfd(lengths, 65_536),
                "first fit in groups of 100 K, as axolotl": lambda: first_fit(lengths, 65_536),
                "knapsacks in batches of 1,000, as LLaMA-Factory": lambda: knapsacks(lengths, 65_536),
            }.items()
        },
        rounds=3,
        case="plan 100 K documents into 65,536 beside other packers",
        work=[len(lengths), "documents"],
    )
    benchmark.extra_info["notes"] = quality(plan)
    for name, count in packs.items():
        fill = lengths.sum() / (count * 65_536)
        benchmark.extra_info["peers"][name]["notes"] = {"fill": f"{fill:.3%}", "packs": f"{count:,}"}


@pytest.mark.parametrize("ranks", [16, 32])
def test_balance_of_the_released_lengths(benchmark: Any, ranks: int) -> None:
    """64 packs a step: the share of a step in which the mean rank works."""
    lengths = lognormal(435_000, 13_050, 65_536)
    plan = compare(
        benchmark,
        lambda: plan_packs(lengths, 65_536, pack_budget=64, ranks=ranks, cost=MODEL_COST),
        case=f"the same for {ranks} ranks",
        work=[len(lengths), "documents"],
    )
    benchmark.extra_info["notes"] = quality(plan)


def test_plan_of_chat_lengths(benchmark: Any) -> None:
    lengths = lognormal(1_000_000, 570, 32_768)
    plan = compare(
        benchmark,
        lambda: plan_packs(lengths, 32_768, pack_budget=64, ranks=8, cost=MODEL_COST),
        case=f"plan 1 M documents of mean {lengths.mean():,.0f} into 32,768",
        work=[len(lengths), "documents"],
    )
    benchmark.extra_info["notes"] = quality(plan)


def test_assemble(benchmark: Any) -> None:
    lengths = lognormal(400, 13_050, 65_536)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.random.default_rng(0).integers(0, 150_000, size=int(offsets[-1]), dtype=np.uint32)
    prompt = np.minimum(lengths // 8, 500)
    spans = np.stack([np.arange(len(lengths)), prompt, lengths], axis=1).astype(np.int32)
    plan = plan_packs(lengths, 65_536)
    fullest = plan.documents(int(np.argmax(plan.tokens)))
    out = np.empty((3, 65_536), dtype=np.int64)
    compare(
        benchmark,
        lambda: assemble_pack(tokens, offsets, spans, fullest, 65_536),
        {"three numpy fills of the output": lambda: out.fill(1)},
        rounds=50,
        case=f"assemble 65,536 tokens of {len(fullest)} documents",
        work=[65_536, "tokens"],
    )

"""Packing: plan_packs on the lengths of the released distillation data and of chats, assemble_pack at 64 K tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench.compare import compare
from dasd_kernels import PackPlan, assemble_pack, plan_packs

MODEL_COST = (24.1e9, 885e3)  # a 4B decoder: FLOPs a token, FLOPs a token squared


def lognormal(n: int, median: float, capacity: int, seed: int = 0) -> np.ndarray:
    """n document lengths, lognormal with sigma 0.95; longer than the capacity is dropped, as prepare does."""
    lengths = np.random.default_rng(seed).lognormal(np.log(median), 0.95, size=2 * n).astype(np.int64)
    return lengths[(lengths >= 1) & (lengths <= capacity)][:n]


def trl_bfd(lengths: np.ndarray, capacity: int) -> Callable[[], Any] | str:
    """TRL's packer, which also moves the tokens: for a fair time the documents must be so short that this is little."""
    try:
        import pyarrow as pa
        from trl.data_utils import _pack_bfd
    except ImportError as error:
        return str(error)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.zeros(offsets[-1], dtype=np.int32)))
    table = pa.table({"input_ids": column})
    return lambda: _pack_bfd(table, capacity, on_seq_length_overflow="split")


def quality(plan: PackPlan) -> dict[str, str]:
    full_steps = range(max(plan.num_steps - 1, 1))
    balance = np.mean([plan.balance(step) for step in full_steps])
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


def test_plan_beside_trl(benchmark: Any) -> None:
    lengths = lognormal(20_000, 50, 1024)
    plan = compare(
        benchmark,
        lambda: plan_packs(lengths, 1024, window=len(lengths)),
        {"trl bfd": trl_bfd(lengths, 1024)},
        case=f"plan 20 K documents of mean {lengths.mean():,.0f} into 1,024, one window",
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

"""Replays the plan of DASD's data on 8 to 1,024 ranks with a cost model, or checks that model against real ranks.

    python -m bench.cluster                                       Qwen3-4B, both stages, six epochs, modelled
    python -m bench.cluster --ranks 16 --linear-tflops 610        with a rate that you measured
    python -m bench.cluster --check                               two and four gloo ranks here: predicted and measured

A modelled figure is no measurement. The assumptions are printed with it, and every rate is an argument.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.cluster_model import POLICIES, Outcome, Rates, fastest
from dasd_engine.hf import read_config
from dasd_engine.model import ModelConfig

# Documents and their mean length in tokens, of the published stages (arXiv 2601.09088).
STAGES = {"low": (105_000, 13_800), "high": (330_000, 17_500)}
SIGMA = 0.95  # of the logarithm of the lengths: ours, the paper gives means alone
EPOCHS = 6
QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2560,
    "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 5e6, "max_position_embeddings": 262144,
    "tie_word_embeddings": True, "attention_bias": False,
}  # fmt: skip
SCALES = {"linear": 1e12, "attention": 1e12, "head": 1e12, "inside": 1e9, "outside": 1e9, "memory": 2.0**30}


def document_lengths(count: int, mean: float, capacity: int, seed: int = 0) -> np.ndarray:
    """int64 [count], 1..capacity: lognormal, those beyond the capacity drawn again, so that their mean is `mean`."""
    normal = np.random.default_rng(seed).standard_normal(4 * count)
    low, high = 0.0, np.log(4.0 * capacity)
    for _ in range(40):  # the mean of what fits grows with the median
        middle = (low + high) / 2
        lengths = np.exp(middle + SIGMA * normal)
        lengths = lengths[lengths <= capacity][:count]
        low, high = (middle, high) if lengths.mean() < mean else (low, middle)
    if len(lengths) < count:
        raise SystemExit(f"error: a mean of {mean:,.0f} tokens is too near the capacity of {capacity:,}")
    return np.maximum(lengths.astype(np.int64), 1)


def replay(
    config: ModelConfig, ranks: Sequence[int], context: int, packs: int, rates: Rates, share: float
) -> list[dict[str, Any]]:
    """A row for each number of ranks and policy: both stages, all epochs, each on its fastest layout."""
    data = [document_lengths(int(share * count), mean, context) for count, mean in STAGES.values()]
    rows: list[dict[str, Any]] = []
    for count in ranks:
        for policy in POLICIES:
            found = [fastest(policy, config, lengths, count, context, packs, rates) for lengths in data]
            done = [outcome for outcome in found if outcome is not None]
            if len(done) == len(found):
                rows.append({"ranks": count, "policy": policy, **summary(done, share)})
    return rows


def summary(stages: list[Outcome], share: float) -> dict[str, Any]:
    seconds, tokens = sum(s.seconds for s in stages), sum(s.tokens for s in stages)
    mean = lambda name: sum(getattr(s, name) * s.seconds for s in stages) / seconds  # noqa: E731
    return {
        "layout": asdict(stages[-1].layout), "balance": mean("balance"), "bubble": mean("bubble"),
        "tokens_per_s": tokens / seconds, "hours": EPOCHS * seconds / share / 3600,
    }  # fmt: skip


def assumptions(rates: Rates, context: int, packs: int) -> list[str]:
    """What the model rests on: a sentence each."""
    given = ", ".join(f"{f.name} {getattr(rates, f.name) / SCALES.get(f.name, 1):g}" for f in fields(rates))
    stages = "; ".join(f"{name} {count:,} documents of mean {mean:,}" for name, (count, mean) in STAGES.items())
    return [
        f"Data: {stages}; lognormal with sigma {SIGMA} up to {context:,} tokens (published means, our sigma), all "
        f"trained; {packs} packs a step; {EPOCHS} epochs, of which one a stage is replayed.",
        f"Rates of a rank, assumed unless given: {given} (TFLOP/s of model FLOPs, seconds, ranks, GB/s, share, GiB).",
        "A pack costs c·T + a·Σl² + h·T FLOPs at those rates, c and a a third more where blocks are recomputed, shared "
        "by the ranks of context parallelism, whose all-to-alls are in the open.",
        "Gathers (bf16) and reductions (fp32) go at the slowest link's rate and hide behind the stated share of a "
        "pass; no stragglers, latency, loading, checkpoints or evaluation.",
        "Replicas and recomputation are the fastest that fit by the engine's memory estimate.",
        *(f"{name}: {what}." for name, what in POLICIES.items()),
    ]


def print_rows(rows: list[dict[str, Any]]) -> None:
    row = "{:>6}  {:<14} {:>3} {:>9} {:>10} {:>8} {:>7} {:>12} {:>8} {:>7}"
    names = ("ranks", "packs dealt", "cp", "replicas", "recompute", "balance", "bubble", "tokens/s", "hours", "x ours")
    print(row.format(*names))
    ours = {r["ranks"]: r["hours"] for r in rows if r["policy"] == "ours"}
    for r in rows:
        layout, first = r["layout"], ours.get(r["ranks"])
        print(row.format(
            r["ranks"], r["policy"], layout["context_parallel"], layout["replicas"], layout["recompute"],
            f"{r['balance']:.3f}", f"{r['bubble']:.1%}", f"{r['tokens_per_s']:,.0f}", f"{r['hours']:,.1f}",
            f"{r['hours'] / first:.2f}" if first else "",
        ))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="directory with a config.json (default: Qwen3-4B's)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--context", type=int, default=65_536)
    parser.add_argument("--packs", type=int, default=64, help="packs of a step over all ranks")
    parser.add_argument("--share", type=float, default=1.0, help="share of the documents that is replayed")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--check", action="store_true", help="run gloo ranks here and compare")
    for f in fields(Rates):
        unit = {1e12: "-tflops", 1e9: "-gbytes", 2.0**30: "-gib"}.get(SCALES.get(f.name, 1), "")
        shown = getattr(Rates(), f.name) / SCALES.get(f.name, 1)
        kind = int if f.name == "node" else float
        flag = f"--{f.name.replace('_', '-')}{unit}"
        parser.add_argument(flag, dest=f.name, type=kind, metavar="X", help=f"{shown:g}")
    args = parser.parse_args()
    if args.check:
        from bench.cluster_check import compare_with_ranks

        return compare_with_ranks(as_json=args.json)
    given = {f.name: getattr(args, f.name) for f in fields(Rates)}
    rates = replace(Rates(), **{k: v * SCALES.get(k, 1) for k, v in given.items() if v is not None})
    config = read_config(args.model) if args.model else qwen3_4b()
    rows = replay(config, args.ranks, args.context, args.packs, rates, args.share)
    lines = assumptions(rates, args.context, args.packs)
    if args.json:
        print(json.dumps({"modelled": True, "assumptions": lines, "rows": rows}, indent=1))
        return None
    print("modelled, not measured:")
    print_rows(rows)
    for line in lines:
        print(textwrap.fill(line, 140, subsequent_indent="  "))
    return None


def qwen3_4b() -> ModelConfig:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(QWEN3_4B))
        return read_config(Path(folder))


if __name__ == "__main__":
    main()

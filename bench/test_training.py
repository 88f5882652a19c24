"""Training steps beside TRL's SFTTrainer and a plain transformers loop, and beside the matrix products of a step.

SmolLM2-135M's shape and four layers of Qwen3-0.6B's with its vocabulary of 151,936, random weights, packs of documents
whose lengths are lognormal around 500 tokens, all of them trained. Every trainer runs alone, in a process of its own
(bench/trainers.py), one after the other: together they would not fit. Of theirs, and of ours with recomputation, the
faster of two steps counts, of ours the median of five, after one that is not timed. Times are for as many tokens as the
pack holds; memory is all that a process ever had resident, its libraries too. TRL recomputes unless told not to.

All compute in bf16 where the CPU multiplies it, else in fp32; DASD_BENCH_DTYPE=fp32 or bf16 says which. The floor is
the time of a step's products by torch.mm, timed before and after at the model's own shapes, with attention inside
documents at their rate.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.test_score import SMOLLM2
from bench.trainers import DTYPE, Trainer, seconds_of_products
from dasd_engine.metrics import document_flops
from dasd_engine.model_config import ModelConfig, read_config
from dasd_engine.shards import Shards, ShardWriter

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024,
    "intermediate_size": 3072, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960,
    "tie_word_embeddings": True, "attention_bias": False,
}  # fmt: skip
MODELS = {"SmolLM2-135M": SMOLLM2, "4-layer Qwen3": QWEN3}
RECOMPUTED = ("selective", "full")
PEERS = {"TRL": "trl", "TRL, no recomputation": "trl-plain"} | (
    {"transformers, autocast": "transformers", "transformers, bf16 weights": "transformers-bf16"} if DTYPE == "bf16"
    else {"transformers": "transformers"}
)  # fmt: skip
TOKENIZER = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"<e>": 0, "<u>": 1}, "unk_token": "<u>"}}


def write_case(path: Path, config: dict[str, Any], tokens: int, packs: int = 12, each: int = 0) -> ModelConfig:
    """`student/` and `data/`: documents that fill `packs` packs, of lognormal lengths or `each` tokens long."""
    (path / "student").mkdir(parents=True)
    (path / "student" / "config.json").write_text(json.dumps(config))
    (path / "student" / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    random = np.random.default_rng(0)
    with ShardWriter(path / "data") as writer:
        for _ in range(packs):
            left = tokens
            while left:
                length = min(left, each or max(32, int(random.lognormal(np.log(500), 0.8))))
                writer.add(random.integers(2, config["vocab_size"], length), [(0, length)], {})
                left -= length
        writer.close({})
    return read_config(path / "student")


def shapes(c: ModelConfig, tokens: int) -> Iterator[tuple[int, int, int]]:
    """(m, k, n) of every product of a step: forward, and both gradients."""
    d, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    inner = c.intermediate_size
    linear = [(d, q), (d, kv), (d, kv), (q, d), (d, inner), (d, inner), (inner, d)] * c.num_hidden_layers
    for k, n in [*linear, (d, c.vocab_size)]:
        yield from [(tokens, k, n), (tokens, n, k), (k, tokens, n)]


def best_step(who: str, path: Path, tokens: int, *overrides: str, timed: int = 2) -> dict[str, Any]:
    """The fastest of a new process's steps after its first, as seconds for `tokens` tokens; its peak memory.
    RuntimeError when it ends, as it does where memory does not suffice."""
    with Trainer(who, path, tokens, *overrides) as trainer:
        _, *rows = [trainer.step() for _ in range(1 + timed)]
    seconds = min(row["seconds"] * tokens / row["tokens"] for row in rows)
    return {"seconds": seconds, "peak_bytes": rows[-1]["peak_bytes"]}


def peer_step(who: str, path: Path, tokens: int) -> dict[str, Any] | str:
    """best_step, or why there is none."""
    try:
        return best_step(who, path, tokens)
    except RuntimeError as error:
        return f"{who} at {tokens:,} tokens: {error}"


@pytest.mark.parametrize("tokens", [2048, 8192])
@pytest.mark.parametrize("name", MODELS)
def test_training(benchmark: Any, tmp_path: Path, name: str, tokens: int) -> None:
    config = write_case(tmp_path, MODELS[name], tokens)
    products = 2.0 * sum(m * k * n for m, k, n in shapes(config, tokens))
    shards = Shards.open(tmp_path / "data")
    flops = document_flops(config, shards.lengths, shards.lengths).sum() / 12
    floor = seconds_of_products(shapes(config, tokens)) * flops / products
    peers: dict[str, Any] = {peer: "trl, accelerate and datasets are not installed" for peer in PEERS}
    if importlib.util.find_spec("trl"):
        peers = {peer: peer_step(who, tmp_path, tokens) for peer, who in PEERS.items()}
    for mode in RECOMPUTED:
        peers[f"ours, {mode} recomputation"] = best_step(
            "ours", tmp_path, tokens, f"run.activation_checkpointing={mode}"
        )
    peers["ours, full recomputation, compact moments"] = best_step(
        "ours", tmp_path, tokens, "run.activation_checkpointing=full", "run.moments=compact"
    )
    with Trainer("ours", tmp_path, tokens) as trainer:
        trainer.step()
        rows: list[dict[str, Any]] = []
        benchmark.pedantic(lambda: rows.append(trainer.step()), rounds=5)
    floor = min(floor, seconds_of_products(shapes(config, tokens)) * flops / products)
    share = floor / statistics.median(row["seconds"] for row in rows)
    benchmark.extra_info.update(
        case=f"{name}, {DTYPE}, a pack of {tokens:,}", work=[tokens, "tokens"], peers=peers, floor=floor,
        peak_bytes=rows[-1]["peak_bytes"],
        notes={"of the floor's speed": f"{share:.0%}", "floor's rate": f"{flops / floor / 1e9:.0f} GFLOP/s",
               "fill": f"{rows[-1]['tokens'] / tokens:.2%}"},
    )  # fmt: skip


def test_long_packs(benchmark: Any, tmp_path: Path) -> None:
    """Documents of 1,024 tokens cost the same in packs of 2,048 and of 32,768, each with blocks computed again in
    backward: what they keep of 32,768 tokens is 18 GiB."""
    tokens, peers, recompute = 2048, {}, "run.activation_checkpointing=full"
    for size in (8192, 32768):
        path = tmp_path / str(size)
        write_case(path, SMOLLM2, size, packs=3, each=1024)
        row = best_step("ours", path, size, recompute, timed=1)
        peers[f"a pack of {size:,}"] = {**row, "seconds": row["seconds"] * tokens / size}
    write_case(tmp_path / "own", SMOLLM2, tokens, packs=16, each=1024)
    with Trainer("ours", tmp_path / "own", tokens, recompute) as trainer:
        trainer.step()
        benchmark.pedantic(trainer.step, rounds=5)
        peak = trainer.step()["peak_bytes"]
    benchmark.extra_info.update(
        case="SmolLM2-135M, documents of 1,024 in a pack of 2,048", work=[tokens, "tokens"], peers=peers,
        peak_bytes=peak,
    )  # fmt: skip


def test_two_ranks(benchmark: Any, tmp_path: Path) -> None:
    """Two packs of 2,048 a step: two gloo ranks with a thread each, and one process with two threads."""
    write_case(tmp_path, SMOLLM2, 2048, packs=40)
    seconds: list[float] = []
    overrides = ["train.packs_per_step=2"]
    with (
        Trainer("ours", tmp_path, 2048, *overrides, ranks=2, threads=1) as two,
        Trainer("ours", tmp_path, 2048, *overrides, f"out={tmp_path}/one") as one,
    ):
        two.step()
        one.step()
        benchmark.pedantic(two.step, setup=lambda: seconds.append(one.step()["seconds"]), rounds=5)
    benchmark.extra_info.update(
        case="SmolLM2-135M, two gloo ranks, two packs of 2,048", work=[4096, "tokens"],
        peers={"one process, two threads": {"seconds": statistics.median(seconds)}},
    )  # fmt: skip

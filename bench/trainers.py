"""One trainer in its own process, a step on order: what bench/test_training.py compares.

    python -m bench.trainers {ours|trl|trl-plain|transformers|transformers-bf16} DIR TOKENS [recipe overrides ...]

DIR holds `student/` (config.json; weights are random, which takes the same time) and `data/`, shards of documents. A
step is one pack of TOKENS tokens, all trained: forward, backward, clipping, AdamW. Each line on standard input orders
one; the answer is a line `STEP {"seconds": s, "tokens": n, "peak_bytes": b}`. All compute in DASD_BENCH_DTYPE, bf16 or
fp32; by default bf16 where the CPU multiplies it.

Trainers have processes of their own because their peak memory is compared, and because together they would not fit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from dasd_engine.metrics import peak_memory
from dasd_engine.shards import Shards

DTYPE = os.environ.get("DASD_BENCH_DTYPE", "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32")
TRAINERS = ("ours", "trl", "trl-plain", "transformers", "transformers-bf16")


class Trainer:
    """The parent's side of a trainer: `step()` runs one in its process, which ends with the context."""

    def __init__(self, who: str, directory: Path, tokens: int, *overrides: str, ranks: int = 1, threads: int = 2):
        launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        arguments = ["-m", "bench.trainers", who, str(directory), str(tokens), *overrides]
        self.process = subprocess.Popen(
            [sys.executable, *launcher, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
            stderr=None if ranks == 1 else subprocess.DEVNULL,  # ranks complain when the first one ends
        )  # fmt: skip

    def __enter__(self) -> Trainer:
        return self

    def step(self) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("STEP "):
                return json.loads(line[5:])
        code = self.process.wait()
        raise RuntimeError("killed, for want of memory" if code == -9 else f"ended with exit code {code}")

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()


def ordered() -> bool:
    """Wait for the next order; at the end of orders the process ends."""
    if os.environ.get("RANK", "0") == "0" and not sys.stdin.readline():
        os._exit(0)
    return True


def tell(seconds: float, tokens: int) -> None:
    row = {"seconds": seconds, "tokens": tokens, "peak_bytes": peak_memory(torch.device("cpu"))}
    print("STEP " + json.dumps(row), flush=True)


def ours(directory: Path, tokens: int, *overrides: str) -> None:
    """The command's own run, its steps held back until they are ordered."""
    from dasd_engine import distributed, train
    from dasd_engine.config import load_recipe
    from dasd_engine.heap import keep_freed_memory

    class Held(train.Run):
        def step(self, *arguments: Any) -> None:
            ordered()
            start, before = time.perf_counter(), self.progress.tokens
            super().step(*arguments)
            if self.world.is_main:
                tell(time.perf_counter() - start, self.progress.tokens - before)

    keep_freed_memory()
    recipe = directory / f"recipe{tokens}.toml"
    recipe.write_text(
        f'out = "{directory}/run{tokens}"\n[model]\npath = "student"\ninit = "random"\n[train]\ncontext = {tokens}\n'
        'packs_per_step = 1\nepochs = 50\n[checkpoint]\nevery = 1000000\n[[stage]]\nname = "bench"\ndata = "data"\n'
    )
    train.Run = Held  # type: ignore[misc]
    loaded = load_recipe(recipe, [f"run.compute={DTYPE}", *overrides])
    with distributed.start(loaded.run) as world:
        train.train(loaded, world, overwrite=True)


def documents(directory: Path) -> list[list[int]]:
    shards = Shards.open(directory / "data")
    return [shards.tokens[a:b].tolist() for a, b in zip(shards.offsets[:-1], shards.offsets[1:], strict=True)]


def their_model(directory: Path, dtype: torch.dtype) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory / "student")
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def plain_loop(directory: Path, tokens: int, dtype: torch.dtype) -> None:
    """transformers as its documentation shows it: documents joined, loss from the model. fp32 weights are
    autocast where bf16 is asked for."""
    model = their_model(directory, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    stream = torch.tensor([token for document in documents(directory) for token in document])
    for begin in range(0, len(stream), tokens):
        ordered()
        start, ids = time.perf_counter(), stream[None, begin : begin + tokens]
        with torch.autocast("cpu", torch.bfloat16) if dtype == torch.float32 and DTYPE == "bf16" else nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tell(time.perf_counter() - start, ids.numel())


def trl(directory: Path, tokens: int, **changes: Any) -> None:
    """SFTTrainer with packing and the dtype asked for, else its defaults."""
    import datasets
    import transformers
    from trl import SFTConfig, SFTTrainer

    class Held(SFTTrainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
            self.tokens = inputs["input_ids"].numel()
            return super().training_step(model, inputs, *rest)

    class Orders(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            ordered()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            tell(time.perf_counter() - self.start, trainer.tokens)

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "student" / "tokenizer.json"), eos_token="<e>", pad_token="<e>"
    )
    trainer = Held(
        model=their_model(directory, torch.float32),
        processing_class=tokenizer,
        args=SFTConfig(
            output_dir=str(directory / "trl"), max_length=tokens, packing=True, bf16=DTYPE == "bf16",
            use_cpu=True, per_device_train_batch_size=1, max_steps=1000, save_strategy="no", report_to="none",
            disable_tqdm=True, logging_steps=1000, **changes,
        ),  # fmt: skip
        train_dataset=datasets.Dataset.from_dict({"input_ids": documents(directory)}),
        callbacks=[Orders()],
    )
    trainer.train()


def seconds_of_products(shapes: Iterable[tuple[int, int, int]]) -> float:
    """What torch.mm takes for products [m, k] x [k, n], into memory that is there: the best of four each."""
    total, dtype = 0.0, torch.bfloat16 if DTYPE == "bf16" else torch.float32
    for (m, k, n), count in Counter(shapes).items():
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        out, seconds = torch.empty(m, n, dtype=dtype), []
        for _ in range(4):
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            seconds.append(time.perf_counter() - start)
        total += count * min(seconds)
    return total


def main() -> None:
    who, directory, tokens, *overrides = sys.argv[1:]
    if sys.platform == "linux":
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory does not suffice, this one is killed
    place, size = Path(directory), int(tokens)
    if who == "ours":
        ours(place, size, *overrides)
    elif who.startswith("trl"):
        trl(place, size, **({"gradient_checkpointing": False} if who == "trl-plain" else {}))
    else:
        plain_loop(place, size, torch.bfloat16 if who.endswith("bf16") else torch.float32)


if __name__ == "__main__":
    main()

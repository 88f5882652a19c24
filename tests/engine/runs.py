"""Tiny runs for the tests of training: a random student, random shards, a recipe, and the command as users type it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from dasd_engine.shards import ShardWriter

VOCABULARY = 61
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": VOCABULARY, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 512,
    "tie_word_embeddings": True, "attention_bias": False,
}  # fmt: skip


def write_student(path: Path, **changes: object) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return path


def write_shards(
    path: Path, documents: int = 24, longest: int = 64, seed: int = 0, untrained: tuple[int, ...] = ()
) -> Path:
    """Documents of random tokens, 8..`longest` long, the second half of each trained, none in `untrained` ones."""
    rng = np.random.default_rng(seed)
    with ShardWriter(path) as writer:
        for i in range(documents):
            length = int(rng.integers(8, longest + 1))
            spans = [] if i in untrained else [(length // 2, length)]
            writer.add(rng.integers(0, VOCABULARY, length), spans, {"line": i})
        writer.close({})
    return path


def write_recipe(path: Path, stages: int = 1, **train: object) -> Path:
    """A recipe `path`/recipe.toml beside `path`/student and `path`/data0, data1, …; `train` are keys of [train]."""
    options = {"context": 128, "packs_per_step": 4, "epochs": 2, "lr": 3e-3, "min_lr": 3e-4, **train}
    lines = [f'out = "{path}/run"', "[model]", 'path = "student"', 'init = "random"', "[train]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in options.items()]
    for i in range(stages):
        lines += ["[[stage]]", f'name = "s{i}"', f'data = "data{i}"']
    (path / "recipe.toml").write_text("\n".join(lines) + "\n")
    return path / "recipe.toml"


def command(recipe: Path, *arguments: str, ranks: int = 1) -> list[str]:
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *launcher, "-m", "dasd_engine.train", str(recipe), *arguments]


def environment() -> dict[str, str]:
    """One thread a rank: the ranks of a test share two cores, and equal arithmetic needs equal threads."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run(recipe: Path, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(recipe, *arguments, ranks=ranks), capture_output=True, text=True, env=environment(), timeout=120
    )


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def run_here(recipe: Path, *overrides: str, **options: bool) -> Path:
    """Train in this process, a world of one; returns the run's directory."""
    from dasd_engine import distributed
    from dasd_engine.config import load_recipe
    from dasd_engine.train import train

    loaded = load_recipe(recipe, ["run.compute=fp32", *overrides])
    with distributed.start(loaded.run) as world:
        train(loaded, world, **options)
    return loaded.out


def run_with(code: str, recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The train command in its own process, in which `at(step)` of `code` runs as each step's metrics are written."""
    driver = f"""
import glob, os, resource, signal, sys, time
from dasd_engine import metrics, train
from dasd_engine.errors import run_cli
write = metrics.MetricsLog.write
def wait_for_checkpoint():  # the writer is a thread; tiny steps are faster than it
    while not glob.glob(os.path.dirname(sys.argv[1]) + "/run/checkpoints/*[0-9]"):
        time.sleep(0.01)
def at(step):
{"".join(f"    {line}" + chr(10) for line in code.splitlines())}
def patched(self, row):
    write(self, row)
    at(row["step"])
metrics.MetricsLog.write = patched
run_cli(train.main)
"""
    return subprocess.run(
        [sys.executable, "-c", driver, str(recipe), "run.compute=fp32", *arguments],
        capture_output=True, text=True, env=environment(), timeout=300,
    )  # fmt: skip


def weights(directory: Path) -> dict:
    from safetensors.torch import load_file

    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}

"""What crosses ranks, and when: the traffic of a step, and the share of each rank."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import environment, rows, run, run_here, write_recipe, write_student

from dasd_engine.shards import ShardWriter


def test_the_traffic_of_a_step(tmp_path):
    """[gathers, reductions] of each of three micro-steps. Two blocks and the root are three groups of parameters."""
    student = write_student(tmp_path / "student")
    program = str(Path(__file__).parent / "collectives_rank.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program, str(student)],
        capture_output=True, text=True, env=environment(), timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "step": [[3, 0], [0, 0], [0, 3]],  # gathered at the first, reduced at the last
        "layer": [[5, 3], [5, 3], [5, 3]],  # blocks twice, forward and backward; gradients are never held whole
    }


def test_ranks_have_packs_unequal_in_number_and_equal_in_cost(tmp_path):
    """One document of 512 tokens costs as much attention as 64 of 64: its rank has fewer packs, and the step is one."""
    write_student(tmp_path / "student", hidden_size=8, intermediate_size=8, head_dim=32)  # little but attention
    lengths = [512] + [64] * 96
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "data0") as writer:
        for i, length in enumerate(lengths):
            writer.add(rng.integers(0, 61, length), [(length // 2, length)], {"line": i})
        writer.close({})
    recipe = write_recipe(tmp_path, context=512, packs_per_step=13, epochs=1)

    from dasd_engine.config import load_recipe
    from dasd_engine.model_config import read_config
    from dasd_engine.plan import plan_stage
    from dasd_engine.shards import Shards

    loaded = load_recipe(recipe)
    plan = plan_stage(loaded, loaded.stages[0], Shards.open(tmp_path / "data0"), read_config(tmp_path / "student"), 2)
    (packs,) = plan.epochs
    counts = sorted(len(packs.packs_of(0, rank)) for rank in range(2))
    assert packs.num_steps == 1 and sum(counts) == 13 and counts[0] < counts[1]
    assert packs.balance(0) > 0.95

    one = run_here(recipe, f"out={tmp_path}/one")
    done = run(recipe, "run.compute=fp32", "run.gather=step", ranks=2)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "run")[0]["loss"] == pytest.approx(rows(one)[0]["loss"], rel=1e-5)

"""What crosses ranks, and when: the traffic of a step, and the share of each rank."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import environment, rows, run, run_here, write_recipe, write_student

from dasd_engine.config import load_recipe
from dasd_engine.corpus import Corpus
from dasd_engine.metrics import flop_coefficients
from dasd_engine.model_config import read_config
from dasd_engine.plan import plan_stage
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


@pytest.fixture
def planned(tmp_path):
    """(recipe, plan for two ranks): a step of a pack that one document fills, and of 12 that hold eight each."""
    student = write_student(tmp_path / "student", hidden_size=8, intermediate_size=8, head_dim=32)  # attention, mostly
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "data0") as writer:
        for i, length in enumerate([512] + [64] * 96):
            writer.add(rng.integers(0, 61, length), [(length // 2, length)], {"line": i})
        writer.close({})
    recipe = write_recipe(tmp_path, context=512, packs_per_step=13, epochs=1)
    loaded = load_recipe(recipe)
    return recipe, plan_stage(loaded, loaded.stages[0], Corpus.open([tmp_path / "data0"]), read_config(student), 2)


def test_ranks_have_packs_unequal_in_number_and_equal_in_cost(planned, tmp_path):
    recipe, plan = planned
    packs = [plan.micro_steps(0, 0, rank, equal=False) for rank in range(2)]
    assert plan.steps == 1 and sorted(map(len, packs)) == [4, 9]
    assert plan.read(0, 0, 0, torch.device("cpu"), equal=False).balance > 0.95

    one = run_here(recipe, f"out={tmp_path}/one")
    done = run(recipe, "run.compute=fp32", "run.gather=step", ranks=2)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "run")[0]["loss"] == pytest.approx(rows(one)[0]["loss"], rel=1e-5)


def test_ranks_that_meet_at_every_layer_have_alike_packs(planned):
    _, plan = planned
    first, second = (plan.micro_steps(0, 0, rank, equal=True) for rank in range(2))
    assert len(first) == len(second) == 7 and len(second[-1]) == 0
    assert sorted(np.concatenate([*first, *second])) == list(range(97))
    assert first[0].tolist() == [0]  # the dearest comes first, and only one of the seven meetings waits for it
    c, a, _ = flop_coefficients(plan.config)
    small, large = c * 512 + a * 8 * 64**2, c * 512 + a * 512**2
    expected = (large + 12 * small) / (2 * (large + 6 * small))
    assert plan.read(0, 0, 1, torch.device("cpu"), equal=True).balance == pytest.approx(expected)

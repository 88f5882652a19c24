"""Context parallelism: ranks that share a pack compute what one rank computes, loss and gradients."""

import pytest
import torch
from runs import rows, run, run_here, weights, write_recipe, write_shards, write_student

from dasd_engine.context_parallel import check
from dasd_engine.errors import InputError
from dasd_engine.model_config import read_config


@pytest.fixture
def recipe(tmp_path):
    write_student(tmp_path / "student")
    write_shards(tmp_path / "data0")
    return write_recipe(tmp_path)


def assert_same(out, other, *, after=0):
    """Losses, gradient norms and, through AdamW, every gradient: the weights at the end."""
    losses, expected = ([(row["loss"], row["grad_norm"]) for row in rows(path)] for path in (out, other))
    assert losses
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected[after:]), rtol=1e-5, atol=0.0)
    for name, weight in weights(other / "export" / "s0").items():
        torch.testing.assert_close(weights(out / "export" / "s0")[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        # Two groups of two; two replicas of two shards, whose gradients meet at the last micro-step.
        ["run.context_parallel=2", "run.gather=layer", "run.replicas=2", "run.activation_checkpointing=selective"],
        # Two key-value heads for four ranks: each is copied to two.
        ["run.context_parallel=4", "run.activation_checkpointing=full"],
    ],
)
def test_ranks_that_share_packs_do_not_change_a_run(recipe, tmp_path, overrides):
    one = run_here(recipe, f"out={tmp_path}/one")
    done = run(recipe, "run.compute=fp32", *overrides, ranks=4)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", one)


def test_a_run_goes_on_with_ranks_that_share_packs(recipe, tmp_path):
    """From the checkpoint of a rank with packs of its own: the plan is the same."""
    one = run_here(recipe, f"out={tmp_path}/one", "checkpoint.every=1", "checkpoint.keep=9")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    step = one / "checkpoints" / "step-00000002"
    step.rename(tmp_path / "run" / "checkpoints" / step.name)
    done = run(recipe, "run.compute=fp32", "run.context_parallel=2", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout
    assert_same(tmp_path / "run", one, after=2)


def test_what_cannot_be_shared_is_refused(recipe, tmp_path):
    with pytest.raises(InputError, match=r"run.context_parallel = 2 does not divide the 1 ranks"):
        run_here(recipe, "run.context_parallel=2")
    with pytest.raises(InputError, match=r"run.context_parallel = 0 must be at least 1"):
        run_here(recipe, "run.context_parallel=0")
    with pytest.raises(InputError, match=r"run.context_parallel = 2 does not divide the context of 129 tokens"):
        check(2, read_config(tmp_path / "student"), [128, 129])
    odd = read_config(write_student(tmp_path / "odd", num_attention_heads=12, num_key_value_heads=4, hidden_size=96))
    with pytest.raises(InputError, match=r"does not share 12 query and 4 key-value heads evenly.* 1, 2, 4, 12$"):
        check(6, odd, [128])

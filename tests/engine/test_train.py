"""Training: its results do not depend on how the work is cut, spread, interrupted or resumed."""

import json
import os
import random
import shutil

import pytest
import torch
from runs import rows, run, run_here, run_with, weights, write_recipe, write_shards, write_student

from dasd_engine.errors import InputError
from dasd_engine.metrics import MetricsLog


@pytest.fixture
def recipe(tmp_path):
    write_student(tmp_path / "student")
    write_shards(tmp_path / "data0")
    return write_recipe(tmp_path)


def losses(out):
    return [(row["loss"], row["grad_norm"]) for row in rows(out)]


def assert_close(a, b, tolerance):
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=tolerance, atol=0.0)


def test_loss_falls_and_the_student_is_exported(recipe):
    out = run_here(recipe, "train.epochs=12", "train.lr=1e-2")
    first, *_, last = rows(out)
    assert last["loss"] < 0.9 * first["loss"]
    assert (out / "export" / "s0" / "config.json").exists() and weights(out / "export" / "s0")
    assert json.loads((out / "run.json").read_text())["ranks"] == 1
    assert json.loads((out / "recipe.json").read_text())["stages"][0]["train"]["epochs"] == 12


def test_micro_steps_do_not_change_a_step(recipe, tmp_path):
    """The same documents in a step as 1, 2, 4 and more packs: same losses, gradients and final weights. AdamW's epsilon
    is above the rounding of the gradients, whose signs it would follow where they are nearly 0."""
    options = ["train.packs_per_step=1000", "train.epochs=3", "train.eps=1e-6"]
    outs = [
        run_here(recipe, *options, f"train.context={c}", f"out={tmp_path}/c{c}") for c in (2048, 512, 256, 64)
    ]
    for other in outs[1:]:
        assert_close(losses(outs[0]), losses(other), 1e-5)
        for name, weight in weights(outs[0] / "export" / "s0").items():
            torch.testing.assert_close(weight, weights(other / "export" / "s0")[name], rtol=1e-4, atol=1e-6)


def test_ranks_do_not_change_a_run(recipe, tmp_path):
    reference = losses(run_here(recipe))
    for ranks, extra in (
        (2, []),
        (4, []),
        (2, ["run.gather=layer", "run.activation_checkpointing=full"]),
        (2, ["run.replicas=2"]),
    ):
        done = run(recipe, "run.compute=fp32", *extra, f"out={tmp_path}/{ranks}", "--overwrite", ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert_close(reference, losses(tmp_path / str(ranks)), 1e-5)


def test_the_writers_of_checkpoints_do_not_meet_the_training_traffic(recipe, tmp_path):
    """Ranks write in the background what they compute in step: on one process group a rank's write could meet another
    one's step, and both would wait for ever. With a checkpoint a step that took a few steps to happen."""
    done = run(recipe, "run.compute=fp32", "checkpoint.every=1", "train.epochs=12", ranks=2)
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "run")) == int(rows(tmp_path / "run")[-1]["step"])


def test_two_ranks_in_bf16(recipe, tmp_path):
    run_here(recipe, "run.compute=bf16", f"out={tmp_path}/one")
    done = run(recipe, "run.compute=bf16", f"out={tmp_path}/two", ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert_close([a for a, _ in one], [a for a, _ in two], 1e-3)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_activations_do_not_change_a_run(recipe, tmp_path, mode):
    reference = losses(run_here(recipe))
    out = run_here(recipe, f"run.activation_checkpointing={mode}", f"out={tmp_path}/again")
    assert_close(reference, losses(out), 1e-6)


def test_kill_and_resume_is_bit_equal(recipe, tmp_path):
    """kill -9 at random steps, twice, then to the end: the same rows and the same weights, bit for bit."""
    arguments = ["checkpoint.every=2", "train.epochs=4"]
    whole = run_with("pass", recipe, *arguments, f"out={tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr
    expected = rows(tmp_path / "whole")
    first, second = sorted(random.Random(7).sample(range(3, len(expected)), 2))
    for step in (first, second):
        kill = f"if step == {step}: wait_for_checkpoint(); os.kill(os.getpid(), signal.SIGKILL)"
        killed = run_with(kill, recipe, *arguments)
        assert killed.returncode == -9
    finished = run_with("pass", recipe, *arguments)
    assert finished.returncode == 0, finished.stderr
    assert "going on from" in finished.stdout
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "run")] == [row["step"] for row in expected]
    for name, weight in weights(tmp_path / "whole" / "export" / "s0").items():
        assert torch.equal(weight, weights(tmp_path / "run" / "export" / "s0")[name]), name


@pytest.mark.parametrize("compute, moments", [("bf16", "fp32"), ("bf16", "compact"), ("fp32", "compact")])
def test_states_in_fewer_bytes_resume_bit_equal(recipe, tmp_path, compute, moments):
    """In bf16, where one process keeps fp32 masters as bf16 parameters and the bits that those lack; and with moments
    of three bytes."""
    options = [f"run.compute={compute}", f"run.moments={moments}", "checkpoint.every=2", "checkpoint.keep=100"]
    out = run_here(recipe, *options)
    expected, final = rows(out), weights(out / "export" / "s0")
    for path in (out / "checkpoints").iterdir():
        if path.name > "step-00000002":
            shutil.rmtree(path)
    shutil.rmtree(out / "export")
    run_here(recipe, *options)
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in rows(out)] == [
        (r["step"], r["loss"], r["grad_norm"]) for r in expected
    ]
    assert all(torch.equal(w, final[name]) for name, w in weights(out / "export" / "s0").items())


def test_compact_moments_learn_what_fp32_ones_do(recipe, tmp_path):
    options = ["train.epochs=12", "train.lr=1e-2"]
    full = losses(run_here(recipe, *options))
    compact = losses(run_here(recipe, *options, "run.moments=compact", f"out={tmp_path}/compact"))
    assert compact[0] == full[0] and compact[1:] != full[1:]
    assert_close([compact[-1][0]], [full[-1][0]], 0.02)


def test_ranks_do_not_change_a_run_with_compact_moments(recipe, tmp_path):
    """A weight is rounded by the same bits, whoever has it. Where a last bit of a gradient tips them, a moment is a
    step of its format away: runs are nearer to each other than to one with fp32 moments."""
    one = losses(run_here(recipe, "run.moments=compact"))
    other = losses(run_here(recipe, f"out={tmp_path}/other"))
    for ranks, extra in ((2, []), (4, ["run.replicas=2"])):
        done = run(
            recipe, "run.compute=fp32", "run.moments=compact", *extra, f"out={tmp_path}/{ranks}", ranks=ranks
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert_close(losses(tmp_path / str(ranks)), one, 2e-5)
    with pytest.raises(AssertionError):
        assert_close(other, one, 2e-5)


def test_resume_at_another_world_size_sees_the_same_data(recipe, tmp_path):
    reference = losses(run_here(recipe, f"out={tmp_path}/whole"))
    kill = "if step == 3: wait_for_checkpoint(); os.kill(os.getpid(), signal.SIGKILL)"
    killed = run_with(kill, recipe, "checkpoint.every=2")
    assert killed.returncode == -9
    resumed = run(recipe, "run.compute=fp32", "checkpoint.every=2", ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from" in resumed.stdout
    assert_close(reference, losses(tmp_path / "run"), 1e-5)


def test_a_signal_saves_and_stops(recipe, tmp_path):
    reference = losses(run_here(recipe, "train.epochs=4", f"out={tmp_path}/whole"))
    stopped = run_with("if step == 3: os.kill(os.getpid(), signal.SIGTERM)", recipe, "train.epochs=4")
    assert stopped.returncode == 128 + 15
    assert "run the same command again" in stopped.stdout
    done = len(rows(tmp_path / "run"))
    assert 3 <= done <= 4 and (tmp_path / "run" / "checkpoints" / f"step-{done:08d}").exists()
    run_here(recipe, "train.epochs=4")
    assert_close(losses(tmp_path / "run"), reference, 1e-6)


def test_a_full_disk_keeps_the_earlier_checkpoint(recipe, tmp_path):
    """From step 3 on no file may grow past 2 kB, so the next write fails as on a full disk."""
    limit = "if step == 3: wait_for_checkpoint(); resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))"
    failed = run_with(limit, recipe, "checkpoint.every=2", "train.epochs=4")
    assert failed.returncode == 2, failed.stderr
    assert "was not written" in failed.stdout and "training goes on" in failed.stdout
    assert "step-00000002 stays valid" in failed.stdout
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    reference = losses(run_here(recipe, "train.epochs=4", f"out={tmp_path}/whole"))
    run_here(recipe, "checkpoint.every=2", "train.epochs=4")
    assert_close(losses(tmp_path / "run"), reference, 1e-6)


def test_an_old_checkpoint_that_cannot_be_removed_does_not_unmake_the_new_one(recipe, monkeypatch):
    def stuck(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(39, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", stuck)
    out = run_here(recipe, "checkpoint.every=1", "checkpoint.keep=1")
    assert (out / "export" / "s0").is_dir() and len(list((out / "checkpoints").glob("step-*"))) > 1


def test_stages_start_from_the_weights_before_with_a_fresh_schedule(tmp_path):
    write_student(tmp_path / "student")
    write_shards(tmp_path / "data0")
    write_shards(tmp_path / "data1", seed=1)
    both = run_here(write_recipe(tmp_path, stages=2))
    first, second = ([row for row in rows(both) if row["stage"] == stage] for stage in ("s0", "s1"))
    assert [row["lr"] for row in first] == [row["lr"] for row in second]
    alone = run_here(
        tmp_path / "recipe.toml", "model.init=pretrained", f"model.path={both}/export/s0",
        f'stage=[{{name="s1", data="{tmp_path}/data1"}}]', f"out={tmp_path}/alone",
    )  # fmt: skip
    assert [row["loss"] for row in second] == pytest.approx([row["loss"] for row in rows(alone)], rel=1e-6)


def test_a_finished_run_is_not_run_again(recipe):
    before = rows(run_here(recipe))
    assert rows(run_here(recipe)) == before
    assert rows(run_here(recipe, overwrite=True))[0]["loss"] == before[0]["loss"]


def test_dry_run_prints_the_plan_and_trains_nothing(recipe, tmp_path):
    done = run(recipe, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "M parameters" in done.stdout and "s0" in done.stdout and "fill" in done.stdout
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_documents_that_see_each_other_are_a_choice(recipe, tmp_path):
    isolated = losses(run_here(recipe))
    joined = losses(run_here(recipe, "train.isolate=false", f"out={tmp_path}/joined"))
    assert abs(isolated[-1][0] - joined[-1][0]) > 1e-5


def test_the_log_of_a_run_that_goes_on_is_replaced_whole(tmp_path):
    path, lines = tmp_path / "metrics.jsonl", '{"step": 1}\n{"step": 2}\n{"st'
    path.write_text(lines)
    os.link(path, tmp_path / "kept")  # the file that a kill in the middle would leave
    MetricsLog(tmp_path, resume_after=1).close()
    assert path.read_text() == '{"step": 1}\n' and (tmp_path / "kept").read_text() == lines


def test_non_finite_steps_are_skipped_and_five_in_a_row_stop_the_run(recipe, tmp_path, monkeypatch):
    closed, close = [], MetricsLog.close
    monkeypatch.setattr(MetricsLog, "close", lambda log: (closed.append(log), close(log)))
    with pytest.raises(InputError, match=r"not finite in 5 steps in a row.*nonfinite.json"):
        run_here(recipe, "train.lr=1e38", "train.epochs=20", "train.warmup=0.0")
    written = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert len(written["documents"]) == 5 and all(written["documents"])
    assert len(closed) == 1  # TensorBoard writes what it holds when it is closed


def test_a_resumed_run_must_be_the_same_run(recipe, tmp_path):
    run_here(recipe)
    with pytest.raises(InputError, match=r"stage s0: lr: was 0.003, now 0.001.*--overwrite"):
        run_here(recipe, "train.lr=1e-3")
    with pytest.raises(InputError, match="seed: was 0, now 1"):
        run_here(recipe, "seed=1")
    write_student(tmp_path / "other", hidden_size=16)
    with pytest.raises(InputError, match="run.moments: was fp32, now compact"):
        run_here(recipe, "run.moments=compact")
    with pytest.raises(InputError, match="model: was"):
        run_here(recipe, f"model.path={tmp_path}/other")
    write_shards(tmp_path / "data1", seed=5)
    with pytest.raises(InputError, match="plan of the data: was"):
        run_here(recipe, f"stage.0.data={tmp_path}/data1")


def test_data_that_cannot_be_trained_on(recipe, tmp_path):
    with pytest.raises(InputError, match=r"document \d+ has \d+ tokens, more than the context of 32"):
        run_here(recipe, "train.context=32")
    write_shards(tmp_path / "blank", documents=3, untrained=(0, 1, 2))
    with pytest.raises(InputError, match="no trained token"):
        run_here(recipe, f"stage.0.data={tmp_path}/blank")
    write_student(tmp_path / "narrow", vocab_size=32)
    with pytest.raises(InputError, match="does not fit the model's vocabulary of 32"):
        run_here(recipe, f"model.path={tmp_path}/narrow")
    done = run(recipe, "train.context=4096", ranks=2)
    assert done.returncode != 0 and "packs of 4096 tokens for 2 ranks" in done.stderr


def test_one_run_at_a_time_in_a_directory(recipe, tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run is writing it"):
            run_here(recipe)


def test_any_checkpoint_can_be_exported(recipe, tmp_path, monkeypatch):
    from dasd_engine.export import export

    out = run_here(recipe)
    export(out, tmp_path / "last", dtype=torch.float32)
    final = weights(out / "export" / "s0")
    for name, weight in weights(tmp_path / "last").items():
        assert torch.equal(weight, final[name]), name
    with pytest.raises(InputError, match="no checkpoint step-99; complete ones: step-"):
        export(out, tmp_path / "none", checkpoint="step-99")
    with pytest.raises(InputError, match="give the `out` directory"):
        export(tmp_path, tmp_path / "none")
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(InputError, match="recipe.json: .*give the `out` directory"):
        export(tmp_path, tmp_path / "none")
    monkeypatch.setenv("HOME", str(tmp_path))
    out = run_here(recipe, "model.path=~/student", f"out={tmp_path / 'home'}", "train.epochs=1")
    export(out, tmp_path / "of-home")


def test_a_trace_of_steps_is_written_on_request(recipe):
    out = run_here(recipe, "run.profile=2")
    events = json.loads((out / "trace-rank0.json").read_text())["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert sum(name.startswith("ProfilerStep") for name in names) == 2 and "aten::mm" in names
    run_here(recipe, overwrite=True)
    assert not (out / "trace-rank0.json").exists()  # of a run that is no more

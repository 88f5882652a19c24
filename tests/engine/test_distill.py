"""distill: the whole pipeline on models of known answers; what runs again and what does not; kills; bad input."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distill_runs import write_distillation
from runs import environment, weights

from dasd_engine import distill
from dasd_engine.config import load_recipe, packaged
from dasd_engine.distill import DONE, Run, State
from dasd_engine.distill_config import load_distill_recipe
from dasd_engine.distill_stages import launch
from dasd_engine.errors import InputError
from dasd_engine.estimate import Device, Work, find_device, forward_flops
from dasd_engine.model import Decoder
from dasd_engine.model_config import read_config
from dasd_engine.records import lock
from dasd_engine.shards import Shards

STAGES = [
    "sample", "score", "select-low", "select-high", "prepare-low", "prepare-high", "train-low", "train-high", "mix",
    "prepare-mixed", "train-mixed", "evaluate-student", "evaluate-low", "evaluate-high", "evaluate-mixed",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    recipe = write_distillation(tmp_path_factory.mktemp("distill"))
    distill.main([str(recipe), "--quiet"])
    return recipe


def rows(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def manifest(out: Path, stage: str):
    return json.loads((out / stage / "manifest.json").read_text())


def contents(out: Path):
    return {path.relative_to(out): path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}


# ---------------------------------------------------------------------------------------------- the pipeline


def test_every_stage_works_on_what_the_one_before_has_made(finished):
    out = finished.parent / "run"
    candidates = rows(out / "sample" / "candidates.jsonl")
    assert len(candidates) == 12 * 2 * 2 == manifest(out, "score")["counts"]["scored"]
    for name, temperature in (("low", 0.6), ("high", 1.0)):
        chosen = rows(out / f"select-{name}" / "selected.jsonl")
        assert {json.loads(row["meta"])["temperature"] for row in chosen} == {temperature}
        assert len(chosen) == len(Shards.open(out / f"prepare-{name}")) == 12
        said = {row["text"] for row in candidates if row["temperature"] == temperature}
        assert {row["output"] for row in chosen} <= said
    starts = {name: load_recipe(out / f"train-{name}" / "recipe.toml") for name in ("low", "high", "mixed")}
    assert [r.resolve(r.model.path) for r in starts.values()] == [
        finished.parent / "student", out / "train-low" / "export" / "low", out / "train-high" / "export" / "high",
    ]  # fmt: skip
    assert [r.stages[0].train.epochs for r in starts.values()] == [2, 1, 1]
    students = [finished.parent / "student", *(out / f"train-{name}" / "export" / name for name in starts)]
    heads = [weights(student)["lm_head.weight"] for student in students]
    assert all(not torch.equal(a, b) for a, b in zip(heads, heads[1:], strict=False))
    mixed = rows(out / "mix" / "mixed.jsonl")
    counts = manifest(out, "mix")["counts"]
    assert counts["mixed"] == sum("prefix" in row for row in mixed) > 1
    assert len(Shards.open(out / "prepare-mixed")) == len(mixed)
    for name in ("student", "low", "high", "mixed"):
        (report,) = manifest(out, f"evaluate-{name}")["reports"]
        judged = [row["correct"] for row in rows(out / f"evaluate-{name}" / "responses.jsonl")]
        assert len(judged) == 8 and report["pass_at_1"] == sum(judged) / 8


def test_run_again_it_does_nothing_and_prints_the_table(finished, capsys):
    before = contents(finished.parent / "run")
    distill.main([str(finished)])
    assert contents(finished.parent / "run") == before
    printed = capsys.readouterr().out
    assert "===" not in printed
    for stage in STAGES:
        assert stage in printed
    assert "train-mixed/export/mixed (a Hugging Face directory)" in printed


def states(recipe: Path, *overrides: str) -> dict[str, State]:
    run, known = Run(load_distill_recipe(recipe, overrides)), dict[str, State]()
    for index, stage in enumerate(run.stages):
        known[stage.name] = run.state(index, known)
    return known


BEHIND_HIGH = {"train-high", "mix", "prepare-mixed", "train-mixed", "evaluate-high", "evaluate-mixed"}


@pytest.mark.parametrize(
    ("override", "anew"),
    [
        ("sample.candidates=3", {*STAGES} - {"evaluate-student"}),
        ("teacher.name=other", {*STAGES} - {"evaluate-student"}),
        ("score.minimum_tokens=4", {*STAGES} - {"sample", "evaluate-student"}),
        ("select.rule=random", {*STAGES} - {"sample", "score", "evaluate-student"}),
        ("train.lr=2e-4", {"train-low", "evaluate-low", *BEHIND_HIGH}),
        ("high.lr=2e-4", BEHIND_HIGH),
        ("mix.cap=2", BEHIND_HIGH - {"train-high", "evaluate-high"}),
        ("mix.masked=true", {"prepare-mixed", "train-mixed", "evaluate-mixed"}),
        ("evaluate.samples=3", {stage for stage in STAGES if stage.startswith("evaluate")}),
        ("mix.batch_size=3", set()),
        ("teacher.batch_size=3", set()),
        ("checkpoint.every=7", set()),
    ],
)
def test_a_changed_key_concerns_its_stage_and_what_depends_on_it(finished, override, anew):
    known = states(finished, override)
    assert {name for name, state in known.items() if state.word != DONE} == anew
    for name in anew:
        assert known[name].changes


def test_changed_files_are_seen(finished, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(finished.parent, moved)
    out = f"out={moved / 'run'}"
    assert {state.word for state in states(moved / "recipe.toml", out).values()} == {DONE}  # names do not matter
    with open(moved / "problems.jsonl", "a") as file:
        file.write((moved / "problems.jsonl").read_text().splitlines()[0].replace("q0", "q9") + "\n")
    changed = {name: state for name, state in states(moved / "recipe.toml", out).items() if state.word != DONE}
    assert set(changed) == {stage for stage in STAGES if stage.startswith("evaluate")}
    assert changed["evaluate-low"].changes == ["the problems changed"]


def test_a_changed_stage_runs_anew_and_its_directory_is_kept(finished, tmp_path, capsys):
    shutil.copytree(finished.parent / "run", tmp_path / "run")
    out = tmp_path / "run"
    before = contents(out)
    earlier = (out / "prepare-mixed" / "loss_spans.i32").read_bytes()
    distill.main([str(finished), f"out={out}", "mix.masked=true", "--until", "prepare"])
    printed = capsys.readouterr().out
    assert "=== prepare-mixed, anew: masked: false then, true now" in printed
    assert f"what was there is kept in {out / 'earlier' / 'prepare-mixed-1'}" in printed
    assert (out / "earlier" / "prepare-mixed-1" / "loss_spans.i32").read_bytes() == earlier
    assert (out / "prepare-mixed" / "loss_spans.i32").read_bytes() != earlier
    untouched = {path: time for path, time in contents(out).items() if path.parts[0] not in ("earlier", "stages")}
    assert {p: t for p, t in untouched.items() if p.parts[0] != "prepare-mixed"} == {
        p: t for p, t in before.items() if p.parts[0] not in ("prepare-mixed", "stages")
    }
    known = states(finished, f"out={out}", "mix.masked=true")
    assert {name for name, state in known.items() if state.word != DONE} == {"train-mixed", "evaluate-mixed"}
    assert known["train-mixed"].changes == ["prepare-mixed was made anew"]


def test_from_takes_earlier_stages_as_they_are(finished, tmp_path, capsys):
    shutil.copytree(finished.parent / "run", tmp_path / "run")
    options = [str(finished), f"out={tmp_path / 'run'}", "sample.candidates=3", "select.rule=longest"]
    distill.main([*options, "--from", "prepare", "--until", "prepare-high"])
    assert "===" not in capsys.readouterr().out  # neither sampled again nor selected
    with pytest.raises(InputError, match="--from prepare-low lies behind --until sample"):
        distill.main([*options, "--from", "prepare-low", "--until", "sample"])


KILL = """
import os, signal, sys
from dasd_engine import distill, distill_stages, records
from dasd_engine.errors import run_cli
stage, left = sys.argv.pop(1).split(":")
left = [int(left)]
def count():
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
write, launch = records.Appender.write, distill_stages.launch
def patched(self, row):
    write(self, row)
    if self.path.parent.name == stage:
        count()
def launched(recipe, module, arguments, log=None):
    launch(recipe, module, arguments, log)
    if stage in arguments[0]:
        count()
records.Appender.write, distill_stages.launch = patched, launched
run_cli(distill.main)
"""


def test_a_run_that_was_killed_again_and_again_ends_with_the_same_bytes(finished, tmp_path):
    out, whole = tmp_path / "run", finished.parent / "run"
    command = [str(finished), f"out={out}", "--quiet"]
    # Among the candidates, behind the first training but before it is recorded, among the teacher's continuations.
    for where in ("sample:20", "train-low:1", "mix:15"):
        done = subprocess.run([sys.executable, "-c", KILL, where, *command], env=environment(), timeout=300)
        assert done.returncode == -9
    distill.main(command)
    check_same(out, whole)


def test_a_run_that_was_killed_at_random_moments_ends_with_the_same_bytes(finished, tmp_path):
    """At any moment, whichever process is at work: in the middle of training too."""
    out, whole = tmp_path / "run", finished.parent / "run"
    command = [str(finished), f"out={out}", "--quiet"]
    seconds = sum(json.loads(file.read_text())["seconds"] for file in (whole / "stages").glob("*.json"))
    moments, killed = random.Random(4), 0
    while not killed:
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(3):
            run = subprocess.Popen(
                [sys.executable, "-m", "dasd_engine.distill", *command], env=environment(), start_new_session=True
            )
            try:
                assert run.wait(moments.uniform(0.1, 0.9) * seconds) == 0
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                killed += run.wait() == -signal.SIGKILL
        seconds /= 2  # the machine is faster than it was when `finished` ran
    distill.main(command)
    check_same(out, whole)


def check_same(out: Path, whole: Path) -> None:
    names = ["sample/candidates.jsonl", "score/scores.jsonl", "select-low/selected.jsonl", "mix/mixed.jsonl",
             "prepare-high/tokens.u32", "prepare-mixed/loss_spans.i32", "evaluate-mixed/responses.jsonl",
             "train-mixed/export/mixed/model.safetensors"]  # fmt: skip
    for name in names:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    for stage in STAGES:
        assert manifest(out, stage)["counts"] == manifest(whole, stage)["counts"]
    assert not (out / "earlier").exists()


# ---------------------------------------------------------------------------------------------- the plan


def test_a_dry_run_tells_the_plan_and_writes_nothing(tmp_path, capsys):
    recipe = write_distillation(tmp_path)
    before = contents(tmp_path)
    distill.main([str(recipe), "--dry-run", "--device", "H100", "--response-tokens", "100", "ranks=8"])
    printed = capsys.readouterr().out
    assert contents(tmp_path) == before
    for stage in STAGES:
        assert f"{stage} " in printed
    assert "4,800" in printed  # 12 questions x 2 candidates x 2 temperatures x 100 tokens
    assert "8 x H100: 989 TFLOP/s dense bf16, data sheet; assumed utilisation: train 40 %" in printed
    assert "assumed: 100 tokens a response" in printed


def test_a_dry_run_of_a_finished_run_counts_what_is_there(finished, capsys):
    distill.main([str(finished), "--dry-run", "--device-tflops", "1", "high.lr=2e-4"])
    printed = capsys.readouterr().out
    assert "changed: lr: 0.0001 then, 0.0002 now" in printed and "mix              │ changed: train-high" in printed
    assert f"{manifest(finished.parent / 'run', 'sample')['counts']['tokens']:,}" in printed
    assert "tokens a response" not in printed


def test_flops_of_a_forward_pass_by_hand(finished):
    config = read_config(finished.parent / "student")
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in Decoder(config).named_parameters() if p.dim() == 2}
    matrices = sum(size for name, size in sizes.items() if "embed" not in name)
    rows_, tokens = 3, 300
    attention = 2 * 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * 100**2 / 2 * rows_
    assert forward_flops(config, rows_, tokens) == pytest.approx(2 * matrices * tokens + attention)


def test_hours_are_flops_over_the_peak_and_the_assumed_utilisation():
    assert Work(1, 1, 3600 * 4e14, "train").hours(Device("d", 1e15, "")) == pytest.approx(1.0)
    assert Work(1, 1, None, "generate").hours(Device("d", 1e15, "")) is None
    assert find_device("h100", None, 2).flops == 2 * 989e12
    with pytest.raises(InputError, match="not in the table"):
        find_device("H1000", None, 1)


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("selct.rule=random", "unknown key 'selct'; did you mean 'select'"),
        ("select.rul=random", "unknown key 'select.rul'; did you mean 'rule'"),
        ("mixed.epoch=2", "unknown key 'mixed.epoch'; did you mean 'epochs'"),
        ("select.rule=best", "select.rule = 'best': must be one of teacher_count"),
        ("model.path=''", r"model.path is missing; write \[model\]"),
        ("model.init=random", "a student without weights cannot score"),
        ("sample.questions=[]", "sample.questions is missing"),
        ("sample.temperatures=[1.0, 0.6]", r"sample.temperatures = \[1.0, 0.6\] is out of range"),
        ("teacher.kind=server", "teacher.urls is missing"),
        ("teacher.urls=3", "teacher.urls = 3: must be a list"),
        ("mix.markers=xml", "must be one of 'think', 'harmony'"),
        ("ranks=0", "ranks = 0 is out of range"),
        ("train.lr=0.0", "low.lr = 0.0 is out of range"),
        ("mixed.warmup=2.0", "mixed.warmup = 2.0 is out of range"),
        ("evaluate.temperature=-1.0", "evaluate.temperature = -1.0 is out of range"),
        ("mix.top_p=0.0", "mix.top_p = 0.0 is out of range"),
    ],
)
def test_a_bad_recipe_is_refused_before_anything_runs(tmp_path, override, message):
    recipe = write_distillation(tmp_path)
    with pytest.raises(InputError, match=message):
        distill.main([str(recipe), override])
    assert not (tmp_path / "run").exists()


def test_missing_sections_are_named(tmp_path):
    (tmp_path / "recipe.toml").write_text("[model]\npath = 'student'\n")
    with pytest.raises(InputError, match=r"sample.questions is missing; write \[sample\]"):
        distill.main([str(tmp_path / "recipe.toml")])


def test_missing_questions_are_named_where_they_were_looked_for(tmp_path):
    recipe = write_distillation(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}/none.jsonl: no such file"):
        distill.main([str(recipe), 'sample.questions=["none.jsonl"]', "--dry-run"])
    hub = load_distill_recipe(recipe, ['sample.questions=["gym:chain_sum:3", "owner/name:train/*.parquet"]'])
    assert hub.questions == ["gym:chain_sum:3", "owner/name:train/*.parquet"]


def test_one_run_at_a_time(finished):
    run = Run(load_distill_recipe(finished))
    with lock(run.out), pytest.raises(InputError, match="another run is writing it"):
        run.go("again", quiet=True)


def test_a_teacher_that_is_down_fails_its_stage_with_the_command_to_go_on(tmp_path):
    pytest.importorskip("httpx2", reason="servers need the extra `server`")
    recipe = write_distillation(tmp_path)
    options = ["teacher.kind=server", 'teacher.urls=["http://127.0.0.1:9/v1"]', "teacher.give_up=0.1"]
    with pytest.raises(InputError) as failed:
        distill.main([str(recipe), *options, "teacher.probe_every=0.05", "teacher.backoff=0.01", "--quiet"])
    said = str(failed.value)
    assert said.startswith("sample: ") and "\n" not in said
    assert f"then go on with: python -m dasd_engine.distill {recipe} teacher.kind=server" in said


def test_ctrl_c_tells_the_command_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("dasd_engine.distill_stages.sample", interrupted)
    recipe = write_distillation(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        distill.main([str(recipe), "--until", "score"])
    told = capsys.readouterr().err
    assert f"sample was stopped; go on with: python -m dasd_engine.distill {recipe} --until score" in told


def test_a_process_that_fails_tells_its_last_line(finished, tmp_path):
    recipe = load_distill_recipe(finished)
    with pytest.raises(InputError, match=r"dasd_engine.prepare ended with exit code 2; .*no such file"):
        launch(recipe, "dasd_engine.prepare", ["none.jsonl", "--model", "m", "--out", "o"], tmp_path / "log")


@pytest.mark.parametrize("name", ["distill.toml", "quickstart.toml"])
def test_the_packaged_recipes_are_read(name):
    recipe = load_distill_recipe(packaged(name))
    assert recipe.sample.temperatures == (0.6, 1.0)
    assert recipe.train["mixed"].epochs == 1 < recipe.train["high"].epochs

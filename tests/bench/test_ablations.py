"""bench.ablations: the arms of the plan, its world, and how claims are judged. Its runs are those of the bake-off."""

import json
import random
import re
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from bench.ablations.__main__ import main, wait
from bench.ablations.arms import CLAIMS, SWEEP, TABLES, Arm, runs
from bench.ablations.pilot_task import DIRECT, TEACHER, solve
from bench.ablations.pilot_task import make_problem as make_story
from bench.ablations.pooled import POOLS
from bench.ablations.regimes import REGIMES, Regime, Size
from bench.ablations.results import begin, collect
from bench.ablations.worlds import NOISE, PILOT, SETS, make_noisy_teacher
from dasd_engine.hf import load_model
from dasd_engine.problems import final_answer, is_right
from dasd_engine.records import read_rows, write_json, write_rows

SIZE = Size(seeds=3, problems=40, share=0.02)


# ---------------------------------------------------------------------------------------------- the plan


def test_every_run_comes_behind_the_one_it_starts_from():
    done: set[str] = set()
    for arm in runs(TABLES):
        assert arm.before is None or arm.before.run in done
        done.add(arm.run)
    assert {arm.run for table in TABLES for arm in table.arms} <= done
    assert {arm.run for arm in SWEEP.arms} <= done  # the sweep's first level is in the tables' runs


def test_claims_and_references_name_arms_of_their_tables():
    arms = {table.name: {arm.name for arm in table.arms} for table in TABLES}
    assert all(table.reference in arms[table.name] for table in TABLES)
    assert all({claim.a, claim.b} <= arms[claim.table] for claim in CLAIMS)


def test_two_stages_never_share_a_question():
    for arm in runs(TABLES):
        blocks = [part.block for stage in arm.stages for part in stage]
        assert len(set(blocks)) == len(blocks)


def test_behind_a_task_that_fails_nothing_is_begun(capsys):
    failed, begun, queued = Future[None](), Future[None](), Future[None]()
    failed.set_exception(OSError("no space left"))
    begun.set_running_or_notify_cancel()
    with pytest.raises(OSError, match="no space left"):
        wait([queued, begun, failed])
    assert queued.cancelled() and begun.running()
    assert "OSError: no space left" in capsys.readouterr().err


def test_regimes_taken_together_have_arms_and_world_in_common():
    by_name = {regime.name: regime for regime in REGIMES}
    for a, b in ((by_name[first], by_name[second]) for first, second, _ in POOLS):
        arms = {table.name: set(table.arms) for table in a.tables}
        assert all(set(table.arms) <= arms[table.name] for table in b.tables)
        assert (a.world, a.rows, a.options, a.noisy) == (b.world, b.rows, b.options, b.noisy)
        assert not set(a.seeds) & set(b.seeds)


def test_the_written_plan_names_every_arm():
    plan = (Path(__file__).parents[2] / "docs" / "ablations-plan.md").read_text()
    assert not [arm.name for table in TABLES for arm in table.arms if f"`{arm.name}`" not in plan]


# ---------------------------------------------------------------------------------------------- the world


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ablations")
    for regime in REGIMES:
        regime.write_data(out, SIZE)
    make_noisy_teacher(out)
    return out


def test_no_problem_of_a_set_is_learnt_or_asked(world):
    def numbers(name: str) -> list[str]:
        return [" ".join(re.findall(r"\d+", row["input"])) for _, row in read_rows(world / "data" / f"{name}.jsonl")]

    a, b = map(numbers, SETS)
    assert len(set(a)) == len(set(b)) == SIZE.problems and not set(a) & set(b)
    assert not (set(a) | set(b)) & {*numbers("long"), *numbers("student")}
    assert all(said.count(" ") == 3 for said in b)  # a number and three to add to it or take from it


def test_nothing_of_the_pilots_is_asked_twice_or_learnt(world):
    def asked(name: str) -> list[str]:
        return [row["input"] for _, row in read_rows(PILOT.data(world) / f"{name}.jsonl")]

    questions = [question for name in ("dev", "questions", *SETS) for question in asked(name)]
    assert len(set(questions)) == len(questions)
    assert not set(questions) & {question for name in ("teacher", "easy", "mixed") for question in asked(name)}
    assert all(question.count(".") == 6 for question in asked("B"))  # a number and five steps


def test_a_story_is_worked_out_right_but_for_its_mistakes():
    rng = random.Random(0)
    right = {"direct": 0, "teacher": 0}
    for _ in range(2000):
        problem = make_story(rng, (3, 4, 5))
        for name, habits in (("direct", DIRECT), ("teacher", TEACHER)):
            response = solve(problem, habits, rng)
            right[name] += is_right(final_answer(response), str(problem.answer))
            if name == "direct":
                sums = re.findall(r"(\d+) ([-+]) (\d+) = (\d+) \.", response)
                assert len(sums) == len(problem.terms)
                assert all((int(x) + (1 if op == "+" else -1) * int(y) - int(z)) % 100 == 0 for x, op, y, z in sums)
    assert right["direct"] == 2000
    assert 0.80 < right["teacher"] / 2000 < 0.90  # a mistake in 8, 4 or 2 % of the steps, a quarter of them found


def test_the_noisy_teacher_is_the_shipped_one_at_a_higher_temperature(world):
    clean, noisy = (load_model(regime.teacher(world), dtype=torch.float64) for regime in REGIMES[:2])
    tokens, one = torch.randint(5, 200, (40,), generator=torch.manual_seed(0)), torch.tensor([0, 40])
    with torch.no_grad():
        logits, divided = (m(tokens, torch.arange(40), one.int(), 40) @ m.head_weight.T for m in (clean, noisy))
    torch.testing.assert_close(divided, logits / NOISE, rtol=2e-2, atol=2e-2)  # the norm's weights are bf16


# ---------------------------------------------------------------------------------------------- the verdict


def answer(directory: Path, ids: dict[str, list[str]], share: float) -> None:
    """An evaluation in which the first `share` of each set's problems are right, both samples."""
    rows = [
        {"id": id, "task": "sum", "temperature": 1.0, "sample": sample, "question": "", "answer": "1",
         "correct": i < share * len(of), "finish_reason": "stop", "length": 3, "output": "1", "error": None}
        for of in ids.values() for i, id in enumerate(of) for sample in range(2)
    ]  # fmt: skip
    directory.mkdir(parents=True)
    write_rows(directory / "responses.jsonl", rows)


def write_runs(out: Path, share: dict[str, float]) -> None:
    """Every run of one regime: those whose name begins with a key of `share` get its answers, others half."""
    ids = {name: [row["uuid"] for _, row in read_rows(out / "data" / f"{name}.jsonl")] for name in SETS}
    for seed in range(SIZE.seeds):
        here = out / "noisy" / f"s{seed}"
        answer(here / "base", ids, 0.25)
        (here / "mix").mkdir()
        for arm in runs(TABLES):
            right = next((value for name, value in share.items() if arm.run == name), 0.5)
            answer(here / "runs" / arm.run / "evaluate", ids, right)
            write_json(here / "runs" / arm.run / "manifest.json", {"tokens": 100, "wall_seconds": 1.0})
    (out / "noisy" / "sample").mkdir()
    write_rows(out / "noisy" / "sample" / "candidates.jsonl", [])


@pytest.fixture
def judged(world, tmp_path):
    def judge(share: dict[str, float], change=lambda out: None) -> dict:
        (tmp_path / "data").symlink_to(world / "data")
        write_runs(tmp_path, share)
        change(tmp_path)
        one_level = Regime("noisy", "a test's", (8000,), noisy=True)
        begin([one_level], tmp_path)
        return collect([one_level], tmp_path, SIZE)["regimes"]["noisy"]

    return judge


def verdicts(found: dict) -> dict[str, str]:
    return {claim["said"]: claim["verdict"] for claim in found["claims"]}


def test_a_claim_agrees_is_reversed_or_cannot_be_told(judged):
    found = judged({"teacher_count-low-0": 1.0, "teacher_count-high-0": 0.0})
    assert verdicts(found)["divergence-aware beats random, T = 0.6"] == "agrees"
    assert verdicts(found)["divergence-aware beats random, T = 1.0"] == "reversed"
    assert verdicts(found)["high temperature beats low"] == "cannot tell"
    (low,) = [claim for claim in found["claims"] if claim["table"] == "rules-low"]
    assert low["also_on_B"] and low["sets"]["A"]["difference"] == pytest.approx(0.5)
    assert found["base"] == {"A": pytest.approx(0.25), "B": pytest.approx(0.25)}


def test_a_run_that_could_not_be_made_is_the_one_it_starts_from(judged):
    def none_capped(out: Path) -> None:
        for seed in range(SIZE.seeds):
            runs_ = out / "noisy" / f"s{seed}" / "runs"
            told = {"instead": "random-low-0,random-high-1", "why": "no rollout reaches the cap"}
            write_json(runs_ / "random-low-0,random-high-1,capped" / "manifest.json", told)

    found = judged({"random-low-0,random-high-1": 0.75}, none_capped)
    measured = found["families"]["mix"]["sets"]["A"]["pass_at_1"]
    assert measured["capped"] == measured["none"] == pytest.approx(0.75)
    assert measured["plain"] == pytest.approx(0.5)


def test_the_tables_are_printed_from_the_results(judged, tmp_path, monkeypatch, capsys):
    found = judged({})
    results = {"regimes": {"noisy": found}, "problems": 40}
    (tmp_path / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr("sys.argv", ["ablations", "--print", "--results", str(tmp_path / "results.json")])
    main()
    printed = capsys.readouterr().out
    assert all(claim.said in printed for claim in CLAIMS) and all(f"### {table.title}" in printed for table in TABLES)


def test_an_arm_without_an_extra_stage_is_a_run_of_its_own():
    arm = Arm("x", runs(TABLES)[-1].stages, "masked")
    assert arm.before is not None and arm.run == f"{arm.before.run},masked"

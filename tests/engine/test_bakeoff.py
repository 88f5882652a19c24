"""bakeoff: the whole command on models of known answers; going on after a kill; what it refuses before it costs."""

import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from distill_runs import write_distillation

from dasd_engine import bakeoff
from dasd_engine.bakeoff import Asked, split
from dasd_engine.bakeoff_arms import SCHEDULES, Arm, Choice, Rows, count_tokens, make_groups, paste, pick, stage_rows
from dasd_engine.bakeoff_plan import LEAST_SEEDS, MOST_SEEDS, Clock, Cost, Plan, fits, make_plan, parse_budget
from dasd_engine.bakeoff_runs import Bench
from dasd_engine.comparisons import Series, harmed, said
from dasd_engine.config import load_recipe
from dasd_engine.distill_config import load_distill_recipe
from dasd_engine.errors import InputError
from dasd_engine.questions import read_questions
from dasd_engine.report import report

OPTIONS = ["--budget", "1h", "--arms", "temperatures,mix", "--development", "8"]


SEEDS = 2


def short(cost: Cost, budget: float, spent: float, most_rows: int) -> Plan:
    """For the tests, less than a person may ask for."""
    return Plan(most_rows, SEEDS, SEEDS * cost.seconds(most_rows))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    recipe = write_distillation(tmp_path_factory.mktemp("bakeoff"), questions=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bakeoff, "make_plan", short)
        bakeoff.main([str(recipe), *OPTIONS, "--quiet"])
    return recipe


def result(recipe: Path):
    return json.loads((recipe.parent / "run" / "bakeoff" / "result.json").read_text())


# ---------------------------------------------------------------------------------------------- the command


def test_every_arm_is_trained_under_every_seed_with_equal_samples_and_with_equal_tokens(finished):
    out, found = finished.parent / "run" / "bakeoff", result(finished)
    assert found["seeds"] == SEEDS and found["problems"] == 8
    groups = found["groups"]
    assert set(groups["temperatures"]["pass_at_1"]["samples"]) == set(SCHEDULES)
    assert set(groups["mix"]["pass_at_1"]["tokens"]) == {"none", "plain", "mixed", "masked"}
    for seed in range(SEEDS):
        runs = out / "runs" / f"s{seed}"
        rows = [json.loads(path.read_text())["rows"] for path in runs.glob("samples/teacher_count.*/manifest.json")]
        assert len(rows) == 5 + 3
        tokens = [json.loads(path.read_text())["tokens"] for path in runs.glob("tokens/*/manifest.json")]
        assert tokens and not list(runs.glob("*/*/train/export"))
    for name, group in groups.items():
        spent = group["tokens"]["tokens"].values()
        if name == "temperatures":  # up to a response: those have at most 120 tokens
            assert max(spent) - min(spent) <= 120
            low, high = (group["tokens"]["samples"][key] for key in ("low", "high"))
            assert low != high
        arms = len(group["pass_at_1"]["samples"])
        assert len(group["pairs"]["samples"]) == len(group["pairs"]["tokens"]) == arms * (arms - 1) / 2


def test_pass_at_1_is_that_of_the_runs_answers(finished):
    out, group = finished.parent / "run" / "bakeoff", result(finished)["groups"]["temperatures"]
    for arm in SCHEDULES:
        right = []
        for seed in range(SEEDS):
            path = out / f"runs/s{seed}/samples/teacher_count.{arm}/evaluate/responses.jsonl"
            right += [json.loads(line)["correct"] for line in path.read_text().splitlines()]
        assert len(right) == SEEDS * 8 * 2
        assert group["pass_at_1"]["samples"][arm] == pytest.approx(np.mean(right))


def test_development_problems_are_neither_trained_on_nor_those_of_the_evaluation(finished):
    out = finished.parent / "run" / "bakeoff"
    asked = {q.id for q in read_questions([str(out / "problems.jsonl")])}
    sampled = {q.id for q in read_questions([str(out / "questions.jsonl")])}
    kept_back = {"q0", "q1", "q2", "q3"}  # the same texts as problems.jsonl of the recipe
    assert len(asked) == 8 and not asked & sampled
    assert asked | sampled == {f"q{i}" for i in range(40)} - kept_back


def test_run_again_it_prints_the_result_and_trains_nothing(finished, capsys, monkeypatch):
    monkeypatch.setattr(Bench, "run", lambda *args, **options: pytest.fail("a finished run is done again"))
    bakeoff.main([str(finished), *OPTIONS])
    printed = capsys.readouterr().out
    assert "temperatures: above low_high, 95 % for all intervals together" in printed
    assert "cannot tell" in printed or "take " in printed
    with pytest.raises(InputError, match="was made differently.*high.lr"):
        bakeoff.main([str(finished), "high.lr=3e-4", *OPTIONS, "--quiet"])


def test_a_bakeoff_that_was_killed_goes_on_with_the_runs_it_lacks(finished, capsys):
    out = finished.parent / "run" / "bakeoff"
    before, times = result(finished), {p: p.stat().st_mtime_ns for p in out.glob("runs/*/*/*/manifest.json")}
    lost = out / "runs/s1/samples/teacher_count.high/manifest.json"
    for path in (out / "manifest.json", out / "result.json", out / "runs/s1/manifest.json", lost):
        path.unlink()
    bakeoff.main([str(finished), *OPTIONS])
    (begun,) = re.findall(r"seed (\d+), run (\d+) of at most (\d+), (.*)", capsys.readouterr().out)
    own = len(list(out.glob("runs/s1/*/*/manifest.json")))
    assert begun[0] == "2" and int(begun[1]) == own <= int(begun[2]) and begun[3] == "equal samples: teacher_count.high"
    after = result(finished)
    assert {p for p in times if p.stat().st_mtime_ns != times[p]} == {lost}
    assert {**after, "spent": 0} == {**before, "spent": 0}


def test_what_is_pasted_is_read_by_the_command_it_is_for(finished, tmp_path):
    recipe = load_distill_recipe(finished)
    for group in make_groups(recipe, ["rules", "temperatures", "mix"], answers=True):
        for arm in group.arms:
            lines = paste(group, arm.name, recipe)
            if "[[stage]]" in lines:
                (tmp_path / "train.toml").write_text(f'[model]\npath = "{recipe.student}"\n{lines}')
                stages = load_recipe(tmp_path / "train.toml").stages
                assert [len(stage.data) for stage in stages] == [len(stage) for stage in SCHEDULES[arm.name]]
            else:
                changed = [
                    f"{section}.{key}={json.dumps(value)}"
                    for section, table in tomllib.loads(lines).items() for key, value in table.items()
                ]  # fmt: skip
                assert load_distill_recipe(finished, changed)


# ---------------------------------------------------------------------------------------------- rows


def write_rows(path: Path, tokens: list[int]) -> Rows:
    rows = [
        {"uuid": f"q{i}", "output": f"{path.stem} {i}", "meta": json.dumps({"student_tokens": count})}
        for i, count in enumerate(tokens) if count
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Rows(path)


def test_arms_share_their_questions_and_two_stages_halve_them(tmp_path):
    two = [2, 2, 0, 2, 2, 2, 2, 2]
    rows = {"low": write_rows(tmp_path / "low", [1] * 8), "high": write_rows(tmp_path / "high", two)}
    order = [f"q{i}" for i in (2, 3, 1, 0, 7, 6, 5, 4)]
    texts = {}
    for name in SCHEDULES:
        arm = Arm(name, Choice("random", False), name)
        texts[name] = [[row["output"] for row in stage] for stage in stage_rows(arm, pick(arm, rows, order, 4), rows)]
    assert texts["low"] == [["low 2", "low 3", "low 1", "low 0"]]
    assert texts["high"] == [["high 3", "high 1", "high 0", "high 7"]]  # q2 has none
    assert texts["low_high"] == [["low 3", "low 1"], ["high 0", "high 7"]]
    assert texts["high_low"] == [["high 3", "high 1"], ["low 0", "low 7"]]
    assert texts["shuffled"] == [["low 3", "low 1", "high 0", "high 7"]]


def test_equal_tokens_are_as_many_rows_as_stay_within_them_from_both_halves(tmp_path):
    rows = {"low": write_rows(tmp_path / "low", [3] * 8), "high": write_rows(tmp_path / "high", [5] * 8)}
    arm, order = Arm("low_high", Choice("random", False)), [f"q{i}" for i in range(8)]
    assert count_tokens(pick(arm, rows, order, 8), rows) == 4 * 3 + 4 * 5
    taken = pick(arm, rows, order, 8, tokens=18)
    assert taken == [(0, "low", "q0"), (1, "high", "q4"), (0, "low", "q1"), (1, "high", "q5")]


def test_groups_that_change_the_same_thing_share_their_runs(finished):
    groups = make_groups(load_distill_recipe(finished), ["rules", "temperatures", "mix"], answers=True)
    runs = {group.name: {arm.name: arm.run for arm in group.arms} for group in groups}
    assert runs["rules"]["teacher_count"] == runs["temperatures"]["low_high"] == runs["mix"]["none"]
    assert len({run for names in runs.values() for run in names.values()}) == 9 + 4 + 3
    with pytest.raises(InputError, match="--arms rule: must be some of rules,temperatures,mix"):
        make_groups(load_distill_recipe(finished), ["rule"], answers=True)


# ---------------------------------------------------------------------------------------------- plan


def test_rows_come_before_seeds_and_all_fit_nine_tenths_of_what_is_left():
    cost = Cost(fixed=10.0, per_row=0.1)
    plan = make_plan(cost, budget=1000, spent=100, most_rows=400)
    assert (plan.rows, plan.seeds) == (400, MOST_SEEDS) and plan.seconds == 8 * 50
    plan = make_plan(cost, budget=300, spent=100, most_rows=400)
    assert (plan.rows, plan.seeds) == (400, 3)
    plan = make_plan(cost, budget=200, spent=100, most_rows=400)
    assert (plan.rows, plan.seeds) == (200, 3) and plan.seconds <= 90


def test_a_budget_too_small_names_the_one_that_is_enough():
    cost = Cost(fixed=100.0, per_row=1.0)
    with pytest.raises(InputError, match=r"--budget 5.0m: too small .* 3 seeds of 64 rows .* about 10m"):
        make_plan(cost, budget=300, spent=0, most_rows=400)
    assert make_plan(cost, budget=parse_budget("10m"), spent=0, most_rows=400).seeds == LEAST_SEEDS


def test_a_seed_is_begun_if_the_mean_of_those_before_fits():
    assert fits([50, 50], budget=100, spent=100)  # fewer than three: no interval without
    assert fits([40, 50, 60], budget=200, spent=150) and not fits([40, 50, 60], budget=199, spent=150)


@pytest.mark.parametrize(("text", "seconds"), [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("45s", 45)])
def test_budgets_are_read(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "two hours", "0h", "-1h"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(InputError, match="write a time such as 2h, 90m or 1h30m"):
        parse_budget(text)


def test_the_clock_goes_on_where_it_was(tmp_path):
    (tmp_path / "clock.json").write_text('{"seconds": 100.0}')
    clock = Clock(tmp_path / "clock.json")
    clock.save()
    assert 100 <= json.loads((tmp_path / "clock.json").read_text())["seconds"] <= clock.spent


# ---------------------------------------------------------------------------------------------- what is refused


def test_a_student_at_the_floor_is_told_before_the_teacher_is_asked(tmp_path):
    recipe = write_distillation(tmp_path, questions=24)
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    wrong = [{**row, "meta": json.dumps({"answer": "no such letter"})} for row in rows]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong))
    with pytest.raises(InputError, match="floor on the development problems.*judged: .*base/responses.jsonl"):
        bakeoff.main([str(recipe), *OPTIONS, "--quiet"])
    assert not (tmp_path / "run" / "bakeoff" / "source").exists()


def test_a_budget_too_small_is_told_before_the_teacher_is_asked(tmp_path):
    recipe = write_distillation(tmp_path, questions=24)
    with pytest.raises(InputError, match="too small for any comparison; the evaluations of 3 seeds alone"):
        bakeoff.main([str(recipe), "--budget", "0.001s", "--quiet"])
    assert not (tmp_path / "run" / "bakeoff" / "source").exists()


def test_questions_without_answers_give_no_development_problems(finished, tmp_path):
    recipe = write_distillation(tmp_path, questions=24)
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps({"input": f"What {i}?"}) + "\n" for i in range(9)))
    with pytest.raises(InputError, match="no development problems: 0 of the 9 questions .* with --problems"):
        bakeoff.main([str(recipe), *OPTIONS, "--quiet"])


def test_problems_of_the_evaluation_are_no_development_problems(finished):
    problems = str(finished.parent / "problems.jsonl")
    with pytest.raises(InputError, match=r"'q0' \(4 in all\) is among \[evaluate\] problems"):
        bakeoff.main([str(finished), *OPTIONS, "--problems", problems, "--quiet"])


def test_the_split_is_seeded_and_keeps_a_question_where_it_was_when_others_come(finished):
    recipe, questions = load_distill_recipe(finished), read_questions([str(finished.parent / "questions.jsonl")])
    training, problems = split(recipe, Asked(1.0), questions)
    assert (training, problems) == split(recipe, Asked(1.0), questions[::-1])
    other, _ = split(load_distill_recipe(finished, ["seed=9"]), Asked(1.0), questions)
    assert {q.id for q in other} != {q.id for q in training}


# ---------------------------------------------------------------------------------------------- words and figures


def test_the_report_shows_every_group_with_its_intervals(finished, tmp_path):
    text = report(finished.parent / "run", tmp_path / "page.html", figures=tmp_path).read_text()
    for name, group in result(finished)["groups"].items():
        assert f"{name}: above {group['reference']}" in text
        worst = max(group["detectable"]["measured"].values())
        assert (f"could see a difference of {100 * worst:.1f} points" if worst else "gave the same answers") in text
        for design in ("samples", "tokens"):
            for arm, mean in group["pass_at_1"][design].items():
                assert f">{arm}</text>" in text and f">{100 * mean:.1f} %</text>" in text
            for pair in group["pairs"][design]:
                if group["reference"] == pair["a"]:
                    assert f">{100 * pair['difference']:+.1f} (".replace("-", "−").replace("+0.0", "0.0") in text
        assert (tmp_path / f"bakeoff-{name}.svg").exists()
    assert result(finished)["paste"].splitlines()[0] in text


def test_how_often_the_teacher_is_right_is_said(tmp_path):
    rows = [
        {"id": id, "temperature": temperature, "task": task, "answer": answer, "text": f"<think>\nhm\n</think>\n{said}"}
        for id, task, answer, said in (("a", "sums", "4", "It is 4."), ("b", "stories", "5", "It is 4."))
        for temperature in (1.0, 0.6)
    ]  # fmt: skip
    rows += [{**rows[0], "id": "unknown", "answer": None}, {**rows[0], "id": "held out"}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = bakeoff.teacher_right(tmp_path / "c.jsonl", ["a", "b", "unknown"])
    of_tasks = "50.0 % at T = {} (stories 0.0 %, sums 100.0 %)"
    assert told == f"the teacher's responses, right: {of_tasks.format(0.6)}; {of_tasks.format(1)}"
    assert bakeoff.teacher_right(tmp_path / "c.jsonl", ["unknown"]) == ""


def test_a_verdict_in_words():
    def group(**verdict):
        empty = {"best": None, "alike": [], "partly": [], "worse": []}
        return {"reference": "random", "verdict": {**empty, **verdict},
                "detectable": {"planned": 0.05, "measured": {"samples": 0.03, "tokens": 0.041}}}  # fmt: skip

    seen = "could see a difference of 4.1 points (planned 5.0 points)"
    assert said(group(worse=["ratio"])) == ["cannot tell", "worse than random in both: ratio", seen]
    assert said(group(best="longest", alike=["ratio"], worse=["min_count"])) == [
        "take longest: better than random with equal samples and with equal tokens",
        "not told apart from it: ratio", "worse than random in both: min_count", seen,
    ]  # fmt: skip
    assert said(group(best="random", worse=["ratio"]))[0] == "take random: it is better than every other arm"
    assert said(group(partly=["longest"]))[1] == "better with equal samples or with equal tokens, not both: longest"


def test_arms_that_all_end_below_their_start_are_told():
    samples, tokens = (Series(name, {}, {"random": 0.2, "ratio": 0.3}) for name in ("equal samples", "equal tokens"))
    assert harmed({"equal samples": 0.3, "equal tokens": 0.1}, [samples, tokens]) == []
    (line,) = harmed({"equal samples": 0.301, "equal tokens": 0.1}, [samples, tokens])
    assert line.startswith("every arm ends below the students before training (30.1 %, equal samples): ")

"""problems: how answers are judged, and what bad problems are told."""

import json
from pathlib import Path

import pytest

from dasd_engine.errors import InputError
from dasd_engine.problems import SCORERS, final_answer, is_right, read_problems


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("<think>1 + 1 = 2</think>The answer is 2.", "The answer is 2."),
        ("<think>a</think>1<think>b</think>\n 2 \n", "2"),
        ("no thinking: 7", "no thinking: 7"),
        ("<think>1 + 1 = 2", None),  # cut off while thinking: 2 is no answer
        ("<think>a</think>", ""),
        (r"<think>a</think>So \boxed{3} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"<think>\boxed{5}</think>6", "6"),
    ],
)
def test_final_answer(output, answer):
    assert final_answer(output) == answer


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("-4", "-4"),
        ("The answer is -4.", "-4"),
        ("So 3 apples and 4 pears make 7 pieces.", "7"),  # the last number
        ("1,200", "1200"),
        ("$1,200.00$", "1200"),
        ("0.5", "1/2"),
        (" 1 / 2 ", ".5"),
        ("1e3", "1000"),
        ("Answer: Tuesday", "tuesday"),
        ("  Two   words ", "two words"),
        ("The final answer is Blue.", "blue"),
        ("x^2", "$x^2$"),
        ("7 - 5 = 2", "2"),
        ("from 5-3", "3"),
    ],
)
def test_right_answers(answer, expected):
    assert is_right(answer, expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("4", "-4"),
        ("The answer is 7, not 8", "7"),  # the last number is 8, and the phrase is not 7 alone
        ("14", "4"),
        ("1.20", "120"),
        ("0.3333", "1/3"),  # exact, without tolerance
        ("", "0"),
        ("Tuesday or Monday", "Tuesday"),
        ("1/0", "1"),
        ("there is no number", "3"),
        ("12,34", "1234"),
        ("1e999999999", "1"),  # as a fraction it would have a thousand million digits
        ("1e" + "9" * 5000, "1"),
    ],
)
def test_wrong_answers(answer, expected):
    assert not is_right(answer, expected)


@pytest.mark.parametrize(
    ("scorer", "answer", "expected", "right"),
    [
        ("exact", "Tuesday.", "tuesday", True),
        ("exact", "1,200", "1200", False),
        ("numeric", "So 1,200 of them", "1200", True),
        ("numeric", "Tuesday", "Tuesday", False),  # no numbers
        ("math", r"\frac{\sqrt{12}}{4}", r"\frac{\sqrt{3}}{2}", True),
        ("math", "1 + x^2", "x^2+1", True),
        ("math", "x^2", "x^2+1", False),
        ("math", "Tuesday", "tuesday", True),  # what auto takes, math takes
    ],
)
def test_scorers(scorer, answer, expected, right):
    if scorer == "math":
        pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    assert is_right(answer, expected, SCORERS[scorer]) is right


def row(question="1 + 1 =", meta='{"answer": "2", "task": "sum"}', **other) -> dict:
    return {"input": question, "output": "", "domain": "math", "meta": meta, **other}


def write(path: Path, rows: list) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def test_problems_are_read_with_their_task_and_judged_by_the_scorer_asked_for(tmp_path):
    rows = [row(), "", row(meta='{"answer": 3}'), row(meta="", domain="", answer="1200")]
    path = write(tmp_path / "p.jsonl", rows)
    problems = read_problems([path])
    assert [(p.question.answer, p.task) for p in problems] == [("2", "sum"), ("3", "math"), ("1200", "all")]
    assert [p.judge("2") for p in problems] == [True, False, False]
    assert problems[2].judge("1,200") and not read_problems([path], "exact")[2].judge("1,200")


def test_reasoning_gym_judges_its_own_tasks_and_only_the_full_score_is_right():
    pytest.importorskip("reasoning_gym", reason="the extra `tasks` is not installed")
    chain, countdown = read_problems(["gym:chain_sum:1:0", "gym:countdown:1:0"])
    expected = chain.question.answer
    assert chain.task == "chain_sum" and chain.question.id == "chain_sum-0-0"
    assert chain.judge(f"The answer is {expected}.") and not chain.judge(f"{expected}0")
    assert not chain.judge(f"{expected} and 7 more")  # reasoning-gym gives part of a point for this
    assert countdown.judge(f"(({countdown.question.answer}))") and not countdown.judge("1 + 1")  # any way


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{oops", r"p\.jsonl:2: is not JSON"),
        ("[1]", r"p\.jsonl:2: is a list, expected an object with one of messages"),
        (row(question=" "), r"p\.jsonl:2: input: asks nothing"),
        (row(meta="{"), r"p\.jsonl: question 'p-2' has no `answer`, and there is no other scorer for the task 'math'"),
        (row(meta='{"answers": "2"}'), r"p\.jsonl: question 'p-2' has no `answer`"),
        (row(id="p-1"), r"p\.jsonl:2: the id 'p-1' is that of .*p\.jsonl:1 too"),
    ],
)
def test_a_bad_row_is_named(tmp_path, bad, message):
    with pytest.raises(InputError, match=message):
        read_problems([write(tmp_path / "p.jsonl", [row(), bad])])


def test_bad_names_are_told(tmp_path):
    with pytest.raises(InputError, match=r"scorer 'nearly': must be one of auto, exact, numeric, math"):
        read_problems(["p.jsonl"], "nearly")
    with pytest.raises(InputError, match=r"none\.jsonl"):
        read_problems([str(tmp_path / "none.jsonl")])
    with pytest.raises(InputError, match=r"empty\.jsonl"):
        read_problems([write(tmp_path / "empty.jsonl", [""])])
    same = [write(tmp_path / name, [row(id="a")]) for name in ("p.jsonl", "q.jsonl")]
    with pytest.raises(InputError, match=r"p\.jsonl, .*q\.jsonl: the id 'a' names two problems"):
        read_problems(same)

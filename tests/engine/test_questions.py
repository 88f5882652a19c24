"""questions: the rows that are questions, what names them, and what a bad one is told."""

import json
from pathlib import Path

import pytest

from dasd_engine.errors import InputError
from dasd_engine.questions import Gym, Question, identify, parse_gym, parse_question, read_questions, spread

HELDOUT = Path(__file__).parents[2] / "recipes" / "quickstart" / "heldout.jsonl"
USER = [{"role": "user", "content": "1 + 1 ="}]


def write(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"question": "1 + 1 ="}, USER),
        ({"problem": "1 + 1 ="}, USER),
        ({"prompt": "1 + 1 ="}, USER),
        ({"prompt": USER}, USER),
        ({"prompt": "1 + 1 =", "completion": "2"}, USER),
        ({"input": "1 + 1 =", "output": ""}, USER),
        ({"messages": USER}, USER),
        ({"messages": [*USER, {"role": "assistant", "content": "2"}]}, USER),  # an answer that is there already
        (
            {"messages": [{"role": "system", "content": "S"}, *USER, {"role": "assistant", "content": "2"}, *USER]},
            [{"role": "system", "content": "S"}, *USER, {"role": "assistant", "content": "2"}, *USER],
        ),
    ],
)
def test_every_shape_of_a_row(row, messages):
    assert parse_question(json.dumps(row).encode(), "q-1") == Question("q-1", messages)
    assert parse_question(row, "q-1").messages == messages


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"uuid": "u", "id": "i"}, ("u", None, None)),
        ({"id": 7}, ("7", None, None)),
        ({"answer": 3, "task": "sum"}, ("q-1", "3", "sum")),
        ({"meta": '{"answer": "3", "task": "sum"}', "domain": "math"}, ("q-1", "3", "sum")),
        ({"meta": {"answer": 3.5}, "domain": "math"}, ("q-1", "3.5", "math")),
        ({"meta": "no JSON", "answer": None}, ("q-1", None, None)),
    ],
)
def test_id_answer_and_task(more, expected):
    question = parse_question({"question": "1 + 1 =", **more}, "q-1")
    assert (question.id, question.answer, question.task) == expected


def test_the_problems_of_evaluate_are_questions():
    questions = read_questions([str(HELDOUT)])
    assert len(questions) == len(HELDOUT.read_text().splitlines()) > 100
    assert all(q.answer and q.task and q.messages[-1]["role"] == "user" for q in questions)


def test_rows_without_an_id_are_named_by_file_and_line(tmp_path):
    path = write(tmp_path / "set.v2.jsonl", {"question": "a"}, "", {"question": "b"})
    assert [q.id for q in read_questions([path])] == ["set-1", "set-3"]


def test_an_id_used_twice_names_both_places(tmp_path):
    a = write(tmp_path / "a.jsonl", {"id": "x", "question": "a"}, {"id": "y", "question": "b"})
    b = write(tmp_path / "b.jsonl", {"question": "c"}, {"uuid": "y", "question": "d"})
    with pytest.raises(InputError, match=r"b\.jsonl:2: the id 'y' is that of .*a\.jsonl:2 too"):
        read_questions([a, b])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{oops", "is not JSON"),
        ("[1]", "is a list, expected an object with one of messages, input"),
        ({"text": "a"}, "has the fields text; a question is in one of messages, input"),
        ({"question": " "}, "question: asks nothing"),
        ({"question": 5}, "is a number, expected a string"),
        ({"messages": [{"role": "system", "content": "S"}]}, "messages: asks nothing"),
        ({"messages": [{"role": "robot", "content": "S"}]}, r"messages\[0\].role: is 'robot'"),
        ({"messages": []}, "messages: is an empty list"),
        ('{"question": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_bad_row_is_named(tmp_path, bad, message):
    path = write(tmp_path / "q.jsonl", {"question": "a"}, bad)
    with pytest.raises(InputError, match=rf"q\.jsonl:2: .*{message}"):
        read_questions([path])


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"id": ["a", "b"], "question": ["1", "2"], "answer": ["3", None], "other": [[1], [2]]})
    pq.write_table(table, tmp_path / "q.parquet")
    assert read_questions([str(tmp_path / "q.parquet")]) == [
        Question("a", [{"role": "user", "content": "1"}], "3"),
        Question("b", [{"role": "user", "content": "2"}]),
    ]


def test_reasoning_gym_tasks():
    pytest.importorskip("reasoning_gym")
    questions = read_questions(["gym:chain_sum:4:7", "gym:gcd:2"])
    assert [q.id for q in questions] == [*(f"chain_sum-7-{i}" for i in range(4)), "gcd-0-0", "gcd-0-1"]
    assert all(q.answer and q.task in ("chain_sum", "gcd") for q in questions)
    assert read_questions(["gym:chain_sum:2:7"]) == questions[:2]  # the same problems every time
    with pytest.raises(InputError, match=r"gym:nope:100:0: reasoning-gym has no such task"):
        read_questions(["gym:nope"])
    (one,) = identify(["gym:chain_sum:4:7"])
    assert one["gym"] == "chain_sum:4:7" and one["reasoning_gym"]


def test_names_of_tasks():
    assert parse_gym("gym:a") == Gym("a", 100, 0)
    assert parse_gym("gym:a:5") == Gym("a", 5, 0)
    assert parse_gym("gym:a:5:6") == Gym("a", 5, 6)
    for bad in ("gym:", "gym:a:x", "gym:a:0", "gym:a:00", "gym:a:1:2:3", "gym:a:-1"):
        with pytest.raises(InputError, match="write gym:TASK"):
            parse_gym(bad)


def test_what_identifies_a_file_is_its_content(tmp_path):
    path = write(tmp_path / "q.jsonl", {"question": "a"})
    before = identify([path])
    assert identify([path]) == before
    write(tmp_path / "q.jsonl", {"question": "b"})
    assert identify([path]) != before


def test_a_limit_takes_from_the_whole_list():
    assert spread("0123456789", 4) == ["0", "2", "5", "7"]
    assert spread("abc", None) == spread("abc", 9) == ["a", "b", "c"]

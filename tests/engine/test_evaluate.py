"""evaluate: what is asked of any teacher, what a report and a comparison say, resuming, scorers that raise."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from chain_models import write_chain, write_questions
from fake_server import FakeServer

from dasd_engine import evaluate as command
from dasd_engine.errors import InputError
from dasd_engine.evaluate import EvalOptions, ask
from dasd_engine.evaluation_report import Response, bootstrap, compare, levels, summarize
from dasd_engine.problems import Problem, is_right
from dasd_engine.questions import Question, spread
from dasd_engine.teacher_local import LocalTeacher
from dasd_engine.teachers import Failed, Request, Sampled, TeacherOptions


def response(id: str, correct: bool, task="a", sample=0, temperature=1.0, finish="stop", length=10, error=None):
    return Response(id, task, temperature, sample, "?", "", correct, finish, length, "", error)


# ---------------------------------------------------------------------------------------------- figures


def test_summary_averages_samples_then_problems():
    rows = [response("1", True), response("1", True, sample=1), response("2", True), response("2", False, sample=1)]
    rows += [response("3", False, "b", 0, finish="length", length=30), response("3", False, "b", 1, length=20)]
    (report,) = summarize(rows)
    assert report.pass_at_1 == pytest.approx(0.5)  # (1 + 0.5 + 0) / 3
    a, b = report.by_task["a"], report.by_task["b"]
    assert (a.pass_at_1, a.count, a.mean_length, a.cut_off_rate) == (pytest.approx(0.75), 2, 10, 0)
    assert (b.pass_at_1, b.count, b.mean_length, b.cut_off_rate) == (0, 1, 25, 0.5)
    assert (report.count, report.samples, report.temperature) == (3, 2, 1.0)
    assert report.mean_length == pytest.approx(90 / 6)
    assert report.cut_off_rate == pytest.approx(1 / 6)
    assert report.interval[0] <= report.pass_at_1 <= report.interval[1]


def test_each_temperature_has_a_report():
    rows = [response("1", True), response("1", False, temperature=0.0)]
    assert [(r.temperature, r.pass_at_1) for r in summarize(rows)] == [(1.0, 1.0), (0.0, 0.0)]


def test_bootstrap_covers_like_the_normal_interval():
    scores = (np.arange(400) % 5 == 0).astype(float)
    low, high = bootstrap(scores)
    half = 1.96 * (0.2 * 0.8 / 400) ** 0.5
    assert low == pytest.approx(0.2 - half, abs=0.01)
    assert high == pytest.approx(0.2 + half, abs=0.01)
    assert bootstrap(scores) == (low, high)


def test_floor_and_ceiling_are_said_plainly():
    def said(right: int, count: int) -> str:
        (report,) = summarize([response(str(i), i < right) for i in range(count)])
        return "".join(levels(report))

    assert said(0, 50).startswith("floor on a: none of 50 problems is ever right (up to 5.8 % may be)")
    assert "take easier problems" in said(0, 50) and "take harder problems" in said(50, 50)
    assert said(25, 50) == said(47, 50) == ""


def test_failures_and_scorers_that_raise_are_counted_by_name():
    rows = [response("1", True), response("2", False, finish="failed", length=0, error="HTTP 400")]
    rows += [response("3", False, "b", error="KeyError: 'x'")]
    (report,) = summarize(rows)
    assert report.failed == {"HTTP 400": 1} and report.scorer_errors == {"b: KeyError: 'x'": 1}
    assert report.pass_at_1 == pytest.approx(1 / 3) and report.mean_length == 10


# ---------------------------------------------------------------------------------------------- asking


class Scripted:
    """A teacher that says what `script` holds for a question, finished in the opposite order."""

    name, revision = "scripted", None

    def __init__(self, script: dict[str, str | Failed]):
        self.script, self.asked = script, list[Request]()

    def sample(self, requests: Iterable[Request]):
        self.asked = list(requests)
        for request in reversed(self.asked):
            said = self.script[request.messages[-1]["content"]]
            good = Sampled(said, 0, None, [-0.5] * 3, [0, 0, 0], "stop") if isinstance(said, str) else said
            yield request, good

    def close(self) -> None: ...


def problem(question: str, expected: str, judge=None) -> Problem:
    messages = [{"role": "user", "content": question}]
    return Problem(Question(question, messages, expected), "sums", judge or (lambda answer: is_right(answer, expected)))


def test_what_is_asked_and_how_it_is_judged():
    teacher = Scripted({"1 + 1": "<think>1 + 1 = 2</think>The answer is 2.", "1 + 2": "<think>1 + 2 = 3"})
    asked = EvalOptions(samples=2, temperatures=(1.0, 0.0), top_p=0.9, max_new_tokens=7, system="Be brief.")
    rows = ask(teacher, [problem("1 + 1", "2"), problem("1 + 2", "3")], asked)
    assert [(r.temperature, r.id, r.sample, r.correct) for r in rows] == [
        (1.0, "1 + 1", 0, True), (1.0, "1 + 1", 1, True), (1.0, "1 + 2", 0, False), (1.0, "1 + 2", 1, False),
        (0.0, "1 + 1", 0, True), (0.0, "1 + 2", 0, False),  # greedy: once
    ]  # fmt: skip
    assert {(r.top_p, r.max_new_tokens, r.messages[0]["content"]) for r in teacher.asked} == {(0.9, 7, "Be brief.")}
    assert len({r.seed for r in teacher.asked}) == 6
    again = Scripted(teacher.script)
    ask(again, [problem("1 + 2", "3")], EvalOptions(samples=1))
    assert again.asked[0].seed in {r.seed for r in teacher.asked}  # neither models nor further problems change a draw


def test_a_scorer_that_raises_and_a_failed_request_are_wrong_and_told(capsys):
    def judge(answer: str) -> bool:
        raise ZeroDivisionError("of the scorer")

    teacher = Scripted({"a": "2", "b": "2", "c": Failed("HTTP 400: too long")})
    rows = ask(teacher, [problem("a", "2"), problem("b", "2", judge), problem("c", "2")], EvalOptions(samples=1))
    assert [r.correct for r in rows] == [True, False, False]
    command.print_report(summarize(rows), "title")
    printed = capsys.readouterr().out
    assert "raised 1 times, which counts as wrong: sums: ZeroDivisionError: of the scorer" in printed
    assert "1 failed and count as wrong: HTTP 400: too long" in printed
    with pytest.raises(InputError, match=r"answered nothing: HTTP 400: too long \(4 times\)"):
        ask(teacher, [problem("c", "2")], EvalOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples = 0"),
        ({"temperatures": (-1.0,)}, r"temperatures = \(-1.0,\)"),
        ({"temperatures": (1.0, 1.0)}, "named twice"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"limit": 0}, "limit = 0"),
    ],
)
def test_options_out_of_range(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        command.read([str(write_questions(tmp_path / "p.jsonl", 2))], EvalOptions(**options))


def test_a_limit_takes_problems_from_the_whole_file():
    assert spread("0123456789", 4) == ["0", "2", "5", "7"]


# ---------------------------------------------------------------------------------------------- models and directories


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("evaluate")
    write_chain(path / "model", 0.5, letters="AB")
    write_questions(path / "p.jsonl", 6)
    return path


def test_a_model_in_memory_answers_as_its_directory_does(here):
    problems = command.read([str(here / "p.jsonl")], EvalOptions())
    options = TeacherOptions(path=str(here / "model"))
    first = LocalTeacher(options)
    assert ask(first, problems, EvalOptions()) == ask(LocalTeacher(options, first._model), problems, EvalOptions())


def run(here: Path, out: Path, *arguments: str, model: str = "") -> None:
    command.main([model or str(here / "model"), str(here / "p.jsonl"), "--out", str(out), "--samples", "2", *arguments])


def test_a_directory_of_responses_goes_on_where_it_was_killed(here, tmp_path, capsys):
    run(here, tmp_path / "whole")
    printed = capsys.readouterr().out
    assert "pass@1" in printed and "letters" in printed
    whole = (tmp_path / "whole" / "responses.jsonl").read_bytes()
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    assert manifest["counts"]["problems"] == 6 and manifest["counts"]["responses"] == 12
    run(here, tmp_path / "killed")
    (tmp_path / "killed" / "manifest.json").unlink()
    (tmp_path / "killed" / "responses.jsonl").write_bytes(whole[:-700])  # in the middle of a line
    run(here, tmp_path / "killed", "--json")
    assert (tmp_path / "killed" / "responses.jsonl").read_bytes() == whole
    again = json.loads((tmp_path / "killed" / "manifest.json").read_text())
    assert again["reports"] == manifest["reports"]
    with pytest.raises(InputError, match="was made differently .*samples: 2 then, 3 now"):
        run(here, tmp_path / "whole", "--samples", "3")


def test_where_nothing_has_failed_nothing_is_asked_again(here, tmp_path, monkeypatch):
    run(here, tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    monkeypatch.setattr(command, "open_teacher", lambda options: pytest.fail("the model was opened"))
    run(here, tmp_path / "out", "--retry-failed")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def test_a_served_model_is_evaluated_the_same_way_and_failures_are_asked_again(here, tmp_path, capsys):
    pytest.importorskip("httpx2", reason="the extra `server` is not installed")
    with FakeServer() as server:
        run(here, tmp_path / "clean", model=server.url)
        seeds = [body["seed"] for body in server.asked]
    with FakeServer(faults={seeds[3]: ["400"]}) as server:
        run(here, tmp_path / "out", model=server.url)
        assert "1 failed and count as wrong: HTTP 400" in capsys.readouterr().out
        with open(tmp_path / "out" / "responses.jsonl", "a") as file:
            file.write('{"id": "killed in the mid')
        run(here, tmp_path / "out", "--retry-failed", model=server.url)
        assert len(server.asked) == 13
    clean, mended = ((tmp_path / name / "responses.jsonl").read_bytes() for name in ("clean", "out"))
    assert clean == mended


def test_a_model_and_problems_must_be_named(here):
    for names in ([], ["model"], ["http://a/v1", "http://b/v1"]):
        with pytest.raises(InputError, match="name a model and problems"):
            command.main(names)
    with pytest.raises(InputError, match="did you mean 'batch_size'"):
        command.main([str(here / "model"), str(here / "p.jsonl"), "--model-option", "batchsize=3"])


# ---------------------------------------------------------------------------------------------- comparing


def write_run(path: Path, rows: list[Response], **parameters) -> Path:
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps({"parameters": parameters}))
    (path / "responses.jsonl").write_text("".join(json.dumps(vars(r)) + "\n" for r in rows))
    return path


def test_comparing_pairs_the_problems(tmp_path, capsys):
    """B solves what A solves and ten more of 100: apart, the intervals of A and B overlap; paired, they do not."""
    a = write_run(tmp_path / "a", [response(str(i), i < 45) for i in range(100)], samples=1)
    b = write_run(tmp_path / "b", [response(str(i), i < 55) for i in range(101)], samples=2)
    (found,), notes = compare(a, b)
    assert (found.count, found.better, found.worse) == (100, 10, 0)
    assert found.difference == pytest.approx(0.1) and 0.04 < found.interval[0] < found.interval[1] < 0.17
    assert notes == [
        "measured differently: samples: 1 then, 2 now",
        "temperature 1: 1 problems are in one of the two only, and left out",
    ]
    command.main(["--compare", str(a), str(b)])
    assert "B is better" in capsys.readouterr().out
    command.main(["--compare", str(a), str(a), "--json"])
    (same,) = json.loads(capsys.readouterr().out)["comparisons"]
    assert same["difference"] == 0 and same["interval"] == [0, 0]


def test_what_cannot_be_compared_is_said(tmp_path):
    a = write_run(tmp_path / "a", [response("1", True)])
    with pytest.raises(InputError, match="no problem is in both"):
        compare(a, write_run(tmp_path / "b", [response("2", True)]))
    with pytest.raises(InputError, match="no temperature in common"):
        compare(a, write_run(tmp_path / "c", [response("1", True, temperature=0.6)]))
    with pytest.raises(InputError, match="it is no finished directory of dasd_engine.evaluate"):
        compare(a, tmp_path)
    (a / "responses.jsonl").write_text('{"uuid": 1}\n')
    with pytest.raises(InputError, match=r"responses\.jsonl:1: is no response"):
        compare(a, a)

"""sample: what is written, resumed and refused; runs that are killed end with the same bytes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_server import STUDENT, FakeServer
from runs import environment
from test_teachers import write_teacher

from dasd_engine.errors import InputError
from dasd_engine.sample import main, request_seed, sample
from dasd_engine.teachers import TeacherOptions

FILES = ("candidates.jsonl", "failures.jsonl")
FAST = {"backoff": 1e-3, "longest_backoff": 2e-3, "probe_every": 5e-3, "concurrency": 4}


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture
def questions(tmp_path) -> str:
    rows = [{"id": f"q{i}", "question": f"{i} + {i} =", "answer": str(2 * i), "task": "sum"} for i in range(6)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "q.jsonl")


def rows(out: Path, name: str = "candidates.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def local(path: Path, **options: object) -> TeacherOptions:
    return TeacherOptions(path=str(path), dtype="fp32", device="cpu", **options)


def server(url: str, **options: object) -> TeacherOptions:
    return TeacherOptions(kind="server", path=str(STUDENT), urls=(url,), **{**FAST, **options})


def run(questions: str, teacher: TeacherOptions, out: Path, **options: object) -> dict:
    asked = {"candidates": 2, "temperatures": (0.6, 1.0), "max_new_tokens": 12, "progress": False, **options}
    return sample(questions, teacher, out, **asked)


def test_rows(questions, teacher_dir, tmp_path):
    manifest = run(questions, local(teacher_dir), tmp_path / "out")
    got = rows(tmp_path / "out")
    # By question, temperature, candidate, whatever finished first.
    assert [(r["id"], r["temperature"], r["candidate"]) for r in got] == [
        (f"q{i}", t, k) for i in range(6) for t in (0.6, 1.0) for k in range(2)
    ]
    first = got[0]
    assert list(first) == [
        "id", "candidate", "temperature", "seed", "messages", "text", "token_ids", "logprobs", "token_ends", "opened",
        "finish_reason", "teacher", "answer", "task",
    ]  # fmt: skip
    assert first["messages"] == [{"role": "user", "content": "0 + 0 ="}]
    assert first["answer"] == "0" and first["task"] == "sum"
    assert first["seed"] == request_seed(0, "q0", 0.6, 0)
    assert first["teacher"]["name"] == "tiny" and first["teacher"]["revision"].startswith("sha256:")
    counts = manifest["counts"]
    assert counts["candidates"] == 24 and counts["failed"] == 0 and counts["questions"] == 6
    assert counts["tokens"] == sum(len(r["token_ids"]) for r in got)
    assert counts["by_temperature"]["1.0"]["candidates"] == 12
    assert manifest["inputs"]["questions"][0]["sha256"] and manifest["inputs"]["teacher"]["files"]
    assert len({r["text"] for r in got}) > 12


def test_a_finished_directory_is_left_alone_and_another_is_refused(questions, teacher_dir, tmp_path, capsys):
    out = tmp_path / "out"
    run(questions, local(teacher_dir), out)
    before = (out / "candidates.jsonl").stat()
    run(questions, local(teacher_dir, batch_size=2), out, progress=True)
    assert "nothing to do" in capsys.readouterr().out
    assert (out / "candidates.jsonl").stat() == before
    with pytest.raises(InputError, match="parameters.seed: 0 then, 1 now"):
        run(questions, local(teacher_dir), out, seed=1)
    with pytest.raises(InputError, match="inputs.teacher.files.model.safetensors"):
        run(questions, local(write_teacher(tmp_path / "tiny", seed=1)), out)
    Path(questions).write_text(json.dumps({"id": "q0", "question": "?"}))
    with pytest.raises(InputError, match=r"inputs\.questions"):
        run(questions, local(teacher_dir), out)


def test_more_candidates_keep_those_that_were_there(questions, teacher_dir, tmp_path):
    run(questions, local(teacher_dir), tmp_path / "two")
    run(questions, local(teacher_dir), tmp_path / "three", candidates=3, temperatures=[1, 0.6], limit=3)
    more = {(r["id"], r["temperature"], r["candidate"]): r for r in rows(tmp_path / "three")}
    kept = [r for r in rows(tmp_path / "two") if r["id"] in ("q0", "q2", "q4")]
    assert len(kept) == 12 and all(more[r["id"], r["temperature"], r["candidate"]] == r for r in kept)


KILLED = """
import os, signal, sys
from dasd_engine import records, sample
from dasd_engine.errors import run_cli
write, left = records.Appender.write, [int(sys.argv.pop(1))]
def counted(self, row):
    if left[0] == 0:  # half a line is in the file
        self._file.write(b'{"id": "q')
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    write(self, row)
records.Appender.write = counted
run_cli(sample.main)
"""


def test_killed_runs_end_with_the_same_bytes(questions, teacher_dir, tmp_path):
    """Killed in the middle of a row, then finished, with another batch size besides."""
    options = ["--candidates", "2", "--max-new-tokens", "12", "--device", "cpu", "--threads", "1", "--quiet"]
    command = [questions, "--teacher", str(teacher_dir), "--out", str(tmp_path / "killed"), *options]
    driver = [sys.executable, "-c", KILLED, "13", *command, "--batch-size", "5"]
    killed = subprocess.run(driver, env=environment(), capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len((tmp_path / "killed/candidates.jsonl").read_bytes().splitlines()) == 14  # 13 rows and half of one
    threads = torch.get_num_threads()
    main(command)
    main([questions, "--teacher", str(teacher_dir), "--out", str(tmp_path / "whole"), *options])
    torch.set_num_threads(threads)
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(rows(tmp_path / "whole")) == 24


def test_a_resumed_run_asks_for_what_is_missing_only(questions, tmp_path):
    """The server goes away for good after nine answers; a second run, elsewhere, asks for the other fifteen."""

    def die(server: FakeServer, body: dict) -> None:
        server.dead = server.dead or server.answered.total() >= 9

    out = tmp_path / "out"
    with FakeServer(on_request=die) as first, pytest.raises(InputError, match="run again to go on"):
        run(questions, server(first.url, concurrency=1, give_up=0.01), out)
    there = rows(out)
    assert len(there) == 9 and not (out / "manifest.json").exists()
    with FakeServer() as second:
        manifest = run(questions, server(second.url), out)
        assert second.answered.total() == 15 and not set(second.answered) & {r["seed"] for r in there}
    got = rows(out)
    assert manifest["counts"]["candidates"] == len({(r["id"], r["temperature"], r["candidate"]) for r in got}) == 24
    assert [r for r in got if r in there] == sorted(there, key=lambda r: (r["id"], r["temperature"], r["candidate"]))


def test_a_resumed_run_needs_the_same_model(questions, tmp_path):
    def die(server: FakeServer, body: dict) -> None:
        server.dead = server.dead or server.answered.total() >= 3

    with FakeServer(on_request=die) as first, pytest.raises(InputError, match="run again"):
        run(questions, server(first.url, concurrency=1, give_up=0.01), tmp_path / "out")
    with FakeServer(model="another") as second, pytest.raises(InputError, match="was begun with the teacher .*fake"):
        run(questions, server(second.url), tmp_path / "out")


def test_failures_are_counted_and_asked_again_only_on_demand(questions, tmp_path):
    bad = {request_seed(0, "q2", 1.0, 1): ["nan"], request_seed(0, "q4", 0.6, 0): ["400"]}
    out = tmp_path / "out"
    with FakeServer(faults=bad) as fake:
        manifest = run(questions, server(fake.url), out)
        assert run(questions, server(fake.url), out) == manifest and len(fake.asked) == 24
    assert manifest["counts"]["failed"] == 2 and manifest["counts"]["candidates"] == 22
    assert manifest["counts"]["failures"] == {
        "HTTP 400: fault #": 1,
        "the logprob of token # is nan, not a finite number up to #": 1,
    }
    assert [(r["id"], r["temperature"], r["candidate"]) for r in rows(out, "failures.jsonl")] == [
        ("q2", 1.0, 1),
        ("q4", 0.6, 0),
    ]
    with FakeServer() as fake:
        manifest = run(questions, server(fake.url), out, retry_failed=True)
        assert len(fake.asked) == 2
    assert manifest["counts"]["failed"] == 0 and len(rows(out)) == 24 and rows(out, "failures.jsonl") == []


def test_a_teacher_that_answers_nothing_is_an_error(questions, tmp_path):
    """It is not asked to the end, and the directory is not finished."""
    seeds = [request_seed(0, f"q{i}", t, k) for i in range(6) for t in (0.6, 1.0) for k in range(10)]
    with FakeServer(faults={seed: ["no logprobs"] for seed in seeds}) as fake:
        with pytest.raises(InputError, match=r"answered nothing so far: the server gives no logprobs.*--retry-failed"):
            run(questions, server(fake.url, concurrency=2), tmp_path / "out", candidates=10)
        assert len(fake.asked) < 60
    assert not (tmp_path / "out/manifest.json").exists()
    few = [request_seed(0, f"q{i}", 1.0, 0) for i in range(6)]
    with FakeServer(faults={seed: ["empty"] for seed in few}) as fake, pytest.raises(InputError, match="text is empty"):
        run(questions, server(fake.url), tmp_path / "few", candidates=1, temperatures=[1.0])
    with FakeServer() as fake:
        manifest = run(
            questions, server(fake.url), tmp_path / "few", candidates=1, temperatures=[1.0], retry_failed=True
        )
    assert manifest["counts"]["candidates"] == 6


def test_two_runs_on_one_directory(questions, tmp_path):
    def second(server_: FakeServer, body: dict) -> None:
        if len(server_.asked) == 1:
            with pytest.raises(InputError, match="another run is writing it") as error:
                run(questions, server(server_.url), tmp_path / "out")
            seen.append(error)

    seen: list = []
    # The request arrives while the first run holds the directory.
    with FakeServer() as fake:
        fake.on_request = second
        fake.lock = _NoLock()  # the second run may ask for the models meanwhile
        run(questions, server(fake.url, concurrency=1), tmp_path / "out")
    assert len(seen) == 1


class _NoLock:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 0}, "candidates = 0"),
        ({"temperatures": []}, r"temperatures = \(\)"),
        ({"temperatures": [1.0, -1]}, "temperatures = "),
        ({"temperatures": [1.0, 1]}, "one is named twice"),
        ({"temperatures": [0.0]}, "temperature 0 always gives the same response"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_k": -1}, "top_k = -1"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"limit": 0}, "limit = 0"),
    ],
)
def test_bad_options_are_named_before_anything_is_written(questions, teacher_dir, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run(questions, local(teacher_dir), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_seeds_fit_json_and_differ():
    seeds = {request_seed(s, id, t, k) for s in (0, 1) for id in ("a", "b") for t in (0.6, 1.0) for k in range(50)}
    assert len(seeds) == 400 and all(0 <= seed < 2**53 for seed in seeds)
    assert request_seed(0, "a", 1.0, 3) == 7667768041180518  # runs must be repeatable with later releases


def test_dry_run_prints_counts_and_writes_nothing(questions, teacher_dir, tmp_path, capsys):
    main([questions, "--teacher", str(teacher_dir), "--out", str(tmp_path / "out"), "--candidates", "3", "--dry-run"])
    said = capsys.readouterr().out
    assert "6 (sum 6)" in said and "36: 3 candidates at each temperature of 0.6, 1" in said
    assert "tokens in the mean" in said and "at most 1,179,648 (32,768 each)" in said
    assert not (tmp_path / "out").exists()


def test_command_line_of_a_server(questions, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_KEY", "sk-secret-1")
    with FakeServer(key="sk-secret-1") as fake:
        main(
            [questions, "--teacher", fake.url, "--template", str(STUDENT), "--out", str(tmp_path / "out"), "--limit",
             "2", "--temperature", "1", "--candidates", "2", "--api-key-env", "FAKE_KEY", "--teacher-name", "big",
             "--revision", "r7"]
        )  # fmt: skip
    said = capsys.readouterr()
    assert "4 responses to 2 questions" in said.out
    got = rows(tmp_path / "out")
    assert len(got) == 4 and all(r["teacher"] == {"name": "big", "revision": "r7"} for r in got)
    assert all(r["text"].startswith("<think>") for r in got)
    written = "".join(file.read_text() for file in (tmp_path / "out").iterdir())
    assert "sk-secret" not in written + said.out + said.err


def test_an_error_of_the_command_is_one_line(questions, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dasd_engine.sample", questions, "--teacher", str(tmp_path / "none"), "--out",
         str(tmp_path / "out")],
        capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: teacher ") and "Traceback" not in done.stderr

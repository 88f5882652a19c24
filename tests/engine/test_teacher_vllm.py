"""The teachers `vllm` and `server` against a real vLLM, on an exported model of the engine.

    DASD_VLLM_PYTHON=/path/to/venv/bin/python pytest -m vllm tests/engine/test_teacher_vllm.py

vLLM pins its own versions of everything, so it lives in an environment of its own; the tests run it from there.
"""

import json
import subprocess
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from test_teachers import ask, check_logprobs, requests, write_teacher
from vllm_server import PYTHON, environment, marks, served

from dasd_engine.chat import Chat
from dasd_engine.sample import sample
from dasd_engine.teachers import Request, Sampled, TeacherOptions, open_teacher

pytestmark = marks

OFFLINE = """
import json, sys
from contextlib import closing
from dataclasses import asdict
from dasd_engine.teachers import Request, TeacherOptions, open_teacher
asked = [Request(**row) for row in json.load(open(sys.argv[2]))]
with closing(open_teacher(TeacherOptions(kind="vllm", path=sys.argv[1], dtype="fp32", batch_size=4))) as teacher:
    results = [(r.key, type(found).__name__, asdict(found)) for r, found in teacher.sample(iter(asked))]
    some = teacher.sample(iter(asked))
    next(some)
    some.close()  # stopped half way, and asked again
    again = [(r.key, type(found).__name__, asdict(found)) for r, found in teacher.sample(iter(asked[:2]))]
json.dump([results, again], open(sys.argv[3], "w"))
"""


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture(scope="module")
def url(teacher_dir):
    with served(teacher_dir, "tiny") as url:
        yield url


def test_offline_engine(teacher_dir, tmp_path):
    """The exported directory loads; greedy tokens are the engine's, and the logprobs of whatever is sampled too. A
    request draws the same in another batch, up to its rounding; what is refused is said."""
    asked = requests(10)
    asked.append(replace(asked[0], key="long", messages=[{"role": "user", "content": "9 " * 2000}]))
    asked.append(replace(asked[0], key="prefix", prefix="<think>\n3 + 4"))
    (tmp_path / "asked.json").write_text(json.dumps([asdict(request) for request in asked]))
    done = subprocess.run(
        [PYTHON, "-c", OFFLINE, str(teacher_dir), str(tmp_path / "asked.json"), str(tmp_path / "got.json")],
        env=environment(), capture_output=True, text=True, timeout=600, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results, again = json.loads((tmp_path / "got.json").read_text())
    assert sorted(key for key, _, _ in results) == sorted(request.key for request in asked)
    got = {key: (kind, fields) for key, kind, fields in results}
    assert got["long"][0] == "Failed" and "positions" in got["long"][1]["reason"]
    ours = ask(teacher_dir, [request for request in asked if request.key != "long"])
    for request in asked:
        if request.key != "long":
            check_response(teacher_dir, request, Sampled(**got[request.key][1]), ours[request.key])
    assert {key: fields["token_ids"] for key, _, fields in again} == {k: got[k][1]["token_ids"] for k in ("k0", "k1")}


def check_response(directory: Path, request: Request, theirs: Sampled, ours: Sampled, chat: bool = False) -> None:
    """`chat`: of the chat interface. It keeps back the first bytes of a character that the limit cut, and does not tell
    what its prompt ends with: thinking that is closed and was never opened counts as opened there."""
    assert isinstance(theirs, Sampled), theirs
    if request.temperature == 0:
        assert theirs.text == ours.text and theirs.finish_reason == ours.finish_reason
        assert theirs.token_ids == ours.token_ids and theirs.token_ends == ours.token_ends
    check_logprobs(directory, request, theirs, 1e-3)
    stop = theirs.finish_reason == "stop"
    spoken = theirs.token_ids[:-1] if stop else theirs.token_ids
    spelt = Chat.load(directory).tokenizer.decode(spoken, skip_special_tokens=False)
    begun = ""
    if chat:
        spelt = spelt.rstrip("\ufffd") if theirs.finish_reason == "length" else spelt
        before, closed, _ = spelt.partition("</think>")
        begun = "<think>\n" if closed and "<think>" not in before else ""
    assert theirs.text == begun + spelt and theirs.opened == len(begun)
    assert theirs.token_ends[-1] == len(theirs.text.encode())


@pytest.mark.parametrize("interface", ["completions", "chat"])
def test_server(teacher_dir, url, interface):
    path = str(teacher_dir) if interface == "completions" else ""
    options = TeacherOptions(kind="server", path=path, urls=(url,))
    asked = requests(12)
    asked.append(replace(asked[0], key="prefix", prefix="<think>\n3 + 4"))
    with closing(open_teacher(options)) as teacher:
        assert teacher.name == "tiny"
        results = {request.key: result for request, result in teacher.sample(iter(asked))}
    assert len(results) == 13
    ours = ask(teacher_dir, asked)
    for request in asked:
        theirs = results[request.key]
        if interface == "chat" and not isinstance(theirs, Sampled):
            # Tokens that are no UTF-8 alone: the chat interface tells no bytes of them.
            assert "do not spell" in theirs.reason and "\ufffd" in "".join(o.text for o in ours.values())
            continue
        check_response(teacher_dir, request, theirs, ours[request.key], chat=interface == "chat")


def test_sample_from_a_server(teacher_dir, url, tmp_path):
    """The whole command: every row's logprobs are those of a plain forward of its ids."""
    out = tmp_path / "out"
    (tmp_path / "q.jsonl").write_text(
        "".join(json.dumps({"id": f"q{i}", "question": f"{i} ="}) + "\n" for i in range(4))
    )
    teacher = TeacherOptions(kind="server", path=str(teacher_dir), urls=(url,))
    manifest = sample(
        str(tmp_path / "q.jsonl"), teacher, out, candidates=3, temperatures=(0.6, 1.0), max_new_tokens=16,
        progress=False,
    )  # fmt: skip
    assert manifest["counts"]["candidates"] == 24 and manifest["counts"]["failed"] == 0
    for line in (out / "candidates.jsonl").read_text().splitlines():
        row = json.loads(line)
        system = {"role": "system", "content": "You are a helpful assistant."}
        request = Request("", [system, *row["messages"]], row["temperature"], row["seed"], 16)
        names = ("text", "opened", "token_ids", "logprobs", "token_ends", "finish_reason")
        check_logprobs(teacher_dir, request, Sampled(**{name: row[name] for name in names}), 1e-3)

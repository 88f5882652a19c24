"""prepare: what it writes is what Chat encodes, in the order of the rows, whatever the number of workers; bad input."""

import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from chats import assistant, marked, system, user, write_model

from dasd_engine import prepare as prepare_module
from dasd_engine import sources
from dasd_engine.chat import Chat
from dasd_engine.errors import InputError
from dasd_engine.prepare import prepare
from dasd_engine.shards import Shards

THINKING = "<think>\nAdd {0} to it.\n</think>\n\nIt's {0}."


def rows(count):
    """Rows of the released shape, of different lengths."""
    return [
        {
            "uuid": f"u{i}",
            "input": f"What is {i}+{i}?",
            "output": THINKING.format(2 * i) + " é" * (i % 7),
            "domain": "math",
            "meta": json.dumps({"answer": str(2 * i)}),
        }
        for i in range(count)
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "qwen3")


def texts(out, model):
    """Every document with its trained parts marked."""
    shards, tokenizer = Shards.open(out), Chat.load(model).tokenizer
    found = []
    for index in range(len(shards)):
        begin, end = shards.offsets[index : index + 2]
        spans = [tuple(row[1:]) for row in shards.loss_spans.tolist() if row[0] == index]
        found.append(marked(tokenizer, shards.tokens[begin:end].tolist(), spans))
    return found


def test_shards_hold_what_chat_encodes(model, tmp_path):
    conversation = [user("Hi"), assistant("Hello"), user("1+1?"), assistant("2")]
    sources = [
        write_jsonl(tmp_path / "a.jsonl", rows(3)),
        write_jsonl(
            tmp_path / "b.jsonl", [{"messages": conversation, "uuid": "c"}, {"prompt": "P", "completion": "C"}]
        ),
    ]
    manifest = prepare(sources, model, tmp_path / "out", system="Be brief.", quiet=True)
    shards, chat = Shards.open(tmp_path / "out"), Chat.load(model)
    messages = [[user(row["input"]), assistant(row["output"])] for row in rows(3)]
    for index, expected in enumerate([*messages, conversation, [user("P"), assistant("C")]]):
        ids, spans = chat.encode(expected, system="Be brief.")
        begin, end = shards.offsets[index : index + 2]
        assert shards.tokens[begin:end].tolist() == ids
        assert [tuple(row[1:]) for row in shards.loss_spans.tolist() if row[0] == index] == spans
    assert shards.meta(1) == {
        "file": str(sources[0]), "line": 2, "uuid": "u1", "domain": "math", "meta": '{"answer": "2"}'
    }  # fmt: skip
    assert shards.meta(3) == {"file": str(sources[1]), "line": 1, "uuid": "c"}
    assert shards.meta(4) == {"file": str(sources[1]), "line": 2}
    assert manifest == shards.manifest
    counts = manifest["counts"]
    assert (counts["rows"], counts["documents"], counts["loss_spans"], counts["bad_rows"]) == (5, 5, 6, 0)
    trained = sum(end - max(begin, 1) for _, begin, end in shards.loss_spans.tolist())
    assert counts["tokens"] == len(shards.tokens) and counts["trained_tokens"] == trained
    assert manifest["inputs"][0] == {
        "file": str(sources[0]), "bytes": sources[0].stat().st_size,
        "sha256": hashlib.sha256(sources[0].read_bytes()).hexdigest(),
    }  # fmt: skip
    assert manifest["parameters"] == {"context": 65536, "system": "Be brief.", "skip_bad": False}
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256((model / "tokenizer.json").read_bytes()).hexdigest()
    assert manifest["wall_seconds"] > 0 and manifest["versions"]["tokenizers"]


def test_the_workers_do_not_change_the_output(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BATCH_BYTES", 2000)  # some thirty batches
    data = rows(300)
    data[120] = {"input": "x"}
    data[250]["output"] = ""
    source = write_jsonl(tmp_path / "rows.jsonl", data)
    hashes = {}
    for workers in (1, 2, 3):
        out = tmp_path / f"out{workers}"
        manifest = prepare([source], model, out, context=60, skip_bad=True, workers=workers, quiet=True)
        files = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        hashes[workers] = (files, (out / "bad.jsonl").read_bytes(), manifest["counts"])
    assert hashes[1] == hashes[2] == hashes[3]
    assert hashes[1][2]["dropped"]["too_long"] > 0
    with pytest.raises(InputError, match=r"rows.jsonl:121: output: is missing; the row has input \(--skip-bad"):
        prepare([source], model, tmp_path / "strict", workers=3, quiet=True)
    assert not any(entry.name.startswith((".", "strict")) for entry in tmp_path.iterdir())


def test_skip_bad_writes_the_rows_aside(model, tmp_path):
    source = tmp_path / "rows.jsonl"
    good = json.dumps(rows(1)[0]).encode() + b"\n"
    source.write_bytes(
        good + b'{"input": \n' + good + b'{"input": "Q", "output": "\xff"}\n\n{"input": "Q", "output": ""}\n'
    )
    with pytest.raises(InputError, match=r"rows.jsonl:2: is not JSON: .*\(--skip-bad leaves such rows out\)"):
        prepare([source], model, tmp_path / "out", quiet=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["rows.jsonl"]
    manifest = prepare([source], model, tmp_path / "out", skip_bad=True, quiet=True)
    assert (manifest["counts"]["documents"], manifest["counts"]["bad_rows"]) == (2, 3)
    bad = [json.loads(line) for line in (tmp_path / "out" / "bad.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["line"]) for entry in bad] == [(str(source), 2), (str(source), 4), (str(source), 6)]
    assert "is not JSON" in bad[0]["reason"] and "is not UTF-8" in bad[1]["reason"] and "is empty" in bad[2]["reason"]


def test_documents_longer_than_the_context(model, tmp_path):
    data = rows(3)
    data[1]["output"] = "<think>\n" + "long " * 200 + "</think>\n\nend"
    source = write_jsonl(tmp_path / "rows.jsonl", data)
    manifest = prepare([source], model, tmp_path / "out", context=100, quiet=True)
    assert manifest["counts"]["dropped"] == {"too_long": 1}
    shards = Shards.open(tmp_path / "out")
    assert [shards.meta(index)["line"] for index in range(len(shards))] == [1, 3]
    longest = int(shards.lengths.max())  # the limit itself fits
    assert prepare([source], model, tmp_path / "fits", context=longest, quiet=True)["counts"]["documents"] == 2
    with pytest.raises(
        InputError, match="no document is left of 3 rows: 0 bad, 3 documents longer than the context of 9"
    ):
        prepare([source], model, tmp_path / "none", context=9, quiet=True)


def test_conversations_whose_history_is_rewritten(model, tmp_path):
    turns = [system("S"), user("Q"), assistant(THINKING.format(1)), user("R"), assistant(THINKING.format(2))]
    source = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}])
    manifest = prepare([source], model, tmp_path / "out", quiet=True)
    assert manifest["counts"]["split_rows"] == 1
    first, second = texts(tmp_path / "out", model)
    assert first.endswith("⟦" + turns[2]["content"] + "<|im_end|>⟧")
    assert second.count("⟦") == 1 and second.endswith("⟦" + turns[4]["content"] + "<|im_end|>⟧")
    shards = Shards.open(tmp_path / "out")
    assert [shards.meta(index)["part"] for index in (0, 1)] == [0, 1]


def test_the_same_again_does_nothing(model, tmp_path, capsys):
    source = write_jsonl(tmp_path / "rows.jsonl", rows(5))
    manifest = prepare([source], model, tmp_path / "out", quiet=True)
    before = {entry: entry.stat().st_mtime_ns for entry in (tmp_path / "out").iterdir()}
    source.rename(tmp_path / "moved.jsonl")  # the same contents under another name
    assert prepare([tmp_path / "moved.jsonl"], model, tmp_path / "out") == manifest
    assert "nothing to do" in capsys.readouterr().out
    assert {entry: entry.stat().st_mtime_ns for entry in (tmp_path / "out").iterdir()} == before


def test_another_set_in_the_same_place_says_what_changed(model, tmp_path):
    source, out = write_jsonl(tmp_path / "rows.jsonl", rows(5)), tmp_path / "out"
    prepare([source], model, out, quiet=True)
    with pytest.raises(InputError, match=r"out: was prepared differently \(context: 65536 then, 99 now\); remove it"):
        prepare([source], model, out, context=99, quiet=True)
    with pytest.raises(InputError, match="inputs: 1 files then, 2 now"):
        prepare([source, source], model, out, quiet=True)
    other = write_model(tmp_path / "llama3", "llama3")
    with pytest.raises(InputError, match="sha256: another one then.*template: another one then"):
        prepare([source], other, out, quiet=True)
    write_jsonl(source, rows(4))
    with pytest.raises(InputError, match="rows.jsonl: its contents have changed"):
        prepare([source], model, out, quiet=True)
    with pytest.raises(InputError, match="exists and is not a shard directory"):
        prepare([source], model, tmp_path, quiet=True)
    with pytest.raises(InputError, match="exists and is not a shard directory"):
        prepare([source], model, source, quiet=True)


def test_shares_of_trained_tokens_that_cannot_be(model, tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", rows(3))
    silent = write_model(tmp_path / "silent", chat_template="{% for m in messages if m.role == 'assistant' %}"
                         "{{ m.content }}<|im_end|>{% endfor %}")  # fmt: skip
    with pytest.raises(InputError, match="100 % of the tokens would be trained: the chat template writes no prompt"):
        prepare([source], silent, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_bad_arguments(model, tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", rows(1))
    with pytest.raises(InputError, match="context 1: "):
        prepare([source], model, tmp_path / "out", context=1)
    with pytest.raises(InputError, match="workers 0: "):
        prepare([source], model, tmp_path / "out", workers=0)
    with pytest.raises(InputError, match="tokenizer_config.json: no such file; give the directory of a"):
        prepare([source], tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="out: cannot be written: .*Not a directory"):
        prepare([source], model, source / "out")
    prepare(source, model, tmp_path / "single", quiet=True)  # one name need not be a list
    assert len(Shards.open(tmp_path / "single")) == 1


def test_a_template_that_fails_on_a_row(tmp_path):
    fussy = "{% if messages[1].content == 'What is 1+1?' %}{{ raise_exception('no sums') }}{% endif %}"
    model = write_model(tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "chat_template.jinja").write_text(fussy + config["chat_template"])
    source = write_jsonl(tmp_path / "rows.jsonl", rows(3))
    with pytest.raises(
        InputError, match=r"rows.jsonl:2: .*chat_template.jinja: fails on roles \[system, user\]: no sums"
    ):
        prepare([source], model, tmp_path / "out", quiet=True)


def test_a_worker_that_dies_is_reported(model, tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "rows.jsonl", rows(50))
    monkeypatch.setenv("PYTHONHASHSEED", "not a number")  # no interpreter starts with this
    with pytest.raises(RuntimeError, match="a worker of prepare ended with exit code 1"):
        prepare([source], model, tmp_path / "out", workers=2, quiet=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["rows.jsonl"]


def test_a_full_disk(model, tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", rows(2000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # a write behind this fails, as on a full disk
    try:
        with pytest.raises(InputError, match="out: cannot be written: .*File too large"):
            prepare([source], model, tmp_path / "out", quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["rows.jsonl"]


def command(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"}
    line = [sys.executable, "-m", "dasd_engine.prepare", *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options)


def test_the_command(model, tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", rows(20))
    process = command(source, "--model", model, "--out", tmp_path / "out", "--context", 60)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"A sample, {source}:1; trained tokens are" in out
    assert "<|im_start|>assistant\n⟦<think>\nAdd 0 to it.\n</think>\n\nIt's 0.<|im_end|>⟧" in out
    assert re.search(r"out: \d+ documents of 20 rows, [\d,]+ tokens, \d\d\.\d% of them trained", out)
    assert re.search(r"dropped, being longer than 60 tokens: \d+ documents", out)
    assert "\x1b" not in out and err == ""
    process = command(source, "--model", model, "--out", tmp_path / "out")
    out, err = process.communicate()
    assert process.returncode == 2 and out == ""
    assert err.startswith("error: ") and "context: 60 then, 65536 now" in err and err.count("\n") == 1


KILLED = """
import os, signal, sys
from dasd_engine.prepare import prepare
from dasd_engine.shards import ShardWriter
add = ShardWriter.add
def add_and_die(writer, *document):
    add(writer, *document)
    if writer.documents == 20:
        os.kill(os.getpid(), signal.SIGKILL)
ShardWriter.add = add_and_die
prepare([sys.argv[1]], sys.argv[2], sys.argv[3], workers=2, quiet=True)
"""


def test_a_killed_run_leaves_nothing_that_looks_complete(model, tmp_path):
    source, out, partial = write_jsonl(tmp_path / "rows.jsonl", rows(50)), tmp_path / "out", tmp_path / ".out.partial"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # The output ends only when the last worker has gone too, for they hold it as well.
    line = [sys.executable, "-c", KILLED, source, model, out]
    killed = subprocess.run(line, env=environment, stderr=subprocess.PIPE, text=True)
    assert (killed.returncode, killed.stderr) == (-signal.SIGKILL, "")
    assert partial.exists() and not out.exists()
    with pytest.raises(InputError, match="not a finished shard directory"):
        Shards.open(partial)
    assert prepare([source], model, out, quiet=True)["counts"]["documents"] == 50
    assert len(Shards.open(out)) == 50 and not partial.exists()


def test_progress_lines_without_a_terminal(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare_module, "PLAIN_SECONDS", -1.0)
    source = write_jsonl(tmp_path / "rows.jsonl", rows(5))
    prepare([source, source], model, tmp_path / "out")
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert [line.split(" read")[0] for line in lines] == ["prepare: 50%", "prepare: 100%"]
    assert "10 documents" in lines[1]
    prepare([source], model, tmp_path / "quiet", quiet=True)
    assert capsys.readouterr() == ("", "")


def test_relative_paths(model, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "rows.jsonl", rows(3))
    monkeypatch.chdir(tmp_path)
    prepare(["rows.jsonl"], os.path.relpath(model), Path("out"), workers=2, quiet=True)
    assert len(Shards.open(tmp_path / "out")) == 3

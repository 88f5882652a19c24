"""Sources: every kind of file and row, and for every kind of damage an error with the place and the remedy."""

import gzip
import io
import json
import sys
from types import SimpleNamespace

import pytest
from chats import assistant, system, user

from dasd_engine import sources
from dasd_engine.errors import InputError
from dasd_engine.sources import as_context, find_sources, parse_row, read_batches

ROWS = [{"uuid": f"u{i}", "input": f"question {i}", "output": f"<think>é</think>answer {i}"} for i in range(100)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def read(*names):
    """(file, line, row as parsed JSON) of everything."""
    found = []
    for source in find_sources(names):
        for batch in read_batches(source):
            for line, data in batch.rows:
                found.append((batch.file, line, data if isinstance(data, dict) else json.loads(data)))
            assert 0 < batch.position <= source.size
        assert batch.position == source.size
    return found


def zst(data):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


def write_parquet(path, rows, **options):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path, **options)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_every_kind_of_file(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BATCH_BYTES", 1000)  # several batches
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        write_parquet(path, ROWS, row_group_size=7)
    else:
        half = len(LINES) // 2  # two members, two frames
        pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zst}[kind]
        path.write_bytes(pack(LINES[:half]) + pack(LINES[half:]))
    assert read(path) == [(str(path), i + 1, row) for i, row in enumerate(ROWS)]


def test_blank_lines_mark_and_last_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}')
    assert read(str(path), path) == [(str(path), 1, {"a": 1}), (str(path), 4, {"a": 2})] * 2


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("rows.jsonl", b"", "rows.jsonl: is empty"),
        ("rows.jsonl", b"\n \n", "rows.jsonl: has no rows"),
        ("rows.jsonl.gz", gzip.compress(b"", mtime=0), "rows.jsonl.gz: has no rows"),
        ("rows.json", b"{}", "rows.json: unknown kind of file; expected .jsonl"),
        ("rows.jsonl.gz", gzip.compress(LINES, mtime=0)[:-40], "rows.jsonl.gz: cannot be read behind line"),
        ("rows.jsonl.gz", LINES, "rows.jsonl.gz: cannot be read behind line 0: Not a gzipped file"),
        ("rows.jsonl.gz", b"\x1f\x8b\x08" + bytes(50), "rows.jsonl.gz: cannot be read"),
        ("rows.parquet", b"PAR1" + bytes(100), "rows.parquet: cannot be read behind row 0"),
    ],
)
def test_bad_files(name, content, message, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("cut", [-1, -40, 5])
def test_zst_cut_short(cut, tmp_path):
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(zst(LINES)[:cut])
    with pytest.raises(InputError, match=r"rows.jsonl.zst: cannot be read behind line \d+: the file ends inside"):
        read(path)
    path.write_bytes(LINES)
    with pytest.raises(InputError, match=r"rows.jsonl.zst: cannot be read behind line 0"):
        read(path)


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST_LINE", 1 << 20)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n"' + b"x" * (1 << 20))
    with pytest.raises(InputError, match="rows.jsonl:2: is longer than 1 MiB"):
        read(path)


def test_names_that_are_no_files(tmp_path):
    with pytest.raises(InputError, match="is a directory; name its files"):
        find_sources([tmp_path])
    with pytest.raises(InputError, match="none.jsonl: no such file"):
        find_sources([tmp_path / "none.jsonl"])
    with pytest.raises(InputError, match="just-a-word: no such file"):
        find_sources(["just-a-word"])


def test_parquet_columns(tmp_path):
    path = tmp_path / "rows.parquet"
    write_parquet(path, [{"text": "x", "id": 3}])
    with pytest.raises(InputError, match="rows.parquet: has the columns text, id; expected"):
        read(path)
    write_parquet(path, [{"messages": [user("Q"), assistant("A")], "other": 1, "uuid": None}])
    [(_, line, row)] = read(path)
    assert line == 1 and row == {"messages": [user("Q"), assistant("A")], "uuid": None}
    assert parse_row(row).messages == [user("Q"), assistant("A")]


def test_packages_that_are_not_installed(tmp_path, monkeypatch):
    for name, package in (("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")):
        (tmp_path / name).write_bytes(b"x")
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError, match=f"needs .*pip install {package}"):
            read(tmp_path / name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"owner/name: no such file here, and .*pip install 'dasd-engine\[hub\]'"):
        find_sources(["owner/name"])


class Hub:
    """Stands for huggingface_hub: one data set, whose files are in memory."""

    files = {"README.md": b"#", "train/a.jsonl": LINES[:0] + b'{"a": 1}\n', "train/b.jsonl": b'{"a": 2}\n',
             "test/c.jsonl": b'{"a": 3}\n'}  # fmt: skip

    class HfApi:
        def dataset_info(self, repo, revision, files_metadata):
            if repo != "owner/name":
                raise RuntimeError("404 Client Error")
            siblings = [SimpleNamespace(rfilename=name, size=len(data)) for name, data in Hub.files.items()]
            return SimpleNamespace(sha=f"commit-of-{revision}", siblings=siblings)

    class HfFileSystem:
        def open(self, path, mode, revision):
            assert mode == "rb" and revision.startswith("commit-of-")
            return io.BytesIO(Hub.files[path.removeprefix("datasets/owner/name/")])


def test_hub_data_sets(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    one, two = ("owner/name/train/a.jsonl", 1, {"a": 1}), ("owner/name/train/b.jsonl", 1, {"a": 2})
    assert read("owner/name") == [one, two]
    assert read("owner/name:test/*") == [("owner/name/test/c.jsonl", 1, {"a": 3})]
    assert read("owner/name@v1:train/b.jsonl") == [two]
    identity = find_sources(["owner/name@v1"])[0].identity()
    assert identity == {"file": "owner/name/train/a.jsonl", "bytes": 9, "revision": "commit-of-v1"}
    with pytest.raises(InputError, match=r"owner/name:x\*: no file of the data set fits .*it has README.md, test/c"):
        find_sources(["owner/name:x*"])
    with pytest.raises(InputError, match="other/name: no such file here, and not found on the hub: 404"):
        find_sources(["other/name"])


@pytest.mark.parametrize(
    "row, messages",
    [
        ({"messages": [system("S"), user("Q"), assistant("A")]}, [system("S"), user("Q"), assistant("A")]),
        ({"messages": [{**user("Q"), "name": "x", "tool_calls": None}]}, [user("Q")]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            [user("ab")],
        ),
        ({"input": "Q", "output": "A"}, [user("Q"), assistant("A")]),
        ({"prompt": "Q", "completion": "A"}, [user("Q"), assistant("A")]),
        (
            {"prompt": [system("S"), user("Q")], "completion": [assistant("A")]},
            [system("S"), user("Q"), assistant("A")],
        ),
        ({"messages": None, "tools": [], "prompt": [user("Q")], "completion": "A"}, [user("Q"), assistant("A")]),
    ],
)
def test_row_shapes(row, messages):
    assert parse_row(row).messages == messages
    assert parse_row(json.dumps(row).encode()).messages == messages


def test_turns_of_weight_0_are_not_trained():
    turns = [user("Q"), assistant("A"), user("R")]
    row = {"messages": [*as_context(turns), assistant("B")]}
    assert parse_row(row).messages == [*turns, assistant("B")]
    assert parse_row(row).untrained == (1,)
    row["messages"][3] = {**assistant("B"), "weight": 1}
    assert parse_row(row).untrained == (1,)


def test_of_a_pair_the_completion_alone_is_trained():
    row = {"prompt": [user("Q"), assistant("A"), user("R")], "completion": [assistant("B"), user("S"), assistant("C")]}
    assert parse_row(row).untrained == (1,)
    row["completion"][0]["weight"] = 0
    assert parse_row(row).untrained == (1, 3)
    row["completion"][0]["weight"] = 2
    with pytest.raises(InputError, match=r"completion\[0\].weight: is 2, expected 0 or 1"):
        parse_row(row)


def test_what_is_kept_of_a_row():
    row = {"uuid": "u", "input": "Q", "output": " A\n", "domain": "math", "meta": '{"answer": "1"}', "other": 3}
    parsed = parse_row(row)
    assert parsed.meta == {"uuid": "u", "domain": "math", "meta": '{"answer": "1"}'}
    assert parsed.messages[1]["content"] == " A\n"


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"input": "Q", ', "is not JSON: "),
        (b"[" * 100_000, "is not JSON: "),
        (b'{"input": "\xff"}', "is not UTF-8 at byte 12 of the line"),
        (b"[1]", "is a list, expected an object"),
        (b'"text"', "is a string, expected an object"),
        (b'{"text": "x", "id": 1}', 'has the fields text, id; expected "messages"'),
        (b"{}", r"has the fields \(none\); expected"),
        (b'{"input": "Q"}', "output: is missing; the row has input"),
        (b'{"output": "A"}', "input: is missing; the row has output"),
        (b'{"messages": [{"role": "user", "content": "Q", "weight": 2}]}', r"s\[0\].weight: is 2, expected 0 or 1"),
        (b'{"prompt": "Q"}', "completion: is missing"),
        (b'{"input": "Q", "output": null}', "output: is missing or null, expected a string"),
        (b'{"input": 3, "output": "A"}', "input: is a number, expected a string"),
        (b'{"input": true, "output": "A"}', "input: is true or false, expected a string"),
        (b'{"input": "Q", "output": "A\\ud83d"}', "output: has half a surrogate pair at character 2"),
        (b'{"prompt": [], "completion": "A"}', "prompt: is an empty list, expected a list of messages"),
        (b'{"messages": "x"}', "messages: is a string, expected a list of messages"),
        (b'{"messages": [3]}', r"messages\[0\]: is a number, expected an object"),
        (b'{"messages": [{"from": "human", "value": "x"}]}', r"messages\[0\].role: is missing, expected one of system"),
        (b'{"messages": [{"role": "bot", "content": "x"}]}', r"messages\[0\].role: is 'bot'"),
        (b'{"messages": [{"role": "user"}]}', r"messages\[0\].content: is missing or null"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', r"content\[0\]: only parts of type text"),
        (b'{"messages": [{"role": "user", "content": {}}]}', r"messages\[0\].content: is an object"),
        (
            b'{"messages": [{"role": "assistant", "content": "A", "reasoning_content": "t"}]}',
            r"messages\[0\].reasoning_content: would be lost; write it into content",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}',
            r"messages\[0\].tool_calls: tool calls are not supported",
        ),
        (
            b'{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}',
            "tools: tool definitions are not supported",
        ),
    ],
)
def test_bad_rows(line, message):
    with pytest.raises(InputError, match=message):
        parse_row(line)

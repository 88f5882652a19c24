"""Output directories: one run at a time, torn lines dropped, only what was asked goes on."""

import json

import pytest

from dasd_engine.errors import InputError
from dasd_engine.records import OutputDirectory, differences, read_finished, read_rows, whole_lines

ASKED = {"inputs": [{"file": "q.jsonl", "sha256": "ab"}], "parameters": {"seed": 1}}


def test_a_cut_line_is_dropped_and_the_run_goes_on(tmp_path):
    with OutputDirectory(tmp_path / "out", ASKED) as output:
        rows = output.appender("rows.jsonl")
        rows.write({"id": "a", "text": "é\n"})
        rows.write({"id": "b"})
    path = tmp_path / "out/rows.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id": "c", "te')
    with OutputDirectory(tmp_path / "out", ASKED) as output:
        assert output.manifest is None
        rows = output.appender("rows.jsonl")
        assert [row["id"] for _, row in read_rows(rows.path)] == ["a", "b"]
        rows.write({"id": "c"})
        output.finish({"counts": {"rows": 3}})
    assert [row["id"] for _, row in read_rows(path)] == ["a", "b", "c"]
    manifest = read_finished(tmp_path / "out", "sample")
    assert manifest["counts"] == {"rows": 3} and manifest["parameters"] == {"seed": 1}


@pytest.mark.parametrize("size", [0, 1, 5, (1 << 20) + 7, (2 << 20) + 1])
def test_whole_lines_looks_back_over_blocks(tmp_path, size):
    path = tmp_path / "rows"
    path.write_bytes(b"a\nb\n" + b"x" * size)
    assert whole_lines(path) == 4
    path.write_bytes(b"x" * size)
    assert whole_lines(path) == 0


def test_other_parameters_and_other_contents_are_refused(tmp_path):
    with OutputDirectory(tmp_path / "out", ASKED):
        pass
    with (
        pytest.raises(InputError, match="parameters.seed: 1 then, 2 now"),
        OutputDirectory(tmp_path / "out", {**ASKED, "parameters": {"seed": 2}}),
    ):
        pass
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    with pytest.raises(InputError, match="something else"), OutputDirectory(tmp_path / "full", ASKED):
        pass


def test_two_runs_on_one_directory(tmp_path):
    with (
        OutputDirectory(tmp_path / "out", ASKED),
        pytest.raises(InputError, match="another run"),
        OutputDirectory(tmp_path / "out", ASKED),
    ):
        pass


def test_a_directory_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file/out"):
        with pytest.raises(InputError, match=f"{path.name}: cannot be written"), OutputDirectory(path, ASKED):
            pass


def test_errors_name_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n[2]\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:3: must be a JSON object"):
        list(read_rows(path))
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:2: is not UTF-8"):
        list(read_rows(path))
    with pytest.raises(InputError, match="has not finished"):
        read_finished(tmp_path, "score")


def test_nan_is_never_written(tmp_path):
    with OutputDirectory(tmp_path / "out", ASKED) as output, pytest.raises(ValueError, match="JSON"):
        output.appender("rows.jsonl").write({"logprob": float("nan")})
    assert (tmp_path / "out/rows.jsonl").read_bytes() == b""


def test_differences_are_said_in_words():
    assert differences({"a": {"b": 1}}, {"a": {"b": 1}}) == []
    assert differences({"a": {"b": 1}}, {"a": {"c": 2}}) == ["a.b: 1 then, null now", "a.c: null then, 2 now"]
    json.dumps(differences({"a": [1] * 100}, {"a": 2}))

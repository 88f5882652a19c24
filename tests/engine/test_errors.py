"""run_cli: what ends a command, and how."""

import subprocess
import sys

import pytest

from dasd_engine.errors import InputError, run_cli


def test_an_input_error_is_one_line(capsys):
    def main():
        raise InputError("a.jsonl:3: is empty")

    with pytest.raises(SystemExit) as end:
        run_cli(main)
    assert end.value.code == 2 and capsys.readouterr().err == "error: a.jsonl:3: is empty\n"


@pytest.mark.parametrize("lines", [1000, 100_000])  # fewer and more than a pipe holds
def test_a_reader_that_has_enough_ends_a_command_quietly(lines):
    code = f"from dasd_engine.errors import run_cli\nrun_cli(lambda: print('a line\\n' * {lines}))"
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout and run.stderr
    if lines > 1000:
        assert run.stdout.readline() == "a line\n"
    run.stdout.close()
    assert run.wait() == 141 and run.stderr.read() == ""


def test_a_pipe_to_somebody_else_that_breaks_is_a_bug_of_ours():
    def main():
        raise BrokenPipeError("a socket")

    with pytest.raises(BrokenPipeError, match="a socket"):
        run_cli(main)

"""Errors that a user caused and can mend: one clear line and exit code 2, never a traceback."""

import os
import select
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn, TextIO


class InputError(ValueError):
    """Something given to a command is wrong; the message names the file, line or field and what to do."""


def check_ranges(options: object, good: Mapping[str, bool], where: str = "") -> None:
    """InputError naming the first field of `options` whose value is not `good`; `where` stands in front of its name."""
    for name, is_good in good.items():
        if not is_good:
            raise InputError(f"{where}{name} = {getattr(options, name)} is out of range")


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit with its code (None counts as 0).

    An InputError prints "error: ..." to stderr and exits 2, Ctrl-C exits 130, a reader of its output that has enough
    (`| head`) 141; any other exception is a bug of ours and keeps its traceback.
    """
    try:
        code = main()
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        if not _has_no_reader(sys.stdout):
            raise
        code = 141
    sys.exit(code or 0)


def _has_no_reader(stream: TextIO) -> bool:
    """Of a pipe's end. What is left in it goes nowhere, so that the interpreter says nothing when it ends."""
    ask = select.poll()
    ask.register(stream, 0)
    if not any(event & select.POLLERR for _, event in ask.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return True

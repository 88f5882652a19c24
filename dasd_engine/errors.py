"""Errors that a user caused and can mend: one clear line and exit code 2, never a traceback."""

import sys
from collections.abc import Callable, Mapping
from typing import NoReturn


class InputError(ValueError):
    """Something given to a command is wrong; the message names the file, line or field and what to do."""


def check_ranges(options: object, good: Mapping[str, bool], where: str = "") -> None:
    """InputError naming the first field of `options` whose value is not `good`; `where` stands in front of its name."""
    for name, is_good in good.items():
        if not is_good:
            raise InputError(f"{where}{name} = {getattr(options, name)} is out of range")


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit with its code (None counts as 0).

    An InputError prints "error: ..." to stderr and exits 2, Ctrl-C exits 130; any other exception is a bug of
    ours and keeps its traceback.
    """
    try:
        code = main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code or 0)

"""Output directories of the teacher's side: JSON Lines that a killed run goes on with, and their manifest.

    with OutputDirectory(out, asked) as output:          # one run at a time; InputError when `out` holds something else
        if output.manifest is None:                      # not finished yet
            rows = output.appender("candidates.jsonl")   # drops a line that a crash cut off
            done = {row["id"] for _, row in read_rows(rows.path)}
            rows.write({...})                            # in the file, and past this process, when it returns
            output.finish({"counts": {...}})

`asked` is what the output depends on: inputs with hashes, parameters. It is written first, as asked.json, so that a
run is only ever continued with the inputs it was started with.
"""

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from dasd_engine.errors import InputError

ASKED, MANIFEST, LOCK = "asked.json", "manifest.json", ".lock"


class OutputDirectory:
    """`out`, locked while the context lasts. `manifest` is that of a finished run, else None."""

    def __init__(self, out: str | os.PathLike[str], asked: dict[str, Any]):
        self.path = Path(out)
        self.asked = json.loads(json.dumps(asked, default=str))
        self.manifest: dict[str, Any] | None = None
        self._appenders: list[Appender] = []
        self._started = time.monotonic()
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "OutputDirectory":
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock(self.path, "--out"))
            self._open()
            self._held = stack.pop_all()  # until __exit__
        return self

    def _open(self) -> None:
        asked = self.path / ASKED
        if not asked.exists():
            if any(child.name != LOCK for child in self.path.iterdir()):
                raise InputError(f"{self.path}: holds something else; remove it or choose another --out")
            write_json(asked, self.asked)
        before = read_json(asked)
        if changes := differences(before, self.asked):
            raise InputError(
                f"{self.path}: was made differently ({'; '.join(changes)}); remove it or choose another --out"
            )
        if (self.path / MANIFEST).exists():
            self.manifest = read_json(self.path / MANIFEST)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for appender in self._appenders:
            appender.close()
        self._held.close()

    def appender(self, name: str) -> "Appender":
        self._appenders.append(Appender(self.path / name))
        return self._appenders[-1]

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest, which marks the directory complete: what was asked, `facts` and the wall time."""
        for appender in self._appenders:
            appender.sync()
        manifest = {**self.asked, **facts, "wall_seconds": round(time.monotonic() - self._started, 3)}
        write_json(self.path / MANIFEST, manifest)
        self.manifest = manifest
        return manifest


@contextlib.contextmanager
def lock(directory: Path, named: str = "`out`") -> Iterator[None]:
    """Hold a directory, made where it is missing, for one run at a time. `named`: what its user calls it.

    Raises InputError where another run holds it, or it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((directory / LOCK).open("w"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = f"another run is writing it; wait for that, or choose another {named}"
            raise InputError(f"{directory}: {what}") from None
        except OSError as error:
            raise InputError(f"{directory}: cannot be written ({error.strerror}); choose another {named}") from None
        yield


class Appender:
    """A JSON Lines file that only grows. A last line without its newline is what a crash cut off: it is dropped."""

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "ab")  # noqa: SIM115 (closed by close)
        size = whole_lines(path)
        if size < path.stat().st_size:
            self._file.truncate(size)

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n")
        self._file.flush()

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            with contextlib.suppress(OSError):  # a full disk has been reported by write already
                self._file.close()


def whole_lines(path: Path) -> int:
    """Bytes up to and including the last newline."""
    end = path.stat().st_size
    with open(path, "rb") as file:
        while end:
            begin = max(0, end - (1 << 20))
            file.seek(begin)
            at = file.read(end - begin).rfind(b"\n")
            if at >= 0:
                return begin + at + 1
            end = begin
    return 0


def read_rows(path: str | os.PathLike[str], without: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, row) of a JSON Lines file; blank lines are skipped. InputError naming file and line.

    `without`: fields that are not needed; where they hold lists of numbers, most of the time goes into parsing those.
    """
    # A quote inside a string has a backslash in front of it, so only a key can match.
    numbers = re.compile(rf'"(?:{"|".join(without)})": \[[-+0-9.,eE ]*+\], '.encode()) if without else None
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if numbers:
                    line = numbers.sub(b"", line)
                try:
                    row = json.loads(line)
                except UnicodeDecodeError as error:
                    raise InputError(f"{path}:{number}: is not UTF-8 (byte {error.start})") from None
                except ValueError as error:
                    raise InputError(f"{path}:{number}: is not valid JSON: {error}") from None
                if not isinstance(row, dict):
                    raise InputError(f"{path}:{number}: must be a JSON object, not {type(row).__name__}")
                yield number, row
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON ({error}); remove it to make it anew") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must be a JSON object, not {type(value).__name__}")
    return value


def read_finished(directory: str | os.PathLike[str], command: str) -> dict[str, Any]:
    """The manifest of an output directory that `command` has finished; else an InputError that says so."""
    path = Path(directory)
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; python -m dasd_engine.{command} makes it")
    if not (path / MANIFEST).exists():
        raise InputError(f"{path}: holds no {MANIFEST}: python -m dasd_engine.{command} has not finished it")
    return read_json(path / MANIFEST)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Complete or not at all."""
    with replacing(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A JSON Lines file, complete or not at all."""
    with replacing(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A file that takes the place of `path` once it is whole and on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def sync(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed: this one is not where it runs from a source tree."""
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def differences(before: Any, after: Any, name: str = "") -> list[str]:
    """In words, where two JSON values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        found = [differences(before.get(key), after.get(key), f"{name}.{key}" if name else key) for key in keys]
        return [change for changes in found for change in changes]
    return [] if before == after else [f"{name}: {_short(before)} then, {_short(after)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."

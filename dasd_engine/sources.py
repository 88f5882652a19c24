"""Training data read row by row, with the file and line every row came from.

A source is a .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, or a data set of the Hugging Face hub:

    data/stage1.jsonl.zst
    owner/name                     its files of these kinds (those with "train" in their path, where there are any)
    owner/name@revision:stage1/*   a revision, and the files that match

A row has one of three shapes; `uuid`, `domain` and `meta` are kept beside any of them, and the first two may have the
`prefix` (with `prefix_ids`) of dasd_engine.mix, the front of the last response that the student itself sampled:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"uuid": "...", "input": "...", "output": "<think>...</think>...", "domain": "...", "meta": "..."}
    {"prompt": "..." or [messages], "completion": "..." or [messages]}

An assistant's message with `"weight": 0` is read and not trained, as in OpenAI's fine-tuning files; so is one of a
`prompt`.
Nothing here holds more than a batch of rows in memory. Whatever is wrong is an InputError.
"""

import fnmatch
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dasd_engine.errors import InputError
from dasd_engine.shards import hash_file

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
ROLES = ("system", "user", "assistant", "tool")
SHAPES = '"messages", "input" and "output", or "prompt" and "completion"'
KEPT = ("uuid", "domain", "meta")  # what a row's meta entry takes over
PREFIX = ("prefix", "prefix_ids")

BATCH_BYTES = 1 << 20  # of raw rows
LONGEST_LINE = 64 << 20  # bytes; a longer one is not JSON Lines, and would not fit in memory for long

_HUB_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[^:]+))?(:(?P<glob>.+))?")


@dataclass(frozen=True)
class Source:
    """A file to read: `name` is what errors call it, `size` its bytes as stored, `revision` the hub's commit."""

    name: str
    size: int
    revision: str | None = None

    def open(self) -> BinaryIO:
        if self.revision is None:
            return open(self.name, "rb")
        return _hub().HfFileSystem().open(f"datasets/{self.name}", "rb", revision=self.revision)

    def identity(self) -> dict[str, Any]:
        """What tells whether the file is still the same: its hash, or the revision on the hub."""
        if self.revision is None:
            return {"file": self.name, "bytes": self.size, "sha256": hash_file(self.name)}
        return {"file": self.name, "bytes": self.size, "revision": self.revision}


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of one file: (line or row number from 1, raw line or Parquet row), and how far it is read."""

    file: str
    rows: list[tuple[int, bytes | dict[str, Any]]]
    position: int  # bytes of the file as stored, read so far


@dataclass(frozen=True)
class Row:
    messages: list[dict[str, str]]
    meta: dict[str, Any]  # uuid, domain, meta, as far as the row has them
    prefix: str | None = None
    prefix_ids: list[int] | None = None
    untrained: tuple[int, ...] = ()  # indices of assistant messages that are read only


def find_sources(names: Iterable[str | os.PathLike[str]]) -> list[Source]:
    """The files behind the names, in order. InputError for a missing or empty file or one of an unknown kind."""
    found: list[Source] = []
    for given in names:
        name, path = os.fspath(given), Path(given)
        hub = _HUB_NAME.fullmatch(name)
        if path.is_dir():
            raise InputError(f"{name}: is a directory; name its files, e.g. {name.rstrip('/')}/*.jsonl")
        if not path.exists() and hub and not hub["repo"].endswith(SUFFIXES):
            found += _hub_sources(name, **hub.groupdict())
            continue
        if not path.exists():
            raise InputError(f"{name}: no such file")
        if not name.endswith(SUFFIXES):
            raise InputError(f"{name}: unknown kind of file; expected {', '.join(SUFFIXES)} or a hub data set")
        found.append(Source(name, path.stat().st_size))
    for source in found:
        if source.size == 0:
            raise InputError(f"{source.name}: is empty")
    return found


def read_batches(source: Source, more: Sequence[str] = ()) -> Iterator[Batch]:
    """Stream a file's rows in batches; blank lines are passed over. `more`: further columns of Parquet to read.

    InputError for a file that has no row, and for a damaged one, naming the last line that could be read.
    """
    empty = True
    for batch in _read_batches(source, more):
        empty = False
        yield batch
    if empty:
        raise InputError(f"{source.name}: has no rows")


def _read_batches(source: Source, more: Sequence[str]) -> Iterator[Batch]:
    with source.open() as raw:
        if source.name.endswith(".parquet"):
            yield from _parquet_batches(source, raw, more)
            return
        rows: list[tuple[int, bytes | dict[str, Any]]] = []
        held = 0
        for number, line in _lines(source.name, _decompressed(source.name, raw)):
            rows.append((number, line))
            held += len(line)
            if held >= BATCH_BYTES:
                yield Batch(source.name, rows, raw.tell())
                rows, held = [], 0
        if rows:
            yield Batch(source.name, rows, source.size)


def parse_row(data: bytes | dict[str, Any]) -> Row:
    """Turn a raw line or a Parquet row into messages. InputError names the field, not the file."""
    row = data if isinstance(data, dict) else parse_json(data, SHAPES)
    untrained: tuple[int, ...] = ()
    if row.get("messages") is not None:
        messages, prefix = _messages(row["messages"], "messages"), _prefix(row)
        untrained = _untrained(row["messages"], "messages")
        if row.get("tools"):
            raise InputError("tools: tool definitions are not supported; remove the field, or the row")
    elif "output" in row or "input" in row:
        messages = [_said("user", row, "input"), _said("assistant", row, "output")]
        prefix = _prefix(row)
    elif "completion" in row or "prompt" in row:
        prompt, completion = _turns("user", row, "prompt"), _turns("assistant", row, "completion")
        messages, prefix = [*prompt, *completion], (None, None)  # other data sets have columns of that name
        untrained = tuple(index for index, message in enumerate(prompt) if message["role"] == "assistant")
        if isinstance(row["completion"], list):
            untrained += tuple(len(prompt) + index for index in _untrained(row["completion"], "completion"))
    else:
        raise InputError(f"has the fields {_names(row)}; expected {SHAPES}")
    meta = {key: row[key] for key in KEPT if row.get(key) is not None}
    return Row(messages, meta, *prefix, untrained=untrained)


def as_context(messages: Iterable[dict[str, str]]) -> list[dict[str, Any]]:
    """Messages for a row whose later turns alone are trained."""
    return [{**message, "weight": 0} if message["role"] == "assistant" else message for message in messages]


def response_fields(messages: list[dict[str, str]], output: str) -> dict[str, Any]:
    """Fields of a row whose response alone is trained: the released schema's, or `messages` where a question is more
    than one message of the user."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return {"input": messages[0]["content"], "output": output}
    return {"messages": [*as_context(messages), {"role": "assistant", "content": output}]}


def response_of(row: dict[str, Any]) -> str:
    """The response in a row of `response_fields`."""
    return row["output"] if "output" in row else row["messages"][-1]["content"]


def _lines(name: str, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        while line := stream.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise InputError(
                    f"{name}:{number}: is longer than {LONGEST_LINE >> 20} MiB; one row a line is expected"
                )
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
            if not line.isspace():
                yield number, line
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{name}: cannot be read behind line {number}: {error}") from error


def _decompressed(name: str, raw: BinaryIO) -> BinaryIO:
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if name.endswith(".zst"):
        return io.BufferedReader(_ZstdReader(raw), 1 << 20)
    return io.BufferedReader(raw, 1 << 20)  # type: ignore[type-var]


class _ZstdReader(io.RawIOBase):
    """Frames one after the other. (zstandard's own stream reader takes a file cut short for a whole one.)"""

    def __init__(self, raw: BinaryIO):
        try:
            import zstandard
        except ImportError:
            raise InputError("reading .zst needs the zstandard package: pip install zstandard") from None
        self._raw, self._zstandard = raw, zstandard
        self._frame: Any = None  # the one being decompressed
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame and self._frame.eof else b""
            data = data or self._raw.read(1 << 16)
            if not data:
                if self._frame and not self._frame.eof:
                    raise EOFError("the file ends inside compressed data")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(data)
            except self._zstandard.ZstdError as error:
                raise OSError(str(error)) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _parquet_batches(source: Source, raw: BinaryIO, more: Sequence[str]) -> Iterator[Batch]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{source.name}: reading Parquet needs pyarrow: pip install pyarrow") from None
    number = 0
    try:
        # Without a buffer size it reads a column of a row group at once, which may be the whole file.
        file = pyarrow.parquet.ParquetFile(raw, pre_buffer=False, buffer_size=1 << 20)
        known = {"messages", "tools", "input", "output", "prompt", "completion", *PREFIX, *KEPT, *more}
        columns = [name for name in file.schema_arrow.names if name in known]
        if not set(columns) - {*PREFIX, *KEPT}:
            raise InputError(f"{source.name}: has the columns {_names(file.schema_arrow.names)}; expected {SHAPES}")
        total = max(file.metadata.num_rows, 1)
        unpacked = sum(file.metadata.row_group(index).total_byte_size for index in range(file.num_row_groups))
        at_once = max(1, min(1024, BATCH_BYTES * total // max(unpacked, 1)))
        for table in file.iter_batches(at_once, columns=columns, use_threads=False):
            rows = [(number + index, row) for index, row in enumerate(table.to_pylist(), start=1)]
            number += len(rows)
            yield Batch(source.name, rows, source.size * number // total)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{source.name}: cannot be read behind row {number}: {error}") from error


def parse_json(line: bytes, wanted: str) -> dict[str, Any]:
    """The object in a raw line, which should have `wanted`. InputError where it is none."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 at byte {error.start + 1} of the line; re-encode the file") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"is {_kind(row)}, expected an object with {wanted}")
    return row


def _turns(role: str, row: dict[str, Any], field: str) -> list[dict[str, str]]:
    """A field that is a string said by `role`, or a list of messages."""
    if isinstance(row.get(field), list):
        return _messages(row[field], field)
    return [_said(role, row, field)]


def _said(role: str, row: dict[str, Any], field: str) -> dict[str, str]:
    if field not in row:
        raise InputError(f"{field}: is missing; the row has {_names(row)}")
    return {"role": role, "content": _text(row[field], field)}


def _prefix(row: dict[str, Any]) -> tuple[str | None, list[int] | None]:
    """`prefix` and `prefix_ids` of a row; absent, null or empty is none."""
    if not row.get("prefix"):
        return None, None
    ids = row.get("prefix_ids")
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int and 0 <= i < 1 << 32 for i in ids)):
        raise InputError(f"prefix_ids: is {_kind(ids)}, expected a list of token ids")
    return _text(row["prefix"], "prefix"), ids


def _messages(value: Any, field: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{field}: is {_kind(value)}, expected a list of messages")
    return [_message(message, f"{field}[{index}]") for index, message in enumerate(value)]


def _message(value: Any, field: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InputError(f'{field}: is {_kind(value)}, expected an object with "role" and "content"')
    role = value.get("role")
    if role not in ROLES:
        shown = "is missing" if role is None else f"is {role!r}"
        raise InputError(f"{field}.role: {shown}, expected one of {', '.join(ROLES)}")
    if value.get("tool_calls"):
        raise InputError(f"{field}.tool_calls: tool calls are not supported; remove the row")
    for thinking in ("reasoning_content", "thinking", "reasoning"):
        if value.get(thinking):
            raise InputError(f"{field}.{thinking}: would be lost; write it into content as <think>...</think>answer")
    content = value.get("content")
    if isinstance(content, list):  # [{"type": "text", "text": "..."}]
        content = "".join(_text_part(part, f"{field}.content[{index}]") for index, part in enumerate(content))
    return {"role": role, "content": _text(content, f"{field}.content")}


def _untrained(messages: list[Any], field: str) -> tuple[int, ...]:
    """Indices of the messages with "weight": 0."""
    weights = [message.get("weight") for message in messages]
    for index, weight in enumerate(weights):
        if weight not in (None, 0, 1):
            raise InputError(f"{field}[{index}].weight: is {weight!r}, expected 0 or 1")
    return tuple(index for index, weight in enumerate(weights) if weight == 0)


def _text_part(part: Any, field: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise InputError(f"{field}: only parts of type text are supported")
    return _text(part.get("text"), f"{field}.text")


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{field}: is {_kind(value)}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{field}: has half a surrogate pair at character {error.start + 1}, not text") from error
    return value


def _kind(value: Any) -> str:
    """A value's JSON type in words."""
    if value is None:
        return "missing or null"
    if isinstance(value, list) and not value:
        return "an empty list"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return kinds.get(type(value), "an object" if isinstance(value, dict) else f"a {type(value).__name__}")


def _names(fields: Iterable[Any]) -> str:
    return ", ".join(map(str, fields)) or "(none)"


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise InputError("a data set of the hub needs the extra: pip install 'dasd-engine[hub]'") from None
    return huggingface_hub


def _hub_sources(name: str, repo: str, revision: str | None, glob: str | None) -> Sequence[Source]:
    """The data files of a hub data set, pinned to the commit its revision means now."""
    try:
        hub = _hub()
    except InputError as error:
        raise InputError(f"{name}: no such file here, and {error}") from None
    try:
        info = hub.HfApi().dataset_info(repo, revision=revision, files_metadata=True)
    except Exception as error:  # no such data set, not allowed, no network: huggingface_hub has a class for each
        raise InputError(f"{name}: no such file here, and not found on the hub: {error}") from error
    files = [file for file in info.siblings if file.rfilename.endswith(SUFFIXES)]
    if glob:
        files = [file for file in files if fnmatch.fnmatch(file.rfilename, glob)]
    elif any("train" in file.rfilename for file in files):
        files = [file for file in files if "train" in file.rfilename]
    if not files:
        there = _names(sorted(file.rfilename for file in info.siblings)[:20])
        raise InputError(f"{name}: no file of the data set fits ({', '.join(SUFFIXES)}); it has {there}")
    files.sort(key=lambda file: file.rfilename)
    return [Source(f"{repo}/{file.rfilename}", 1 if file.size is None else file.size, info.sha) for file in files]

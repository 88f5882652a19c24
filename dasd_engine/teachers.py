"""Teachers: what answers questions with text, token ids and the logprob of every sampled token.

    with closing(open_teacher(TeacherOptions(kind="local", path="Qwen3-4B"))) as teacher:
        for request, result in teacher.sample(requests):  # in the order finished; requests are taken as there is room
            ...                                           # result: a Sampled, or a Failed that says why there is none

| kind | what answers | same answer every time |
|---|---|---|
| "local" | the engine's own decoder and generator | yes, in any batch |
| "vllm" | vLLM's engine in this process (extra `vllm`) | same seeds; its kernels' rounding depends on the batch |
| "server" | OpenAI-compatible endpoints over HTTP (extra `server`) | as far as the server honours `seed` |

A teacher is given the conversation as it is: whoever asks puts the system prompt in front (`chat.with_system`).
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol

from dasd_engine.chat import Chat, Message, response_text
from dasd_engine.config import apply_override, build, option
from dasd_engine.errors import InputError
from dasd_engine.shards import hash_files
from dasd_engine.token_text import TokenText
from dasd_engine.tokens import TextEncoder

# A logprob above this is none: rounding alone does not go so far.
_ABOVE_ZERO = 1e-3
_TEMPLATE_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
_OPENED = re.compile(r"<think>\s*$")
Prepared = tuple[list[int], str]  # ids to continue, and what the generation prompt opened of the response


@dataclass(frozen=True)
class Request:
    """One response asked for. `key` is unique: it names the request in errors and in resuming.

    The same request gets the same response in any company: what is drawn depends on `seed` alone (servers: as far as
    they honour it). With `prefix` the response continues that text of the assistant.
    """

    key: str
    messages: list[Message]
    temperature: float
    seed: int
    max_new_tokens: int
    top_p: float = 1.0
    top_k: int = 0
    prefix: str = ""


@dataclass(frozen=True)
class Sampled:
    """A response: `text` without the token that ends the turn, special tokens kept; with a prefix what follows it.

    opened: bytes at the front of `text` that the generation prompt had written, not the model. logprobs: natural, of
    every sampled token, at temperature 1 with nothing cut off. token_ends: the byte of `text` where each token ends (a
    token without text, as that which ends the turn, repeats the last). token_ids: None where a server tells none.
    """

    text: str
    opened: int
    token_ids: list[int] | None
    logprobs: list[float]
    token_ends: list[int]
    finish_reason: str


@dataclass(frozen=True)
class Failed:
    reason: str


class Teacher(Protocol):
    name: str
    revision: str | None

    def sample(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Sampled | Failed]]:
        """Each request once, with its result, in the order finished."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class TeacherOptions:
    kind: Literal["local", "vllm", "server"] = option("local", "what answers")
    path: str = option(
        "",
        "model directory; for a server optional: a directory with the tokenizer and chat template of its model, which "
        "gives exact token ids and prefills",
    )
    name: str = option("", "what rows call the teacher (default: the directory's name, or the served model)")
    revision: str = option("", "revision that rows name (default: a hash of the model's files; a server has none)")
    # local and vllm
    dtype: Literal["auto", "bf16", "fp32"] = option("auto", "of the weights; auto: bf16 on a GPU, fp32 on the CPU")
    device: str = option("", "of a local teacher, cpu or cuda (default: cuda where there is one)")
    batch_size: int = option(64, "responses written together")
    threads: int = option(0, "CPU threads of a local teacher, 0 for torch's choice")
    # vllm
    tensor_parallel: int = option(1, "GPUs that share the model")
    gpu_memory: float = option(0.9, "share of a GPU's memory that vLLM may take")
    max_model_len: int = option(0, "longest prompt and response in tokens, 0 for the model's own limit")
    # server
    urls: tuple[str, ...] = option((), "base URLs of the endpoints, all serving one model, e.g. http://host:8000/v1")
    model: str = option("", "model to ask for (default: the first that the endpoint lists)")
    api_key_env: str = option("", "environment variable that holds the API key; the key itself is written nowhere")
    concurrency: int = option(64, "requests at a time to one endpoint")
    timeout: float = option(1800.0, "seconds for one response")
    retries: int = option(6, "further attempts of a request that timed out, lost its connection, or met a busy server")
    backoff: float = option(0.5, "seconds before the first retry; doubled each time, with jitter")
    longest_backoff: float = option(60.0, "seconds that the doubling and a server's Retry-After are held to")
    dead_after: int = option(3, "failures in a row after which an endpoint is set aside")
    probe_every: float = option(5.0, "seconds between probes of an endpoint that is set aside")
    give_up: float = option(600.0, "seconds without any living endpoint after which sampling stops, to be resumed")


def open_teacher(options: TeacherOptions) -> Teacher:
    """The teacher that the options name. InputError where it cannot be had; the caller closes it."""
    if options.kind == "server":
        from dasd_engine.teacher_server import ServerTeacher

        return ServerTeacher(options)
    if options.kind == "vllm":
        from dasd_engine.teacher_vllm import VllmTeacher

        return VllmTeacher(options)
    from dasd_engine.teacher_local import LocalTeacher

    return LocalTeacher(options)


def parse_teacher(names: Sequence[str]) -> dict[str, Any]:
    """`kind`, and `path` or `urls`, of what a command line says: DIR, vllm:DIR, or URLs of one server or several."""
    urls = tuple(name for name in names if name.startswith(("http://", "https://")))
    if urls and len(urls) == len(names):
        return {"kind": "server", "urls": urls}
    if len(names) != 1 or urls:
        raise InputError(f"--teacher {' '.join(names)}: name one directory, vllm:DIR, or one or several http:// URLs")
    if names[0].startswith("vllm:"):
        return {"kind": "vllm", "path": names[0].removeprefix("vllm:")}
    return {"kind": "local", "path": names[0]}


def teacher_options(names: Sequence[str], overrides: Sequence[str], flag: str) -> TeacherOptions:
    """What a command line says: `parse_teacher`'s names, and KEY=VALUE of other keys, each after `flag`."""
    table: dict[str, Any] = {}
    for override in overrides:
        apply_override(table, override)
    named = {key: list(value) if key == "urls" else value for key, value in parse_teacher(names).items()}
    return build(TeacherOptions, {**named, **table}, flag, "teacher")


def identify_teacher(options: TeacherOptions) -> dict[str, Any]:
    """What the teacher is, without opening it, for a manifest: kind, names and the hashes of its files.

    URLs are not part of it: a run may go on with other endpoints of the same model.
    """
    patterns: tuple[str, ...] = _TEMPLATE_FILES
    found: dict[str, Any] = {"kind": options.kind, "name": options.name, "revision": options.revision}
    if options.kind == "server":
        found["model"] = options.model
    else:
        found["dtype"] = options.dtype
        patterns = (*_TEMPLATE_FILES, "config.json", "*.safetensors")
    if options.path or options.kind != "server":
        found["files"] = hash_files(model_directory(options.path), patterns)
    return found


def model_directory(path: str) -> Path:
    folder = Path(path)
    if not path or not folder.is_dir():
        raise InputError(f"teacher {path!r}: no such directory; name that of a Hugging Face model")
    return folder


def name_and_revision(options: TeacherOptions) -> tuple[str, str | None]:
    """What rows call a teacher that is read from a directory."""
    files = identify_teacher(options)["files"]
    digest = sha256(repr(sorted(files.items())).encode()).hexdigest()
    name = options.name or model_directory(options.path).resolve().name
    return name, options.revision or f"sha256:{digest[:16]}"


class TeacherChat:
    """A teacher's tokenizer and template: requests to token ids, and sampled ids to responses."""

    def __init__(self, directory: str):
        self.chat = Chat.load(model_directory(directory))
        self.stop_ids = self.chat.stop_ids
        self._encode = TextEncoder(self.chat.tokenizer)
        self._text = TokenText(self.chat.tokenizer)

    def prompt(self, request: Request) -> Prepared:
        """Ids to continue, and what the generation prompt has opened of the response ("<think>\\n" or nothing).

        With a prefix nothing is opened, and the ids end in those of the prefix. InputError for messages or a prefix
        that the template cannot hold.
        """
        prompt = self.chat.render(request.messages, add_generation_prompt=True)
        ids = self._encode(prompt).tolist()
        if not request.prefix:
            opened = _OPENED.search(prompt)
            return ids, opened[0] if opened else ""
        prefix = response_text(request.prefix, prompt, len(request.messages))
        both = self._encode(prompt + prefix).tolist()
        # Prompt and response meet as they do when a response is sampled: no token straddles the two.
        return (both if both[: len(ids)] == ids else ids + self._encode(prefix).tolist()), ""

    def prompt_within(self, request: Request, longest: int) -> tuple[Prepared, int]:
        """`prompt`, and how many tokens may follow it in a model of `longest` positions; InputError where none may."""
        prompt = self.prompt(request)
        room = longest - len(prompt[0])
        if room < 1:
            raise InputError(f"the prompt has {len(prompt[0])} tokens, the model {longest} positions")
        return prompt, min(request.max_new_tokens, room)

    def response(
        self,
        prompt: Prepared,
        request: Request,
        ids: Sequence[int],
        logprobs: Sequence[float],
        reason: str,
    ) -> Sampled | Failed:
        """What was sampled behind `prompt`, checked."""
        ids = list(ids)
        spoken = ids[:-1] if ids and reason == "stop" and ids[-1] in self.stop_ids else ids
        front = prompt[0] if request.prefix else []
        text, ends = self._text.text_and_ends(spoken, after=front)
        opened = prompt[1]
        size = len(opened.encode())
        ends = [size + end for end in ends]
        ends += [ends[-1] if ends else size] * (len(ids) - len(spoken))
        return checked(Sampled(opened + text, size, ids, list(logprobs), ends, reason))


def checked(sampled: Sampled) -> Sampled | Failed:
    """The response, or why it is none: no text, or a logprob that is missing, not finite or above 0."""
    count = len(sampled.token_ends)
    if not sampled.text.encode(errors="replace")[sampled.opened :].strip():
        return Failed(f"the text is empty ({count} tokens, finish reason {sampled.finish_reason})")
    try:
        sampled.text.encode()
    except UnicodeEncodeError as error:
        return Failed(f"the text has half a surrogate pair at character {error.start}")
    if len(sampled.logprobs) != count or (sampled.token_ids is not None and len(sampled.token_ids) != count):
        ids = "no" if sampled.token_ids is None else str(len(sampled.token_ids))
        return Failed(f"{count} tokens, {len(sampled.logprobs)} logprobs and {ids} token ids: they must be as many")
    for index, logprob in enumerate(sampled.logprobs):
        if not isinstance(logprob, int | float) or not math.isfinite(logprob) or logprob > _ABOVE_ZERO:
            return Failed(f"the logprob of token {index} is {logprob}, not a finite number up to 0")
    return sampled

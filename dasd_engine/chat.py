"""Chat templates: conversations to token ids, and exactly which of them are trained.

A document is built the way inference builds it. For every assistant turn the messages before it are rendered with
the model's own template and its generation prompt, that is the prompt; then come the response, verbatim, and the
end-of-turn token, and those are trained. The template never sees the response that is trained, so it cannot strip
or re-write its <think>...</think>.

Prompt and response meet where inference makes them meet: the prompt's ids are those of the prompt alone, so no token
straddles the boundary. (Where encoding both together would merge characters across it, both are encoded apart.)

Many templates re-write earlier assistant turns in the history, e.g. Qwen3's drops their thinking. Then the tokens
trained for turn one are not what inference shows before turn two, no single sequence is right for both, and the
conversation becomes several documents: `documents` starts a new one exactly where the ids stop being a prefix.
"""

import json
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
import numpy.typing as npt
import tokenizers

from dasd_engine.errors import InputError
from dasd_engine.tokens import TextEncoder

DEFAULT_SYSTEM = "You are a helpful assistant."

Message = dict[str, str]
Document = tuple[npt.NDArray[np.uint32], list[tuple[int, int]]]


@dataclass(frozen=True)
class Prefix:
    """The front of a response that the student sampled and another model continued (mixed policy)."""

    text: str  # as it stands in the message, an opening that the generation prompt has included
    ids: Sequence[int] | None = None  # as sampled, without that opening; None: those of the text
    trained: bool = True


_PROBE = "PROBERESPONSE"  # stands for a response while the template's end of turn is looked for


class Chat:
    """A model's tokeniser and chat template.

    Attributes: tokenizer; template and special_tokens as read; end_of_turn, the text that closes a response; stop_ids;
    stop_tokens.
    """

    tokenizer: tokenizers.Tokenizer
    stop_ids: set[int]  # token ids that end a response
    stop_tokens: list[str]  # their texts

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        template: str,
        *,
        special_tokens: dict[str, str] | None = None,
        stop_ids: Sequence[int] = (),
        now: datetime | None = None,
        name: str = "chat template",
    ):
        """`special_tokens`: bos_token, eos_token, ... for the template. `now`: what `strftime_now` tells it."""
        tokenizer.no_truncation()  # tokenizer.json may carry both
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self._encode = TextEncoder(tokenizer)
        self._name = name
        self.template = template
        self.special_tokens = special_tokens or {}
        self._compiled = _compile(template, name, now or datetime.now())
        self.end_of_turn = self._find_end_of_turn()
        # The template may put spaces in front of the token, as Llama 2's does.
        self._end_space = self.end_of_turn[: -len(self.end_of_turn.lstrip())]
        end_id = tokenizer.token_to_id(self.end_of_turn.lstrip())
        assert end_id is not None  # it was found among the tokeniser's tokens
        self._end_id: int = end_id
        self.stop_ids = {self._end_id, *stop_ids}
        self.stop_tokens = [text for id in sorted(self.stop_ids) if (text := tokenizer.id_to_token(id))]
        self._additive = self._turns_add_up()

    @classmethod
    def load(cls, model_dir: str | os.PathLike[str], *, now: datetime | None = None) -> "Chat":
        """Read tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json.

        Raises InputError naming the file when one that is needed is missing or does not parse.
        """
        folder = Path(model_dir)
        config = _read_json(folder / "tokenizer_config.json")
        template, name = _find_template(folder, config)
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        texts = {key: _token_text(value) for key, value in config.items() if key.endswith("_token")}
        special = {key: text for key, text in texts.items() if text is not None}
        generation = _read_json(folder / "generation_config.json", required=False)
        eos = generation.get("eos_token_id")
        stops = list(eos) if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(type(stop) is int for stop in stops):
            raise InputError(f"{folder / 'generation_config.json'}: eos_token_id must be a token id or a list of them")
        if "eos_token" in special and (eos_id := tokenizer.token_to_id(special["eos_token"])) is not None:
            stops.append(eos_id)
        return cls(tokenizer, template, special_tokens=special, stop_ids=stops, now=now, name=name)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The template's text for exactly these messages (no default system prompt is added here)."""
        try:
            return self._compiled.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except Exception as error:  # a template can raise anything
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise InputError(f"{self._name}: fails on roles [{roles}]: {error}") from error

    def prompt_ids(self, messages: Sequence[Message], *, system: str = DEFAULT_SYSTEM) -> list[int]:
        """Ids that ask for the next assistant turn. `system` goes in front where there is none ("" for none)."""
        return self._encode(self.render(with_system(messages, system), add_generation_prompt=True)).tolist()

    def encode(
        self, messages: Sequence[Message], *, system: str = DEFAULT_SYSTEM
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """A conversation as one document: ids, and the trained (begin, end) of every assistant turn.

        Raises InputError when the template re-writes earlier turns, so that it takes several (see `documents`).
        """
        documents = self.documents(messages, system=system)
        if len(documents) > 1:
            raise InputError(
                f"{self._name}: re-writes earlier assistant turns of this conversation, which therefore makes "
                f"{len(documents)} documents; use Chat.documents"
            )
        ids, spans = documents[0]
        return ids.tolist(), spans

    def documents(
        self,
        messages: Sequence[Message],
        *,
        system: str = DEFAULT_SYSTEM,
        prefix: Prefix | None = None,
        untrained: Collection[int] = (),
    ) -> list[Document]:
        """A conversation as documents in which every assistant turn is trained exactly once.

        Each is (ids uint32 [n], spans); in front of a span stand the ids that inference would feed. What follows the
        last assistant turn is left out. `prefix`: the front of the last assistant turn, see Prefix. `untrained`:
        indices of messages that are read, not trained. Raises InputError naming the message when a response cannot be
        trained.
        """
        given, messages = len(messages), with_system(messages, system)
        added = len(messages) - given
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        done: list[Document] = []
        text, ids = "", np.zeros(0, dtype=np.uint32)
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index - added in untrained:
                continue
            prompt = self.render(messages[:index], add_generation_prompt=True)
            extends = bool(text) and prompt.startswith(text)
            if extends and self._additive:
                known, tail = ids, prompt[len(text) :]
            else:
                known, tail = ids[:0], prompt
            tail_ids = self._encode(tail)
            head = np.concatenate([known, tail_ids])
            if spans and not (extends and np.array_equal(head[: len(ids)], ids)):
                done.append((ids, spans))
                spans = []
            response = response_text(message["content"], prompt, index)
            opened = len(message["content"]) - len(response)  # characters that the prompt has already
            response += self._end_space
            body, merged = self._encode_response(tail, tail_ids, response)
            written = 0  # tokens of the prefix that are not trained
            if prefix is not None and index == last:
                body, written = self._encode_continued(tail, tail_ids, response, message["content"], opened, prefix)
            if np.isin(body, list(self.stop_ids)).any():
                raise InputError(f"messages[{index}].content: contains a token that ends a turn; remove it")
            ids = np.concatenate([head, body, np.array([self._end_id], dtype=np.uint32)])
            spans = [*spans, (len(head) + written, len(ids))]
            # Where prompt and response merge, the history's ids are others than ours: nothing can extend this.
            text = "" if merged else prompt + response + self.end_of_turn.lstrip()
        if not spans:
            raise InputError("messages: there is no assistant message to train on")
        return [*done, (ids, spans)]

    def _encode_response(
        self, tail: str, tail_ids: npt.NDArray[np.uint32], response: str
    ) -> tuple[npt.NDArray[np.uint32], bool]:
        """Ids of a response behind the end of its prompt, and whether encoding both together would merge them."""
        both = self._encode(tail + response)
        if np.array_equal(both[: len(tail_ids)], tail_ids):
            return both[len(tail_ids) :], False
        if self._additive:
            return self._encode(response), True
        # This tokeniser puts a space before a text of its own: encode behind something that does not merge.
        for guard in ("\n", ".", "x", "0"):
            guard_ids, both = self._encode(guard), self._encode(guard + response)
            if np.array_equal(both[: len(guard_ids)], guard_ids):
                return both[len(guard_ids) :], True
        raise InputError(f"{self._name}: the tokeniser merges this response with whatever stands before it")

    def _encode_continued(
        self, tail: str, tail_ids: npt.NDArray[np.uint32], response: str, content: str, opened: int, prefix: Prefix
    ) -> tuple[npt.NDArray[np.uint32], int]:
        """Ids of a response that another model continued behind `prefix`, and how many of them are not trained."""
        if not content.startswith(prefix.text):
            raise InputError("prefix: is not the front of the response")
        written, rest = prefix.text[opened:], content[max(opened, len(prefix.text)) :]
        rest += response[len(content) - opened :]  # spaces that the template puts in front of the end of turn
        if prefix.ids is None:
            ids, _ = self._encode_response(tail, tail_ids, written)
        elif self.tokenizer.decode(list(prefix.ids), skip_special_tokens=False) == written:
            ids = np.asarray(prefix.ids, dtype=np.uint32)
        else:
            raise InputError("prefix_ids: do not spell the prefix; they are those of another tokeniser")
        # Never together: the boundary of the sampled tokens stays one, as it was when the response was continued.
        body, _ = self._encode_response(written, self._encode(written), rest)
        return np.concatenate([ids, body]), 0 if prefix.trained else len(ids)

    def _turns_add_up(self) -> bool:
        """Whether ids(text up to an end of turn + rest) = ids(text) + ids(rest), so that turns encode one by one."""
        end, sample = self.end_of_turn.lstrip(), "x \n"
        apart = [self._encode(sample), self._encode(end), self._encode("\n " + sample)]
        return np.array_equal(self._encode(sample + end + "\n " + sample), np.concatenate(apart))

    def _find_end_of_turn(self) -> str:
        """What the template writes after a response, up to and including its first special token; else the eos."""
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}]
        try:
            rendered = self.render(messages)
        except InputError:  # a few templates ask for a system message
            rendered = self.render(with_system(messages, DEFAULT_SYSTEM))
        _, found, after = rendered.rpartition(_PROBE)
        if not found:
            raise InputError(f"{self._name}: does not write the content of assistant messages")
        tokens = (token.content for token in self.tokenizer.get_added_tokens_decoder().values())
        ends = [(after.find(token), -len(token)) for token in tokens if token and token in after]
        if ends:
            begin, length = min(ends)
            if not after[:begin].strip():
                return after[: begin - length]
        eos = self.special_tokens.get("eos_token")
        if eos is None or self.tokenizer.token_to_id(eos) is None:
            raise InputError(
                f"{self._name}: writes no special token after a response, and tokenizer_config.json names no "
                "eos_token of the tokeniser: the model could never learn to stop; set eos_token"
            )
        return eos


def with_system(messages: Sequence[Message], system: str) -> list[Message]:
    """`messages` with the system prompt put in front when they have none ("" puts none)."""
    if system and not (messages and messages[0]["role"] == "system"):
        return [{"role": "system", "content": system}, *messages]
    return list(messages)


def response_text(content: str, prompt: str, index: int) -> str:
    """What is trained of a response: all of it, but for a <think> that the generation prompt has opened already."""
    if not content.strip():
        raise InputError(f"messages[{index}].content: the response is empty")
    opened = re.search(r"<think>(\s*)$", prompt)
    if not opened:
        return content
    if content.lstrip().startswith("<think>"):
        content = content.lstrip().removeprefix("<think>")
        return content[len(os.path.commonprefix([opened[1], content])) :]
    if "</think>" not in content:
        raise InputError(
            f"messages[{index}].content: has no thinking, but the template's generation prompt ends in <think>; "
            "write the response as <think>...</think>answer, or use the template of a model that does not think"
        )
    return content


def _compile(template: str, name: str, now: datetime) -> jinja2.Template:
    """Compile in the environment that `transformers` gives to chat templates, so that they render the same."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json  # jinja2's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now.strftime
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise InputError(f"{name}{f':{line}' if line else ''}: is not a valid template: {error}") from error


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}, by which some templates mark responses: rendered as it is."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _find_template(folder: Path, config: dict[str, Any]) -> tuple[str, str]:
    """The template's text and the file it is from; chat_template.jinja goes before tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8"), str(file)
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: is not UTF-8 at byte {error.start}") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # named templates
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise InputError(
            f"{folder}: no chat template: neither chat_template.jinja nor chat_template in tokenizer_config.json; "
            "a base model has none: copy the one you want as chat_template.jinja"
        )
    return template, str(folder / "tokenizer_config.json")


def load_tokenizer(file: Path) -> tokenizers.Tokenizer:
    if not file.is_file():
        raise InputError(f"{file}: no such file; a model directory needs the tokeniser in this format")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{file}: is not a tokeniser that `tokenizers` reads: {error}") from error


def _read_json(file: Path, required: bool = True) -> dict[str, Any]:
    if not file.is_file():
        if required:
            raise InputError(f"{file}: no such file; give the directory of a Hugging Face model")
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: is not a JSON object")
    return content


def _token_text(value: Any) -> str | None:
    """A special token is written as its text or as an object that has it as "content"."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None

"""What is asked of an OpenAI-compatible server, and what its answers say: JSON both, no network here.

With the directory of the teacher's tokenizer and template, /completions is asked with token ids, so that the prompt is
exactly ours and a prefix is a prefill. Without, /chat/completions is asked with messages and the server's template.

| needed of an answer | where it is found |
|---|---|
| logprob of every token | `logprobs.token_logprobs`, or `logprobs.content[].logprob` |
| ids of the tokens, where told | `token_ids` (vLLM's `return_token_ids`), `logprobs.content[].id` |
| bytes of the tokens, where ids or directory are missing | `logprobs.content[].bytes`, else the tokens' text |

Fields beyond OpenAI's are sent only to servers known to take them, vLLM and SGLang: token ids, special tokens in the
text, and the sampling options that a model's generation_config.json would otherwise set behind our back.
"""

import math
from dataclasses import dataclass
from typing import Any

from dasd_engine.errors import InputError
from dasd_engine.teachers import Failed, Request, Sampled, TeacherChat, checked
from dasd_engine.token_text import text_and_ends

_EXTENDED = ("vllm", "sglang")  # `owned_by` of their models
_GO_ON = "Continue your last message exactly where it stops, without repeating any of it."
_MISSING = -9999.0  # vLLM's number for a token that has no logprob


class Malformed(Exception):
    """An answer that is none: asked again, it may be."""


@dataclass(frozen=True)
class Dialect:
    """How one kind of server is asked for one model. `longest`: tokens of prompt and response, where it is known."""

    model: str
    extended: bool = False
    longest: int | None = None
    chat: TeacherChat | None = None

    @property
    def path(self) -> str:
        return "/chat/completions" if self.chat is None else "/completions"

    def body(self, request: Request) -> dict[str, Any]:
        """InputError where the template cannot hold the request, or the prompt leaves no room for a response."""
        asked: dict[str, Any] = {
            "model": self.model, "temperature": request.temperature, "top_p": request.top_p, "seed": request.seed,
            "max_tokens": request.max_new_tokens,
        }  # fmt: skip
        if request.top_k:
            asked["top_k"] = request.top_k
        if self.extended:
            asked |= {"top_k": request.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0}
            asked |= {"skip_special_tokens": False, "return_token_ids": True}
        if self.chat is None:
            return asked | {"logprobs": True} | self._messages(request)
        if self.longest:
            prompt, asked["max_tokens"] = self.chat.prompt_within(request, self.longest)
        else:
            prompt = self.chat.prompt(request)
        if self.extended:
            asked["stop_token_ids"] = sorted(self.chat.stop_ids)
        return asked | {"prompt": prompt[0], "logprobs": 1}

    def _messages(self, request: Request) -> dict[str, Any]:
        if not request.prefix:
            return {"messages": request.messages}
        begun = {"role": "assistant", "content": request.prefix}
        if self.extended:
            messages = [*request.messages, begun]
            return {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
        return {"messages": [*request.messages, begun, {"role": "user", "content": _GO_ON}]}

    def read(self, request: Request, answer: Any) -> Sampled | Failed:
        """The response in a decoded JSON answer. Raises Malformed."""
        try:
            choice = answer["choices"][0]
            reason = str(choice.get("finish_reason") or "unknown")
            if choice.get("logprobs") is None:
                return Failed("the server gives no logprobs; it must be one that does")
            ids, logprobs, pieces = _tokens(choice)
            said, thought = (choice["text"], "") if self.chat is not None else _said(choice["message"])
            (said + thought).encode()
        except UnicodeEncodeError as error:
            return Failed(f"the text has half a surrogate pair at character {error.start}")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise Malformed(f"the answer has another form than expected ({type(error).__name__}: {error})") from None
        if _MISSING in logprobs:
            return Failed("the server gives no logprob for some tokens")
        if self.chat is not None and ids is not None:
            return self.chat.response(self.chat.prompt(request), request, ids, logprobs, reason)
        found = _spelt(pieces, said or thought)
        if found is None:
            if not (said or thought).strip():
                return Failed(f"the text is empty ({len(pieces)} tokens, finish reason {reason})")
            return Failed("the tokens do not spell the text: give the directory of the model's tokenizer and template")
        text, ends = found
        opened = self.chat.prompt(request)[1] if self.chat is not None else _opened(text, bool(thought))
        size = 0 if request.prefix else len(opened.encode())
        return checked(Sampled(opened[:size] + text, size, ids, logprobs, [size + end for end in ends], reason))


def _tokens(choice: dict[str, Any]) -> tuple[list[int] | None, list[float], list[bytes]]:
    """Ids where there are some, logprobs (NaN for none), bytes of an answer's tokens."""
    found = choice["logprobs"]
    if found.get("content") is not None:
        entries = found["content"]
        values = [entry.get("logprob") for entry in entries]
        pieces = [_bytes(entry) for entry in entries]
        ids = [entry.get("id") for entry in entries]
    else:
        values = found["token_logprobs"]
        pieces = [str(token).encode() for token in found["tokens"]]
        ids = [None] * len(values)
    if choice.get("token_ids") is not None:
        ids = choice["token_ids"]
    known = bool(ids) and all(isinstance(token, int) for token in ids)
    return list(ids) if known else None, [math.nan if value is None else float(value) for value in values], pieces


def _bytes(entry: dict[str, Any]) -> bytes:
    return bytes(entry["bytes"]) if entry.get("bytes") is not None else str(entry["token"]).encode()


def _said(message: dict[str, Any]) -> tuple[str, str]:
    """The answer, and the thinking that some servers keep apart from it."""
    thought = message.get("reasoning_content") or message.get("reasoning")
    return str(message.get("content") or ""), str(thought or "")


def _spelt(pieces: list[bytes], shown: str) -> tuple[str, list[int]] | None:
    """What the tokens spell, and where each ends in it; None where that does not end in what the server shows of it.

    Thinking and special tokens may be missing from `shown`. Up to two tokens behind it end the turn: they go.
    """
    text, ends = text_and_ends(pieces)
    raw, last = text.encode(), shown.strip().encode()
    for count in range(len(pieces), max(0, len(pieces) - 3), -1):
        end = ends[count - 1]
        if last and raw[:end].rstrip().endswith(last):
            return raw[:end].decode(), [min(e, end) for e in ends]
    return None


def _opened(text: str, thinks: bool) -> str:
    """A thinking part that is closed but never opened, or kept apart without markers, was opened by the prompt."""
    before, closed, _ = text.partition("</think>")
    if "<think>" in before or "<|channel|>" in before:
        return ""
    return "<think>\n" if closed or thinks else ""


def choose_model(wanted: str, answer: Any) -> Dialect:
    """For `wanted`, or the first, of the models that /models names. Raises Malformed, InputError where it lacks it."""
    try:
        listed = {str(entry["id"]): entry for entry in answer["data"]}
        if not listed:
            raise Malformed("/models lists no model")  # yet: it may be loading one
        model = wanted or next(iter(listed))
        if model not in listed:
            raise InputError(f"serves {', '.join(listed)}, not {wanted}")
        longest = listed[model].get("max_model_len")
        extended = str(listed[model].get("owned_by")).lower() in _EXTENDED
        return Dialect(model, extended, longest if isinstance(longest, int) else None)
    except (KeyError, TypeError, AttributeError):
        raise Malformed("/models does not list models") from None

"""A teacher's candidate as a student can score it: the document's ids, the sentences, and which tokens are whose.

    prepared = Preparer(chat, teacher=teacher_tokenizer).prepare(candidate)     # Unscorable says why not

The text that the student reads is what training would give it: <think>…</think>answer in the student's own chat
template. Where the teacher writes other delimiters (harmony's channels), its tokens are found there by the text of the
parts between them, which must be equal byte for byte.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from dasd_engine.align import Part, Segments, Spelling, Tokens, assign, from_ends, match_parts, move, move_back
from dasd_engine.chat import DEFAULT_SYSTEM, Chat, Message, response_text, with_system
from dasd_engine.errors import InputError
from dasd_engine.filters import CLOSE, OPEN, normalise
from dasd_engine.sentences import Span, is_marker, merge_short, split, to_bytes
from dasd_engine.token_text import TokenText

PARTS = ("all", "think", "answer")
SURE = 1e-3  # natural log: rounding may lift a logprob that far above 0


class Unscorable(Exception):
    """A candidate without a score: `kind`, a few words that are counted, and the detail."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


@dataclass(frozen=True)
class Candidate:
    """A row of candidates.jsonl, or of the released files, with the teacher's tokens as they came."""

    head: dict[str, Any]  # id, candidate, temperature
    messages: list[Message]
    text: str | None  # the response; None: what the ids spell
    token_ids: Any
    logprobs: Any
    token_ends: Any = None  # None: where the ids, decoded by the teacher's tokeniser, end
    opened: int = 0


@dataclass(frozen=True)
class Scorable:
    head: dict[str, Any]
    ids: npt.NDArray[np.uint32]  # the student's document: prompt, response, end of turn
    response: Span  # tokens of the response in it, without the end of the turn
    sentences: list[Span]  # bytes of the candidate's text
    teacher: Segments  # of teacher_logprobs
    teacher_logprobs: npt.NDArray[np.float64]
    student: Segments  # of the response's tokens


def read_candidate(row: dict[str, Any], where: str) -> Candidate:
    """A row of sample's candidates.jsonl. InputError naming `where` and the field that makes it none."""
    head = {"id": row.get("id"), "candidate": row.get("candidate"), "temperature": row.get("temperature")}
    if not isinstance(head["id"], str) or not isinstance(head["candidate"], int):
        raise InputError(f"{where}: `id` must be a string and `candidate` a number; is this a candidates.jsonl?")
    messages, text, opened = row.get("messages"), row.get("text"), row.get("opened", 0)
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise InputError(f"{where}: `messages` must be a list of objects with the strings role and content")
    if not isinstance(text, str | None) or not isinstance(opened, int):
        raise InputError(f"{where}: `text` must be a string and `opened` a number of bytes")
    return Candidate(head, messages, text, row.get("token_ids"), row.get("logprobs"), row.get("token_ends"), opened)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


class Preparer:
    """Tokenises for one student. `teacher`: the teacher's tokeniser, for candidates without token_ends."""

    def __init__(
        self,
        chat: Chat,
        *,
        teacher: tokenizers.Tokenizer | None = None,
        system: str = DEFAULT_SYSTEM,
        context: int,
        part: str = "all",
        minimum: int = 3,
    ):
        """`context`: longest document in the student's tokens. `part`: which sentences count, one of PARTS."""
        self.chat, self.system, self.context, self.part, self.minimum = chat, system, context, part, minimum
        self._teacher = TokenText(teacher) if teacher is not None else None
        added = teacher.get_added_tokens_decoder() if teacher is not None else {}
        self._special = {token for token, entry in added.items() if entry.special}
        self._spelling = Spelling(chat.tokenizer)
        self._end_space = chat.end_of_turn[: -len(chat.end_of_turn.lstrip())]

    def prepare(self, candidate: Candidate) -> Scorable:
        """Raises Unscorable."""
        logprobs = _checked_logprobs(candidate)
        text, tokens = self._teacher_tokens(candidate)
        data = _encoded(text)
        if not data.strip():
            raise Unscorable("empty text", "nothing but white space")
        output, matched = normalise(text), list[Part]()
        if output != text:
            matched = _matched(data, _encoded(output))
            data, tokens = _encoded(output), move(tokens, matched)
        ids, response, student = self._student_tokens(candidate.messages, output, len(data))
        sentences, of_teacher, of_student = self._sentences(data, tokens, student)
        return Scorable(
            candidate.head, ids, response, move_back(sentences, matched) if matched else sentences,
            of_teacher, logprobs, of_student,
        )  # fmt: skip

    def _teacher_tokens(self, candidate: Candidate) -> tuple[str, Tokens]:
        """The response and where the teacher's tokens lie in it."""
        text, ends = candidate.text, candidate.token_ends
        if text is not None and ends is not None:
            if not isinstance(ends, list) or not all(type(end) is int for end in ends):
                raise Unscorable("token_ends", "must be a list of whole numbers")
            if len(ends) != len(candidate.token_ids):
                raise Unscorable("lengths", f"{len(candidate.token_ids)} token_ids, {len(ends)} token_ends")
            size = len(_encoded(text))
            try:
                tokens = from_ends(ends, candidate.opened)
            except (InputError, OverflowError) as error:
                raise Unscorable("token_ends", str(error)) from None
            if candidate.opened < 0 or tokens.ends[-1] != size:
                raise Unscorable("token_ends", f"end at byte {tokens.ends[-1]} of a text of {size} bytes")
            return text, tokens
        if self._teacher is None:
            raise Unscorable("no teacher tokenizer", "without text and token_ends its tokenizer is needed")
        try:
            spelt, ends = self._teacher.text_and_ends(candidate.token_ids)
        except (TypeError, OverflowError) as error:
            raise Unscorable("token_ids", str(error)) from None
        source, last = spelt.encode(), len(candidate.token_ids)
        while last and candidate.token_ids[last - 1] in self._special:  # the end of the turn
            last -= 1
        last = ends[last - 1] if last else 0
        if text is None:
            return source[:last].decode("utf-8", "replace"), from_ends(np.minimum(ends, last))
        data = _encoded(text)
        if source[:last] == data[candidate.opened :]:
            return text, from_ends(np.minimum(ends, last) + candidate.opened, candidate.opened)
        return text, move(from_ends(ends), _matched(source, data))

    def _student_tokens(
        self, messages: Sequence[Message], output: str, size: int
    ) -> tuple[npt.NDArray[np.uint32], Span, Tokens]:
        """The document's ids, the response's tokens in it, and where those lie in `output`, of `size` bytes."""
        try:
            said = [*messages, {"role": "assistant", "content": output}]
            documents = self.chat.documents(said, system=self.system, untrained=range(len(messages)))
            prompt = self.chat.render(with_system(messages, self.system), add_generation_prompt=True)
            response = response_text(output, prompt, len(messages))
        except InputError as error:
            raise Unscorable("template", str(error)) from None
        ids, spans = documents[-1]
        begin, end = spans[-1][0], spans[-1][1] - 1  # behind it stands the end of the turn
        if len(ids) > self.context:
            raise Unscorable("context", f"{len(ids)} tokens, more than the student's {self.context}")
        if begin == 0:
            raise Unscorable("template", "it writes nothing in front of a response")
        try:
            tokens = self._spelling(ids[begin:end], response + self._end_space)
        except InputError as error:
            raise Unscorable("student tokens", str(error)) from None
        # The generation prompt may open <think> itself: the response is the rest.
        skipped = size - len(response.encode())
        return ids, (begin, end), Tokens(tokens.begins + skipped, np.minimum(tokens.ends + skipped, size))

    def _sentences(self, data: bytes, teacher: Tokens, student: Tokens) -> tuple[list[Span], Segments, Segments]:
        """The sentences of the parts that count, short ones joined, each with tokens of both; and those tokens."""
        thinking = data.find(CLOSE.encode())
        if thinking < 0:
            thinking = len(data) if OPEN.encode() in data else 0
        begin, end = {"all": (0, len(data)), "think": (0, thinking), "answer": (thinking, len(data))}[self.part]
        spans = [span for span in split(data) if begin <= span[0] < end and not is_marker(data, span)]
        alone = [assign(tokens, spans) for tokens in (teacher, student)]
        merged = merge_short(spans, alone[0].counts.tolist(), alone[1].counts.tolist(), self.minimum)
        both = [segments.joined(spans, merged) for segments in alone]
        empty = (both[0].counts == 0) | (both[1].counts == 0)
        if empty.any():  # a whole part that is one token, which begins in front of it
            merged = [span for span, none in zip(merged, empty, strict=True) if not none]
            both = [assign(tokens, merged) for tokens in (teacher, student)]
        if not merged:
            where = {"all": "the response", "think": "the thinking", "answer": "the answer"}[self.part]
            raise Unscorable("no sentences", f"{where} has no sentence with tokens of both models")
        return merged, both[0], both[1]


def _encoded(text: str) -> bytes:
    try:
        return to_bytes(text)
    except InputError as error:
        raise Unscorable("not Unicode", str(error)) from None


def _matched(source: bytes, output: bytes) -> list[Part]:
    try:
        return match_parts(source, output)
    except InputError as error:
        raise Unscorable("teacher's text", str(error)) from None


def _checked_logprobs(candidate: Candidate) -> npt.NDArray[np.float64]:
    """The teacher's logprobs as an array, when there is a finite one, at most 0, for every token."""
    ids, values = candidate.token_ids, candidate.logprobs
    if not isinstance(ids, list) or not isinstance(values, list) or not ids:
        raise Unscorable("no logprobs", "token_ids and logprobs must be lists, not empty")
    if len(ids) != len(values):
        raise Unscorable("lengths", f"{len(ids)} token_ids, {len(values)} logprobs")
    try:
        logprobs = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise Unscorable("logprobs", "not all are numbers") from None
    bad = ~(np.isfinite(logprobs) & (logprobs <= SURE))
    if bad.any():
        at = int(np.argmax(bad))
        raise Unscorable("logprobs", f"that of token {at} is {values[at]}; {int(bad.sum())} are none of a probability")
    return np.minimum(logprobs, 0)

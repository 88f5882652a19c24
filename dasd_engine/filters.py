"""Response filters: which of a teacher's responses may be trained on, and the reason for each that may not.

    output, drop = examine(text, finish_reason="stop", tokens=13800, filters=Filters(context=65536))
    if drop is None: ...                              # train on `output`: <think>…</think>answer

The kinds of refusal are those published with the method (arXiv 2601.09088): too long for the training context, cut off,
tool calls, no thinking part or no final answer, repetition. No text states a threshold for repetition: those of
`Repetition` are ours. A check of the answer is not part of the published recipe; `right_only` adds one.

`normalise` writes a teacher's own delimiters as <think>…</think>answer:

    gpt-oss (harmony)   <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>
    Seed-OSS            <seed:think>…</seed:think>          Magistral          [THINK]…[/THINK]
    Kimi-VL, Kimi-Dev   ◁think▷…◁/think▷                    MiniMax-M3         <mm:think>…</mm:think>
    Command A           <|START_THINKING|>…<|END_THINKING|><|START_RESPONSE|>…<|END_RESPONSE|>
    others              <thinking>, <thought>, <reasoning>  and <answer>…</answer>, <response>…</response> behind any

Text that has <think> already stays as it is, byte for byte, but for such an envelope around its answer. All of it takes
time linear in the text (n log n for the n-grams), whatever the text holds.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dasd_engine.errors import InputError
from dasd_engine.problems import final_answer, is_right

REASONS = {  # in the order in which they are asked: a response is counted under the first that applies
    "not_text": "not valid Unicode",
    "empty": "no text",
    "truncated": "cut off by the token limit",
    "tool_call": "calls a tool",
    "not_finished": "ended for another reason than its end of turn",
    "markers": "thinking markers that make no one thinking part and one answer",
    "no_thinking": "no thinking part",
    "no_answer": "no final answer",
    "not_trainable": "the student's template has no place for it",
    "too_long": "longer than the training context",
    "repetition": "repeats itself",
    "no_known_answer": "right answers only: none is known for the question",
    "wrong_answer": "right answers only: wrong",
    "not_scored": "fit to train on, but without a score",
}

OPEN, CLOSE = "<think>", "</think>"
_PAIRS = (
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<mm:think>", "</mm:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
)
_ENVELOPES = (
    ("<answer>", "</answer>"),
    ("<response>", "</response>"),
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
)
# What opens a call: Qwen and others, Seed-OSS, Mistral, Llama 3, Command A, DeepSeek, Kimi K2; harmony has its parser.
_TOOL_CALL = re.compile(
    r"<tool_call>|<tool_calls>|<function_call>|<seed:tool_call>|\[TOOL_CALLS\]|<\|python_tag\|>|<\|START_ACTION\|>"
    r"|<｜tool▁calls▁begin｜>|<\|tool_calls_section_begin\|>"
)
_HARMONY = re.compile(r"(<\|(?:start|channel|message|constrain|end|return|call)\|>)")

_NGRAM = 16  # units
# A word; else one character, so that scripts without spaces, and words without an end, have units too.
_UNIT = re.compile(r"[A-Za-z]{1,16}+(?![A-Za-z])|\S")


@dataclass(frozen=True)
class Repetition:
    """When a thinking part or an answer, each for itself, repeats too much. Every value is ours.

    Shares are of characters in lines or paragraphs that stood there before, white space at their ends aside; and of
    the n-grams of 16 units (words; digits and other characters one by one) that stood there before.
    """

    lines: float = 0.5
    paragraphs: float = 0.3
    ngrams: float = 0.6
    loop: int = 8  # times the same passage, of any length, in a row
    characters: int = 400  # less repeated text than this is never a reason


@dataclass(frozen=True)
class Filters:
    context: int = 65536  # tokens of the student, as `tokens` of examine counts them
    thinking: bool = True  # a response without a thinking part is dropped
    right_only: bool = False  # judged as dasd_engine.evaluate does
    repetition: Repetition | None = field(default_factory=Repetition)  # None: not asked


@dataclass(frozen=True)
class Drop:
    reason: str  # a key of REASONS
    detail: str


def examine(
    text: str,
    *,
    finish_reason: str,
    tokens: int | Callable[[str], int],
    answer: str | None = None,
    filters: Filters = Filters(),  # noqa: B008 (immutable)
    stop_tokens: Iterable[str] = (),
) -> tuple[str, Drop | None]:
    """(the response as <think>…</think>answer, None), or with the reason for which it may not be trained on.

    `tokens`: what counts against the context, in the student's tokens, or a function of the output.
    `answer`: what right_only compares with. `stop_tokens`: texts of tokens that end a turn of the student.
    """
    if reason := _unfinished(text, finish_reason):
        return text, reason
    if _calls_tool(text):
        return text, Drop("tool_call", "finish reason stop, but the text calls one")
    output = normalise(text)
    thinking, said, fault = split(output)
    if fault:
        return output, Drop("markers", fault)
    if filters.thinking and not (thinking or "").strip():
        return output, Drop("no_thinking", f"no {OPEN}" if thinking is None else f"nothing between {OPEN} and {CLOSE}")
    if not (said or "").strip():
        return output, Drop("no_answer", f"no {CLOSE}" if said is None else f"nothing behind {CLOSE}")
    for token in stop_tokens:
        if token in output:
            return output, Drop("not_trainable", f"holds {token}, which ends a turn")
    try:
        length = tokens(output) if callable(tokens) else tokens
    except InputError as error:  # of dasd_engine.chat
        return output, Drop("not_trainable", str(error))
    if length > filters.context:
        return output, Drop("too_long", f"{length:,} tokens")
    if filters.repetition:
        for part, name in ((thinking, "thinking"), (said, "answer")):
            if part and (found := repetition(part, filters.repetition)):
                return output, Drop("repetition", f"{name}: {found}")
    if filters.right_only:
        return output, _wrong(output, answer)
    return output, None


def _unfinished(text: str, finish_reason: str) -> Drop | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Drop("not_text", f"half a surrogate pair at character {error.start}")
    if finish_reason == "length":
        return Drop("truncated", f"after {len(text):,} characters")
    if finish_reason in ("tool_calls", "function_call"):
        return Drop("tool_call", f"finish reason {finish_reason}")
    if finish_reason != "stop":
        return Drop("not_finished", f"finish reason {finish_reason}")
    return None if text.strip() else Drop("empty", f"{len(text)} characters of white space")


def _calls_tool(text: str) -> bool:
    if any(" to=" in header or closer == "<|call|>" for header, _, closer in _harmony(text) or ()):
        return True
    return bool(_TOOL_CALL.search(text))


def _wrong(output: str, expected: str | None) -> Drop | None:
    if expected is None:
        return Drop("no_known_answer", "")
    given = final_answer(output)
    if given is not None and is_right(given, expected):
        return None
    return Drop("wrong_answer", f"{_short(given or '')} is not {_short(expected)}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:28]} … {text[-28:]}")


# ---------------------------------------------------------------------------------------------- delimiters


def normalise(text: str) -> str:
    """The response as <think>…</think>answer, when it is written in a form that this module's docstring names.

    A response that only closes its thinking, the generation prompt having opened it, gets the opening in front.
    """
    if (messages := _harmony(text)) is not None:
        return _from_harmony(messages) or text
    if OPEN not in text and CLOSE not in text:
        for begin, end in _PAIRS:
            if text.lstrip().startswith(begin) or (begin not in text and text.count(end) == 1):
                text = text.replace(begin, OPEN).replace(end, CLOSE)
                break
    if OPEN not in text and text.count(CLOSE) == 1:
        text = OPEN + text
    thinking, closed, said = text.rpartition(CLOSE)
    return thinking + closed + _unwrapped(said)


def _unwrapped(said: str) -> str:
    bare = said.strip()
    for begin, end in _ENVELOPES:
        if bare.startswith(begin) and bare.endswith(end) and bare.count(begin) == bare.count(end) == 1:
            return bare[len(begin) : -len(end)]
    return said


def split(output: str) -> tuple[str | None, str | None, str]:
    """(thinking or None, answer or None, what is wrong with the markers or "") of <think>…</think>answer."""
    opened, closed = output.count(OPEN), output.count(CLOSE)
    if not opened and not closed:
        # Harmony that is not analysis and then final stays as it was.
        return None, output, "harmony messages other than analysis, then final" if _harmony(output) else ""
    if opened > 1 or closed > 1 or not opened:
        return None, None, f"{opened} {OPEN} and {closed} {CLOSE}"
    before, _, rest = output.partition(OPEN)
    if before.strip() or CLOSE in before:
        return None, None, f"text in front of {OPEN}"
    thinking, found, said = rest.partition(CLOSE)
    return thinking, said if found else None, ""


def _harmony(text: str) -> list[tuple[str, str, str]] | None:
    """(header, content, closing token or "") of each message of a gpt-oss response; None for any other text.

    https://github.com/openai/harmony/blob/main/docs/format.md. The first <|start|>assistant belongs to the prompt.
    """
    if not text.lstrip().startswith(("<|channel|>", "<|start|>assistant")):
        return None
    pieces = _HARMONY.split(text)
    messages: list[tuple[str, str, str]] = []
    header, content = pieces[0], None
    for token, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        if token in ("<|end|>", "<|return|>", "<|call|>"):
            messages.append((header, content or "", token))
            header, content = piece, None
        elif token == "<|message|>" and content is None:
            content = piece
        elif content is None:
            header += token + piece
        else:  # a message begins before the last one has ended
            messages.append((header, content, ""))
            header, content = token + piece, None
    if content is not None or header.strip():
        messages.append((header, content or "", ""))
    return messages


def _from_harmony(messages: list[tuple[str, str, str]]) -> str | None:
    """<think>…</think>answer of analysis messages and then a final one; None where it is anything else."""
    headers = [header.partition("<|channel|>") for header, _, _ in messages]
    if any(role.strip() not in ("", "<|start|>assistant") for role, _, _ in headers):
        return None
    channels = [rest.split("<|")[0].strip() for _, _, rest in headers]
    contents = [content for _, content, _ in messages]
    if channels == ["analysis"] * len(channels):
        return OPEN + "\n".join(contents)
    if channels != ["analysis"] * (len(channels) - 1) + ["final"]:
        return None
    return OPEN + "\n".join(contents[:-1]) + CLOSE + contents[-1] if len(contents) > 1 else contents[0]


# ---------------------------------------------------------------------------------------------- repetition


def repetition(text: str, limits: Repetition) -> str:
    """How a text repeats itself beyond the limits, in words; "" when it does not."""
    if len(text) < limits.characters:
        return ""
    lines = [line.strip() for line in text.split("\n")]
    parts = {"lines": [line for line in lines if line], "paragraphs": _paragraphs(lines)}
    for name, most in (("lines", limits.lines), ("paragraphs", limits.paragraphs)):
        total, again = sum(map(len, parts[name])), _repeated_characters(parts[name])
        if again >= limits.characters and again > most * total:
            return f"{again / total:.0%} in {name} said before"
    return _ngrams(text, limits)


def _paragraphs(lines: list[str]) -> list[str]:
    """Lines joined where no blank line is between them."""
    found: list[list[str]] = [[]]
    for line in lines:
        if line:
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return ["\n".join(paragraph) for paragraph in found if paragraph]


def _repeated_characters(parts: list[str]) -> int:
    seen: set[str] = set()
    again = 0
    for part in parts:
        again += len(part) if part in seen else 0
        seen.add(part)
    return again


def _ngrams(text: str, limits: Repetition) -> str:
    """A passage said over and over in a row, or n-grams that mostly stood there before."""
    units = _UNIT.findall(text)
    if len(units) <= _NGRAM:
        return ""
    back = _distances(units)
    # Where the nearest earlier occurrence stays p units behind over a run of n-grams, a passage of p units repeats.
    edges = np.flatnonzero(np.diff(back)) + 1
    begins = np.concatenate([[0], edges])
    runs = np.diff(np.concatenate([begins, [len(back)]]))
    periods = back[begins]
    spans = periods + runs + _NGRAM - 1  # units from the passage's first occurrence to the end of its last
    ends = np.concatenate([[0], np.cumsum(np.fromiter(map(len, units), np.int64, len(units)))])
    looping = np.flatnonzero((periods > 0) & (spans >= limits.loop * periods))
    for index in looping:
        begin, period = int(begins[index] - periods[index]), int(periods[index])
        if ends[begin + spans[index]] - ends[begin] >= limits.characters:
            passage = _short(" ".join(units[begin : begin + min(period, 40)]))
            return f"{passage} {int(spans[index]) // period} times in a row"
    again = float((back > 0).mean())
    if again > limits.ngrams and again * len(text) >= limits.characters:
        return f"{again:.0%} of its passages of {_NGRAM} words and signs said before"
    return ""


def _distances(units: list[str]) -> npt.NDArray[np.int64]:
    """[n-grams] How many units before each n-gram the same one last stood, 0 where it did not.

    N-grams are told apart by 64-bit hashes.
    """
    number = {unit: index for index, unit in enumerate(dict.fromkeys(units))}
    ids = np.fromiter(map(number.__getitem__, units), np.uint64, len(units))
    # A random-looking word for each unit (splitmix64), then hash of 2n units = hash of n · odd number + hash of next n.
    ids = (ids + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    ids = (ids ^ (ids >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (ids ^ (ids >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    width = 1
    while width < _NGRAM:
        hashes = hashes[:-width] * np.uint64(0xD6E8FEB86659FD93 + 2 * width) + hashes[width:]
        width *= 2
    order = np.argsort(hashes, kind="stable")
    same = hashes[order[1:]] == hashes[order[:-1]]
    back = np.zeros(len(hashes), np.int64)
    back[order[1:][same]] = (order[1:] - order[:-1])[same]
    return back

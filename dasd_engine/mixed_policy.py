"""Mixed policy: where a student's cut-off response is cut, and how a teacher is asked to continue it.

A response of n sampled tokens is cut behind ⌊u·n⌋ of them, u ~ Uniform(½, 1) a hash of (seed, question): at a token of
the student, moved back to the end of a whole character, so that the text in front of the cut is exactly what its ids
spell. The distribution is published nowhere and ours, so is the boundary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import tokenizers

from dasd_engine.chat import Message
from dasd_engine.errors import InputError
from dasd_engine.filters import CLOSE, OPEN, Drop, normalise, split

MARKERS = ("think", "harmony")  # how a teacher delimits its thinking
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_ANALYSIS, _FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"

INSTRUCTION = """

The beginning of a response to this is given below. Continue it from exactly where it stops, without repeating any of \
it and without a word about doing so.{unfinished} What you write is put directly behind it.

{prefix}"""
UNFINISHED = f"""It is reasoning between {OPEN} and {CLOSE}, which has not ended yet: finish the reasoning, write \
{CLOSE}, and then the final answer."""


@dataclass(frozen=True)
class Cut:
    """`tokens` of the student are kept, which spell `text` (what the generation prompt opened is in front of it)."""

    share: float  # u
    tokens: int
    text: str


def hash_uniform(seed: int, *names: str) -> float:
    """In [0, 1), of 53 bits: a hash of the seed and the names, the same on every machine."""
    digest = sha256("\0".join([str(seed), *names]).encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "little") >> 11) * 2.0**-53


def token_cap(teacher_tokens: int, factor: float) -> int:
    """Tokens that a student may write where the teacher wrote so many: ⌈factor · teacher_tokens⌉."""
    return max(1, math.ceil(round(factor * teacher_tokens, 6)))  # 1.1 · 10 is 11.000000000000002


def cut(ids: Sequence[int], seed: int, question: str, tokenizer: tokenizers.Tokenizer, opened: str = "") -> Cut | Drop:
    """Where the response `ids` is cut; a Drop when nothing is in front of the cut, or what is there is not text."""
    share = 0.5 + 0.5 * hash_uniform(seed, question, "cut")
    count = math.floor(share * len(ids))
    text = tokenizer.decode(list(ids[:count]), skip_special_tokens=False)
    for _ in range(3):  # a character has four bytes at most, so three tokens may lie in an unfinished one
        if not text.endswith(_BROKEN):
            break
        count -= 1
        text = tokenizer.decode(list(ids[:count]), skip_special_tokens=False)
    if _BROKEN in text:
        return Drop("not_text", f"token {count} of {len(ids)}: the student's tokens in front of it spell no UTF-8")
    if not text.strip():
        return Drop("empty", f"nothing in front of token {count} of {len(ids)}")
    return Cut(share, count, opened + text)


def refusal(prefix: str, special: Sequence[str], thinking: bool) -> Drop | None:
    """Why a prefix cannot become a response, known before the teacher is asked; `special`: tokens that are no text."""
    for token in special:
        if token in prefix and token not in (OPEN, CLOSE):
            return Drop("special_token", f"the student wrote {token}")
    if fault := split(prefix)[2]:
        return Drop("markers", fault)
    if thinking and OPEN not in prefix:
        return Drop("no_thinking", f"the student wrote no {OPEN}")
    return None


def as_prefill(prefix: str, markers: str) -> str:
    """The prefix in the teacher's own delimiters; `markers` is one of MARKERS."""
    if markers == "think":
        return prefix
    if markers != "harmony":
        raise InputError(f"markers {markers!r}: must be one of {', '.join(MARKERS)}")
    thinking, said, _ = split(prefix)
    if thinking is None:
        return _FINAL + prefix
    begun = _ANALYSIS + thinking
    return begun if said is None else f"{begun}<|end|><|start|>assistant{_FINAL}{said}"


def as_instruction(messages: Sequence[Message], prefix: str) -> list[Message]:
    """The fallback for teachers that cannot be prefilled: the last message asks for the continuation."""
    unfinished = f" {UNFINISHED}" if OPEN in prefix and CLOSE not in prefix else ""
    asked = INSTRUCTION.format(unfinished=unfinished, prefix=prefix)
    *before, last = messages
    if last["role"] != "user":
        return [*messages, {"role": "user", "content": asked.lstrip()}]
    return [*before, {**last, "content": last["content"] + asked}]


def join(prefix: str, continuation: str, *, markers: str, instructed: bool) -> str:
    """The whole response as the filters take it; normalised, it begins with `prefix`, or something is wrong with it.

    An instructed teacher thinks for itself before it continues: that thinking is left out.
    """
    if not instructed:
        return as_prefill(prefix, markers) + continuation
    if CLOSE in continuation and not continuation.lstrip().startswith(OPEN):
        return prefix + continuation  # that is the end of the student's thinking
    own = normalise(continuation)
    return prefix + (own.partition(CLOSE)[2].lstrip("\n") if own.lstrip().startswith(OPEN) else own)

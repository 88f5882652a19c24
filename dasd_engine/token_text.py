"""Where tokens lie in the text they spell: token ids to the decoded text and, for every token, the byte it ends at.

    text, ends = TokenText(tokenizer).text_and_ends(ids)    # text: tokenizer.decode(ids, skip_special_tokens=False)

Decoding tokens one by one breaks characters that are spread over several tokens, and drops what a decoder does at the
beginning of a text. Here the ends are offsets in the UTF-8 bytes of the whole decoded text: a token that ends inside a
character ends inside its bytes. Where the ids do not spell UTF-8, the text has U+FFFD (three bytes) for what is broken,
and a token that ends within that ends within the three bytes.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import tokenizers

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
_LOOK_BACK = 8  # tokens in front of one that is decoded with them; no decoder known looks back further than one


class TokenText:
    """Byte-level BPE by a table of each token's bytes; any other tokeniser by decoding pieces of the text."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self._is_byte_level = is_byte_level(json.loads(tokenizer.to_str()).get("decoder"))
        self._bytes: dict[int, bytes] = {}  # of the tokens seen

    def text_and_ends(self, ids: Sequence[int], *, after: Sequence[int] = ()) -> tuple[str, list[int]]:
        """The decoded text, special tokens kept, and for every token the byte of its UTF-8 where it ends.

        `after`: ids that stand in front of these, where the text goes on from theirs: then it keeps a space that
        decoders take away from the beginning of a text.
        """
        if after:
            front = list(after[-_LOOK_BACK:])
            text, ends = self.text_and_ends([*front, *ids])
            begin = ends[len(front) - 1]
            return text.encode()[begin:].decode(errors="replace"), [end - begin for end in ends[len(front) :]]
        if self._is_byte_level:
            return text_and_ends(self._bytes_of(token) for token in ids)
        tokens = [self._tokenizer.id_to_token(token) for token in ids]
        known = [i for i, token in enumerate(tokens) if token is not None]  # others decode to nothing
        text, ends_known = self._known_ends([ids[i] for i in known])
        ends = [0] * len(ids)
        for i, end in zip(known, ends_known, strict=True):
            ends[i] = end
        return text, list(accumulate(ends, max))

    def _known_ends(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        text = self._decode(ids)
        length = len(text.encode())
        ends = self._ends(ids)
        if (ends[-1] if ends else 0) != length:  # a decoder that looks far back: every beginning on its own
            ends = [min(len(self._decode(ids[: i + 1]).encode()), length) for i in range(len(ids))]
        return text, list(accumulate(ends, max))

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _bytes_of(self, token: int) -> bytes:
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = token_bytes(self._tokenizer.id_to_token(token))
        return found

    def _ends(self, ids: Sequence[int]) -> list[int]:
        """Ends by what each unit adds to a window in front of it. A unit is a token, or a run of byte tokens, which
        decode together: as many bytes each, one where they spell UTF-8 and three (U+FFFD) where not."""
        ends: list[int] = []
        at = begin = 0
        for end in self._units(ids):
            front = ids[max(0, begin - _LOOK_BACK) : begin]
            with_front, alone = self._decode([*front, *ids[begin:end]]), self._decode(front)
            added = len(with_front.encode()) - len(alone.encode())
            count = end - begin
            ends += [at + added * (i + 1) // count for i in range(count)]
            at, begin = at + added, end
        return ends

    def _units(self, ids: Sequence[int]) -> list[int]:
        """Where units end."""
        is_byte = [bool(_BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token) or "")) for token in ids]
        return [i + 1 for i in range(len(ids)) if i + 1 == len(ids) or not (is_byte[i] and is_byte[i + 1])]


def text_and_ends(pieces: Iterable[bytes]) -> tuple[str, list[int]]:
    """The text that consecutive bytes spell, U+FFFD for what is not UTF-8, and where in it each piece ends."""
    pieces = list(pieces)
    raw = b"".join(pieces)
    ends = list(accumulate(map(len, pieces)))
    try:
        return raw.decode("utf-8"), ends
    except UnicodeDecodeError:
        return _replaced(raw, ends)


def _replaced(raw: bytes, ends: list[int]) -> tuple[str, list[int]]:
    """The same where the bytes are broken: the ends behind a replacement move by what it is longer or shorter."""
    text, breaks, at = "", list[tuple[int, int]](), 0  # breaks: (begin, end) in raw
    while True:
        try:
            text += raw[at:].decode("utf-8")
            break
        except UnicodeDecodeError as error:
            text += raw[at : at + error.start].decode("utf-8") + REPLACEMENT
            breaks.append((at + error.start, at + error.end))
            at += error.end
    moved, index, shift = [], 0, 0
    for end in ends:
        while index < len(breaks) and breaks[index][1] <= end:
            shift += 3 - (breaks[index][1] - breaks[index][0])
            index += 1
        inside = index < len(breaks) and breaks[index][0] < end
        # Broken pieces are at most three bytes long, so this stays inside the replacement.
        moved.append(end + shift if not inside else breaks[index][0] + shift + end - breaks[index][0])
    return text, moved


def token_bytes(token: str | None) -> bytes:
    """What a byte-level decoder makes of a token: bytes where every character stands for one, else its own UTF-8."""
    if token is None:  # the model's vocabulary may be larger than the tokeniser's
        return b""
    table = _byte_characters()
    try:
        return bytes(table[character] for character in token)
    except KeyError:
        return token.encode()


@cache
def _byte_characters() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others for 256, 257, ..."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if decoder is None:
        return False
    if decoder["type"] == "Sequence":
        return [step["type"] for step in decoder["decoders"]] == ["ByteLevel"]
    return decoder["type"] == "ByteLevel"

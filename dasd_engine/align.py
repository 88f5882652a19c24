"""Tokens of any tokeniser to the sentences of a text, by the bytes where they lie.

One rule for every model: a token belongs to the sentence that holds its first byte. Tokens that spell no text (the end
of the turn) and tokens that begin in a marker belong to none. A token that straddles two sentences therefore counts
in the first one under the teacher and under the student alike, and one that begins or ends inside a character needs
no care: offsets are bytes of the whole text, never of tokens decoded alone.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import tokenizers

from dasd_engine.errors import InputError
from dasd_engine.sentences import Span, parts
from dasd_engine.token_text import TokenText, is_byte_level, token_bytes

Ints = npt.NDArray[np.int64]


class Tokens(NamedTuple):
    """Where tokens lie in a text: token i spells bytes begins[i] to ends[i], none where those are equal."""

    begins: Ints
    ends: Ints


class Segments(NamedTuple):
    """Sentence s holds the tokens picked[offsets[s]:offsets[s+1]] (CSR), as dasd_kernels.segment_scores reads them."""

    picked: Ints
    offsets: Ints  # [S+1]

    @property
    def counts(self) -> Ints:
        return np.diff(self.offsets)

    def joined(self, sentences: Sequence[Span], merged: Sequence[Span]) -> "Segments":
        """For sentences of which neighbours have been joined to `merged`."""
        ends = [end for _, end in sentences]
        last = np.searchsorted(ends, [end for _, end in merged]) + 1
        return Segments(self.picked, self.offsets[np.concatenate([[0], last]).astype(np.int64)])


def from_ends(ends: Sequence[int] | Ints, opened: int = 0) -> Tokens:
    """Tokens that follow each other from byte `opened` on. InputError where the ends fall."""
    bounds = np.empty(len(ends) + 1, dtype=np.int64)
    bounds[0], bounds[1:] = opened, ends
    if (bounds[1:] < bounds[:-1]).any():
        at = int(np.argmax(bounds[1:] < bounds[:-1]))
        raise InputError(f"token {at} ends at byte {bounds[at + 1]}, in front of its beginning at {bounds[at]}")
    return Tokens(bounds[:-1], bounds[1:])


def assign(tokens: Tokens, sentences: Sequence[Span]) -> Segments:
    """The tokens of each sentence. `sentences` are disjoint and rising; gaps between them take their tokens away."""
    spelling = np.flatnonzero(tokens.ends != tokens.begins)
    edges = np.asarray(sentences, dtype=np.int64).reshape(-1)
    places = np.searchsorted(tokens.begins[spelling], edges)
    lows, highs = places[::2], places[1::2]
    offsets = np.concatenate([[0], np.cumsum(highs - lows)])
    # Position p of sentence s is the token lows[s] + p − offsets[s].
    shift = np.repeat(lows - offsets[:-1], highs - lows)
    return Segments(spelling[np.arange(offsets[-1]) + shift], offsets)


class Spelling:
    """Where the tokens that a tokeniser made of a text lie in it. Fast for byte-level BPE: a table of tokens' bytes."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self._text = TokenText(tokenizer)
        self._table = _Table(tokenizer) if is_byte_level(json.loads(tokenizer.to_str()).get("decoder")) else None

    def __call__(self, ids: Sequence[int] | npt.NDArray[np.uint32], text: str) -> Tokens:
        """For ids that the tokeniser gives for `text`, normalised or not. InputError when they spell something else."""
        numbers: Ints = np.asarray(ids, dtype=np.int64)
        if self._table is not None and (found := self._table.spell(numbers, text.encode())) is not None:
            return found
        spelt, ends = self._text.text_and_ends(numbers.tolist())
        if spelt == text:
            return from_ends(ends)
        # The tokeniser normalises (NFC, say): its own offsets lead back to the characters of the text.
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if encoding.ids != numbers.tolist():
            raise InputError("the tokens do not spell the text")
        lengths = np.fromiter((len(character.encode()) for character in text), dtype=np.int64, count=len(text))
        at = np.concatenate([[0], np.cumsum(lengths)])
        offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return Tokens(at[offsets[:, 0]], at[offsets[:, 1]])


class _Table:
    """The bytes of every token of a byte-level tokeniser, one behind the other."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        pieces = [token_bytes(tokenizer.id_to_token(token)) for token in range(size)]
        self.lengths = np.fromiter(map(len, pieces), dtype=np.int64, count=size)
        self.begins = np.cumsum(self.lengths) - self.lengths
        self.words = _words(b"".join(pieces))

    def spell(self, ids: Ints, data: bytes) -> Tokens | None:
        """Where the tokens lie when they spell exactly `data`, else None."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self.lengths):
            return None
        lengths = self.lengths[ids]
        ends = np.cumsum(lengths)
        if (ends[-1] if len(ids) else 0) != len(data):
            return None
        tokens = Tokens(ends - lengths, ends)
        # Eight bytes of every token at a time, then the next eight of those that have more.
        words, here, there, left = _words(data), tokens.begins, self.begins[ids], lengths
        while len(left):
            if ((words[here] ^ self.words[there]) & _MASKS[np.minimum(left, 8)]).any():
                return None
            more = np.flatnonzero(left > 8)
            here, there, left = here[more] + 8, there[more] + 8, left[more] - 8
        return tokens


_MASKS = np.array([(1 << 8 * count) - 1 for count in range(9)], dtype="<u8")  # the first bytes of a word


def _words(data: bytes) -> npt.NDArray[np.uint64]:
    """[len + 1] The eight bytes from each byte on, zeros behind the last."""
    return np.ndarray((len(data) + 1,), dtype="<u8", buffer=data + bytes(8), strides=(1,))


class Part(NamedTuple):
    """Bytes begin to end of one text, which stand in another `shift` bytes further."""

    begin: int
    end: int
    shift: int


def match_parts(source: bytes, output: bytes) -> list[Part]:
    """Where the parts of `source` stand in `output`, which has the same parts between other markers.

    White space at the ends of a part may differ; everything else must be equal, in order. InputError where it is not.
    """
    found: list[Part] = []
    theirs = [_stripped(output, part) for part in parts(output)]
    index = 0
    for part in parts(source):
        begin, end = _stripped(source, part)
        # Several parts of the source (analysis messages, say) may stand in one of the output.
        if index < len(theirs) and output.startswith(source[begin:end], theirs[index][0]):
            at = theirs[index][0]
            found.append(Part(begin, end, at - begin))
            rest = _stripped(output, (at + end - begin, theirs[index][1]))
            if rest[0] < rest[1]:
                theirs[index] = rest
            else:
                index += 1
            continue
        shown = source[begin : min(end, begin + 40)].decode("utf-8", "replace")
        raise InputError(f"the teacher's part {shown!r} is not what stands in the response there")
    if index < len(theirs):
        begin, end = theirs[index]
        shown = output[begin : min(end, begin + 40)].decode("utf-8", "replace")
        raise InputError(f"the teacher's tokens do not spell {shown!r} of the response")
    return found


def _stripped(text: bytes, span: Span) -> Span:
    inner = text[span[0] : span[1]]
    begin = span[1] - len(inner.lstrip())
    return begin, max(begin, span[0] + len(inner.rstrip()))


def move(tokens: Tokens, matched: Sequence[Part]) -> Tokens:
    """The same tokens in the text that the parts stand in; a token outside all parts spells nothing there."""
    begins, ends = np.zeros_like(tokens.begins), np.zeros_like(tokens.ends)
    for part in matched:
        some = slice(
            int(np.searchsorted(tokens.ends, part.begin, side="right")),
            int(np.searchsorted(tokens.begins, part.end, side="left")),
        )
        begins[some] = np.clip(tokens.begins[some], part.begin, part.end) + part.shift
        ends[some] = np.clip(tokens.ends[some], part.begin, part.end) + part.shift
    return Tokens(begins, ends)


def move_back(spans: Sequence[Span], matched: Sequence[Part]) -> list[Span]:
    """Spans of the text that the parts stand in, each inside one part but for white space, in the parts' own text."""
    found, index = [], 0
    for begin, end in spans:
        while index + 1 < len(matched) and matched[index].end + matched[index].shift <= begin:
            index += 1
        part = matched[index]
        low, high = part.begin + part.shift, part.end + part.shift
        found.append((min(max(begin, low), high) - part.shift, min(max(end, low), high) - part.shift))
    return found

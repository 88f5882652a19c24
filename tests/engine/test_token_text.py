"""token_text: where tokens end in the decoded text, whatever the tokeniser and however characters are cut."""

import json
from pathlib import Path

import pytest
import tokenizers
from chats import QWEN3_TOKENIZER, byte_level, sentencepiece_like
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from dasd_engine.token_text import TokenText, text_and_ends

STUDENT = Path(__file__).parents[2] / "recipes" / "quickstart" / "student" / "tokenizer.json"
TEXTS = [
    "<think>\n3 + 4 = 7\n</think>\n7",
    "Grüße, 你好世界",
    "🙂👩‍👩‍👧 naïve ☃",
    "a\u0301 \u00e1 ﬁ\t\r\n",
    "",
    " leading",
]


def byte_fallback() -> str:
    """tokenizer.json as Llama 2's: words keep their space as U+2581, and other characters are byte tokens."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "▁bc", "c", "é", "▁Grü", "."]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "<think>"])
    return tokenizer.to_str()


def word_pieces() -> str:
    """A decoder that looks at the token before: "##" joins and other words get a space."""
    pieces = ["[UNK]", "the", "think", "##ing", "##s", "s", ".", "é", "世"]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer.to_str()


def no_decoder() -> str:
    return tokenizers.Tokenizer(models.WordLevel({"a": 0, "bc": 1, "é": 2}, unk_token="a")).to_str()


TOKENIZERS = {
    "quickstart": STUDENT.read_text,
    "qwen3": lambda: (QWEN3_TOKENIZER / "tokenizer.json").read_text(),
    "qwen": lambda: byte_level("qwen"),
    "smollm": lambda: byte_level("smollm"),
    "llama 2": sentencepiece_like,
    "byte fallback": byte_fallback,
    "word pieces": word_pieces,
    "no decoder": no_decoder,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def read(request) -> tuple[tokenizers.Tokenizer, TokenText]:
    if request.param == "qwen3" and not QWEN3_TOKENIZER.is_dir():
        pytest.skip("needs ../shared/data/qwen3-tokenizer")
    tokenizer = tokenizers.Tokenizer.from_str(TOKENIZERS[request.param]())
    return tokenizer, TokenText(tokenizer)


def check(tokenizer: tokenizers.Tokenizer, token_text: TokenText, ids: list[int]) -> None:
    """The text is the tokeniser's own, and an end is where the decoded text of the tokens so far ends, wherever that
    is a beginning of the whole text (it is not where a character is cut)."""
    text, ends = token_text.text_and_ends(ids)
    assert text == tokenizer.decode(ids, skip_special_tokens=False)
    raw = text.encode()
    assert len(ends) == len(ids) and ends == sorted(ends) and (not ids or ends[-1] == len(raw))
    for i, end in enumerate(ends):
        begun = tokenizer.decode(ids[: i + 1], skip_special_tokens=False)
        if begun and not begun.endswith("\ufffd") and raw.startswith(begun.encode()):
            assert end == len(begun.encode())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_ids(read, data):
    """Ids that no text gives, as a model at a high temperature samples them."""
    tokenizer, token_text = read
    size = tokenizer.get_vocab_size()
    special = [i for i in (size - 1, size - 2, size, size + 7) if i >= 0]  # added tokens, and ids beyond the last
    one = st.one_of(st.integers(0, size - 1), st.integers(0, min(size - 1, 300)), st.sampled_from(special))
    check(tokenizer, token_text, data.draw(st.lists(one, max_size=24)))


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=30) | st.sampled_from(TEXTS), cut=st.integers(0, 40))
def test_any_text(read, text, cut):
    """Ids of a text, the whole and cut anywhere: inside a character too."""
    tokenizer, token_text = read
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    check(tokenizer, token_text, ids)
    check(tokenizer, token_text, ids[:cut])


def test_a_character_of_several_tokens():
    """The smiley is four tokens of a byte each here; the snowman is cut, and its two bytes are one U+FFFD."""
    tokenizer = tokenizers.Tokenizer.from_file(str(STUDENT))
    ids = tokenizer.encode("a🙂b☃").ids
    assert len(ids) == 9
    text = TokenText(tokenizer)
    assert text.text_and_ends(ids) == ("a🙂b☃", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert text.text_and_ends(ids[:-1]) == ("a🙂b\ufffd", [1, 2, 3, 4, 5, 6, 7, 9])
    assert text.text_and_ends(ids[:3]) == ("a\ufffd", [1, 2, 4])


@given(pieces=st.lists(st.binary(max_size=5), max_size=12))
def test_any_bytes(pieces):
    """Broken bytes become what Python and Rust make of them, and every end stays on its side of every character."""
    text, ends = text_and_ends(pieces)
    assert text == b"".join(pieces).decode("utf-8", "replace")
    assert ends == sorted(ends) and len(ends) == len(pieces) and (not ends or ends[-1] == len(text.encode()))
    begun = b""
    for piece, end in zip(pieces, ends, strict=True):
        begun += piece
        shown = begun.decode("utf-8", "replace")
        if not shown.endswith("\ufffd"):
            assert end == len(shown.encode())


def test_special_tokens_give_their_text_and_unknown_ids_none():
    tokenizer = tokenizers.Tokenizer.from_file(str(STUDENT))
    think, end = tokenizer.token_to_id("<think>"), tokenizer.token_to_id("</think>")
    seven = tokenizer.encode("7").ids
    beyond = tokenizer.get_vocab_size() + 5
    assert TokenText(tokenizer).text_and_ends([think, *seven, beyond, end]) == ("<think>7</think>", [7, 8, 8, 16])
    assert json.loads(tokenizer.to_str())["decoder"]["type"] == "ByteLevel"  # so the table was meant

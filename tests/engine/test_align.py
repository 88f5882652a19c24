"""Tokens to sentences by bytes: one rule, any tokeniser, characters cut by tokens, text under other delimiters."""

import unicodedata

import numpy as np
import pytest
import tokenizers
from chats import QWEN3_TOKENIZER, SPLITS, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from dasd_engine.align import Spelling, Tokens, assign, from_ends, match_parts, move, move_back
from dasd_engine.errors import InputError
from dasd_engine.sentences import is_marker, split

TOKENIZERS = {split: make_tokenizer("chatml", split) for split in SPLITS} | {"llama2": make_tokenizer("llama2")}
TEXT = st.text("aeThe the24 .!?\n$é設。🙂ŷy\u0302", max_size=40) | st.text(max_size=20)


def slow_assign(tokens: Tokens, sentences: list[tuple[int, int]]) -> list[list[int]]:
    """The rule, word by word: a token that spells something belongs to the sentence with its first byte."""
    pairs = list(zip(tokens.begins.tolist(), tokens.ends.tolist(), strict=True))
    return [[i for i, (b, e) in enumerate(pairs) if e > b and begin <= b < end] for begin, end in sentences]


def as_lists(segments) -> list[list[int]]:
    bounds = segments.offsets.tolist()
    return [segments.picked[b:e].tolist() for b, e in zip(bounds, bounds[1:], strict=False)]


@settings(max_examples=300)
@given(st.data())
def test_tokens_go_where_their_first_byte_lies(data):
    size = data.draw(st.integers(1, 40))
    cuts = sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=10))) if size > 1 else []
    edges = [0, *cuts, size]
    sentences = [pair for pair in zip(edges, edges[1:], strict=False) if data.draw(st.booleans())]
    ends = sorted(data.draw(st.lists(st.integers(0, size), max_size=20)))
    tokens = from_ends(ends, data.draw(st.integers(0, ends[0] if ends else 0)))
    assert as_lists(assign(tokens, sentences)) == slow_assign(tokens, sentences)


def test_no_sentence_and_no_token():
    assert assign(from_ends([1, 2]), []).offsets.tolist() == [0]
    assert assign(from_ends([]), [(0, 4)]).offsets.tolist() == [0, 0]


def test_ends_that_fall_are_refused():
    with pytest.raises(InputError, match="token 2 ends at byte 3, in front of its beginning at 5"):
        from_ends([2, 5, 3])


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150)
@given(text=TEXT)
def test_the_tokens_of_a_text_lie_one_behind_the_other(name, text):
    """For tokenisers that keep the text as it is: every byte belongs to one token."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if tokenizer.decode(ids, skip_special_tokens=False) != text:  # llama2's drops, qwen's composes
        return
    data, tokens = text.encode(), Spelling(tokenizer)(ids, text)
    assert tokens.begins.tolist() == [0, *tokens.ends.tolist()][:-1] and tokens.ends.tolist()[-1:] in ([], [len(data)])
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets  # in characters: of a cut character, all of it
    for begin, end, (first, last) in zip(*tokens, offsets, strict=True):
        low, high = len(text[:first].encode()), len(text[:last].encode())
        assert low <= begin <= end <= high or name == "llama2"


@pytest.mark.parametrize(
    "text", ["ŷ is y\u0302. So e\u0301 is é.", "x\u0302\u0323 = 1", unicodedata.normalize("NFD", "한글. 한")]
)
def test_a_tokenizer_that_composes_characters(text):
    """Qwen's NFC: the tokens spell another text, with fewer bytes, and still lie where their characters stand."""
    tokenizer = make_tokenizer("qwen3")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) != text
    tokens = Spelling(tokenizer)(ids, text)
    sentences = split(text)
    assert sum(map(len, as_lists(assign(tokens, sentences)))) == len(ids)
    data = text.encode()
    for (begin, end), group in zip(sentences, as_lists(assign(tokens, sentences)), strict=True):
        own = tokenizer.encode(data[begin:end].decode(), add_special_tokens=False).ids
        assert [ids[i] for i in group] == own  # nothing merges across these ends


def test_ids_of_another_text_are_refused():
    with pytest.raises(InputError, match="do not spell the text"):
        Spelling(TOKENIZERS["gpt2"])(TOKENIZERS["gpt2"].encode("It is 4.").ids, "It is 5.")


@pytest.mark.skipif(not QWEN3_TOKENIZER.exists(), reason="the Qwen3 tokeniser is not on this machine")
def test_a_sentence_holds_the_tokens_that_it_has_alone():
    """With the cuts of sentences.py and a tokeniser in use, hardly a token straddles."""
    tokenizer = tokenizers.Tokenizer.from_file(str(QWEN3_TOKENIZER / "tokenizer.json"))
    text = (
        "<think>\nWe add 2 and 2. That makes 4, e.g. by counting: 3, 4.\n\nLet me check: $4 - 2 = 2$. 設x是整數。"
        "\n</think>\n\nThe answer is \\boxed{4}.  It was easy 🙂. \nBye."
    )
    data, ids = text.encode(), tokenizer.encode(text, add_special_tokens=False).ids
    sentences = [span for span in split(text) if not is_marker(data, span)]
    groups = as_lists(assign(Spelling(tokenizer)(ids, text), sentences))
    alone = [tokenizer.encode(data[b:e].decode(), add_special_tokens=False).ids for b, e in sentences]
    assert [[ids[i] for i in group] for group in groups] == alone


def test_characters_of_several_tokens():
    """Byte tokens of one character lie in its bytes one by one: the first byte decides."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "a。🙂 b"
    tokens = Spelling(tokenizer)(tokenizer.encode(text).ids, text)
    assert tokens.ends.tolist() == list(range(1, len(text.encode()) + 1))
    assert [len(group) for group in as_lists(assign(tokens, split(text)))] == [4, 6]


def test_a_tokenizer_with_byte_fallback():
    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    text = "a設 a"
    tokens = Spelling(tokenizer)(tokenizer.encode(text).ids, text)
    assert tokens.ends.tolist() == [1, 2, 3, 4, 5, 6]


# ---------------------------------------------------------------------------------------------- other delimiters

THINK = "<think>\nWe need 2+2.\n\nIt is 4.\n</think>\n\nThe answer is 4."
HARMONY = "We need 2+2.\n\nIt is 4.<|end|><|start|>assistant<|channel|>final<|message|>The answer is 4.<|return|>"


@pytest.mark.parametrize(
    "source",
    [
        HARMONY,
        "<|channel|>analysis<|message|>" + HARMONY,
        "We need 2+2.<|end|><|start|>assistant<|channel|>analysis<|message|>It is 4. "
        "<|end|><|start|>assistant<|channel|>final<|message|>\nThe answer is 4.",
        "[THINK]We need 2+2.\n\nIt is 4.[/THINK]The answer is 4.",
        THINK,
    ],
)
def test_parts_are_found_under_other_delimiters(source):
    data, output = source.encode(), THINK.encode()
    matched = match_parts(data, output)
    for begin, end, shift in matched:
        assert data[begin:end] == output[begin + shift : end + shift]
    tokens = move(from_ends(range(1, len(data) + 1)), matched)  # a token a byte
    spelt = [output[b:e] for b, e in zip(*tokens, strict=True)]
    assert all(piece in (b"", data[i : i + 1]) for i, piece in enumerate(spelt))
    sentences = [span for span in split(output) if not is_marker(output, span)]
    groups = as_lists(assign(tokens, sentences))
    for (begin, end), group in zip(sentences, groups, strict=True):
        assert b"".join(data[i : i + 1] for i in group).strip() == output[begin:end].strip()
    for (begin, end), (low, high) in zip(move_back(sentences, matched), sentences, strict=True):
        assert data[begin:end].strip() == output[low:high].strip()


@pytest.mark.parametrize(
    "source, output, message",
    [
        (HARMONY, THINK.replace("2+2", "2+3"), "'We need 2.2"),
        (HARMONY, THINK.replace("The answer is 4.", ""), "part 'The answer is 4.'"),
        (HARMONY.partition("<|end|>")[0], THINK, "do not spell 'The answer is 4.'"),
        ("", THINK, "do not spell 'We need"),
    ],
)
def test_other_text_is_refused(source, output, message):
    with pytest.raises(InputError, match=message):
        match_parts(source.encode(), output.encode())


def test_tokens_on_the_white_space_around_a_part_spell_nothing():
    source, output = b" a b \n<|end|>", b"<think>\n\na b</think>"
    tokens = move(from_ends([1, 3, 5, 6, 13]), match_parts(source, output))
    assert [output[b:e] for b, e in zip(*tokens, strict=True)] == [b"", b"a ", b"b", b"", b""]
    assert np.array_equal(tokens.begins[1:3], [9, 11])

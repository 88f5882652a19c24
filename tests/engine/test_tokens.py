"""TextEncoder: the ids are exactly those of encoding the whole text."""

from pathlib import Path

import pytest
import tokenizers
from chats import QWEN3_TOKENIZER, byte_level, make_tokenizer, sentencepiece_like
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers

from dasd_engine.tokens import TextEncoder, inner_cuts

SPLITS = ["qwen", "llama3", "gpt2", "smollm"]
PARTS = [
    *"  \n\n\r\t.,'sSx12(é\u0301\u200d\u3000\u00a0\u1f7e의👩<|>",
    "<|im_end|>",
    "<im2>",
    "{x_12}",
    "a+b",
    "It's",
    "²",
    "the ",
    "  ",
    "\n\n",
]
TEXT = st.text(max_size=80) | st.lists(st.sampled_from(PARTS), max_size=60).map("".join)


@pytest.fixture(scope="module")
def encoders():
    made = {split: tokenizers.Tokenizer.from_str(byte_level(split)) for split in SPLITS}
    for tokenizer in made.values():
        tokenizer.add_special_tokens(["<|im_end|>"])
        tokenizer.add_tokens(["<im2>"])
    return {split: TextEncoder(tokenizer) for split, tokenizer in made.items()}


@pytest.mark.parametrize("split", SPLITS)
@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_pieces_give_the_ids_of_the_whole(split, text, encoders):
    encoder = encoders[split]
    assert inner_cuts(encoder.tokenizer)
    assert encoder(text).tolist() == encoder.tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.skipif(not QWEN3_TOKENIZER.exists(), reason="the Qwen3 tokeniser is not on this machine")
def test_the_real_qwen3_tokeniser_on_our_own_source():
    encoder = TextEncoder(tokenizers.Tokenizer.from_file(str(QWEN3_TOKENIZER / "tokenizer.json")))
    assert inner_cuts(encoder.tokenizer)
    text = Path(__file__).read_text(encoding="utf-8") + "<|im_start|>user\n <think> x </think>  \n\n 의 é́ "
    for _ in range(2):  # the second time from the cache
        assert encoder(text).tolist() == encoder.tokenizer.encode(text, add_special_tokens=False).ids


def test_the_cache_stays_bounded(monkeypatch):
    monkeypatch.setattr("dasd_engine.tokens._CACHED_PIECES", 4)
    encoder = TextEncoder(make_tokenizer("chatml"))
    text = " ".join(f"word{i % 7}" for i in range(50)) + " " + "x" * 100
    assert encoder(text).tolist() == encoder.tokenizer.encode(text).ids
    assert len(encoder._pieces) <= 4


def change(**parts):
    tokenizer = tokenizers.Tokenizer.from_str(byte_level("qwen"))
    for name, value in parts.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        tokenizers.Tokenizer.from_str(sentencepiece_like()),
        change(normalizer=normalizers.NFKC()),
        change(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        change(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        change(pre_tokenizer=pre_tokenizers.Split(tokenizers.Regex(".+ "), "isolated")),
        change(pre_tokenizer=pre_tokenizers.Sequence([])),
    ],
)
def test_other_tokenisers_get_the_whole_text(tokenizer):
    assert not inner_cuts(tokenizer)
    text = "a b  c 12 ﬁ x"
    assert TextEncoder(tokenizer)(text).tolist() == tokenizer.encode(text).ids


@pytest.mark.parametrize("options", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}])
def test_added_tokens_that_reach_over_a_space(options):
    tokenizer = change()
    tokenizer.add_special_tokens([AddedToken("<end>", **options)])
    assert not inner_cuts(tokenizer)
    spaced = change()
    spaced.add_special_tokens(["<the end>"])
    assert not inner_cuts(spaced)

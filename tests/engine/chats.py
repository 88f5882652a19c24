"""Tiny tokenisers and model directories for the tests of chat templates and prepare."""

import functools
import json
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

TEMPLATES = Path(__file__).parents[1] / "data" / "templates"
QWEN3_TOKENIZER = Path(__file__).parents[3] / "shared" / "data" / "qwen3-tokenizer"  # there on our machines only

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "qwen": [pre_tokenizers.Split(Regex(_LETTERS + r"\p{N}" + _REST), "isolated")],
    "llama3": [pre_tokenizers.Split(Regex(_LETTERS + r"\p{N}{1,3}" + _REST), "isolated")],
    "gpt2": [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
}
CORPUS = [
    "Let x be the number of apples. Then x = 12 * 34, so the answer is 408.\n\nWait, let me check that again.\n\n",
    "the the then there think thinking system user assistant You are a helpful assistant. What is 2+2? It's 4.",
    "\nuser\nassistant\nuser\nassistant\n  indented\n\n\n  code   here\n\tdef f(x):\n\t\treturn x\r\n",
]

# The special tokens of each template: bos, eos and the others.
SPECIAL = {
    "qwen3": [None, "<|im_end|>", "<|endoftext|>", "<|im_start|>", "<think>", "</think>"],
    "chatml": [None, "<|im_end|>", "<|im_start|>"],
    "llama3": ["<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
    "r1": ["<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>", "<think>", "</think>"],
    "llama2": ["<s>", "</s>"],
}


@functools.cache
def byte_level(split: str) -> str:
    """tokenizer.json of a byte-level BPE with a few merges, cut like the tokenisers of a family of models."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    steps = SPLITS[split]
    if split in ("qwen", "llama3"):
        steps = [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if split == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


@functools.cache
def sentencepiece_like() -> str:
    """tokenizer.json cut like Llama 2's: a space is put in front of a text, and words keep theirs as U+2581."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    ascii = ["\n", *map(chr, range(33, 127))]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], initial_alphabet=ascii, show_progress=False)
    tokenizer.train_from_iterator(["[INST] [/INST]" + text.replace(" ", "▁") for text in CORPUS], trainer)
    return tokenizer.to_str()


def make_tokenizer(template: str, split: str | None = None) -> tokenizers.Tokenizer:
    split = split or ("llama3" if template == "llama3" else "qwen")
    text = sentencepiece_like() if template == "llama2" else byte_level(split)
    tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.add_special_tokens([token for token in SPECIAL[template] if token])
    return tokenizer


def write_model(path: Path, template: str = "qwen3", split: str | None = None, **config: object) -> Path:
    """A directory with the tokeniser and template (no weights), as Chat.load and prepare read it."""
    path.mkdir(parents=True)
    make_tokenizer(template, split).save(str(path / "tokenizer.json"))
    bos, eos, *_ = SPECIAL[template]
    written = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": {"__type": "AddedToken", "content": eos, "special": True},
        "chat_template": (TEMPLATES / f"{template}.jinja").read_text(),
        **config,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(written))
    return path


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def marked(tokenizer: tokenizers.Tokenizer, ids: list[int], spans: list[tuple[int, int]]) -> str:
    """The document's text with what is trained between ⟦ and ⟧."""
    text, last = "", 0
    for begin, end in spans:
        text += tokenizer.decode(ids[last:begin], skip_special_tokens=False)
        text += "⟦" + tokenizer.decode(ids[begin:end], skip_special_tokens=False) + "⟧"
        last = end
    return text + tokenizer.decode(ids[last:], skip_special_tokens=False)

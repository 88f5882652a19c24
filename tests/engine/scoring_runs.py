"""Tiny students and teachers for the tests of score: candidates with exact logprobs, written without sampling."""

import json
import math
import random
from pathlib import Path
from typing import Any

import tokenizers
from chats import make_tokenizer, write_model
from tiny_models import make_theirs

from dasd_engine.token_text import TokenText

QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]
TEXTS = [
    "<think>\nWe add 2 and 2. That makes 4, e.g. by counting: 3, 4. Let me check: $4 - 2 = 2$. Right!\n</think>\n\n"
    "The answer is \\boxed{4}. It was easy.",
    "<think>\nHmm, 2 + 2... Use \\(a + b\\). Is that right? Yes, it is.\n\nSo the sum is 4.00 = 4.\n</think>\n\n4",
    "<think>\n設x是整數。則 x² ≥ 0！“因為。”所以 naïve façade 🙂 done. Then ŷ is it.\n</think>\n答案是4。完。",
    "No thinking here. Just the answer: four. It is 4, of course, as everybody knows.",
]


def write_student(path: Path, template: str = "qwen3", split: str | None = None, family: str = "qwen3") -> Any:
    """A directory with random weights, a tokeniser and a template; returns the model of transformers."""
    write_model(path, template, split)
    size = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab_size()
    return make_theirs(path, family, vocab_size=size + 3)


def teacher_tokenizer(split: str = "gpt2", merges: int = 60) -> tokenizers.Tokenizer:
    """Another tokeniser than any student's: its own words, and an end of turn."""
    tokenizer = make_tokenizer("chatml", split)
    state = json.loads(tokenizer.to_str())
    kept = state["model"]["merges"][:merges]
    words = {token for token in state["model"]["vocab"] if len(token) == 1} | {"".join(pair) for pair in kept}
    state["model"]["merges"] = kept
    state["model"]["vocab"] = {word: index for index, word in enumerate(sorted(words))}
    for index, token in enumerate(state["added_tokens"]):
        token["id"] = len(words) + index
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def candidate(text: str, number: int, teacher: tokenizers.Tokenizer, **fields: Any) -> dict[str, Any]:
    """A row of candidates.jsonl as sample leaves it, the end of the turn sampled too."""
    ids = [*teacher.encode(text, add_special_tokens=False).ids, teacher.token_to_id("<|im_end|>")]
    spelt, ends = TokenText(teacher).text_and_ends(ids)
    assert spelt == text + "<|im_end|>"
    rng = random.Random(number)
    return {
        "id": f"q{number // 2}", "candidate": number % 2, "temperature": 0.6, "seed": number, "messages": QUESTION,
        "text": text, "token_ids": ids, "logprobs": [-rng.expovariate(2.0) for _ in ids],
        "token_ends": [min(end, len(text.encode())) for end in ends], "opened": 0, "finish_reason": "stop",
        "teacher": {"name": "tiny", "revision": None}, "answer": None, "task": None, **fields,
    }  # fmt: skip


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_candidates(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A finished directory of sample."""
    write_rows(path / "candidates.jsonl", rows)
    (path / "manifest.json").write_text("{}")
    return path


def rows_of(out: Path, name: str = "scores.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def geometric_mean(logprobs: list[float]) -> float:
    return math.exp(math.fsum(logprobs) / len(logprobs))

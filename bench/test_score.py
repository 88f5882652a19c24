"""Score: the command's whole path beside plain forwards of the same packs, the sentence splitter, the alignment; and
select, as far as it goes with sentences (its responses are short), with the filters apart.

The student has the shape of SmolLM2-135M and random weights, which take the same time; DASD_BENCH_STUDENT names a
Hugging Face directory to take instead. The path reads candidates.jsonl, tokenises, splits, aligns, computes and
writes rows.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.compare import compare
from bench.test_prepare import TOKENIZER, step
from dasd_engine import distributed
from dasd_engine.align import Spelling, assign, from_ends
from dasd_engine.chat import Chat
from dasd_engine.config import RunOptions
from dasd_engine.filters import examine
from dasd_engine.hf import init_weights, load_model, save_model
from dasd_engine.model import Decoder
from dasd_engine.model_config import read_config
from dasd_engine.scorable import Preparer, Scorable
from dasd_engine.score import Job
from dasd_engine.select import select
from dasd_engine.sentence_scores import Scorer
from dasd_engine.sentences import is_marker, merge_short, split
from dasd_engine.tokens import TextEncoder

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart" / "student"
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "attention_bias": False,
}  # fmt: skip
TOKENS = 1024  # of a batch
ADVERSARIAL = [
    "$a", "\\[", "\\(x.\\) ", "\\begin{a}", "```\n", "` ``", "a.b.", "a. ", "1. ", "e.g. ", "?! ", "n! ", "… ", "п. ",
    "。 ", "\n", "a\n", "([{", "<think>", "<|start|>a<|channel|>b",
]  # fmt: skip


def response(r: random.Random, characters: int) -> str:
    thinking = ""
    while len(thinking) < characters:
        thinking += step(r) + r.choice(["\n\n", "\n", " ", " "])
    return f"<think>\n{thinking}\n</think>\n\nThe answer is \\boxed{{{r.randint(0, 999)}}}."


def student_dir(tmp_path: Path) -> Path:
    if given := os.environ.get("DASD_BENCH_STUDENT"):
        return Path(given)
    path = tmp_path / "student"
    shutil.copytree(QUICKSTART, path / "source")
    (path / "source" / "config.json").write_text(json.dumps(SMOLLM2))
    model = Decoder(read_config(path / "source"))
    init_weights(model, 0)
    save_model(model, path / "model", path / "source")
    return path / "model"


def write_candidates(path: Path, chat: Chat, tokens: int) -> list[str]:
    """A candidates.jsonl of about so many tokens, the student's own ids as the teacher's."""
    r, encode, texts, count = random.Random(0), TextEncoder(chat.tokenizer), list[str](), 0
    spelling = Spelling(chat.tokenizer)
    with open(path, "w", encoding="utf-8") as file:
        while count < tokens:
            text = response(r, r.choice([800, 1600, 3200]))
            ids = encode(text).tolist()
            row = {
                "id": str(len(texts)), "candidate": 0, "temperature": 0.6, "text": text, "opened": 0, "token_ids": ids,
                "messages": [{"role": "user", "content": step(r)}], "logprobs": [-r.expovariate(2.0) for _ in ids],
                "token_ends": spelling(ids, text).ends.tolist(), "finish_reason": "stop",
            }  # fmt: skip
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            texts.append(text)
            count += len(ids)
    return texts


@torch.inference_mode()
def plain_forward(model: Decoder, batches: list[list[Scorable]], logits: bool) -> None:
    for batch in batches:
        lengths = [len(one.ids) for one in batch]
        tokens = torch.from_numpy(np.concatenate([one.ids for one in batch]).astype(np.int64))
        positions = torch.cat([torch.arange(length) for length in lengths])
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        hidden = model(tokens, positions, cu_seqlens, max(lengths))
        if logits:
            model.logits(hidden)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_score(benchmark: Any, tmp_path: Path, dtype: str) -> None:
    if dtype == "bf16" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU has no bf16 instructions")
    path, source = student_dir(tmp_path), tmp_path / "candidates.jsonl"
    chat = Chat.load(path)
    write_candidates(source, chat, TOKENS)
    model = load_model(path, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    preparer = Preparer(chat, context=8192)
    parameters = {"beta": 0.1, "tokens_per_batch": TOKENS, "token_logprobs": False}
    runs: Iterator[int] = iter(range(99))
    job = Job(source, tmp_path, preparer, Scorer([model]), None, parameters)
    lines = list(enumerate(source.read_bytes().splitlines(), 1))
    batches = job.prepared(lines, set(), None)
    tokens = sum(len(one.ids) for batch in batches for one in batch)
    with distributed.start(RunOptions()) as world:

        def run() -> None:
            job.out = tmp_path / f"out{next(runs)}"
            job.out.mkdir()
            job.run(world, set(), quiet=True)

        compare(
            benchmark,
            run,
            {
                "forward with logits": lambda: plain_forward(model, batches, True),
                "forward to hidden states": lambda: plain_forward(model, batches, False),
            },
            rounds=5,
            case=f"score {tokens:,} tokens, {dtype}, {torch.get_num_threads()} threads",
            work=[tokens, "tokens"],
        )
    rows = [json.loads(line) for line in next(job.out.glob("part-*")).read_text().splitlines()]
    benchmark.extra_info["notes"] = {"sentences": f"{sum(len(row['sentences']) for row in rows):,}"}


def test_split(benchmark: Any) -> None:
    r = random.Random(0)
    text = "".join(response(r, 50_000) for _ in range(160))
    data = text.encode()
    spans = compare(
        benchmark, lambda: split(data), rounds=5, case=f"split {len(data) / 1e6:.0f} MB of solutions",
        work=[len(data) / 1e6, "MB"],
    )  # fmt: skip
    worst, what = 0.0, ""
    for unit in ADVERSARIAL:
        hostile = (unit * (1_000_000 // len(unit.encode()))).encode()
        started = time.perf_counter()
        split(hostile)
        worst, what = max((worst, what), (time.perf_counter() - started, unit))
    benchmark.extra_info["notes"] = {"sentences": f"{len(spans):,}", "worst 1 MB": f"{worst:.2f} s ({what!r} repeated)"}


@pytest.mark.skipif(not TOKENIZER.exists(), reason="the Qwen3 tokeniser is not on this machine")
def test_align(benchmark: Any) -> None:
    """Both tokenisations to sentences: the teacher's from its byte ends, the student's from its ids."""
    r, chat = random.Random(0), Chat.load(TOKENIZER)
    encode, spelling = TextEncoder(chat.tokenizer), Spelling(chat.tokenizer)
    documents = []
    for _ in range(400):
        text = response(r, 50_000)
        ids, data = encode(text), text.encode()
        sentences = [span for span in split(data) if not is_marker(data, span)]
        documents.append((text, ids, spelling(ids, text).ends.tolist(), sentences))
    size = sum(len(text.encode()) for text, *_ in documents)

    def align() -> None:
        for text, ids, ends, sentences in documents:
            models = from_ends(ends), spelling(ids, text)
            alone = [assign(tokens, sentences) for tokens in models]
            merged = merge_short(sentences, alone[0].counts.tolist(), alone[1].counts.tolist())
            for segments in alone:
                segments.joined(sentences, merged)

    compare(benchmark, align, rounds=5, case=f"align {size / 1e6:.0f} MB, two models", work=[size / 1e6, "MB"])
    benchmark.extra_info["notes"] = {"tokens": f"{sum(len(ids) for _, ids, *_ in documents):,} a model"}


def write_scored(path: Path, responses: int, sentences: int) -> Path:
    """Finished directories of sample and score: 8 candidates a question, so many sentences each, short texts."""
    r = random.Random(0)
    for name in ("candidates", "scores"):
        (path / name).mkdir(parents=True)
    candidates, scores = path / "candidates" / "candidates.jsonl", path / "scores" / "scores.jsonl"
    with open(candidates, "w") as texts, open(scores, "w") as rows:
        for i in range(responses):
            head = {"id": f"q{i // 8}", "candidate": i % 8, "temperature": 0.6}
            said = {"messages": [{"role": "user", "content": f"{i // 8}?"}], "text": f"<think>{i}</think>{i}"}
            texts.write(json.dumps({**head, **said, "finish_reason": "stop"}) + "\n")
            spans = []
            for begin in range(0, 100 * sentences, 100):
                p = [float(f"{r.random():.7g}") for _ in range(2)]
                spans.append([begin, begin + 100, *p, r.randint(5, 60), r.randint(5, 60)])
            tokens = r.randint(9_000, 18_000)
            score = {"source": i + 1, "teacher_tokens": tokens, "student_tokens": tokens, "sentences": spans}
            rows.write(json.dumps({**head, **score}) + "\n")
    (path / "scores" / "manifest.json").write_text(json.dumps({"candidates": str(path / "candidates")}))
    return path / "scores"


def test_select(benchmark: Any, tmp_path: Path) -> None:
    """The command: reads, types, chooses by every rule, reports and writes."""
    responses, sentences = 2_000, 500
    scores, runs = write_scored(tmp_path, responses, sentences), iter(range(99))
    compare(
        benchmark, lambda: select(scores, tmp_path / f"out{next(runs)}", quiet=True), rounds=5,
        case=f"select among {responses:,} responses of {sentences} sentences",
        work=[responses * sentences, "sentences"],
    )  # fmt: skip


def test_filters(benchmark: Any) -> None:
    r = random.Random(0)
    texts = [response(r, 60_000) for _ in range(100)]

    def look() -> None:
        for text in texts:
            assert examine(text, finish_reason="stop", tokens=15_000, stop_tokens=["<|im_end|>"])[1] is None

    compare(benchmark, look, rounds=5, case="filter 100 responses of 60 KB", work=[len(texts), "responses"])

"""Sampling: the engine's batched generator beside transformers' `generate` and vLLM, 32 requests of 128 new tokens.

    DASD_BENCH_STUDENT=SmolLM2-135M-Instruct DASD_VLLM_PYTHON=VENV/bin/python python -m bench.table sampling

All draw in bf16 at temperature 1 from the same prompts on the same number of threads; vLLM and ours give the raw
logprob of every token, as a teacher must, transformers no logprobs. vLLM runs in a process of its own, loaded and warm,
and is asked for a round at a time; passing the answer back (0.1 MB) is in its time. The floor is the products alone:
those of a step's 32 rows, as many times as there are new tokens, with weights laid out for them. The error is the
largest difference of a logprob from a plain forward of the engine's decoder and `token_logprobs`, in bf16, over eight
of the responses; notes tell the mean, how far the plain forward itself is from one in fp32, and ours in fp32.

The model has the shape of SmolLM2-135M and random weights, which take the same time but tell little of the logprobs;
DASD_BENCH_STUDENT names a Hugging Face directory to take instead.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.compare import compare
from bench.test_kernels import peak_bytes
from bench.test_prepare import step
from bench.test_score import student_dir
from dasd_engine.chat import Chat
from dasd_engine.cpu_decoder import CpuDecoder
from dasd_engine.generate import generate
from dasd_engine.hf import load_model
from dasd_engine.model import Decoder
from dasd_kernels import token_logprobs

BATCH, NEW_TOKENS, ROUNDS = 32, 128, 3
CHECKED = 8  # responses whose logprobs are computed again
VLLM_PYTHON = os.environ.get("DASD_VLLM_PYTHON", "")

Responses = list[tuple[list[int], list[float]]]  # token ids and logprobs a prompt


def make_prompts(path: Path) -> list[list[int]]:
    """Questions of 20 to 120 tokens."""
    r, tokenizer = random.Random(0), Chat.load(path).tokenizer
    return [tokenizer.encode(" ".join(step(r) for _ in range(r.randint(1, 4)))).ids[:120] for _ in range(BATCH)]


def transformers_round(path: Path, prompts: list[list[int]]) -> Callable[[], Any]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return lambda: model.generate(
        ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=NEW_TOKENS,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


@contextmanager
def vllm_round(path: Path, prompts: list[list[int]], folder: Path) -> Iterator[Callable[[], Responses] | str]:
    """A round of vLLM in its own process, or why there is none."""
    if not VLLM_PYTHON:
        yield "set DASD_VLLM_PYTHON to a Python that has vLLM"
        return
    (folder / "prompts.json").write_text(json.dumps(prompts))
    here = {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [VLLM_PYTHON, str(Path(__file__).with_name("vllm_rounds.py")), str(path), str(folder / "prompts.json")]
    with open(folder / "vllm.log", "w") as log:
        process = subprocess.Popen(
            [*command, str(NEW_TOKENS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env=os.environ | here | {"OMP_NUM_THREADS": str(torch.get_num_threads())}, cwd=folder,
        )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    to, answers = process.stdin, process.stdout

    def answer() -> Any:
        line = answers.readline()
        assert line, f"vLLM ended: {(folder / 'vllm.log').read_text()[-3000:]}"
        return json.loads(line)

    def one_round() -> Responses:
        to.write("\n")
        to.flush()
        return answer()

    try:
        assert answer() == {"threads": torch.get_num_threads()}
        yield one_round
    finally:
        to.close()
        process.wait(60)


@torch.inference_mode()
def plain_logprobs(model: Decoder, prompts: list[list[int]], responses: Responses) -> Tensor:
    """log p of every sampled token by a forward of each whole text, one after another."""
    found = []
    for prompt, (tokens, _) in zip(prompts, responses, strict=False):
        ids = torch.tensor(prompt + tokens)
        cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
        hidden = model(ids, torch.arange(len(ids)), cu_seqlens, len(ids))[len(prompt) - 1 : -1]
        found.append(token_logprobs(hidden, model.head_weight, torch.tensor(tokens)).logprob)
    return torch.cat(found)


def errors(model: Decoder, prompts: list[list[int]], responses: Responses) -> Tensor:
    given = torch.tensor([logprob for _, logprobs in responses for logprob in logprobs])
    return (given - plain_logprobs(model, prompts, responses)).abs()


@torch.inference_mode()
def products_seconds(model: Decoder) -> float:
    """A decoding step's matrix products and nothing else, times NEW_TOKENS."""
    compiled, width = CpuDecoder(model), model.config.hidden_size
    x = torch.randn(BATCH, width).to(model.head_weight.dtype)

    def one_step() -> None:
        for layer in compiled.layers:
            heads = layer.project(x)[:, : layer.heads[0] * layer.head_dim].contiguous()
            layer.down(layer.gate_up(layer.out(heads)))
        compiled.head(x)

    times = []
    for _ in range(20):
        start = time.perf_counter()
        one_step()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] * NEW_TOKENS


def test_sampling(benchmark: Any, tmp_path: Path) -> None:
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU has no bf16 instructions")
    path = student_dir(tmp_path)
    prompts = make_prompts(path)
    model = load_model(path, dtype=torch.bfloat16)

    def ours(model: Decoder = model, prompts: list[list[int]] = prompts) -> Responses:
        out = generate(model, prompts, max_new_tokens=NEW_TOKENS, temperature=1.0, batch_size=BATCH)
        return [(one.tokens, one.logprobs) for one in out]

    kept: dict[str, Responses] = {}
    with vllm_round(path, prompts, tmp_path) as vllm:
        peers: dict[str, Any] = {"vLLM": vllm, "transformers generate": transformers_round(path, prompts)}
        if not isinstance(vllm, str):
            peers["vLLM"] = lambda: kept.update(vLLM=vllm())
        kept["ours"] = compare(
            benchmark, ours, peers, rounds=ROUNDS,
            case=f"{BATCH} x {NEW_TOKENS} new tokens after {sum(map(len, prompts)):,}, bf16, "
            f"{torch.get_num_threads()} threads",
            work=[BATCH * NEW_TOKENS, "tokens"], floor=products_seconds(model), peak_bytes=peak_bytes(ours),
        )  # fmt: skip
    exact = load_model(path, dtype=torch.float32)
    results = {"ours": benchmark.extra_info, **benchmark.extra_info["peers"]}
    in_fp32 = errors(exact, prompts, ours(exact, prompts[:CHECKED])).max()
    for name, responses in kept.items():
        some = responses[:CHECKED]
        off = errors(model, prompts, some)
        rounding = (plain_logprobs(model, prompts, some) - plain_logprobs(exact, prompts, some)).abs()
        results[name]["error"] = off.max().item()
        results[name]["notes"] = {
            "mean error": f"{off.mean():.1e}",
            "plain forward from fp32": f"{rounding.max():.1e}, mean {rounding.mean():.1e}",
        }
    results["ours"]["notes"]["error in fp32"] = f"{in_fp32:.1e}"

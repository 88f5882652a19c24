"""Batched sampling from the engine's decoder: prompts in, token ids with their log-probabilities out.

    responses = generate(model, prompts, max_new_tokens=512, temperature=0.6, stop_ids=chat.stop_ids, seed=1)

    prompts = (Prompt(ids, 512, SamplingParams(seed=seed)) for ids, seed in ...)
    for index, response in generate_stream(model, prompts, stop_ids=chat.stop_ids):
        ...                                                     # each as it ends; prompts are taken as rows fall free

Prompts are prefilled as packs, one that is asked for several times only once; then every running request advances one
token a step over a key-value cache. A request that ends leaves the batch and a waiting one takes its row, so short
responses never wait for long ones.

What a request draws depends on its prompt and its `SamplingParams` and on nothing else: the same request gives the same
tokens in any batch and next to any neighbours.

On a CPU its logprobs are those of a plain forward: `Decoder.forward` over the whole text without gradients, as `score`
runs it, and `token_logprobs`. In fp32 they are the same bits; in bf16 the hidden states are, and the logprobs differ by
the order of a sum of exponentials, under 4e-6. Prompts go through that forward itself, and a step's kernels
(`cpu_decoder`) compute a row as it does, from its own data; where a product is torch's (fp32, or no AVX512-BF16), it
gets a multiple of 16 rows and at least four a thread. Measured with torch 2.13, one and two threads: with fewer the
last bit changes. On a GPU, where the kernel itself may depend on the number of rows, that number is held fixed and
every prompt is prefilled alone.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dasd_engine.attention import attention
from dasd_engine.cpu_decoder import Attend, CpuDecoder
from dasd_engine.draw import SamplingParams, draw
from dasd_engine.errors import InputError
from dasd_engine.kv_cache import KVCache
from dasd_engine.model import Block, Decoder
from dasd_kernels import token_logprobs

_PREFILL_TOKENS = 2048  # of one prefill pack on a CPU, so that a layer's results stay near; a longer prompt goes alone
_VECTOR = 16  # rows of a matrix product are a multiple of it


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue, at least one, by at most `max_new_tokens`, sampled as `params` say."""

    tokens: Sequence[int]
    max_new_tokens: int
    params: SamplingParams = SamplingParams()


@dataclass
class Generation:
    """One response. `logprobs` are natural logs under the model itself, at temperature 1 without top-p or top-k,
    whatever the sampling was. A stop token is the last of `tokens`; `finish_reason` is "stop" or "length"."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_ids: Collection[int] = frozenset(),
    seed: int = 0,
    batch_size: int = 64,
    on_finish: Callable[[int, Generation], None] | None = None,
) -> list[Generation]:
    """Sample one response to each prompt.

    Args:
        prompts: token ids, each prompt at least one. For several samples of a prompt repeat it.
        temperature, top_p, top_k: see `draw.SamplingParams`. What prompt i draws depends on (seed, i, step).
        stop_ids: tokens that end a response.
        batch_size: requests advanced together; each holds a row of the cache.
        on_finish: called with the index of a prompt and its response when it ends.

    Returns:
        One Generation a prompt, in the order of `prompts`.

    Raises:
        InputError: naming the prompt or the option that is wrong.
    """
    requests = [
        Prompt(tokens, max_new_tokens, SamplingParams(temperature, top_p, top_k, seed, i))
        for i, tokens in enumerate(prompts)
    ]
    for i, request in enumerate(requests):  # before any work is done
        _check(model, i, request)
    results = [Generation() for _ in prompts]
    rows = min(batch_size, max(1, len(prompts)))
    for i, response in generate_stream(model, requests, stop_ids=stop_ids, batch_size=rows):
        results[i] = response
        if on_finish is not None:
            on_finish(i, response)
    return results


@torch.inference_mode()
def generate_stream(
    model: Decoder, prompts: Iterable[Prompt], *, stop_ids: Collection[int] = frozenset(), batch_size: int = 64
) -> Iterator[tuple[int, Generation]]:
    """(index in `prompts`, response) of each as it ends; a prompt is taken from the iterable when a row is free.

    `stop_ids` end a response; `batch_size` requests advance together. Raises InputError naming the prompt or the
    option that is wrong.
    """
    if batch_size < 1:
        raise InputError(f"batch_size = {batch_size} is out of range")
    batch = _Batch(model, batch_size)
    waiting = _Waiting(model, prompts)
    running: list[_Request] = []  # of each cache row
    while admitted := waiting.take(batch_size - len(running), batch.pack_tokens) or running:
        if admitted is running:
            hidden_ND, advanced = batch.decode(), running
        else:
            hidden_ND, advanced = batch.prefill([request.prompt.tokens for request in admitted]), admitted
            running = running + admitted
        params, steps = [r.prompt.params for r in advanced], [len(r.out.tokens) for r in advanced]
        tokens_N, logprobs_N = batch.draw(hidden_ND, params, steps)
        batch.feed(tokens_N)
        for request, token, logprob in zip(advanced, tokens_N.tolist(), logprobs_N.tolist(), strict=True):
            request.add(token, logprob, stop_ids)
        ended = [request for request in advanced if request.out.finish_reason]
        if ended:
            rows = _fill_holes([not request.out.finish_reason for request in running])
            batch.keep(rows)
            running = [running[row] for row in rows]
        for request in ended:
            yield request.index, request.out


@dataclass
class _Request:
    index: int
    prompt: Prompt
    out: Generation

    def add(self, token: int, logprob: float, stop_ids: Collection[int]) -> None:
        self.out.tokens.append(token)
        self.out.logprobs.append(logprob)
        if token in stop_ids:
            self.out.finish_reason = "stop"
        elif len(self.out.tokens) == self.prompt.max_new_tokens:
            self.out.finish_reason = "length"


class _Waiting:
    """The prompts that have no row yet, taken from their iterable as late as can be."""

    def __init__(self, model: Decoder, prompts: Iterable[Prompt]):
        self.model, self.prompts, self.ahead = model, enumerate(prompts), list[_Request]()

    def take(self, rows: int, pack_tokens: int) -> list[_Request]:
        """Up to `rows` requests, whose different prompts make one pack of `pack_tokens` (but one prompt at least)."""
        taken: list[_Request] = []
        different: set[tuple[int, ...]] = set()
        size = 0
        while len(taken) < rows and (request := self._next()):
            tokens = tuple(request.prompt.tokens)
            if tokens not in different:
                size += len(tokens)
                if different and size > pack_tokens:
                    self.ahead.append(request)
                    break
                different.add(tokens)
            taken.append(request)
        return taken

    def _next(self) -> _Request | None:
        if self.ahead:
            return self.ahead.pop()
        for index, prompt in self.prompts:
            _check(self.model, index, prompt)
            return _Request(index, prompt, Generation())
        return None


class _Batch:
    """The running requests' cache and next inputs, a row each; rows 0 to `len(sizes)` are in use."""

    def __init__(self, model: Decoder, batch_size: int):
        self.model = model
        self.device = model.embed_tokens.weight.device
        on_cpu = self.device.type == "cpu"
        self.pack_tokens = _PREFILL_TOKENS if on_cpu else 0
        self.least = 4 * torch.get_num_threads() if on_cpu else batch_size  # rows of a matrix product
        self.compiled = CpuDecoder(model) if CpuDecoder.serves(model) else None
        self.cache = KVCache(model, self.filled(batch_size), self.compiled is not None)
        self.lengths_B = torch.zeros(0, dtype=torch.int64, device=self.device)  # tokens cached of each row
        self.tokens_B = torch.zeros(0, dtype=torch.int64, device=self.device)  # each row's next input
        self.sizes: list[int] = []  # lengths_B, known without asking the device

    def filled(self, rows: int) -> int:
        """How many rows are computed for `rows` that are read (see the module's docstring)."""
        return -(-max(rows, self.least) // _VECTOR) * _VECTOR

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """New rows for these prompts; hidden states [rows, D] at their last tokens. Equal prompts are computed once."""
        different = {tuple(prompt): None for prompt in prompts}
        begins, tokens, lengths = {}, list[int](), list[int]()
        for prompt in different:
            begins[prompt] = len(tokens)
            tokens += prompt
            lengths.append(len(prompt))
        lengths.append(self.filled(len(tokens)) - len(tokens))  # a document that nobody reads
        tokens += [0] * lengths[-1]
        tokens_T, lengths_D = torch.tensor(tokens, device=self.device), torch.tensor(lengths, device=self.device)
        cu_seqlens = F.pad(lengths_D.cumsum(0), (1, 0))
        positions_T = torch.arange(len(tokens), device=self.device)
        positions_T = positions_T - torch.repeat_interleave(cu_seqlens[:-1], lengths_D)

        first, sizes = len(self.sizes), [len(prompt) for prompt in prompts]
        begins_B = torch.tensor([begins[tuple(prompt)] for prompt in prompts], device=self.device)
        sizes_B = torch.tensor(sizes, device=self.device)
        rows_S = torch.repeat_interleave(torch.arange(len(sizes), device=self.device), sizes_B)  # S: all rows' tokens
        slots_S = torch.arange(len(rows_S), device=self.device) - (sizes_B.cumsum(0) - sizes_B)[rows_S]
        from_S, rows_S = begins_B[rows_S] + slots_S, rows_S + first
        self.sizes += sizes
        self.cache.reserve(max(self.sizes))

        def attend(layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
            self.cache.write(layer, k_TGK, v_TGK, from_S, rows_S, slots_S)
            cu, longest = cu_seqlens.to(torch.int32), max(lengths)
            return attention(q_THK, k_TGK, v_TGK, cu, longest, backend=self.model.attention_backend)

        hidden_TD = self._forward(tokens_T, positions_T, attend)
        self.lengths_B = torch.cat([self.lengths_B, sizes_B])
        return hidden_TD[begins_B + sizes_B - 1]

    def decode(self) -> Tensor:
        """One more token of every row through the model; hidden states [rows, D]."""
        self.sizes = [size + 1 for size in self.sizes]
        self.cache.reserve(max(self.sizes))
        in_use = len(self.sizes)
        unread = self.filled(in_use) - in_use
        positions_B, tokens_B = F.pad(self.lengths_B, (0, unread)), F.pad(self.tokens_B, (0, unread))

        def attend(layer: int, q_BHK: Tensor, k_BGK: Tensor, v_BGK: Tensor) -> Tensor:
            return self.cache.attend_next(layer, q_BHK, k_BGK, v_BGK, positions_B)

        forward = self.compiled.forward if self.compiled else self._forward
        hidden_BD = forward(tokens_B, positions_B, attend)
        self.lengths_B = self.lengths_B + 1
        return hidden_BD[:in_use]

    def draw(self, hidden_ND: Tensor, params: Sequence[SamplingParams], steps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Tokens and logprobs, as `draw.draw`, of the last prefill's or decode's hidden states."""
        count = len(hidden_ND)
        head = self.compiled.head if self.compiled else self.model.logits
        logits_NV = head(F.pad(hidden_ND, (0, 0, 0, self.filled(count) - count)))[:count]
        tokens_N, logprobs_N = draw(logits_NV, params, steps)
        if self.compiled and not self.compiled.scores:
            logprobs_N = token_logprobs(hidden_ND, self.model.head_weight, tokens_N).logprob
        return tokens_N, logprobs_N

    def feed(self, tokens: Tensor) -> None:
        """The next inputs of the rows that the last prefill or decode computed."""
        self.tokens_B = torch.cat([self.tokens_B[: len(self.lengths_B) - len(tokens)], tokens])

    def keep(self, rows: list[int]) -> None:
        """Drop every row but these; row `rows[i]` becomes row i."""
        moved = [(new, old) for new, old in enumerate(rows) if new != old]
        if moved:
            new, old = torch.tensor(moved, device=self.device).T
            self.cache.move(new, old)
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self.lengths_B, self.tokens_B = self.lengths_B[index], self.tokens_B[index]
        self.sizes = [self.sizes[row] for row in rows]

    def _forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """Decoder.forward with attention by `attend(layer, q, k, v)`."""
        model = self.model
        cos_T1R, sin_T1R = model.rotary(positions_T)
        x_TD = model.embed_tokens(tokens_T)
        for index, layer in enumerate(model.layers):
            block = cast(Block, layer)
            q, k, v = block.self_attn.qkv(block.input_layernorm(x_TD), cos_T1R, sin_T1R)
            x_TD = x_TD + block.self_attn.o_proj(attend(index, q, k, v).flatten(-2))
            x_TD = x_TD + block.mlp(block.post_attention_layernorm(x_TD))
        return model.norm(x_TD)


def _fill_holes(alive: list[bool]) -> list[int]:
    """Rows to keep, moving as few as possible: the last living ones go where others have ended."""
    count = sum(alive)
    tail = [row for row in range(count, len(alive)) if alive[row]]
    return [row if alive[row] else tail.pop() for row in range(count)]


def _check(model: Decoder, index: int, prompt: Prompt) -> None:
    vocabulary = model.config.vocab_size
    if not len(prompt.tokens):
        raise InputError(f"prompts[{index}] is empty; a prompt needs at least one token")
    if not 0 <= min(prompt.tokens) <= max(prompt.tokens) < vocabulary:
        raise InputError(f"prompts[{index}] holds a token outside the model's vocabulary of {vocabulary}")
    if prompt.max_new_tokens < 1:
        raise InputError(f"max_new_tokens = {prompt.max_new_tokens} is out of range")
    prompt.params.check()

"""Batched sampling from the engine's decoder: prompts in, token ids with their log-probabilities out.

    responses = generate(model, prompts, max_new_tokens=512, temperature=0.6, stop_ids=chat.stop_ids, seed=1)

Prompts are prefilled as packs; then every running request advances one token a step over a key-value cache. A
request that ends leaves the batch and a waiting one takes its row, so short responses never wait for long ones.

What a request draws depends on (seed, its index, step) and on nothing else: the same prompt gives the same response
in any batch and next to any neighbours, up to the rounding of the matrix products.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dasd_engine.attention import attention
from dasd_engine.errors import InputError
from dasd_engine.model import Block, Decoder

_PREFILL_TOKENS = 16384  # of one prefill pack; a longer prompt goes alone
_CACHE_BLOCK = 64  # the cache grows, and is read, in multiples of this many tokens


@dataclass
class Generation:
    """One response. `logprobs` are natural logs under the model itself, at temperature 1 without top-p or top-k,
    whatever the sampling was. A stop token is the last of `tokens`; `finish_reason` is "stop" or "length"."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""


@torch.inference_mode()
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
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: the smallest set of likeliest tokens whose probability (after temperature) reaches it; 1 for all.
        top_k: that many likeliest tokens; 0 for all.
        stop_ids: tokens that end a response.
        batch_size: requests advanced together; each holds a row of the cache.
        on_finish: called with the index of a prompt and its response when it ends.

    Returns:
        One Generation a prompt, in the order of `prompts`.

    Raises:
        InputError: naming the prompt or the option that is wrong.
    """
    _check(model, prompts, max_new_tokens, temperature, top_p, top_k, batch_size)
    sampler = _Sampler(temperature, top_p, top_k, seed)
    results = [Generation() for _ in prompts]
    waiting = list(range(len(prompts)))[::-1]
    running: list[int] = []  # request of each cache row
    batch = _Batch(model, min(batch_size, len(prompts)))
    while waiting or running:
        admitted: list[int] = []
        size = 0
        while waiting and len(running) + len(admitted) < batch_size:
            size += len(prompts[waiting[-1]])
            if admitted and size > _PREFILL_TOKENS:
                break
            admitted.append(waiting.pop())
        if admitted:
            hidden = batch.prefill([prompts[i] for i in admitted])
            requests = admitted
            running += admitted
        else:
            hidden = batch.decode()
            requests = running
        tokens, logprobs = sampler(model.logits(hidden), requests, [len(results[i].tokens) for i in requests])
        batch.feed(tokens)
        ended = []
        for i, token, logprob in zip(requests, tokens.tolist(), logprobs.tolist(), strict=True):
            out = results[i]
            out.tokens.append(token)
            out.logprobs.append(logprob)
            if token in stop_ids or len(out.tokens) == max_new_tokens:
                out.finish_reason = "stop" if token in stop_ids else "length"
                ended.append(i)
                if on_finish is not None:
                    on_finish(i, out)
        if ended:
            rows = _fill_holes([not results[i].finish_reason for i in running])
            batch.keep(rows)
            running = [running[row] for row in rows]
    return results


class _Batch:
    """The running requests' keys, values and next inputs, a row each; rows 0 to `len` are in use.

    Cache tensors: [batch, G, tokens, K] keys and values a layer, grown as responses grow.
    """

    def __init__(self, model: Decoder, batch_size: int):
        self.model = model
        weight = model.embed_tokens.weight
        config = model.config
        shape = (batch_size, config.num_key_value_heads, 0, config.head_dim)
        self.keys = [weight.new_empty(shape) for _ in model.layers]
        self.values = [weight.new_empty(shape) for _ in model.layers]
        self.device = weight.device
        self.lengths_B = torch.zeros(0, dtype=torch.int64, device=self.device)  # tokens cached of each row
        self.tokens_B = torch.zeros(0, dtype=torch.int64, device=self.device)  # each row's next input
        self.sizes: list[int] = []  # lengths_B, known without asking the device

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """New rows for these prompts; hidden states [rows, D] at their last tokens."""
        first = len(self.lengths_B)
        lengths = [len(prompt) for prompt in prompts]
        tokens_T = torch.tensor([t for prompt in prompts for t in prompt], device=self.device)
        lengths_B = torch.tensor(lengths, device=self.device)
        ends_B = lengths_B.cumsum(0)
        rows_T = torch.repeat_interleave(torch.arange(len(prompts), device=self.device), lengths_B)
        positions_T = torch.arange(len(tokens_T), device=self.device) - (ends_B - lengths_B)[rows_T]
        cu_seqlens = F.pad(ends_B, (1, 0)).to(torch.int32)
        self.sizes += lengths
        self._make_room()

        def attend(layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
            # Advanced indices around a slice put the token axis in front: [T, G, K].
            self.keys[layer][first + rows_T, :, positions_T] = k_TGK
            self.values[layer][first + rows_T, :, positions_T] = v_TGK
            return attention(q_THK, k_TGK, v_TGK, cu_seqlens, max(lengths), backend=self.model.attention_backend)

        hidden_TD = self._forward(tokens_T, positions_T, attend)
        self.lengths_B = torch.cat([self.lengths_B, lengths_B])
        return hidden_TD[ends_B - 1]

    def decode(self) -> Tensor:
        """One more token of every row through the model; hidden states [rows, D]."""
        self.sizes = [size + 1 for size in self.sizes]
        self._make_room()
        positions_B, count, width = self.lengths_B, len(self.sizes), _round_up(max(self.sizes))
        rows_B = torch.arange(count, device=self.device)
        visible_B11L = (torch.arange(width, device=self.device) <= positions_B[:, None])[:, None, None]

        def attend(layer: int, q_BHK: Tensor, k_BGK: Tensor, v_BGK: Tensor) -> Tensor:
            self.keys[layer][rows_B, :, positions_B] = k_BGK
            self.values[layer][rows_B, :, positions_B] = v_BGK
            k_BGLK, v_BGLK = self.keys[layer][:count, :, :width], self.values[layer][:count, :, :width]
            # The query heads that share keys stand where SDPA has query positions: nothing is repeated.
            q_BGHK = q_BHK.unflatten(1, (k_BGLK.shape[1], -1))
            return F.scaled_dot_product_attention(q_BGHK, k_BGLK, v_BGLK, attn_mask=visible_B11L).flatten(1, 2)

        hidden_BD = self._forward(self.tokens_B, positions_B, attend)
        self.lengths_B = positions_B + 1
        return hidden_BD

    def feed(self, tokens: Tensor) -> None:
        """The next inputs of the rows that the last prefill or decode computed."""
        self.tokens_B = torch.cat([self.tokens_B[: len(self.lengths_B) - len(tokens)], tokens])

    def keep(self, rows: list[int]) -> None:
        """Drop every row but these; row `rows[i]` becomes row i."""
        moved = [(new, old) for new, old in enumerate(rows) if new != old]
        if moved:
            new, old = torch.tensor(moved, device=self.device).T
            width = max(self.sizes)
            for cache in (*self.keys, *self.values):
                cache[new, :, :width] = cache[old, :, :width]
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self.lengths_B, self.tokens_B = self.lengths_B[index], self.tokens_B[index]
        self.sizes = [self.sizes[row] for row in rows]

    def _forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Callable[..., Tensor]) -> Tensor:
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

    def _make_room(self) -> None:
        """Room for the longest row; at least doubled, so that growing costs a constant a token."""
        room, longest = self.keys[0].shape[2], max(self.sizes)
        if longest > room:
            more = _round_up(max(longest, 2 * room)) - room
            self.keys = [F.pad(cache, (0, 0, 0, more)) for cache in self.keys]
            self.values = [F.pad(cache, (0, 0, 0, more)) for cache in self.values]


class _Sampler:
    """Logits [n, V] -> (tokens int64 [n], their raw log-probabilities fp32 [n])."""

    def __init__(self, temperature: float, top_p: float, top_k: int, seed: int):
        self.temperature, self.top_p, self.top_k, self.seed = temperature, top_p, top_k, seed

    def __call__(self, logits_NV: Tensor, requests: list[int], steps: list[int]) -> tuple[Tensor, Tensor]:
        logprobs_NV = logits_NV.float().log_softmax(-1)
        if self.temperature == 0:
            tokens_N = logprobs_NV.argmax(-1)
        else:
            uniform_N = torch.from_numpy(uniforms(self.seed, requests, steps)).to(logits_NV.device)
            tokens_N = self._draw(logprobs_NV, uniform_N)
        return tokens_N, logprobs_NV.gather(1, tokens_N[:, None])[:, 0]

    def _draw(self, logprobs_NV: Tensor, uniform_N: Tensor) -> Tensor:
        """The token at which the cumulative probability passes `uniform_N`."""
        scaled_NV = logprobs_NV.double() / self.temperature
        if self.top_p == 1 and self.top_k == 0:
            return _invert(scaled_NV.softmax(-1), uniform_N)
        count = self.top_k or scaled_NV.shape[1]
        kept_NK, tokens_NK = scaled_NV.topk(min(count, scaled_NV.shape[1]))
        probability_NK = kept_NK.softmax(-1)
        before_NK = probability_NK.cumsum(-1) - probability_NK  # 0 for the likeliest, which always stays
        probability_NK = probability_NK.masked_fill(before_NK >= self.top_p, 0)
        return tokens_NK.gather(1, _invert(probability_NK, uniform_N)[:, None])[:, 0]


def _invert(weight_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Index of the first column whose running sum exceeds uniform x total: never one of weight 0."""
    cumulative_NV = weight_NV.cumsum(-1)
    total_N = cumulative_NV[:, -1]
    below_N = torch.nextafter(total_N, torch.zeros_like(total_N))
    target_N = torch.minimum(uniform_N * total_N, below_N)
    return torch.searchsorted(cumulative_NV, target_N[:, None], right=True)[:, 0]


def uniforms(seed: int, requests: Sequence[int], steps: Sequence[int]) -> np.ndarray:
    """float64 [n] in [0, 1): a hash of (seed, request, step), by three rounds of SplitMix64's finaliser
    (Steele, Lea and Flood, OOPSLA 2014)."""
    state = np.full(len(requests), seed & (2**64 - 1), dtype=np.uint64)
    for counter in (np.zeros(len(requests)), requests, steps):
        state = state + np.uint64(0x9E3779B97F4A7C15) + np.asarray(counter, dtype=np.uint64)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _fill_holes(alive: list[bool]) -> list[int]:
    """Rows to keep, moving as few as possible: the last living ones go where others have ended."""
    count = sum(alive)
    tail = [row for row in range(count, len(alive)) if alive[row]]
    return [row if alive[row] else tail.pop() for row in range(count)]


def _round_up(length: int) -> int:
    return -(-length // _CACHE_BLOCK) * _CACHE_BLOCK


def _check(
    model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float,
    top_p: float, top_k: int, batch_size: int,
) -> None:  # fmt: skip
    vocabulary = model.config.vocab_size
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompts[{i}] is empty; a prompt needs at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise InputError(f"prompts[{i}] holds a token outside the model's vocabulary of {vocabulary}")
    for name, value, good in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
        ("temperature", temperature, temperature >= 0),
        ("top_p", top_p, 0 < top_p <= 1),
        ("top_k", top_k, top_k >= 0),
        ("batch_size", batch_size, batch_size >= 1),
    ):
        if not good:
            raise InputError(f"{name} = {value} is out of range")

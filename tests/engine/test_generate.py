"""generate: a cache that changes nothing, and sampling that depends on seed, request and step alone."""

import math
from dataclasses import replace

import pytest
import torch

from dasd_engine import Decoder, ModelConfig, init_weights, save_model
from dasd_engine.draw import SamplingParams, draw, uniforms
from dasd_engine.errors import InputError
from dasd_engine.generate import Prompt, generate, generate_stream
from dasd_kernels import token_logprobs

QWEN3 = ModelConfig(
    model_type="qwen3", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
)  # fmt: skip
QWEN2 = replace(QWEN3, model_type="qwen2", tie_word_embeddings=False, num_key_value_heads=4)
LLAMA = replace(QWEN3, model_type="llama", num_key_value_heads=1)


def make_model(config: ModelConfig = QWEN3, peak: float = 25.0) -> Decoder:
    """A random decoder whose blocks outweigh the embedding and whose distributions are far from uniform, so that
    a wrong cache changes tokens."""
    model = Decoder(config)
    init_weights(model, 0)
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.o_proj.weight.mul_(40)
            layer.mlp.down_proj.weight.mul_(40)
        model.norm.weight.mul_(peak)
    return model


def make_prompts(lengths: list[int], vocabulary: int = 97) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def uncached_logprobs(model: Decoder, ids: list[int]) -> torch.Tensor:
    """log p(next token) at every position of one document, by a plain forward."""
    n = len(ids)
    hidden = model(torch.tensor(ids), torch.arange(n), torch.tensor([0, n], dtype=torch.int32), n)
    return model.logits(hidden).float().log_softmax(-1)


@pytest.mark.parametrize("config", [QWEN3, QWEN2, LLAMA], ids=lambda config: config.model_type)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_equals_an_uncached_forward(config, temperature):
    """Every logprob is that of a forward over the whole text; greedy tokens are its argmax. 11 requests go through
    4 rows, beyond one cache block, so rows are reused and the cache grows."""
    model = make_model(config)
    prompts = make_prompts([5, 1, 17, 9, 70, 2, 30, 8, 3, 12, 64])
    out = generate(
        model, prompts, max_new_tokens=70, temperature=temperature, stop_ids=range(0, 97, 8), seed=4, batch_size=4
    )
    assert len({len(g.tokens) for g in out}) > 3  # they ended at different steps
    for prompt, g in zip(prompts, out, strict=True):
        logprobs = uncached_logprobs(model, prompt + g.tokens)[len(prompt) - 1 : -1]
        tokens = torch.tensor(g.tokens)
        torch.testing.assert_close(
            torch.tensor(g.logprobs), logprobs[torch.arange(len(tokens)), tokens], rtol=1e-4, atol=1e-4
        )
        if temperature == 0:
            assert tokens.tolist() == logprobs.argmax(-1).tolist()


@pytest.mark.parametrize("config", [QWEN3, QWEN2, LLAMA], ids=lambda config: config.model_type)
def test_greedy_equals_transformers(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = make_model(config)
    save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompts = make_prompts([4, 11, 23])
    ours = generate(model, prompts, max_new_tokens=20, temperature=0.0)
    for prompt, g in zip(prompts, ours, strict=True):
        ids = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=20,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert g.tokens == ids[0, len(prompt) :].tolist()


SHAPES = {  # three heads a group, a product of more than one chain; norms of heads; biases, and a head of its own
    "llama": replace(
        LLAMA, vocab_size=512, hidden_size=192, intermediate_size=1088, num_attention_heads=3, head_dim=64
    ),
    "qwen3": replace(QWEN3, vocab_size=512, hidden_size=128, head_dim=128),
    "qwen2": replace(QWEN2, vocab_size=512, hidden_size=48, intermediate_size=96, head_dim=12),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logprobs_are_those_of_a_plain_forward(shape, dtype):
    """Of each whole text in a pack of its own, without gradients, and `token_logprobs`, as `score` has them: in fp32
    the same bits; in bf16, where one rounding of a hidden state changes them by 1e-3, to the last digits of fp32."""
    model = Decoder(shape)
    init_weights(model, 0)
    with torch.no_grad():
        model.norm.weight.mul_(16)
        for layer in model.layers:
            layer.self_attn.o_proj.weight.mul_(20)
            layer.mlp.down_proj.weight.mul_(20)
    model = model.to(dtype)
    prompts = make_prompts([5, 30, 17, 600, 1], vocabulary=512)  # 600: beyond one strip of attention
    out = generate(model, prompts, max_new_tokens=40, temperature=1.0, batch_size=3)
    for prompt, g in zip(prompts, out, strict=True):
        ids = torch.tensor(prompt + g.tokens)
        bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
        with torch.no_grad():
            hidden = model(ids, torch.arange(len(ids)), bounds, len(ids))[len(prompt) - 1 : -1]
        plain = token_logprobs(hidden, model.head_weight, torch.tensor(g.tokens)).logprob
        assert plain.exp().std() > 0.01  # the distributions are not flat
        slack = 0 if dtype == torch.float32 else 4e-6
        torch.testing.assert_close(torch.tensor(g.logprobs), plain, rtol=0, atol=slack)


GROUPS = {  # (query heads, key heads, head size): groups of one, two, three and five queries
    "1": (2, 2, 16),
    "2": (4, 2, 8),
    "3": (9, 3, 8),
    "5": (5, 1, 32),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_a_request_does_not_depend_on_its_neighbours(group, dtype):
    """Same seed: the whole set in one batch, in threes, one by one, in another order, and the first few alone give
    the same tokens and the same logprobs, bit for bit. Contexts cross several widths of the cache."""
    heads, keys, size = GROUPS[group]
    shape = {"num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": size, "hidden_size": 48}
    model = make_model(replace(QWEN3, **shape)).to(dtype)
    prompts = make_prompts([6, 3, 9, 124, 1, 120, 5, 60])
    requests = [
        Prompt(tokens, 12 + 5 * i, SamplingParams(temperature=[1.0, 0.6, 0.0][i % 3], top_p=[1.0, 0.95][i % 2], seed=i))
        for i, tokens in enumerate([*prompts, prompts[0], prompts[0]])
    ]

    def run(order: list[int], batch_size: int) -> list[tuple]:
        got: dict[int, tuple] = {}
        chosen = [requests[i] for i in order]
        for index, g in generate_stream(model, iter(chosen), stop_ids={3, 4}, batch_size=batch_size):
            got[order[index]] = (g.tokens, g.logprobs, g.finish_reason)
        return [got[i] for i in sorted(got)]

    everything = list(range(len(requests)))
    together = run(everything, 64)
    assert run(everything, 3) == together
    assert run(everything, 1) == together
    assert run(everything[::-1], 4) == together
    assert run([0, 1, 2], 64) == together[:3]
    assert together[0][0] != together[8][0] != together[9][0]  # one prompt, other seeds


def test_a_stream_takes_prompts_as_rows_fall_free():
    """It hands over each response as it ends, having taken no more prompts than it has rows for."""
    lengths = [2, 9, 3, 3, 1]
    taken = []

    def prompts():
        for i, length in enumerate(lengths):
            taken.append(i)
            yield Prompt([i + 1], length, SamplingParams(seed=i))

    ended = []
    for index, response in generate_stream(make_model(), prompts(), batch_size=2):
        ended.append(index)
        assert len(response.tokens) == len(response.logprobs) == lengths[index]
        assert len(taken) <= len(ended) + 2
    assert ended == [0, 2, 3, 4, 1]  # a prefill takes a step of its own


def test_what_a_request_draws_comes_from_its_own_seed():
    model = make_model(peak=12.0)
    prompt = make_prompts([6])[0]

    def tokens(**params) -> list[int]:
        ((_, response),) = generate_stream(model, [Prompt(prompt, 12, SamplingParams(**params))])
        return response.tokens

    assert tokens(seed=5) == tokens(seed=5)
    assert len({tuple(tokens(seed=s, sample=k)) for s, k in [(5, 0), (6, 0), (5, 1), (2**52 + 5, 0)]}) == 4
    # generate's i-th prompt is sample i of its seed
    assert generate(model, [prompt] * 3, max_new_tokens=12, seed=5)[2].tokens == tokens(seed=5, sample=2)


def test_samples_of_one_prompt_differ():
    out = generate(make_model(), make_prompts([6]) * 8, max_new_tokens=12, temperature=1.0)
    assert len({tuple(g.tokens) for g in out}) == 8


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_tokens_follow_the_distribution(temperature):
    """2,000 draws of one prompt's first token: every frequency within 4.5 standard errors of its probability."""
    model = make_model(peak=12.0)
    prompt = make_prompts([6])[0]
    draws = generate(model, [prompt] * 2000, max_new_tokens=1, temperature=temperature, seed=3, batch_size=2000)
    expected = (uncached_logprobs(model, prompt)[-1] / temperature).softmax(-1)
    seen = torch.bincount(torch.tensor([g.tokens[0] for g in draws]), minlength=97) / 2000
    error = (expected * (1 - expected) / 2000).sqrt()
    assert ((seen - expected).abs() <= 4.5 * error + 1 / 2000).all()
    assert expected.max() < 0.9  # the test means something


def test_top_k_and_top_p_draw_from_the_likeliest_only():
    model = make_model(peak=12.0)
    prompt = make_prompts([6])[0]
    probability, order = uncached_logprobs(model, prompt)[-1].softmax(-1).sort(descending=True)

    def drawn(**options) -> dict[int, float]:
        out = generate(model, [prompt] * 800, max_new_tokens=1, temperature=1.0, batch_size=800, **options)
        return {g.tokens[0]: g.logprobs[0] for g in out}

    five = drawn(top_k=5)
    assert set(five) == set(order[:5].tolist())
    for token, logprob in five.items():  # raw, not renormalised over the five
        assert logprob == pytest.approx(math.log(probability[order == token].item()), abs=1e-4)
    needed = int((probability.cumsum(0) < 0.5).sum()) + 1  # the smallest set that reaches one half
    assert needed > 1
    assert set(drawn(top_p=0.5)) == set(order[:needed].tolist())
    assert set(drawn(top_p=1e-6)) == {order[0].item()}
    assert set(drawn(top_k=2, top_p=0.999999)) == set(order[:2].tolist())


def test_top_p_looks_further_than_the_likeliest_thousand():
    """A flat distribution over 3,000 tokens: half of its weight is in the 1,500 likeliest, and all of them are drawn
    from; beside it a peaked row, whose draw does not change."""
    generator = torch.Generator().manual_seed(2)
    flat = torch.rand(3000, generator=generator) * 0.01
    peaked = torch.randn(3000, generator=generator) * 8
    half = flat.softmax(-1).sort(descending=True)
    needed = half.indices[: int((half.values.double().cumsum(0) < 0.5).sum()) + 1].tolist()
    count = 1200
    params = [SamplingParams(top_p=0.5, sample=i) for i in range(count)]
    tokens, logprobs = draw(flat.expand(count, -1), params, [0] * count)
    assert set(tokens.tolist()) <= set(needed)
    assert len(set(tokens.tolist()) & set(half.indices[1024:].tolist())) > 100
    torch.testing.assert_close(logprobs, flat.log_softmax(-1)[tokens])
    alone, _ = draw(peaked[None], params[:1], [0])
    beside, _ = draw(torch.stack([peaked, flat]), params[:2], [0, 0])
    assert alone[0] == beside[0] and beside[1] == tokens[1]


def test_a_row_without_numbers_has_no_logprob_and_leaves_the_others_alone():
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0))
    broken = logits.clone()
    broken[1, 7] = torch.nan
    for p in (SamplingParams(0.0), SamplingParams(1.0), SamplingParams(0.6, top_k=5), SamplingParams(1.0, top_p=0.9)):
        params = [replace(p, sample=i) for i in range(3)]
        (tokens, logprobs), (whole, _) = draw(broken, params, [0] * 3), draw(logits, params, [0] * 3)
        assert logprobs.isnan().tolist() == [False, True, False] and tokens[::2].tolist() == whole[::2].tolist()
        assert 0 <= tokens[1] < 2000


def test_stop_ids_and_finish_reasons():
    model = make_model()
    prompts = make_prompts([4, 9])
    free = generate(model, prompts, max_new_tokens=12, temperature=0.0)
    assert [g.finish_reason for g in free] == ["length"] * 2
    assert [len(g.tokens) for g in free] == [12] * 2
    stop = free[0].tokens[5]
    stopped = generate(model, prompts, max_new_tokens=12, temperature=0.0, stop_ids={stop})
    cut = free[0].tokens.index(stop) + 1
    assert stopped[0].tokens == free[0].tokens[:cut]  # the stop token is kept, as the last one
    assert stopped[0].finish_reason == "stop"
    assert len(stopped[0].logprobs) == cut


def test_on_finish_reports_every_request_once():
    seen = []
    out = generate(
        make_model(), make_prompts([4, 9, 2]), max_new_tokens=5, batch_size=2, stop_ids={1},
        on_finish=lambda index, generation: seen.append((index, generation)),
    )  # fmt: skip
    assert sorted(index for index, _ in seen) == [0, 1, 2]
    assert all(out[index] is generation for index, generation in seen)


def test_no_prompts():
    assert generate(make_model(), [], max_new_tokens=5) == []


def test_uniforms_are_uniform_and_differ_by_every_counter():
    u = uniforms(5, list(range(1000)) * 20, [step for step in range(20) for _ in range(1000)])
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.003
    assert len(set(u.tolist())) == 20000
    assert uniforms(5, [3], [7])[0] == u[7 * 1000 + 3]
    assert len({uniforms(s, [r], [t])[0] for s, r, t in [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0)]}) == 4


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, r"prompts\[1\] is empty"),
        ([[1, 97]], {}, r"prompts\[0\] holds a token outside .* 97"),
        ([[1]], {"temperature": -1.0}, "temperature = -1.0"),
        ([[1]], {"top_p": 0.0}, "top_p = 0.0"),
        ([[1]], {"top_k": -2}, "top_k = -2"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens = 0"),
        ([[1]], {"batch_size": 0}, "batch_size = 0"),
    ],
)
def test_bad_options_are_named(prompts, options, message):
    with pytest.raises(InputError, match=message):
        generate(make_model(), prompts, **{"max_new_tokens": 4, **options})

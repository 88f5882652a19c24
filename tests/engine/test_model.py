"""The decoder against transformers: logits within 1e-4 and every gradient within 1e-4 relative, packed or not."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_models import LLAMA3, YARN, assert_close, make_theirs, pack
from torch import Tensor

from dasd_engine import Decoder, load_model, read_config
from dasd_engine.hf import init_weights

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3 tied": ("qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3 untied, biases": ("qwen3", dict(head_dim=8, attention_bias=True)),
    "qwen2 tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2 untied, one key-value head": ("qwen2", dict(num_key_value_heads=1)),
    "llama untied": ("llama", dict(num_key_value_heads=4)),
    "llama tied, biases": ("llama", dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "llama, linear": ("llama", dict(rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4})),
    "llama, llama3": ("llama", dict(rope_parameters=LLAMA3)),
    "qwen3, yarn": ("qwen3", dict(head_dim=32, rope_parameters=YARN)),
    "qwen2, yarn with its attention factor": ("qwen2", dict(rope_parameters=YARN | {"attention_factor": 1.3})),
}


def their_name(name: str) -> str:
    return name if name.startswith("lm_head") else f"model.{name}"


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:-1], tokens[1:], reduction="sum")


def packed_loss(model: Decoder, lengths: list[int], seed: int = 0) -> Tensor:
    """Sum over the documents of one pack."""
    tokens, positions, cu_seqlens, max_seqlen = pack(lengths, seed=seed)
    logits = model.logits(model(tokens, positions, cu_seqlens, max_seqlen))
    return sum((next_token_loss(z, t) for z, t in zip(logits.split(lengths), tokens.split(lengths), strict=True)))  # type: ignore[return-value]


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    theirs = make_theirs(tmp_path, family, **changes)
    ours = load_model(tmp_path)
    tokens, positions, cu_seqlens, max_seqlen = pack([33])
    logits = ours.logits(ours(tokens, positions, cu_seqlens, max_seqlen))
    expected = theirs(tokens[None]).logits[0]
    assert expected.abs().max() > 1  # far from uniform, so that 1e-4 says something
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    next_token_loss(logits, tokens).backward()
    next_token_loss(expected, tokens).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == {their_name(name) for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[their_name(name)])


@pytest.mark.parametrize("case", ["qwen3 tied", "llama, llama3", "qwen3, yarn"])
def test_logits_at_long_positions_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    theirs = make_theirs(tmp_path, family, **(changes | {"max_position_embeddings": 131072}))
    ours = load_model(tmp_path)
    tokens, positions, cu_seqlens, max_seqlen = pack([20])
    positions = positions * 6500 + 7  # up to 123,507
    logits = ours.logits(ours(tokens, positions, cu_seqlens, max_seqlen))
    expected = theirs(tokens[None], position_ids=positions[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["qwen3 tied", "qwen2 untied, one key-value head", "llama tied, biases"])
def test_a_pack_gives_the_loss_and_gradients_of_its_documents_alone(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    theirs = make_theirs(tmp_path, family, **changes)
    ours = load_model(tmp_path)
    lengths = [17, 1, 5, 30, 2]
    loss = packed_loss(ours, lengths)
    loss.backward()
    expected = torch.zeros(())
    for document in pack(lengths)[0].split(lengths):
        expected = expected + next_token_loss(theirs(document[None]).logits[0], document)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[their_name(name)])


def test_a_document_is_blind_to_its_neighbours(tmp_path: Path) -> None:
    make_theirs(tmp_path, "qwen3", head_dim=16)
    model = load_model(tmp_path)
    tokens, positions, cu_seqlens, max_seqlen = pack([12, 9, 14])
    hidden = model(tokens, positions, cu_seqlens, max_seqlen)
    changed = tokens.clone()
    changed[:12] = changed[:12].flip(0)
    changed[21:] += 1
    again = model(changed % 101, positions, cu_seqlens, max_seqlen)
    torch.testing.assert_close(again[12:21], hidden[12:21], rtol=0, atol=1e-6)
    assert (again[:12] - hidden[:12]).abs().max() > 1e-2


def test_empty_documents_change_nothing(tmp_path: Path) -> None:
    make_theirs(tmp_path, "qwen2")
    model = load_model(tmp_path)
    tokens, positions, cu_seqlens, max_seqlen = pack([6, 7])
    padded = torch.cat([cu_seqlens, cu_seqlens[-1:].repeat(3)])  # a fixed length of cu_seqlens, as compiled blocks like
    expected = model(tokens, positions, cu_seqlens, max_seqlen)
    assert torch.equal(model(tokens, positions, padded, max_seqlen), expected)


def test_bf16_keeps_the_rotary_table_in_fp32(tmp_path: Path) -> None:
    """At position 100,000 a bf16 angle would be off by hundreds of radians."""
    make_theirs(tmp_path, "llama")
    exact, model = load_model(tmp_path), load_model(tmp_path, dtype=torch.bfloat16)
    tokens, positions, cu_seqlens, max_seqlen = pack([24])
    hidden = model(tokens, positions + 100_000, cu_seqlens, max_seqlen)
    expected = exact(tokens, positions + 100_000, cu_seqlens, max_seqlen)
    assert hidden.dtype == torch.bfloat16
    shifted = exact(tokens, (positions + 100_000).bfloat16().long(), cu_seqlens, max_seqlen)
    error = (hidden - expected).norm() / expected.norm()
    assert error < 0.03 < (shifted - expected).norm() / expected.norm()


def test_rms_norm_is_computed_in_fp32(tmp_path: Path) -> None:
    """Squares of 1,000 bf16 values lose the small ones when they are summed in bf16."""
    model = Decoder(read_config_of(tmp_path)).bfloat16()
    x = torch.randn(16, 48, generator=torch.Generator().manual_seed(0)).bfloat16() * 1e-2
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    error = (model.norm(x).double() - exact).abs() / exact.abs()
    assert error.max() <= 2**-8  # one rounding to bf16


def read_config_of(path: Path) -> Any:
    make_theirs(path, "qwen3", head_dim=16)
    return read_config(path)


def test_compiled_blocks_do_not_recompile_for_other_documents(tmp_path: Path) -> None:
    from torch._dynamo.testing import CompileCounter

    make_theirs(tmp_path, "qwen3", head_dim=16)
    model, eager = load_model(tmp_path), load_model(tmp_path)
    counter = CompileCounter()
    for layer in model.layers:
        layer.compile(backend=counter)
    compiled_at = []
    for lengths in ([10, 20], [5, 5, 20], [1, 29], [13, 11, 6], [30]):
        batch = pack(lengths)
        torch.testing.assert_close(model(*batch), eager(*batch))
        compiled_at.append(counter.frame_count)
    assert compiled_at[0] > 0
    assert compiled_at[-1] == compiled_at[1]


def test_random_weights_start_near_a_uniform_prediction(tmp_path: Path) -> None:
    model = Decoder(read_config_of(tmp_path))
    init_weights(model, 3)
    loss = packed_loss(model, [40, 60]) / 98
    assert abs(loss.item() - torch.log(torch.tensor(101.0)).item()) < 0.1
    assert abs(model.embed_tokens.weight.std().item() - 0.02) < 1e-3
    residual = model.layers[0].get_submodule("mlp.down_proj").weight
    assert abs(residual.std().item() - 0.01) < 1e-3  # 0.02 / sqrt(2 * 2 layers)
    assert torch.equal(model.norm.weight, torch.ones(48))


def test_smollm2_is_that_of_transformers() -> None:
    path = os.environ.get("DASD_SMOLLM2")
    if not path:
        pytest.skip("set DASD_SMOLLM2 to a directory that holds SmolLM2-135M as safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    ours = load_model(path)
    lengths = [24, 40]
    tokens, positions, cu_seqlens, max_seqlen = pack(lengths, vocab_size=49152)
    text = transformers.AutoTokenizer.from_pretrained(path)(
        "The capital of France is Paris, and that of Italy is Rome."
    )
    tokens[: len(text["input_ids"])] = torch.tensor(text["input_ids"])
    logits = ours.logits(ours(tokens, positions, cu_seqlens, max_seqlen))
    expected = torch.cat([theirs(document[None]).logits[0] for document in tokens.split(lengths)])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    next_token_loss(logits, tokens).backward()
    next_token_loss(expected, tokens).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[their_name(name)])

"""Rotary frequencies against transformers, and what each scaling promises."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dasd_engine import read_config
from dasd_engine.rope import Rope, rotary_table
from dasd_kernels.pointwise import rotate

PARAMETERS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.5, "high_freq_factor": 8.0, "rope_theta": 1e6},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6},
    {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    {"rope_type": "yarn", "factor": 40.0, "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 0.8},
    {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4, "attention_factor": 0.9},
    {"rope_type": "yarn", "factor": 0.5, "rope_theta": 1e4},
]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda p: "-".join(str(v) for v in p.values()))
def test_frequencies_are_exactly_those_of_transformers(
    parameters: dict[str, Any], head_dim: int, tmp_path: Path
) -> None:
    if parameters["rope_type"] != "linear":
        parameters = parameters | {"original_max_position_embeddings": 2048}
    theirs = transformers.LlamaConfig(
        hidden_size=head_dim * 4,
        num_attention_heads=4,
        max_position_embeddings=65536,
        rope_parameters=dict(parameters),
    )
    theirs.architectures = ["LlamaForCausalLM"]
    theirs.save_pretrained(tmp_path)
    rope = read_config(tmp_path).rope
    inv_freq, amplitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs)
    assert torch.equal(rope.inv_freq(head_dim), inv_freq)
    assert rope.amplitude() == pytest.approx(amplitude, rel=1e-12)


def test_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 64, generator=torch.Generator().manual_seed(0)).double()

    def score(i: int, j: int) -> torch.Tensor:
        tables = [rotary_table(torch.tensor([p]), Rope().inv_freq(64), 1.0) for p in (i, j)]
        a, b = (rotate(x, cos.double(), sin.double()) for x, (cos, sin) in zip((q, k), tables, strict=True))
        return (a * b).sum()

    torch.testing.assert_close(score(3, 1), score(102, 100), rtol=0, atol=1e-4)
    assert (score(3, 1) - score(3, 2)).abs() > 1e-2


def test_rotation_keeps_the_norm_and_the_dtype() -> None:
    x = torch.randn(50, 3, 32, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_table(torch.arange(50), Rope().inv_freq(32), 1.0)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (50, 1, 16)
    torch.testing.assert_close(rotate(x, cos, sin).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotate(x, cos, sin)[0], x[0])
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16

"""Small random models of every family, written by transformers, and packs to feed them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

CONFIGS = {
    "qwen3": transformers.Qwen3Config,
    "qwen2": transformers.Qwen2Config,
    "llama": transformers.LlamaConfig,
}
SIZES = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    initializer_range=0.2,
)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 256, "rope_theta": 500000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1e6}


def make_theirs(path: Path, family: str, **changes: Any) -> Any:
    """A transformers model with random weights (biases and norms too), fp32, eager attention, saved under `path`."""
    torch.manual_seed(0)
    changes.setdefault("attn_implementation", "eager")
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](**(SIZES | changes)))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.save_pretrained(path)
    return model


def pack(
    lengths: list[int], vocab_size: int = SIZES["vocab_size"], seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(tokens, positions, cu_seqlens, max_seqlen) of one pack of random documents."""
    tokens = torch.randint(0, vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return tokens, positions, cu_seqlens, max(lengths)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """Within `tolerance` of the largest magnitude."""
    scale = theirs.abs().max().item()
    assert (ours - theirs).abs().max().item() <= tolerance * scale

"""Rotary position embedding: the frequencies of each scaling, and its tables.

Formulas: RoFormer (arXiv 2104.09864) for "default"; position interpolation (2306.15595) for "linear"; Llama 3.1's
banded interpolation for "llama3"; YaRN (2309.00071) for "yarn". Tables are fp32 whatever the model's dtype. The
order of operations follows `transformers`: at position 100,000 one unit in the last place of a frequency is an
angle of 0.006, so only equal roundings give equal models.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """Parameters of the rotary embedding, in the words of Hugging Face's `rope_parameters`.

    `original_max_position_embeddings` is the context of pretraining, in tokens. `attention_factor` None means
    the paper's 0.1 ln(factor) + 1 (or the ratio that `mscale` and `mscale_all_dim` give); only yarn uses it.
    """

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def inv_freq(self, head_dim: int) -> Tensor:
        """Radians a token, fp32 [head_dim // 2], on the CPU."""
        wavelength = self.rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
        inv_freq = 1.0 / wavelength  # radians a token, of tokens a radian
        if self.rope_type == "linear":
            return inv_freq / self.factor
        if self.rope_type == "llama3":
            return self._llama3(inv_freq)
        if self.rope_type == "yarn":
            return self._yarn(wavelength, head_dim)
        return inv_freq

    def _llama3(self, inv_freq: Tensor) -> Tensor:
        """Wavelengths beyond the original context are stretched, short ones kept, a smooth band between."""
        turns = self.original_max_position_embeddings / (2 * math.pi / inv_freq)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return kept * inv_freq + (1 - kept) * inv_freq / self.factor

    def _yarn(self, wavelength: Tensor, head_dim: int) -> Tensor:
        """Dimensions that turn over `beta_fast` times in the original context are kept, under `beta_slow` stretched."""

        def dimension_of(turns: float) -> float:
            context = self.original_max_position_embeddings
            return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(self.rope_theta))

        low, high = dimension_of(self.beta_fast), dimension_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001  # a step instead of a division by zero
        index = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
        kept = 1 - ((index - low) / (high - low)).clamp(0, 1)
        return 1.0 / (self.factor * wavelength) * (1 - kept) + 1.0 / wavelength * kept

    def amplitude(self) -> float:
        """What cos and sin are multiplied by: yarn's attention factor, 1 for the others."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _yarn_scale(self.factor, self.mscale) / _yarn_scale(self.factor, self.mscale_all_dim)
        return _yarn_scale(self.factor, 1.0)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_table(positions_T: Tensor, inv_freq_R: Tensor, amplitude: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each fp32 [T, 1, head_dim // 2]; the middle axis broadcasts over heads."""
    angle_T1R = (positions_T.to(torch.float32)[:, None] * inv_freq_R)[:, None]
    return angle_T1R.cos() * amplitude, angle_T1R.sin() * amplitude

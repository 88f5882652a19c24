"""The keys and values that a generator keeps of its rows: [rows, G, tokens, K] a layer, growing as responses grow."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dasd_engine.model import Decoder
from dasd_kernels import decode


class KVCache:
    """`compiled`: the CPU's kernels read it, and tokens lie as these like them (see `dasd_kernels.decode.append_`)."""

    def __init__(self, model: Decoder, rows: int, compiled: bool):
        config = model.config
        shape = (rows, config.num_key_value_heads, 0, config.head_dim)
        self.keys = [model.embed_tokens.weight.new_empty(shape) for _ in model.layers]
        self.values = [model.embed_tokens.weight.new_empty(shape) for _ in model.layers]
        self.scale = config.head_dim**-0.5
        self.compiled = compiled
        self.used = 0  # tokens of the longest row

    def reserve(self, tokens: int) -> None:
        """Room for the longest row; at least doubled, so that growing costs a constant a token."""
        room = self.keys[0].shape[2]
        if tokens > room:
            more = _width(max(tokens, 2 * room))
            self.keys = [self._grown(cache, more) for cache in self.keys]
            self.values = [self._grown(cache, more) for cache in self.values]
        self.used = tokens

    def _grown(self, cache: Tensor, room: int) -> Tensor:
        rows, groups, _, size = cache.shape
        # Masked slots are multiplied by zero, so they must be finite; the kernels read no slot that was not written.
        grown = (cache.new_empty if self.compiled else cache.new_zeros)(rows, groups, room, size)
        width = min(_width(self.used), cache.shape[2])
        grown[:, :, :width] = cache[:, :, :width]
        return grown

    def move(self, new: Tensor, old: Tensor) -> None:
        """Rows `old` become rows `new`."""
        width = _width(self.used)
        for cache in (*self.keys, *self.values):
            cache[new, :, :width] = cache[old, :, :width]

    def write(
        self, layer: int, k_TGK: Tensor, v_TGK: Tensor, source_S: Tensor, rows_S: Tensor, slots_S: Tensor
    ) -> None:
        """Token source[s] goes to slot slots[s] of row rows[s]."""
        if self.compiled:
            decode.append_(k_TGK, v_TGK, source_S, rows_S, slots_S, self.keys[layer], self.values[layer])
        else:  # advanced indices around a slice put the token axis in front: [S, G, K]
            self.keys[layer][rows_S, :, slots_S] = k_TGK[source_S]
            self.values[layer][rows_S, :, slots_S] = v_TGK[source_S]

    def attend_next(self, layer: int, q_BHK: Tensor, k_BGK: Tensor, v_BGK: Tensor, last_B: Tensor) -> Tensor:
        """[B, H, K]: row b's token goes to its slot last[b] and attends to slots 0 to last[b]."""
        keys, values = self.keys[layer], self.values[layer]
        if self.compiled:
            return decode.attend_next(q_BHK, k_BGK, v_BGK, last_B, keys, values, self.scale)
        rows_B = torch.arange(len(last_B), device=last_B.device)
        self.write(layer, k_BGK, v_BGK, rows_B, rows_B, last_B)
        width = _width(self.used)
        visible_B11L = (torch.arange(width, device=last_B.device) <= last_B[:, None])[:, None, None]
        k_BGLK, v_BGLK = keys[: len(q_BHK), :, :width], values[: len(q_BHK), :, :width]
        # The query heads that share keys stand where SDPA has query positions: nothing is repeated.
        q_BGHK = q_BHK.unflatten(1, (k_BGLK.shape[1], -1))
        return F.scaled_dot_product_attention(q_BGHK, k_BGLK, v_BGLK, attn_mask=visible_B11L).flatten(1, 2)


def _width(tokens: int) -> int:
    """The slots that are read for so many tokens: whole tiles, of few different sums."""
    return -(-tokens // 64) * 64

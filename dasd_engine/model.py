"""The decoder: Qwen3, Qwen2 and Llama families over packs of documents.

One pack is one token axis [T]; `cu_seqlens` says where its documents begin, and attention never crosses them.
Module names are Hugging Face's without the leading "model.". Parallelism, checkpointing and compilation are applied
to the blocks from outside. Shape suffixes: T tokens, D hidden, I inside the MLP, H query heads, G key-value heads,
K head dimension, R rotary frequencies (K/2), V vocabulary.

    model = load_model("Qwen3-4B", dtype=torch.bfloat16, device="cuda")
    hidden_TD = model(tokens_T, positions_T, cu_seqlens, max_seqlen)
    loss = linear_cross_entropy(hidden_TD, model.head_weight, labels_T)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from dasd_engine.attention import Documents, document_attention, documents
from dasd_engine.embedding import Embedding
from dasd_engine.model_config import ModelConfig
from dasd_engine.recompute import kept
from dasd_engine.rope import rotary_table
from dasd_kernels.pointwise import rms_norm, rotate, swiglu


class PackContext:
    """What every block needs to know of the pack, made once a forward. A plain class: FSDP's mixed precision casts
    floating-point tensors to bf16 inside arguments of every other kind, and the rotary table must stay fp32."""

    def __init__(self, cos_T1R: Tensor, sin_T1R: Tensor, documents: Documents):
        self.cos_T1R, self.sin_T1R, self.documents = cos_T1R, sin_T1R, documents


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in fp32 and rounded once."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        heads, groups, bias = config.num_attention_heads, config.num_key_value_heads, config.qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, groups * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, groups * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * config.head_dim, config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def qkv(self, x_TD: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, K], keys and values [T, G, K], normed and rotated, ready to attend."""
        q_THK = self.q_norm(self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim)))
        k_TGK = self.k_norm(self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim)))
        v_TGK = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        return rotate(q_THK, cos_T1R, sin_T1R), rotate(k_TGK, cos_T1R, sin_T1R), v_TGK

    def forward(self, x_TD: Tensor, pack: PackContext) -> Tensor:
        q_THK, k_TGK, v_TGK = self.qkv(x_TD, pack.cos_T1R, pack.sin_T1R)
        out_THK = document_attention(q_THK, k_TGK, v_TGK, pack.documents)
        return self.o_proj(out_THK.flatten(-2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.between = kept

    def forward(self, x_TD: Tensor) -> Tensor:
        with self.between(swiglu, self.gate_proj(x_TD), self.up_proj(x_TD)) as y_TI:
            return self.down_proj(y_TI)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.between = kept  # how products get what lies between them; see dasd_engine.recompute

    def forward(self, x_TD: Tensor, pack: PackContext) -> Tensor:
        with self.between(self.input_layernorm, x_TD) as normed_TD:
            x_TD = x_TD + self.self_attn(normed_TD, pack)
        with self.between(self.post_attention_layernorm, x_TD) as normed_TD:
            return x_TD + self.mlp(normed_TD)


class Decoder(nn.Module):
    """A causal language model up to its last hidden states; the loss multiplies by `head_weight` itself, so that
    no [T, V] logits need exist."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.attention_backend = "auto"  # see dasd_engine.attention.attention
        self.context_group: ProcessGroup | None = None  # ranks that share a pack, each with a part of its tokens
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Not a buffer: it stays fp32 and real when the model is cast, or built on the meta device.
        self._inv_freq_R = config.rope.inv_freq(config.head_dim)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the embedding when tied. Under FSDP read it after the forward, when the root is gathered."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def rotary(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) for these positions, each fp32 [T, 1, head_dim // 2] on their device."""
        self._inv_freq_R = self._inv_freq_R.to(positions_T.device)
        return rotary_table(positions_T, self._inv_freq_R, self.config.rope.amplitude())

    def forward(self, tokens_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Hidden states [T, D] after the final norm, in the parameters' dtype.

        `tokens_T`, `positions_T` int64 [T]; `cu_seqlens` int32 [n+1] from 0 to T, on the same device (documents
        may be empty, so that its length can stay fixed); `max_seqlen` at least the longest document.
        """
        cos_T1R, sin_T1R = self.rotary(positions_T)
        x_TD = self.embed_tokens(tokens_T)
        docs = documents(cu_seqlens, max_seqlen, x_TD, self.attention_backend, self.context_group)
        pack = PackContext(cos_T1R, sin_T1R, docs)
        for layer in self.layers:
            x_TD = layer(x_TD, pack)
        return self.norm(x_TD)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, V] in hidden's dtype: for tests and sampling, never for training."""
        return F.linear(hidden_TD, self.head_weight)

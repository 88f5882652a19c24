"""Attention inside documents: every backend that can run here against a dense float64 reference."""

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from dasd_engine.attention import _VARLEN_OPTIONS, Documents, attention, document_attention
from dasd_engine.errors import InputError

NO_CUDA = not torch.cuda.is_available()


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float | None = None) -> Tensor:
    """Dense softmax attention in float64 under one mask for causality and documents."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    visible = (document[:, None] == document) & torch.ones(len(document), len(document)).tril().bool()
    q, k, v = (x.detach().cpu().double().requires_grad_(x.requires_grad) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(groups, 1)) * (scale or q.shape[-1] ** -0.5)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v.repeat_interleave(groups, 1))


def inputs(tokens: int, heads: int, groups: int, head_dim: int, **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(tokens, n, head_dim, generator=generator).to(**options) for n in (heads, groups, groups)]


def offsets(lengths: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) > 0),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
)
def test_documents_of_any_length_attend_to_themselves_causally(lengths: list[int], heads: tuple[int, int]) -> None:
    q, k, v = inputs(sum(lengths), *heads, 8)
    out = attention(q, k, v, offsets(lengths), max(lengths))
    torch.testing.assert_close(out.double(), reference(q, k, v, lengths), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_gradients(scale: float | None) -> None:
    lengths = [7, 1, 0, 23, 4]
    ours = [x.requires_grad_() for x in inputs(35, 6, 2, 16)]
    exact = [x.detach().double().requires_grad_() for x in ours]
    weight = torch.randn(35, 6, 16, generator=torch.Generator().manual_seed(1))
    (attention(*ours, offsets(lengths), 23, scale=scale) * weight).sum().backward()
    document = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    visible = (document[:, None] == document) & torch.ones(35, 35).tril().bool()
    q, k, v = exact[0], exact[1].repeat_interleave(3, 1), exact[2].repeat_interleave(3, 1)
    weights = (torch.einsum("ihd,jhd->hij", q, k) * (scale or 0.25)).masked_fill(~visible, -torch.inf).softmax(-1)
    (torch.einsum("hij,jhd->ihd", weights, v) * weight).sum().backward()
    for mine, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), expected.grad, atol=1e-5, rtol=1e-5)


def test_a_long_document_never_stores_its_square() -> None:
    length = 4096
    q, k, v = (x.requires_grad_() for x in inputs(length, 1, 1, 8))
    with torch.profiler.profile(profile_memory=True) as profile:
        attention(q, k, v, offsets([length]), length).sum().backward()
    largest = max(abs(event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < largest < length * length  # bytes: a quarter of the square in fp32


@pytest.mark.skipif(NO_CUDA, reason="varlen_attn and flash-attn run on CUDA only")
@pytest.mark.parametrize("backend", ["varlen", "flash", "sdpa"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_all_backends_give_the_same(backend: str, heads: tuple[int, int]) -> None:
    if backend == "flash":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    lengths = [100, 1, 0, 300, 111]
    exact = [x.requires_grad_() for x in inputs(512, *heads, 64, dtype=torch.bfloat16, device="cpu")]
    on_gpu = [x.detach().cuda().requires_grad_() for x in exact]
    out = attention(*on_gpu, offsets(lengths, "cuda"), 300, backend=backend)
    plain = attention(*exact, offsets(lengths), 300)
    expected = reference(*exact, lengths)
    # Twice the error of the same bf16 inputs through SDPA on the CPU.
    assert (out.cpu() - expected).abs().max() <= 2 * (plain - expected).abs().max()
    out.float().square().sum().backward()
    plain.float().square().sum().backward()
    for theirs, mine in zip(on_gpu, exact, strict=True):
        torch.testing.assert_close(theirs.grad.cpu().float(), mine.grad.float(), atol=0.1, rtol=0.05)


def test_varlen_attn_takes_the_call_that_is_made() -> None:
    """On any machine: the installed signature, the operator's fake kernels forward and backward, and causality, which
    torch's versions spell in two ways."""
    assert _VARLEN_OPTIONS.get("window_size", (-1, 0)) == (-1, 0) and _VARLEN_OPTIONS.get("is_causal", True) is True
    assert "window_size" in _VARLEN_OPTIONS or "is_causal" in _VARLEN_OPTIONS
    q, k, v = (x.requires_grad_() for x in inputs(12, 4, 2, 16, dtype=torch.bfloat16, device="meta"))
    cu_seqlens = offsets([5, 7], "meta")
    inspect.signature(varlen_attn).bind(q, k, v, cu_seqlens, cu_seqlens, 7, 7, scale=None, **_VARLEN_OPTIONS)
    out = document_attention(q, k, v, Documents(cu_seqlens, 7, "varlen"), scale=0.5)
    assert out.shape == (12, 4, 16) and out.dtype == torch.bfloat16
    out.sum().backward()
    assert k.grad is not None and k.grad.shape == k.shape


def test_unusable_backends_are_named() -> None:
    q, k, v = inputs(4, 1, 1, 8)
    with pytest.raises(InputError, match="'eager' is not one of auto, varlen, flash, sdpa"):
        attention(q, k, v, offsets([4]), 4, backend="eager")
    for backend in ("varlen", "flash"):
        with pytest.raises(InputError, match=f"'{backend}' needs CUDA and fp16 or bf16, not cpu torch.float32"):
            attention(q, k, v, offsets([4]), 4, backend=backend)


@pytest.mark.parametrize("bounds", [[0, 3], [1, 4], [0, 5], [0, 3, 2, 4], [0]])
def test_offsets_that_do_not_cover_the_pack_are_refused(bounds: list[int]) -> None:
    q, k, v = inputs(4, 1, 1, 8)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the pack's 4 tokens"):
        attention(q, k, v, torch.tensor(bounds, dtype=torch.int32), 4)

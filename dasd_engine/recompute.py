"""What a block keeps for its backward pass, and what it computes again there."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def kept(function: Callable[..., Tensor], *inputs: Tensor) -> Iterator[Tensor]:
    """function(*inputs), for products that keep it."""
    yield function(*inputs)


@contextmanager
def made_again(function: Callable[..., Tensor], *inputs: Tensor) -> Iterator[Tensor]:
    """function(*inputs), for products inside the context, whose backward makes it again instead of having kept it. For
    functions that are cheap, and keep their inputs anyway: norms and SwiGLU are between the products of a block."""
    y = function(*inputs)
    address, shape = y.data_ptr(), y.shape  # y itself would be held by what it is asked of
    inputs = tuple(x.detach() for x in inputs)

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.data_ptr() == address and saved.shape == shape else saved

    def unpack(saved: Tensor | None) -> Tensor:
        if saved is not None:
            return saved
        with torch.no_grad():
            return function(*inputs)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield y


def checkpoint_activations(block: Any, mode: str) -> None:
    """Recompute parts of `block` in the backward pass: "selective" norms and SwiGLU, "full" all of it."""
    if mode == "selective":
        block.between = block.mlp.between = made_again
    elif mode == "full":
        from torch.utils.checkpoint import checkpoint

        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

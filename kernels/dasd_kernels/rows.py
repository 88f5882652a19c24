"""The rows of a matrix that carry a label, gathered for a loss, and their gradients scattered back.

    batch = assemble_pack(..., device="cuda")
    rows = gather_rows(hidden, batch.valid)
    loss = linear_cross_entropy(rows, weight, batch.labels[batch.valid], reduction="sum")

How many rows are ignored is known on the device alone, and to ask would be to wait: on CUDA `linear_cross_entropy`
makes its two gradient products over all of them. A batch knows, so that only rows with a label are paid for; a CPU
skips the others by itself. One kernel each way (csrc/packing/rows.cu) copies 16 bytes a thread where rows allow it.
"""

from __future__ import annotations

from typing import Any

import torch

from dasd_kernels.packing import _cuda_module

__all__ = ["gather_rows"]


def gather_rows(rows: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """rows[valid], differentiable: the gradient is scattered back, with zeros in the other rows.

    rows   [T, D] of any dtype
    valid  int64 [n], strictly ascending, 0..T - 1, on the device of `rows` (`PackedBatch.valid`); not checked on CUDA,
           where that would wait for the device
    """
    if rows.ndim != 2 or valid.ndim != 1 or valid.dtype != torch.int64 or rows.device != valid.device:
        raise ValueError(
            f"gather_rows takes rows [T, D] and valid int64 [n] on one device, not {list(rows.shape)} on {rows.device} "
            f"and {valid.dtype} {list(valid.shape)} on {valid.device}"
        )
    return _GatherRows.apply(rows, valid)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(valid)
        ctx.count = len(rows)
        return _gather(rows, valid)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (valid,) = ctx.saved_tensors
        return _scatter(grad, valid, ctx.count), None


def _gather(rows: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    if not _by_kernel(rows):
        return rows.index_select(0, valid)
    rows, valid, out = rows.contiguous(), valid.contiguous(), rows.new_empty(len(valid), rows.shape[1])
    _launch("gather_rows", rows, valid, (len(valid),), out)
    return out


def _scatter(grad: torch.Tensor, valid: torch.Tensor, count: int) -> torch.Tensor:
    if not _by_kernel(grad):
        return grad.new_zeros(count, grad.shape[1]).index_copy_(0, valid, grad)
    grad, valid, out = grad.contiguous(), valid.contiguous(), grad.new_empty(count, grad.shape[1])
    _launch("scatter_rows", grad, valid, (len(valid), count), out)
    return out


def _by_kernel(rows: torch.Tensor) -> bool:
    """The kernels copy words of 4 bytes at least."""
    return rows.is_cuda and rows.shape[1] * rows.element_size() % 4 == 0 and _cuda_module() is not None


def _launch(name: str, source: torch.Tensor, valid: torch.Tensor, counts: tuple[int, ...], out: torch.Tensor) -> None:
    with torch.cuda.device(out.device):
        stream = torch.cuda.current_stream(out.device)
        row_bytes = out.shape[1] * out.element_size()
        launch = getattr(_cuda_module(), name)
        addresses = source.data_ptr(), valid.data_ptr()
        launch(stream.device_index, *addresses, *counts, row_bytes, out.data_ptr(), stream.cuda_stream)

"""gather_rows: indexing and its gradient; what the CUDA kernels do to rows of any size, in loops on the CPU."""

import numpy as np
import pytest
import torch

from dasd_kernels import _C, gather_rows


def test_same_as_indexing_with_its_gradient():
    torch.manual_seed(0)
    rows, valid = torch.randn(9, 6, dtype=torch.float64, requires_grad=True), torch.tensor([1, 2, 5, 8])
    weight = torch.randn(4, 6, dtype=torch.float64)
    gathered = gather_rows(rows, valid)
    assert torch.equal(gathered, rows[valid])
    (ours,) = torch.autograd.grad((gathered * weight).sum(), rows)
    (torchs,) = torch.autograd.grad((rows[valid] * weight).sum(), rows)
    assert torch.equal(ours, torchs) and not ours[0].any()


def test_no_row():
    rows = torch.randn(3, 4, requires_grad=True)
    gather_rows(rows, torch.empty(0, dtype=torch.int64)).sum().backward()
    assert rows.grad is not None and not rows.grad.any()


@pytest.mark.parametrize("width", [1, 3, 4, 8, 640])  # multiples of 4 words go by 16 bytes
@pytest.mark.parametrize("valid", [[], [0], [6], [1, 2, 5], [0, 1, 2, 3, 4, 5, 6]])
def test_the_kernels_write_the_same(width, valid):
    rows = np.random.default_rng(0).integers(0, 2**32, size=(7, width), dtype=np.uint32)
    positions = np.array(valid, dtype=np.int64)
    gathered = np.full((len(valid), width), 7, dtype=np.uint32)
    _C.copy_rows(rows, positions, gathered, scatter=False)
    np.testing.assert_array_equal(gathered, rows[positions])
    back = np.full((7, width), 7, dtype=np.uint32)
    _C.copy_rows(gathered, positions, back, scatter=True)
    expected = np.zeros_like(rows)
    expected[positions] = rows[positions]
    np.testing.assert_array_equal(back, expected)


@pytest.mark.parametrize(
    "rows, valid",
    [(torch.zeros(3), torch.zeros(1, dtype=torch.int64)), (torch.zeros(3, 2), torch.zeros(1, dtype=torch.int32)),
     (torch.zeros(3, 2), torch.zeros(1, 1, dtype=torch.int64))],
)  # fmt: skip
def test_errors_name_the_shapes(rows, valid):
    with pytest.raises(ValueError, match=r"gather_rows takes rows \[T, D\] and valid int64 \[n\]"):
        gather_rows(rows, valid)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype, width", [(torch.bfloat16, 2560), (torch.bfloat16, 6), (torch.float32, 5)])
def test_on_a_gpu(dtype, width):
    rows = torch.randn(300, width, device="cuda", dtype=dtype, requires_grad=True)
    valid = torch.arange(0, 300, 3, device="cuda")
    gathered = gather_rows(rows, valid)
    assert torch.equal(gathered, rows[valid])
    gathered.sum().backward()
    assert torch.equal(rows.grad[valid], torch.ones_like(gathered)) and rows.grad[1::3].abs().sum() == 0

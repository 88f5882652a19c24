"""fp32 masters in two halves: nothing is lost."""

import torch

from dasd_kernels import masters


def test_halves_are_the_whole() -> None:
    """Every lower half, under exponents from the smallest to the largest, both signs."""
    low = torch.arange(1 << 16, dtype=torch.int32)
    for high in (0x0000, 0x0001, 0x3F80, 0x3F81, 0x7F7E, -0x8000, -0x4080, -0x0082):
        x = ((torch.tensor(high, dtype=torch.int32) << 16) | low).view(torch.float32)
        near, rest = masters.split(x)
        assert near.dtype == torch.bfloat16 and rest.dtype == torch.int16
        assert torch.equal(masters.join(near, rest).view(torch.int32), x.view(torch.int32))
        ties = low == 0x8000
        assert torch.equal(near[~ties], x[~ties].bfloat16())
        assert (near[ties].double().abs() > x[ties].double().abs()).all()

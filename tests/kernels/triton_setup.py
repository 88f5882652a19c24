"""What triton_cases.py and triton_kl_cases.py share: the interpreter made right, strict and faster; inputs; guards.

Triton 3.7's interpreter truncates fp32 to bf16 where devices round to nearest: its conversion is replaced here. It
reads and writes any address: here every load and store of every interpreted kernel must fall, with all its elements,
into one of the tensors that the launch was given. And it patches triton.language anew at every call of a function,
a fifth of the time: here once a launch.
"""

import os
from types import SimpleNamespace

import torch
import triton.language as tl

from dasd_kernels import triton_ce
from dasd_kernels.chunked import Row

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def extents(arguments):
    """Begin and end in bytes of the tensors among a launch's arguments."""
    tensors = [getattr(a, "base", a) for a in arguments]
    for t in tensors:
        if isinstance(t, torch.Tensor) and t.numel():
            last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            yield t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


if INTERPRETED:
    from triton.runtime import interpreter

    memory, patch_any, convert_any = interpreter._interpreter, interpreter._patch_lang, interpreter._convert_float
    to_host = interpreter.GridExecutor._init_args_hst
    allowed: list[tuple[int, int]] = []
    patched: set[str] = set()

    def convert_float(data, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype("uint32") << 16
        return convert_any(data, source, target, rounding)

    def note_extents(self, arguments, named):
        arguments, named = to_host(self, arguments, named)
        allowed[:] = extents([*arguments, *named.values()])
        patched.clear()
        return arguments, named

    def patch_once(function):
        languages = {name for name, value in function.__globals__.items() if value is tl or value is tl.core}
        if languages <= patched:
            return None
        patched.update(languages)
        return patch_any(function)

    def check(kind, pointers, mask, size):
        asked = pointers[mask]
        if asked.size:
            begin, end = int(asked.min()), int(asked.max()) + size
            if not any(b <= begin and end <= e for b, e in allowed):
                raise IndexError(f"a {kind} of bytes {begin} to {end} leaves the tensors of the launch")

    def load(pointers, mask, other, dtype):
        check("load", pointers, mask, dtype.itemsize)
        return memory.load(pointers, mask, other, dtype)

    def store(pointers, value, mask):
        check("store", pointers, mask, value.itemsize)
        return memory.store(pointers, value, mask)

    interpreter._convert_float = convert_float
    interpreter._patch_lang = patch_once
    interpreter.GridExecutor._init_args_hst = note_extents
    kept = {name: getattr(memory, name) for name in dir(memory) if not name.startswith("__")}
    interpreter._interpreter = SimpleNamespace(**{**kept, "load": load, "store": store})


def make(n, d, v, dtype=torch.float32, *, ignored=0.0, scale=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g).to(dtype)
    weight = (torch.randn(v, d, generator=g) * scale / d**0.5).to(dtype)
    labels = torch.randint(0, v, (n,), generator=g)
    labels[torch.rand(n, generator=g) < ignored] = -100
    return hidden.to(DEVICE), weight.to(DEVICE), labels.to(DEVICE)


def run(hidden, weight, labels, *, bias=None, temperature=1.0, workspace=1 << 20, coefficient=None,
        needs=(False, False, False), entropy=False, rank=False, ignore_index=-100, **loss):  # fmt: skip
    per_token = temperature if isinstance(temperature, torch.Tensor) else None
    row = Row(loss.get("softcap"), 1.0 if per_token is not None else temperature, loss.get("label_smoothing", 0.0),
              loss.get("z_loss", 0.0))  # fmt: skip
    return triton_ce.run(hidden, weight, labels, bias, per_token, row, ignore_index, workspace,
                         coefficient=coefficient, needs=needs, entropy=entropy, rank=rank)  # fmt: skip


def error(a, b):
    return (a.double() - b).norm().item() / max(b.norm().item(), 1e-30)


def marked(tensor):
    return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)


class Guarded:
    """Tensors between stretches of NaN (or a marker) that reads must not reach and writes must not change."""

    def __init__(self):
        self.kept = []

    def __call__(self, tensor):
        pad = 4096
        memory = marked(tensor.new_empty(tensor.numel() + 2 * pad))
        inner = memory[pad : pad + tensor.numel()].view(tensor.shape)
        inner.copy_(tensor)
        self.kept.append((memory, pad))
        return inner

    def check(self):
        for memory, pad in self.kept:
            edge = torch.cat([memory[:pad], memory[-pad:]])
            assert (edge.isnan() if edge.is_floating_point() else edge == 77).all(), "a write beyond the end"

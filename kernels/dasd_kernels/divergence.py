"""Kullback-Leibler divergences of a teacher and a student over the whole vocabulary, without their logits.

    kl = kl_divergence(teacher_hidden, teacher_head, student_hidden, student_head, labels=labels)
    kl.forward, kl.reverse                                       # [N] fp32, nats; not differentiable

2N(D_t + D_s)V FLOPs. GPUs take triton_kl's kernel; elsewhere plain torch computes chunks of tokens whose logits, and
their difference, fit the workspace: three [C, V] buffers in fp32.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dasd_kernels import chunked, reference
from dasd_kernels.dispatch import backend, check_inputs, on_triton, spread, take, triton_ce
from dasd_kernels.reference import Divergences

if triton_ce is not None:
    from dasd_kernels import triton_kl

WORKSPACE = 64 << 20


def kl_divergence(
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    student_hidden: Tensor,
    student_weight: Tensor,
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    teacher_bias: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_softcap: float | None = None,
    student_softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    workspace_bytes: int | None = None,
) -> Divergences:
    """Per token, the forward KL(p_T, p_S) = sum p_T log(p_T / p_S) and the reverse KL(p_S, p_T), in nats and fp32.

    teacher_hidden [N, Dt], teacher_weight [V, Dt], student_hidden [N, Ds], student_weight [V, Ds], any strides; the
    widths may differ, and a model's logits are softcap(hidden · weightᵀ + bias) ÷ temperature with the temperature,
    a float or [N], of both. No factor temperature² is applied. Logits must be finite.

    Token ids must mean the same in both. Heads of different V are an error: vocab_size, the number of entries that
    both have, cuts what lies beyond (padding) from both, as if of probability zero.
    labels [N] int64, optional: rows labelled `ignore_index` cost nothing and hold 0; other labels change nothing.
    workspace_bytes bounds what is held besides the inputs.
    """
    n = len(student_hidden)
    if len(teacher_hidden) != n:
        raise ValueError(f"teacher_hidden has {len(teacher_hidden)} tokens, student_hidden {n}: they must be the same")
    sizes = len(teacher_weight), len(student_weight)
    if vocab_size is None and sizes[0] != sizes[1]:
        raise ValueError(
            f"the teacher's head has {sizes[0]} rows, the student's {sizes[1]}: pass vocab_size, the number of entries "
            f"that both vocabularies share (at most {min(sizes)})"
        )
    if vocab_size is not None and not 1 <= vocab_size <= min(sizes):
        raise ValueError(f"vocab_size = {vocab_size} is not between 1 and {min(sizes)}, the smaller head's rows")
    every = torch.zeros(n, dtype=torch.int64, device=student_hidden.device) if labels is None else labels
    teacher = teacher_hidden, teacher_weight[:vocab_size], None if teacher_bias is None else teacher_bias[:vocab_size]
    student = student_hidden, student_weight[:vocab_size], None if student_bias is None else student_bias[:vocab_size]
    for who, (hidden, weight, bias) in (("teacher", teacher), ("student", student)):
        try:
            check_inputs(hidden, weight, every, bias, None, temperature)
        except ValueError as wrong:
            raise ValueError(f"{who}: {wrong}") from None
    per_token = temperature if isinstance(temperature, Tensor) else None
    if per_token is not None and per_token.device.type == "cpu" and not bool((per_token > 0).all()):
        raise ValueError(f"temperature must be positive; its smallest entry is {float(per_token.min())}")
    with torch.no_grad():
        if backend() == "reference":
            return reference.kl_divergence(
                teacher_hidden, teacher_weight, student_hidden, student_weight, labels=labels,
                ignore_index=ignore_index, vocab_size=vocab_size, teacher_bias=teacher_bias, student_bias=student_bias,
                teacher_softcap=teacher_softcap, student_softcap=student_softcap, temperature=temperature,
            )  # fmt: skip
        found = kl(
            *teacher, teacher_softcap or 0.0, *student, student_softcap or 0.0, every,
            ignore_index if labels is not None else -1, per_token, 1.0 if per_token is not None else float(temperature),
            WORKSPACE if workspace_bytes is None else workspace_bytes,
        )  # fmt: skip
    return Divergences(*found)


@torch.library.custom_op("dasd_kernels::kl_divergence", mutates_args=())
def kl(
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    teacher_softcap: float,
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    student_softcap: float,
    labels: Tensor,
    ignore_index: int,
    temperature: Tensor | None,
    temperature_all: float,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    inverse = torch.full(labels.shape, 1 / temperature_all, device=labels.device)
    if temperature is not None:
        inverse = 1 / temperature
    operands = (teacher_hidden, teacher_weight, student_hidden, student_weight)
    if on_triton(student_hidden) and triton_kl.supports(*operands):
        return triton_kl.run(
            (teacher_hidden, teacher_weight, teacher_bias, teacher_softcap),
            (student_hidden, student_weight, student_bias, student_softcap),
            labels, inverse.float(), ignore_index, workspace_bytes,
        )  # fmt: skip
    ignored = labels == ignore_index
    rows = (~ignored).nonzero()[:, 0] if labels.device.type == "cpu" and bool(ignored.any()) else None
    some = take(inverse, rows)
    assert some is not None

    def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> Callable[..., None]:
        x = take(hidden, rows)
        assert x is not None

        def fill(part: slice, z: Tensor) -> None:
            chunked.multiply(x[part], weight, z, transpose=True)
            chunked.finish_logits(z, bias, softcap, some[part].to(z.dtype), None)
            z.sub_(z.amax(1, keepdim=True))

        return fill

    acc = torch.float64 if any(t.dtype == torch.float64 for t in operands) else torch.float32
    found = by_chunks(
        logits_of(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap),
        logits_of(student_hidden, student_weight, student_bias, student_softcap),
        len(some), len(student_weight), acc, labels.device, workspace_bytes,
    )  # fmt: skip
    forward, reverse = (spread(f, rows, len(labels)).masked_fill(ignored, 0) for f in found)
    return forward, reverse


@kl.register_fake
def _(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, student_hidden, student_weight, *_):
    wide = torch.float64 in (teacher_hidden.dtype, teacher_weight.dtype, student_hidden.dtype, student_weight.dtype)
    row = lambda: student_hidden.new_empty(len(student_hidden), dtype=torch.float64 if wide else torch.float32)  # noqa: E731
    return row(), row()


def by_chunks(
    teacher: Callable[..., None],
    student: Callable[..., None],
    n: int,
    vocab: int,
    acc: torch.dtype,
    device: torch.device,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """`teacher` and `student` fill a buffer with the logits of a part of the rows, less each row's largest."""
    forward, reverse = torch.empty(2, n, dtype=acc, device=device).unbind()
    buffers = 3 if device.type == "cpu" else 4  # products of low precision make a copy there
    size = chunked.chunk_rows(n, vocab, buffers * acc.itemsize, workspace_bytes)
    buffer = torch.empty(3, size, vocab, dtype=acc, device=device)
    for begin in range(0, n, size):
        part = slice(begin, min(begin + size, n))
        t, s, gap = buffer[:, : part.stop - begin]
        teacher(part, t)
        student(part, s)
        torch.sub(t, s, out=gap)
        total, total_s = t.exp_().sum(1), s.exp_().sum(1)
        between = (total_s / total).log_()  # near 0 where the models agree, unlike either logarithm
        forward[part] = t.mul_(gap).sum(1) / total + between
        reverse[part] = -s.mul_(gap).sum(1) / total_s - between
    return forward.clamp_(min=0), reverse.clamp_(min=0)  # what rounding leaves below zero

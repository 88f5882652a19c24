"""What the kernels compute, in a few plain torch lines each and in the precision of their inputs.

These hold the full [N, V] logits: they are the definition that the kernels are tested against (in float64) and a
slow way out (`DASD_KERNELS=reference`), not something to train with. Every function is differentiable by autograd
and takes the arguments of its public namesake, except those that concern the kernels' memory.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TokenScores(NamedTuple):
    """Per token, [N]. Positions whose label is ignored hold 0 (rank: -1)."""

    logprob: Tensor  # log p(label), nats
    lse: Tensor  # log of the sum of exponentials of the logits
    entropy: Tensor | None  # nats
    rank: Tensor | None  # int64: how many entries lie strictly above the label's; 0 is the most likely one


class RatioScores(NamedTuple):
    """Teacher and student on the same tokens; log_ratio [N] = log p_teacher(label) - log p_student(label)."""

    teacher: TokenScores
    student: TokenScores
    log_ratio: Tensor


class Divergences(NamedTuple):
    """Teacher p and student q on the same tokens, per token [N], nats; ignored positions hold 0."""

    forward: Tensor  # KL(p, q) = sum p log(p / q)
    reverse: Tensor  # KL(q, p) = sum q log(q / p)


class SegmentScores(NamedTuple):
    """Per segment, [S]. An empty segment has count 0, sum 0 and mean and geometric mean NaN."""

    count: Tensor  # type: ignore[assignment]  # int64, tokens
    sum: Tensor  # of the log-probabilities
    mean: Tensor
    geometric_mean: Tensor  # exp(mean): the segment's probability a token


def logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, temperature: float | Tensor
) -> Tensor:
    """softcap(hidden · weightᵀ + bias) ÷ temperature, [N, V]."""
    z = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    z = softcap * torch.tanh(z / softcap) if softcap else z
    return z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None,
    token_weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean", z_loss: float = 0.0,
    label_smoothing: float = 0.0, softcap: float | None = None, temperature: float | Tensor = 1.0,
) -> Tensor:  # fmt: skip
    z = logits(hidden, weight, bias, softcap, temperature)
    valid = labels != ignore_index
    lse = z.logsumexp(1)
    target = z.gather(1, labels.where(valid, 0)[:, None])[:, 0]
    loss = lse - (1 - label_smoothing) * target - label_smoothing * z.mean(1) + z_loss * lse.square()
    row_weight = valid.to(z.dtype) if token_weight is None else token_weight.to(z.dtype) * valid
    loss = (loss * row_weight).where(valid, 0)
    if reduction == "none":
        return loss
    total = row_weight.sum()
    return loss.sum() if reduction == "sum" else loss.sum() / total.where(total != 0, 1)


def token_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, ignore_index: int = -100,
    softcap: float | None = None, temperature: float | Tensor = 1.0, entropy: bool = False,
    rank: bool = False,
) -> TokenScores:  # fmt: skip
    z = logits(hidden, weight, bias, softcap, temperature)
    valid = labels != ignore_index
    target = z.gather(1, labels.where(valid, 0)[:, None])
    logprob, lse = z.log_softmax(1), z.logsumexp(1)
    entropies = (-(logprob.exp() * logprob).sum(1)).where(valid, 0) if entropy else None
    ranks = (z > target).sum(1).where(valid, -1) if rank else None
    return TokenScores((target[:, 0] - lse).where(valid, 0), lse.where(valid, 0), entropies, ranks)


def log_ratio(
    teacher_hidden: Tensor, teacher_weight: Tensor, student_hidden: Tensor, student_weight: Tensor,
    labels: Tensor, *, teacher_bias: Tensor | None = None, student_bias: Tensor | None = None,
    ignore_index: int = -100, teacher_softcap: float | None = None, student_softcap: float | None = None,
    temperature: float | Tensor = 1.0, entropy: bool = False, rank: bool = False,
) -> RatioScores:  # fmt: skip
    size = min(len(teacher_weight), len(student_weight))  # padding rows of the larger head: probability zero

    def score(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> TokenScores:
        return token_logprobs(
            hidden, weight[:size], labels, bias=None if bias is None else bias[:size],
            ignore_index=ignore_index, softcap=softcap, temperature=temperature, entropy=entropy, rank=rank,
        )  # fmt: skip

    teacher = score(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap)
    student = score(student_hidden, student_weight, student_bias, student_softcap)
    return RatioScores(teacher, student, teacher.logprob - student.logprob)


def kl_divergence(
    teacher_hidden: Tensor, teacher_weight: Tensor, student_hidden: Tensor, student_weight: Tensor, *,
    labels: Tensor | None = None, ignore_index: int = -100, vocab_size: int | None = None,
    teacher_bias: Tensor | None = None, student_bias: Tensor | None = None, teacher_softcap: float | None = None,
    student_softcap: float | None = None, temperature: float | Tensor = 1.0,
) -> Divergences:  # fmt: skip
    z_t = logits(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, temperature)
    z_s = logits(student_hidden, student_weight, student_bias, student_softcap, temperature)
    log_p, log_q = (z[:, :vocab_size].log_softmax(1) for z in (z_t, z_s))
    gap = log_p - log_q
    forward, reverse = (log_p.exp() * gap).sum(1), -(log_q.exp() * gap).sum(1)
    if labels is not None:
        forward, reverse = (kl.where(labels != ignore_index, 0) for kl in (forward, reverse))
    return Divergences(forward, reverse)


def segment_scores(logprob: Tensor, offsets: Tensor) -> SegmentScores:
    parts = [logprob[b:e] for b, e in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)]
    count = torch.tensor([len(p) for p in parts], dtype=torch.int64)
    total = torch.stack([p.sum() for p in parts]) if parts else logprob.new_zeros(0)
    mean = total / count
    return SegmentScores(count, total, mean, mean.exp())

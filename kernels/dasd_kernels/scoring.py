"""Log-probabilities of given tokens under one model, or under a teacher and a student, without their logits.

    scores = token_logprobs(hidden, model.lm_head.weight, labels, entropy=True, rank=True)
    ratio = log_ratio(teacher_hidden, teacher_head, student_hidden, student_head, labels).log_ratio

One product of 2NDV FLOPs a model; nothing here is differentiable.
"""

import torch
from torch import Tensor

from dasd_kernels import reference
from dasd_kernels.chunked import Row
from dasd_kernels.dispatch import backend, check_inputs, compute
from dasd_kernels.reference import RatioScores, TokenScores

SCORE_WORKSPACE = 48 << 20


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    rank: bool = False,
) -> TokenScores:
    """Log-probability of each label, and the log-sum-exp of the logits, in fp32.

    Arguments as linear_cross_entropy's: hidden [N, D], weight [V, D], labels [N] int64, logits
    softcap(hidden · weightᵀ + bias) ÷ temperature. Rows labelled `ignore_index` are skipped and hold 0
    (rank: -1). entropy: also the entropy of the distribution, in nats. rank: also how many entries lie strictly
    above the label's, 0 for the most likely token. Errors as linear_cross_entropy's.
    """
    check_inputs(hidden, weight, labels, bias, None, temperature)
    with torch.no_grad():
        if backend() == "reference":
            return reference.token_logprobs(
                hidden, weight, labels, bias=bias, ignore_index=ignore_index, softcap=softcap,
                temperature=temperature, entropy=entropy, rank=rank,
            )  # fmt: skip
        per_token = temperature if isinstance(temperature, Tensor) else None
        nll, lse, entropies, ranks = token_scores(
            hidden, weight, labels, bias, per_token, ignore_index, softcap or 0.0,
            1.0 if per_token is not None else float(temperature), entropy, rank,
        )  # fmt: skip
    return TokenScores(-nll, lse, entropies if entropy else None, ranks if rank else None)


def log_ratio(
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    *,
    teacher_bias: Tensor | None = None,
    student_bias: Tensor | None = None,
    ignore_index: int = -100,
    teacher_softcap: float | None = None,
    student_softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    rank: bool = False,
) -> RatioScores:
    """Teacher's and student's log-probabilities of the same tokens and their difference, log p_T - log p_S.

    teacher_hidden [N, Dt], teacher_weight [Vt, Dt], student_hidden [N, Ds], student_weight [Vs, Ds], labels
    [N]: the widths may differ; token ids must mean the same in both. Where one head has more rows (padding to
    a round size), the surplus rows have probability zero, and a label among them is an error. The rest as
    token_logprobs.
    """
    size = min(len(teacher_weight), len(student_weight))

    def score(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> TokenScores:
        return token_logprobs(
            hidden, weight[:size], labels, bias=None if bias is None else bias[:size],
            ignore_index=ignore_index, softcap=softcap, temperature=temperature, entropy=entropy, rank=rank,
        )  # fmt: skip

    teacher = score(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap)
    student = score(student_hidden, student_weight, student_bias, student_softcap)
    return RatioScores(teacher, student, teacher.logprob - student.logprob)


@torch.library.custom_op("dasd_kernels::token_scores", mutates_args=())
def token_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    ignore_index: int,
    softcap: float,
    temperature_all: float,
    entropy: bool,
    rank: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = Row(softcap or None, temperature_all)
    r = compute(
        hidden,
        weight,
        labels,
        bias,
        temperature,
        row,
        ignore_index,
        SCORE_WORKSPACE,
        entropy=entropy,
        rank=rank,
    )
    nothing, none = r.lse.new_empty(0), labels.new_empty(0)
    return r.nll, r.lse, nothing if r.entropy is None else r.entropy, none if r.rank is None else r.rank


@token_scores.register_fake
def _(hidden, weight, labels, bias, temperature, ignore_index, softcap, temperature_all, entropy, rank):
    acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    row = lambda wanted=True: hidden.new_empty(labels.shape if wanted else (0,), dtype=acc)  # noqa: E731
    return row(), row(), row(entropy), labels.new_empty(labels.shape if rank else (0,))

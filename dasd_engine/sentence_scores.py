"""Sentence probabilities of a batch of candidates: one packed forward a model, logprobs at the response's tokens only.

    scorer = Scorer([student, distilled])
    for one, (teacher, models, logprobs) in zip(batch, scorer.finish(batch, scorer.launch(batch))): ...

p of a sentence is exp(mean log p) of its tokens (dasd_kernels.segment_scores), the teacher's in float64, the models' in
fp32 from sums in float64.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dasd_engine.align import Segments
from dasd_engine.model import Decoder
from dasd_engine.scorable import Scorable
from dasd_kernels import segment_scores, token_logprobs

DIGITS = 7  # of a probability in the output


class Result(NamedTuple):
    teacher: list[float]  # p_T of each sentence
    models: list[list[float]]  # p under each model
    logprobs: list[float]  # of the response's tokens under the first model


class Scorer:
    """Models on one device that read the same ids: the student, and the distilled one where asked."""

    def __init__(self, models: Sequence[Decoder]):
        self.models = models
        self.device = models[0].embed_tokens.weight.device

    @torch.inference_mode()
    def launch(self, batch: Sequence[Scorable]) -> list[tuple[Tensor, Tensor]]:
        """Each model's (logprobs of the responses' tokens fp32 [R], p of the sentences [S]), computed where the models
        are: on a GPU this returns before they are there."""
        lengths = np.array([len(one.ids) for one in batch])
        starts = np.cumsum(lengths) - lengths
        ids = np.concatenate([one.ids for one in batch]).astype(np.int64)
        positions = np.arange(len(ids)) - np.repeat(starts, lengths)
        cu_seqlens = np.concatenate([starts, [len(ids)]]).astype(np.int32)
        targets = np.concatenate([s + np.arange(*one.response) for s, one in zip(starts, batch, strict=True)])
        sizes = [one.response[1] - one.response[0] for one in batch]
        student = _joined([one.student for one in batch], sizes)
        tokens_T, positions_T, cu, targets_R, picked, offsets = (
            torch.from_numpy(array).to(self.device, non_blocking=True)
            for array in (ids, positions, cu_seqlens, targets, student.picked, student.offsets)
        )
        found = []
        for model in self.models:
            hidden_TD = model(tokens_T, positions_T, cu, int(lengths.max()))
            # The token at t is predicted from the hidden state in front of it; prompts get no logits.
            logprobs_R = token_logprobs(hidden_TD[targets_R - 1], model.head_weight, tokens_T[targets_R]).logprob
            found.append((logprobs_R, segment_scores(logprobs_R[picked], offsets).geometric_mean))
        return found

    def finish(self, batch: Sequence[Scorable], launched: list[tuple[Tensor, Tensor]]) -> list[Result]:
        """The results of a launched batch, on the host, one a candidate."""
        teacher = _joined([one.teacher for one in batch], [len(one.teacher_logprobs) for one in batch])
        logprobs = torch.from_numpy(np.concatenate([one.teacher_logprobs for one in batch])[teacher.picked])
        p_teacher = segment_scores(logprobs, torch.from_numpy(teacher.offsets)).geometric_mean.tolist()
        p_models = [p.tolist() for _, p in launched]
        tokens = launched[0][0].tolist()
        results, sentence, token = [], 0, 0
        for one in batch:
            some = slice(sentence, sentence + len(one.sentences))
            size = one.response[1] - one.response[0]
            results.append(Result(p_teacher[some], [p[some] for p in p_models], tokens[token : token + size]))
            sentence, token = some.stop, token + size
        return results


def _joined(segments: Sequence[Segments], sizes: Sequence[int]) -> Segments:
    """The segments of several candidates over their tokens one after the other, `sizes` of each."""
    bases = np.cumsum([0, *sizes[:-1]])
    picked = [one.picked + base for one, base in zip(segments, bases, strict=True)]
    counts = np.concatenate([one.counts for one in segments])
    return Segments(np.concatenate(picked), np.concatenate([[0], np.cumsum(counts)]))


def score_row(one: Scorable, result: Result, beta: float, with_logprobs: bool = False) -> dict[str, Any]:
    """The row of scores.jsonl; with the student's logprobs where asked. A model that gives no number is an error."""
    head = dict(one.head)
    columns = [[_short(p) for p in column] for column in (result.teacher, *result.models)]
    if any(not np.isfinite(column).all() for column in columns):
        return {**head, "error": "not finite: a model gives no probability; are its weights damaged?"}
    p_teacher, p_student, *p_distilled = columns
    n_teacher, n_student = one.teacher.counts.tolist(), one.student.counts.tolist()
    sentences = zip(one.sentences, p_teacher, p_student, n_teacher, n_student, *p_distilled, strict=True)
    row = {
        **head,
        "teacher_tokens": len(one.teacher_logprobs),
        "student_tokens": one.response[1] - one.response[0],
        "sentences": [[*span, *values] for span, *values in sentences],
        "counts": type_counts(p_teacher, p_student, beta),
    }
    if with_logprobs:
        row["student_logprobs"] = [_short(value) for value in result.logprobs]
    return row


def type_counts(p_teacher: Sequence[float], p_student: Sequence[float], beta: float) -> dict[str, int]:
    """How many sentences are the teacher's (Δ > β), the student's (Δ < −β) and common, Δ = p_T − p_S."""
    delta = np.subtract(p_teacher, p_student)
    teacher, student = int((delta > beta).sum()), int((delta < -beta).sum())
    return {"teacher": teacher, "student": student, "common": len(delta) - teacher - student}


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")

"""What the stages of distill will take: rows, tokens, FLOPs and hours, from what is there and from assumptions.

Stages that are done are counted; the others follow from the recipe, from the mean length of a response and from shares
that are printed with the plan. FLOPs are the model's (see metrics): 2 a weight and token forward, 6 in training, and
attention; hours divide them by the device's data-sheet peak times an assumed utilisation.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dasd_engine.distill_config import TRAINED, DistillRecipe
from dasd_engine.errors import InputError
from dasd_engine.metrics import PEAKS, document_flops, flop_coefficients, peak_flops
from dasd_engine.model_config import ModelConfig, read_config

UTILISATION = {"train": 0.40, "score": 0.50, "generate": 0.10}  # of the peak; decoding is bound by memory
CUT_OFF, CONTINUED = 0.30, 0.85  # published: 50K rollouts, 15K cut off by the cap, 12.7K continuations kept


@dataclass(frozen=True)
class Device:
    name: str
    flops: float  # FLOP/s of all ranks together
    source: str


@dataclass(frozen=True)
class Work:
    """`flops` None: not known, as of a teacher that is served elsewhere. `use`: a key of UTILISATION."""

    rows: float
    tokens: float
    flops: float | None = 0.0
    use: str = ""

    def hours(self, device: Device) -> float | None:
        if self.flops is None:
            return None
        return self.flops / (device.flops * UTILISATION[self.use]) / 3600 if self.use else 0.0


def find_device(name: str | None, tflops: float | None, ranks: int) -> Device:
    """By data-sheet TFLOP/s, by a name of the table, or the one of this machine."""
    if tflops is not None:
        if not tflops > 0:
            raise InputError(f"--device-tflops {tflops:g}: must be above 0")
        return Device(f"{ranks} x {name or 'device'}", tflops * 1e12 * ranks, f"{tflops:g} TFLOP/s as given")
    if name is not None:
        found = next((part for part in PEAKS if part.lower() == name.lower()), None)
        if found is None:
            raise InputError(f"--device {name}: not in the table ({', '.join(PEAKS)}); give --device-tflops instead")
        peak = PEAKS[found]
        return Device(f"{ranks} x {found}", peak * ranks, f"{peak / 1e12:,.0f} TFLOP/s dense bf16, data sheet")
    cuda = torch.cuda.is_available()
    peak = peak_flops(torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32)
    here = torch.cuda.get_device_name() if cuda else "this CPU"
    how = f"{peak / 1e12:,.3g} TFLOP/s, " + ("data sheet" if cuda else "a matrix product timed here")
    return Device(f"{ranks} x {here}", peak * ranks, how)


def forward_flops(config: ModelConfig, rows: float, tokens: float) -> float:
    """Of `rows` responses with so many tokens together, logits of every token included."""
    if not rows:
        return 0.0
    length = np.array([tokens / rows])
    return rows * float(document_flops(config, length, length)[0]) / 3


def estimate(
    recipe: DistillRecipe, manifests: dict[str, dict[str, Any]], questions: int, response_tokens: float
) -> dict[str, Work]:
    """Work of each stage. `manifests`: of the stages that are done; `response_tokens`: assumed mean until sampled."""
    student = read_config(recipe.student)
    teacher = _teacher(recipe)
    sampled = manifests.get("sample", {}).get("counts")
    asked = questions * recipe.sample.candidates * len(recipe.sample.temperatures)
    length = sampled["tokens"] / max(1, sampled["candidates"]) if sampled else response_tokens
    rows = sampled["candidates"] if sampled else asked
    work = {
        "sample": Work(
            rows, rows * length, forward_flops(teacher, rows, rows * length) if teacher else None, "generate"
        ),
        "score": Work(rows, rows * length, forward_flops(student, rows, rows * length), "score"),
    }
    for name in TRAINED[:2]:
        documents, tokens = _prepared(manifests, name, questions, questions * length)
        work[f"select-{name}"] = Work(documents, tokens)
        work |= _trained(recipe, student, name, documents, tokens)
    high = work["select-high"].rows
    begun = min(recipe.mix.questions or high, high)
    written, continued = begun * recipe.mix.cap * length, begun * CUT_OFF * length
    flops = forward_flops(student, begun, written)
    more = forward_flops(teacher, begun * CUT_OFF, continued) if teacher else None
    work["mix"] = Work(begun, written + continued, None if more is None else flops + more, "generate")
    kept = begun * CUT_OFF * CONTINUED
    off_policy, mixed = recipe.mix.ratio
    documents = kept + min(high, kept * off_policy / mixed)
    documents, tokens = _prepared(manifests, "mixed", documents, documents * length)
    work |= _trained(recipe, student, "mixed", documents, tokens)
    return work | _evaluated(recipe, student, length)


def assumptions(device: Device, response_tokens: float | None, mixed: bool, unknown_teacher: bool) -> list[str]:
    """The lines under the plan: what its figures rest on."""
    shares = ", ".join(f"{use} {100 * share:.0f} %" for use, share in UTILISATION.items())
    lines = [f"hours on {device.name}: {device.source}; assumed utilisation: {shares}"]
    if response_tokens is not None:
        lines.append(f"assumed: {response_tokens:,.0f} tokens a response (--response-tokens), no response filtered out")
    if mixed:
        lines.append(f"assumed: {100 * CUT_OFF:.0f} % of the rollouts reach the cap, {100 * CONTINUED:.0f} % of their "
                     "continuations pass the filters (the published shares)")  # fmt: skip
    if unknown_teacher:
        lines.append("the teacher's FLOPs are not known here: it is served elsewhere, or of another family")
    return lines


def _teacher(recipe: DistillRecipe) -> ModelConfig | None:
    path = recipe.teacher.path
    if recipe.teacher.kind == "server" or not (Path(path) / "config.json").is_file():
        return None
    try:
        return read_config(Path(path))
    except InputError:  # vLLM knows more families than the engine
        return None


def _prepared(manifests: dict[str, dict[str, Any]], name: str, rows: float, tokens: float) -> tuple[float, float]:
    counts = manifests.get(f"prepare-{name}", {}).get("counts")
    return (counts["documents"], counts["tokens"]) if counts else (rows, tokens)


def _trained(recipe: DistillRecipe, student: ModelConfig, name: str, rows: float, tokens: float) -> dict[str, Work]:
    c, a, h = flop_coefficients(student)
    epochs, squares = recipe.train[name].epochs, tokens**2 / max(1.0, rows)
    flops = epochs * (c * tokens + a * squares + h * tokens)
    return {f"prepare-{name}": Work(rows, tokens), f"train-{name}": Work(rows, epochs * tokens, flops, "train")}


def _evaluated(recipe: DistillRecipe, student: ModelConfig, length: float) -> dict[str, Work]:
    e = recipe.evaluate
    if not e.problems:
        return {}
    problems = recipe.resolve(e.problems)
    count = 0
    if problems.is_file():
        with problems.open("rb") as file:
            count = sum(1 for line in file if line.strip())
    rows = min(e.limit or count, count) * e.samples
    tokens = rows * min(length, e.max_new_tokens)
    one = Work(rows, tokens, forward_flops(student, rows, tokens), "generate")
    return {f"evaluate-{name}": one for name in ("student", *TRAINED)}

"""What the report shows of a run: read from a directory of train or of distill, however far it has come; or of what
was compared: from a directory of bakeoff, or the file with the ablations' results.

Curves are cut to at most `POINTS` points, each the mean of consecutive steps (the loss with their least and greatest),
so that a run of any length makes a page of the same size.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dasd_engine.bakeoff_plan import duration
from dasd_engine.comparisons import Comparison, of_ablations, of_bakeoff
from dasd_engine.errors import InputError
from dasd_engine.evaluation_report import EvalReport, as_report, levels, percent
from dasd_engine.records import ASKED, MANIFEST, read_json
from dasd_engine.report_text import Samples, Texts, read_samples, read_texts, scoring

POINTS = 600  # of a curve: more than a page is wide
_CURVES = ("lr", "grad_norm", "tokens_per_s", "mfu", "fill", "balance")
_ORDER = ("sample", "score", "select", "prepare", "train", "mix", "evaluate")  # a distillation is known by these
_METRICS, _RESULT = "metrics.jsonl", "result.json"


@dataclass
class Run:
    """All that the page shows of one run. `notes`: what is missing or cut, in words."""

    name: str
    kind: str  # "train", "distill", or "results" of a bake-off or ablations
    facts: dict[str, str] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)  # rows of the stage table
    curves: list[dict[str, Any]] = field(default_factory=list)  # of each stage of training
    lengths: dict[str, np.ndarray] = field(default_factory=dict)  # tokens of each document or response, by group
    deltas: dict[str, Any] = field(default_factory=dict)
    evaluations: list[tuple[str, EvalReport]] = field(default_factory=list)  # with the name of the student
    comparisons: list[Comparison] = field(default_factory=list)
    paste: str = ""  # the bake-off's lines for the recipe
    texts: Texts | None = None
    samples: Samples | None = None
    notes: list[str] = field(default_factory=list)


def read_run(path: Path) -> Run:
    """Raises InputError for what is no run and no results, or in which nothing is there to be shown yet."""
    if path.is_file():
        return _ablations(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; name that of a run of dasd_engine.train or distill")
    if (path / ASKED).exists() and read_json(path / ASKED).get("command") == "bakeoff":
        return _bakeoff(path)
    compared = path / "bakeoff"
    if any(child.name.partition("-")[0] in _ORDER and child.is_dir() for child in path.iterdir()):
        run = _distill(path)
        if (compared / _RESULT).exists():
            _compared(run, compared)
        return run
    if (path / "recipe.json").exists() or (path / _METRICS).exists():
        return _train(path)
    if compared.is_dir():  # made before anything else of the recipe
        return read_run(compared)
    raise InputError(
        f"{path}: holds neither stages of dasd_engine.distill nor {_METRICS} of dasd_engine.train; "
        "name the `out` of a recipe"
    )


# ---------------------------------------------------------------------------------------------- train


def _train(directory: Path) -> Run:
    run = Run(directory.resolve().name, "train")
    _facts(run, directory)
    curves = _curves(directory, run.notes)
    if not curves:
        raise InputError(
            f"{directory}: no step of training is in {_METRICS} yet; start or go on with python -m dasd_engine.train"
        )
    run.curves = curves
    for curve in curves:
        shards = directory / "data" / curve["stage"]
        counts = _json(shards / MANIFEST, run.notes).get("counts", {}) if (shards / MANIFEST).exists() else {}
        done = (directory / "export" / curve["stage"]).is_dir()
        run.stages.append(_row(
            f"train {curve['stage']}", "done" if done else "unfinished", counts.get("documents"),
            counts.get("documents"), curve["tokens"], curve["seconds"],
        ))  # fmt: skip
        _documents(run, f"documents of {curve['stage']}", shards)
    for label, report in _json(directory / "evaluation.json", run.notes).items():
        _evaluation(run, f"{label} training", report)
    run.samples = read_samples([
        (f"{label} training", directory / f"evaluation-{label}.jsonl") for label in ("before", "after")
    ])  # fmt: skip
    return run


def _facts(run: Run, directory: Path) -> None:
    """What ran, of one stage of training."""
    recipe, facts = (_json(directory / name, run.notes) for name in ("recipe.json", "run.json"))
    versions = facts.get("versions", {})
    told = {
        "started": facts.get("started"),
        "student": recipe.get("model", {}).get("path"),
        "seed": recipe.get("seed"),
        "device": facts and f"{facts.get('ranks')} × {facts.get('device')}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "source": facts.get("git"),
    }
    run.facts.update({name: str(value) for name, value in told.items() if value})


def _curves(directory: Path, notes: list[str]) -> list[dict[str, Any]]:
    """One a stage, in order. Without the last line where a crash has cut it off."""
    path, rows = directory / _METRICS, list[dict[str, Any]]()
    if not path.exists():
        return []
    text = path.read_bytes()
    lines = text.split(b"\n")
    if lines.pop():
        notes.append(f"the last line of {path.name} is cut off and left out: the run was killed, or is still writing")
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["stage"], rows[-1]["loss"]  # noqa: B018 (that they are there)
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}:{number}: is no step of training; restore the file, or train again") from None
    stages = dict.fromkeys(row["stage"] for row in rows)
    return [_curve(stage, [row for row in rows if row["stage"] == stage]) for stage in stages]


def _curve(stage: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    loss = _column(rows, "loss")
    edges = np.unique(np.linspace(0, len(rows), min(len(rows), POINTS) + 1).astype(int))[:-1]
    size = np.diff([*edges, len(rows)])
    points = {name: _round(np.add.reduceat(_column(rows, name), edges) / size) for name in ("loss", *_CURVES)}
    return {
        "stage": stage,
        "steps": len(rows),
        "each": int(size.max()),  # steps of a point
        "tokens": int(_column(rows, "tokens").sum()),
        "seconds": float(_column(rows, "step_s").sum()),
        "step": [int(edge) + 1 for edge in edges],
        "least": _round(np.minimum.reduceat(loss, edges)),
        "greatest": _round(np.maximum.reduceat(loss, edges)),
        **points,
    }


def _column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([row.get(name) if row.get(name) is not None else np.nan for row in rows], dtype=np.float64)


def _round(values: np.ndarray) -> list[float | None]:
    """Four digits; what is not finite has no place in JSON."""
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values]


# ---------------------------------------------------------------------------------------------- distill


def _distill(directory: Path) -> Run:
    run = Run(directory.resolve().name, "distill")
    names = [d.name for d in directory.iterdir() if d.is_dir() and d.name.partition("-")[0] in _ORDER]
    manifests = {name: _json(directory / name / MANIFEST, run.notes) for name in sorted(names, key=_place)}
    for name, manifest in manifests.items():
        _stage(run, directory, name, manifest)
    if not any(manifests.values()) and not run.curves:
        raise InputError(f"{directory}: no stage has ended yet; go on with python -m dasd_engine.distill")
    if unfinished := [name for name, manifest in manifests.items() if not manifest]:
        run.notes.append(f"not finished: {', '.join(unfinished)}")
    if scoring(manifests):
        run.texts = read_texts(directory, manifests)
        run.notes += run.texts.notes
        run.facts = {"teacher": run.texts.teacher, **run.facts}
        run.lengths = {**run.texts.lengths, **run.lengths}
    else:
        run.notes.append("no scores: no sentences to be shown")
    run.samples = read_samples([
        (_label(name), directory / name / "responses.jsonl") for name in manifests if name.startswith("evaluate-")
    ])  # fmt: skip
    return run


def _place(name: str) -> tuple[int, int]:
    """As a distillation runs: the chain of stages, then what was measured."""
    kind, _, part = name.partition("-")
    parts = ("", "student", "low", "high", "mixed")
    at = _ORDER.index(kind) if kind != "mix" else _ORDER.index("sample")
    late = 10 * (part == "mixed" or kind == "mix") * (kind != "evaluate")
    return (100 if kind == "evaluate" else at + late, parts.index(part) if part in parts else len(parts))


def _stage(run: Run, directory: Path, name: str, manifest: dict[str, Any]) -> None:
    """A row of the table, and what this stage adds to the page."""
    kind, counts, path = name.partition("-")[0], manifest.get("counts", {}), directory / name
    record = _json(directory / "stages" / f"{name}.json", run.notes)
    columns = {
        "sample": ("questions", "candidates", "tokens"),
        "score": ("candidates", "scored", "student_tokens"),
        "select": ("candidates", "selected", "student_tokens"),
        "prepare": ("rows", "documents", "tokens"),
        "train": ("documents", "documents", "tokens"),
        "mix": ("questions", "rows", "tokens"),
        "evaluate": ("problems", "responses", "tokens"),
    }[kind]
    if kind == "mix" and counts:
        made = counts["prefix_tokens"] + counts["continuation_tokens"]
        counts = {**counts, "rows": counts["mixed"] + counts["off_policy"], "tokens": made}
    seconds = record.get("seconds") or manifest.get("wall_seconds")
    rows_in, rows_out, tokens = (counts.get(column) for column in columns)
    run.stages.append(_row(name, "done" if manifest else "unfinished", rows_in, rows_out, tokens, seconds))
    if kind == "train":
        if not run.facts:
            _facts(run, path)
        run.curves += _curves(path, run.notes)
    elif kind == "prepare" and manifest:
        _documents(run, f"documents of {name.partition('-')[2]}", path)
    elif kind == "select" and (path / "report.json").exists():
        run.deltas[name.partition("-")[2]] = _deltas(read_json(path / "report.json"))
    elif kind == "evaluate" and manifest.get("reports"):
        for report in manifest["reports"]:
            _evaluation(run, _label(name), report)


def _label(name: str) -> str:
    part = name.partition("-")[2]
    return "before training" if part == "student" else f"after {part}"


def _deltas(report: dict[str, Any]) -> dict[str, Any]:
    section = report["temperatures"][0]
    kept, chosen = ({"count": sum(section["histogram"][key]), "bins": section["histogram"][key]} for key in
                    ("kept", "selected"))  # fmt: skip
    return {
        "edges": section["histogram"]["edges"], "kept": kept, "selected": chosen, "rule": section["rule"],
        "beta": report["parameters"]["beta"], "temperature": section["temperature"], "types": section["sentences"],
        "correlation": section["length_correlation"], "tokens": {
            name: section["lengths"][name]["student_tokens_mean"] for name in ("kept", "random", "selected")
            if "student_tokens_mean" in section["lengths"][name]
        },
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- what was compared


def _bakeoff(directory: Path) -> Run:
    run = Run(directory.resolve().name, "results")
    if not (directory / _RESULT).exists():
        raise InputError(f"{directory}: its runs are not finished; go on with the command that began this bake-off")
    _compared(run, directory)
    return run


def _compared(run: Run, directory: Path) -> None:
    """What a bake-off has found."""
    result = read_json(directory / _RESULT)
    try:
        run.comparisons, run.paste = of_bakeoff(result), result["paste"]
        run.notes += [f"left out of the bake-off: {name}: {reason}" for name, reason in result["left_out"].items()]
        run.facts["bake-off"] = (
            f"{result['seeds']} seeds of {result['plan']['rows']:,} rows, {result['problems']:,} development problems, "
            f"{percent(result['base'])} before training, {duration(result['spent'])}"
        )
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{directory / _RESULT}: is no result of this version of bakeoff; run it anew") from None


def _ablations(path: Path) -> Run:
    results, run = read_json(path), Run(path.stem, "results")
    try:
        run.comparisons = of_ablations(results)
        run.facts = {name: regime["about"] for name, regime in results["regimes"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path}: holds no results of python -m bench.ablations; name those, or a run") from None
    return run


# ---------------------------------------------------------------------------------------------- both


def _row(name: str, state: str, rows_in: Any, rows_out: Any, tokens: Any, seconds: Any) -> dict[str, Any]:
    return {"name": name, "state": state, "in": rows_in, "out": rows_out, "tokens": tokens, "seconds": seconds}


def _documents(run: Run, name: str, shards: Path) -> None:
    if (shards / "offsets.i64").exists():
        run.lengths[name] = np.diff(np.fromfile(shards / "offsets.i64", dtype="<i8"))


def _evaluation(run: Run, name: str, value: dict[str, Any]) -> None:
    try:
        report = as_report(value)
    except (TypeError, KeyError, AttributeError):
        run.notes.append(f"{name}: what was measured is no report of this version of evaluate, and left out")
        return
    run.evaluations.append((name, report))
    at = f"{name}, temperature {report.temperature:g}"
    run.notes += [f"{at}: {line}" for line in levels(report)]
    run.notes += [f"{at}: {count} failed and count as wrong: {reason}" for reason, count in report.failed.items()]
    run.notes += [
        f"{at}: the scorer raised {count} times, which counts as wrong: {raised}"
        for raised, count in report.scorer_errors.items()
    ]


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    """{} for what is not there; what is half-written is told, and left out."""
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except InputError:
        notes.append(f"{path.parent.name}/{path.name} is half-written and left out")
        return {}

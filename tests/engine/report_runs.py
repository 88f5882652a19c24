"""Run directories for the tests of the report: the files that train and distill leave, without the training."""

import json
import math
from pathlib import Path

from dasd_engine.evaluation_report import Response, summarize

HOSTILE = "</script><script>window.hacked = 1</script><!-- <b>&amp;\u2028 $\\frac{1}{2}$ 🙂"


def write_metrics(path: Path, stages: dict[str, int]) -> Path:
    """`path`/metrics.jsonl of so many steps a stage; the loss of step n is 8/√n, but 99 at step 7 of each stage."""
    path.mkdir(parents=True, exist_ok=True)
    lines = []
    for stage, steps in stages.items():
        for n in range(1, steps + 1):
            lines.append(json.dumps({
                "step": len(lines) + 1, "stage": stage, "epoch": 0, "stage_step": n,
                "loss": 99.0 if n == 7 else 8 / math.sqrt(n), "grad_norm": 1.0, "lr": 1e-3 * (1 - n / (steps + 1)),
                "tokens": 500, "trained_tokens": 300, "tokens_per_s": 5000.0, "trained_tokens_per_s": 3000.0,
                "mfu": 0.4, "fill": 0.95, "balance": 0.99, "step_s": 0.1,
            }))  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return path


def write_train_run(path: Path, steps: int = 20) -> Path:
    """A finished run of train: two stages, its facts, answers before and after."""
    write_metrics(path, {"low": steps, "high": steps // 2})
    (path / "recipe.json").write_text(json.dumps({"seed": 3, "model": {"path": "student"}}))
    (path / "run.json").write_text(json.dumps({"ranks": 2, "device": "cpu", "versions": {"torch": "2.13"}}))
    (path / "export" / "low").mkdir(parents=True)
    reports = {}
    for label in ("before", "after"):
        rows = [response(f"q{i}", label == "after" and i > 0, f"{HOSTILE} {label}") for i in range(20)]
        (path / f"evaluation-{label}.jsonl").write_text("".join(json.dumps(vars(r)) + "\n" for r in rows))
        (report,) = summarize(rows)
        reports[label] = {**vars(report), "by_task": {task: vars(score) for task, score in report.by_task.items()}}
    (path / "evaluation.json").write_text(json.dumps(reports))
    return path


def write_ablations(path: Path) -> Path:
    """Results of two regimes, one family of three arms each, on two sets of problems."""
    one = {
        "base": 0.3, "pass_at_1": {"low": 0.5, HOSTILE: 0.4, "both": 0.6},
        "tokens": {"low": 10, HOSTILE: 20, "both": 30},
        "pairs": [{"a": "low", "b": HOSTILE, "difference": -0.1, "interval": [-0.15, -0.05]},
                  {"a": "low", "b": "both", "difference": 0.1, "interval": [-0.01, 0.21]}],
    }  # fmt: skip
    family = {"title": "temperatures", "reference": "low", "arms": list(one["tokens"]), "sets": {"A": one, "B": one}}
    regimes = {name: {"about": f"the {name}", "families": {"temperature": family}} for name in ("pilot", "chance")}
    path.write_text(json.dumps({"regimes": regimes, "commit": "abc"}))
    return path


def response(id: str, correct: bool, output: str) -> Response:
    return Response(id, "sums", 1.0, 0, f"{HOSTILE} {id}", "2", correct, "stop", 9, output)


def write_mixed(path: Path, question: str) -> Path:
    """A response to a question of `write_scored_run` that the student began, and one of the teacher alone."""
    (path / "mix").mkdir()
    meta = {"cut": 7, "share": 0.625, "cap": 20, "continuation_tokens": 5}
    said = {"output": f"{HOSTILE} and on", "prefix": HOSTILE, "prefix_ids": [1] * 7, "meta": json.dumps(meta)}
    rows = [{"uuid": "q0", "input": "", "output": "alone", "meta": "{}"}, {"uuid": question, "input": "", **said}]
    (path / "mix" / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = {"questions": 2, "mixed": 1, "off_policy": 1, "prefix_tokens": 7, "continuation_tokens": 5}
    (path / "mix" / "manifest.json").write_text(json.dumps({"counts": counts}))
    return path


def write_selected(path: Path, question: str) -> Path:
    """Of a question of `write_scored_run`, candidate 1 chosen for stage low and candidate 0 dropped by a filter."""
    (path / "select-low").mkdir()
    meta = json.dumps({"temperature": 1.0, "candidate": 1})
    dropped = {"temperature": 1.0, "candidate": 0, "reason": "wrong_answer", "detail": HOSTILE}
    parts = {
        "selected.jsonl": {"uuid": question, "input": "", "output": "", "meta": meta},
        "dropped.jsonl": {"id": question, **dropped},
        "manifest.json": {"parameters": {"beta": 0.1, "rule": "longest"}, "counts": {}},
    }
    for name, row in parts.items():
        (path / "select-low" / name).write_text(json.dumps(row) + "\n")
    return path


def write_scored_run(path: Path, questions: int, sentences: int) -> Path:
    """A distillation that has scored, the trained student too: two candidates a question, each of so many sentences of
    60 characters."""
    (path / "sample").mkdir(parents=True)
    (path / "score").mkdir()
    candidates, scores = [], []
    for q in range(questions):
        for number in range(2):
            head = {"id": f"q{q}", "candidate": number, "temperature": 1.0}
            parts = [f"{HOSTILE[:20]} {q} {number} {i}".ljust(59, ".") + "\n" for i in range(sentences)]
            candidates.append({
                **head, "messages": [{"role": "user", "content": HOSTILE}], "text": "".join(parts), "answer": "2",
                "finish_reason": "stop", "teacher": {"name": "teacher", "revision": None},
            })  # fmt: skip
            scores.append({
                **head, "source": len(candidates), "teacher_tokens": 9 * sentences, "student_tokens": 8 * sentences,
                "sentences": [
                    [60 * i, 60 * i + 60, 0.9, (q + number + i) % 10 / 10, 9, 8, 0.8] for i in range(sentences)
                ],
            })  # fmt: skip
    for name, rows in (("sample/candidates", candidates), ("score/scores", scores)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "sample" / "manifest.json").write_text(json.dumps({"counts": {"questions": questions}}))
    (path / "score" / "manifest.json").write_text(json.dumps({"counts": {"scored": len(scores)}}))
    return path

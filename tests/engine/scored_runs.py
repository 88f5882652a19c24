"""Finished directories of sample and score for the tests of select, written without any model."""

import json
import random
from pathlib import Path
from typing import Any

from dasd_engine.shards import hash_file

SENTENCES = {"t": (0.9, 0.2), "c": (0.5, 0.5), "s": (0.1, 0.8)}  # p_T, p_S of a sentence of each type
THINKING = "<think>\nAdd {0} to it.\n</think>\n\nThe answer is {0}."


def candidate(question: str, number: int, sentences: str = "ttc", tokens: int = 10, **fields: Any) -> dict[str, Any]:
    """A candidate of so many student tokens whose `sentences` are spelled by type; `fields` replace any of the row.

    `p_D`, a list with a value for each sentence, and `error` go to the scores.
    """
    return {
        "id": question, "candidate": number, "temperature": 0.6, "seed": number,
        "messages": [{"role": "user", "content": f"What is {question}?"}],
        "text": THINKING.format(f"{question}.{number}"), "token_ids": [1, 2], "logprobs": [-0.1, -0.2],
        "token_ends": [1, 2], "opened": 0, "finish_reason": "stop", "teacher": {"name": "tiny", "revision": None},
        "answer": None, "task": None, "sentences": sentences, "tokens": tokens, "teacher_tokens": tokens + 1, **fields,
    }  # fmt: skip


def write_scored(path: Path, candidates: list[dict[str, Any]], student: Path | None = None) -> Path:
    """`path`/candidates and `path`/scores as sample and score leave them; the scores in another order."""
    rows, scores = [], []
    for line, one in enumerate(candidates, 1):
        row = dict(one)
        kinds, p_d = row.pop("sentences"), row.pop("p_D", None)
        score = {key: row[key] for key in ("id", "candidate", "temperature")} | {"source": line}
        teacher_tokens, student_tokens = row.pop("teacher_tokens"), row.pop("tokens")
        if "error" in row:
            score["error"] = row.pop("error")
        else:
            score |= {"teacher_tokens": teacher_tokens, "student_tokens": student_tokens}
            score["sentences"] = [
                [i, i + 1, *SENTENCES[kind], 4, 5, *([p_d[i]] if p_d else [])] for i, kind in enumerate(kinds)
            ]
            score["counts"] = {name: kinds.count(name[0]) for name in ("teacher", "student", "common")}
        rows.append(row)
        scores.append(score)
    random.Random(0).shuffle(scores)
    _write(path / "candidates/candidates.jsonl", rows)
    _write(path / "scores/scores.jsonl", scores)
    manifest = {"candidates": str(path / "candidates"), "inputs": {}, "parameters": {"beta": 0.1, "system": ""}}
    if student is not None:
        manifest |= {"student": str(student)}
        manifest["inputs"] = {"student": {"tokenizer.json": hash_file(student / "tokenizer.json")}}
    (path / "scores/manifest.json").write_text(json.dumps(manifest))
    seal(path)
    return path / "scores"


def seal(path: Path) -> None:
    """Note in the manifest what candidates.jsonl holds."""
    file = path / "scores/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["inputs"]["candidates"] = hash_file(path / "candidates/candidates.jsonl")
    file.write_text(json.dumps(manifest))


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def many(questions: int, candidates: int, temperatures: tuple[float, ...] = (0.6, 1.0), seed: int = 0) -> list[dict]:
    """Random candidates in which the count of teacher sentences goes with the length, some of them unfit."""
    rng = random.Random(seed)
    rows = []
    for question in range(questions):
        for temperature in temperatures:
            for number in range(candidates):
                kinds = "".join(rng.choices("tcs", (3 + 2 * temperature, 6, 0.4), k=rng.randint(3, 24)))
                fields: dict[str, Any] = {"answer": f"q{question}.{rng.randrange(3)}", "task": "toy"}
                if rng.random() < 0.03 * (1 + temperature):
                    fields |= rng.choice(
                        [
                            {"finish_reason": "length"},
                            {"text": "<think>\nhm\n</think>\n"},
                            {"text": "It is 3."},
                            {"error": "longer than the student's context"},
                            {"text": "<think>" + "so 1 + 1 = 2, wait. " * 60 + "</think>2"},
                        ]
                    )
                tokens = 9 * len(kinds) + rng.randint(0, 20)
                rows.append(candidate(f"q{question}", number, kinds, tokens, temperature=temperature, **fields))
    rng.shuffle(rows)
    return rows

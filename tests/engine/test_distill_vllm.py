"""distill with a real vLLM server as the teacher.

    DASD_VLLM_PYTHON=/path/to/venv/bin/python pytest -m vllm tests/engine/test_distill_vllm.py
"""

import json
from pathlib import Path

from distill_runs import write_distillation
from test_teachers import check_logprobs
from vllm_server import marks, served

from dasd_engine import distill
from dasd_engine.teachers import Request, Sampled

pytestmark = marks


def rows(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_whole_pipeline(tmp_path):
    """Every response and continuation comes from the server; the logprobs are those of a plain forward."""
    recipe, out, teacher = write_distillation(tmp_path), tmp_path / "run", tmp_path / "teacher"
    with served(teacher, "chain") as url:
        options = ["teacher.kind=server", f'teacher.urls=["{url}/v1"]']
        distill.main([str(recipe), *options, "--quiet"])
    candidates = rows(out / "sample" / "candidates.jsonl")
    assert len(candidates) == 12 * 2 * 2
    assert {row["teacher"]["name"] for row in candidates} == {"chain"}
    for row in candidates[::8]:
        system = {"role": "system", "content": "You are a helpful assistant."}
        request = Request("", [system, *row["messages"]], row["temperature"], row["seed"], 120)
        names = ("text", "opened", "token_ids", "logprobs", "token_ends", "finish_reason")
        check_logprobs(teacher, request, Sampled(**{name: row[name] for name in names}), 1e-3)
    mixed = [row for row in rows(out / "mix" / "mixed.jsonl") if "prefix" in row]
    assert mixed and all(row["output"].startswith(row["prefix"]) for row in mixed)
    assert {json.loads(row["meta"])["teacher"]["name"] for row in mixed} == {"chain"}
    for name in ("low", "high", "mixed"):
        assert (out / f"train-{name}" / "export" / name / "model.safetensors").stat().st_size
        assert json.loads((out / f"evaluate-{name}" / "manifest.json").read_text())["counts"]["responses"] == 8

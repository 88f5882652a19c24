"""bench.gpu on a CPU, where its times are the CPU's, and without a GPU."""

import json
from functools import partial

import pytest
import torch

from bench import gpu

SHAPE = "48,32,600"


def test_every_task_is_measured_and_written(tmp_path, capsys, monkeypatch):
    """torch.compile without code generation: the C++ compiler would take most of the test's time."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    gpu.main(["--device", "cpu", "--shape", SHAPE, "--rounds", "1", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert list(dict.fromkeys(row["task"] for row in rows)) == [*gpu.LOSSES, *gpu.SCORES]
    for task in (*gpu.LOSSES, *gpu.SCORES):
        group = {row["who"]: row for row in rows if row["task"] == task}
        measured = {who: row for who, row in group.items() if row["milliseconds"] is not None}
        assert {"ours", "torch eager", "torch compiled"} <= set(measured) and any("floor" in who for who in measured)
        assert group["ours"]["error"] < group["torch eager"]["error"]
        for row in measured.values():
            work = (
                48 * 32 * 600 * {"loss, dX, dW": 6, "loss, dX, dW, half ignored": 3, "token_logprobs": 2}.get(task, 4)
            )
            assert row["tflops"] == pytest.approx(work / row["milliseconds"] * 1e-9) and row["mib"] is None
    skipped = {row["who"]: row["why"] for row in rows if row["milliseconds"] is None}
    assert {"Liger", "QuACK", "Cut Cross-Entropy"} <= set(skipped) and all(skipped.values())
    text = (tmp_path / "cpu.md").read_text()
    assert text in capsys.readouterr().out
    ours = [line for line in text.splitlines() if line.startswith("| ours |")]
    assert len(ours) == 5 and all("| 1.00 |" in line for line in ours)
    assert "Not measured: Liger (" in text and "## token_logprobs, N, D, V = 48, 32, 600" in text


def test_a_call_that_fails_is_named_and_the_others_are_measured():
    def fails():
        raise MemoryError("too large\nand more")

    calls = {"fails": fails, "works": lambda: None, "absent": "not installed"}
    fails, works, absent = gpu.measure("task", (1, 2, 3), calls, {}, 1e6, 2, "cpu")
    assert fails.milliseconds is None and fails.why == "MemoryError: too large"
    assert works.milliseconds > 0 and works.why == "" and absent.why == "not installed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_timed(tmp_path, capsys):
    gpu.main(["--out", str(tmp_path / "results")])
    said = capsys.readouterr().out
    assert "no GPU here: nothing was measured" in said and "kl_divergence at N, D, V = 32768, 2560, 151936" in said
    assert "ready: ours" in said and not (tmp_path / "results").exists()


def test_a_wrong_shape_is_an_error(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--shape", "3,4"])
    assert "--shape is N,D,V" in capsys.readouterr().err

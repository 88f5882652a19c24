"""What surrounds the training loop: the run directory, its lock and records, signals, evaluation, the text printed.

A run directory holds `recipe.json` and `run.json` (what ran, with which versions), `data/` (prepared shards),
`metrics.jsonl`, `tensorboard/`, `checkpoints/`, `export/<stage>/` (Hugging Face directories), `evaluation.json`, and
what was answered in `evaluation-<label>.jsonl`.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType, TracebackType

import torch

from dasd_engine.checkpoint import Progress
from dasd_engine.config import Recipe
from dasd_engine.corpus import Corpus, shard_sets
from dasd_engine.distributed import World, compute_dtype
from dasd_engine.evaluate import EvalOptions, ask
from dasd_engine.evaluate import read as read_problems
from dasd_engine.evaluation_report import summarize
from dasd_engine.hf import init_weights, load_model, read_config
from dasd_engine.metrics import Display
from dasd_engine.model import Decoder, ModelConfig
from dasd_engine.plan import StagePlan
from dasd_engine.prepare import prepare
from dasd_engine.records import read_json, versions, write_json, write_rows
from dasd_engine.teacher_local import LocalTeacher
from dasd_engine.teachers import TeacherOptions

_RESULTS = (
    "data",
    "checkpoints",
    "export",
    "tensorboard",
    "metrics.jsonl",
    "evaluation.json",
    "evaluation-before.jsonl",
    "evaluation-after.jsonl",
    "nonfinite.json",
    "trace-rank*.json",
    "recipe.json",
    "run.json",
)


class Stop:
    """Context in which SIGTERM and Ctrl-C ask the run to save and stop; a second one stops at once."""

    def __init__(self) -> None:
        self.requested, self.signal, self._since = False, int(signal.SIGTERM), 0.0

    def __enter__(self) -> "Stop":
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A launcher passes on the terminal's Ctrl-C, so that each rank gets it twice within moments.
        if self.requested and time.monotonic() - self._since > 2.0:
            os._exit(128 + number)
        if not self.requested:
            self.requested, self.signal, self._since = True, number, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                print("\nsaving after this step; once more stops at once", file=sys.stderr, flush=True)


def clear(out: Path) -> None:
    """Delete what an earlier run left in `out`; whatever else is there stays."""
    for path in [path for name in _RESULTS for path in out.glob(name)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def open_data(recipe: Recipe, world: World, display: Display) -> list[Corpus]:
    """The documents of each stage. A stage that names files instead of shards has them prepared first, on one rank."""
    model, result = recipe.resolve(recipe.model.path), list[Corpus]()
    for stage in recipe.stages:
        paths = [recipe.resolve(data) for data in stage.data]
        if not all(map(shard_sets, paths)):
            shards = recipe.out / "data" / stage.name
            if world.is_main:
                display.say(f"preparing {', '.join(stage.data)} for stage {stage.name}")
                # What is no file may be a hub data set.
                sources = [str(p) if p.exists() else data for p, data in zip(paths, stage.data, strict=True)]
                prepare(sources, model, shards, context=stage.train.context, quiet=bool(result))
            world.barrier()
            paths = [shards]
        result.append(Corpus.open(paths))
    return result


def identity(recipe: Recipe, config: ModelConfig, plans: list[StagePlan]) -> dict[str, str]:
    """What a resumed run must share with its checkpoint, by recipe key where there is one."""
    shape = hashlib.sha256(json.dumps(asdict(config), sort_keys=True, default=str).encode()).hexdigest()[:16]
    result = {"model": shape, "seed": str(recipe.seed), "run.moments": recipe.run.moments}
    for plan in plans:
        for key, value in asdict(plan.stage.train).items():
            result[f"stage {plan.stage.name}: {key}"] = str(value)
        result[f"stage {plan.stage.name}: plan of the data"] = plan.digest
    return result


def write_run_files(recipe: Recipe, world: World) -> None:
    """`recipe.json` (resolved) and `run.json` (versions, git state, hardware, command)."""
    if not world.is_main:
        return
    packages = ("dasd-engine", "torch", "triton", "safetensors", "tokenizers", "numpy")
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.processor() or "cpu"
    facts = {
        "command": sys.argv, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "ranks": world.size, "device": device,
        "threads": torch.get_num_threads(), "python": platform.python_version(),
        "versions": versions(*packages),
        "git": _git_state(),
    }  # fmt: skip
    write_json(recipe.out / "recipe.json", recipe.as_dict())
    write_json(recipe.out / "run.json", facts)


def _git_state() -> str | None:
    """Commit of the source tree the engine runs from, with `+changes` when it differs; None from an installed wheel."""
    here = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"]
        tracked = subprocess.run([*command[:3], "ls-files", "--error-unmatch", __file__], capture_output=True)
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if tracked.returncode == 0 else None


def evaluate_student(recipe: Recipe, directory: Path | None, label: str, world: World, display: Display) -> None:
    """Measure the student in `directory` (None: before training) on the recipe's problems, into evaluation.json."""
    o, path = recipe.evaluate, recipe.out / "evaluation.json"
    results = read_json(path) if path.exists() else {}
    if o.problems and world.is_main and label not in results:
        source = recipe.resolve(recipe.model.path)
        if directory is None and recipe.model.init == "random":
            model = Decoder(read_config(source))
            init_weights(model, recipe.seed)
        else:
            model = load_model(directory or source)
        model.to(world.device)
        asked = EvalOptions(
            samples=o.samples, temperatures=(o.temperature,), max_new_tokens=o.max_new_tokens, seed=recipe.seed,
            limit=o.limit or None,
        )  # fmt: skip
        problems = read_problems([str(recipe.resolve(o.problems))], asked)
        with contextlib.closing(LocalTeacher(TeacherOptions(path=str(source), batch_size=128), model)) as student:
            responses = ask(student, problems, asked)
        results[label] = asdict(summarize(responses)[0])
        write_rows(recipe.out / f"evaluation-{label}.jsonl", map(asdict, responses))
        write_json(path, results)
        display.say(f"{label} training: {_score(results[label])}")
    world.barrier()


def _score(result: dict) -> str:
    tasks = ", ".join(f"{task} {100 * score['pass_at_1']:.0f} %" for task, score in sorted(result["by_task"].items()))
    return f"pass@1 {100 * result['pass_at_1']:.1f} % of {result['count']} held-out problems ({tasks})"


def print_plan(
    recipe: Recipe, config: ModelConfig, plans: list[StagePlan], memory: list[str], world: World, display: Display
) -> None:
    """The student, what a rank must hold, each stage's packs and steps."""
    with torch.device("meta"):
        size = sum(p.numel() for p in Decoder(config).parameters())
    dtype = compute_dtype(recipe.run, world.device)
    display.say(
        f"student {size / 1e6:,.2f} M parameters, {config.num_hidden_layers} layers, vocabulary {config.vocab_size}; "
        f"{str(dtype).removeprefix('torch.')} on {world.size} x {world.device.type}"
    )
    for line in memory:
        display.say(line)
    row = "{:<18} {:>9} {:>12} {:>12} {:>6} {:>7} {:>7} {:>8} {:>9}"
    display.say(row.format("stage", "documents", "tokens", "trained", "epochs", "steps", "fill", "balance", "PFLOP"))
    for plan in plans:
        first, data = plan.epochs[0], plan.corpus
        display.say(row.format(
            plan.stage.name[:18], f"{len(data):,}", f"{data.tokens:,}", f"{data.trained_tokens:,}", len(plan.epochs),
            f"{plan.steps:,}", f"{100 * first.fill:.2f}%", f"{first.balance:.3f}",
            f"{plan.flops * len(plan.epochs) / 1e15:,.2f}",
        ))  # fmt: skip


def print_summary(recipe: Recipe, export: Path, progress: Progress, display: Display) -> None:
    """The last lines: what was learned, where it lies, what to run next."""
    rows = [json.loads(line) for line in (recipe.out / "metrics.jsonl").read_text().splitlines()]
    display.say()
    if rows:
        head, tail = rows[: max(1, len(rows) // 50)], rows[-max(1, len(rows) // 50) :]
        first, last = (sum(r["loss"] for r in part) / len(part) for part in (head, tail))
        display.say(f"loss {first:.3f} -> {last:.3f} over {progress.total_step} steps, {progress.tokens:,} tokens, "
                    f"{progress.seconds:.0f} s of training")  # fmt: skip
    evaluation = recipe.out / "evaluation.json"
    if evaluation.exists():
        for label, result in read_json(evaluation).items():
            display.say(f"{label:>6}: {_score(result)}")
    if progress.skipped:
        display.say(f"{progress.skipped} steps were skipped: their loss or gradient was not finite")
    display.say(f"the student: {export} (a Hugging Face directory); metrics: {recipe.out / 'metrics.jsonl'}")
    if recipe.evaluate.problems:
        display.say(f"next: python -m dasd_engine.evaluate {export} {recipe.resolve(recipe.evaluate.problems)}")
        display.say('your own data: write a recipe with model.path and [[stage]] data = "responses.jsonl"; see --help')

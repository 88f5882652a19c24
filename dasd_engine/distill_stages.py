"""The stages of distill: what each depends on, and how its command is called. Directories lie under the recipe's `out`.

A stage's identity is the manifests of the stages it reads, the files it reads and its parameters, all as hashes or
plain values: what has the same identity need not run again. URLs of servers, device and batch sizes are no part of it.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dasd_engine.distill_config import TRAINED, DistillRecipe
from dasd_engine.errors import InputError
from dasd_engine.evaluate import evaluate
from dasd_engine.mix import mix
from dasd_engine.prepare import prepare
from dasd_engine.questions import identify
from dasd_engine.records import MANIFEST, write_json
from dasd_engine.sample import sample
from dasd_engine.score import score
from dasd_engine.select import select
from dasd_engine.shards import hash_file, hash_files
from dasd_engine.teachers import TeacherOptions, identify_teacher

TEXT_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Stage:
    """`reads`: earlier stages. `files` and `parameters` are asked for late: hub data sets and weights take a while."""

    name: str
    reads: tuple[str, ...]
    files: Callable[[], dict[str, Any]]
    parameters: dict[str, Any]
    run: Callable[[bool], Any]  # (quiet)

    @property
    def kind(self) -> str:
        return self.name.partition("-")[0]


def stages_of(recipe: DistillRecipe) -> list[Stage]:
    """All stages of a recipe, in the order in which they run."""
    trained = TRAINED if recipe.mix.enabled else TRAINED[:2]
    found = [_sample(recipe), _score(recipe)]
    found += [_select(recipe, name, t) for name, t in zip(TRAINED, recipe.sample.temperatures, strict=False)]
    found += [_prepare(recipe, name) for name in TRAINED[:2]] + [_train(recipe, name) for name in TRAINED[:2]]
    if recipe.mix.enabled:
        found += [_mix(recipe), _prepare(recipe, "mixed"), _train(recipe, "mixed")]
    if recipe.evaluate.problems:
        found += [_evaluate(recipe, name) for name in ("student", *trained)]
    return found


def export_of(recipe: DistillRecipe, name: str) -> Path:
    """The model directory that stage `name` of training leaves; "student" is the one before training."""
    return recipe.student if name == "student" else recipe.out / f"train-{name}" / "export" / name


def before(name: str) -> str:
    """The model from which a stage of training starts."""
    return ("student", *TRAINED)[TRAINED.index(name)]


# ---------------------------------------------------------------------------------------------- the teacher's side


def _sample(recipe: DistillRecipe) -> Stage:
    s = recipe.sample
    parameters = {**asdict(s), "seed": recipe.seed, "system": recipe.system}
    asked = {key: value for key, value in parameters.items() if key not in ("questions", "limit")}

    def run(quiet: bool) -> None:
        out = recipe.out / "sample"
        # Whoever runs distill again wants what failed to be asked again.
        sample(
            recipe.questions, recipe.teacher, out, progress=not quiet, retry_failed=True, limit=s.limit or None, **asked
        )

    def files() -> dict[str, Any]:
        found = [{key: value for key, value in one.items() if key != "file"} for one in identify(recipe.questions)]
        return {"questions": found, "teacher": identify_teacher(recipe.teacher)}

    return Stage("sample", (), files, {key: v for key, v in parameters.items() if key != "questions"}, run)


def _score(recipe: DistillRecipe) -> Stage:
    s = recipe.score
    parameters = {**asdict(s), "system": recipe.system, "compute": recipe.run.compute}

    def run(quiet: bool) -> None:
        sampled, out = recipe.out / "sample", recipe.out / "score"
        if recipe.ranks == 1:
            dtype = compute_dtype(recipe)
            score(
                sampled, recipe.student, out, part=s.part, minimum_tokens=s.minimum_tokens, system=recipe.system,
                tokens_per_batch=s.tokens_per_batch, dtype=dtype, threads=recipe.run.threads, quiet=quiet,
            )  # fmt: skip
            return
        options = {"--part": s.part, "--minimum-tokens": s.minimum_tokens, "--system": recipe.system,
                   "--tokens-per-batch": s.tokens_per_batch, "--threads": recipe.run.threads}  # fmt: skip
        if dtype := compute_dtype(recipe):
            options["--dtype"] = dtype
        given = [str(value) for pair in options.items() for value in pair]
        launch(recipe, "dasd_engine.score", [str(sampled), "--student", str(recipe.student), "--out", str(out), *given])

    return Stage("score", ("sample",), lambda: {"student": hash_model(recipe.student)}, parameters, run)


def _select(recipe: DistillRecipe, name: str, temperature: float) -> Stage:
    filters = recipe.filters_of(name)
    parameters = {**asdict(recipe.select), "temperature": temperature, "seed": recipe.seed, "filters": asdict(filters)}

    def run(quiet: bool) -> None:
        select(
            recipe.out / "score", recipe.out / f"select-{name}", rule=recipe.select.rule, beta=recipe.select.beta,
            temperature=temperature, student=recipe.student, context=filters.context, thinking=filters.thinking,
            right_only=filters.right_only, repetition=filters.repetition, seed=recipe.seed, quiet=quiet,
        )  # fmt: skip

    return Stage(f"select-{name}", ("score",), dict, parameters, run)


def _mix(recipe: DistillRecipe) -> Stage:
    options = recipe.mix_options()
    parameters = {**asdict(options), "compute": recipe.run.compute}

    def run(quiet: bool) -> None:
        mix(
            recipe.out / "select-high", export_of(recipe, "high"), recipe.teacher, recipe.out / "mix", options=options,
            batch_size=recipe.mix.batch_size, dtype=compute_dtype(recipe), quiet=quiet,
        )  # fmt: skip

    return Stage(
        "mix", ("select-high", "train-high"), lambda: {"teacher": identify_teacher(recipe.teacher)}, parameters, run
    )


# ---------------------------------------------------------------------------------------------- the student's side


def _prepare(recipe: DistillRecipe, name: str) -> Stage:
    context, masked = recipe.train[name].context, name == "mixed" and recipe.mix.masked
    source, file = ("mix", "mixed.jsonl") if name == "mixed" else (f"select-{name}", "selected.jsonl")

    def run(quiet: bool) -> None:
        prepare(
            [recipe.out / source / file], recipe.student, recipe.out / f"prepare-{name}", context=context,
            system=recipe.system, mask_prefix=masked, quiet=quiet,
        )  # fmt: skip

    parameters = {"context": context, "system": recipe.system, "masked": masked}
    return Stage(
        f"prepare-{name}", (source,), lambda: {"student": hash_model(recipe.student, text=True)}, parameters, run
    )


def _train(recipe: DistillRecipe, name: str) -> Stage:
    parameters = {**asdict(recipe.train[name]), "seed": recipe.seed, "compute": recipe.run.compute}
    first = before(name) == "student"
    reads = (f"prepare-{name}",) if first else (f"prepare-{name}", f"train-{before(name)}")

    def run(quiet: bool) -> None:
        train(recipe, name, quiet)

    def files() -> dict[str, Any]:
        return {"student": hash_model(recipe.student)} if first else {}

    return Stage(f"train-{name}", reads, files, parameters, run)


def train(recipe: DistillRecipe, name: str, quiet: bool) -> None:
    """A stage of training as a process of its own, on a recipe that can be run alone; then its manifest."""
    directory, started = recipe.out / f"train-{name}", time.monotonic()
    directory.mkdir(parents=True, exist_ok=True)
    written = directory / "recipe.toml"
    written.write_text(train_recipe(recipe, name), encoding="utf-8")
    launch(recipe, "dasd_engine.train", [str(written)], directory / "train.log" if quiet else None)
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    data = json.loads((recipe.out / f"prepare-{name}" / MANIFEST).read_text())["counts"]
    export = export_of(recipe, name)
    write_json(directory / MANIFEST, {
        "recipe": written.name,
        "export": str(export.relative_to(directory)),
        "files": hash_model(export),
        "counts": {
            "documents": data["documents"], "steps": len(metrics), "tokens": sum(row["tokens"] for row in metrics),
            "skipped": metrics[-1]["skipped"],
        },
        "loss": {"first": metrics[0]["loss"], "last": metrics[-1]["loss"]},
        "wall_seconds": round(time.monotonic() - started, 3),
    })  # fmt: skip


def train_recipe(recipe: DistillRecipe, name: str) -> str:
    """The TOML text of one stage of training, by absolute paths."""
    tables = {
        "model": {"path": str(export_of(recipe, before(name)).resolve()), "init": "pretrained"},
        "train": asdict(recipe.train[name]),
        "run": asdict(recipe.run),
        "checkpoint": asdict(recipe.checkpoint),
    }
    out, data = (recipe.out / f"{part}-{name}" for part in ("train", "prepare"))
    lines = [f"# Stage {name} of {recipe.path}; it runs alone too: python -m dasd_engine.train {out / 'recipe.toml'}"]
    lines += toml_keys({"seed": recipe.seed, "out": str(out.resolve())})
    for section, table in tables.items():
        lines += ["", f"[{section}]", *toml_keys(table)]
    lines += ["", "[[stage]]", *toml_keys({"name": name, "data": str(data.resolve())})]
    return "\n".join(lines) + "\n"


def toml_keys(table: dict[str, Any]) -> list[str]:
    return [f"{key} = {toml_value(value)}" for key, value in table.items()]


def toml_value(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(toml_value, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _evaluate(recipe: DistillRecipe, name: str) -> Stage:
    e = recipe.evaluate
    parameters = {**{key: v for key, v in asdict(e).items() if key != "problems"}, "seed": recipe.seed,
                  "system": recipe.system, "compute": recipe.run.compute}  # fmt: skip
    problems = recipe.resolve(e.problems)

    def files() -> dict[str, Any]:
        if not problems.is_file():
            raise InputError(f"{problems}: no such file; [evaluate] problems names a JSONL of problems with answers")
        model = {"student": hash_model(recipe.student)} if name == "student" else {}
        return {"problems": hash_file(problems), **model}

    def run(quiet: bool) -> None:
        model = TeacherOptions(
            path=str(export_of(recipe, name)), dtype=compute_dtype(recipe) or "auto", batch_size=128,
            threads=recipe.run.threads,
        )  # fmt: skip
        evaluate(
            model, str(problems), recipe.out / f"evaluate-{name}", progress=not quiet, samples=e.samples,
            temperatures=(e.temperature,), max_new_tokens=e.max_new_tokens, seed=recipe.seed, limit=e.limit or None,
            system=recipe.system,
        )  # fmt: skip

    return Stage(f"evaluate-{name}", () if name == "student" else (f"train-{name}",), files, parameters, run)


# ---------------------------------------------------------------------------------------------- processes and hashes


def launch(recipe: DistillRecipe, module: str, arguments: Sequence[str], log: Path | None = None) -> None:
    """A module as a process of its own, under torchrun for several ranks; signals are passed on to it.

    Its output goes where ours goes, or into `log`. InputError where it fails; SystemExit where a signal stopped it.
    """
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={recipe.ranks}"]
    command = [sys.executable, *(several if recipe.ranks > 1 else []), "-m", module, *arguments]
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(open(log, "a", encoding="utf-8")) if log else None
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT if sink else None)
        with _passing_on(process):
            code = process.wait()
    if code in (128 + signal.SIGTERM, 128 + signal.SIGINT):
        sys.exit(code)
    if code:
        said = f"; {log} ends in: {log.read_text().strip().splitlines()[-1]}" if log and log.stat().st_size else ""
        raise InputError(f"python -m {module} ended with exit code {code}{said or ', see above'}")


@contextlib.contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """SIGTERM and Ctrl-C are the process's to handle: it saves, ends, and we end with it."""

    def pass_on(number: int, frame: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def compute_dtype(recipe: DistillRecipe) -> Literal["bf16", "fp32"] | None:
    """The dtype of score, mix and evaluate: theirs by the device where the recipe says "auto"."""
    return None if recipe.run.compute == "auto" else recipe.run.compute


def hash_model(directory: Path, text: bool = False) -> dict[str, str]:
    """Hashes of a model's files; `text`: of the tokenizer and the template alone."""
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory}: no config.json there; name the directory of a Hugging Face model")
    return hash_files(directory, TEXT_FILES if text else (*TEXT_FILES, "config.json", "*.safetensors"))

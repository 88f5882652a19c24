r"""Distil a student from a recipe: sample, score, select, prepare, train twice, mix, train once more, evaluate.

    python -m dasd_engine.distill recipe.toml --dry-run                     what would run, and what it takes
    python -m dasd_engine.distill recipe.toml sample.candidates=8 out=runs/a
    python -m dasd_engine.distill recipe.toml --until select                look at the selection before training

Every stage is a directory under `out`, written by the command of its name and usable without the others:

    sample  score  select-low  select-high  prepare-low  prepare-high  train-low  train-high
    mix  prepare-mixed  train-mixed  evaluate-student  evaluate-low  evaluate-high  evaluate-mixed

Run again, a stage whose inputs and parameters are what they were is left alone, one that was killed goes on where it
stopped, and one whose inputs or parameters have changed runs anew, as does what depends on it: the directory that it
had is kept in OUT/earlier. Nothing is ever deleted.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table

from dasd_engine.distill_config import DistillRecipe, describe, load_distill_recipe
from dasd_engine.distill_stages import Stage, stages_of
from dasd_engine.errors import InputError, run_cli
from dasd_engine.estimate import assumptions, estimate, find_device
from dasd_engine.evaluation_report import as_report, levels, percent, print_table
from dasd_engine.questions import read_questions, spread
from dasd_engine.records import MANIFEST, differences, lock, read_json, write_json
from dasd_engine.shards import hash_file

RECORDS, EARLIER = "stages", "earlier"
DONE, KEPT, UNFINISHED, CHANGED, TO_DO = "done", "kept as it is", "unfinished", "changed", "to do"


@dataclass
class State:
    """Where a stage stands. `asked`: its identity, None while a stage that it reads has not ended."""

    word: str
    asked: dict[str, Any] | None = None
    changes: list[str] = field(default_factory=list)


class Run:
    """A recipe's stages and where each stands in its directory."""

    def __init__(self, recipe: DistillRecipe, first: str | None = None, last: str | None = None):
        self.recipe, self.out = recipe, recipe.out
        self.stages = stages_of(recipe)
        names = [stage.name for stage in self.stages]
        self.begin = _find(names, first, last=False) if first else 0
        self.end = _find(names, last, last=True) + 1 if last else len(names)
        if self.begin >= self.end:
            raise InputError(f"--from {first} lies behind --until {last}; the order is {', '.join(names)}")

    def state(self, index: int, known: dict[str, State]) -> State:
        """Of a stage, when those of the stages before it are known."""
        stage, manifest = self.stages[index], self.out / self.stages[index].name / MANIFEST
        if index < self.begin:
            if not manifest.exists():
                raise InputError(
                    f"--from {self.stages[self.begin].name}: {stage.name} before it has not ended; run it first"
                )
            return State(KEPT)
        record = self.record(stage)
        waiting = [name for name in stage.reads if known[name].word not in (DONE, KEPT)]
        if waiting:
            return State(CHANGED if record else TO_DO, None, [f"{waiting[0]} comes first"] if record else [])
        reads = {name: hash_file(self.out / name / MANIFEST) for name in stage.reads}
        asked = {"reads": reads, "files": stage.files(), "parameters": stage.parameters}
        asked = json.loads(json.dumps(asked))  # as the record will be read: lists for tuples
        if record is None:
            return State(TO_DO, asked)
        if changes := _changes(record["asked"], asked):
            return State(CHANGED, asked, changes)
        return State(DONE if manifest.exists() else UNFINISHED, asked)

    def record(self, stage: Stage) -> dict[str, Any] | None:
        path = self.out / RECORDS / f"{stage.name}.json"
        return read_json(path) if path.exists() else None

    def manifests(self, known: dict[str, State]) -> dict[str, dict[str, Any]]:
        there = [name for name, state in known.items() if state.word in (DONE, KEPT)]
        return {name: read_json(self.out / name / MANIFEST) for name in there}

    # ------------------------------------------------------------------------------------------ doing it

    def go(self, again: str, quiet: bool = False) -> dict[str, State]:
        """Run what must be run. `again`: the command that goes on after an error."""
        known: dict[str, State] = {}
        with lock(self.out):
            for index, stage in enumerate(self.stages[: self.end]):
                state = known[stage.name] = self.state(index, known)
                if state.word in (DONE, KEPT):
                    continue
                self.say(quiet, stage, state)
                if state.word == CHANGED:
                    self.set_aside(stage, quiet)
                self.run(stage, state, again, quiet)
                known[stage.name] = State(DONE, state.asked)
        return known

    def say(self, quiet: bool, stage: Stage, state: State) -> None:
        if not quiet:
            said = {UNFINISHED: ", going on where it stopped", CHANGED: f", anew: {'; '.join(state.changes)}"}
            print(f"\n=== {stage.name}{said.get(state.word, '')}", flush=True)

    def run(self, stage: Stage, state: State, again: str, quiet: bool) -> None:
        record = {"asked": state.asked, "seconds": (self.record(stage) or {}).get("seconds", 0.0)}
        path, started = self.out / RECORDS / f"{stage.name}.json", time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        try:
            stage.run(quiet)
        except InputError as error:
            raise InputError(f"{stage.name}: {error}; then go on with: {again}") from None
        except KeyboardInterrupt:
            print(f"\n{stage.name} was stopped; go on with: {again}", file=sys.stderr, flush=True)
            raise
        finally:
            write_json(path, {**record, "seconds": round(record["seconds"] + time.monotonic() - started, 3)})

    def set_aside(self, stage: Stage, quiet: bool) -> None:
        """Move a stage's directory and record out of the way, to be looked at or taken back."""
        directory, record = self.out / stage.name, self.out / RECORDS / f"{stage.name}.json"
        earlier = self.out / EARLIER
        earlier.mkdir(exist_ok=True)
        number = 1
        while (earlier / f"{stage.name}-{number}").exists() or (earlier / f"{stage.name}-{number}.json").exists():
            number += 1
        kept = earlier / f"{stage.name}-{number}"
        if directory.exists():
            with lock(directory):
                os.rename(directory, kept)
            if not quiet:
                print(f"    what was there is kept in {kept}", flush=True)
        os.replace(record, kept.with_name(f"{kept.name}.json"))


def _find(names: list[str], wanted: str, last: bool) -> int:
    """A stage's place; `select` stands for the first (--from) or the last (--until) of its kind."""
    places = [i for i, name in enumerate(names) if wanted in (name, name.partition("-")[0])]
    if not places:
        raise InputError(f"no stage is called {wanted!r}; there are {', '.join(names)}")
    return places[-1 if last else 0]


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words. Hashes say nothing to a reader."""
    found = [f"{name} was made anew" for name in now["reads"] if before["reads"].get(name) != now["reads"][name]]
    for name, value in now["files"].items():
        if differences(before["files"].get(name), value):
            found.append(f"the {name} changed")
    return found + differences(before["parameters"], now["parameters"])


# ---------------------------------------------------------------------------------------------- what is printed


def print_plan(run: Run, device: str | None, tflops: float | None, response_tokens: float | None) -> None:
    """Every stage with its state, and what it will take. Writes nothing."""
    recipe, known = run.recipe, dict[str, State]()
    for index, stage in enumerate(run.stages):
        known[stage.name] = run.state(index, known)
    manifests = run.manifests(known)
    sampled = manifests.get("sample")
    count = (
        sampled["counts"]["questions"]
        if sampled
        else len(spread(read_questions(recipe.questions), recipe.sample.limit or None))
    )
    mean = response_tokens or recipe.sample.max_new_tokens / 4
    work, where = estimate(recipe, manifests, count, mean), find_device(device, tflops, recipe.ranks)
    table = Table(title=f"{recipe.path.name} -> {run.out}", title_justify="left")
    for name in ("stage", "state", "rows", "tokens", "PFLOP", "hours"):
        table.add_column(name, justify="left" if name in ("stage", "state") else "right", overflow="fold")
    total = 0.0
    for index, stage in enumerate(run.stages):
        state, w = known[stage.name], work[stage.name]
        hours = w.hours(where)
        skipped = state.word in (DONE, KEPT) or not run.begin <= index < run.end
        total += 0.0 if skipped else hours or 0.0
        word = state.word if run.begin <= index < run.end or state.word == KEPT else f"{state.word}, not asked for"
        table.add_row(
            stage.name, f"{word}: {'; '.join(state.changes)}" if state.changes else word, _number(w.rows),
            _number(w.tokens), "?" if w.flops is None else _number(w.flops / 1e15) if w.use else "",
            "?" if hours is None else _number(hours) if w.use else "",
        )  # fmt: skip
    print_table(table)
    print(f"{_number(total)} hours ({_duration(3600 * total)}) for what is left")
    unknown = any(w.flops is None for name, w in work.items() if name in known)
    for line in assumptions(where, None if sampled else mean, recipe.mix.enabled, unknown):
        print(f"  {line}")


def print_summary(run: Run, known: dict[str, State]) -> None:
    """One table of all stages that have ended."""
    table = Table(title=str(run.out), title_justify="left")
    for name in ("stage", "rows in", "rows out", "tokens", "wall time", "pass@1"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    said = []
    for stage in run.stages:
        if stage.name not in known:
            continue
        manifest = read_json(run.out / stage.name / MANIFEST)
        seconds = (run.record(stage) or {}).get("seconds") or manifest.get("wall_seconds", 0.0)
        rows_in, rows_out, tokens = _figures(stage.kind, manifest["counts"])
        reports = manifest.get("reports")
        shown = percent(reports[0]["pass_at_1"]) if reports else ""
        said += [f"{stage.name}: {line}" for report in reports or [] for line in levels(as_report(report))]
        table.add_row(stage.name, f"{rows_in:,}", f"{rows_out:,}", f"{tokens:,}", _duration(seconds), shown)
    print_table(table)
    for line in said:
        print(line)
    exports = [run.out / f"train-{name}" / "export" / name for name in ("mixed", "high", "low")]
    if student := next((path for path in exports if path.is_dir() and f"train-{path.name}" in known), None):
        print(f"the student: {student} (a Hugging Face directory)")
    print(f"look at it: python -m dasd_engine.report {run.out}")


def _figures(kind: str, counts: dict[str, Any]) -> tuple[int, int, int]:
    """(rows in, rows out, tokens) of a manifest's counts."""
    c = counts
    return {
        "sample": lambda: (c["questions"], c["candidates"], c["tokens"]),
        "score": lambda: (c["candidates"], c["scored"], c.get("student_tokens", 0)),
        "select": lambda: (c["candidates"], c["selected"], c["student_tokens"]),
        "prepare": lambda: (c["rows"], c["documents"], c["tokens"]),
        "train": lambda: (c["documents"], c["documents"], c["tokens"]),
        "mix": lambda: (c["questions"], c["mixed"] + c["off_policy"], c["prefix_tokens"] + c["continuation_tokens"]),
        "evaluate": lambda: (c["problems"], c["responses"], c["tokens"]),
    }[kind]()


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{int(rest):02}" if hours or minutes else f"{rest:.1f} s"


# ---------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dasd_engine.distill", description=__doc__, epilog="recipe keys:\n" + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("recipe", help="a TOML recipe, such as recipes/distill.toml")
    add("overrides", nargs="*", metavar="key=value", help="recipe keys to change, such as select.rule=random")
    add("--from", dest="first", metavar="STAGE", help="take the stages before it as they are, whatever the recipe says")
    add("--until", dest="last", metavar="STAGE", help="stop behind it")
    add("--dry-run", action="store_true", help="print the plan with tokens, FLOPs and hours; run and write nothing")
    add("--device", metavar="NAME", help="of the plan's hours, e.g. H100 (default: this machine's)")
    add(
        "--device-tflops",
        type=float,
        metavar="X",
        help="of the plan's hours: the peak of a device that has no name here",
    )
    add(
        "--response-tokens",
        type=float,
        metavar="N",
        help="of the plan: mean response (default: a quarter of the longest)",
    )
    add("--quiet", action="store_true", help="print nothing but errors; training writes train-*/train.log")
    args = parser.parse_intermixed_args(arguments)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("distill starts its own ranks: run it without torchrun, with ranks = N in the recipe")
    recipe = load_distill_recipe(args.recipe, args.overrides)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    run = Run(recipe, args.first, args.last)
    if args.dry_run:
        print_plan(run, args.device, args.device_tflops, args.response_tokens)
        return
    given = sys.argv[1:] if arguments is None else list(arguments)
    again = shlex.join(["python", "-m", "dasd_engine.distill", *given])
    known = run.go(again, args.quiet)
    if not args.quiet:
        print()
        print_summary(run, known)


if __name__ == "__main__":
    run_cli(main)

r"""Find out cheaply which selection rule, temperatures and mixed policy suit your teacher, student and questions.

    python -m dasd_engine.bakeoff recipe.toml --budget 2h --arms rules,temperatures,mix
    python -m dasd_engine.bakeoff recipe.toml --budget 8h --arms rules --problems development.jsonl --out runs/rules

RECIPE is one of dasd_engine.distill. Each arm changes one thing of it; every arm is trained for a short while under
several seeds, once with equal samples and once with equal tokens, and evaluated on the same development problems. Those
are held out of the recipe's own questions, or named by --problems; the recipe's [evaluate] problems are never asked.
Before the first run is paid for it says how many seeds and rows fit the budget and what difference they can show.

--out (the recipe's `out`/bakeoff) has a directory with a manifest.json for every run: started again, the same command
goes on with the missing ones. result.json has the comparisons, recommended.toml the lines to paste. How to read them:
docs/bakeoff.md.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dasd_engine.bakeoff_arms import DESIGNS, Arm, Group, make_groups, paste
from dasd_engine.bakeoff_plan import LEAST_SEEDS, Clock, Plan, duration, fits, make_plan, parse_budget, too_small
from dasd_engine.bakeoff_report import print_plan, print_result
from dasd_engine.bakeoff_runs import Bench, Measured, Seed, runs_of
from dasd_engine.distill import DONE, State
from dasd_engine.distill import Run as Distillation
from dasd_engine.distill_config import DistillRecipe, load_distill_recipe
from dasd_engine.distill_stages import hash_model
from dasd_engine.errors import InputError, run_cli
from dasd_engine.evaluation_report import RESPONSES, EvalReport, levels, percent
from dasd_engine.mixed_policy import hash_uniform
from dasd_engine.paired import compare, detectable, expected_spread, recommend, spread
from dasd_engine.problems import final_answer, is_right, read_problems
from dasd_engine.questions import Question, identify, read_questions
from dasd_engine.questions import spread as evenly
from dasd_engine.records import OutputDirectory, read_json, read_rows, write_json, write_rows
from dasd_engine.teachers import identify_teacher

PROBLEMS, QUESTIONS, PLAN, RESULT, RECOMMENDED = (
    "problems.jsonl", "questions.jsonl", "plan.json", "result.json", "recommended.toml"
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """`problems`: names as evaluate takes them, none to hold some out. `development`: how many of them at most.
    `questions`: asked of the teacher where the recipe's have not been asked already."""

    budget: float
    arms: tuple[str, ...] = ("rules", "temperatures", "mix")
    problems: tuple[str, ...] = ()
    development: int = 200
    questions: int = 1000


def bakeoff(recipe: DistillRecipe, asked: Asked, out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Run the bake-off in the directory `out` (see this module's docstring); what result.json holds.

    Raises InputError: bad recipe or options, no development problems, a student at floor or ceiling, a small budget.
    """
    questions = evenly(read_questions(recipe.questions), recipe.sample.limit or None)
    training, problems = split(recipe, asked, questions)
    groups = make_groups(recipe, asked.arms, any(q.answer for q in training))
    options = {key: value for key, value in asdict(asked).items() if key != "budget"}  # that decides the plan alone
    wanted = {
        "command": "bakeoff",
        "inputs": {
            "student": hash_model(recipe.student), "teacher": identify_teacher(recipe.teacher),
            "questions": identify(recipe.questions), "problems": identify(asked.problems),
        },
        "parameters": {**options, **_parameters(recipe)},
    }  # fmt: skip
    with OutputDirectory(out, wanted) as output:
        if output.manifest is None:
            _run(recipe, asked, groups, training, problems, len(questions), output.path, quiet)
            output.finish({})
        result = read_json(output.path / RESULT)
        if not quiet:
            print_result(result)
        return result


def _parameters(recipe: DistillRecipe) -> dict[str, Any]:
    sections = ("sample", "score", "select", "filters", "mix", "evaluate")
    found = {name: asdict(getattr(recipe, name)) for name in sections}
    train = {name: asdict(options) for name, options in recipe.train.items()}
    return {**found, "train": train, "seed": recipe.seed, "system": recipe.system, "compute": recipe.run.compute}


def _run(
    recipe: DistillRecipe, asked: Asked, groups: list[Group], training: list[Question], problems: list[Question],
    full: int, out: Path, quiet: bool,
) -> None:  # fmt: skip
    clock = Clock(out / "clock.json")
    names = list(asked.problems)
    if not names:
        names = [str(out / PROBLEMS)]
        write_rows(out / PROBLEMS, map(_row, problems))
    say = (lambda text: None) if quiet else (lambda text: print(text, flush=True))
    bench = Bench(recipe, out, names, asked.development, full, quiet)
    say("the student before training, on the development problems: " + ", ".join(names))
    base = bench.evaluate(recipe.student, out / "base", recipe.seed)
    check_level(base.report, out / "base")
    least = LEAST_SEEDS * len(runs_of(groups)) * len(DESIGNS) * base.seconds
    if asked.budget < least:
        raise too_small(asked.budget, least, f"the evaluations of {LEAST_SEEDS} seeds alone")
    bench.scores, ids = sample(recipe, asked, training, out, quiet)
    clock.save()
    if known := teacher_right(bench.scores.parent / "sample" / "candidates.jsonl", ids):
        say(known)
    say(f"choosing among the candidates of {len(ids):,} questions, by every rule of these arms")
    groups = bench.choose(groups, ids)
    path = out / PLAN
    if not path.exists():
        say("a short run, to measure the speed")
        cost, most = bench.probe(groups, ids, base)
        plan = make_plan(cost, asked.budget, clock.spent, most)
        write_json(path, {**asdict(plan), "cost": asdict(cost), "spent": clock.spent})
    written = read_json(path)
    plan, families = Plan(written["rows"], written["seeds"], written["seconds"]), len(groups) * len(DESIGNS)
    expected = expected_spread(base.report.pass_at_1, base.report.samples)
    planned = {g.name: detectable(expected, len(g.arms), plan.seeds, base.report.count, families) for g in groups}
    if not quiet:
        print_plan(groups, plan, base.report, planned, asked.budget, written["spent"])
    found = _seeds(bench, groups, ids, plan, asked.budget, clock)
    groups = [group for group in groups if group.name not in bench.left_out]
    result = conclude(recipe, groups, found, list(base.right), planned, families)
    result |= {"plan": asdict(plan), "base": base.report.pass_at_1, "spent": clock.spent, "budget": asked.budget,
               "problems": base.report.count, "left_out": bench.left_out}  # fmt: skip
    write_json(out / RESULT, result)
    (out / RECOMMENDED).write_text(result["paste"], encoding="utf-8")


def _seeds(
    bench: Bench, groups: list[Group], ids: list[str], plan: Plan, budget: float, clock: Clock
) -> list[Seed]:  # fmt: skip
    """Of each seed, by design and run, what was measured; fewer seeds than planned where the budget ends."""
    found: list[Seed] = []
    for seed in range(plan.seeds):
        done = [seconds for one in range(seed) if (seconds := bench.seconds(one)) is not None]
        if bench.seconds(seed) is None and not fits(done, budget, clock.spent):
            break
        found.append(bench.seed(seed, groups, ids, plan.rows))
        clock.save()
        if not bench.quiet:
            spent = f"{duration(clock.spent)} of {duration(budget)}"
            print(f"seed {seed + 1} of {plan.seeds} is there, {spent}", flush=True)
    return found


# ---------------------------------------------------------------------------------------------- questions


def split(recipe: DistillRecipe, asked: Asked, questions: list[Question]) -> tuple[list[Question], list[Question]]:
    """(training questions, development problems), both in an order of their own that the recipe's seed decides.

    Held out are a quarter of those questions whose answer is known, `development` at most. A question of the recipe's
    [evaluate] problems is neither trained on nor asked here.
    """
    kept_back: set[str] = set()
    if recipe.evaluate.problems:
        kept_back = {_text(p.question) for p in read_problems([str(recipe.resolve(recipe.evaluate.problems))])}
    if asked.problems:
        problems = [p.question for p in evenly(read_problems(asked.problems), asked.development)]
        if shared := [q.id for q in problems if _text(q) in kept_back]:
            raise InputError(
                f"--problems: {shared[0]!r} ({len(shared)} in all) is among [evaluate] problems of {recipe.path}: they "
                "must not decide what is trained; name development problems of their own"
            )
    order = sorted(questions, key=lambda q: (hash_uniform(recipe.seed, q.id, "bakeoff"), q.id))
    order = [q for q in order if _text(q) not in kept_back]
    if not asked.problems:
        answered = [q for q in order if q.answer is not None]
        problems = answered[: min(asked.development, len(answered) // 4)]
        if len(problems) < 2:
            raise InputError(
                f"no development problems: {len(answered)} of the {len(order)} questions of {recipe.path} have an "
                "`answer`, of which a quarter is held out; name others with --problems"
            )
    held = {_text(q) for q in problems}
    training = [q for q in order if _text(q) not in held]
    if len(training) < 4:
        raise InputError(f"{recipe.path}: {len(training)} questions are left to train on; name more in [sample]")
    return training, problems


def _text(question: Question) -> str:
    return question.messages[-1]["content"].strip()


def _row(question: Question) -> dict[str, Any]:
    meta = {"answer": question.answer, "task": question.task}
    return {"uuid": question.id, "messages": question.messages, "meta": json.dumps(meta, ensure_ascii=False)}


def check_level(report: EvalReport, directory: Path) -> None:
    """Before anything is paid for: a student that can do nothing of it, or all, shows no difference of its teachers."""
    if said := levels(replace(report, by_task={"the development problems": report})):
        raise InputError(f"the student before training: {said[0]} (what it said, and how that was judged: "
                         f"{directory / RESPONSES})")  # fmt: skip


def sample(
    recipe: DistillRecipe, asked: Asked, training: list[Question], out: Path, quiet: bool
) -> tuple[Path, list[str]]:
    """(scores, ids of the training questions among them): the recipe's own where they are there, else of a subset."""
    own = Distillation(recipe, last="score")
    known: dict[str, State] = {}
    if (recipe.out / "score" / "manifest.json").exists():
        for index, stage in enumerate(own.stages[:2]):
            known[stage.name] = own.state(index, known)
    if known and all(state.word == DONE for state in known.values()):
        return recipe.out / "score", [q.id for q in training]
    subset = training[: asked.questions]
    write_rows(out / QUESTIONS, map(_row, subset))
    section = replace(recipe.sample, questions=(str((out / QUESTIONS).resolve()),), limit=0)
    source = replace(recipe, out=out / "source", sample=section)
    Distillation(source, last="score").go("the same command", quiet)
    return source.out / "score", [q.id for q in subset]


def teacher_right(candidates: Path, ids: Sequence[str]) -> str:
    """In words, how often the teacher's responses to these questions are right; "" where no answer is known."""
    wanted, found = set(ids), dict[float, dict[str, list[bool]]]()
    for _, row in read_rows(candidates, without=("token_ids", "logprobs")):
        if row["id"] in wanted and row.get("answer") is not None:
            given = final_answer(row["text"])
            right = given is not None and is_right(given, row["answer"])
            found.setdefault(row["temperature"], {}).setdefault(row.get("task") or "all", []).append(right)
    said = []
    for temperature, by_task in sorted(found.items()):
        parts = ", ".join(f"{task} {percent(sum(right) / len(right))}" for task, right in sorted(by_task.items()))
        whole = [one for right in by_task.values() for one in right]
        said.append(f"{percent(sum(whole) / len(whole))} at T = {temperature:g}" + f" ({parts})" * (len(by_task) > 1))
    return f"the teacher's responses, right: {'; '.join(said)}" if said else ""


# ---------------------------------------------------------------------------------------------- the end


def conclude(
    recipe: DistillRecipe, groups: list[Group], found: list[Seed], ids: list[str],
    planned: dict[str, float], families: int,
) -> dict[str, Any]:  # fmt: skip
    """Of every group the comparisons, the verdict and what could be seen; of all, the lines to paste.

    `found`: of each seed, by design and run, what was measured.
    """
    result: dict[str, Any] = {"seeds": len(found), "groups": {}}
    lines = []
    for group in groups:
        names = [arm.name for arm in group.arms]
        right = {design: _right(group, found, design, ids) for design in DESIGNS}
        designs = {design: compare(names, right[design], families) for design in DESIGNS}
        verdict = recommend(names, designs, group.reference)
        seen = {d: detectable(spread(r), len(names), len(found), len(ids), families) for d, r in right.items()}
        result["groups"][group.name] = {
            "reference": group.reference, "verdict": asdict(verdict),
            "pass_at_1": {d: dict(zip(names, r.mean((1, 2)).tolist(), strict=True)) for d, r in right.items()},
            "tokens": {d: {a.name: float(np.mean([_of(s, d, group, a).tokens for s in found])) for a in group.arms}
                       for d in DESIGNS},
            "pairs": {design: list(map(asdict, pairs)) for design, pairs in designs.items()},
            "detectable": {"planned": planned[group.name], "measured": seen},
        }  # fmt: skip
        if verdict.best:
            lines.append(f"# {group.name}: {verdict.best}\n{paste(group, verdict.best, recipe)}")
        else:
            lines.append(f"# {group.name}: cannot tell; keep what the recipe has\n")
    return {**result, "paste": "\n".join(lines)}


def _right(group: Group, found: list[Seed], design: str, ids: list[str]) -> np.ndarray:
    """[arms, seeds, questions]"""
    return np.array([
        [[right[id] for id in ids] for right in (_of(seed, design, group, arm).right for seed in found)]
        for arm in group.arms
    ])  # fmt: skip


def _of(seed: Seed, design: str, group: Group, arm: Arm) -> Measured:
    """In `mix`, what the extra stages start from stands for no stage, in both designs."""
    if group.name == "mix" and not arm.extra:
        return replace(seed["samples"][arm.run], tokens=0)
    return seed[design][arm.run]


# ---------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dasd_engine.bakeoff", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("recipe", help="a TOML recipe of dasd_engine.distill")
    add("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    add("--budget", required=True, help="time for all of it, sampling included: 2h, 90m, 1h30m")
    add("--arms", default="rules,temperatures,mix", help="which groups of arms (default %(default)s)")
    add("--problems", nargs="+", default=[], metavar="NAME", help="development problems, as evaluate takes them "
        "(default: held out of the recipe's questions)")  # fmt: skip
    add("--development", type=int, default=200, metavar="N", help="development problems at most (default %(default)s)")
    add("--questions", type=int, default=1000, metavar="N", help="a seeded choice of so many is asked of the teacher, "
        "unless the recipe's have been sampled and scored (default %(default)s)")  # fmt: skip
    add("--out", type=Path, help="directory (default: the recipe's out/bakeoff)")
    add("--quiet", action="store_true", help="print nothing but errors")
    args = parser.parse_intermixed_args(arguments)
    recipe = load_distill_recipe(args.recipe, args.overrides)
    for name in ("development", "questions"):
        if getattr(args, name) < 2:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least 2")
    asked = Asked(
        parse_budget(args.budget), tuple(args.arms.split(",")), tuple(args.problems), args.development, args.questions
    )
    bakeoff(recipe, asked, args.out or recipe.out / "bakeoff", quiet=args.quiet)


if __name__ == "__main__":
    run_cli(main)

"""Does each part of the method work, in two small worlds? Every run of docs/ablations-plan.md, and its tables.

    python -m bench.ablations                         all of it: hours on two cores; started again, it goes on
    python -m bench.ablations --quick                 the same with few rows and two seeds, in minutes: no result
    python -m bench.ablations --dry-run               what it will do
    python -m bench.ablations --print                 the tables of docs/ablations.md, from bench/results/ablations.json

--out gets a directory for every run; OUT/ablations.json is what bench/results/ablations.json was copied from.
"""

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from bench.ablations.arms import SWEEP, runs
from bench.ablations.regimes import QUICK, REGIMES, Regime, Size, make_starts
from bench.ablations.results import begin, collect
from bench.ablations.runs import ask_teacher, begin_worker, measure
from bench.ablations.tables import print_tables
from dasd_engine.bakeoff_plan import duration
from dasd_engine.errors import run_cli
from dasd_engine.records import read_json, write_json

RESULTS = Path(__file__).parents[1] / "results" / "ablations.json"


def everything(regimes: tuple[Regime, ...], out: Path, size: Size, workers: int) -> None:
    """Each process works on one seed at a time; a seed begins when its student and the candidates are there."""
    for regime in regimes:
        regime.write_data(out, size)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=begin_worker) as pool:
        # Whoever asks the teacher has a recipe, and so a student.
        worlds = list(dict.fromkeys(regime.world for regime in regimes))
        students = {(regime.world, seed): None for regime in regimes for seed in regime.students(size)}
        wait([
            *(pool.submit(world.make_teachers, out) for world in worlds),
            *(pool.submit(make_starts, out, world, seed) for world, seed in students),
        ])  # fmt: skip
        wait([pool.submit(ask_teacher, regime, out) for regime in regimes])
        work = [(regime, step) for regime in regimes for step in (0, *regime.steps[1:])]
        work.sort(key=lambda item: item[1] > 0)  # the sweep comes last
        wait([
            pool.submit(measure, regime, out, seed, step, size)
            for regime, step in work for seed in regime.students(size)
        ])  # fmt: skip


def wait(work: list[Future[Any]]) -> None:
    """For all of it. What the first task that fails has raised is raised, and what is queued is cancelled: all but the
    one task that a pool of processes keeps ready."""
    try:
        for done in as_completed(work):
            done.result()
    except BaseException as error:
        for task in work:
            task.cancel()
        said = f"{type(error).__name__}: {error}; this ends when the tasks in hand have ended"
        print(said, file=sys.stderr, flush=True)
        raise


def print_plan(regimes: tuple[Regime, ...], size: Size) -> None:
    for regime in regimes:
        own, sweep = len(runs(regime.tables)), len(runs((SWEEP,))) * (len(regime.steps) - 1)
        print(f"{regime.name}: {regime.about}")
        print(f"  {len(regime.students(size))} seeds of {own} runs" + f" and {sweep} of the sweep" * bool(sweep)
              + f"; {size.of(regime.rows)} rows a stage, two sets of {size.problems} problems")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ablations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help="directory of all runs (default: runs/ablations, with --quick runs/ablations-quick)")
    add("--quick", action="store_true", help="few rows and seeds: whether it works, not what comes out")
    add("--workers", type=int, default=2, help="processes of one thread each (default %(default)s)")
    add("--regimes", nargs="+", choices=[r.name for r in REGIMES], default=[r.name for r in REGIMES])
    add("--dry-run", action="store_true", help="print the plan, run nothing")
    add("--print", action="store_true", help="print the tables of --results, run nothing")
    add("--results", type=Path, default=RESULTS, help="what --print reads (default: the committed ones)")
    args = parser.parse_args()
    if args.print:
        print_tables(read_json(args.results))
        return
    size = QUICK if args.quick else Size()
    regimes = tuple(regime for regime in REGIMES if regime.name in args.regimes)
    print_plan(regimes, size)
    if args.dry_run:
        return
    out = args.out or Path("runs/ablations-quick" if args.quick else "runs/ablations")
    began = time.monotonic()
    begin(regimes, out)
    everything(regimes, out, size, args.workers)
    found = collect(regimes, out, size)
    write_json(out / "ablations.json", found)
    print_tables(found)
    print(f"{out / 'ablations.json'}, after {duration(time.monotonic() - began)}")


if __name__ == "__main__":
    run_cli(main)

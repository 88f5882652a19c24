"""Train a student on its teacher's responses: recipe -> model -> plan -> steps -> exported Hugging Face directory.

    python -m dasd_engine.train                                        the packaged quickstart, a few minutes on a CPU
    python -m dasd_engine.train recipe.toml train.lr=1e-4 out=runs/a   a recipe with overrides
    torchrun --nproc-per-node 8 -m dasd_engine.train recipe.toml       the same over FSDP2

Run the same command again to go on from the newest checkpoint, at any number of ranks.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from dasd_engine import context_parallel, distributed, memory, metrics
from dasd_engine.checkpoint import Checkpointer, Progress
from dasd_engine.config import Recipe, describe, load_recipe, packaged
from dasd_engine.distributed import World
from dasd_engine.errors import InputError, run_cli
from dasd_engine.heap import keep_freed_memory, release_freed_memory
from dasd_engine.hf import init_weights, load_weights, read_config, save_model
from dasd_engine.masters import split_masters
from dasd_engine.model import Decoder
from dasd_engine.optim import learning_rate, make_optimizer, update
from dasd_engine.plan import StagePlan, Step, plan_stage
from dasd_engine.reader import SideStream, read_ahead
from dasd_engine.records import lock
from dasd_engine.run import (
    Stop,
    clear,
    evaluate_student,
    identity,
    open_data,
    print_plan,
    print_summary,
    write_run_files,
)
from dasd_kernels import gather_rows, linear_cross_entropy

NON_FINITE_LIMIT = 5  # such steps in a row end the run


def train(recipe: Recipe, world: World, *, dry_run: bool = False, overwrite: bool = False) -> Path | None:
    """Run every stage of `recipe`; returns the directory of the exported student, or None after a dry run.

    Raises:
        InputError: bad input, or `NON_FINITE_LIMIT` non-finite steps in a row.
        SystemExit: stopped by a signal, after saving.
    """
    out, display = recipe.out, metrics.Display(world.is_main)
    with lock(out) if world.is_main else contextlib.nullcontext(), Stop() as stop:
        if overwrite and not dry_run and world.is_main:
            clear(out)
        world.barrier()
        config = read_config(recipe.resolve(recipe.model.path))
        context_parallel.check(recipe.run.context_parallel, config, (stage.train.context for stage in recipe.stages))
        recipe, told = memory.settle(recipe, config, world)
        data = open_data(recipe, world, display)
        plans = [plan_stage(recipe, s, d, config, world.data_ranks) for s, d in zip(recipe.stages, data, strict=True)]
        print_plan(recipe, config, plans, told, world, display)
        if dry_run:
            return None
        return Run(recipe, world, plans, display, stop).go()


class Run:
    """One training run: its model, where it stands, and how it gets from there to the end."""

    def __init__(
        self, recipe: Recipe, world: World, plans: list[StagePlan], display: metrics.Display, stop: Stop
    ) -> None:
        self.recipe, self.world, self.plans, self.display, self.stop = recipe, world, plans, display, stop
        self.source = recipe.resolve(recipe.model.path)
        self.config = read_config(self.source)
        self.dtype = distributed.compute_dtype(recipe.run, world.device)
        self.peak = metrics.peak_flops(world.device, self.dtype) * world.size
        self.stopping = False
        self.bad_packs: list[list[int]] = []  # documents of the latest non-finite steps in a row
        traced = recipe.run.profile
        self.profiler = metrics.profile(traced, recipe.out / f"trace-rank{world.rank}.json") if traced else None

        with torch.device("meta"):
            model = Decoder(self.config)
        model.attention_backend = recipe.run.attention
        self.model = distributed.parallelize(model, world, recipe.run, self.dtype)
        self.model.to_empty(device=world.device)
        self.checkpoints = Checkpointer(
            recipe.out / "checkpoints",
            world,
            keep=recipe.checkpoint.keep,
            identity=identity(recipe, self.config, plans),
        )
        found = self.checkpoints.latest()
        self.progress = found[1] if found else Progress()
        if found:
            self.optimizer = self.new_optimizer()
            self.checkpoints.load(found[0], self.model, self.optimizer, self.progress)
            display.say(f"going on from {found[0]} (step {self.progress.total_step})")
        elif recipe.model.init == "random":
            init_weights(self.model, recipe.seed)
        else:
            load_weights(self.model, self.source)
        if world.alone and self.dtype == torch.bfloat16:
            split_masters(self.model)
        if not found:
            self.optimizer = self.new_optimizer()  # only now: moments take the place of weights that were split
        release_freed_memory()

    def go(self) -> Path:
        write_run_files(self.recipe, self.world)
        if self.progress.total_step == 0:
            evaluate_student(self.recipe, None, "before", self.world, self.display)
        self.log = (
            metrics.MetricsLog(self.recipe.out, resume_after=self.progress.total_step) if self.world.is_main else None
        )
        try:
            last = self.run_stages()
        finally:
            if self.log:
                self.log.close()
        evaluate_student(self.recipe, last, "after", self.world, self.display)
        print_summary(self.recipe, last, self.progress, self.display)
        return last

    def run_stages(self) -> Path:
        """The stages that are not yet done, each exported at its end; returns the last one's directory."""
        export = self.recipe.out / "export"
        while self.progress.stage < len(self.plans):
            plan = self.plans[self.progress.stage]
            self.run_stage(plan)
            self.save(final=True)
            if self.stopping:
                self.display.say(
                    f"stopped after step {self.progress.total_step}; run the same command again to go on from there"
                )
                sys.exit(128 + self.stop.signal)
            directory = export / plan.stage.name
            if self.world.sum([float(self.world.is_main and not directory.exists())])[0]:
                save_model(self.model, directory, dtype=self.dtype, source=self.source)
            self.next_stage()
        return export / self.plans[-1].stage.name

    def run_stage(self, plan: StagePlan) -> None:
        """The steps of one stage that are not yet done, or those up to a signal."""
        p = self.progress
        self.model.train()
        side, left = SideStream(self.world.device), plan.places(p.epoch, p.step)
        steps = read_ahead(lambda place: side.run(lambda: self.read(plan, *place)), left)
        with self.display.stage(plan.stage.name, plan.steps, p.stage_step), contextlib.closing(steps):
            for (p.epoch, p.step), (step, made), waited in steps:
                side.receive(step.batches, made)
                self.step(plan, step, waited)
                if self.stopping:
                    return
                if p.total_step % self.recipe.checkpoint.every == 0 and p.stage_step < plan.steps:
                    self.save()

    def next_stage(self) -> None:
        """Go on from these weights with a fresh optimizer and schedule."""
        p = self.progress
        p.stage, p.epoch, p.step, p.stage_step, p.updates = p.stage + 1, 0, 0, 0, 0
        if p.stage < len(self.plans):
            del self.optimizer  # before the next one's moments are made
            self.optimizer = self.new_optimizer()

    def new_optimizer(self) -> torch.optim.AdamW:
        options = self.plans[self.progress.stage].stage.train
        return make_optimizer(self.model, options, compact=self.recipe.run.moments == "compact")

    def step(self, plan: StagePlan, step: Step, waited: float) -> None:
        """One optimizer step: loss = sum over its trained tokens ÷ their number, over all packs and ranks."""
        p, o, start = self.progress, plan.stage.train, time.perf_counter() - waited
        loss = self.accumulate(step)
        squares = distributed.squared_norm(self.model) / self.recipe.run.replicas
        total, squares, stops = self.world.sum([loss.item(), squares, float(self.stop.requested)])
        self.stopping = stops > 0
        grad_norm, rate = math.sqrt(squares), learning_rate(p.stage_step, plan.steps, o)

        if math.isfinite(total) and math.isfinite(grad_norm):
            update(self.optimizer, rate, grad_norm, o.clip)
            p.updates += 1
            self.bad_packs.clear()
        else:
            p.skipped += 1
            self.bad_packs.append(step.documents.tolist())
        self.optimizer.zero_grad(set_to_none=True)

        seconds = time.perf_counter() - start
        self.report(plan, step, total, grad_norm, rate, seconds, waited)
        p.step, p.stage_step, p.total_step = p.step + 1, p.stage_step + 1, p.total_step + 1
        if self.profiler:
            self.profiler.step()
        if len(self.bad_packs) >= NON_FINITE_LIMIT:
            self.give_up(plan)

    def read(self, plan: StagePlan, epoch: int, step: int) -> Step:
        """This rank's part of a step, in the reader's thread."""
        equal, world = self.recipe.run.gather == "layer", self.world
        read = plan.read(epoch, step, world.data_rank, world.device, equal=equal)
        return replace(read, batches=[world.part_of(batch) for batch in read.batches])

    def accumulate(self, step: Step) -> torch.Tensor:
        """Forward and backward over this rank's packs of the step: its share of the loss."""
        loss = torch.zeros((), dtype=torch.float64, device=self.world.device)
        distributed.begin_step(self.model, len(step.batches))
        for i, batch in enumerate(step.batches):
            distributed.last_micro_step(self.model, i == len(step.batches) - 1, self.recipe.run)
            hidden = self.model(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen)
            rows, labels = gather_rows(hidden, batch.valid), batch.labels[batch.valid]
            share = linear_cross_entropy(rows, self.model.head_weight, labels, reduction="sum") / step.trained
            share.backward()
            loss += share.detach()
        return loss

    def report(
        self, plan: StagePlan, step: Step, loss: float, norm: float, rate: float, seconds: float, waited: float
    ) -> None:
        p = self.progress
        p.tokens, p.seconds = p.tokens + step.tokens, p.seconds + seconds
        if self.log is None:
            return
        row = {
            "step": p.total_step + 1, "stage": plan.stage.name, "epoch": p.epoch, "stage_step": p.stage_step + 1,
            "loss": loss, "grad_norm": norm, "lr": rate, "tokens": step.tokens, "trained_tokens": step.trained,
            "tokens_per_s": step.tokens / seconds, "trained_tokens_per_s": step.trained / seconds,
            "mfu": step.flops / seconds / self.peak, "fill": step.fill, "balance": step.balance,
            "memory_bytes": metrics.peak_memory(self.world.device), "wait_s": waited, "step_s": seconds,
            "skipped": p.skipped,
        }  # fmt: skip
        self.log.write(row)
        self.display.step(row, plan.steps)

    def save(self, *, final: bool = False) -> None:
        """Write a checkpoint in the background; `final` waits for it, and then a failure to write ends the run."""
        try:
            self.checkpoints.save(self.model, self.optimizer, self.progress)
            if final:
                self.checkpoints.wait()
        except InputError as error:
            if final:
                raise
            self.display.say(f"warning: {error}; training goes on")

    def give_up(self, plan: StagePlan) -> None:
        path = self.recipe.out / "nonfinite.json"
        if self.world.is_main:
            path.write_text(
                json.dumps({"stage": plan.stage.name, "step": self.progress.total_step, "documents": self.bad_packs})
            )
        raise InputError(
            f"loss or gradient was not finite in {NON_FINITE_LIMIT} steps in a row up to step "
            f"{self.progress.total_step} of stage {plan.stage.name}; their document ids are in {path}: "
            "look at that data, or lower `lr`"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dasd_engine.train", description=__doc__, epilog="recipe keys:\n" + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("recipe", nargs="?", help="a TOML recipe; default: the packaged quickstart")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe keys to change, such as train.lr=1e-4"
    )
    parser.add_argument("--dry-run", action="store_true", help="prepare the data, print the plan, train nothing")
    parser.add_argument(
        "--overwrite", action="store_true", help="delete an earlier run in `out` instead of going on with it"
    )
    args = parser.parse_intermixed_args()
    if args.recipe and "=" in args.recipe and not Path(args.recipe).exists():
        args.recipe, args.overrides = None, [args.recipe, *args.overrides]
    recipe = load_recipe(args.recipe or packaged("quickstart.toml"), args.overrides)
    keep_freed_memory()
    with distributed.start(recipe.run) as world:
        train(recipe, world, dry_run=args.dry_run, overwrite=args.overwrite)


if __name__ == "__main__":
    run_cli(main)

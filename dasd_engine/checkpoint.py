"""Training state on disk: written in the background, complete or absent, readable at another world size.

A checkpoint is a directory `step-00000120/` of torch.distributed.checkpoint files (fp32 weights, and AdamW's moments)
and `state.json` (where the run stands). It is written under a temporary name and renamed when every rank has finished,
so a killed or failed write never looks complete. DCP's index is a pickle: resume only from runs you trust.
"""

import functools
import json
import os
import shutil
import threading
import warnings
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from dasd_engine.distributed import World
from dasd_engine.errors import InputError
from dasd_engine.masters import master
from dasd_engine.model import Decoder
from dasd_engine.records import sync


@dataclass
class Progress:
    """Where a run stands: `stage`, `epoch` and `step` (of the epoch) are the next ones to do."""

    stage: int = 0
    epoch: int = 0
    step: int = 0
    stage_step: int = 0  # steps done in this stage, over its epochs
    total_step: int = 0  # steps done in this run
    updates: int = 0  # optimizer steps of this stage: non-finite steps are not among them
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0  # non-finite steps of this run


class Checkpointer:
    """Writes and reads the checkpoints of one run; keeps the newest `keep`."""

    def __init__(self, directory: Path, world: World, *, keep: int, identity: dict[str, str]) -> None:
        """`identity` names what must not change between a checkpoint and the run that resumes it."""
        self.directory, self.world, self.keep, self.identity = directory, world, keep, identity
        self._pending: tuple[Future, Path, Path] | None = None
        self._completed = threading.Event()  # set by the writing thread of the first rank
        self._problem: OSError | None = None
        self.last: Path | None = None
        if world.is_main:
            directory.mkdir(parents=True, exist_ok=True)
            for leftover in directory.glob("*.tmp"):
                shutil.rmtree(leftover)
        world.barrier()

    def save(self, model: Decoder, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Start writing in the background. Collective. A previous write is finished first."""
        self.wait()
        final = self.directory / f"step-{progress.total_step:08d}"
        if final.exists():
            return
        temporary = final.with_suffix(".tmp")
        state = {"identity": self.identity, "progress": asdict(progress), "world_size": self.world.size}
        if self.world.is_main:
            temporary.mkdir(parents=True, exist_ok=True)
            (temporary / "state.json").write_text(json.dumps(state, indent=1) + "\n")
        self.world.barrier()
        future = dcp.async_save(
            _tensors(model, optimizer, progress), checkpoint_id=temporary, process_group=self.world.writer_group
        )
        assert isinstance(future, Future)
        self._pending = (future, temporary, final)
        if self.world.is_main:
            # The first rank coordinates the write, so when its future is done every rank's files are there.
            self._completed.clear()
            future.add_done_callback(functools.partial(self._complete, temporary, final))

    def wait(self) -> None:
        """Finish the write under way, if any. Collective.

        Raises:
            InputError: the write failed (a full disk, say); the earlier checkpoints are untouched.
        """
        if self._pending is None:
            return
        (future, temporary, final), self._pending = self._pending, None
        problem = future.exception()
        if self.world.is_main:
            self._completed.wait()
            problem = problem or self._problem
        if self.world.sum([float(problem is not None)])[0]:
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            kept = f"{self.last} stays valid" if self.last else "no earlier checkpoint exists"
            reason = str(problem or "another rank failed").strip().splitlines()[-1]
            raise InputError(
                f"checkpoint {final.name} was not written ({reason}); {kept}; free disk space under {self.directory}"
            )
        self.last = final

    def _complete(self, temporary: Path, final: Path, future: Future) -> None:
        """In the writing thread of the first rank: make the checkpoint count, drop the oldest."""
        self._problem = None
        try:
            if future.exception() is None:
                _sync(temporary)
                os.rename(temporary, final)
                _sync(self.directory)
                for old in completed(self.directory)[: -self.keep]:
                    shutil.rmtree(old, ignore_errors=True)  # one that stays is tried again with the next
        except OSError as error:
            self._problem = error
        finally:
            self._completed.set()

    def latest(self) -> tuple[Path, Progress] | None:
        """The newest complete checkpoint and where it stands, or None.

        Raises:
            InputError: it belongs to another model, data set or recipe; says which.
        """
        found = completed(self.directory)
        if not found:
            return None
        self.last = found[-1]
        try:
            state = json.loads((self.last / "state.json").read_text())
            progress, identity = Progress(**state["progress"]), state["identity"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{self.last}/state.json is damaged ({error}); remove that directory to go on from an earlier one"
            ) from None
        changed = [k for k in self.identity if identity.get(k, self.identity[k]) != self.identity[k]]  # older: fewer
        if changed:
            details = "; ".join(f"{k}: was {identity[k]}, now {self.identity[k]}" for k in changed)
            raise InputError(
                f"{self.last} is of another run ({details}); undo the change, choose another `out`, or pass --overwrite"
            )
        return self.last, progress

    def load(self, path: Path, model: Decoder, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Read weights and moments into `model` and `optimizer`, written at any world size. Collective."""
        _read(path, _tensors(model, optimizer, progress), self.world.host_group)
        for state in optimizer.state.values():
            state["step"].fill_(progress.updates)


def load_model_only(path: Path, model: Decoder) -> None:
    """Read just the weights of a checkpoint into a model of this process, without a process group."""
    _read(path, {"model": {name: p.detach() for name, p in model.named_parameters()}}, None)


def completed(directory: Path) -> list[Path]:
    """The complete checkpoints under `directory`, oldest first."""
    return sorted(p for p in directory.glob("step-*") if p.is_dir() and p.suffix != ".tmp")


def _tensors(
    model: Decoder, optimizer: torch.optim.Optimizer, progress: Progress
) -> dict[str, dict[str, torch.Tensor]]:
    """Weights, and moments where there has been a step, by parameter name."""
    named = dict(model.named_parameters())
    state = {"model": {n: master(p) for n, p in named.items()}}
    if progress.updates:
        kept = {n: optimizer.state[p] for n, p in named.items()}
        for moment in sorted(next(iter(kept.values())).keys() - {"step"}):
            state[moment] = {n: tensors[moment] for n, tensors in kept.items()}
    return state


def _read(path: Path, state: dict[str, dict[str, torch.Tensor]], group: dist.ProcessGroup | None) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked for, without a group
            dcp.load(state, checkpoint_id=path, process_group=group, no_dist=group is None)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise InputError(
            f"{path} cannot be read ({reason}); remove that directory to go on from an earlier one"
        ) from error


def _sync(directory: Path) -> None:
    """Flush a directory and its files to the disk, so that a rename after it is never newer than the contents."""
    for path in [*directory.iterdir(), directory]:
        if path.is_file() or path == directory:
            sync(path)

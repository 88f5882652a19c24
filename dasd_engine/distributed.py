"""Ranks, meshes and FSDP2: all that the training loop needs of parallelism, applied to the model from outside.

One process without torchrun is a world of one, so that there is a single code path.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dasd_engine.config import RunOptions
from dasd_engine.context_parallel import part_of
from dasd_engine.errors import InputError
from dasd_engine.model import Decoder
from dasd_engine.recompute import checkpoint_activations
from dasd_kernels import PackedBatch
from dasd_kernels.pointwise import sum_of_squares


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    host_group: dist.ProcessGroup  # gloo: barriers and small host-side sums, beside the training traffic
    writer_group: dist.ProcessGroup  # gloo: of the checkpoint writers' threads alone, which run while steps go on
    context_group: dist.ProcessGroup | None = None  # neighbours that share this rank's packs; None where it has its own
    host_ranks: int = 1  # ranks on this machine

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """One process on a CPU: nothing crosses ranks, and FSDP would only copy."""
        return self.size == 1 and self.device.type == "cpu"

    @property
    def context_ranks(self) -> int:
        return self.context_group.size() if self.context_group else 1

    @property
    def data_ranks(self) -> int:
        """How many ranks, or groups of them, have packs of their own."""
        return self.size // self.context_ranks

    @property
    def data_rank(self) -> int:
        return self.rank // self.context_ranks

    def part_of(self, pack: PackedBatch) -> PackedBatch:
        """What of `pack` is this rank's to compute: all of it, or its part of the tokens."""
        return part_of(pack, self.rank % self.context_ranks, self.context_ranks) if self.context_group else pack

    def sum(self, values: list[float]) -> list[float]:
        """Sum over ranks of a few host numbers, in float64."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.host_group)
        return total.tolist()

    def least(self, value: int) -> int:
        """The smallest value of any rank."""
        result = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(result, dist.ReduceOp.MIN, group=self.host_group)
        return int(result)

    def barrier(self) -> None:
        dist.barrier(group=self.host_group)


@contextlib.contextmanager
def start(options: RunOptions) -> Iterator[World]:
    """Join the process group that torchrun describes, or make a world of one; leave it at the end."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    for key in ("replicas", "context_parallel"):
        if size % getattr(options, key):
            raise InputError(f"run.{key} = {getattr(options, key)} does not divide the {size} ranks")
    if options.threads < 0:
        raise InputError(f"threads = {options.threads}: must be at least 0")
    if options.threads:
        torch.set_num_threads(options.threads)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if size > 1:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        shape: tuple[int, ...] = (size,)
        names: tuple[str, ...] = ("shard",)
        if options.replicas > 1:
            shape, names = (options.replicas, size // options.replicas), ("replicate", "shard")
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        # Other ranks wait here while the first one evaluates or writes, so the default half hour is too short.
        host_group, writer_group = (dist.new_group(backend="gloo", timeout=timedelta(hours=6)) for _ in range(2))
        context_group = None
        if options.context_parallel > 1:
            shape = (size // options.context_parallel, options.context_parallel)
            groups = init_device_mesh(device.type, shape, mesh_dim_names=("data", "context"))
            context_group = groups.get_group("context")
        host_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        yield World(rank, size, device, mesh, host_group, writer_group, context_group, host_ranks)
    finally:
        dist.destroy_process_group()


def compute_dtype(options: RunOptions, device: torch.device) -> torch.dtype:
    """The dtype of forward and backward. A CPU without bf16 instructions multiplies bf16 100 times slower than fp32."""
    if options.compute != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[options.compute]
    native = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def parallelize(model: Decoder, world: World, options: RunOptions, dtype: torch.dtype) -> Decoder:
    """Checkpoint, compile and, unless it is alone, shard `model`, block by block; embedding, last norm and head form
    the root's group.

    Gradients are summed over ranks, never averaged: the loss already carries the step's share of each token. So ranks
    that share a pack need no mesh of their own: each has gradients of its tokens, and all ranks shard the model.
    """
    assert options.gather != "auto", "memory.settle decides"
    model.context_group = world.context_group
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    keep = options.gather == "step"
    for layer in model.layers:
        checkpoint_activations(layer, options.activation_checkpointing)
        if options.compile:
            layer.compile()
        if not world.alone:
            fully_shard(layer, mesh=world.mesh, mp_policy=policy, reshard_after_forward=not keep)
    if world.alone:
        model.embed_tokens.in_place = model.config.tie_word_embeddings
        return model
    fully_shard(model, mesh=world.mesh, mp_policy=policy, reshard_after_forward=False)
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]  # the root, then the blocks
    for module, following in zip(modules, [*modules[1:], None], strict=True):
        if world.size > 1:  # alone, FSDP divides by nothing, and by 1.0 in a pass of its own
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        if following is not None:  # its gather starts before this one computes; backward does so by itself
            module.set_modules_to_forward_prefetch([following])
    return model


def begin_step(model: Decoder, micro_steps: int) -> None:
    """Where parameters themselves are bf16, gradients of several micro-steps add up in fp32, as FSDP adds them."""
    for p in model.parameters():
        if p.dtype == torch.bfloat16:
            p.grad_dtype = torch.float32 if micro_steps > 1 else torch.bfloat16


def last_micro_step(model: Decoder, is_last: bool, options: RunOptions) -> None:
    """At the step's last micro-step only, gradients cross ranks and parameters gathered for the step are freed.

    Where parameters are gathered a layer at a time, gradients are not held whole either, in fp32 twice the parameters'
    size: each micro-step leaves them summed over shards, and the last one sums them over replicas.
    """
    if not isinstance(model, FSDPModule):  # alone
        return
    if options.gather == "step":
        model.set_requires_gradient_sync(is_last)
        model.set_is_last_backward(is_last)
        model.set_reshard_after_backward(is_last)
    else:
        model.set_requires_all_reduce(is_last)


def squared_norm(model: Decoder) -> float:
    """Sum of the squares of this rank's shards of the gradients. In float64, so that how parameters are cut leaves no
    trace in the norm, and two ranks clip by the same factor as one: at a high learning rate a last bit grows."""
    return sum(sum_of_squares(local(p.grad)) for p in model.parameters() if p.grad is not None)


def local(t: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor that FSDP cut, or all of it."""
    return t.to_local() if isinstance(t, DTensor) else t


def first_weight(p: torch.Tensor) -> int:
    """The number, within a parameter, of the first weight of this rank's shard; FSDP cuts into rows."""
    if not isinstance(p, DTensor):
        return 0
    cut = next(i for i, placement in enumerate(p.placements) if placement.is_shard())
    rows = math.ceil(len(p) / p.device_mesh.size(cut)) * p.device_mesh.get_local_rank(cut)
    return min(rows, len(p)) * (p.numel() // len(p))

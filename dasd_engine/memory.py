"""What a rank will hold at its fullest, known before the first step: whether it fits, and which knob helps if not.

    python -m dasd_engine.memory MODEL --ranks 8 --context 65536 --gib 79.6     every choice for a device not here

States follow from the parameters' number. Activations are counted as the values that a block's backward reads, each
once in the compute dtype; what kernels hold besides is not known here, so that part is an estimate. How near it comes
to measured peaks stands in docs/training.md.
"""

import argparse
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dasd_engine import context_parallel
from dasd_engine.config import Recipe, RunOptions
from dasd_engine.distributed import World, compute_dtype
from dasd_engine.errors import InputError, run_cli
from dasd_engine.model import Decoder
from dasd_engine.model_config import ModelConfig, read_config

GIB = 2**30
CHUNK = {"cuda": 1 << 30, "cpu": 224 << 20}  # most bytes of logits at a time, as dasd_kernels has them
USABLE = 0.92  # of a device's memory: the rest is the allocator's gaps, the context of CUDA and of NCCL


@dataclass(frozen=True)
class Setting:
    """What an estimate depends on besides the model."""

    run: RunOptions
    ranks: int
    context: int
    packs_per_step: int
    dtype: torch.dtype
    device: str  # "cuda" or "cpu"

    @property
    def alone(self) -> bool:
        """As World.alone: nothing is gathered."""
        return self.ranks == 1 and self.device == "cpu"


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank, by what they are for."""

    masters: int  # fp32 weights, this rank's shard
    moments: int  # AdamW's two
    gathered: int  # parameters in the compute dtype
    gradients: int  # whole over a step, or this rank's shard, or what outgrows the activations; and of blocks under way
    activations: int  # kept from forward to backward
    block: int  # of the one block that backward is in: what it computes again, and gradients of activations
    loss: int  # the head's fp32 gradient, the gradient of the hidden states, a chunk of logits
    checkpoint: int  # the copy that is written in the background, where it is in the same memory

    @property
    def states(self) -> int:
        """The part that is arithmetic, not an estimate."""
        return self.masters + self.moments + self.gathered + self.gradients

    @property
    def total(self) -> int:
        """The fullest moment: all activations, and the loss or the backward pass of the last block."""
        return self.states + self.activations + max(self.block, self.loss) + self.checkpoint

    def __str__(self) -> str:
        parts = [f"{name} {size / GIB:,.2f}" for name, size in vars(self).items() if size >= 0.005 * GIB]
        return f"{self.total / GIB:,.2f} GiB a rank ({', '.join(parts)}; of block and loss the larger counts)"


def estimate(config: ModelConfig, s: Setting) -> Estimate:
    """Bytes of a rank. `s.run.gather` must be decided."""
    root, block = parameter_counts(config)
    size = root + config.num_hidden_layers * block
    shards, item = s.ranks // s.run.replicas, s.dtype.itemsize
    moments = {"fp32": 8, "compact": 3}[s.run.moments]
    micro_steps = math.ceil(s.packs_per_step * s.run.context_parallel / s.ranks)
    tokens = s.context // s.run.context_parallel

    whole = s.run.gather == "step"
    kept, again, of_activations = block_values(config, s.run)
    activations = item * tokens * (config.num_hidden_layers * kept + 3 * config.hidden_size)
    if s.alone and micro_steps == 1:  # gradients come as activations go, as backward makes them
        gradients = max(0, item * size - activations)
    else:
        # One micro-step hands each block's gradients on at once; several add up in fp32, whole, until the last.
        summed = 4 * size if whole and micro_steps > 1 else 4 * size // shards
        gradients = summed + item * root + (item + 4) * block
        if s.alone and item < 4:  # each is cast whole before it is added
            gradients += 4 * root
    gathered = item * (size if whole else root + 2 * block)  # a layer at a time: this one and the next
    return Estimate(
        masters=4 * size // shards,  # alone, in two halves, of which one is what blocks read
        moments=moments * size // shards,
        gathered=0 if s.alone else gathered,
        gradients=gradients,
        activations=activations,
        block=item * tokens * (again + of_activations),
        loss=loss_bytes(config, tokens, s.dtype, s.device),
        checkpoint=(4 + moments) * size // shards if s.device == "cpu" else 0,
    )


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """Of embedding, last norm and head, which are gathered together, and of a block."""
    with torch.device("meta"):
        model = Decoder(replace(config, num_hidden_layers=1))
    block = sum(p.numel() for p in model.layers[0].parameters())
    return sum(p.numel() for p in model.parameters()) - block, block


def block_values(config: ModelConfig, run: RunOptions) -> tuple[int, int, int]:
    """Values a token that a block keeps for its backward, that it computes again there, and of gradients meanwhile."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    normed = q + kv if config.qk_norm else 0
    # Two norms keep input and output; attention q, k, v and its output; the MLP gate, up and their product.
    everything = 4 * hidden + normed + 2 * q + 2 * kv + 3 * inner
    inputs = everything - 2 * hidden - inner  # without what norms and SwiGLU give, made again one at a time
    kept = {"none": everything, "selective": inputs, "full": hidden}[run.activation_checkpointing]
    again = {"none": 0, "selective": inner, "full": everything}[run.activation_checkpointing]
    sent = 0
    if run.context_parallel > 1:  # sent and received, once each; fewer key-value heads than ranks are copied
        sent = 2 * (q + 2 * max(kv, run.context_parallel * config.head_dim))
    return kept, again, 3 * inner + 2 * hidden + sent


def loss_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype, device: str) -> int:
    """Of linear_cross_entropy: the gradient of the hidden states, a chunk of logits, and the head's gradient in fp32.
    On a CPU one chunk may be as large as both, and the head's gradient lies over a chunk that is not much larger, or,
    in fp32 after several chunks, where they have added it up."""
    vocab, hidden, item = config.vocab_size, config.hidden_size, dtype.itemsize
    logits, head = tokens * (vocab * item + hidden * (2 * item + 4)), 4 * vocab * hidden
    if device != "cpu":
        return item * tokens * hidden + head + min(logits, CHUNK[device])
    whole = logits <= CHUNK["cpu"] + head
    chunk, gradient = logits if whole else CHUNK["cpu"], item * vocab * hidden
    if item == 4 and not whole:
        return item * tokens * hidden + chunk
    shared = min(chunk, gradient) if chunk <= 2.25 * gradient else 0
    return item * tokens * hidden + chunk - shared + (0 if whole else head)


def settle(recipe: Recipe, config: ModelConfig, world: World) -> tuple[Recipe, list[str]]:
    """The recipe with `gather` decided, and what to tell of memory.

    `auto` looks at the memory that a device has, not at what is free now, so that a run decides the same every time.

    Raises:
        InputError: weights, moments, gradients and gathered parameters alone are more than the device has.
    """
    total, free = (world.least(size) for size in device_memory(world))
    options = max((stage.train for stage in recipe.stages), key=lambda train: train.context)
    dtype = compute_dtype(recipe.run, world.device)
    setting = Setting(recipe.run, world.size, options.context, options.packs_per_step, dtype, world.device.type)
    if recipe.run.gather == "auto":
        setting = replace(setting, run=replace(recipe.run, gather="step"))
        if not world.alone and estimate(config, setting).total > USABLE * total:
            setting = replace(setting, run=replace(recipe.run, gather="layer"))
    found = estimate(config, setting)
    where = "GPU" if world.device.type == "cuda" else "memory, shared by the ranks of this machine,"
    lines = [f"memory: about {found}; gather = {setting.run.gather}"]
    if found.total > USABLE * free:
        lines.append(f"warning: the {where} has {free / GIB:,.1f} GiB free a rank; {remedies(config, setting, free)}")
    if found.states > total:
        raise InputError(
            f"{recipe.path}: {found.states / GIB:,.1f} GiB of weights, moments and gradients do not fit: "
            f"the {where} has {total / GIB:,.1f} GiB a rank; {remedies(config, setting, total)}"
        )
    return replace(recipe, run=setting.run), lines


def device_memory(world: World) -> tuple[int, int]:
    """Bytes that a rank can have, and that are free for it now: its GPU's, or its share of the machine's."""
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        return total, free
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if meminfo.exists():
        facts = dict(line.split(":") for line in meminfo.read_text().splitlines())
        total, free = (1024 * int(facts[key].split()[0]) for key in ("MemTotal", "MemAvailable"))
    else:  # macOS does not say what is free
        total = free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total, free = min(total, int(text)), min(free, int(text))
    return total // world.host_ranks, free // world.host_ranks


def remedies(config: ModelConfig, setting: Setting, memory: int) -> str:
    """The knobs that would make it fit, the cheapest first, none that are more than others that do."""
    fitting: list[dict[str, Any]] = []
    texts = []
    for knobs, other in alternatives(config, setting):
        size = estimate(config, other).total
        if size > USABLE * memory or any(found.items() <= knobs.items() for found in fitting):
            continue
        fitting.append(knobs)
        shorter = f" and documents of at most train.context={other.context}" if other.context < setting.context else ""
        texts.append(" ".join(f"run.{k}={v}" for k, v in knobs.items()) + shorter + f" ({size / GIB:,.1f} GiB)")
        if "context_parallel" in knobs or shorter:  # the dearer ones come last: one of them is enough
            break
    if not fitting:
        return "nothing here makes it fit: use more ranks or a smaller student"
    return "it would fit with " + ", or ".join(texts)


def alternatives(config: ModelConfig, s: Setting) -> Iterator[tuple[dict[str, Any], Setting]]:
    """Keys of [run] to change, and settings that need less memory by that, by what they cost."""
    modes = ["none", "selective", "full"]
    dearer = modes[modes.index(s.run.activation_checkpointing) + 1 :]
    changes: list[dict[str, Any]] = [{"activation_checkpointing": mode} for mode in dearer]
    least: dict[str, Any] = {"activation_checkpointing": "full", "moments": "compact"}
    if s.run.gather == "step" and not s.alone:
        changes = [{"gather": "layer"}, *changes, *({"gather": "layer"} | change for change in changes)]
        least["gather"] = "layer"
    if s.run.moments == "fp32":
        changes += [{"moments": "compact"}, *(change | {"moments": "compact"} for change in changes)]
    if s.run.replicas > 1:
        least["replicas"] = 1
        changes.append({"replicas": 1})
    for count in range(s.run.context_parallel + 1, s.ranks + 1):
        if s.ranks % count == 0 and context_parallel.shares(count, config) and s.context % count == 0:
            changes.append(least | {"context_parallel": count})
    for change in changes:
        yield change, replace(s, run=replace(s.run, **change))
    smaller = replace(s, run=replace(s.run, **least))
    while smaller.context > 1024:
        smaller = replace(smaller, context=smaller.context // 2)
        yield least, smaller


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dasd_engine.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face directory; its config.json is enough")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--context", type=int, default=65536, help="tokens of a pack")
    parser.add_argument("--packs", type=int, default=64, help="packs of a step over all ranks")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--context-parallel", type=int, default=1)
    parser.add_argument("--moments", choices=("fp32", "compact"), default="fp32", help="as run.moments")
    parser.add_argument("--gib", type=float, default=79.6, help="memory of a device; an H100 has 79.6")
    args = parser.parse_args()
    config = read_config(args.model)
    for name in ("ranks", "context", "packs", "replicas", "context_parallel"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.ranks % args.replicas or args.ranks % args.context_parallel:
        raise InputError(f"--replicas and --context-parallel must divide the {args.ranks} ranks")
    context_parallel.check(args.context_parallel, config, [args.context])
    row = "{:<7} {:<10} {:>8} {:>8} {:>9} {:>10} {:>12} {:>6} {:>6} {:>7}  {}"
    names = ("gather", "recomputed", *Estimate.__dataclass_fields__)
    print(f"GiB a rank of {args.ranks}, bf16 on CUDA, {args.packs} packs of {args.context:,} tokens a step")
    print(row.format(*names[:-1], "total", ""))
    for gather in ("step", "layer"):
        for mode in ("none", "selective", "full"):
            run = RunOptions(
                gather=gather, activation_checkpointing=mode, replicas=args.replicas,
                context_parallel=args.context_parallel, moments=args.moments,
            )  # fmt: skip
            found = estimate(config, Setting(run, args.ranks, args.context, args.packs, torch.bfloat16, "cuda"))
            sizes = [f"{size / GIB:.1f}" for size in list(vars(found).values())[:-1]]
            fits = found.total <= USABLE * args.gib * GIB
            verdict = "fits" if fits else f"more than {USABLE:.0%} of {args.gib} GiB"
            print(row.format(gather, mode, *sizes, f"{found.total / GIB:.1f}", verdict))


if __name__ == "__main__":
    run_cli(main)

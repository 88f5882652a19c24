"""One rank of the tests that shard a model: python hf_rank.py RANK WORLD DIRECTORY... See test_hf_sharded.py.

For the model in each DIRECTORY/source writes rank<r>.pt with what this rank saw, and with the others saved/.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny_models import pack
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from dasd_engine import Decoder, hf, read_config


def sharded(path: Path, shape: tuple[int, ...], names: tuple[str, ...]) -> Decoder:
    """The architecture of `path` on meta, sharded a block, then given memory with undefined contents."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    with torch.device("meta"):
        model = Decoder(read_config(path))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    model.to_empty(device="cpu")
    return model


def whole(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: parameter.full_tensor() for name, parameter in model.named_parameters()}


def rows_read(model: Decoder, path: Path) -> dict[str, int]:
    """Loads, and counts the rows of each tensor that were read."""
    counts: dict[str, int] = {}
    safe_open = hf.safe_open

    class Counting:
        def __init__(self, *args: Any, **options: Any):
            self.file = safe_open(*args, **options)

        def __enter__(self) -> "Counting":
            self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def get_slice(self, name: str) -> Any:
            class Slice:
                def __getitem__(_, rows: slice) -> torch.Tensor:
                    counts[name] = rows.stop - rows.start
                    return self.file.get_slice(name)[rows]

            return Slice()

    hf.safe_open = Counting
    hf.load_weights(model, path)
    hf.safe_open = safe_open
    return counts


def dtypes_in_mixed_precision(path: Path) -> list[torch.dtype]:
    """Of the activations and of the rotary table that attention sees in a bf16 forward over fp32 shards."""
    model = Decoder(read_config(path))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    seen: list[torch.dtype] = []
    attention = model.layers[1].get_submodule("self_attn")
    attention.register_forward_pre_hook(lambda _, args: seen.extend((args[0].dtype, args[1].cos_T1R.dtype)))
    model(*pack([9, 14]))
    return seen


def visit(rank: int, world: int, directory: Path) -> None:
    source = directory / "source"
    model = sharded(source, (world,), ("shard",))
    result: dict[str, Any] = {"rows_read": rows_read(model, source), "loaded": whole(model)}

    tokens, positions, cu_seqlens, max_seqlen = pack([9, 14])
    hidden = model(tokens, positions, cu_seqlens, max_seqlen)
    loss = F.cross_entropy(F.linear(hidden, model.head_weight), tokens.roll(-1))
    loss.backward()
    result["loss"] = loss.detach()
    result["gradients"] = {name: p.grad.full_tensor() for name, p in model.named_parameters()}

    with torch.no_grad():  # leaves the root gathered, as an evaluation does
        model(tokens, positions, cu_seqlens, max_seqlen)
    hf.save_model(model, directory / "saved", source, max_shard_bytes=20_000)
    try:
        hf.save_model(model, source.parent)  # holds other files
    except hf.InputError as error:
        result["refused"] = str(error)

    hf.init_weights(model, 7)
    result["initialised"] = whole(model)
    result["dtypes"] = dtypes_in_mixed_precision(source)
    replicated = sharded(source, (1, world), ("replicate", "shard"))
    hf.load_weights(replicated, source)
    result["loaded with replicas"] = whole(replicated)
    torch.save(result, directory / f"rank{rank}.pt")


def main(rank: int, world: int, directories: list[Path]) -> None:
    rendezvous = f"file://{directories[0]}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    for directory in directories:
        visit(rank, world, directory)
    dist.destroy_process_group()
    # DTensor's caches keep the group, and the interpreter's end may abort a thread of gloo that still holds a tensor.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), [Path(argument) for argument in sys.argv[3:]])

"""Hugging Face directories in and out: config.json and (sharded) safetensors, read a slice a rank, written atomically.

Nothing here unpickles: .bin and .pt weights are refused. `transformers` is not needed.

    model = load_model("Qwen3-4B", dtype=torch.bfloat16)
    save_model(model, "out/student", source="Qwen3-4B")      # tokenizer files are copied from `source`
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from dasd_engine.errors import InputError
from dasd_engine.model import Decoder
from dasd_engine.model_config import config_json, read_config
from dasd_engine.records import sync

# What a model's answers and a text's tokens depend on, for manifests that must know it again.
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "*.safetensors")
MAX_SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
SIDE_FILES = (*TOKENIZER_FILES, "chat_template*", "generation_config.json")
OWN_FILES = (*SIDE_FILES, "config.json", "model*.safetensors*", "manifest.json", "README.md")
VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by the names that recipes and commands have
FLOAT_DTYPES = {"F32", "BF16", "F16", "F64"}

__all__ = ["init_weights", "load_model", "load_weights", "read_config", "save_model"]


class StoredTensor(NamedTuple):
    file: Path
    shape: tuple[int, ...]
    dtype: str  # in safetensors' words


def load_model(path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Decoder:
    """The model of a Hugging Face directory, parameters in `dtype` on `device`; InputError where it does not fit."""
    config, device = read_config(path), find_device(device)
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    model.to_empty(device=device)
    load_weights(model, path)
    return model


def find_device(device: str | torch.device) -> torch.device:
    """InputError for one that torch does not know, or that is not here."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {str(device)!r}: cannot be used here: {str(error).splitlines()[0]}") from None
    return found


def load_weights(model: Decoder, path: str | Path) -> None:
    """Fills the parameters of `model` from the safetensors of `path`, converting to their dtypes.

    Parameters may be plain or DTensors sharded on dimension 0 (FSDP2, HSDP): the files are memory-mapped and
    each rank touches only its rows. Every name and shape is checked before any parameter changes.
    """
    path = Path(path)
    _reshard(model)
    stored = _stored_tensors(path)
    wanted: dict[str, Tensor] = {_hf_name(name): parameter for name, parameter in model.named_parameters()}
    _check_names(path, stored, wanted, tied=model.config.tie_word_embeddings)
    for name, parameter in wanted.items():
        _check_tensor(name, stored[name], parameter)
    for file in sorted({stored[name].file for name in wanted}):
        here = {name: parameter for name, parameter in wanted.items() if stored[name].file == file}
        try:
            _read_rows(file, here)
        except SafetensorError as error:
            raise InputError(f"{file}: is no valid safetensors file ({error}); copy it again") from error


def _read_rows(file: Path, parameters: dict[str, Tensor]) -> None:
    """Fills {stored name: parameter} from one file."""
    with safe_open(file, framework="pt") as tensors, torch.no_grad():
        for name, parameter in parameters.items():
            begin, end = _local_rows(parameter)
            _local(parameter).copy_(tensors.get_slice(name)[begin:end])


def init_weights(model: Decoder, seed: int) -> None:
    """Random weights: N(0, 0.02) for matrices, those that write to the residual stream divided by
    sqrt(2 layers); zero for biases, one for norms.

    A tensor's values depend on (seed, name) only, not on sharding, device or dtype: each is drawn whole on the
    CPU, one at a time, and a rank keeps its rows.
    """
    _reshard(model)
    residual_scale = (2 * model.config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            begin, end = _local_rows(parameter)
            if name.endswith("norm.weight"):
                _local(parameter).fill_(1.0)
            elif name.endswith(".bias"):
                _local(parameter).zero_()
            else:
                std = 0.02 * (residual_scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
                digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                values = torch.randn(parameter.shape, generator=generator, device="cpu")[begin:end]
                _local(parameter).copy_(values.mul_(std))


def save_model(
    model: Decoder,
    path: str | Path,
    source: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes `model` as a directory that transformers and vLLM load. Every rank calls it, the first one writes.

    Weights are stored in `dtype` (default: the parameters'), in files of at most `max_shard_bytes`, which is also
    what the first rank holds in memory at a time: sharded parameters are gathered one by one. Tokenizer,
    chat-template and generation_config files are copied from `source`. The directory appears whole or not at all;
    an earlier model in its place is replaced then, anything else there is an InputError.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    dtype = dtype or model.norm.weight.dtype
    _reshard(model)
    files = _plan_files(model, dtype, max_shard_bytes)
    writes = not dist.is_initialized() or dist.get_rank() == 0
    gathered = _gather(files, dtype, keep=writes)
    error: Exception | None = None
    if writes:
        try:
            _check_replaceable(path)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for file, tensors in gathered:
                save_file(tensors, partial / file, metadata={"format": "pt"})
            _write_side_files(model, partial, source, files, dtype)
            _replace(path, partial)
        except (OSError, SafetensorError, InputError) as caught:
            own = isinstance(caught, InputError)
            error = caught if own else InputError(f"{path}: cannot be written: {caught}; make room or choose another")
            shutil.rmtree(partial, ignore_errors=True)
    for _ in gathered:  # gathering is collective: go on to the end even where writing failed
        pass
    _raise_everywhere(error)


def _plan_files(model: Decoder, dtype: torch.dtype, max_bytes: int) -> dict[str, dict[str, Tensor]]:
    """{file name: {Hugging Face name: parameter}} in model order; a file is at most `max_bytes`, or one tensor."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, parameter in model.named_parameters():
        tensor_bytes = parameter.numel() * dtype.itemsize
        if groups[-1] and size + tensor_bytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][_hf_name(name)] = parameter
        size += tensor_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _gather(
    files: dict[str, dict[str, Tensor]], dtype: torch.dtype, keep: bool
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(file name, whole tensors on the CPU), a file at a time; all ranks exhaust it, those that `keep` get tensors."""
    for file, parameters in files.items():
        tensors = {}
        for name, parameter in parameters.items():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if keep:
                tensors[name] = whole.detach().to("cpu", dtype).contiguous()
        yield file, tensors


def _check_replaceable(path: Path) -> None:
    """Only a directory that holds nothing but a model's files may be replaced."""
    if not path.exists():
        return
    files = path.iterdir() if path.is_dir() else [path]
    for file in files:
        if file.is_dir() or not any(file.match(pattern) for pattern in OWN_FILES):
            raise InputError(f"{path}: exists and is no model directory ({file.name}); choose another for the model")


def _write_side_files(
    model: Decoder,
    path: Path,
    source: str | Path | None,
    files: dict[str, dict[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    """config.json, the index of several weight files, and what is copied from `source`."""
    (path / "config.json").write_text(config_json(model.config, dtype), encoding="utf-8")
    if len(files) > 1:
        total = sum(t.numel() * dtype.itemsize for group in files.values() for t in group.values())
        weight_map = {name: file for file, group in files.items() for name in group}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for pattern in SIDE_FILES if source is not None else ():
        for file in sorted(Path(source or "").glob(pattern)):
            shutil.copyfile(file, path / file.name)


def _replace(path: Path, partial: Path) -> None:
    """Puts the finished directory in place of an earlier one, its bytes on disk first."""
    for file in partial.iterdir():
        sync(file)
    if path.exists():
        earlier = path.with_name(path.name + ".earlier")
        shutil.rmtree(earlier, ignore_errors=True)
        path.rename(earlier)
        partial.rename(path)
        shutil.rmtree(earlier)
    else:
        partial.rename(path)


def _raise_everywhere(error: Exception | None) -> None:
    """All ranks meet here; if the first one failed, it raises its error and the others an InputError with the text."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        message = [None if error is None else str(error)]
        dist.broadcast_object_list(message, src=0)
        if error is None and message[0] is not None:
            raise InputError(f"the first rank could not save the model: {message[0]}")
    if error is not None:
        raise error


def _hf_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def _reshard(model: Decoder) -> None:
    """After a forward FSDP's root keeps gathered copies as its parameters; bring back the sharded originals."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _local_rows(parameter: Tensor) -> tuple[int, int]:
    """[begin, end) of the rows (dimension 0) that this rank holds."""
    begin, end = 0, parameter.shape[0]
    if isinstance(parameter, DTensor):
        for mesh_dim, placement in enumerate(parameter.placements):
            if placement == Shard(0):
                rows = -(-(end - begin) // parameter.device_mesh.size(mesh_dim))
                begin = min(begin + rows * parameter.device_mesh.get_local_rank(mesh_dim), end)
                end = min(begin + rows, end)
            elif placement != Replicate():
                raise ValueError(f"parameters must be replicated or sharded on dimension 0, not {placement}")
    return begin, end


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the directory's safetensors by name; headers only."""
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = [path / file for file in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: is not a safetensors index with a weight_map: {error!r}") from error
    elif single.exists():
        weight_map, files = None, [single]
    else:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        if pickles:
            raise InputError(
                f"{path}: holds only pickled weights ({pickles[0]}), which can run code when loaded; "
                "convert them to safetensors (save_pretrained of transformers does)"
            )
        raise InputError(f"{path}: holds neither model.safetensors nor model.safetensors.index.json")
    stored: dict[str, StoredTensor] = {}
    for file in files:
        if not file.exists():
            raise InputError(f"{file}: is missing, but {index.name} lists it")
        stored.update(_read_header(file))
    for name, listed in (weight_map or {}).items():
        if name not in stored or stored[name].file.name != listed:
            raise InputError(f"{path / listed}: lacks the tensor {name} that {index.name} places there")
    return stored


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors that a safetensors file declares; InputError when it is cut short, naming the tensor."""
    size = file.stat().st_size
    with open(file, "rb") as handle:
        prefix = handle.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or 8 + length > size:
            raise InputError(f"{file}: is truncated or no safetensors file: {size} bytes, no whole header")
        try:
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            tensors = {n: StoredTensor(file, tuple(t["shape"]), t["dtype"]) for n, t in header.items()}
            ends = {n: 8 + length + t["data_offsets"][1] for n, t in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(f"{file}: its safetensors header cannot be read: {error!r}") from error
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        if end > size:
            raise InputError(
                f"{file}: is truncated: {size} bytes, but the tensor {name} ends at byte {end}; copy it again"
            )
    return tensors


def _check_names(path: Path, stored: dict[str, StoredTensor], wanted: dict[str, Tensor], tied: bool) -> None:
    """The files must hold exactly the model's tensors, but old Llama files may hold rotary frequencies, and the
    files of a tied model a second head."""
    missing = [name for name in wanted if name not in stored]
    if missing == ["lm_head.weight"]:
        raise InputError(
            f"{path}: the tensor lm_head.weight is missing; should tie_word_embeddings in config.json be true?"
        )
    if missing:
        raise InputError(f"{path}: {_count(missing)} missing: {', '.join(missing[:5])}")
    known = wanted.keys() | ({"lm_head.weight"} if tied else set())
    extra = sorted(n for n in stored if n not in known and not n.endswith("rotary_emb.inv_freq"))
    if extra:
        raise InputError(f"{path}: {_count(extra)} not in the model that config.json describes: {', '.join(extra[:5])}")


def _count(names: list[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _check_tensor(name: str, stored: StoredTensor, parameter: Tensor) -> None:
    if stored.shape != tuple(parameter.shape):
        hint = "; check vocab_size in config.json" if name in VOCABULARY_TENSORS else ""
        raise InputError(
            f"{stored.file}: the tensor {name} is {list(stored.shape)}, "
            f"config.json asks for {list(parameter.shape)}{hint}"
        )
    if stored.dtype not in FLOAT_DTYPES:
        raise InputError(f"{stored.file}: the tensor {name} is {stored.dtype}, only float weights can be read")

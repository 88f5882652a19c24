"""Recipes: a TOML file and dotted overrides become one frozen `Recipe`.

    recipe = load_recipe("recipes/quickstart.toml", ["train.lr=1e-3", "stage.0.epochs=2"])

Keys of `[train]` are defaults for every `[[stage]]`, which may override any of them. A key nobody knows is an error
that names the nearest one; so is a value of the wrong type. Relative paths are looked up beside the recipe file,
except `out`, which is relative to the working directory.
"""

import dataclasses
import difflib
import json
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dasd_engine.errors import InputError, check_ranges


def option(default: Any, doc: str) -> Any:
    """A recipe key with its line of help."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class ModelOptions:
    path: str = option(
        "", "Hugging Face directory of the student: config.json, tokenizer, and weights unless init is random"
    )
    init: Literal["pretrained", "random"] = option("pretrained", "where the first weights come from")


@dataclass(frozen=True)
class TrainOptions:
    """Defaults are the configuration published with the method (arXiv 2601.09088), for a 4B student."""

    context: int = option(65536, "tokens of a pack; a longer document is refused")
    packs_per_step: int = option(64, "packs of one optimizer step, over all ranks")
    epochs: int = option(6, "passes over the stage's documents")
    lr: float = option(5e-5, "peak learning rate")
    min_lr: float = option(1e-5, "learning rate at the last step")
    warmup: float = option(0.1, "share of the steps with a rising learning rate")
    betas: tuple[float, float] = option((0.9, 0.95), "AdamW's decay of the two moments")
    eps: float = option(1e-8, "AdamW's epsilon")
    weight_decay: float = option(0.1, "AdamW's decay of matrices; norms and biases have none")
    clip: float = option(1.0, "largest norm of the gradient")
    isolate: bool = option(
        True, "documents of a pack do not see each other (false replicates trainers without isolation)"
    )


@dataclass(frozen=True)
class RunOptions:
    """How the run uses the machine. Nothing here changes what is learned beyond rounding."""

    compute: Literal["auto", "bf16", "fp32"] = option(
        "auto", "dtype of the forward and backward pass; auto: bf16 where the device multiplies it natively"
    )
    attention: Literal["auto", "varlen", "flash", "sdpa"] = option(
        "auto",
        "auto: torch's varlen_attn on CUDA (FA3 or FA4 when installed), else sdpa; flash: the flash-attn package",
    )
    threads: int = option(0, "CPU threads of a rank, 0 for torch's choice; 1 is best where the machine has other work")
    gather: Literal["auto", "step", "layer"] = option(
        "auto", "parameters gathered once a step (fastest) or a layer at a time (least memory); auto: once if it fits"
    )
    replicas: int = option(1, "HSDP: copies of the sharded model; ranks divide evenly among them")
    context_parallel: int = option(
        1, "ranks that share a pack: each a part of its tokens, and in attention a part of the heads"
    )
    activation_checkpointing: Literal["none", "selective", "full"] = option(
        "none", "recompute in the backward pass: nothing, norms and SwiGLU, whole blocks"
    )
    moments: Literal["fp32", "compact"] = option(
        "fp32", "AdamW's moments: fp32, 8 bytes a weight; compact: 3, with stochastic rounding, right on average"
    )
    compile: bool = option(False, "torch.compile each block")
    profile: int = option(0, "steps, after the first two, traced into trace-rank<i>.json: open it in ui.perfetto.dev")


@dataclass(frozen=True)
class CheckpointOptions:
    every: int = option(100, "steps between checkpoints; one is also written at the end of a stage")
    keep: int = option(2, "complete checkpoints kept")


@dataclass(frozen=True)
class EvaluateOptions:
    problems: str = option("", "JSONL of held-out problems with answers in `meta`; empty: no evaluation")
    limit: int = option(0, "problems used, 0 for all")
    samples: int = option(1, "responses a problem")
    temperature: float = option(0.0, "sampling temperature, 0 for greedy")
    max_new_tokens: int = option(1024, "longest response")


@dataclass(frozen=True)
class Stage:
    name: str
    data: tuple[str, ...]
    train: TrainOptions


@dataclass(frozen=True)
class Recipe:
    path: Path
    seed: int
    out: Path
    model: ModelOptions
    run: RunOptions
    checkpoint: CheckpointOptions
    evaluate: EvaluateOptions
    stages: tuple[Stage, ...]

    def resolve(self, path: str) -> Path:
        return beside(self.path, path)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. Paths become strings."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


_SECTIONS: dict[str, type] = {
    "model": ModelOptions,
    "train": TrainOptions,
    "run": RunOptions,
    "checkpoint": CheckpointOptions,
    "evaluate": EvaluateOptions,
}
_TOP = ("seed", "out", "stage", *_SECTIONS)
# Sections of dasd_engine.distill, which are not looked at here: one recipe may serve both.
_DISTILL = ("teacher", "sample", "score", "select", "filters", "mix", "low", "high", "mixed")


def load_recipe(path: Path | str, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key.subkey=value` overrides (TOML values; a bare word is a string).

    Raises:
        InputError: naming the file, the key and the nearest known key, or the type expected.
    """
    path = Path(path)
    table = read_table(path, overrides, "no such recipe; the packaged one runs with no argument at all")
    check_keys(table, (*_TOP, *_DISTILL), str(path), "")
    train = table.get("train", {})
    build(TrainOptions, train, str(path), "train")  # its errors name [train], not the stages that inherit from it
    stages = table.get("stage", [])
    if not isinstance(stages, list) or not stages:
        other = "; recipes with [sample] are run by python -m dasd_engine.distill" if "sample" in table else ""
        raise InputError(f"{path}: no [[stage]]; a recipe needs at least one, with `name` and `data`{other}")
    sections: dict[str, Any] = {
        name: build(cls, table.get(name, {}), str(path), name) for name, cls in _SECTIONS.items() if name != "train"
    }
    recipe = Recipe(
        path=path.resolve(),
        seed=typed(table.get("seed", 0), int, f"{path}: seed"),
        out=Path(typed(table.get("out", f"runs/{path.stem}"), str, f"{path}: out")).expanduser(),
        stages=tuple(_stage(train, stage, str(path), i) for i, stage in enumerate(stages)),
        **sections,
    )
    _check(recipe)
    return recipe


def read_table(path: Path, overrides: typing.Sequence[str], missing: str = "no such recipe") -> dict[str, Any]:
    """A TOML file with the overrides applied, unchecked. InputError naming the file, or the override."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: {missing}") from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        apply_override(table, override)
    return table


def beside(recipe: Path, path: str) -> Path:
    """A path of a recipe, looked up beside the recipe file."""
    return (recipe.parent / Path(path).expanduser()).resolve()


def _stage(train: dict, stage: dict, path: str, index: int) -> Stage:
    where = f"stage.{index}"
    options = [f.name for f in dataclasses.fields(TrainOptions)]
    check_keys(stage, [*options, "name", "data"], path, where)
    own = {key: value for key, value in stage.items() if key not in ("name", "data")}
    if "data" not in stage:
        raise InputError(f"{path}: {where}: no `data`; name a JSONL file or a directory made by dasd_engine.prepare")
    return Stage(
        name=typed(stage.get("name", f"stage{index + 1}"), str, f"{path}: {where}.name"),
        data=_data(stage["data"], f"{path}: {where}.data"),
        train=build(TrainOptions, {**train, **own}, path, where),
    )


def _data(value: Any, where: str) -> tuple[str, ...]:
    """One path or several."""
    paths = typed(value, tuple[str, ...], where) if isinstance(value, list) else (typed(value, str, where),)
    if not paths:
        raise InputError(f"{where} is empty; name files, or directories made by dasd_engine.prepare")
    return paths


def _check(recipe: Recipe) -> None:
    """What types cannot say."""
    if not recipe.model.path:
        raise InputError(f"{recipe.path}: model.path is missing; name the student's Hugging Face directory")
    names = [stage.name for stage in recipe.stages]
    if len(set(names)) < len(names):
        raise InputError(f"{recipe.path}: two stages are called {max(names, key=names.count)!r}; names must differ")
    for i, stage in enumerate(recipe.stages):
        if stage.name in ("", "..") or Path(stage.name).name != stage.name:
            raise InputError(f"{recipe.path}: stage.{i}.name = {stage.name!r}: must be a plain name, its directory's")
        check_train(stage.train, f"{recipe.path}: stage.{i}.")
    check_shared(recipe.path, recipe.run, recipe.checkpoint, recipe.evaluate)


def check_train(o: TrainOptions, where: str) -> None:
    """InputError naming the key of a stage of training that is out of range."""
    check_ranges(o, {
        "context": o.context >= 2,
        "packs_per_step": o.packs_per_step >= 1,
        "epochs": o.epochs >= 1,
        "lr": o.lr > 0,
        "min_lr": 0 <= o.min_lr <= o.lr,
        "warmup": 0 <= o.warmup <= 1,
        "betas": all(0 <= beta < 1 for beta in o.betas),
        "eps": o.eps >= 0,
        "weight_decay": o.weight_decay >= 0,
        "clip": o.clip > 0,
    }, where)  # fmt: skip


def check_shared(path: Path, run: RunOptions, checkpoint: CheckpointOptions, evaluate: EvaluateOptions) -> None:
    """The same of the sections that recipes of train and of distill have both."""
    least: dict[str, tuple[Any, dict[str, int]]] = {
        "run": (run, {"replicas": 1, "context_parallel": 1, "threads": 0, "profile": 0}),
        "checkpoint": (checkpoint, {"every": 1, "keep": 1}),
        "evaluate": (evaluate, {"limit": 0, "samples": 1, "max_new_tokens": 1}),
    }
    for section, (options, keys) in least.items():
        for key, low in keys.items():
            if getattr(options, key) < low:
                raise InputError(f"{path}: {section}.{key} = {getattr(options, key)} must be at least {low}")
    check_ranges(evaluate, {"temperature": 0 <= evaluate.temperature < float("inf")}, f"{path}: evaluate.")


def apply_override(table: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"override {override!r}: write key.subkey=value, for example train.lr=1e-4")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.strip().split(".")
    node: Any = table
    for part in parents:
        node = _step(node, part, override)
    if isinstance(node, list) or not isinstance(node, dict):
        raise InputError(f"override {override!r}: {'.'.join(parents)} has no keys; stages are stage.0, stage.1, …")
    node[last] = value


def _step(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        if not part.isdigit() or int(part) >= len(node):
            raise InputError(f"override {override!r}: {part!r} is not one of the {len(node)} stages, counted from 0")
        return node[int(part)]
    if not isinstance(node, dict):
        raise InputError(f"override {override!r}: {part!r} lies below a value")
    return node.setdefault(part, {})


def check_keys(table: Any, names: typing.Sequence[str], path: str, where: str) -> None:
    if not isinstance(table, dict):
        raise InputError(f"{path}: {where} must be a table of keys, not {type(table).__name__}")
    for key in table:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{path}: unknown key {f'{where}.{key}'.lstrip('.')!r}{hint}")


def build(cls: type, table: Any, path: str, where: str) -> Any:
    """A dataclass of options from a table of the recipe, its keys and types checked."""
    hints = typing.get_type_hints(cls)
    check_keys(table, list(hints), path, where)
    return cls(**{key: typed(value, hints[key], f"{path}: {where}.{key}") for key, value in table.items()})


def typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as `hint`, or an error. An int is a float too; a bool is nothing but a bool."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise InputError(f"{where} = {value!r}: must be one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple and args[-1] is ...:
        if not isinstance(value, list):
            raise InputError(f"{where} = {value!r}: must be a list")
        return tuple(typed(item, args[0], where) for item in value)
    if origin is tuple:
        if not isinstance(value, list) or len(value) != len(args):
            raise InputError(f"{where} = {value!r}: must be a list of {len(args)} values")
        return tuple(typed(item, kind, where) for item, kind in zip(value, args, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise InputError(f"{where} = {value!r}: must be {_name(hint)}, not {_name(type(value))}")
    return value


def _name(kind: type) -> str:
    names: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        str: "a string",
        bool: "true or false",
        dict: "a table",
    }
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def describe() -> str:
    """Every recipe key with its default and meaning, for --help."""
    lines = [
        "seed = 0                             order of documents and random weights",
        'out = "runs/<recipe>"                directory of the run',
    ]
    for section, cls in _SECTIONS.items():
        lines.append(f"[{section}]" + ("  (each key may be set in a [[stage]] too)" if section == "train" else ""))
        lines += describe_keys(cls)
    lines += [
        "[[stage]]  one or more, in order; each starts from the weights of the one before",
        "  name, data                         data: JSONL, Parquet, a hub data set, or shards of dasd_engine.prepare",
        "                                     (a directory of them too); one, or a list of several",
    ]
    return "\n".join(lines)


def describe_keys(cls: type) -> list[str]:
    """The lines of a section's keys in --help."""
    lines = []
    for f in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[f.name]
        choices = f" ({' | '.join(typing.get_args(hint))})" if typing.get_origin(hint) is Literal else ""
        lines.append(f"  {f.name + ' = ' + json.dumps(f.default):<34} {f.metadata['doc']}{choices}")
    return lines


def packaged(name: str) -> Path:
    """The path of a recipe that ships with the engine, from an installed wheel or a source tree."""
    here = Path(__file__).resolve().parent
    for root in (here / "recipes", here.parent / "recipes"):
        if (root / name).exists():
            return root / name
    raise InputError(f"recipe {name} is not beside the package ({here}); install the engine again")

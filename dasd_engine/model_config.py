"""config.json of a Hugging Face model directory: read, checked and written back.

Both spellings of the rotary embedding are understood (`rope_theta` with `rope_scaling`; `rope_parameters` of
transformers 5) and both are written. A feature that the decoder does not compute is an error, never ignored.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dasd_engine.errors import InputError
from dasd_engine.rope import ROPE_TYPES, Rope

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
REQUIRED: Any = object()


@dataclass(frozen=True)
class ModelConfig:
    """What a model directory's config.json says, checked; `read_config` makes it. `other` holds the fields that
    the decoder does not use (token ids, initializer_range, ...), which an export writes back."""

    model_type: str  # "qwen3", "qwen2" or "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of the four projections; qwen2 has it on q, k, v whatever is said here
    mlp_bias: bool = False
    max_position_embeddings: int = 32768
    rope: Rope = Rope()
    other: dict[str, Any] = field(default_factory=dict)

    @property
    def qk_norm(self) -> bool:
        return self.model_type == "qwen3"

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def output_bias(self) -> bool:
        return self.attention_bias and self.model_type != "qwen2"


class _Fields:
    """A JSON object that names the file and the field when something is wrong with it."""

    def __init__(self, values: dict[str, Any], where: str):
        self.values, self.where, self.used = values, where, set[str]()

    def take(self, name: str, kind: type, default: Any = REQUIRED) -> Any:
        """The field as `kind`; `default` when absent or null; InputError when of another type, or required."""
        self.used.add(name)
        value = self.values.get(name)
        if value is None:
            if default is REQUIRED:
                raise InputError(f"{self.where}: the field {name} is missing")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InputError(f"{self.where}: {name} must be {kind.__name__}, is {value!r}")
        return value

    def size(self, name: str, default: Any = REQUIRED) -> int:
        value = self.take(name, int, default)
        if value < 1:
            raise InputError(f"{self.where}: {name} must be at least 1, is {value}")
        return value

    def above_0(self, name: str, default: Any = REQUIRED) -> float:
        value = self.take(name, float, default)
        if not value > 0:
            raise InputError(f"{self.where}: {name} must be above 0, is {value}")
        return value


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of the model directory `path`; InputError names the field that cannot be used."""
    file = Path(path) / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; a model is a directory with a config.json") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{file}: must hold a JSON object")
    fields = _Fields(values, str(file))
    model_type = fields.take("model_type", str)
    if model_type not in ARCHITECTURES:
        raise InputError(f"{file}: model_type {model_type!r} is not one of {', '.join(ARCHITECTURES)}")
    _refuse_unsupported(fields, model_type)
    heads = fields.size("num_attention_heads")
    hidden = fields.size("hidden_size")
    context = fields.size("max_position_embeddings")
    config = ModelConfig(
        model_type=model_type,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size"),
        num_hidden_layers=fields.size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=fields.size("num_key_value_heads", heads),
        head_dim=fields.size("head_dim", 128 if model_type == "qwen3" else max(hidden // heads, 1)),
        rms_norm_eps=fields.take("rms_norm_eps", float),
        tie_word_embeddings=fields.take("tie_word_embeddings", bool, False),
        attention_bias=fields.take("attention_bias", bool, False),
        mlp_bias=fields.take("mlp_bias", bool, False) if model_type == "llama" else False,
        max_position_embeddings=context,
        rope=_read_rope(fields, context),
        other={name: value for name, value in values.items() if name not in fields.used},
    )
    if heads % config.num_key_value_heads:
        raise InputError(
            f"{file}: num_attention_heads {heads} must be a multiple of num_key_value_heads, "
            f"which is {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise InputError(f"{file}: head_dim must be even for the rotary embedding, is {config.head_dim}")
    return config


def _refuse_unsupported(fields: _Fields, model_type: str) -> None:
    """Raises for what the decoder would silently leave out."""

    def refuse(name: str) -> None:
        raise InputError(f"{fields.where}: {name} {fields.values[name]!r} is not supported")

    if fields.take("architectures", list, [ARCHITECTURES[model_type]]) != [ARCHITECTURES[model_type]]:
        raise InputError(
            f"{fields.where}: architectures {fields.values['architectures']!r} is not supported: "
            f"a {model_type} model must be {ARCHITECTURES[model_type]}"
        )
    if fields.take("hidden_act", str, "silu") != "silu":
        refuse("hidden_act")
    for name in ("num_experts", "num_local_experts", "quantization_config", "attention_dropout"):
        if fields.values.get(name):
            refuse(name)
    layer_types = fields.values.get("layer_types")
    full = isinstance(layer_types, list) and layer_types == ["full_attention"] * max(len(layer_types), 1)
    if layer_types is not None and not full:
        refuse("layer_types")
    slides = fields.values.get("use_sliding_window") and fields.values.get("sliding_window")
    if layer_types is None and slides:
        from_layer = fields.take("max_window_layers", int, 28)
        fields.used.discard("max_window_layers")
        if from_layer < fields.size("num_hidden_layers"):
            refuse("use_sliding_window")


def _read_rope(fields: _Fields, context: int) -> Rope:
    """The rotary parameters from `rope_scaling`, else `rope_parameters`; `rope_theta` stands inside or beside."""
    theta = fields.take("rope_theta", float, None)
    parameters = fields.take("rope_parameters", dict, None)
    scaling = fields.take("rope_scaling", dict, None)
    name = "rope_scaling" if scaling else "rope_parameters"
    rope = _Fields(scaling or parameters or {}, f"{fields.where}: {name}")
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise InputError(f"{rope.where}: a rotary embedding a layer type is not supported")
    kind = rope.take("rope_type", str, None) or rope.take("type", str, "default")
    if kind not in ROPE_TYPES:
        raise InputError(f"{rope.where}: rope_type {kind!r} is not one of {', '.join(ROPE_TYPES)}")
    for partial in (fields.values.get("partial_rotary_factor"), rope.values.get("partial_rotary_factor")):
        if partial not in (None, 1, 1.0):
            raise InputError(f"{fields.where}: partial_rotary_factor {partial!r} is not supported")
    # transformers lets rope_theta inside the dictionary win, and assumes 10000 when it stands nowhere.
    theta = rope.above_0("rope_theta", theta or (parameters or {}).get("rope_theta") or 10000.0)
    if kind == "default":
        return Rope(theta)
    original = fields.take("original_max_position_embeddings", int, None)
    if kind != "linear":
        original = original or rope.size("original_max_position_embeddings", context)
    factor = rope.above_0("factor", context / original if kind == "yarn" else REQUIRED)
    chosen: dict[str, Any] = {"factor": factor, "original_max_position_embeddings": original or 0}
    if kind == "llama3":
        chosen |= {n: rope.take(n, float) for n in ("low_freq_factor", "high_freq_factor")}
        if chosen["low_freq_factor"] >= chosen["high_freq_factor"]:
            raise InputError(f"{rope.where}: low_freq_factor must be below high_freq_factor")
    if kind == "yarn":
        chosen |= {n: rope.take(n, float, None) for n in ("attention_factor", "mscale", "mscale_all_dim")}
        chosen["beta_fast"] = rope.take("beta_fast", float, 32.0)
        chosen["beta_slow"] = rope.take("beta_slow", float, 1.0)
        chosen["truncate"] = rope.take("truncate", bool, True)
    return Rope(theta, kind, **chosen)


def config_json(config: ModelConfig, dtype: torch.dtype) -> str:
    """The text of a config.json that transformers (4 and 5) and vLLM read."""
    known = asdict(config)
    other, _ = known.pop("other"), known.pop("rope")
    if config.model_type != "llama":
        del known["mlp_bias"]
    if config.model_type == "qwen2":
        del known["attention_bias"]
        if config.head_dim * config.num_attention_heads == config.hidden_size:
            del known["head_dim"]  # transformers' Qwen2 has no such field and computes the same
    rope = _rope_json(config.rope)
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    values = {
        "architectures": [ARCHITECTURES[config.model_type]],
        **{name: value for name, value in other.items() if name != "_name_or_path"},
        **known,
        "hidden_act": "silu",
        "rope_theta": config.rope.rope_theta,
        "rope_scaling": None if config.rope.rope_type == "default" else scaling,
        "rope_parameters": rope,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _rope_json(rope: Rope) -> dict[str, Any]:
    required = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor", "original_max_position_embeddings"),
    }[rope.rope_type]
    optional = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
    chosen = [name for name in optional if getattr(rope, name) != getattr(Rope, name)]
    return {name: getattr(rope, name) for name in ("rope_type", "rope_theta", *required, *chosen)}

"""DASD Engine: distils a reasoning teacher into a small student, one command a step.

    import dasd_engine
    model = dasd_engine.load_model("Qwen3-4B")

The names below are imported on first use, so that commands that need no torch (`prepare` and its workers) start fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dasd_engine.errors import InputError
    from dasd_engine.hf import init_weights, load_model, load_weights, save_model
    from dasd_engine.model import Decoder
    from dasd_engine.model_config import ModelConfig, read_config

_HOMES = {
    "InputError": "errors",
    "Decoder": "model",
    "ModelConfig": "model_config",
    "read_config": "model_config",
    "init_weights": "hf",
    "load_model": "hf",
    "load_weights": "hf",
    "save_model": "hf",
}

__all__ = [
    "Decoder",
    "InputError",
    "ModelConfig",
    "init_weights",
    "load_model",
    "load_weights",
    "read_config",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

"""Turn a checkpoint of a run into a Hugging Face directory.

    python -m dasd_engine.export runs/mine --out mine-at-120 --checkpoint step-00000120

The end of every stage is exported by `train` itself, under `export/`; this is for the steps between.
"""

import argparse
import json
from pathlib import Path

import torch

from dasd_engine.checkpoint import completed, load_model_only
from dasd_engine.config import beside
from dasd_engine.errors import InputError, run_cli
from dasd_engine.hf import DTYPES, read_config, save_model
from dasd_engine.model import Decoder


def export(run: Path, out: Path, *, checkpoint: str | None = None, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the student of `run`'s newest (or named) checkpoint to `out`; returns the checkpoint's path.

    Raises:
        InputError: `run` is not a run directory, or has no such checkpoint; names those it has.
    """
    try:
        recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
        source = beside(Path(recipe["path"]), recipe["model"]["path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{run}/recipe.json: {error!r}; give the `out` directory of a dasd_engine.train run") from None
    found = {path.name: path for path in completed(run / "checkpoints")}
    name = checkpoint or max(found, default="")
    if name not in found:
        raise InputError(f"{run}: no checkpoint {name or 'at all'}; complete ones: {', '.join(found) or 'none'}")
    model = Decoder(read_config(source))
    load_model_only(found[name], model)
    save_model(model, out, dtype=dtype, source=source)
    return found[name]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dasd_engine.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="directory of a run (`out` of its recipe)")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--checkpoint", help="name under checkpoints/; default: the newest")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of the weights written (default bf16)")
    args = parser.parse_args()
    used = export(args.run, args.out, checkpoint=args.checkpoint, dtype=DTYPES[args.dtype])
    print(f"{args.out}: the student of {used}")


if __name__ == "__main__":
    run_cli(main)

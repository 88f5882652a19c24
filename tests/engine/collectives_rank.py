"""A rank that counts what it gathers and reduces in each of three micro-steps; torchrun starts it, test_distributed.py
reads it."""

import json
import sys

import torch
from torch.distributed.tensor.debug import CommDebugMode

from dasd_engine import distributed
from dasd_engine.config import RunOptions
from dasd_engine.hf import init_weights
from dasd_engine.model import Decoder
from dasd_engine.model_config import read_config


def main(directory: str) -> None:
    tokens, bounds = torch.arange(16), torch.tensor([0, 16], dtype=torch.int32)
    counts: dict[str, list[list[int]]] = {"step": [], "layer": []}
    with distributed.start(RunOptions()) as world:
        for gather, rows in counts.items():
            options = RunOptions(gather=gather, compute="fp32")
            with torch.device("meta"):
                model = Decoder(read_config(directory))
            distributed.parallelize(model, world, options, torch.float32)
            model.to_empty(device="cpu")
            init_weights(model, 0)
            for i in range(3):
                with CommDebugMode() as traffic:
                    distributed.last_micro_step(model, i == 2, options)
                    model(tokens, tokens, bounds, 16).sum().backward()
                found = {str(op): count for op, count in traffic.get_comm_counts().items()}
                rows.append([sum(n for op, n in found.items() if k in op) for k in ("allgather", "reduce_scatter")])
        if world.is_main:
            print(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1])

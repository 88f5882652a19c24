"""The memory estimate: its arithmetic, the choices that follow from it, and what it tells."""

import re
import sys
from dataclasses import replace

import pytest
import torch
from runs import write_recipe, write_student

from dasd_engine import distributed, memory
from dasd_engine.config import RunOptions, load_recipe
from dasd_engine.errors import InputError
from dasd_engine.memory import Setting, estimate
from dasd_engine.model import Block, Decoder, PackContext, documents
from dasd_engine.model_config import read_config
from dasd_engine.recompute import checkpoint_activations

SIZES = {"hidden_size": 64, "intermediate_size": 160, "head_dim": 16, "vocab_size": 512, "num_hidden_layers": 8}


@pytest.fixture
def config(tmp_path):
    return read_config(write_student(tmp_path / "student", **SIZES))


def setting(**changes):
    run = RunOptions(gather="step", **{k: v for k, v in changes.items() if hasattr(RunOptions(), k)})
    rest = {k: v for k, v in changes.items() if not hasattr(RunOptions(), k)}
    return Setting(**{
        "run": run, "ranks": 4, "context": 4096, "packs_per_step": 8, "dtype": torch.bfloat16, "device": "cuda", **rest
    })  # fmt: skip


def test_states_are_bytes_of_the_parameters(config):
    size = sum(p.numel() for p in Decoder(config).parameters())
    alone = estimate(config, setting(ranks=1))
    assert (alone.masters, alone.moments, alone.gathered) == (4 * size, 8 * size, 2 * size)
    spread = estimate(config, setting(ranks=4))
    assert (spread.masters, spread.moments, spread.gathered) == (size, 2 * size, 2 * size)
    assert spread.gradients > 4 * size  # held whole from the first micro-step to the last
    layer = replace(setting().run, gather="layer")
    less = estimate(config, setting(run=layer))
    assert less.gradients < 4 * size and less.gathered < 2 * size
    halves = estimate(config, setting(run=replace(layer, replicas=2)))
    assert halves.masters == 2 * size and halves.moments == 4 * size
    compact = estimate(config, setting(ranks=1, moments="compact", device="cpu"))
    assert compact.moments == 3 * size and compact.checkpoint == 7 * size


def test_activations_by_checkpointing_and_context(config):
    none, selective, full = (
        estimate(config, setting(activation_checkpointing=mode)).activations for mode in ("none", "selective", "full")
    )
    assert none > selective > full
    assert estimate(config, setting(context=8192)).activations == 2 * none
    assert estimate(config, setting(context_parallel=2)).activations == none // 2


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_block_keeps_what_is_estimated(config, mode, monkeypatch):
    """Bytes that one block's backward saves, counted while it runs. Attention and norms keep a little more than is
    counted: a number a row."""
    hooks = torch.autograd.graph.saved_tensors_hooks
    tokens = 256
    block = Block(config)
    if mode != "none":
        checkpoint_activations(block, mode)
    x = torch.randn(tokens, config.hidden_size, requires_grad=True)
    table = torch.randn(tokens, 1, config.head_dim // 2)
    pack = PackContext(table, table.clone(), documents(torch.tensor([0, tokens], dtype=torch.int32), tokens, x))
    known = {t.untyped_storage().data_ptr() for t in (*block.parameters(), pack.cos_T1R, pack.sin_T1R)}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = tensor
        return tensor

    def within(pack, unpack):  # hooks of the block's own hide those around it
        return hooks(lambda tensor: None if (saved := pack(tensor)) is None else keep(saved), unpack)

    with hooks(keep, lambda tensor: tensor):
        if mode == "selective":
            monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", within)
        block(x, pack)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    kept, *_ = memory.block_values(config, RunOptions(activation_checkpointing=mode))
    assert 1.0 <= measured / (4 * tokens) / kept <= (1.0 if mode == "full" else 1.03)


def test_a_knob_that_is_named_makes_it_fit(config):
    small = setting(context=8192, packs_per_step=16, device="cpu")
    needed = estimate(config, small).total
    for part in (0.95, 0.6, 0.3, 0.1):
        limit = int(part * needed / memory.USABLE)
        told = memory.remedies(config, small, limit)
        named = re.findall(r"(?:run\.\w+=\w+ ?)+(?:and [\w ]+train\.context=\d+ )?", told)
        assert named, told
        for knobs in named:
            values = dict(part.split("=") for part in re.findall(r"\w+=\w+", knobs))
            context = int(values.pop("context", small.context))
            numbers = {key: int(value) if value.isdigit() else value for key, value in values.items()}
            changed = replace(small, context=context, run=replace(small.run, **numbers))
            assert estimate(config, changed).total <= memory.USABLE * limit
    assert "more ranks or a smaller student" in memory.remedies(config, small, 1000)


def test_auto_gathers_once_a_step_where_that_fits(tmp_path, monkeypatch, config):
    recipe = load_recipe(write_recipe(tmp_path, packs_per_step=2, epochs=1), ["run.compute=fp32"])
    needed = estimate(config, Setting(RunOptions(gather="step"), 2, 128, 2, torch.float32, "cpu")).total
    asked = replace(recipe, run=replace(recipe.run, gather="step"))
    with distributed.start(recipe.run) as world:
        two = replace(world, size=2)
        roomy, scarce, hopeless = (int(share * needed / memory.USABLE) for share in (1.03, 0.97, 0.001))
        monkeypatch.setattr(memory, "device_memory", lambda world: (roomy, roomy))
        assert memory.settle(recipe, config, two)[0].run.gather == "step"
        monkeypatch.setattr(memory, "device_memory", lambda world: (scarce, scarce))
        assert memory.settle(recipe, config, two)[0].run.gather == "layer"
        assert memory.settle(recipe, config, world)[0].run.gather == "step"  # alone, nothing is gathered
        settled, told = memory.settle(asked, config, two)  # with a warning
        assert settled.run.gather == "step" and re.match(r"warning: .* would fit with run\.gather=layer", told[1])
        monkeypatch.setattr(memory, "device_memory", lambda world: (hopeless, hopeless))
        with pytest.raises(InputError, match=r"recipe.toml: .*weights, moments and gradients do not fit"):
            memory.settle(recipe, config, two)


def test_the_command_tells_every_choice(tmp_path, monkeypatch, capsys):
    command = ["memory", str(write_student(tmp_path / "student")), "--ranks", "2", "--gib", "1"]
    monkeypatch.setattr(sys, "argv", command)
    memory.main()
    lines = capsys.readouterr().out.splitlines()
    assert "GiB a rank of 2" in lines[0] and len(lines) == 8
    monkeypatch.setattr(sys, "argv", [*command, "--replicas", "3"])
    with pytest.raises(InputError, match="must divide the 2 ranks"):
        memory.main()
    monkeypatch.setattr(sys, "argv", [*command, "--replicas", "0"])
    with pytest.raises(InputError, match="--replicas 0: must be at least 1"):
        memory.main()

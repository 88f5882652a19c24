"""Recipes: what is accepted, what is refused, and that a refusal tells what to write instead."""

import pytest

from dasd_engine.config import TrainOptions, describe, load_recipe, packaged
from dasd_engine.errors import InputError

RECIPE = """
seed = 3
out = "somewhere"
[model]
path = "student"
[train]
lr = 1e-3
min_lr = 0
[[stage]]
name = "low"
data = "low.jsonl"
[[stage]]
name = "high"
data = "high.jsonl"
epochs = 2
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(RECIPE)
    return path


def test_stages_take_the_train_section_and_override_it(recipe):
    low, high = load_recipe(recipe).stages
    assert (low.train.epochs, high.train.epochs) == (TrainOptions().epochs, 2)
    assert low.train.lr == high.train.lr == 1e-3
    assert isinstance(low.train.min_lr, float)


def test_defaults_are_the_published_configuration():
    o = TrainOptions()
    assert (o.context, o.packs_per_step, o.epochs, o.lr, o.min_lr) == (65536, 64, 6, 5e-5, 1e-5)
    assert (o.warmup, o.betas, o.eps, o.weight_decay, o.clip, o.isolate) == (0.1, (0.9, 0.95), 1e-8, 0.1, 1.0, True)


def test_paths_lie_beside_the_recipe(recipe):
    assert load_recipe(recipe).resolve("student") == recipe.parent / "student"


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.lr=2e-4", lambda r: r.stages[0].train.lr == 2e-4),
        ("stage.1.epochs=5", lambda r: [s.train.epochs for s in r.stages] == [6, 5]),
        ("out=/tmp/x", lambda r: str(r.out) == "/tmp/x"),
        ("train.betas=[0.8, 0.9]", lambda r: r.stages[1].train.betas == (0.8, 0.9)),
        ("run.compile=true", lambda r: r.run.compile is True),
        ("evaluate.limit=10", lambda r: r.evaluate.limit == 10),
    ],
)
def test_overrides(recipe, override, read):
    assert read(load_recipe(recipe, [override]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rate=1", ["unknown key 'train.learning_rate'", "did you mean"]),
        ("sampel.limit=1", ["unknown key 'sampel'", "did you mean 'sample'"]),
        ("trian.lr=1", ["unknown key 'trian'", "did you mean 'train'"]),
        ("stage.0.epoch=1", ["unknown key 'stage.0.epoch'", "'epochs'"]),
        ("train.epochs=two", ["epochs = 'two'", "whole number"]),
        ("train.epochs=2.5", ["epochs = 2.5", "whole number"]),
        ("train.epochs=true", ["epochs = True", "whole number"]),
        ("train.isolate=1", ["isolate = 1", "true or false"]),
        ("run.compute=fp8", ["run.compute = 'fp8'", "'bf16'", "'fp32'"]),
        ("train.betas=[0.9]", ["betas", "list of 2"]),
        ("train.epochs=0", ["epochs = 0", "out of range"]),
        ("train.min_lr=1.0", ["min_lr", "out of range"]),
        ("train.betas=[2.0, 0.9]", ["betas = (2.0, 0.9)", "out of range"]),
        ("train.eps=-1.0", ["eps = -1.0", "out of range"]),
        ("train.weight_decay=-1.0", ["weight_decay = -1.0", "out of range"]),
        ("stage.1.name=../low", ["stage.1.name = '../low'", "plain name"]),
        ("stage.1.name=''", ["stage.1.name = ''", "plain name"]),
        ("evaluate.samples=0", ["evaluate.samples = 0", "at least 1"]),
        ("run.threads=-1", ["run.threads = -1", "at least 0"]),
        ("stage=[3]", ["stage.0 must be a table"]),
        ("stage.1.name=low", ["two stages are called 'low'"]),
        ("stage.7.epochs=1", ["one of the 2 stages"]),
        ("model.path=", ["model.path is missing"]),
        ("lr", ["key.subkey=value"]),
    ],
)
def test_refusals_say_what_to_write(recipe, override, words):
    with pytest.raises(InputError) as error:
        load_recipe(recipe, [override])
    for word in words:
        assert word in str(error.value)


def test_a_recipe_needs_a_file_a_stage_and_toml(tmp_path, recipe):
    with pytest.raises(InputError, match="no such recipe"):
        load_recipe(tmp_path / "none.toml")
    recipe.write_text("[model]\npath = 'x'\n")
    with pytest.raises(InputError, match=r"no \[\[stage\]\]"):
        load_recipe(recipe)
    recipe.write_text("seed = = 1")
    with pytest.raises(InputError, match="not valid TOML.*line 1"):
        load_recipe(recipe)


def test_help_names_every_key_and_the_quickstart_is_packaged():
    text = describe()
    for name in ("packs_per_step", "activation_checkpointing", "max_new_tokens", "keep"):
        assert name in text
    assert packaged("quickstart.toml").is_file()

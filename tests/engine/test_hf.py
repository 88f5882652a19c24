"""Model directories: what goes out comes back, in transformers too, and what does not fit is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA3, YARN, make_theirs, pack

from dasd_engine import Decoder, InputError, init_weights, load_model, load_weights, read_config, save_model

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": dict(head_dim=16, tie_word_embeddings=True, rope_parameters=YARN, eos_token_id=[7, 9]),
    "qwen2": dict(use_sliding_window=False),
    "llama": dict(rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
}


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    make_theirs(tmp_path / "qwen3", "qwen3", head_dim=16)
    return tmp_path / "qwen3"


def edit_config(path: Path, **changes: Any) -> Path:
    """Changes fields of config.json; None removes one."""
    file = path / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return path


def edit_tensors(path: Path, **changes: torch.Tensor | None) -> Path:
    file = path / "model.safetensors"
    tensors = load_file(file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    return path


def logits(model: Decoder) -> torch.Tensor:
    return model.logits(model(*pack([25])))


# Out and in


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_is_saved(family: str, tmp_path: Path) -> None:
    theirs = make_theirs(tmp_path / "theirs", family, **FAMILIES[family])
    ours = load_model(tmp_path / "theirs")
    save_model(ours, tmp_path / "ours")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert type(loaded) is type(theirs) and loaded.dtype == torch.float32
    assert not any(info.values())
    tokens = pack([25])[0]
    assert torch.equal(loaded(tokens[None]).logits, theirs(tokens[None]).logits)
    for name in ("rope_parameters", "eos_token_id", "tie_word_embeddings", "max_position_embeddings", "head_dim"):
        assert getattr(loaded.config, name, None) == getattr(theirs.config, name, None)
    assert torch.equal(logits(load_model(tmp_path / "ours")), logits(ours))


@pytest.mark.parametrize("family", FAMILIES)
def test_configurations_survive_in_both_spellings_of_rope(family: str, tmp_path: Path) -> None:
    make_theirs(tmp_path / "model", family, **FAMILIES[family])
    config = read_config(tmp_path / "model")
    model = Decoder(config)
    init_weights(model, 0)
    save_model(model, tmp_path / "saved")
    new = edit_config(shutil.copytree(tmp_path / "saved", tmp_path / "new"), rope_theta=None, rope_scaling=None)
    old = edit_config(shutil.copytree(tmp_path / "saved", tmp_path / "old"), rope_parameters=None)
    assert read_config(new).rope == read_config(old).rope == config.rope
    values = json.loads((tmp_path / "saved/config.json").read_text())
    assert values["rope_theta"] == config.rope.rope_theta
    for directory in (new, old):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
        torch.testing.assert_close(theirs(pack([25])[0][None]).logits[0], logits(model), atol=1e-5, rtol=0)


def test_small_files_and_an_index(qwen3: Path, tmp_path: Path) -> None:
    model = load_model(qwen3)
    save_model(model, tmp_path / "many", max_shard_bytes=20_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 23_000 for file in files)
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    assert torch.equal(logits(load_model(tmp_path / "many")), logits(model))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    torch.testing.assert_close(theirs(pack([25])[0][None]).logits[0], logits(model), atol=1e-5, rtol=0)


def test_dtypes_on_load_and_on_save(qwen3: Path, tmp_path: Path) -> None:
    exact = load_model(qwen3)
    half = load_model(qwen3, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    assert torch.equal(half.embed_tokens.weight, exact.embed_tokens.weight.bfloat16())
    save_model(exact, tmp_path / "as bf16", dtype=torch.bfloat16)
    save_model(half, tmp_path / "from bf16")
    for name in ("as bf16", "from bf16"):
        stored = load_file(tmp_path / name / "model.safetensors")
        assert all(tensor.dtype == torch.bfloat16 for tensor in stored.values())
        assert torch.equal(stored["model.embed_tokens.weight"], half.embed_tokens.weight)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert exact.norm.weight.dtype == torch.float32


def test_tokenizer_files_come_along(qwen3: Path, tmp_path: Path) -> None:
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "vocab.json"]
    for name in names:
        (qwen3 / name).write_text(name)
    (qwen3 / "training_args.bin").write_text("no")
    save_model(load_model(qwen3), tmp_path / "out", qwen3)
    saved = {file.name for file in (tmp_path / "out").iterdir()}
    assert saved == {*names, "config.json", "model.safetensors"}
    assert (tmp_path / "out/chat_template.jinja").read_text() == "chat_template.jinja"


def test_random_weights_follow_the_seed(qwen3: Path) -> None:
    models = [Decoder(read_config(qwen3)) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        init_weights(model, seed)
    assert torch.equal(logits(models[0]), logits(models[1]))
    assert not torch.equal(logits(models[0]), logits(models[2]))
    q, k = models[0].layers[0].get_submodule("self_attn.q_proj"), models[0].layers[1].get_submodule("self_attn.q_proj")
    assert not torch.equal(q.weight, k.weight)


# Nothing lost


def test_a_saved_model_replaces_an_earlier_one_whole(qwen3: Path, tmp_path: Path) -> None:
    model = load_model(qwen3)
    save_model(model, tmp_path / "out", max_shard_bytes=20_000)
    save_model(model, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == {"qwen3", "out"}


def test_other_files_are_never_replaced(qwen3: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="home: exists and is no model directory .thesis.tex."):
        save_model(load_model(qwen3), tmp_path / "home")
    assert (tmp_path / "home/thesis.tex").read_text() == "years of work"


def test_a_full_disk_leaves_the_earlier_model(qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(qwen3)
    save_model(model, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    files = []

    def full(tensors: Any, file: Path, metadata: Any) -> None:
        files.append(file)
        if len(files) == 3:
            raise OSError(28, "No space left on device")
        save_file(tensors, file, metadata)

    monkeypatch.setattr("dasd_engine.hf.save_file", full)
    with pytest.raises(InputError, match="No space left"):
        save_model(model, tmp_path / "out", max_shard_bytes=20_000)
    assert len(files) == 3 and files[0].exists() is False
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_weights_that_do_not_fit_change_nothing(qwen3: Path, tmp_path: Path) -> None:
    model = load_model(qwen3)
    before = logits(model)
    other = shutil.copytree(qwen3, tmp_path / "other")
    edit_tensors(other, **{"model.norm.weight": torch.zeros(49), "model.embed_tokens.weight": torch.zeros(101, 48)})
    with pytest.raises(InputError):
        load_weights(model, other)
    assert torch.equal(logits(model), before)


# Bad input: configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not one of qwen3, qwen2, llama"),
        ({"model_type": None}, "the field model_type is missing"),
        ({"hidden_size": None}, "the field hidden_size is missing"),
        ({"rms_norm_eps": None}, "the field rms_norm_eps is missing"),
        ({"vocab_size": "101"}, "vocab_size must be int, is '101'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, is 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be bool, is 1"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of num_key_value_heads, which is 3"),
        ({"head_dim": 15}, "head_dim must be even for the rotary embedding, is 15"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures .* must be Qwen3ForCausalLM"),
        ({"quantization_config": {"bits": 4}}, "quantization_config .* is not supported"),
        ({"num_experts": 8}, "num_experts 8 is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1 is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .* is not supported"),
        (
            {"layer_types": None, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            "use_sliding_window True is not supported",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope' is not one of default, linear"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: the field factor is missing"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "rope_scaling: the field low_freq_factor is missing"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "a rotary embedding a layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"layer_types": 5}, "layer_types 5 is not supported"),
        ({"layer_types": [["full_attention"]]}, "layer_types .* is not supported"),
        ({"rope_parameters": {"rope_theta": -5.0}}, "rope_theta must be above 0, is -5.0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, "factor must be above 0, is 0.0"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_used_names_its_field(qwen3: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=rf"config\.json.*{message}"):
        read_config(edit_config(qwen3, **changes))


def test_an_inactive_sliding_window_is_no_obstacle(qwen3: Path) -> None:
    before = logits(load_model(qwen3))
    off = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1, "layer_types": None}
    assert torch.equal(logits(load_model(edit_config(qwen3, **off))), before)
    beyond = {"use_sliding_window": True, "max_window_layers": 2}
    assert torch.equal(logits(load_model(edit_config(qwen3, **beyond))), before)


def test_a_directory_without_a_readable_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="config.json: no such file"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(InputError, match="config.json: cannot be read"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="must hold a JSON object"):
        load_model(tmp_path)


# Bad input: weights


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "1 tensor is missing: model.layers.1.mlp.up_proj.weight"),
        ({"lm_head.weight": None}, "lm_head.weight is missing; should tie_word_embeddings .* be true"),
        (
            {"model.layers.2.mlp.up_proj.weight": torch.zeros(72, 48)},
            "1 tensor is not in the model .*layers.2.mlp.up_proj",
        ),
        (
            {"model.layers.0.self_attn.k_norm.weight": torch.zeros(8)},
            r"model.layers.0.self_attn.k_norm.weight is \[8\], config.json asks for \[16\]",
        ),
        (
            {"model.embed_tokens.weight": torch.zeros(128, 48)},
            r"model.embed_tokens.weight is \[128, 48\], config.json asks for \[101, 48\]; check vocab_size",
        ),
        ({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}, "model.norm.weight is I8, only float weights"),
    ],
    ids=["missing", "no head", "extra", "shape", "vocabulary", "dtype"],
)
def test_weights_that_do_not_fit_are_named(qwen3: Path, tensors: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(edit_tensors(qwen3, **tensors))


def test_tensors_that_old_files_carry_are_ignored(qwen3: Path) -> None:
    before = logits(load_model(qwen3))
    edit_tensors(qwen3, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert torch.equal(logits(load_model(qwen3)), before)
    tied = load_model(edit_config(qwen3, tie_word_embeddings=True))  # its file repeats a head, which is not used
    assert tied.head_weight is tied.embed_tokens.weight


@pytest.mark.parametrize("keep", [0.5, 0.99, 100, 4])
def test_a_truncated_file_is_found(qwen3: Path, keep: float) -> None:
    file = qwen3 / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    message = r"truncated: .* the tensor model\.\S+ ends at byte" if keep < 1 else "truncated or no safetensors file"
    with pytest.raises(InputError, match=rf"model\.safetensors: is {message}"):
        load_model(qwen3)


def test_bytes_beyond_the_last_tensor_are_found(qwen3: Path) -> None:
    with open(qwen3 / "model.safetensors", "ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match="model.safetensors: is no valid safetensors file"):
        load_model(qwen3)


def test_a_broken_header_is_found(qwen3: Path) -> None:
    file = qwen3 / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:12] = b"{{{{"
    file.write_bytes(data)
    with pytest.raises(InputError, match="header cannot be read"):
        load_model(qwen3)


def test_a_missing_or_misplaced_file_of_an_index_is_named(qwen3: Path, tmp_path: Path) -> None:
    many = tmp_path / "many"
    save_model(load_model(qwen3), many, max_shard_bytes=20_000)
    first, second = sorted(many.glob("*.safetensors"))[:2]
    data = first.read_bytes()
    first.unlink()
    with pytest.raises(InputError, match="model-00001-of-.* is missing, but model.safetensors.index.json lists it"):
        load_model(many)
    first.write_bytes(second.read_bytes())
    with pytest.raises(InputError, match="model-00001-of-.* lacks the tensor model.embed_tokens.weight"):
        load_model(many)
    first.write_bytes(data)
    (many / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="is not a safetensors index"):
        load_model(many)


def test_pickles_are_refused(qwen3: Path) -> None:
    (qwen3 / "model.safetensors").unlink()
    with pytest.raises(InputError, match="neither model.safetensors nor"):
        load_model(qwen3)
    (qwen3 / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(InputError, match="only pickled weights .pytorch_model.bin.*can run code.*safetensors"):
        load_model(qwen3)

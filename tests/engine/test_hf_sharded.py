"""Hugging Face directories and FSDP: two gloo ranks give what one process gives, and each reads only its rows."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import assert_close, make_theirs, pack

from dasd_engine import Decoder, init_weights, load_model, read_config

WORLD = 2


Ranks = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def both_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ranks]:
    """(directory, what each rank saw) of hf_rank.py, on models whose 101 rows of vocabulary two ranks cannot halve."""
    directories = {name: tmp_path_factory.mktemp(name) for name in ("tied", "untied")}
    for name, directory in directories.items():
        make_theirs(directory / "source", "qwen3", head_dim=16, tie_word_embeddings=name == "tied")
    worker = Path(__file__).with_name("hf_rank.py")
    processes = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), str(WORLD), *directories.values()], stderr=subprocess.PIPE, text=True
        )
        for rank in range(WORLD)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(errors)
    return {
        name: (directory, [torch.load(directory / f"rank{rank}.pt") for rank in range(WORLD)])
        for name, directory in directories.items()
    }


@pytest.fixture(params=["tied", "untied"])
def ranks(request: pytest.FixtureRequest, both_ranks: dict[str, Ranks]) -> Ranks:
    return both_ranks[request.param]


def parameters(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


def test_every_rank_loads_the_same_model(ranks: Ranks) -> None:
    directory, results = ranks
    expected = parameters(load_model(directory / "source"))
    for result in results:
        assert_same(result["loaded"], expected)
        assert_same(result["loaded with replicas"], expected)


def test_a_rank_reads_only_its_rows(ranks: Ranks) -> None:
    directory, results = ranks
    model = load_model(directory / "source")
    assert results[0]["rows_read"]["model.embed_tokens.weight"] == 51
    assert results[1]["rows_read"]["model.embed_tokens.weight"] == 50
    for name, tensor in parameters(model).items():
        stored = name if name.startswith("lm_head") else f"model.{name}"
        assert sum(result["rows_read"][stored] for result in results) == len(tensor)


def test_random_weights_do_not_depend_on_the_sharding(ranks: Ranks) -> None:
    directory, results = ranks
    model = Decoder(read_config(directory / "source"))
    init_weights(model, 7)
    for result in results:
        assert_same(result["initialised"], parameters(model))


def test_loss_and_gradients_through_the_head_of_a_sharded_root(ranks: Ranks) -> None:
    directory, results = ranks
    model = load_model(directory / "source")
    tokens, positions, cu_seqlens, max_seqlen = pack([9, 14])
    loss = F.cross_entropy(model.logits(model(tokens, positions, cu_seqlens, max_seqlen)), tokens.roll(-1))
    loss.backward()
    for result in results:
        torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-6, atol=0)
        for name, parameter in model.named_parameters():  # FSDP averages over ranks, which saw the same pack
            assert_close(result["gradients"][name], parameter.grad, 1e-5)


def test_mixed_precision_leaves_the_rotary_table_in_fp32(ranks: Ranks) -> None:
    _, results = ranks
    assert results[0]["dtypes"] == [torch.bfloat16, torch.float32]


def test_a_sharded_model_is_saved_whole(ranks: Ranks) -> None:
    directory, _ = ranks
    assert len(list((directory / "saved").glob("model-*-of-*.safetensors"))) > 2
    assert_same(parameters(load_model(directory / "saved")), parameters(load_model(directory / "source")))


def test_all_ranks_learn_that_saving_failed(ranks: Ranks) -> None:
    _, results = ranks
    assert "is no model directory" in results[0]["refused"]
    assert "the first rank could not save the model" in results[1]["refused"]

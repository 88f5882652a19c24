"""Teachers: which is opened, what is refused, and the engine's own against a plain forward."""

import json
import shutil
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from chats import write_model

from dasd_engine import Decoder, init_weights, load_model, read_config, save_model
from dasd_engine.chat import Chat
from dasd_engine.errors import InputError
from dasd_engine.teachers import (
    Failed,
    Request,
    Sampled,
    TeacherChat,
    TeacherOptions,
    checked,
    identify_teacher,
    open_teacher,
    parse_teacher,
)

STUDENT = Path(__file__).parents[2] / "recipes" / "quickstart" / "student"


def write_teacher(path: Path, seed: int = 0) -> Path:
    """The quickstart's student with random weights, large enough that its distributions are far from uniform and its
    tokens of single bytes break characters."""
    model = Decoder(read_config(STUDENT))
    init_weights(model, seed)
    with torch.no_grad():
        model.norm.weight.mul_(15)
        for layer in model.layers:
            layer.self_attn.o_proj.weight.mul_(20)
            layer.mlp.down_proj.weight.mul_(20)
    save_model(model, path, source=STUDENT)
    return path


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


def requests(count: int, **changes: object) -> list[Request]:
    first = Request("", [{"role": "user", "content": ""}], 1.0, 0, 24)
    said = [[{"role": "user", "content": f"{i} + {i} ="}] for i in range(count)]
    temperatures = [0.0, 0.6, 1.0]
    return [
        replace(first, key=f"k{i}", messages=said[i], seed=i, temperature=temperatures[i % 3], **changes)
        for i in range(count)
    ]


def ask(path: Path, asked: list[Request], **options: object) -> dict[str, Sampled | Failed]:
    with closing(open_teacher(TeacherOptions(path=str(path), dtype="fp32", device="cpu", **options))) as teacher:
        results = [(request.key, result) for request, result in teacher.sample(iter(asked))]
    assert sorted(key for key, _ in results) == sorted(request.key for request in asked)
    return dict(results)


def check_logprobs(path: Path, request: Request, result: Sampled, tolerance: float) -> None:
    """Against a plain forward of the whole text. Greedy tokens are the likeliest."""
    model = load_model(path)
    prompt = TeacherChat(str(path)).prompt(request)[0]
    ids = [*prompt, *result.token_ids]
    n = len(ids)
    with torch.no_grad():
        hidden = model(torch.tensor(ids), torch.arange(n), torch.tensor([0, n], dtype=torch.int32), n)
        logprobs = model.logits(hidden).log_softmax(-1)[len(prompt) - 1 : -1]
    tokens = torch.tensor(result.token_ids)
    expected = logprobs[torch.arange(len(tokens)), tokens]
    torch.testing.assert_close(torch.tensor(result.logprobs), expected, rtol=0, atol=tolerance)
    if request.temperature == 0:
        assert tokens.tolist() == logprobs.argmax(-1).tolist()


def test_local_gives_raw_logprobs_and_where_tokens_end(teacher_dir):
    asked = requests(9)
    results = ask(teacher_dir, asked)
    tokenizer = Chat.load(teacher_dir).tokenizer
    for request in asked:
        result = results[request.key]
        assert isinstance(result, Sampled)
        check_logprobs(teacher_dir, request, result, 1e-5)
        stop = result.finish_reason == "stop"
        spoken = result.token_ids[:-1] if stop else result.token_ids
        assert result.text == tokenizer.decode(spoken, skip_special_tokens=False)
        assert len(result.token_ends) == len(result.token_ids) == len(result.logprobs) <= 24
        assert result.token_ends[-1] == len(result.text.encode()) and result.token_ends == sorted(result.token_ends)
    assert any("\ufffd" in result.text for result in results.values())  # tokens that are no UTF-8 were sampled


def test_local_does_not_depend_on_the_batch(teacher_dir):
    asked = requests(10)
    together = ask(teacher_dir, asked)
    for batch_size, order in [(1, asked), (3, asked[::-1]), (64, asked[4:7])]:
        for key, result in ask(teacher_dir, order, batch_size=batch_size).items():
            assert result == together[key]


def test_local_continues_a_prefix(teacher_dir):
    """Greedy: the continuation of what it began itself is what it would have said."""
    (request,) = requests(1, max_new_tokens=20)
    whole = ask(teacher_dir, [request])["k0"]
    text = whole.text.encode()
    cut = whole.token_ends[7]
    prefix = text[:cut].decode()
    rest = ask(teacher_dir, [replace(request, prefix=prefix, max_new_tokens=12)])["k0"]
    again = Chat.load(teacher_dir).tokenizer.encode(prefix, add_special_tokens=False).ids
    if again == whole.token_ids[:8]:  # the tokeniser spells the prefix as it was sampled
        assert rest.text == text[cut:].decode() and rest.token_ids == whole.token_ids[8:]
    assert rest.opened == 0 and rest.token_ends[-1] == len(rest.text.encode())
    check_logprobs(teacher_dir, replace(request, prefix=prefix), rest, 1e-5)


def test_local_refuses_a_request_and_answers_the_others(teacher_dir, tmp_path):
    """A model of 96 positions: one prompt is longer, and one response is cut where they end."""
    shutil.copytree(teacher_dir, tmp_path / "short")
    config = json.loads((teacher_dir / "config.json").read_text())
    (tmp_path / "short/config.json").write_text(json.dumps(config | {"max_position_embeddings": 96}))
    teacher_dir = tmp_path / "short"
    asked = requests(4)
    asked[1] = replace(asked[1], messages=[{"role": "user", "content": "9 " * 100}])
    asked[2] = replace(asked[2], max_new_tokens=5000)
    results = ask(teacher_dir, asked, batch_size=2)
    assert "the model 96 positions" in results["k1"].reason
    assert isinstance(results["k0"], Sampled) and isinstance(results["k3"], Sampled)
    prompt = len(TeacherChat(str(teacher_dir)).prompt(asked[2])[0])
    assert results["k2"].finish_reason == "stop" or len(results["k2"].token_ids) == 96 - prompt


def test_a_template_that_opens_the_thinking(tmp_path):
    """Its opening goes in front of the text and is not counted as sampled; a prefix has it already."""
    chat = TeacherChat(str(write_model(tmp_path / "r1", "r1")))
    request = Request("a", [{"role": "user", "content": "Hi"}], 1.0, 0, 9)
    prompt = chat.prompt(request)
    assert prompt[1] == "<think>\n"
    ids = chat.chat.tokenizer.encode("So 4.\n</think>\n4", add_special_tokens=False).ids
    end = chat.chat.tokenizer.token_to_id("<|eos|>")
    result = chat.response(prompt, request, [*ids, end], [-0.5] * (len(ids) + 1), "stop")
    assert result.text == "<think>\nSo 4.\n</think>\n4" and result.opened == 8
    assert result.token_ends[-1] == result.token_ends[-2] == len(result.text)
    begun = replace(request, prefix="<think>\nSo")
    ids, opened = chat.prompt(begun)
    assert opened == "" and chat.chat.tokenizer.decode(ids, skip_special_tokens=False).endswith("<think>\nSo")
    with pytest.raises(InputError, match="has no thinking"):  # student and teacher template disagree
        chat.prompt(replace(request, prefix="So"))


def test_a_continuation_keeps_the_space_in_front(tmp_path):
    """A decoder that takes the first space away must not take it from between prefix and continuation."""
    chat = TeacherChat(str(write_model(tmp_path / "l2", "llama2")))
    request = Request("a", [{"role": "user", "content": "Hi"}], 1.0, 0, 9, prefix="the answer")
    prompt = chat.prompt(request)
    ids = chat.chat.tokenizer.encode("is 408", add_special_tokens=False).ids  # a space goes in front by itself
    result = chat.response(prompt, request, ids, [-0.5] * len(ids), "length")
    assert result.text == " is 408" and result.token_ends[-1] == 7


GOOD = Sampled("<think>\nab", 8, [5, 6], [-0.5, -0.0], [9, 10], "stop")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"token_ids": None}, None),
        ({"text": "<think>\n \n", "token_ends": [9, 10]}, "the text is empty"),
        ({"logprobs": [-0.5, float("nan")]}, "logprob of token 1 is nan"),
        ({"logprobs": [float("-inf"), -0.5]}, "logprob of token 0 is -inf"),
        ({"logprobs": [None, -0.5]}, "logprob of token 0 is None"),
        ({"logprobs": [0.5, -0.5]}, "logprob of token 0 is 0.5"),
        ({"logprobs": [-0.5]}, "2 tokens, 1 logprobs and 2 token ids"),
        ({"token_ids": [5]}, "2 tokens, 2 logprobs and 1 token ids"),
        ({"text": "<think>\na\ud800"}, "half a surrogate pair at character 9"),
    ],
)
def test_what_is_no_response(changes, reason):
    result = checked(replace(GOOD, **changes))
    if reason is None:
        assert result == replace(GOOD, **changes)
    else:
        assert isinstance(result, Failed) and reason in result.reason


def test_names_of_teachers():
    assert parse_teacher(["dir"]) == {"kind": "local", "path": "dir"}
    assert parse_teacher(["vllm:dir"]) == {"kind": "vllm", "path": "dir"}
    assert parse_teacher(["http://a", "https://b"]) == {"kind": "server", "urls": ("http://a", "https://b")}
    for bad in (["a", "b"], ["http://a", "b"], []):
        with pytest.raises(InputError, match="name one directory"):
            parse_teacher(bad)


def test_what_a_teacher_is_changes_with_its_files_and_not_with_how_it_is_run(teacher_dir, tmp_path):
    options = TeacherOptions(path=str(teacher_dir))
    known = identify_teacher(options)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(known["files"])
    assert identify_teacher(replace(options, batch_size=3, threads=2)) == known
    assert identify_teacher(replace(options, dtype="bf16")) != known
    other = write_teacher(tmp_path / "tiny", seed=1)
    assert identify_teacher(replace(options, path=str(other))) != known
    server = replace(options, kind="server", path="", urls=("http://a",), model="m")
    assert identify_teacher(server) == identify_teacher(replace(server, urls=("http://b",), api_key_env="KEY"))
    assert "api_key_env" not in identify_teacher(server) and asdict(server)["urls"] == ("http://a",)


def test_a_missing_teacher_is_named(teacher_dir, tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        open_teacher(TeacherOptions(path=str(tmp_path / "none")))
    for option, message in (("device", "device 'gpu0': cannot be used here"), ("threads", "threads = -1")):
        with pytest.raises(InputError, match=message):
            open_teacher(TeacherOptions(path=str(teacher_dir), **{option: "gpu0" if option == "device" else -1}))
    with pytest.raises(InputError, match="batch_size = 0"):
        open_teacher(TeacherOptions(path=str(tmp_path), batch_size=0))

"""Mixed-policy responses in prepare: the student's tokens as sampled, then the continuation's, and the loss spans."""

import functools
import json

import pytest
from chats import assistant, marked, user, write_model
from hypothesis import given
from hypothesis import strategies as st

from dasd_engine.chat import Chat, Prefix
from dasd_engine.errors import InputError
from dasd_engine.prepare import prepare
from dasd_engine.shards import Shards

TEXT = st.text(st.sampled_from("ab the 12 \n.é漢🙂"), min_size=1, max_size=40).filter(str.strip)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, name) for name in ("qwen3", "llama3", "r1", "llama2")}


@functools.cache
def chat_of(path):
    return Chat.load(path)


def document(chat, output, prefix):
    [(ids, spans)] = chat.documents([user("2+2?"), assistant(output)], prefix=prefix)
    return ids.tolist(), spans


@given(written=TEXT, rest=TEXT, trained=st.booleans(), name=st.sampled_from(["qwen3", "llama3", "llama2"]))
def test_the_document_is_prompt_then_sampled_ids_then_continuation(models, written, rest, trained, name):
    chat = chat_of(models[name])
    # One token a character at most where the vocabulary allows it: hardly ever the ids of the text.
    sampled = [i for character in written for i in chat.tokenizer.encode(character, add_special_tokens=False).ids]
    spelled = chat.tokenizer.decode(sampled, skip_special_tokens=False)
    if name == "llama2" and spelled.startswith(" "):  # its decoder takes a space off the front of any text
        return
    ids, spans = document(chat, spelled + rest, Prefix(spelled, sampled, trained))
    prompt = chat.prompt_ids([user("2+2?")])
    begin = len(prompt) + len(sampled)
    assert ids[:begin] == prompt + sampled
    assert spans == [(len(prompt) if trained else begin, len(ids))]
    assert ids[-1] in chat.stop_ids
    if name != "llama2":
        assert chat.tokenizer.decode(ids[begin:-1], skip_special_tokens=False) == rest


def test_masked_by_hand(models):
    chat = chat_of(models["qwen3"])
    masked = document(chat, "<think>\n2 + 2 = 5. Wait, 4.</think>4", Prefix("<think>\n2 + 2 = 5.", trained=False))
    assert marked(chat.tokenizer, *masked).endswith("assistant\n<think>\n2 + 2 = 5.⟦ Wait, 4.</think>4<|im_end|>⟧")


def test_an_opening_that_the_prompt_has_is_no_part_of_the_ids(models):
    chat = chat_of(models["r1"])  # its generation prompt ends in <think>\n
    sampled = chat.tokenizer.encode("2 + 2", add_special_tokens=False).ids
    for ids in (sampled, None):
        prefix = Prefix("<think>\n2 + 2", ids, trained=False)
        text = marked(chat.tokenizer, *document(chat, "<think>\n2 + 2 = 4</think>4", prefix))
        assert text.endswith("<think>\n2 + 2⟦ = 4</think>4<|eos|>⟧")
    only_opened = document(chat, "<think>\n2 = 2</think>2", Prefix("<think>\n", [], trained=False))
    assert marked(chat.tokenizer, *only_opened).endswith("<think>\n⟦2 = 2</think>2<|eos|>⟧")


@pytest.mark.parametrize(
    ("prefix", "message"),
    [(Prefix("3"), "not the front of the response"), (Prefix("2 +", [1, 2]), "do not spell the prefix")],
)
def test_a_prefix_that_does_not_fit_is_refused(models, prefix, message):
    with pytest.raises(InputError, match=message):
        document(chat_of(models["qwen3"]), "2 + 2", prefix)


def test_prepare_masks_the_prefix_of_rows_that_have_one(models, tmp_path):
    chat = chat_of(models["qwen3"])
    ids = chat.tokenizer.encode("abc", add_special_tokens=False).ids
    rows = [
        {"uuid": "1", "input": "q", "output": "abcdef", "prefix": "abc", "prefix_ids": ids},
        {"uuid": "2", "input": "q", "output": "abcdef"},
        {"uuid": "3", "prompt": "q", "completion": "abcdef", "prefix": "no concern of ours"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def spans(mask):
        out = tmp_path / f"shards-{mask}"
        prepare([tmp_path / "rows.jsonl"], models["qwen3"], out, mask_prefix=mask, quiet=True)
        return Shards.open(out).loss_spans.tolist()

    prompt = len(chat.prompt_ids([user("q")]))
    assert [begin for _, begin, _ in spans(False)] == [prompt] * 3
    assert [begin for _, begin, _ in spans(True)] == [prompt + len(ids), prompt, prompt]
    with pytest.raises(InputError, match="mask_prefix: None then, True now"):
        prepare([tmp_path / "rows.jsonl"], models["qwen3"], tmp_path / "shards-False", mask_prefix=True, quiet=True)


def test_bad_prefix_ids_name_file_line_and_field(models, tmp_path):
    row = {"input": "q", "output": "abc", "prefix": "a", "prefix_ids": ["a"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=r"rows.jsonl:1: prefix_ids: is a list, expected a list of token ids"):
        prepare([tmp_path / "rows.jsonl"], models["qwen3"], tmp_path / "out", quiet=True)

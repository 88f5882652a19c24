"""Chat: golden masks of known templates, prompts as inference feeds them, responses verbatim, bad templates refused."""

import json
from datetime import datetime

import pytest
from chats import QWEN3_TOKENIZER, SPECIAL, TEMPLATES, assistant, make_tokenizer, marked, system, user, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_engine.chat import DEFAULT_SYSTEM, Chat
from dasd_engine.errors import InputError

THINKING = "<think>\nAdd them.\n\n</think>\n\nIt's 4."
NOW = datetime(2026, 1, 9)


def make_chat(template, split=None):
    bos, eos, *_ = SPECIAL[template]
    special = {"bos_token": bos, "eos_token": eos} if bos else {"eos_token": eos}
    text = (TEMPLATES / f"{template}.jinja").read_text()
    return Chat(make_tokenizer(template, split), text, special_tokens=special, now=NOW)


GOLDEN = [
    (
        "qwen3",
        [user("What is 2+2?"), assistant(THINKING)],
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nAdd them.\n\n</think>\n\nIt's 4.<|im_end|>⟧",
    ),
    (  # no empty thinking is put in front of a response that has none, and no space is stripped
        "qwen3",
        [system("Be brief."), user("Hi"), assistant("  Hello! \n"), user("Bye"), assistant("See you")],
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦  Hello! \n<|im_end|>⟧\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n⟦See you<|im_end|>⟧",
    ),
    (
        "chatml",
        [user("Hi"), assistant(THINKING), user("Sure?"), assistant("Yes.")],
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nAdd them.\n\n</think>\n\nIt's 4.<|im_end|>⟧\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n⟦Yes.<|im_end|>⟧",
    ),
    (
        "llama3",
        [user(" What is 2+2? "), assistant("It's 4."), user("Sure?"), assistant(THINKING)],
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 09 Jan 2026\n\nYou are a helpful assistant.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It's 4.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦<think>\nAdd them.\n\n</think>\n\nIt's 4.<|eot_id|>⟧",
    ),
    (  # the generation prompt has opened the thinking: it is not opened twice, and its opening is not trained
        "r1",
        [user("What is 2+2?"), assistant(THINKING)],
        "<|bos|>You are a helpful assistant.<|User|>What is 2+2?<|Assistant|><think>\n"
        "⟦Add them.\n\n</think>\n\nIt's 4.<|eos|>⟧",
    ),
    (
        "r1",
        [system("S"), user("Q"), assistant("thought</think>A")],
        "<|bos|>S<|User|>Q<|Assistant|><think>\n⟦thought</think>A<|eos|>⟧",
    ),
    ("r1", [system("S"), user("Q"), assistant("<think>t")], "<|bos|>S<|User|>Q<|Assistant|><think>\n⟦t<|eos|>⟧"),
    (
        "r1",
        [system("S"), user("Q"), assistant("\n<think>\n\nt</think>")],
        "<|bos|>S<|User|>Q<|Assistant|><think>\n⟦\nt</think><|eos|>⟧",
    ),
]


@pytest.mark.parametrize("template, messages, golden", GOLDEN)
def test_golden_masks(template, messages, golden):
    chat = make_chat(template)
    ids, spans = chat.encode(messages)
    assert marked(chat.tokenizer, ids, spans) == golden


def test_golden_tokens():
    """One document token by token: the end-of-turn token is one id, and the last trained one."""
    chat = make_chat("chatml")
    ids, spans = chat.encode([user("2+2"), assistant("It's 4.")], system="")
    assert [chat.tokenizer.decode([token], skip_special_tokens=False) for token in ids] == [
        "<|im_start|>", "user", "\n", "2", "+", "2", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n",
        "It", "'s", " ", "4", ".", "<|im_end|>",
    ]  # fmt: skip
    assert spans == [(11, 17)]


def test_history_that_drops_thinking_makes_a_document_a_turn():
    """Qwen3 shows turn two without the thinking of turn one: both are trained, each behind its own prompt."""
    chat = make_chat("qwen3")
    messages = [system("S"), user("Q1"), assistant(THINKING), user("Q2"), assistant("<think>\nb\n</think>\n\nB")]
    first, second = [marked(chat.tokenizer, ids.tolist(), spans) for ids, spans in chat.documents(messages)]
    start = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"
    assert first == start + "⟦" + THINKING + "<|im_end|>⟧"
    assert second == (
        start + "It's 4.<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nb\n</think>\n\nB<|im_end|>⟧"
    )
    with pytest.raises(InputError, match="makes 2 documents"):
        chat.encode(messages)


def test_spaces_that_a_template_strips_from_the_history():
    chat = make_chat("llama3")
    documents = chat.documents([user("Q1"), assistant("A1 \n"), user("Q2"), assistant("A2")])
    texts = [marked(chat.tokenizer, ids.tolist(), spans) for ids, spans in documents]
    assert len(texts) == 2
    assert texts[0].endswith("⟦A1 \n<|eot_id|>⟧") and "A1<|eot_id|>" in texts[1]


def test_tool_turns_keep_thinking_in_one_document():
    """Within one query Qwen3 keeps the thinking of earlier steps, so the steps stay together."""
    chat = make_chat("qwen3")
    step = "<think>\nAdd them.\n</think>\n\nIt's 4."
    steps = [user("Q"), assistant(step), {"role": "tool", "content": "4"}, assistant("<think>\nb\n</think>\n\nB")]
    ids, spans = chat.encode(steps)
    assert len(spans) == 2
    assert chat.tokenizer.decode(ids[slice(*spans[0])], skip_special_tokens=False) == step + "<|im_end|>"


CONVERSATION = [
    user("What's 2+2?"), assistant("It's  4. \n"), user("Sure?"), assistant("\n\nYes."), user("!"), assistant(THINKING),
]  # fmt: skip


@pytest.mark.parametrize("template", sorted(SPECIAL))
def test_prompts_are_what_inference_feeds(template):
    """In front of every trained span stand the ids of that turn's prompt, and every turn is trained once."""
    chat = make_chat(template)
    messages = [
        {**message, "content": f"<think>\nt</think>{message['content']}"}
        if template == "r1" and message["role"] == "assistant"
        else message
        for message in CONVERSATION
    ]
    spans = [(ids, begin, end) for ids, spans in chat.documents(messages) for begin, end in spans]
    assert len(spans) == 3
    for index, (ids, begin, end) in zip((1, 3, 5), spans, strict=True):
        assert ids[:begin].tolist() == chat.prompt_ids(messages[:index])
        assert ids[end - 1] in chat.stop_ids
        response = chat.tokenizer.decode(ids[begin : end - 1].tolist(), skip_special_tokens=False)
        expected = messages[index]["content"]
        if template == "r1":  # the prompt has opened the thinking
            expected = expected.removeprefix("<think>\n")
        if template == "llama2":  # this template puts a space in front of </s>, its decoder strips the first one
            expected = expected.removeprefix(" ") + " "
        assert response == expected


def test_a_response_that_merges_with_its_prompt():
    r"""Qwen's split makes one token of "\n" + "\n\n": the prompt keeps its ids, and the response its text."""
    chat = make_chat("qwen3")
    together = chat.tokenizer.encode("assistant\n\n\nYes.").ids
    apart = chat.tokenizer.encode("assistant\n").ids
    assert together[: len(apart)] != apart  # or this test shows nothing
    messages = [user("Q"), assistant("\n\nYes.")]
    ids, [(begin, end)] = chat.encode(messages)
    assert ids[:begin] == chat.prompt_ids(messages[:1])
    assert chat.tokenizer.decode(ids[begin:end], skip_special_tokens=False) == "\n\nYes.<|im_end|>"


def test_what_follows_the_last_response_is_left_out():
    chat = make_chat("chatml")
    turns = [user("Q"), assistant("A")]
    assert chat.encode([*turns, user("more")]) == chat.encode(turns)


def test_default_system_prompt():
    chat = make_chat("chatml")
    plain = [user("Q"), assistant("A")]
    assert chat.encode(plain) == chat.encode([system(DEFAULT_SYSTEM), *plain])
    assert chat.encode(plain, system="S") == chat.encode([system("S"), *plain])
    assert chat.encode([system("own"), *plain], system="S") == chat.encode([system("own"), *plain])
    assert chat.render(plain[:1]) == "<|im_start|>user\nQ<|im_end|>\n"
    assert chat.encode(plain, system="")[0] == chat.tokenizer.encode(chat.render(plain)).ids[:-1]  # its last newline


# Texts that a BPE, a regular expression and Unicode normalisation have trouble with.
TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60) | st.text(
    st.sampled_from(list(" \n\r\t.'s2x<>|é́é\u200d👩👧의\u2028\u00a0")), min_size=1, max_size=40
)


@settings(max_examples=150, deadline=None)
@given(response=TEXT, template=st.sampled_from(["qwen3", "chatml", "llama3"]))
def test_trained_tokens_decode_to_the_response(response, template):
    chat = chats[template]
    if not response.strip():
        with pytest.raises(InputError, match="empty"):
            chat.encode([user("Q"), assistant(response)])
        return
    ids, [(begin, end)] = chat.encode([user("Q"), assistant(response)])
    assert end == len(ids) and ids[-1] in chat.stop_ids
    assert ids[:begin] == chat.prompt_ids([user("Q")])
    normalizer = chat.tokenizer.normalizer
    expected = normalizer.normalize_str(response) if normalizer else response  # the tokeniser's own, e.g. NFC
    assert chat.tokenizer.decode(ids[begin : end - 1], skip_special_tokens=False) == expected


chats = {template: make_chat(template) for template in ("qwen3", "chatml", "llama3")}


@pytest.mark.parametrize("template", sorted(SPECIAL))
def test_render_equals_transformers(template, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    folder = write_model(tmp_path / "model", template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Chat.load(folder)
    conversations = [
        [user("Q")],
        [system(" S "), user(" Q\n"), assistant(" A "), user("é <b>&amp;</b>")],
        [user("Q"), assistant(THINKING), user("Q2"), assistant(THINKING)],
    ]
    for messages in conversations:
        for prompt in (False, True):
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert ours.render(messages, add_generation_prompt=prompt) == expected


def test_template_environment(tmp_path):
    """tojson as transformers has it, loop controls, {% generation %}, the date."""
    template = (
        "{%- for message in messages %}{%- if loop.index > 2 %}{% break %}{% endif %}"
        "{% generation %}{{ message | tojson }}{% endgeneration %}{{ strftime_now('%Y') }}<|im_end|>{%- endfor %}"
    )
    chat = Chat(make_tokenizer("chatml"), template, special_tokens={"eos_token": "<|im_end|>"}, now=NOW)
    assert chat.render([user("é<&>'")] * 3) == '{"role": "user", "content": "é<&>\'"}2026<|im_end|>' * 2


def test_stop_ids_and_where_the_template_is(tmp_path):
    folder = write_model(tmp_path / "model", "qwen3", eos_token="<|endoftext|>")
    token = make_tokenizer("qwen3").token_to_id
    chat = Chat.load(folder)
    assert chat.end_of_turn == "<|im_end|>"
    assert chat.stop_ids == {token("<|im_end|>"), token("<|endoftext|>")}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, token("<|im_end|>")]}))
    assert Chat.load(folder).stop_ids == {5, token("<|im_end|>"), token("<|endoftext|>")}
    (folder / "generation_config.json").write_text('{"eos_token_id": 6}')
    assert 6 in Chat.load(folder).stop_ids
    # chat_template.jinja goes before tokenizer_config.json; a template without an end of turn gets the eos
    plain = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(plain)
    chat = Chat.load(folder)
    ids, spans = chat.encode([user("Q"), assistant(" A")], system="")
    assert marked(chat.tokenizer, ids, spans) == "user: Q\nA:⟦ A<|endoftext|>⟧"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": plain}]
    other = write_model(tmp_path / "named", "qwen3", chat_template=named)
    assert Chat.load(other).render([user("Q")]) == "user: Q\n"


def test_truncation_in_the_tokeniser_file_is_off(tmp_path):
    folder = write_model(tmp_path / "model", "chatml")
    tokenizer = make_tokenizer("chatml")
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids, spans = Chat.load(folder).encode([user("Q"), assistant("A" * 50)])
    assert marked(tokenizer, ids, spans).endswith("⟦" + "A" * 50 + "<|im_end|>⟧")


@pytest.mark.parametrize(
    "template, messages, message",
    [
        ("qwen3", [user("Q")], "no assistant message"),
        ("qwen3", [user("Q"), assistant(" \n")], r"messages\[2\].content: the response is empty"),
        ("qwen3", [user("Q"), assistant("A<|im_end|>")], r"messages\[2\].content: contains a token that ends a turn"),
        ("r1", [user("Q"), assistant("just an answer")], r"messages\[2\].content: has no thinking"),
        (
            "r1",
            [{"role": "tool", "content": "4"}, assistant(THINKING)],
            r"fails on roles \[system, tool\]: no role tool",
        ),
    ],
)
def test_conversations_that_cannot_be_trained(template, messages, message):
    with pytest.raises(InputError, match=message):
        make_chat(template).encode(messages)


def test_bad_model_directories(tmp_path):
    with pytest.raises(InputError, match="tokenizer_config.json: no such file"):
        Chat.load(tmp_path)
    folder = write_model(tmp_path / "model", chat_template=None)
    with pytest.raises(InputError, match="no chat template"):
        Chat.load(folder)
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(InputError, match=r"chat_template.jinja:1: is not a valid template"):
        Chat.load(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(InputError, match="does not write the content"):
        Chat.load(folder)
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")  # the sandbox
    with pytest.raises(InputError, match="chat_template.jinja: fails"):
        Chat.load(folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match="chat_template.jinja: is not UTF-8"):
        Chat.load(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text('{"chat_template": [3]}')
    with pytest.raises(InputError, match="no chat template"):
        Chat.load(folder)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[-1].content }}"}')
    with pytest.raises(InputError, match="set eos_token"):
        Chat.load(folder)
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(InputError, match="tokenizer_config.json: is not JSON"):
        Chat.load(folder)
    folder = write_model(tmp_path / "other")
    (folder / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(InputError, match="generation_config.json: eos_token_id"):
        Chat.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer.json: is not a tokeniser"):
        Chat.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="tokenizer.json: no such file"):
        Chat.load(folder)


@pytest.mark.skipif(not QWEN3_TOKENIZER.exists(), reason="the Qwen3 tokeniser is not on this machine")
def test_the_real_qwen3_tokeniser():
    chat = Chat.load(QWEN3_TOKENIZER)
    assert (QWEN3_TOKENIZER / "tokenizer_config.json").read_text().count("chat_template") == 1
    template = json.loads((QWEN3_TOKENIZER / "tokenizer_config.json").read_text())["chat_template"]
    assert template == (TEMPLATES / "qwen3.jinja").read_text()
    ids, [(begin, end)] = chat.encode([user("What is 2+2?"), assistant(THINKING)])
    # <|im_start|> assistant \n | <think> \n Add them . \n\n </think> \n\n It 's _ 4 . <|im_end|>
    assert ids[begin - 3 : begin] == [151644, 77091, 198]
    assert ids[begin:end] == [151667, 198, 2212, 1105, 382, 151668, 271, 2132, 594, 220, 19, 13, 151645]
    assert chat.stop_ids == {151645}

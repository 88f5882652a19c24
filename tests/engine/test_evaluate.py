"""evaluate: how answers are judged, what a report says, and what bad problems are told."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dasd_engine import Decoder, ModelConfig, init_weights, save_model
from dasd_engine.chat import Chat
from dasd_engine.errors import InputError
from dasd_engine.evaluate import (
    Response,
    bootstrap,
    evaluate,
    final_answer,
    is_right,
    main,
    read_problems,
    spread,
    summarize,
)
from dasd_engine.generate import Generation

STUDENT = Path(__file__).parents[2] / "recipes" / "quickstart" / "student"


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("<think>1 + 1 = 2</think>The answer is 2.", "The answer is 2."),
        ("<think>a</think>1<think>b</think>\n 2 \n", "2"),
        ("no thinking: 7", "no thinking: 7"),
        ("<think>1 + 1 = 2", None),  # cut off while thinking: 2 is no answer
        ("<think>a</think>", ""),
        (r"<think>a</think>So \boxed{3} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"<think>\boxed{5}</think>6", "6"),
    ],
)
def test_final_answer(output, answer):
    assert final_answer(output) == answer


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("-4", "-4"),
        ("The answer is -4.", "-4"),
        ("So 3 apples and 4 pears make 7 pieces.", "7"),  # the last number
        ("1,200", "1200"),
        ("$1,200.00$", "1200"),
        ("0.5", "1/2"),
        (" 1 / 2 ", ".5"),
        ("1e3", "1000"),
        ("Answer: Tuesday", "tuesday"),
        ("  Two   words ", "two words"),
        ("The final answer is Blue.", "blue"),
        ("x^2", "$x^2$"),
        ("7 - 5 = 2", "2"),
        ("from 5-3", "3"),
    ],
)
def test_right_answers(answer, expected):
    assert is_right(answer, expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("4", "-4"),
        ("The answer is 7, not 8", "7"),  # the last number is 8, and the phrase is not 7 alone
        ("14", "4"),
        ("1.20", "120"),
        ("0.3333", "1/3"),  # exact, without tolerance
        ("", "0"),
        ("Tuesday or Monday", "Tuesday"),
        ("1/0", "1"),
        ("there is no number", "3"),
        ("12,34", "1234"),
    ],
)
def test_wrong_answers(answer, expected):
    assert not is_right(answer, expected)


def response(task: str, correct: bool, finish: str = "stop", length: int = 10) -> Response:
    return Response("id", task, 0, "", correct, finish, length, "")


def test_summary_averages_samples_then_problems():
    rows = [response("a", True), response("a", True), response("a", True), response("a", False)]
    rows += [response("b", False, "length", 30), response("b", False, "stop", 20)]
    report = summarize(rows, samples=2, seconds=1.5)
    assert report.pass_at_1 == pytest.approx(0.5)  # (1 + 0.5 + 0) / 3
    assert report.by_task == {"a": pytest.approx(0.75), "b": 0.0}
    assert report.count_by_task == {"a": 2, "b": 1}
    assert report.count == 3 and report.samples == 2
    assert report.mean_length == pytest.approx(90 / 6)
    assert report.cut_off_rate == pytest.approx(1 / 6)
    assert report.interval_by_task["b"] == (0.0, 0.0)
    assert report.interval[0] <= report.pass_at_1 <= report.interval[1]


def test_bootstrap_covers_like_the_normal_interval():
    scores = (np.arange(400) % 5 == 0).astype(float)
    low, high = bootstrap(scores)
    half = 1.96 * (0.2 * 0.8 / 400) ** 0.5
    assert low == pytest.approx(0.2 - half, abs=0.01)
    assert high == pytest.approx(0.2 + half, abs=0.01)
    assert bootstrap(scores) == (low, high)


def row(question="1 + 1 =", meta='{"answer": "2", "task": "sum"}', **other) -> dict:
    return {"uuid": "u", "input": question, "output": "", "domain": "math", "meta": meta, **other}


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_problems_are_read_with_their_task(tmp_path):
    path = write(tmp_path / "p.jsonl", [row(), "", row(meta='{"answer": 3}'), row(meta='{"answer": "4"}', domain="")])
    assert [(p.answer, p.task) for p in read_problems(path)] == [("2", "sum"), ("3", "math"), ("4", "all")]


def test_a_limit_takes_problems_from_the_whole_file(tmp_path):
    problems = read_problems(write(tmp_path / "p.jsonl", [row(question=str(i)) for i in range(10)]))
    assert [p.question for p in spread(problems, 4)] == ["0", "2", "5", "7"]
    assert spread(problems, 40) == spread(problems, None) == problems
    with pytest.raises(InputError, match="limit = 0"):
        spread(problems, 0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{oops", r"p\.jsonl:2: is not valid JSON"),
        ("[1]", r"p\.jsonl:2: must be a JSON object, not list"),
        (row(question=" "), r"p\.jsonl:2: `input` must be the question"),
        (row(meta={"answer": "2"}), r"p\.jsonl:2: `meta` must be a JSON string"),
        (row(meta="{"), r"p\.jsonl:2: meta: is not valid JSON"),
        (row(meta='{"answers": "2"}'), r"p\.jsonl:2: meta holds no `answer`"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, message):
    with pytest.raises(InputError, match=message):
        read_problems(write(tmp_path / "p.jsonl", [row(), bad]))


def test_bad_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl: cannot be read: No such file"):
        read_problems(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"empty\.jsonl: holds no problems"):
        read_problems(write(tmp_path / "empty.jsonl", [""]))
    (tmp_path / "bytes.jsonl").write_bytes(b'{"input": "\xff"}\n')
    with pytest.raises(InputError, match=r"bytes\.jsonl:1: is not UTF-8"):
        read_problems(tmp_path / "bytes.jsonl")


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat.load(STUDENT)


def tiny_model(vocabulary: int) -> Decoder:
    config = ModelConfig(
        model_type="qwen3", vocab_size=vocabulary, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    model = Decoder(config)
    init_weights(model, 0)
    return model


def test_evaluate_asks_and_judges(tmp_path, chat, monkeypatch):
    """With a stand-in for sampling: the prompts asked are the chat template's, and what comes back is judged."""
    tokenizer = chat.tokenizer
    script = {
        "3 + 4 =": ["<think>\n3 + 4 = 7\n</think>\nThe answer is 7.", "<think>\n3 + 4 = 8\n</think>\nThe answer is 8."],
        "2 + 2 =": ["<think>\n2 + 2 = 4", "<think>\n2 + 2 = 4\n</think>\n4"],
    }

    def scripted(model, prompts, *, stop_ids, seed, max_new_tokens, on_finish, **options):
        out, asked = [], {question: 0 for question in script}
        for i, prompt in enumerate(prompts):
            text = tokenizer.decode(prompt, skip_special_tokens=False)
            assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>")
            assert text.endswith("<|im_start|>assistant\n")
            question = next(q for q in script if q in text)
            answer = script[question][asked[question]]
            asked[question] += 1
            ids = tokenizer.encode(answer).ids
            cut = "</think>" not in answer
            end = [] if cut else [tokenizer.token_to_id("<|im_end|>")]
            out.append(Generation(ids + end, [0.0] * len(ids + end), "length" if cut else "stop"))
            on_finish(i, out[-1])
        return out

    monkeypatch.setattr("dasd_engine.evaluate.generate", scripted)
    rows = [
        row(f"{q}", json.dumps({"answer": a, "task": t})) for q, a, t in [("3 + 4 =", "7", "x"), ("2 + 2 =", "4", "y")]
    ]
    report = evaluate(None, chat, write(tmp_path / "p.jsonl", rows), samples=2, temperature=1.0)
    assert report.by_task == {"x": 0.5, "y": 0.5}
    assert report.cut_off_rate == 0.25


def test_evaluate_a_real_model_twice_the_same(tmp_path, chat):
    model = tiny_model(chat.tokenizer.get_vocab_size())
    path = write(tmp_path / "p.jsonl", [row(question=f"{i} + 1 =") for i in range(5)])
    options = {"samples": 3, "temperature": 1.0, "max_new_tokens": 6, "seed": 2}
    first, second = evaluate(model, chat, path, **options), evaluate(model, chat, path, **options, batch_size=2)
    assert first.pass_at_1 == second.pass_at_1 and first.mean_length == second.mean_length
    assert first.count == 5 and 1 <= first.mean_length <= 6


def test_command_line_writes_report_and_responses(tmp_path, chat, monkeypatch, capsys):
    torch.manual_seed(0)
    save_model(tiny_model(chat.tokenizer.get_vocab_size()), tmp_path / "model", source=STUDENT)
    path = write(tmp_path / "p.jsonl", [row(), row(question="2 + 2 =")])
    command = ["evaluate", str(tmp_path / "model"), str(path), "--max-new-tokens", "4", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*command, "--json"])
    main()
    report = json.loads(capsys.readouterr().out)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["report"] == report and report["count"] == 2
    lines = (tmp_path / "out" / "responses.jsonl").read_text().splitlines()
    assert [json.loads(line)["task"] for line in lines] == ["sum", "sum"]
    monkeypatch.setattr("sys.argv", command)
    main()
    assert "pass@1" in capsys.readouterr().out

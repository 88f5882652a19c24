"""The data that ships with the default run: its schema, that held-out problems are not trained on, and its answers,
worked out again here without reasoning-gym."""

import ast
import json
import operator
import re
import uuid
from pathlib import Path

import pytest

from dasd_engine.chat import Chat
from dasd_engine.config import load_recipe
from dasd_engine.model_config import read_config
from dasd_engine.problems import final_answer, is_right, read_problems

RECIPES = Path(__file__).parents[2] / "recipes"
FOLDER = RECIPES / "quickstart"
SPLITS = ("stage1", "stage2", "heldout")
SYSTEM = "You are a helpful assistant."


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {name: [json.loads(line) for line in open(FOLDER / f"{name}.jsonl", "rb")] for name in SPLITS}


def meta(row: dict) -> dict:
    return json.loads(row["meta"])


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def value(expression: str) -> int:
    """An expression of whole numbers with + - * and x, by Python's own grammar."""
    operators = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.USub: operator.neg}

    def walk(node: ast.AST) -> int:
        if isinstance(node, ast.BinOp):
            return operators[type(node.op)](walk(node.left), walk(node.right))
        if isinstance(node, ast.UnaryOp):
            return operators[type(node.op)](walk(node.operand))
        assert isinstance(node, ast.Constant) and isinstance(node.value, int), expression
        return node.value

    return walk(ast.parse(expression.replace("x", "*").strip(), mode="eval").body)


def word_problem(question: str) -> int:
    """The answer of a GSM-Symbolic question, by what its template asks."""
    n = numbers(question)
    if "fewer" in question:  # a student and a friend with fewer
        return n[0] + n[0] - n[1]
    if "slice" in question:  # pieces, she, cousin more than she, friend more than cousin
        _, she, more, still_more = n
        return she + (she + more) + (she + more + still_more)
    raise AssertionError(f"no such template: {question}")


def test_the_schema_is_that_of_the_released_data(rows):
    ids = [row["uuid"] for name in SPLITS for row in rows[name]]
    assert len(set(ids)) == len(ids) == sum(map(len, rows.values()))
    assert len(rows["stage1"]) + len(rows["stage2"]) > 3000
    for name in SPLITS:
        for row in rows[name]:
            assert list(row) == ["uuid", "input", "output", "domain", "meta"]
            assert all(isinstance(field, str) and field.strip() for field in row.values())
            assert uuid.UUID(row["uuid"]).version == 5
            assert re.fullmatch(r"<think>\n.+\n</think>\n.+", row["output"], re.DOTALL)
            assert set(meta(row)) == {"answer", "task"}


def test_it_is_small():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 5_000_000


def problem_key(row: dict) -> tuple:
    """What makes two questions the same problem: the expression, or a word problem's frame and numbers."""
    if meta(row)["task"].startswith("chain_sum"):
        return tuple(re.findall(r"[-+]|\d+", row["input"].replace("final answer to", "")))
    frame = next(w for w in ("fewer", "slice") if w in row["input"])
    return (frame, *numbers(row["input"]))


def test_no_question_occurs_twice_and_no_held_out_problem_is_trained_on(rows):
    questions = [row["input"] for name in SPLITS for row in rows[name]]
    assert len(set(questions)) == len(questions)
    trained = {problem_key(row) for name in ("stage1", "stage2") for row in rows[name]}
    held_out = [problem_key(row) for row in rows["heldout"]]
    assert all(len(key) > 2 for key in held_out)
    assert len(set(held_out)) == len(held_out)
    assert not trained & set(held_out)


def test_every_answer_is_right(rows):
    """Questions are solved again; then the response must give that answer by the rules of `evaluate`."""
    for name in SPLITS:
        for row in rows[name]:
            answer = meta(row)["answer"]
            if meta(row)["task"].startswith("chain_sum"):
                expected = value(re.search(r"-?\d[-+ \d]*\d", row["input"])[0])
            else:
                expected = word_problem(row["input"])
            assert int(answer) == expected, row
            assert is_right(final_answer(row["output"]), answer), row


def test_every_step_is_right(rows):
    """Each "a + b = c" of the worked solutions holds. In "16 boys - 3 absent = 13" the words do not count."""
    steps = 0
    for name in SPLITS:
        for row in rows[name]:
            thinking = row["output"].split("</think>")[0]
            for left, right in re.findall(r"(-?\d+(?: ?[-+*x] ?\d+)+) = (-?\d+)", thinking):
                assert value(left) == int(right), row
                steps += 1
            assert "=" in thinking
    assert steps > 10_000


def test_stage_one_is_uniform_and_stage_two_varied(rows):
    def style(row: dict) -> str:
        return re.sub(r"-?\d+", "N", row["output"].split("\n")[1])

    assert len({style(row) for row in rows["stage1"]}) <= 2  # "N + N = N", "N - N = N"
    assert len({style(row) for row in rows["stage2"] if meta(row)["task"] == "chain_sum"}) > 2
    tasks = {name: {meta(row)["task"] for row in rows[name]} for name in SPLITS}
    assert tasks["stage1"] < tasks["stage2"] == tasks["heldout"]


def test_the_student_directory_loads(rows):
    chat, config = Chat.load(FOLDER / "student"), read_config(FOLDER / "student")
    tokenizer = chat.tokenizer
    assert tokenizer.get_vocab_size() <= config.vocab_size
    assert chat.stop_ids == {tokenizer.token_to_id("<|im_end|>")}
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"):
        assert tokenizer.decode([tokenizer.token_to_id(token)], skip_special_tokens=False) == token
    assert [tokenizer.decode([i]) for i in tokenizer.encode("12 + 345").ids] == ["1", "2", " + ", "3", "4", "5"]
    longest = 0
    for name in SPLITS:
        for row in rows[name][:300]:
            ids, spans = chat.encode(
                [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["output"]}]
            )
            (begin, end), longest = spans[0], max(longest, len(ids))
            assert tokenizer.decode(ids[begin:end], skip_special_tokens=False) == row["output"] + "<|im_end|>"
    assert longest < load_recipe(RECIPES / "quickstart.toml").stages[0].train.context


def test_transformers_loads_the_student_directory(rows):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER / "student")
    config = transformers.AutoConfig.from_pretrained(FOLDER / "student")
    assert config.model_type == "qwen3" and config.tie_word_embeddings
    question = rows["heldout"][0]["input"]
    theirs = tokenizer.apply_chat_template(
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    assert list(theirs) == Chat.load(FOLDER / "student").prompt_ids([{"role": "user", "content": question}])
    assert transformers.AutoModelForCausalLM.from_config(config).num_parameters() < 2_000_000


def test_the_recipe_names_files_that_exist():
    recipe = load_recipe(RECIPES / "quickstart.toml")
    assert [stage.name for stage in recipe.stages] == ["low", "high"]
    data = [path for stage in recipe.stages for path in stage.data]
    for path in (recipe.model.path, recipe.evaluate.problems, *data):
        assert recipe.resolve(path).exists(), path
    assert len(read_problems([str(recipe.resolve(recipe.evaluate.problems))])) >= 100


def test_the_script_makes_these_files(tmp_path, monkeypatch):
    """Byte for byte, so that nobody edits the data by hand. Another release of reasoning-gym may draw others."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    import importlib.metadata
    import runpy

    version = importlib.metadata.version("reasoning-gym")
    if version != "0.1.25":
        pytest.skip(f"made with reasoning-gym 0.1.25; {version} is installed")
    assert reasoning_gym
    monkeypatch.setattr("sys.argv", ["make_data.py", "--out", str(tmp_path)])
    runpy.run_path(str(FOLDER / "make_data.py"), run_name="__main__")
    for name in SPLITS:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (FOLDER / f"{name}.jsonl").read_bytes()
    for file in ("config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "student" / file).read_text() == (FOLDER / "student" / file).read_text()

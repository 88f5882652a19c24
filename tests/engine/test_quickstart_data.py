"""What ships with the quickstart: problems, with answers worked out again here; corpora; both models; samples."""

import ast
import json
import operator
import random
import re
import runpy
import uuid
from pathlib import Path

import pytest

from dasd_engine import load_model
from dasd_engine.chat import Chat
from dasd_engine.config import load_recipe
from dasd_engine.distill_config import load_distill_recipe
from dasd_engine.generate import generate
from dasd_engine.model_config import read_config
from dasd_engine.problems import final_answer, is_right, read_problems

RECIPES = Path(__file__).parents[2] / "recipes"
FOLDER = RECIPES / "quickstart"
PROBLEMS, SAMPLES, MODELS = ("questions", "dev", "heldout"), ("stage1", "stage2"), ("teacher", "student")
SYSTEM = "You are a helpful assistant."


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {name: read(FOLDER / f"{name}.jsonl") for name in (*PROBLEMS, *SAMPLES)}


@pytest.fixture
def arithmetic(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import arithmetic

    return arithmetic


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Everything that the script makes."""
    out = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        patch.setattr("sys.argv", ["make_data.py", "--out", str(out), "--corpora", str(out / "corpora")])
        runpy.run_path(str(FOLDER / "make_data.py"), run_name="__main__")
    return out


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def meta(row: dict) -> dict:
    return json.loads(row["meta"])


def value(expression: str) -> int:
    """An expression of whole numbers with + and -, by Python's own grammar."""
    operators = {ast.Add: operator.add, ast.Sub: operator.sub}

    def walk(node: ast.AST) -> int:
        if isinstance(node, ast.BinOp):
            return operators[type(node.op)](walk(node.left), walk(node.right))
        assert isinstance(node, ast.Constant) and isinstance(node.value, int), expression
        return node.value

    return walk(ast.parse(expression, mode="eval").body)


def expression(question: str) -> str:
    """What a question asks for; of a story by its verbs."""
    if question[-1] in "?." and (found := re.search(r"\d+(?: [-+] \d+)+", question)):
        return found[0]
    signs = {"has": "", "buys": "+", "finds": "+", "gets": "+", "sells": "-", "loses": "-", "gives": "-"}
    told = [sentence.split() for sentence in question.split(". ")[:-1]]
    numbers = [next(word for word in words if word.isdecimal()) for words in told]
    return " ".join(f"{signs[words[1]]} {number}".strip() for words, number in zip(told, numbers, strict=True))


def wrong_sums(text: str) -> list[str]:
    """Lines that state a sum which is wrong; the digits of a column may borrow and carry."""
    found = re.findall(r"^(?:Check: )?(\d+(?: [-+] \d+)+) = (\d+)(?:, (?:carry|borrow) 1)?\.$", text, re.MULTILINE)
    return [f"{left} = {right}" for left, right in found if value(left) != int(right)]


# ---------------------------------------------------------------------------------------------- problems


def test_the_schema_is_that_of_the_released_data(rows):
    for name, some in rows.items():
        fields = {"uuid", "input", "domain", "meta"} | ({"output"} if name in SAMPLES else set())
        for row in some:
            assert row.keys() == fields
            assert all(isinstance(field, str) and field.strip() for field in row.values())
            assert uuid.UUID(row["uuid"]).version == 5
            assert {"answer", "task"} <= set(meta(row))


def test_every_answer_is_right(rows):
    for some in rows.values():
        for row in some:
            assert int(meta(row)["answer"]) == value(expression(row["input"])), row


def test_nothing_is_asked_twice_or_trained_on(rows, made):
    asked = [expression(row["input"]) for name in PROBLEMS for row in rows[name]]
    assert len(set(asked)) == len(asked) > 1500
    for name in SAMPLES:
        ids = [row["uuid"] for row in rows[name]]
        assert len(set(ids)) == len(ids) > 500
        assert set(ids) <= {row["uuid"] for row in rows["questions"]}
    for corpus in (made / "corpora").glob("*.jsonl"):
        assert not {expression(row["input"]) for row in read(corpus)} & set(asked)


def test_the_script_makes_what_ships(made):
    """Byte for byte, so that nobody edits it by hand."""
    names = [f"{name}.jsonl" for name in PROBLEMS]
    for model in MODELS:
        names += [f"{model}/{n}.json" for n in ("config", "tokenizer", "tokenizer_config", "generation_config")]
    for name in names:
        assert (made / name).read_bytes() == (FOLDER / name).read_bytes(), name


def test_it_is_small():
    files = [file for file in FOLDER.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    weights = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    assert weights <= 10_000_000
    assert sum(file.stat().st_size for file in files) - weights < 5_000_000


# ---------------------------------------------------------------------------------------------- corpora


def test_corpora_teach_no_wrong_sum_and_end_right(made):
    counts = {}
    for corpus in (made / "corpora").glob("*.jsonl"):
        for row in read(corpus)[::4]:
            prefix = row.get("prefix", "")
            learnt = row["output"][len(prefix) :]
            assert row["output"].startswith(prefix)
            assert not wrong_sums(learnt.partition("\n")[2] if prefix else learnt), row  # a line that is cut is ended
            assert is_right(final_answer(row["output"]), meta(row)["answer"]), row
            counts[bool(prefix)] = counts.get(bool(prefix), 0) + 1
    assert min(counts.values()) > 2_000


def test_every_way_leads_to_the_answer(arithmetic):
    rng = random.Random(0)
    for _ in range(300):
        problem = arithmetic.make_problem(rng, (1, 2, 3))
        for way in (*arithmetic.WAYS, "direct"):
            output = arithmetic.solve(problem, way, rng)
            assert is_right(final_answer(output), str(problem.answer)) and not wrong_sums(output), output


def test_a_slip_is_where_it_is_said_to_be(arithmetic):
    """In front of it every line is that of a clean solution; a wrong sum never stands there."""
    rng = random.Random(0)
    ended_wrong = 0
    for way in (*arithmetic.WAYS, "direct"):
        for _ in range(300):
            problem = arithmetic.make_problem(rng, (2, 3))
            slipped = arithmetic.slip_up(problem, way, rng)
            before = slipped.text[: slipped.begin].removeprefix("<think>\n").splitlines()
            clean = arithmetic.work(problem.steps, way)
            assert [line for line in before if not line.startswith("I ")] == clean[: len(before)][: len(clean)] or (
                before[0].startswith("I ") and before[1:] == clean[: len(before) - 1]
            )
            ended_wrong += not is_right(final_answer(slipped.text), str(problem.answer))
    assert ended_wrong > 1000  # of 1,200: some slips cancel out


# ---------------------------------------------------------------------------------------------- models and samples


@pytest.mark.parametrize("name", MODELS)
def test_the_model_directories_load(rows, name):
    chat, config = Chat.load(FOLDER / name), read_config(FOLDER / name)
    tokenizer = chat.tokenizer
    assert tokenizer.get_vocab_size() <= config.vocab_size
    assert chat.stop_ids == {tokenizer.token_to_id("<|im_end|>")}
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"):
        assert tokenizer.decode([tokenizer.token_to_id(token)], skip_special_tokens=False) == token
    assert [tokenizer.decode([i]) for i in tokenizer.encode("12 + 345").ids] == ["1", "2", " + ", "3", "4", "5"]
    longest = 0
    for row in rows["stage1"][:200] + rows["stage2"][:200]:
        ids, spans = chat.encode(
            [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["output"]}]
        )
        (begin, end), longest = spans[0], max(longest, len(ids))
        assert tokenizer.decode(ids[begin:end], skip_special_tokens=False) == row["output"] + "<|im_end|>"
    assert longest < load_recipe(RECIPES / "quickstart.toml").stages[0].train.context


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_the_model_directories(rows, name):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER / name)
    question = rows["heldout"][0]["input"]
    theirs = tokenizer.apply_chat_template(
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    assert list(theirs) == Chat.load(FOLDER / name).prompt_ids([{"role": "user", "content": question}])
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER / name)
    assert model.config.model_type == "qwen3" and model.num_parameters() < 2_000_000


def answers(name: str, asked: list[tuple[str, str]], temperature: float) -> list[str]:
    """Whole responses of a model to (question, what is said already)."""
    chat = Chat.load(FOLDER / name)
    prompts = [
        chat.prompt_ids([{"role": "user", "content": question}]) + chat.tokenizer.encode(said).ids
        for question, said in asked
    ]
    out = generate(
        load_model(FOLDER / name), prompts, max_new_tokens=300, temperature=temperature, stop_ids=chat.stop_ids
    )
    texts = [chat.tokenizer.decode(generation.tokens, skip_special_tokens=False) for generation in out]
    return [said + text.removesuffix("<|im_end|>") for (_, said), text in zip(asked, texts, strict=True)]


def share_right(responses: list[str], expected: list[str]) -> float:
    said = [final_answer(response) for response in responses]
    return sum(a is not None and is_right(a, e) for a, e in zip(said, expected, strict=True)) / len(expected)


def test_the_teacher_is_better_than_the_student_by_far(rows):
    some = rows["heldout"][:100]
    asked, expected = [(row["input"], "") for row in some], [meta(row)["answer"] for row in some]
    teacher, student = (share_right(answers(name, asked, 1.0), expected) for name in MODELS)
    assert teacher > 0.8 and teacher > student + 0.2, (teacher, student)


def test_the_teacher_repairs_what_the_student_begins(arithmetic):
    """Direct steps, as the student writes them, cut behind a wrong one."""
    rng = random.Random(1)
    problems = [arithmetic.make_problem(rng, (2, 3)) for _ in range(60)]
    begun = [arithmetic.slip_up(problem, "direct", rng) for problem in problems]
    cut = [slipped.text[: slipped.text.index("\n", slipped.begin) + 1] for slipped in begun]
    asked = list(zip([problem.question for problem in problems], cut, strict=True))
    assert share_right(answers("teacher", asked, 1.0), [str(problem.answer) for problem in problems]) > 0.75


def test_samples_are_the_teachers_at_two_temperatures(rows):
    for name, temperature in zip(SAMPLES, (0.6, 1.0), strict=True):
        assert {meta(row)["temperature"] for row in rows[name]} == {temperature}
        right = sum(is_right(final_answer(row["output"]), meta(row)["answer"]) for row in rows[name])
        assert right > 0.8 * len(rows[name])
        ways = {row["output"].splitlines()[1] for row in rows[name]} & {
            "I work column by column.", "I go in jumps.", "I start with the ones.",
        }  # fmt: skip
        assert len(ways) == 3  # the teacher's distribution has modes


def test_one_recipe_serves_train_and_distill():
    recipe, whole = load_recipe(RECIPES / "quickstart.toml"), load_distill_recipe(RECIPES / "quickstart.toml")
    assert [stage.name for stage in recipe.stages] == ["low", "high"]
    data = [path for stage in recipe.stages for path in stage.data]
    for path in (recipe.model.path, recipe.evaluate.problems, *data):
        assert recipe.resolve(path).exists(), path
    assert whole.student == recipe.resolve(recipe.model.path) and Path(whole.teacher.path).is_dir()
    assert whole.train["low"] == recipe.stages[0].train and whole.train["high"] == recipe.stages[1].train
    assert len(read_problems([str(recipe.resolve(recipe.evaluate.problems))])) >= 100

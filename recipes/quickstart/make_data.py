"""Make the quickstart's data and its student directory, everything from fixed seeds.

    pip install '.[tasks]' && python recipes/quickstart/make_data.py [--out recipes/quickstart]

Writes `stage1.jsonl`, `stage2.jsonl`, `heldout.jsonl` and `student/`. The rows follow the schema of the released DASD
data (string fields `uuid, input, output, domain, meta`; `output` is `<think>...</think>answer`). The questions and
their answers are reasoning-gym's; the worked solutions are written here, or taken from the task where it has one
(GSM-Symbolic). Every answer, and the answer of every worked solution, is checked with the task's own scorer.

The two stages copy the shape of the method (low temperature first, then high): stage 1 is uniform, with one way to
write a solution and short problems; stage 2 is varied, with three ways, other wordings and harder problems. The
teacher is this file's generator, so no temperature is involved.
"""

import argparse
import json
import random
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import reasoning_gym
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SEED = 20260109
NAMESPACE = uuid.UUID("6d0c2d1e-8a55-4c6e-9d7b-5f1f2b3c4d5e")  # uuids are uuid5 of the question: stable over runs

# GSM-Symbolic has a hundred templates; these two are short and need only + and - on numbers up to 40.
GSM_TEMPLATES = {31, 43}

# task -> rows in (stage 1, stage 2, held out)
COUNTS = {
    "chain_sum": (2400, 1200, 100),
    "chain_sum_long": (800, 800, 50),
    "gsm_symbolic": (0, 500, 50),
}

# The student's size: 0.7 M parameters, of which 0.1 M are embeddings.
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}

Problem = dict[str, Any]  # question, answer, key (problems with the same key differ in wording only), terms or steps


def parse_chain(expression: str) -> tuple[int, list[tuple[str, int]]]:
    """First term and the rest: "4 - 1 + 7" gives 4 and [("-", 1), ("+", 7)]."""
    first, *rest = expression.split()
    return int(first), [(op, int(number)) for op, number in zip(rest[::2], rest[1::2], strict=True)]


def running_totals(expression: str) -> list[tuple[int, str, int, int]]:
    """The steps of a chained sum from left to right: (total before, operator, number, total after)."""
    total, rest = parse_chain(expression)
    steps = []
    for op, number in rest:
        after = total + number if op == "+" else total - number
        steps.append((total, op, number, after))
        total = after
    return steps


def solve_plain(expression: str) -> str:
    """One line a step: "4 - 1 = 3". The only style of stage 1."""
    return "\n".join(f"{a} {op} {b} = {c}" for a, op, b, c in running_totals(expression))


def solve_words(expression: str) -> str:
    """The same steps in words."""
    lines = [f"Start with {parse_chain(expression)[0]}."]
    for a, op, b, c in running_totals(expression):
        lines.append(f"Add {b}: {a} + {b} = {c}." if op == "+" else f"Take away {b}: {a} - {b} = {c}.")
    return "\n".join(lines)


def solve_checked(expression: str) -> str:
    """The plain steps, then the last one undone as a check."""
    a, op, b, c = running_totals(expression)[-1]
    back = "-" if op == "+" else "+"
    return f"{solve_plain(expression)}\nCheck: {c} {back} {b} = {a}, right."


CHAIN_STYLES = (solve_plain, solve_words, solve_checked)
CHAIN_WORDINGS = ("{question}", "What is {expression}?", "Calculate {expression}.")


def chain_sums(min_terms: int, max_terms: int, seed: int) -> Iterator[Problem]:
    """Endless chained sums of one-digit terms."""
    while True:
        data = reasoning_gym.create_dataset(
            "chain_sum", min_terms=min_terms, max_terms=max_terms, min_digits=1, max_digits=1, size=20000, seed=seed
        )
        for entry in data:
            expression = entry["metadata"]["expression"]
            problem = {"question": entry["question"], "answer": entry["answer"], "expression": expression}
            yield problem | {"key": expression, "score": score(data, entry)}
        seed += 1


def gsm_symbolic(seed: int) -> Iterator[Problem]:
    """Endless GSM-Symbolic problems of the chosen templates, with the worked solution that comes with them."""
    while True:
        data = reasoning_gym.create_dataset("gsm_symbolic", size=20000, seed=seed)
        for i, template in enumerate(data.task_indices):
            if template not in GSM_TEMPLATES:
                continue
            entry = data[i]
            worked, final = entry["metadata"]["answer_cot"].rsplit("####", 1)
            if final.strip() != entry["answer"]:
                raise SystemExit(f"gsm_symbolic {i}: the worked solution ends in {final!r}, not {entry['answer']!r}")
            question = entry["question"].removesuffix(" Give the result as your final answer. Do not include units.")
            key = f"gsm {template} " + " ".join(re.findall(r"\d+", question))
            problem = {"question": question, "answer": entry["answer"], "worked": worked.strip()}
            yield problem | {"key": key, "score": score(data, entry)}
        seed += 1


def score(data: Any, entry: dict[str, Any]) -> Callable[[str], float]:
    return lambda answer: data.score_answer(answer, entry)


def make_row(task: str, problem: Problem, varied: bool, rng: random.Random) -> dict[str, str]:
    """One problem in the released schema; `varied` draws the wording and the style, else the first of each."""
    question, answer = problem["question"], problem["answer"]
    if "expression" in problem:
        pick = rng.choice if varied else (lambda options: options[0])
        question = pick(CHAIN_WORDINGS).format(question=question, expression=problem["expression"])
        worked = pick(CHAIN_STYLES)(problem["expression"])
    else:
        worked = problem["worked"]
    final = f"The answer is {answer}."
    last_number = re.findall(r"-?\d+", worked.replace(f"Check: {answer}", ""))
    if problem["score"](answer) != 1.0 or (answer not in last_number):
        raise SystemExit(f"{task}: wrong answer {answer!r} for {question!r}")
    return {
        "uuid": str(uuid.uuid5(NAMESPACE, question)),
        "input": question,
        "output": f"<think>\n{worked}\n</think>\n{final}",
        "domain": "math",
        "meta": json.dumps({"answer": answer, "task": task}),
    }


def make_rows() -> dict[str, list[dict[str, str]]]:
    """Every split. No input occurs twice, and no held-out problem is trained on in any wording."""
    rng = random.Random(SEED)
    sources = {
        "chain_sum": chain_sums(2, 4, SEED),
        "chain_sum_long": chain_sums(5, 6, SEED + 1000),
        "gsm_symbolic": gsm_symbolic(SEED + 2000),
    }
    held_out: set[str] = set()  # keys
    inputs: set[str] = set()
    splits: dict[str, list[dict[str, str]]] = {"heldout": [], "stage1": [], "stage2": []}
    for task, source in sources.items():
        stage1, stage2, heldout = COUNTS[task]
        for split, count in (("heldout", heldout), ("stage1", stage1), ("stage2", stage2)):
            while count:
                problem = next(source)
                if problem["key"] in held_out:
                    continue
                row = make_row(task, problem, split == "stage2", rng)
                if row["input"] in inputs:
                    continue
                inputs.add(row["input"])
                if split == "heldout":
                    held_out.add(problem["key"])
                splits[split].append(row)
                count -= 1
    for name in ("stage1", "stage2"):
        rng.shuffle(splits[name])
    return splits


# ---------------------------------------------------------------------------------------------- the student

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# The pieces inside which BPE may merge, so each frequent one becomes a token: a few phrases of nearly every document,
# which halves the prompts; a word with the space before it, and the one after it if a number follows; an operator with
# its spaces. Digits stay single: a carry is then learnable from few examples.
PHRASES = (r"You are a helpful assistant\.", r"State the final answer to the following arithmetic problem: ")
WORDS = (r"\d", r" ?[A-Za-z]+(?: (?=[-\d]))?", r" [-+*=] ", r" ?[^A-Za-z\d\s]+(?: (?=[-\d]))?", r"\s")
PIECES = "|".join(PHRASES + WORDS)


def train_tokenizer(rows: list[dict[str, str]]) -> Tokenizer:
    """A byte-level BPE of the training rows' words and phrases."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=4,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for row in rows for text in chat_texts(row)), trainer)
    return tokenizer


def chat_texts(row: dict[str, str]) -> list[str]:
    """What stands between the chat template's special tokens."""
    return ["system\nYou are a helpful assistant.", f"user\n{row['input']}", "assistant\n", row["output"]]


def write_student(out: Path, tokenizer: Tokenizer) -> None:
    """A directory that `transformers` and the engine load, but for the weights: those are random at first."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    end = {token: tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")}
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
        **SHAPE,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": end["<|im_end|>"],
        "pad_token_id": end["<|endoftext|>"],
        "torch_dtype": "float32",
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {"eos_token_id": end["<|im_end|>"], "pad_token_id": end["<|endoftext|>"], "do_sample": False}
    for name, value in (("config", config), ("tokenizer_config", tokenizer_config), ("generation_config", generation)):
        (out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: beside this script")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    splits = make_rows()
    tokenizer = train_tokenizer(splits["stage1"] + splits["stage2"])
    write_student(out / "student", tokenizer)
    for name, rows in splits.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks = Counter(json.loads(row["meta"])["task"] for row in rows)
        tokens = sum(len(tokenizer.encode("".join(chat_texts(row))).ids) for row in rows)
        print(f"{name}: {len(rows)} rows, {tokens:,} tokens, {dict(tasks)}")


if __name__ == "__main__":
    main()

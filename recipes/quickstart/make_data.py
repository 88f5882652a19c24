"""Make the quickstart's data and its two model directories (all but their weights), everything from fixed seeds.

    python recipes/quickstart/make_data.py                          questions, problems, tokenizers, configurations
    python recipes/quickstart/make_data.py --corpora runs/corpora   also what teacher and student are trained on

Rows follow the schema of the released DASD data (string fields `uuid, input, output, domain, meta`; `output` is
`<think>...</think>answer`). arithmetic.py writes the problems and solves them. docs/quickstart.md has the commands
that make everything that ships: the weights of both models, then the teacher's samples.
"""

import argparse
import json
import random
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arithmetic import CHECK, WAYS, WRONG, Problem, draw_way, finish, make_problem, slip_up, solve, work
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SEED = 20260109
NAMESPACE = uuid.UUID("6d0c2d1e-8a55-4c6e-9d7b-5f1f2b3c4d5e")  # uuids are uuid5 of the question: stable over runs

ASKED = {"heldout": 300, "dev": 300, "questions": 1500}  # rows; dev.jsonl is what settings were chosen on
STEPS = (2, 3)  # of a problem there
STUDENT_ROWS = 20_000

Row = dict[str, str]


def make_row(problem: Problem, **more: str) -> Row:
    return {
        "uuid": str(uuid.uuid5(NAMESPACE, problem.question)),
        "input": problem.question,
        **more,
        "domain": "math",
        "meta": json.dumps({"answer": str(problem.answer), "task": problem.task}),
    }


def draw(rng: random.Random, asked: set[str], steps: tuple[int, ...]) -> Problem:
    """A problem that is none of those asked, in whatever words."""
    while (problem := make_problem(rng, steps)).expression in asked:
        pass
    return problem


# ---------------------------------------------------------------------------------------------- corpora


@dataclass(frozen=True)
class Mixture:
    """Shares of what a corpus of the teacher holds; the rest is clean solutions."""

    seed: str
    rows: int
    repaired: float = 0.0
    checked: float = 0.0
    alarmed: float = 0.0
    twice: float = 0.0
    rechecked: float = 0.0


# One a stage of recipes/teacher.toml. The first two were to teach "Wait" behind a slip, and did not: it came as often
# without one. The third, without it, has the teacher check at the end what it was given.
MIXTURES = {
    "teacher1": Mixture(f"{SEED} teacher", 36_000, repaired=0.26, checked=0.14),
    "teacher2": Mixture(f"{SEED} teacher2", 20_000, repaired=0.23, checked=0.1, alarmed=0.12),
    "teacher3": Mixture(f"{SEED} teacher3", 10_000, checked=0.13, twice=0.2, rechecked=0.17),
}


def teacher_rows(rng: random.Random, asked: set[str], mixture: Mixture) -> Iterator[Row]:
    """Solutions, also of what somebody else began: a `prefix` that is not to be learnt, and how it ends."""
    kinds = {repaired: mixture.repaired, checked: mixture.checked, alarmed: mixture.alarmed, twice: mixture.twice,
             rechecked: mixture.rechecked}  # fmt: skip
    for _ in range(mixture.rows):
        problem, left = draw(rng, asked, (1, 2, 2, 2, 3, 3, 3)), rng.random() - (1 - sum(kinds.values()))
        prefix, rest = "", ""
        if left < 0:
            rest = solve(problem, draw_way(rng), rng)
        for write, share in kinds.items():
            if 0 <= left < share:
                prefix, rest = write(problem, rng)
            left -= share
        yield make_row(problem, output=prefix + rest, **({"prefix": prefix} if prefix else {}))


def repaired(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """(what somebody began with a slip, how it ends): the line is finished, then the step is done again."""
    way = draw_way(rng)
    slipped = slip_up(problem, way, rng)
    behind = slipped.text.index("\n", slipped.begin) + 1
    cut = behind if rng.random() < 0.35 else _cut(slipped.text, behind, rng)
    again = work(problem.steps[slipped.step :], way if rng.random() < 0.7 else draw_way(rng))
    return slipped.text[:cut], _line(slipped.text, cut) + _ending([WRONG, *again], problem)


def checked(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """The same behind direct steps, right or wrong: all of them are worked out."""
    begin = len("<think>\n")
    if rng.random() < 0.5:
        text = finish(work(problem.steps, "direct"), problem.answer)
    else:
        slipped = slip_up(problem, "direct", rng)
        text, begin = slipped.text, slipped.text.index("\n", slipped.begin) + 1
    cut = _cut(text, max(begin, text.index("= ") + 2), rng)
    return text[:cut], _line(text, cut) + _ending([CHECK, *work(problem.steps, draw_way(rng))], problem)


def alarmed(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """The same behind a "Wait" where nothing is wrong: the step is done again, and no harm comes of it."""
    way, at = draw_way(rng), rng.randrange(len(problem.steps))
    done, step = work(problem.steps[:at], way), work(problem.steps[at : at + 1], way)
    prefix = "<think>\n" + "".join(line + "\n" for line in [*done, *step[: rng.randint(1, len(step))], WRONG])
    again = work(problem.steps[at:], way if rng.random() < 0.7 else draw_way(rng))
    return prefix, _ending(again, problem)


def twice(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """Nobody began; a clean solution, and the same in another way."""
    first, second = rng.sample(list(WAYS), 2)
    lines = [*work(problem.steps, first), CHECK, *work(problem.steps, second)]
    return "", finish(lines, problem.answer)


def rechecked(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """What began with a slip is brought to its wrong end; all of it is worked out again."""
    slipped = slip_up(problem, draw_way(rng), rng)
    text = re.sub("Check: .*\n", "", slipped.text)  # it would be wrong, and learnt
    behind, end = text.index("\n", slipped.begin) + 1, text.index("</think>")
    cut = behind if rng.random() < 0.35 else _cut(text, behind, rng)
    return text[:cut], text[cut:end] + _ending([CHECK, *work(problem.steps, draw_way(rng))], problem)


def _cut(text: str, begin: int, rng: random.Random) -> int:
    """Where a token ends, behind `begin` and within the thinking."""
    return rng.choice([end for end in piece_ends(text) if begin <= end <= text.index("</think>")])


def _line(text: str, cut: int) -> str:
    """The rest of the line that is cut."""
    return "" if text[cut - 1] == "\n" else text[cut : text.index("\n", cut) + 1]


def _ending(lines: list[str], problem: Problem) -> str:
    return finish(lines, problem.answer).removeprefix("<think>\n")


def student_rows(rng: random.Random, asked: set[str]) -> Iterator[Row]:
    """Easier than what will be asked: one step worked out in every way; longer problems in direct steps only."""
    for _ in range(STUDENT_ROWS):
        if rng.random() < 0.5:
            problem = draw(rng, asked, (1,))
            yield make_row(problem, output=solve(problem, draw_way(rng), rng))
        else:
            problem = draw(rng, asked, (1, 2, 2, 3, 3))
            yield make_row(problem, output=solve(problem, "direct", rng))


# ---------------------------------------------------------------------------------------------- the models

TEACHER = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
           "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip
STUDENT = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3,
           "num_key_value_heads": 1, "head_dim": 32}  # fmt: skip

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# The pieces inside which BPE may merge, so that each frequent one becomes a token: the system prompt; a digit, always
# alone, so that a carry is learnable from few examples; a word with the space before it, and the one after it if a
# number follows; an operator with its spaces; the end of a line.
PIECES = "|".join((
    r"You are a helpful assistant\.", r"\d", r" ?[A-Za-z]+(?: (?=\d))?", r" [-+=] ", r"[.,:?]*\n",
    r" ?[^A-Za-z\d\s]+(?: (?=\d))?", r"\s",
))  # fmt: skip


def piece_ends(text: str) -> list[int]:
    """Where a token of either model may end."""
    return [match.end() for match in re.finditer(PIECES, text)]


def train_tokenizer(rows: list[Row]) -> Tokenizer:
    """A byte-level BPE of the rows' words."""
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


def chat_texts(row: Row) -> list[str]:
    """What stands between the chat template's special tokens."""
    return ["system\nYou are a helpful assistant.", f"user\n{row['input']}", "assistant\n", row["output"]]


def write_model(out: Path, tokenizer: Tokenizer, shape: dict[str, int]) -> None:
    """A directory that `transformers` and the engine load, but for the weights: those come from training."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    end = {token: tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")}
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
        **shape,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": end["<|im_end|>"],
        "pad_token_id": end["<|endoftext|>"],
        "torch_dtype": "bfloat16",
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


def write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows):,} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: beside this script")
    parser.add_argument("--corpora", type=Path, help="a directory for what is trained on (32 MB)")
    args = parser.parse_args()
    asked: set[str] = set()  # expressions, so that nothing is asked twice, or asked and trained on, in other words
    for name, count in ASKED.items():
        rng, problems = random.Random(f"{SEED} {name}"), list[Problem]()
        while len(problems) < count:
            problems.append(draw(rng, asked, STEPS))
            asked.add(problems[-1].expression)
        write_rows(args.out / f"{name}.jsonl", [make_row(problem) for problem in problems])
    for name, mixture in MIXTURES.items():
        rows = list(teacher_rows(random.Random(mixture.seed), asked, mixture))
        if name == "teacher1":
            write_model(args.out / "teacher", train_tokenizer(rows[:4000]), TEACHER)
        if args.corpora:
            write_rows(args.corpora / f"{name}.jsonl", rows)
    rows = list(student_rows(random.Random(f"{SEED} student"), asked))
    write_model(args.out / "student", train_tokenizer(rows[:4000]), STUDENT)
    if args.corpora:
        write_rows(args.corpora / "student.jsonl", rows)


if __name__ == "__main__":
    main()

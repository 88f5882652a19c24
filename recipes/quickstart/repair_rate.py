"""How often the teacher brings to a right end what a student has begun.

    python recipes/quickstart/repair_rate.py --student recipes/quickstart/student
    python recipes/quickstart/repair_rate.py --student runs/method/train-high/export/high --problems FILE

As in mix: the student answers each problem at temperature 1, its response is cut behind a share u of its tokens,
u ~ Uniform(1/2, 1), and the teacher continues at temperature 1. Cuts behind the end of the thinking are left out: there
nothing is left to repair. Counted apart: prefixes in which a finished line is wrong, found by doing its sum.
"""

import argparse
import re
from pathlib import Path

import numpy as np

from dasd_engine.chat import Chat, Message
from dasd_engine.evaluation_report import bootstrap
from dasd_engine.filters import CLOSE, Drop
from dasd_engine.generate import generate
from dasd_engine.hf import load_model
from dasd_engine.mixed_policy import cut
from dasd_engine.problems import Problem, final_answer, read_problems

HERE = Path(__file__).parent
LINE = re.compile(r"^(?:Check: )?(\d+) ([-+]) (\d+)(?: [-+] (\d+))? = (\d+)[.,].*$", re.MULTILINE)


def holds_slip(prefix: str) -> bool:
    """Whether a line that has ended states a sum that is wrong. Numbers copied wrongly are not found."""
    for x, op, *others, result in LINE.findall(prefix.rpartition("\n")[0]):
        rest = sum(int(number) for number in others if number)
        if int(result) != (int(x) + rest if op == "+" else int(x) - rest):
            return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--student", type=Path, default=HERE / "student", help="default: the one that ships, before distillation")
    add("--teacher", type=Path, default=HERE / "teacher")
    add("--problems", type=Path, default=HERE / "heldout.jsonl")
    add("--samples", type=int, default=4, help="responses of the student to each problem (default 4)")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    problems = [problem for problem in read_problems([str(args.problems)]) for _ in range(args.samples)]
    begun = ask(args.student, [(problem.question.messages, []) for problem in problems], args.seed)
    chat, kept = Chat.load(args.student), []
    for i, (problem, tokens) in enumerate(zip(problems, begun, strict=True)):
        found = cut(tokens, args.seed, str(i), chat.tokenizer)
        if not isinstance(found, Drop) and CLOSE not in found.text:
            own = chat.tokenizer.decode(tokens, skip_special_tokens=False).removesuffix("<|im_end|>")
            kept.append((problem, found.text, right(own, problem)))
    teacher = Chat.load(args.teacher)
    prefixes = [(problem.question.messages, teacher.tokenizer.encode(prefix).ids) for problem, prefix, _ in kept]
    ended = ask(args.teacher, prefixes, args.seed + 1)
    rows = []
    for (problem, prefix, own), tokens in zip(kept, ended, strict=True):
        said = teacher.tokenizer.decode(tokens, skip_special_tokens=False).removesuffix("<|im_end|>")
        rows.append((own, holds_slip(prefix), right(prefix + said, problem)))
    print(f"{len(problems):,} responses of {args.student}, {len(rows):,} cut within their thinking; ended right:")
    show("all of these", rows)
    show("which the student had ended wrong", [row for row in rows if not row[0]])
    show("which the student had ended right", [row for row in rows if row[0]])
    show("with a wrong sum in front of the cut", [row for row in rows if row[1]])


def ask(model_dir: Path, asked: list[tuple[list[Message], list[int]]], seed: int) -> list[list[int]]:
    """Sampled tokens behind each (conversation, ids of the response so far), at temperature 1."""
    chat, model = Chat.load(model_dir), load_model(model_dir)
    prompts = [[*chat.prompt_ids(messages), *ids] for messages, ids in asked]
    out = generate(model, prompts, max_new_tokens=300, stop_ids=chat.stop_ids, seed=seed, batch_size=128)
    return [generation.tokens for generation in out]


def right(response: str, problem: Problem) -> bool:
    said = final_answer(response)
    return said is not None and problem.judge(said)


def show(name: str, rows: list[tuple[bool, bool, bool]]) -> None:
    if not rows:
        return
    own, _, ended = np.array(rows, dtype=float).T
    low, high = bootstrap(ended)
    print(f"{len(rows):6,} {name}: {ended.mean():.1%} ({low:.1%} - {high:.1%}), by the student itself {own.mean():.1%}")


if __name__ == "__main__":
    main()

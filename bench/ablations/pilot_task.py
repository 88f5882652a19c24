"""The task of a small pilot: stories of additions, subtractions and doublings modulo 100, worked out with mistakes.

    question   tom has 97 . he loses 06 . he gets 66 . it doubles . how many ?
    direct     97 - 06 = 91 .
    split      91 + 66 : 91 + 60 = 51 . / 51 + 6 = 57 .
    column     57 + 57 : 7 + 7 = 14 . / 5 + 5 + 1 = 11 . / that makes 14 .

A response keeps its style from step to step with probability STICK. It may begin with a plan and may check every step,
which finds a mistake: "wait that is wrong . redo it ." Mistakes are part of what is learnt, so the teacher makes some.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

Step = tuple[int, str, int]  # total before, "+" or "-", number
STICK = 0.8
WORDS = {"+": ("gets", "finds"), "-": ("loses", "sells")}
WRONG = "wait that is wrong . redo it ."


@dataclass(frozen=True)
class Habits:
    """Shares of responses (plan, check) and of steps (styles); mistakes a step by style."""

    styles: dict[str, float]
    mistakes: dict[str, float]
    plan: float = 0.4
    check: float = 0.25


TEACHER = Habits({"direct": 0.5, "split": 0.3, "column": 0.2}, {"direct": 0.08, "split": 0.04, "column": 0.02})
DIRECT = Habits({"direct": 1.0}, {"direct": 0.0}, plan=0.0, check=0.0)

TEACHER_SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
                 "num_key_value_heads": 4, "head_dim": 32}  # fmt: skip
STUDENT_SHAPE = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 2,
                 "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    start: int
    terms: tuple[tuple[str, int | None], ...]  # ("+" or "-", number), ("+", None) for doubling
    question: str

    @property
    def steps(self) -> list[Step]:
        found, total = [], self.start
        for op, number in self.terms:
            found.append((total, op, total if number is None else number))
            total = result(found[-1])
        return found

    @property
    def answer(self) -> int:
        return result(self.steps[-1])


def result(step: Step) -> int:
    total, op, number = step
    return (total + number if op == "+" else total - number) % 100


def make_problem(rng: random.Random, lengths: tuple[int, ...]) -> Problem:
    """One with as many steps as one of `lengths`."""
    start, terms, said = rng.randrange(100), list[tuple[str, int | None]](), list[str]()
    for _ in range(rng.choice(lengths)):
        if rng.random() < 0.15:
            terms.append(("+", None))
            said.append("it doubles .")
        else:
            op, number = rng.choice("+-"), rng.randint(1, 99)
            terms.append((op, number))
            said.append(f"he {rng.choice(WORDS[op])} {number:02} .")
    return Problem(start, tuple(terms), " ".join([f"tom has {start:02} .", *said, "how many ?"]))


# ---------------------------------------------------------------------------------------------- working it out


def direct(step: Step) -> list[str]:
    return [f"{said(step)} = {result(step):02} ."]


def split(step: Step) -> list[str]:
    """The tens, then the ones."""
    total, op, number = step
    tens = result((total, op, number - number % 10))
    return [f"{said(step)} : {total:02} {op} {number - number % 10:02} = {tens:02} .",
            f"{tens:02} {op} {number % 10} = {result(step):02} ."]  # fmt: skip


def column(step: Step) -> list[str]:
    """Digit by digit from the right."""
    total, op, number = step
    x, y = total % 10, number % 10
    borrow = op == "-" and x < y
    low = x + y if op == "+" else x + 10 * borrow - y
    carry = f" {op} 1" if low > 9 or borrow else ""
    high = (total // 10 + (number // 10 + bool(carry)) * (1 if op == "+" else -1)) % 20
    return [f"{said(step)} : {x + 10 * borrow} {op} {y} = {low} .",
            f"{total // 10} {op} {number // 10}{carry} = {high} .", f"that makes {result(step):02} ."]  # fmt: skip


def said(step: Step) -> str:
    return f"{step[0]:02} {step[1]} {step[2]:02}"


STYLES = {"direct": direct, "split": split, "column": column}


def solve(problem: Problem, habits: Habits, rng: random.Random) -> str:
    """A response; its answer is wrong where a mistake was not found."""
    lines = []
    if rng.random() < habits.plan:
        planned = (f"{op} {'it' if number is None else f'{number:02}'}" for op, number in problem.terms)
        lines.append(f"plan : {' , '.join(planned)} .")
    checks, style, total = rng.random() < habits.check, draw(habits, rng), problem.start
    for op, number in problem.terms:
        step = (total, op, total if number is None else number)
        if rng.random() > STICK:
            style = draw(habits, rng)
        written, total = STYLES[style](step), result(step)
        if rng.random() < habits.mistakes[style]:
            wrong = (total + rng.choice((-10, -1, 1, 10, rng.randint(2, 98)))) % 100
            lines += [*written[:-1], written[-1].replace(f"{total:02} .", f"{wrong:02} .")]
            if checks:
                lines += [WRONG, *written]
            else:
                total = wrong
        else:
            lines += written
        if checks:
            back = (total, "-" if op == "+" else "+", step[2])
            lines.append(f"check : {said(back)} = {step[0]:02} .")
    return "<think>\n" + "\n".join(lines) + f"\n</think>\nThe answer is {total}."


def draw(habits: Habits, rng: random.Random) -> str:
    return rng.choices(list(habits.styles), list(habits.styles.values()))[0]


# ---------------------------------------------------------------------------------------------- rows


def rows(
    seed: str, count: int, lengths: tuple[int, ...], asked: set[str], habits: Habits | None
) -> Iterator[dict[str, str]]:
    """Rows in the schema of the released data, of problems that are not in `asked`: questions alone without `habits`,
    which then are added to it."""
    rng = random.Random(seed)
    for i in range(count):
        while (problem := make_problem(rng, lengths)).question in asked:
            pass
        row = {"uuid": f"{seed}-{i}", "input": problem.question, "domain": "math"}
        if habits is None:
            asked.add(problem.question)
        else:
            row["output"] = solve(problem, habits, rng)
        yield {**row, "meta": json.dumps({"answer": str(problem.answer), "task": f"{len(problem.terms)} steps"})}

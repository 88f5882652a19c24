"""The quickstart's problems, how they are worked out, and slips: what make_data.py writes. All of it from a seeded rng.

A problem is a number and one to three others to add to it or take from it, told as a story or written as a sum. Every
number on the way has two digits. A step is worked out in one of three ways, a sentence a line:

    columns   Add 38 to 47. / 7 + 8 = 15, carry 1. / 4 + 3 + 1 = 8. / That makes 85.
    jumps     Add 38 to 47. / 47 + 30 = 77. / 77 + 8 = 85.
    ones      Add 38 to 47. / 47 + 8 = 55. / 55 + 30 = 85.

or in one line, `direct`: 47 + 38 = 85, which small models get wrong. The teacher never does that by itself.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

Step = tuple[int, str, int]  # total before, "+" or "-", number

SMALLEST, LARGEST = 10, 99  # of every total
WAYS = {"columns": 0.45, "jumps": 0.35, "ones": 0.2}  # shares of the teacher's responses
ANNOUNCED = {"columns": "I work column by column.", "jumps": "I go in jumps.", "ones": "I start with the ones."}
WRONG, CHECK = "Wait, that is wrong.", "Let me check."

NAMES = {"Tom": "He", "Ann": "She", "Ben": "He", "Mia": "She", "Sam": "He", "Eva": "She"}
THINGS = ("apples", "books", "cards", "coins", "shells", "stamps")
GAINS, LOSSES = ("buys", "finds", "gets"), ("sells", "loses", "gives away")
WORDINGS = ("What is {}?", "Calculate {}.", "How much is {}?")


@dataclass(frozen=True)
class Problem:
    start: int
    terms: tuple[tuple[str, int], ...]
    question: str
    task: str  # "sum" or "story"

    @property
    def expression(self) -> str:
        return str(self.start) + "".join(f" {op} {number}" for op, number in self.terms)

    @property
    def steps(self) -> list[Step]:
        found, total = [], self.start
        for op, number in self.terms:
            found.append((total, op, number))
            total = apply(total, op, number)
        return found

    @property
    def answer(self) -> int:
        return apply(*self.steps[-1])


def apply(total: int, op: str, number: int) -> int:
    return total + number if op == "+" else total - number


def make_problem(rng: random.Random, lengths: tuple[int, ...]) -> Problem:
    """One with as many steps as one of `lengths`."""
    start = total = rng.randint(SMALLEST, LARGEST)
    terms = []
    for _ in range(rng.choice(lengths)):
        while True:
            op, number = rng.choice("+-"), rng.randint(11, 89)
            if SMALLEST <= apply(total, op, number) <= LARGEST:
                break
        terms.append((op, number))
        total = apply(total, op, number)
    told = rng.random() < 0.5
    problem = Problem(start, tuple(terms), "", "story" if told else "sum")
    question = _story(problem, rng) if told else rng.choice(WORDINGS).format(problem.expression)
    return Problem(start, tuple(terms), question, problem.task)


def _story(problem: Problem, rng: random.Random) -> str:
    name, things = rng.choice(list(NAMES)), rng.choice(THINGS)
    said = [f"{name} has {problem.start} {things}."]
    for op, number in problem.terms:
        gain = op == "+"
        said.append(f"{NAMES[name]} {rng.choice(GAINS if gain else LOSSES)} {number}{' more' if gain else ''}.")
    return " ".join([*said, f"How many {things} has {name} now?"])


# ---------------------------------------------------------------------------------------------- working it out


@dataclass
class Slip:
    """What goes wrong in one step; `line` is set to the line of the step that is wrong."""

    kind: str
    rng: random.Random
    line: int = -1


IN_STEP = ("sum", "sum", "carry", "result")  # a wrong sum; a carry forgotten or a part left out; columns read wrongly
OF_STEP = ("copy", "copy", "order", "again")  # another number or sign; a step left out; a step done twice


def columns(step: Step, slip: Slip | None = None) -> tuple[list[str], int]:
    """(lines, result) of a step written out digit by digit from the right."""
    total, op, number = step
    lines, result, carry = [_head(step)], 0, 0
    wrong = slip.rng.randrange(2) if slip and slip.kind in ("sum", "carry") else -1
    for place in range(2):
        x, y, taken = total // 10**place % 10, number // 10**place % 10, carry
        if slip and slip.kind == "carry" and carry and slip.line < 0 and place >= wrong:
            taken, slip.line = 0, len(lines)
        value = x + y + taken if op == "+" else x - y - taken
        carry = int(not 0 <= value < 10)
        if op == "-" and carry:
            x, value = x + 10, value + 10
        if slip and slip.kind == "sum" and place == wrong:
            value, slip.line = _off(value, slip.rng), len(lines)
            carry = int(value > 9) if op == "+" else carry
        ending = f", {'carry' if op == '+' else 'borrow'} 1." if carry else "."
        lines.append(f"{x} {op} {y}{f' {op} 1' if taken else ''} = {value}{ending}")
        result += value % 10 * 10**place
    if slip and slip.kind == "result":
        result, slip.line = _off(result, slip.rng), len(lines)
    return [*lines, f"That makes {result}."], result


def jumps(step: Step, slip: Slip | None = None, ones_first: bool = False) -> tuple[list[str], int]:
    """A digit of the number at a time, with its zero."""
    total, op, number = step
    parts = [digit for place in (1, 0) if (digit := number // 10**place % 10 * 10**place)]
    lines, wrong = [_head(step)], slip.rng.randrange(len(parts)) if slip else -1
    for i, part in enumerate(reversed(parts) if ones_first else parts):
        after = apply(total, op, part)
        if slip and i == wrong:
            slip.line = len(lines)
            if slip.kind == "carry" and i + 1 < len(parts):  # left out, so that the line behind is wrong
                continue
            after = _off(after, slip.rng)
        lines.append(f"{total} {op} {part} = {after}.")
        total = after
    return lines, total


def ones(step: Step, slip: Slip | None = None) -> tuple[list[str], int]:
    return jumps(step, slip, ones_first=True)


def direct(step: Step, slip: Slip | None = None) -> tuple[list[str], int]:
    result = apply(*step)
    if slip:
        result, slip.line = _off(result, slip.rng), 0
    return [f"{step[0]} {step[1]} {step[2]} = {result}."], result


METHODS: dict[str, Callable[..., tuple[list[str], int]]] = {
    "columns": columns, "jumps": jumps, "ones": ones, "direct": direct,
}  # fmt: skip


def draw_way(rng: random.Random) -> str:
    return rng.choices(list(WAYS), list(WAYS.values()))[0]


def work(steps: list[Step], way: str) -> list[str]:
    return [line for step in steps for line in METHODS[way](step)[0]]


def solve(problem: Problem, way: str, rng: random.Random) -> str:
    """A whole response without a slip."""
    lines = [*_opening(way, rng), *work(problem.steps, way), *_closing(problem.steps[-1], problem.answer, rng)]
    return finish(lines, problem.answer)


def finish(lines: list[str], answer: int) -> str:
    return "<think>\n" + "\n".join(lines) + f"\n</think>\nThe answer is {answer}."


def _opening(way: str, rng: random.Random) -> list[str]:
    return [ANNOUNCED[way]] if way in ANNOUNCED and rng.random() < 0.4 else []


def _closing(step: Step, result: int, rng: random.Random) -> list[str]:
    back = "-" if step[1] == "+" else "+"
    return [f"Check: {result} {back} {step[2]} = {step[0]}."] if rng.random() < 0.3 else []


def _head(step: Step) -> str:
    total, op, number = step
    return f"Add {number} to {total}." if op == "+" else f"Take {number} from {total}."


# ---------------------------------------------------------------------------------------------- what goes wrong


@dataclass(frozen=True)
class Slipped:
    """A response that goes wrong: in the line behind `begin` characters, in a step counted from 0."""

    text: str
    begin: int
    step: int


def slip_up(problem: Problem, way: str, rng: random.Random) -> Slipped:
    """Solve with one slip, and go on from its result as if nothing had happened."""
    while (slipped := _slip_up(problem, way, rng)) is None:
        pass
    return slipped


def _slip_up(problem: Problem, way: str, rng: random.Random) -> Slipped | None:
    """None where the draw came to nothing: no carry to forget, a total out of range."""
    at, slip = rng.randrange(len(problem.terms)), Slip(rng.choice(IN_STEP + OF_STEP), rng)
    terms, total, first, lines = list(problem.terms), problem.start, -1, _opening(way, rng)
    if slip.kind == "order":
        if at + 1 == len(terms):
            return None
        del terms[at]
    elif slip.kind == "again":
        terms[at:at] = terms[at - 1 : at]
    for i, (op, number) in enumerate(terms):
        step, inside = (total, op, number), i == at and slip.kind in IN_STEP
        if i == at and slip.kind == "copy":
            step = _miscopied(step, problem, rng)
        said, total = METHODS[way](step, slip if inside else None)
        if i == at:
            if not inside and step != problem.steps[at]:
                slip.line = 0
            if slip.line < 0:
                return None
            first = len(lines) + slip.line
        lines += said
        if not SMALLEST <= total <= LARGEST:
            return None
    lines += _closing(step, total, rng)
    begin = len("<think>\n" + "".join(line + "\n" for line in lines[:first]))
    return Slipped(finish(lines, total), begin, at)


def _miscopied(step: Step, problem: Problem, rng: random.Random) -> Step:
    total, op, number = step
    how = rng.random()
    if how < 0.25:
        return total, "-" if op == "+" else "+", number
    if how < 0.4:
        return _off(total, rng), op, number
    if how < 0.6:
        return total, op, rng.choice([n for _, n in problem.terms] + [problem.start])
    return total, op, _off(number, rng)


def _off(value: int, rng: random.Random) -> int:
    """Another number of as many digits: one digit changed, mostly by one, or two swapped."""
    digits = list(str(value))
    while True:
        i, changed = rng.randrange(len(digits)), digits.copy()
        if rng.random() < 0.2 and len(digits) > 1:
            j = rng.randrange(len(digits))
            changed[i], changed[j] = changed[j], changed[i]
        else:
            changed[i] = str((int(changed[i]) + rng.choice((-1, 1, -1, 1, rng.randint(2, 8)))) % 10)
        if changed != digits and changed[0] != "0":
            return int("".join(changed))

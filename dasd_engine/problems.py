"""Problems whose answers can be judged: questions with an answer, or reasoning-gym tasks with their own scorers.

    problems.jsonl  problems.parquet  owner/name:test     rows with a question and its `answer`, as questions.py reads
    gym:chain_sum:200:1                                   a reasoning-gym task, how many (100), its seed (0)

What is judged is the final answer of a response: what follows its last </think> (a response that opens <think> and
never closes it has none; one without thinking is all answer) or, if that holds a \\boxed{...}, the last one. Tried in
turn, and right if one of them is: the final answer; what follows its last "answer is" or "answer:"; its last number,
where a number is expected.

| scorer | right is |
|---|---|
| `auto` | what `exact` or `numeric` says |
| `exact` | equal, but for white space, letter case, $ signs and a final period |
| `numeric` | the same number, exactly, without tolerance: 1,200 = 1200.0, 1/2 = 0.5 |
| `math` | equal by math-verify, which reads LaTeX and simplifies (extra `math`) |

A reasoning-gym task is judged by its own scorer; only the full score is right.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec

from dasd_engine.errors import InputError
from dasd_engine.questions import GYM, Question, gym_dataset, parse_gym, read_questions

Scorer = Callable[[str, str], bool]  # (answer, expected)


@dataclass(frozen=True)
class Problem:
    """`judge` says whether a final answer is right; it may raise whatever its scorer raises."""

    question: Question
    task: str
    judge: Callable[[str], bool]


def read_problems(names: Iterable[str], scorer: str = "auto") -> list[Problem]:
    """All problems, in order. InputError for bad rows (file and line), a question without answer, no problem at all.

    `scorer`: one of SCORERS, of questions that are no reasoning-gym tasks.
    """
    if scorer not in SCORERS:
        raise InputError(f"scorer {scorer!r}: must be one of {', '.join(SCORERS)}")
    if scorer == "math" and find_spec("math_verify") is None:
        raise InputError("scorer 'math' needs the extra: pip install 'dasd-engine[math]'")
    names, problems = list(names), list[Problem]()
    for name in names:
        found = read_questions([name])
        problems += _gym(name, found) if name.startswith(GYM) else [_with_answer(q, name, scorer) for q in found]
    if not problems:
        raise InputError(f"{', '.join(names)}: holds no problems")
    seen: set[str] = set()
    for problem in problems:
        if problem.question.id in seen:
            raise InputError(f"{', '.join(names)}: the id {problem.question.id!r} names two problems; make them differ")
        seen.add(problem.question.id)
    return problems


def _with_answer(question: Question, name: str, scorer: str) -> Problem:
    if question.answer is None:
        raise InputError(
            f"{name}: question {question.id!r} has no `answer`, and there is no other scorer for the task "
            f"{question.task or 'all'!r}: give the row an answer (itself or in `meta`), or leave it out"
        )
    expected, same = question.answer, SCORERS[scorer]
    return Problem(question, question.task or "all", lambda answer: is_right(answer, expected, same))


def _gym(name: str, questions: list[Question]) -> list[Problem]:
    gym = parse_gym(name)
    dataset = gym_dataset(gym)

    def problem(index: int, question: Question) -> Problem:
        entry = dataset[index]
        expected = question.answer or ""

        def judge(answer: str) -> bool:
            return any(dataset.score_answer(tried, entry) >= 1.0 for tried in attempts(answer, expected))

        return Problem(question, gym.task, judge)

    return [problem(i, question) for i, question in enumerate(questions)]


# ---------------------------------------------------------------------------------------------- answers

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_SIGN = r"(?:(?<![\w)])[-+])?"  # "5-3" holds 3, not -3
_NUMBER = re.compile(rf"{_SIGN}(?:{_INTEGER}(?:\.\d*)?|\.\d+)(?:[eE](?P<power>[-+]?\d+))?(?:\s*/\s*\d+)?")
_PHRASE = re.compile(r"answer(?:\s+is|\s*:)\s*:?", re.IGNORECASE)


def final_answer(output: str) -> str | None:
    """What follows the last </think>, or inside the last \\boxed{} there; None when the thinking never ended."""
    thinking, closed, answer = output.rpartition("</think>")
    if not closed and "<think>" in answer:
        return None
    boxed = answer.rfind("\\boxed{")
    if boxed < 0:
        return answer.strip()
    begin = boxed + len("\\boxed{")
    depth = 1
    for end in range(begin, len(answer)):
        depth += {"{": 1, "}": -1}.get(answer[end], 0)
        if depth == 0:
            return answer[begin:end].strip()
    return answer[begin:].strip()


def attempts(answer: str, expected: str) -> list[str]:
    """What a final answer may mean (this module's docstring), the whole first."""
    found = [answer]
    if phrases := list(_PHRASE.finditer(answer)):
        found.append(answer[phrases[-1].end() :].strip().removesuffix("."))
    if _number(expected) is not None and (numbers := [m[0] for m in _NUMBER.finditer(answer)]):
        found.append(numbers[-1])
    return found


def equal_text(answer: str, expected: str) -> bool:
    return _normalize(answer) == _normalize(expected)


def equal_number(answer: str, expected: str) -> bool:
    x, y = _number(answer), _number(expected)
    return x is not None and x == y


def equal(answer: str, expected: str) -> bool:
    """As numbers where both are numbers, else as text."""
    x, y = _number(answer), _number(expected)
    return x == y if x is not None and y is not None else _normalize(answer) == _normalize(expected)


def equal_math(answer: str, expected: str) -> bool:
    """Raises what math-verify raises, time-outs (5 s) too; it must run in the main thread."""
    from math_verify import parse, verify

    return equal(answer, expected) or bool(verify(parse(f"${expected}$"), parse(f"${answer}$")))


SCORERS: dict[str, Scorer] = {"auto": equal, "exact": equal_text, "numeric": equal_number, "math": equal_math}


def is_right(answer: str, expected: str, same: Scorer = equal) -> bool:
    """Whether a final answer gives `expected` (rules: this module's docstring)."""
    return any(same(tried, expected) for tried in attempts(answer, expected))


def _normalize(text: str) -> str:
    return " ".join(text.replace("$", " ").split()).casefold().removesuffix(".").rstrip()


def _number(text: str) -> Fraction | None:
    """The number that the whole text is, exactly; None when it is anything else."""
    text = _normalize(text)
    found = _NUMBER.fullmatch(text)
    if not found or len(found["power"] or "") > 5:  # 1e1000000 would be written out
        return None
    over, _, under = text.replace(",", "").partition("/")
    try:
        return Fraction(over.strip()) / Fraction(under.strip() or 1)
    except (ValueError, ZeroDivisionError):
        return None

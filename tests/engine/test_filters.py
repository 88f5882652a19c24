"""Filters: each reason on texts as teachers write them, delimiters, loops by brute force, a megabyte of anything."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dasd_engine import filters
from dasd_engine.errors import InputError
from dasd_engine.filters import REASONS, Filters, Repetition, examine, normalise, repetition, split

GOOD = "<think>\nTwo and two.\n\nThat is 4.\n</think>\n\nThe answer is \\boxed{4}."


def reason(text=GOOD, finish_reason="stop", tokens=20, answer=None, stop_tokens=(), **options):
    _, drop = examine(
        text, finish_reason=finish_reason, tokens=tokens, answer=answer, filters=Filters(**options),
        stop_tokens=stop_tokens,
    )  # fmt: skip
    assert drop is None or drop.reason in REASONS
    return drop and drop.reason


def test_a_good_response_is_kept_byte_for_byte():
    assert examine(GOOD, finish_reason="stop", tokens=20) == (GOOD, None)


@pytest.mark.parametrize(
    ("text", "finish", "expected"),
    [
        ("", "stop", "empty"),
        (" \n\t\n", "stop", "empty"),
        ("<think>\nHm \ud83d</think>4", "stop", "not_text"),
        (GOOD, "length", "truncated"),
        ("", "length", "truncated"),
        (GOOD, "tool_calls", "tool_call"),
        (GOOD, "content_filter", "not_finished"),
        (GOOD, "abort", "not_finished"),
        ('<think>I look it up.</think>\n<tool_call>\n{"name": "search"}\n</tool_call>', "stop", "tool_call"),
        ("<think>I look it up.</think>[TOOL_CALLS]search{}", "stop", "tool_call"),
        ("The answer is 4.", "stop", "no_thinking"),
        ("<think>\n\n</think>\n\nThe answer is 4.", "stop", "no_thinking"),  # Qwen3 with thinking switched off
        ("<think></think>4", "stop", "no_thinking"),
        ("<think>\nTwo and two.\n</think>\n \n", "stop", "no_answer"),
        ("<think>\nTwo and two, and", "stop", "no_answer"),
        ("<think>a</think>b<think>c</think>d", "stop", "markers"),
        ("<think>the <think> tag</think>d", "stop", "markers"),
        ("Sure! <think>a</think>b", "stop", "markers"),
        ("a</think>b</think>c", "stop", "markers"),
        ("a</think>b<think>", "stop", "markers"),
    ],
)
def test_each_reason(text, finish, expected):
    assert reason(text, finish) == expected


def test_the_context_counts_student_tokens():
    assert reason(tokens=100, context=100) is None
    assert reason(tokens=101, context=100) == "too_long"
    seen = []
    assert reason("a</think>4", tokens=lambda output: seen.append(output) or 101, context=100) == "too_long"
    assert seen == ["<think>a</think>4"]  # what will be trained on, not what was sampled


def test_a_response_that_the_template_refuses():
    def refuse(output):
        raise InputError("messages[1].content: no place")

    assert reason(tokens=refuse) == "not_trainable"
    assert reason(GOOD + "<|im_end|>", stop_tokens=["<|endoftext|>", "<|im_end|>"]) == "not_trainable"
    assert reason(GOOD + "<|im_end|>") is None


def test_thinking_can_be_optional():
    assert reason("The answer is 4.", thinking=False) is None
    assert reason("<think>\n\n</think>\n\nFour.", thinking=False) is None
    assert reason("<think>\nTwo and two, and", thinking=False) == "no_answer"
    assert reason("a</think>b</think>c", thinking=False) == "markers"


def test_right_answers_only():
    assert reason(answer="4", right_only=True) is None
    assert reason(answer="4.0", right_only=True) is None
    assert reason(answer="5", right_only=True) == "wrong_answer"
    assert reason(answer=None, right_only=True) == "no_known_answer"
    assert reason(answer="5") is None
    # The 5 of the thinking part is no answer.
    assert reason("<think>\nIs it 5?\n</think>\nIt is 4.", answer="5", right_only=True) == "wrong_answer"


def test_reasons_are_asked_in_their_order():
    """A response with every fault is counted under the first; mended one after the other, under each in turn."""
    order = list(REASONS)
    found = [
        reason("", "length", 999),
        reason(GOOD + "<tool_call>", "abort", 999),
        reason("a</think></think>" + "<|im_end|>", "stop", 999, stop_tokens=["<|im_end|>"]),
        reason("no thinking <|im_end|>", "stop", 999, stop_tokens=["<|im_end|>"], context=9),
        reason(GOOD + "<|im_end|>", "stop", 999, stop_tokens=["<|im_end|>"], context=9),
        reason("<think>" + "so " * 900 + "</think>4", "stop", 999, context=9),
        reason("<think>" + "so " * 900 + "</think>4", "stop", 9, answer="5", right_only=True),
        reason(GOOD, answer="5", right_only=True),
    ]
    assert found == [
        "truncated", "not_finished", "markers", "no_thinking", "not_trainable", "too_long", "repetition", "wrong_answer"
    ]  # fmt: skip
    assert found == sorted(found, key=order.index)


# ---------------------------------------------------------------------------------------------- delimiters

HARMONY = "<|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant<|channel|>final<|message|>4.<|return|>"


@pytest.mark.parametrize(
    ("text", "output"),
    [
        (GOOD, GOOD),
        ("\n" + GOOD, "\n" + GOOD),
        ("Two and two.\n</think>\n\n4.", "<think>Two and two.\n</think>\n\n4."),  # the prompt had opened it
        (HARMONY, "<think>Two and two.</think>4."),
        (HARMONY.removesuffix("<|return|>"), "<think>Two and two.</think>4."),  # the stop token is not in the text
        ("<|start|>assistant" + HARMONY, "<think>Two and two.</think>4."),
        (HARMONY.replace("<|end|><|start|>", "<|end|>\n<|start|>"), "<think>Two and two.</think>4."),
        (HARMONY.replace("final<|", "final <|constrain|>json<|"), "<think>Two and two.</think>4."),
        ("<|channel|>analysis<|message|>A.<|end|><|start|>assistant" + HARMONY, "<think>A.\nTwo and two.</think>4."),
        ("<|channel|>final<|message|>4.<|return|>", "4."),
        ("<|channel|>analysis<|message|>Two and", "<think>Two and"),
        ("<seed:think>Two and two.</seed:think>4.", "<think>Two and two.</think>4."),
        ("[THINK]Two and two.[/THINK]4.", "<think>Two and two.</think>4."),
        ("◁think▷Two and two.◁/think▷4.", "<think>Two and two.</think>4."),
        ("<reasoning>\nTwo.\n</reasoning>\n<answer>\n4\n</answer>\n", "<think>\nTwo.\n</think>\n4\n"),
        ("<think>\nTwo.\n</think>\n<answer>\n4\n</answer>", "<think>\nTwo.\n</think>\n4\n"),  # Hunyuan
        (
            "<|START_THINKING|>Two.<|END_THINKING|><|START_RESPONSE|>4.<|END_RESPONSE|>",
            "<think>Two.</think>4.",
        ),
        ("Two.[/THINK]4.", "<think>Two.</think>4."),
        ("Just 4.", "Just 4."),
    ],
)
def test_delimiters_become_think(text, output):
    assert normalise(text) == output
    assert normalise(output) == output


@pytest.mark.parametrize(
    "text",
    [
        "<think>Write [/THINK] or <seed:think>.</think>Then ◁think▷ and <answer> end.",
        "<think>Its format is <|channel|>analysis<|message|>like this<|end|>.</think>Harmony.",
        "<think>a</think><answer>4</answer> or <answer>5</answer>",
        "An XML <answer> and a <reasoning> tag.",
        "Close it with [/THINK], and again with [/THINK].",
    ],
)
def test_text_about_delimiters_stays(text):
    assert normalise(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>commentary to=functions.f '
            '<|constrain|>json<|message|>{"x": 1}<|call|>',
            "tool_call",
        ),
        ('<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"x": 1}', "tool_call"),
        (HARMONY.replace("final", "commentary"), "markers"),
        (HARMONY + "<|start|>assistant" + HARMONY, "markers"),
        (HARMONY + "Human: and then?", "markers"),
        ("<|channel|>final<|message|>4.<|end|><|start|>assistant<|channel|>analysis<|message|>Two.<|end|>", "markers"),
        ("<|channel|>analysis<|message|>Two and two.<|end|>", "no_answer"),
        ("<|channel|>final<|message|>4.<|return|>", "no_thinking"),
        ("<|channel|>analysis", "no_thinking"),
    ],
)  # fmt: skip
def test_harmony_that_makes_no_response(text, expected):
    assert reason(text) == expected


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", " ", "[THINK]", "[/THINK]", "<answer>", "</answer>"])))
def test_split_gives_back_the_whole(pieces):
    output = normalise("".join(pieces))
    thinking, said, fault = split(output)
    if not fault:
        opened = "" if thinking is None else "<think>" + thinking
        closed = "" if thinking is None or said is None else "</think>"
        assert output.lstrip() == (opened + closed + (said or "")).lstrip()
        assert normalise(output) == output
    else:
        assert thinking is said is None and (output.count("<think>") != 1 or output.count("</think>") > 1 or
                                             output.lstrip()[:7] != "<think>")  # fmt: skip


# ---------------------------------------------------------------------------------------------- repetition

LIMITS = Repetition()


def prose(words, seed=0):
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnoprstuvwy", k=rng.randint(2, 9))) for _ in range(2000)]
    return " ".join(rng.choices(vocabulary, k=words))


def test_prose_does_not_repeat():
    for seed in range(5):
        assert repetition(prose(3000, seed), LIMITS) == ""


@pytest.mark.parametrize(
    "loop",
    [
        "Wait, let me check again. ",
        "\nSo x = 3, thus y = 4.\n",
        "的",
        "так что ",
        "= 1 + 1 ",
        ".",
        "0",
        "abcdefghijklmnopqrstuvwxyz",  # one word without an end
        " ".join(f"word{i}" for i in range(150)) + " ",
    ],
)
def test_a_loop_inside_good_text_is_found(loop):
    times = max(LIMITS.loop, LIMITS.characters // len("".join(loop.split())) + 1)
    text = prose(2000) + " " + loop * (times + 1) + " " + prose(2000, 1)
    assert "in a row" in repetition(text, LIMITS)
    assert repetition(prose(2000) + loop * 3 + prose(2000, 1), LIMITS) == ""


def test_a_loop_that_counts_is_found_by_its_ngrams():
    step = (
        "Step {}: we take the next number of the list and look whether it fits. It does not, as the sum of all that "
        "stand in front of it would then be odd, and we know from the second condition that this sum is even. "
    )
    text = "".join(step.format(i) for i in range(99))
    assert "said before" in repetition(text, LIMITS)


def test_repeated_lines_and_paragraphs():
    rng = random.Random(1)
    lines = [prose(12, seed) for seed in range(40)]
    shuffled = [rng.choice(lines) for _ in range(120)]  # each about three times, no two in a fixed order
    assert "lines" in repetition("\n".join(shuffled), LIMITS)
    assert repetition("\n".join(lines), LIMITS) == ""
    paragraphs = [prose(60, seed) + "\n" + prose(30, -seed - 1) for seed in range(20)]
    assert "paragraphs" in repetition("\n \n".join(paragraphs + paragraphs[:12]), LIMITS)
    assert repetition("\n\n".join(paragraphs + paragraphs[:5]), LIMITS) == ""


def test_short_lines_that_must_repeat_do_no_harm():
    """The lines of formulas and code: closing brackets, rules, fences."""
    parts = [f"\\[\n{prose(8, seed)}\n\\]\n```python\n{prose(10, 100 + seed)}\n```\n---\n" for seed in range(40)]
    assert repetition("".join(parts), LIMITS) == ""


def test_the_answer_may_say_again_what_was_thought():
    code = prose(300)
    assert reason(f"<think>\n{code}\n</think>\n{code}") is None
    assert reason(f"<think>\n{code}\n{code}\n{code}\n</think>\n{code}") == "repetition"
    assert reason(f"<think>\n{code}\n{code}\n{code}\n</think>\n{code}", repetition=None) is None


@pytest.mark.parametrize("period", [4, 7, 16, 40])
def test_a_loop_is_of_so_many_times(period):
    passage = [f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(period)]
    around = prose(300), prose(300, 1)
    for times, found in ((LIMITS.loop - 1, False), (LIMITS.loop, True)):
        text = " ".join([around[0], *passage * times, around[1]])
        assert ("in a row" in repetition(text, Repetition(characters=1, ngrams=1.0))) == found


def test_limits_are_limits():
    text = prose(300) + " " + "no and " * 100
    assert "in a row" in repetition(text, LIMITS)
    assert repetition(text, Repetition(loop=1000)) == ""
    assert repetition(text, Repetition(characters=10_000)) == ""
    assert repetition("so " * 30, LIMITS) == ""  # too short to be a fault
    assert repetition("so " * 30, Repetition(characters=20)) != ""


@given(st.lists(st.sampled_from("abc"), min_size=20, max_size=120))
def test_distances_against_a_search(units):
    n = filters._NGRAM
    grams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    expected = [next((i - j for j in range(i - 1, -1, -1) if grams[j] == gram), 0) for i, gram in enumerate(grams)]
    assert filters._distances(units).tolist() == expected


@given(
    st.lists(st.integers(0, 3), max_size=25), st.lists(st.integers(4, 6), min_size=1, max_size=20), st.integers(2, 12),
    st.lists(st.integers(0, 3), max_size=25),
)  # fmt: skip
def test_a_planted_loop_is_found_with_its_period(before, passage, times, after):
    """Whenever a passage stands `loop` times in a row; and never where no passage does, by brute force."""
    units = [chr(97 + i) for i in (*before, *passage * times, *after)]
    limits = Repetition(loop=6, characters=1, ngrams=1.0, lines=1.0, paragraphs=1.0)
    n = len(units)
    longest = {p: 0 for p in range(1, n)}
    for p in longest:
        same = [units[i] == units[i - p] for i in range(p, n)]
        run = best = 0
        for equal in same:
            run = run + 1 if equal else 0
            best = max(best, run)
        longest[p] = best + p if best else 0
    # Passages of one n-gram or more in all: shorter loops are not looked for.
    looped = any(length >= max(6 * p, p + filters._NGRAM) for p, length in longest.items())
    assert ("in a row" in repetition(" ".join(units), limits)) == looped


ADVERSARIAL = {
    "one word": "a" * 1_000_000,
    "one sign": "!" * 1_000_000,
    "line ends": "\n" * 999_999 + "x",
    "blanks": "x" + " " * 999_999 + "x",
    "blank lines": "\n \n x" * 200_000,
    "thinking opened": "<think>" * 140_000,
    "thinking closed": "</think>" * 120_000,
    "envelopes": "<think>a</think>" + "<answer>" * 120_000,
    "harmony": "<|channel|>analysis<|message|>" * 33_000,
    "harmony headers": "<|channel|>" * 90_000,
    "answers": "<think>a</think>" + "answer is 1,111 " * 60_000,
    "numbers": "<think>a</think>" + "1," * 500_000,
    "boxes": "<think>a</think>" + "\\boxed{" * 140_000,
    "random": "".join(np.random.default_rng(0).choice(list("ab \n.1"), 1_000_000)),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_a_megabyte_of_anything(name):
    """Finished at all: a quadratic step anywhere would take hours."""
    text = ADVERSARIAL[name]
    for part in (text, f"<think>{text}</think>4"):
        output, drop = examine(part, finish_reason="stop", tokens=1, answer="4", filters=Filters(right_only=True))
        assert output and (drop is None or drop.reason in REASONS)
    repetition(text, LIMITS)

"""The sentence splitter: solutions cut by hand, exact cover and other properties of any text, linear work.

tests/data/sentences/*.txt are solutions with ¦ where a sentence ends. They are reviewed by hand, not recorded.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_engine.errors import InputError
from dasd_engine.sentences import is_marker, merge_short, parts, split

GOLDEN = sorted((Path(__file__).parents[1] / "data" / "sentences").glob("*.txt"))
QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"

# What the rules look at, in every mixture.
PIECES = [
    *"$`\\.!?[](){}*_\"'~|<>#-+=,:;0 1\n\r\t abAB…。！？”」»é🙂µп", "$$", "\\[", "\\]", "\\(", "\\)", "\\$", "\\\\",
    "\\begin{a}", "\\end{a}", "\\begin{b}", "\\end{b}", "```", "~~~", "\n\n", ". ", ".\n", "...", "e.g. ",
    "Fig. ", "No. 5", "1. ", "Step 2. ", "J. Smith", "U.S. ", "5! ", "x. y", ".) ", '." ', "✓", "<think>",
    "</think>\n", "<|im_end|>", "<|channel|>final<|message|>", "The ", "the ", "sin(x)", "3.14", "$x.$ ",
    "https://a.b/c?d. ",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=40).map("".join) | st.text(max_size=60)


def pieces(text: str) -> list[str]:
    data = text.encode()
    return [data[begin:end].decode() for begin, end in split(text)]


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_solutions_cut_by_hand(file):
    golden = file.read_text(encoding="utf-8")
    assert pieces(golden.replace("¦", "")) == [piece for piece in golden.split("¦") if piece]


def test_the_goldens_are_there():
    assert len(GOLDEN) >= 10


def test_quickstart_samples_are_cut_at_their_lines():
    """The quickstart's teacher writes one sentence a line."""
    count = 0
    for name in ("stage1", "stage2"):
        for line in (QUICKSTART / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            output = json.loads(line)["output"]
            assert pieces(output) == output.splitlines(keepends=True)
            count += 1
    assert count > 1500


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", []),
        (" \n ", [" \n "]),
        ("No end", ["No end"]),
        ("\n\n Hi. There", ["\n\n Hi.", " There"]),
        ("<think>\n\n</think>\n\nYes. No.", ["<think>\n\n", "</think>\n\n", "Yes.", " No."]),
        ("A <|im_end|> B", ["A ", "<|im_end|>", " B"]),
        ("Done. \nNext", ["Done. \n", "Next"]),  # " \n" is one token of most tokenisers
        ("$a. B$ c. $D. E", ["$a. B$ c.", " $D.", " E"]),
        ("$5 is 1. Then $6.", ["$5 is 1.", " Then $6."]),
        ("$a\n\nSo. C$", ["$a\n\n", "So.", " C$"]),  # math ends with its paragraph
        ("\\begin{x} A. B \\begin{y} C. D \\end{x} E. F", ["\\begin{x} A. B \\begin{y} C. D \\end{x} E.", " F"]),
        ("~~~\nA. B\n```\n~~~\nC", ["~~~\nA. B\n```\n~~~\n", "C"]),
        ("完。” 再見", ["完。”", " 再見"]),
    ],
)
def test_small_texts(text, expected):
    assert pieces(text) == expected


@settings(max_examples=400)
@given(TEXTS)
def test_spans_cover_the_text_exactly(text):
    data, spans = text.encode(), split(text)
    assert b"".join(data[begin:end] for begin, end in spans) == data
    assert [end for _, end in spans[:-1]] == [begin for begin, _ in spans[1:]]
    assert all(begin < end for begin, end in spans)
    for begin, end in spans:
        data[begin:end].decode()  # no cut inside a character
        blank = data[begin:end].isspace()
        assert not blank or len(spans) == 1 or begin == 0  # only in front of a marker that comes first
    assert split(data) == spans


@settings(max_examples=200)
@given(TEXTS)
def test_a_sentence_is_one_sentence(text):
    data = text.encode()
    for begin, end in split(text):
        assert split(data[begin:end]) == [(0, end - begin)]


@settings(max_examples=200)
@given(st.lists(st.sampled_from([p for p in PIECES if "`" not in p and "~" not in p]), max_size=30).map("".join), TEXTS)
def test_a_paragraph_is_cut_as_it_would_be_alone(first, second):
    """Nothing but a fence reaches over a blank line, so what is read never changes what was read before."""
    second = second.lstrip()
    if first.strip() and second:
        both = first + "\n\n" + second
        assert pieces(both) == pieces(first + "\n\n") + pieces(second)


@settings(max_examples=200)
@given(TEXTS)
def test_markers_stand_alone(text):
    data = text.encode()
    for span in split(text):
        inner = data[slice(*span)]
        if not is_marker(data, span):
            assert not parts(inner) or parts(inner) == [(0, len(inner))]
            assert not any(marker in inner for marker in (b"<think>", b"</think>", b"<|im_end|>"))


@given(st.binary(max_size=60))
def test_bytes_need_not_be_utf8(data):
    spans = split(data)
    assert b"".join(data[begin:end] for begin, end in spans) == data


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(InputError, match="character 2"):
        split("ab\ud83d")


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6), st.integers(0, 6), st.booleans()), max_size=12),
    st.integers(1, 5),
)
def test_short_sentences_join_a_neighbour_of_their_part(sentences, minimum):
    spans, at = [], 0
    for length, _, _, gap in sentences:  # a gap is a marker
        at += 3 * gap
        spans.append((at, at + length))
        at += length
    counts = {span: (teacher, student) for span, (_, teacher, student, _) in zip(spans, sentences, strict=True)}
    merged = merge_short(spans, [c[0] for c in counts.values()], [c[1] for c in counts.values()], minimum)
    inside = [[span for span in spans if begin <= span[0] and span[1] <= end] for begin, end in merged]
    assert [span for group in inside for span in group] == spans  # each in exactly one, in order
    touching = {b[0] for a, b in zip(spans, spans[1:], strict=False) if a[1] == b[0]}
    for (begin, _), group in zip(merged, inside, strict=True):
        assert all(span[0] in touching for span in group[1:])  # never across a marker
        if min(sum(counts[span][i] for span in group) for i in (0, 1)) < minimum:
            alone = begin not in touching and group[-1][1] not in touching
            assert alone  # the whole part is short


def test_a_short_sentence_joins_the_next_and_the_last_the_one_before():
    spans = [(0, 5), (5, 9), (9, 20), (20, 22)]
    assert merge_short(spans, [1, 5, 8, 9], [9, 5, 8, 2]) == [(0, 9), (9, 22)]
    assert merge_short(spans, [1, 1, 1, 1], [9, 9, 9, 9]) == [(0, 22)]
    assert merge_short([(0, 5), (9, 12)], [1, 1], [1, 1]) == [(0, 5), (9, 12)]
    assert merge_short([], [], []) == []


LINEAR = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (40, 40))
from dasd_engine.sentences import merge_short, split
size = 150_000
for unit in sys.stdin.read().split("\\0"):
    text = "x" + unit * (size // len(unit.encode())) + "y"
    spans = split(text)
    assert spans[0][0] == 0 and spans[-1][1] == len(text.encode())
    merge_short(spans, [1] * len(spans), [1] * len(spans))
print("done")
"""
ADVERSARIAL = [
    "$", "$$", "$ ", "$a", "$a ", "$.$ ", "$\n\n", "\\", "\\\\", "\\$", "\\[", "\\(", "\\[\\]", "\\[\n\n",
    "\\begin{a}", "\\end{a}", "\\begin{a}\\begin{b}\\end{a}", "`", "` ``", "a`", "```", "```\n", "```a\n",
    "````a\n```\n", "~~~\n", "~~~a\n```\n", ".", "..", "a.b.", "...x", ". ", "a. ", "A. ", "1. ", "A. B. ",
    "e.g. ", "Step 1. ", ".) ", ".)", "!", "n! ", "1! A", "?! ", "…", "…. ", "….", "… ", "。", "。 ", "。\n", "！？",
    "“.”", "✓. ✓", "\n", "a\n", "\n ", " \n", "\f\n", "\r\n", " ", "\t.", "([{", ")", "<", "<|", "<|a|>",
    "<think>", "</think>\n", "<|start|>", "<|start|>a<|channel|>b", "<|channel|>" + "a" * 60, "[THINK]", "◁",
    "п. ", "é", "🙂",
]  # fmt: skip


def test_work_is_linear_in_the_length():
    """Quadratic work on any one of these would take the processor more than the 40 s that all of them are given;
    about 4 s are needed. (1 MB of each is timed in bench/test_score.py.)"""
    done = subprocess.run(
        [sys.executable, "-c", LINEAR], input="\0".join(ADVERSARIAL), capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr

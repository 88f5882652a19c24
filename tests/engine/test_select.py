"""select: rules by hand and by brute force, sentence types, the directory it writes, its report, bad input."""

import itertools
import json
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from chats import write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import environment
from scored_runs import candidate, many, seal, write_scored
from tiny_models import make_theirs

from dasd_engine import select as select_module
from dasd_engine.chat import Chat
from dasd_engine.errors import InputError
from dasd_engine.prepare import prepare
from dasd_engine.records import read_rows
from dasd_engine.scored import read_scores
from dasd_engine.select import main, select
from dasd_engine.selection import (
    BINS,
    RULES,
    Candidate,
    choose,
    count_four_types,
    count_types,
    length_correlation,
    length_slope,
    overlap,
    tied,
)
from dasd_engine.selection_report import render
from dasd_engine.shards import Shards


def make(number, teacher, tokens, common=3, student=0, question="q", temperature=0.6, source=0):
    return Candidate(
        question, temperature, number, source, number, number, tokens + 1, tokens, teacher, common, student
    )


def numbers(questions, rule, seed=0):
    return {question: c.number for question, c in choose(questions, rule, seed).items()}


# ---------------------------------------------------------------------------------------------- rules


def test_rules_by_hand():
    one = [
        make(0, teacher=2, tokens=30, common=1),  # 2 of 3
        make(1, teacher=5, tokens=50, common=5),  # 5 of 10
        make(2, teacher=1, tokens=20, common=9),  # 1 of 10
        make(3, teacher=5, tokens=60, common=0, student=5),
    ]
    expected = {"teacher_count": 1, "min_count": 2, "ratio": 0, "longest": 3, "shortest": 2}
    assert {rule: numbers({"q": one}, rule)["q"] for rule in expected} == expected


def test_ties_go_to_the_lowest_number_then_the_first_directory():
    same = [make(3, 2, 30), make(1, 2, 30, source=1), make(1, 2, 30), make(2, 2, 30)]
    for rule in RULES:
        chosen = choose({"q": same}, rule)["q"]
        assert rule == "random" or (chosen.number, chosen.source) == (1, 0), rule
    assert tied({"q": same}, "teacher_count", choose({"q": same}, "teacher_count")) == 1
    apart = [make(0, 2, 30), make(1, 3, 30)]
    assert tied({"q": apart}, "teacher_count", choose({"q": apart}, "teacher_count")) == 0


def test_count_minus_length_by_hand():
    """Within questions counts grow by 1 in 10 tokens, so the choice is by count − tokens / 10."""
    questions = {
        "a": [make(0, 1, 10), make(1, 2, 20), make(2, 3, 30)],
        "b": [make(0, 11, 10), make(1, 12, 20), make(2, 13, 30)],  # another level: the intercept is a question's own
    }
    assert length_slope(questions) == Fraction(1, 10)
    questions["c"] = [make(0, 9, 100), make(1, 8, 30), make(2, 8, 100)]
    slope = length_slope(questions)
    x = np.array([c.student_tokens - np.mean([d.student_tokens for d in q]) for q in questions.values() for c in q])
    y = np.array([c.teacher - np.mean([d.teacher for d in q]) for q in questions.values() for c in q])
    assert math.isclose(float(slope), np.linalg.lstsq(x[:, None], y, rcond=None)[0][0])
    assert numbers(questions, "count_minus_length")["c"] == 1
    assert math.isclose(length_correlation(questions), np.corrcoef(x, y)[0, 1])
    assert length_slope({"d": [make(0, 1, 5), make(1, 7, 5)]}) == 0
    assert numbers({"d": [make(0, 1, 5), make(1, 7, 5)]}, "count_minus_length") == {"d": 1}
    assert length_correlation({"d": [make(0, 1, 5)]}) is None


def test_token_matched_by_hand():
    """From 10 + 10 tokens, a's step buys .5 sentences a token, b's first .4, b's second .1, each for 10 tokens."""
    questions = {
        "a": [make(0, 0, 10), make(1, 5, 20)],
        "b": [make(0, 0, 10, question="b"), make(1, 4, 20, question="b"), make(2, 5, 30, question="b")],
    }
    for seed in range(30):
        drawn = choose(questions, "random", seed)
        budget = sum(c.student_tokens for c in drawn.values())
        expected = {20: (0, 0), 30: (1, 0), 40: (1, 1), 50: (1, 2)}[budget]
        assert tuple(numbers(questions, "token_matched", seed).values()) == expected


def test_random_is_a_draw_of_its_key_alone():
    questions = {f"q{i}": [make(k, k, 10 + k, question=f"q{i}") for k in range(4)] for i in range(2000)}
    drawn = numbers(questions, "random")
    counts = np.bincount(list(drawn.values()))
    assert len(counts) == 4 and ((counts - 500) ** 2 / 500).sum() < 16.3  # chi square, 3 degrees, p = 0.001
    assert numbers(dict(reversed(questions.items())), "random") == drawn
    assert numbers({"q7": questions["q7"]}, "random")["q7"] == drawn["q7"]
    reseeded = numbers(questions, "random", seed=1)
    assert sum(reseeded[q] == drawn[q] for q in drawn) < 650
    others = {q: [make(c.number, 0, 1, question=q, temperature=1.0) for c in cs] for q, cs in questions.items()}
    hot = numbers(others, "random")
    assert sum(hot[q] == drawn[q] for q in drawn) < 650
    # Where a filter drops another candidate, the choice stays.
    fewer = {q: [c for c in cs if c.number in (drawn[q], 0)] for q, cs in questions.items()}
    assert numbers(fewer, "random") == drawn


candidates = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 12), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=4
)
pools = st.lists(candidates, min_size=1, max_size=4).map(
    lambda pool: {
        f"q{i}": [make(k, t, n, c, s, question=f"q{i}") for k, (t, n, c, s) in enumerate(one)]
        for i, one in enumerate(pool)
    }
)


@given(pools, st.integers(0, 3), st.randoms())
def test_one_candidate_of_every_question_whatever_the_order(questions, seed, rng):
    shuffled = list(questions.items())
    rng.shuffle(shuffled)
    again = {question: rng.sample(one, len(one)) for question, one in shuffled}
    for rule in RULES:
        chosen = choose(questions, rule, seed)
        assert chosen.keys() == questions.keys()
        assert all(chosen[question] in questions[question] for question in questions)
        assert choose(again, rule, seed) == chosen


@given(pools)
def test_rules_against_a_search(questions):
    slope = length_slope(questions)
    best = {
        "teacher_count": lambda c: c.teacher,
        "min_count": lambda c: -c.teacher,
        "ratio": lambda c: Fraction(c.teacher, c.sentences) if c.sentences else Fraction(),
        "longest": lambda c: c.student_tokens,
        "shortest": lambda c: -c.student_tokens,
        "count_minus_length": lambda c: c.teacher - slope * c.student_tokens,
    }
    for rule, value in best.items():
        chosen = choose(questions, rule)
        for question, one in questions.items():
            highest = max(value(c) for c in one)
            assert chosen[question] == next(c for c in one if value(c) == highest), rule
        several = sum(sum(value(c) == value(chosen[q]) for c in one) > 1 for q, one in questions.items())
        assert tied(questions, rule, chosen) == several


@given(pools, st.integers(0, 3))
def test_token_matched_against_all_choices(questions, seed):
    """No choice of at most its tokens has more teacher sentences; where the budget makes it longer than pays, none of
    at least its tokens has."""
    budget = sum(c.student_tokens for c in choose(questions, "random", seed).values())
    chosen = choose(questions, "token_matched", seed).values()
    tokens, count = sum(c.student_tokens for c in chosen), sum(c.teacher for c in chosen)
    assert tokens <= budget
    every = [
        (sum(c.student_tokens for c in choice), sum(c.teacher for c in choice))
        for choice in itertools.product(*questions.values())
    ]
    assert all(c <= count for t, c in every if t <= tokens) or all(c <= count for t, c in every if t >= tokens)
    # It stops only where one more step of one question would be beyond the budget.
    if tokens < budget:
        longer = [
            b.student_tokens - a.student_tokens
            for a in chosen for b in questions[a.question] if b.student_tokens > a.student_tokens
        ]  # fmt: skip
        assert not longer or max(longer) > budget - tokens


def test_overlap_counts_the_same_candidate():
    questions = {q: [make(0, 1, 9, question=q), make(1, 2, 5, question=q)] for q in "abcd"}
    first, second = ({q: one[i] for q, one in questions.items()} for i in (0, 1))
    mixed = {**first, "d": second["d"]}
    shares = overlap({"x": first, "y": second, "z": mixed}, ["a", "b", "c", "d"])
    assert (shares["x"]["y"], shares["x"]["z"], shares["z"]["x"], shares["y"]["z"]) == (0, 0.75, 0.75, 0.25)
    assert overlap({"x": first}, []) == {}


# ---------------------------------------------------------------------------------------------- sentences


def test_types_by_hand():
    p_t, p_s = np.array([0.75, 0.5, 0.25, 0.5, 1.0, 0.0]), np.array([0.5, 0.75, 0.5, 0.5, 0.0, 1.0])
    types, histogram = count_types(p_t, p_s, np.array([3, 0, 3]), beta=0.25)  # Δ = .25 −.25 −.25 | 0 1 −1
    assert types.tolist() == [[0, 3, 0], [0, 0, 0], [1, 1, 1]]  # at β itself a sentence is common
    assert np.flatnonzero(histogram[0]).tolist() == [7, 12] and histogram[0].sum() == 3
    assert np.flatnonzero(histogram[2]).tolist() == [0, 10, BINS - 1]
    assert count_types(p_t, p_s, np.array([6]), beta=0.2)[0].tolist() == [[2, 1, 3]]


probabilities = st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=30).map(np.array)


@given(probabilities, st.floats(0, 1), st.floats(0, 1))
def test_fewer_sentences_of_either_kind_with_a_higher_beta(p, a, b):
    low, high = (
        count_types(p[:, 0], p[:, 1], np.array([len(p)]), beta)[0][0].tolist() for beta in sorted((a, b))
    )  # fmt: skip
    assert low[0] >= high[0] and low[2] >= high[2] and sum(low) == sum(high) == len(p)


@given(probabilities, st.floats(0, 1), st.floats(0, 1))
def test_four_types_against_the_definition(p, beta, alpha):
    expected = dict.fromkeys(("shared", "teacher", "student", "boosted"), 0)
    for t, s, d in p:
        if abs(t - s) <= alpha and abs(t - d) <= alpha and abs(s - d) <= alpha:
            expected["shared"] += 1
        elif t - s > beta:
            expected["teacher"] += 1
        elif -(t - s) > beta:
            expected["student"] += 1
        else:
            expected["boosted"] += 1
    assert count_four_types(*p.T, np.array([len(p)]), beta, alpha).tolist() == [list(expected.values())]


def test_four_types_by_hand():
    """α = β = 0.1: all alike; the teacher's and now learnt; the student's own; neither's, yet the distilled model's."""
    rows = [(0.5, 0.45, 0.52), (0.9, 0.2, 0.8), (0.1, 0.8, 0.5), (0.3, 0.35, 0.9), (0.3, 0.35, 0.41)]
    t, s, d = np.array(rows).T
    lengths = np.ones(5, np.int64)
    assert count_four_types(t, s, d, lengths, 0.1, 0.1).argmax(1).tolist() == [0, 1, 2, 3, 3]
    assert count_four_types(t, s, d, lengths, 0.1, 1.0).argmax(1).tolist() == [0] * 5


# ---------------------------------------------------------------------------------------------- the command


def rows(path):
    return [row for _, row in read_rows(path)]


def small(path, **fields):
    """Two questions at two temperatures: two candidates each, but one of b's is cut off."""
    return write_scored(
        path,
        [
            candidate("a", 0, "tcc", 10), candidate("a", 1, "ttcs", 40, **fields),
            candidate("b", 0, "tttt", 20, finish_reason="length"), candidate("b", 1, "cc", 15),
            candidate("a", 0, "cc", 7, temperature=1.0), candidate("a", 1, "tc", 9, temperature=1.0),
            candidate("b", 0, "t", 5, temperature=1.0), candidate("b", 1, "c", 50, temperature=1.0),
        ],
    )  # fmt: skip


def test_what_is_written(tmp_path):
    manifest = select(small(tmp_path), tmp_path / "out", temperature=0.6, quiet=True)
    assert manifest["counts"] == {
        "candidates": 4, "kept": 3, "dropped": {"truncated": 1}, "selected": 2, "student_tokens": 55
    }  # fmt: skip
    first, second = rows(tmp_path / "out/selected.jsonl")
    assert list(first) == ["uuid", "input", "output", "domain", "meta"]
    assert (first["uuid"], first["input"], first["domain"]) == ("a", "What is a?", "")
    assert first["output"] == "<think>\nAdd a.1 to it.\n</think>\n\nThe answer is a.1."
    assert json.loads(first["meta"]) == {
        "answer": None, "task": None, "temperature": 0.6, "candidate": 1, "rule": "teacher_count",
        "counts": {"teacher": 2, "common": 1, "student": 1}, "student_tokens": 40, "teacher_tokens": 41,
        "teacher": {"name": "tiny", "revision": None},
    }  # fmt: skip
    assert (second["uuid"], json.loads(second["meta"])["candidate"]) == ("b", 1)
    (dropped,) = rows(tmp_path / "out/dropped.jsonl")
    assert dropped["line"] == f"{tmp_path}/candidates/candidates.jsonl:3"
    assert (dropped["id"], dropped["candidate"], dropped["temperature"]) == ("b", 0, 0.6)
    assert (dropped["reason"], dropped["text"]) == (
        "truncated",
        "<think>\nAdd b.0 to it.\n</think>\n\nThe answer is b.0.",
    )


def test_what_is_no_user_message_is_not_made_one(tmp_path):
    only = [{"role": "system", "content": "Begin."}]
    select(write_scored(tmp_path, [candidate("a", 0, messages=only)]), tmp_path / "out", quiet=True)
    (row,) = rows(tmp_path / "out/selected.jsonl")
    assert row["messages"][0] == only[0] and "input" not in row


def test_every_temperature_is_chosen_for_itself(tmp_path):
    select(small(tmp_path), tmp_path / "out", rule="longest", quiet=True)
    metas = [json.loads(row["meta"]) for row in rows(tmp_path / "out/selected.jsonl")]
    assert [(meta["temperature"], meta["candidate"]) for meta in metas] == [(0.6, 1), (0.6, 1), (1.0, 1), (1.0, 1)]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [section["temperature"] for section in report["temperatures"]] == [0.6, 1.0]


def test_every_rule_gives_as_many_responses_to_the_same_questions(tmp_path):
    scores = write_scored(tmp_path, many(40, 4))
    texts = {}
    for rule in RULES:
        select(scores, tmp_path / rule, rule=rule, quiet=True)
        chosen = rows(tmp_path / rule / "selected.jsonl")
        keys = [(json.loads(row["meta"])["temperature"], row["uuid"]) for row in chosen]
        assert keys == sorted(set(keys))
        texts[rule] = keys, [row["output"] for row in chosen]
    assert len({tuple(keys) for keys, _ in texts.values()}) == 1
    assert len({tuple(outputs) for _, outputs in texts.values()}) == len(RULES)


def test_the_order_of_the_candidates_does_not_matter(tmp_path):
    found = many(25, 3)
    for index, one in enumerate((found, found[::-1])):
        select(write_scored(tmp_path / str(index), one), tmp_path / f"out{index}", quiet=True)
    assert (tmp_path / "out0/selected.jsonl").read_bytes() == (tmp_path / "out1/selected.jsonl").read_bytes()
    assert (tmp_path / "out0/report.json").read_bytes() == (tmp_path / "out1/report.json").read_bytes()


def test_beta_and_alpha_are_the_commands_own(tmp_path):
    scores = small(tmp_path, p_D=[0.9, 0.2, 0.5, 0.8])
    with pytest.raises(InputError, match=r"scores\.jsonl:\d+: `sentences` must be .* all with a further p_D or none"):
        select(scores, tmp_path / "out", quiet=True)  # p_D in one row only
    found = [candidate("a", 0, "ttcs", p_D=[0.9, 0.2, 0.55, 0.8]), candidate("a", 1, "cccc", p_D=[0.9] * 4)]
    scores = write_scored(tmp_path / "d", found)
    sections = []
    for beta, alpha in ((0.1, 0.1), (0.1, 0.3), (0.75, 0.1)):
        out = tmp_path / f"{beta}{alpha}"
        select(scores, out, beta=beta, alpha=alpha, quiet=True)
        sections.append(json.loads((out / "report.json").read_text())["temperatures"][0])
    assert [section["four_types"]["selected"] for section in sections] == [
        {"shared": 1, "teacher": 2, "student": 1, "boosted": 0},
        {"shared": 1, "teacher": 2, "student": 1, "boosted": 0},
        {"shared": 1, "teacher": 0, "student": 0, "boosted": 3},
    ]
    assert sections[0]["four_types"]["kept"]["boosted"] == 4 == sections[1]["four_types"]["kept"]["boosted"]
    assert sections[0]["sentences"]["selected"] == {"teacher": 2, "common": 1, "student": 1}
    assert sections[2]["sentences"]["selected"] == {"teacher": 0, "common": 4, "student": 0}


def test_right_answers_only(tmp_path):
    scores = write_scored(
        tmp_path,
        [
            candidate("a", 0, "ttt", answer="a.1"), candidate("a", 1, "c", answer="a.1"),
            candidate("b", 0, "ttt", answer="7"), candidate("c", 0, "ttt"),
        ],
    )  # fmt: skip
    manifest = select(scores, tmp_path / "out", right_only=True, quiet=True)
    assert [row["output"][-4:] for row in rows(tmp_path / "out/selected.jsonl")] == ["a.1."]
    assert manifest["counts"]["dropped"] == {"no_known_answer": 1, "wrong_answer": 2}
    section = json.loads((tmp_path / "out/report.json").read_text())["temperatures"][0]
    assert section["questions"] == {
        "read": 3, "kept": 1, "one_candidate": 1, "choice": 0, "different_texts": 0, "tied": 0
    }  # fmt: skip


def test_several_scores_make_one_pool(tmp_path):
    one = write_scored(tmp_path / "1", [candidate("a", 0, "tc", 9), candidate("b", 0, "tc", 9)])
    two = write_scored(
        tmp_path / "2", [candidate("a", 0, "tt", 9, text="<think>x</think>y"), candidate("b", 0, "tc", 9)]
    )
    select([one, two], tmp_path / "out", quiet=True)
    a, b = rows(tmp_path / "out/selected.jsonl")
    assert (a["output"], b["output"][-4:]) == ("<think>x</think>y", "b.0.")
    with pytest.raises(InputError, match="name each once"):
        select([one, one], tmp_path / "twice", quiet=True)
    messages = [{"role": "user", "content": "Another question"}]
    other = write_scored(tmp_path / "3", [candidate("c", 0), candidate("a", 1, messages=messages)])
    with pytest.raises(InputError, match=r"candidates\.jsonl:2: question 'a' has other messages than in .*/1/cand.*:1"):
        select([one, other], tmp_path / "other", quiet=True)


def test_prepare_reads_the_choice(tmp_path):
    model = write_model(tmp_path / "model")
    harmony = "<|channel|>analysis<|message|>Two.<|end|><|start|>assistant<|channel|>final<|message|>4.<|return|>"
    turns = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "2+2?"},
    ]  # fmt: skip
    found = [candidate("a", 0, text=harmony, task="sums"), candidate("b", 0, text=harmony, messages=turns)]
    select(write_scored(tmp_path, found, model), tmp_path / "out", quiet=True)
    chosen = rows(tmp_path / "out/selected.jsonl")
    assert [list(row) for row in chosen] == [
        ["uuid", "input", "output", "domain", "meta"], ["uuid", "messages", "domain", "meta"]
    ]  # fmt: skip
    prepare([tmp_path / "out/selected.jsonl"], model, tmp_path / "shards", quiet=True)
    shards, chat = Shards.open(tmp_path / "shards"), Chat.load(model)
    texts = [
        chat.tokenizer.decode(shards.tokens[begin:end].tolist(), skip_special_tokens=False)
        for begin, end in itertools.pairwise(shards.offsets.tolist())
    ]
    trained = {}
    for document, begin, end in shards.loss_spans.tolist():
        ids = shards.tokens[shards.offsets[document] + begin : shards.offsets[document] + end]
        trained.setdefault(document, []).append(chat.tokenizer.decode(ids.tolist(), skip_special_tokens=False))
    said = "<think>Two.</think>4.<|im_end|>"
    assert trained == {0: [said], 1: [said]}  # not "Hello.", which the teacher has not said
    assert texts[0].endswith("What is a?<|im_end|>\n<|im_start|>assistant\n<think>Two.</think>4.<|im_end|>")
    assert texts[-1].endswith("2+2?<|im_end|>\n<|im_start|>assistant\n<think>Two.</think>4.<|im_end|>")
    assert (shards.meta(0)["uuid"], shards.meta(0)["domain"]) == ("a", "sums")


@pytest.mark.parametrize("words", [1, 80, 1200])
def test_with_a_student_the_context_is_that_of_prepare(tmp_path, words):
    """At the length that prepare gives the document nothing is dropped, one token below it is; far away too."""
    model = write_model(tmp_path / "model")
    chat = Chat.load(model)
    text = "<think>" + " ".join(f"{i * 7919}" for i in range(words)) + "</think>So 4."
    tokens = len(chat.tokenizer.encode(text).ids)
    scores = write_scored(tmp_path, [candidate("a", 0, text=text, tokens=tokens)], model)
    select(scores, tmp_path / "first", quiet=True)
    manifest = prepare([tmp_path / "first/selected.jsonl"], model, tmp_path / "shards", system="", quiet=True)
    length = manifest["counts"]["tokens"]
    for context, kept in ((length, True), (length - 1, False), (length + 200, True), (max(2, length - 200), False)):
        try:
            select(scores, tmp_path / str(context), context=context, quiet=True)
        except InputError as error:
            assert not kept and "1 too_long" in str(error)
        else:
            assert kept


def test_a_response_that_would_end_the_students_turn(tmp_path):
    model = write_model(tmp_path / "model")
    found = [candidate("a", 0, text="<think>a<|im_end|></think>b"), candidate("a", 1)]
    manifest = select(write_scored(tmp_path, found, model), tmp_path / "out", quiet=True)
    assert manifest["counts"]["dropped"] == {"not_trainable": 1}


def test_the_student_is_the_one_that_scored(tmp_path):
    model, other = write_model(tmp_path / "model"), write_model(tmp_path / "other", split="gpt2")
    scores = write_scored(tmp_path / "a", [candidate("a", 0)], model)
    more = write_scored(tmp_path / "b", [candidate("b", 0)], other)
    with pytest.raises(InputError, match="scores of another student"):
        select([scores, more], tmp_path / "out", quiet=True)
    with pytest.raises(InputError, match=r"other/tokenizer\.json: is not the tokenizer"):
        select(scores, tmp_path / "out", student=other, quiet=True)
    model = model.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="model: no such directory; .* --student DIR"):
        select(scores, tmp_path / "out", quiet=True)
    select(scores, tmp_path / "out", student=model, quiet=True)


def test_scores_of_a_real_student(tmp_path):
    """The directory that dasd_engine.score writes, of a student with random weights."""
    from dasd_engine.score import score

    student = write_model(tmp_path / "student")
    chat = Chat.load(student)
    vocabulary = max(chat.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    make_theirs(student, "qwen3", vocab_size=vocabulary)
    found = []
    for question, number in itertools.product("ab", range(3)):
        row = candidate(question, number)
        ids = chat.tokenizer.encode(row["text"]).ids
        sizes = [len(chat.tokenizer.decode(ids[: i + 1], skip_special_tokens=False).encode()) for i in range(len(ids))]
        row |= {"token_ids": ids, "logprobs": [-0.1 * (number + 1)] * len(ids), "token_ends": sizes}
        found.append(row)
    found[1]["finish_reason"] = "length"
    found[2]["logprobs"][3] = 1.0
    write_scored(tmp_path, found)
    score(tmp_path / "candidates/candidates.jsonl", student, tmp_path / "real", quiet=True)
    manifest = select(tmp_path / "real", tmp_path / "out", rule="random", quiet=True)
    assert manifest["counts"]["dropped"] == {"truncated": 1, "not_scored": 1}
    assert manifest["parameters"]["student"] is not None
    chosen = [json.loads(row["meta"]) for row in rows(tmp_path / "out/selected.jsonl")]
    scored = {(row["id"], row["candidate"]): row for row in rows(tmp_path / "real/scores.jsonl")}
    for uuid, meta in zip("ab", chosen, strict=True):
        assert meta["counts"] == scored[uuid, meta["candidate"]]["counts"]
    with pytest.raises(InputError, match="no candidate is left by the filters: 1 truncated, 4 too_long, 1 not_scored"):
        select(tmp_path / "real", tmp_path / "short", context=10, quiet=True)


# ---------------------------------------------------------------------------------------------- the report


def run(*arguments):
    command = [sys.executable, "-m", "dasd_engine.select", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=100)


def test_the_printed_report(tmp_path, capsys):
    scores = write_scored(tmp_path, many(30, 4))
    arguments = [str(scores), "--out", str(tmp_path / "out"), "--temperature", "0.6"]
    command = [sys.executable, "-m", "dasd_engine.select", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=100)
    assert done.returncode == 0, done.stderr
    assert all(len(line) <= 100 for line in done.stdout.splitlines()[:-1])
    for said in ("teacher_count", "left by the filters", "Δ > 0.1", "Δ < −0.1", "random", "Rules", "█", "correlate by"):
        assert said in done.stdout
    assert done.stdout.rstrip().endswith("out/selected.jsonl")
    main(arguments)
    again = capsys.readouterr().out
    assert "nothing to do" in again and again.splitlines()[1:] == done.stdout.splitlines()
    with pytest.raises(InputError, match=r"parameters\.beta: 0\.1 then, 0\.2 now"):
        main([*arguments, "--beta", "0.2"])
    main([*arguments[:2], str(tmp_path / "other"), "--no-repetition", "--repeated-loop", "3", "--quiet"])
    manifest = json.loads((tmp_path / "other/manifest.json").read_text())
    assert manifest["parameters"]["repetition"] is None and capsys.readouterr().out == ""


def test_the_report_adds_up(tmp_path):
    found = many(30, 4)
    select(write_scored(tmp_path, found), tmp_path / "out", quiet=True)
    report = json.loads((tmp_path / "out/report.json").read_text())
    dropped = rows(tmp_path / "out/dropped.jsonl")
    for section, temperature in zip(report["temperatures"], (0.6, 1.0), strict=True):
        counts, questions = section["candidates"], section["questions"]
        assert counts["read"] == 120 == counts["kept"] + sum(counts["dropped"].values())
        assert sum(counts["dropped"].values()) == sum(row["temperature"] == temperature for row in dropped)
        assert questions["kept"] == questions["one_candidate"] + questions["choice"]
        chosen = [json.loads(row["meta"]) for row in rows(tmp_path / "out/selected.jsonl")]
        chosen = [meta for meta in chosen if meta["temperature"] == temperature]
        lengths = section["lengths"]["selected"]
        assert lengths["responses"] == len(chosen) == questions["kept"]
        assert lengths["student_tokens_mean"] == np.mean([meta["student_tokens"] for meta in chosen])
        assert lengths["student_tokens_median"] == np.median([meta["student_tokens"] for meta in chosen])
        assert lengths["teacher_tokens_median"] == np.median([meta["teacher_tokens"] for meta in chosen])
        for kind in ("teacher", "common", "student"):
            assert section["sentences"]["selected"][kind] == sum(meta["counts"][kind] for meta in chosen)
        for name in ("kept", "selected"):
            assert sum(section["histogram"][name]) == sum(section["sentences"][name].values())
        assert all(0 <= share <= 1 for line in section["overlap"].values() for share in line.values())
    examples = {reason: sum(row["reason"] == reason and "text" in row for row in dropped) for reason in
                {row["reason"] for row in dropped}}  # fmt: skip
    assert set(examples.values()) <= {1, 2, 3} and max(examples.values()) == 3


def test_a_report_of_next_to_nothing(tmp_path):
    """One candidate of one question; nothing left at one of two temperatures; huge numbers."""
    found = [
        candidate("a", 0, "c" * 3, 10**7),
        candidate("a", 0, "ttt", temperature=1.0, finish_reason="length"),
    ]
    select(write_scored(tmp_path, found), tmp_path / "out", context=10**8, quiet=True)
    lines = render(json.loads((tmp_path / "out/report.json").read_text()))
    assert len(rows(tmp_path / "out/selected.jsonl")) == 1
    assert max(map(len, lines)) <= 100


# ---------------------------------------------------------------------------------------------- runs


def test_finished_is_left_alone_and_killed_is_done_again(tmp_path, monkeypatch):
    scores = write_scored(tmp_path, many(10, 3))
    before = select(scores, tmp_path / "out", quiet=True)
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(select_module, "read_scores", None)  # nothing is read again
    assert select(scores, tmp_path / "out", quiet=True) == before
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files

    def killed(*arguments):
        raise KeyboardInterrupt

    for name in ("_selected_rows", "write_json", "write_rows"):  # at any of its files
        monkeypatch.setattr(select_module, name, killed)
        with pytest.raises(KeyboardInterrupt):
            select(scores, tmp_path / name, quiet=True)
        monkeypatch.undo()
        assert not (tmp_path / name / "manifest.json").exists()
        select(scores, tmp_path / name, quiet=True)
        for file in ("selected.jsonl", "dropped.jsonl", "report.json"):
            assert (tmp_path / name / file).read_bytes() == files[file]


def test_changed_inputs_are_refused(tmp_path):
    scores = small(tmp_path)
    select(scores, tmp_path / "out", quiet=True)
    with pytest.raises(InputError, match=r"parameters\.rule: \"teacher_count\" then, \"longest\" now"):
        select(scores, tmp_path / "out", rule="longest", quiet=True)
    (tmp_path / "moved").mkdir()
    scores = scores.rename(tmp_path / "moved/scores")
    select(scores, tmp_path / "out", quiet=True)  # another place is the same input
    path = tmp_path / "candidates/candidates.jsonl"
    path.write_text(path.read_text().replace("a.1", "a.9"))
    with pytest.raises(InputError, match=r"candidates\.jsonl: has changed since .* was made; score it anew"):
        select(scores, tmp_path / "out", quiet=True)
    scores.rename(tmp_path / "scores")
    seal(tmp_path)
    with pytest.raises(InputError, match="inputs.candidates 1: .* then, .* now"):
        select(tmp_path / "scores", tmp_path / "out", quiet=True)


# ---------------------------------------------------------------------------------------------- bad input


def edit(path, line, **fields):
    """Replace fields of one row; None removes one."""
    found = rows(path)
    found[line - 1] = {key: value for key, value in {**found[line - 1], **fields}.items() if value is not None}
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    seal(path.parents[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sentences": [[0, 1, float("nan"), 0.5, 3, 3]]}, r"sentences\[0\] holds nan where a probability"),
        ({"sentences": [[0, 1, 0.5, 0.5, 3, 3], [0, 1, 0.5, float("inf"), 3, 3]]}, r"sentences\[1\] holds inf"),
        ({"sentences": [[0, 1, -0.5, 0.5, 3, 3]]}, r"sentences\[0\] holds -0.5"),
        ({"sentences": [[0, 1, 0.5, 1.01, 3, 3]]}, r"sentences\[0\] holds 1.01"),
        ({"sentences": [[0, 1, 0.5, "x", 3, 3]]}, r"sentences\[0\] holds 'x'"),
        ({"sentences": [[0, 1]]}, "`sentences` must be lists"),
        ({"sentences": "none"}, "`sentences` must be a list"),
        ({"sentences": [7]}, "`sentences` must be lists"),
        ({"student_tokens": None}, "`student_tokens` must be a whole number"),
        ({"teacher_tokens": -1}, "`teacher_tokens` must be a whole number"),
        ({"source": "1"}, "`source` must be a whole number"),
        ({"source": 99}, r"scores line 99 of .*candidates\.jsonl, which ends with line 8"),
        ({"source": 0}, "scores line 0 of"),
        ({"id": "z"}, r"scores candidate \d of question 'z' .* but .*candidates\.jsonl:\d holds"),
        ({"temperature": "hot"}, "`temperature` must be a number"),
    ],
)
def test_bad_scores_name_file_and_line(tmp_path, fields, message):
    scores = small(tmp_path)
    edit(scores / "scores.jsonl", 3, **fields)
    with pytest.raises(InputError, match=rf"scores\.jsonl:3: .*{message}|scores\.jsonl:3: {message}"):
        select(scores, tmp_path / "out", quiet=True)
    small(tmp_path)  # put right, the same --out is taken
    select(scores, tmp_path / "out", quiet=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": None}, "`text` must be a string"),
        ({"messages": []}, "`messages` must be objects"),
        ({"messages": [{"role": "user"}]}, "`messages` must be objects"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "`messages` hold half a surrogate pair"),
        ({"finish_reason": None}, "`finish_reason` must be a string"),
        ({"answer": 4}, "`answer` must be a string"),
        ({"candidate": 1.5}, "`candidate` must be a whole number"),
        ({"temperature": float("inf")}, "`temperature` must be a number"),
        ({"candidate": 0, "temperature": 0.6}, "candidate 0 of question 'a' at 0.6 stands there twice"),
    ],
)
def test_bad_candidates_name_file_and_line(tmp_path, fields, message):
    scores = small(tmp_path)
    edit(tmp_path / "candidates/candidates.jsonl", 5, **{"id": "a" if "candidate" in fields else "new", **fields})
    edit(scores / "scores.jsonl", [row["source"] for row in rows(scores / "scores.jsonl")].index(5) + 1, id="new")
    with pytest.raises(InputError, match=rf"candidates\.jsonl:5: {message}"):
        select(scores, tmp_path / "out", quiet=True)


def test_what_cannot_be_scored_is_counted(tmp_path):
    scores = write_scored(
        tmp_path,
        [
            candidate("a", 0, error="logprobs: non-finite"), candidate("a", 1, ""), candidate("a", 2, "tc"),
            candidate("a", 3, "tc"), candidate("a", 4, error="context: 70000 tokens, more than the student's 65536"),
            candidate("a", 5, error="logprobs: non-finite", finish_reason="length"),
            candidate("a", 6, error="template: messages[1].content: has no thinking"),
        ],
    )  # fmt: skip
    kept = [row for row in rows(scores / "scores.jsonl") if row["source"] != 4]
    (scores / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    manifest = select(scores, tmp_path / "out", quiet=True)
    assert manifest["counts"]["dropped"] == {"truncated": 1, "not_trainable": 1, "too_long": 1, "not_scored": 3}
    assert [row["detail"] for row in rows(tmp_path / "out/dropped.jsonl")] == [
        "logprobs: non-finite", "no sentences", "no row in scores.jsonl",
        "70000 tokens, more than the student's 65536", "after 51 characters",
        "messages[1].content: has no thinking",
    ]  # fmt: skip


def test_a_line_scored_twice(tmp_path):
    scores = small(tmp_path)
    with open(scores / "scores.jsonl", "a") as file:
        file.write(json.dumps(rows(scores / "scores.jsonl")[0]) + "\n")
    with pytest.raises(InputError, match=r"scores\.jsonl:9: line \d of candidates\.jsonl is scored twice"):
        select(scores, tmp_path / "out", quiet=True)


def test_directories_that_are_not_scores(tmp_path):
    with pytest.raises(InputError, match=r"no such directory; python -m dasd_engine\.score makes it"):
        select(tmp_path / "none", tmp_path / "out")
    scores = small(tmp_path)
    (tmp_path / "candidates/candidates.jsonl").rename(tmp_path / "gone")
    with pytest.raises(InputError, match=r"candidates/candidates\.jsonl: no such file, but .*scores was made from it"):
        select(scores, tmp_path / "out")
    (scores / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="names no `candidates` directory"):
        select(scores, tmp_path / "out")
    (scores / "manifest.json").unlink()
    with pytest.raises(InputError, match="has not finished it"):
        select(scores, tmp_path / "out")


def test_options_out_of_range(tmp_path):
    scores = small(tmp_path)
    for options, message in (
        ({"rule": "best"}, "rule 'best': must be one of teacher_count"),
        ({"beta": -0.1}, "beta -0.1: must be from 0 to 1"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"context": 1}, "context 1"),
        ({"temperature": 0.7}, r"temperature 0\.7: no candidate has it; there are 0\.6, 1"),
    ):
        with pytest.raises(InputError, match=message):
            select(scores, tmp_path / "out", quiet=True, **options)
    select(scores, tmp_path / "out", quiet=True)  # none of them has left anything behind


def test_nothing_left(tmp_path):
    scores = write_scored(tmp_path, [candidate("a", 0, finish_reason="length"), candidate("a", 1, text=" ")])
    with pytest.raises(InputError, match=r"no candidate is left by the filters: 1 empty, 1 truncated; see .*dropped"):
        select(scores, tmp_path / "out", quiet=True)
    assert len(rows(tmp_path / "out/dropped.jsonl")) == 2


@settings(max_examples=200)
@given(st.text(), st.dictionaries(st.sampled_from(["a", "token_ids", "x"]), st.text() | st.lists(st.floats())))
def test_rows_without_their_numbers_are_the_same_rows(tmp_path_factory, text, others):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    quoted = f'{text} "token_ids": [1, 2], \\"token_ids\\": [1], {text}'
    row = {"token_ids": [1, 2], "text": quoted, "logprobs": [-1.5e-7, 0.0], **others, "last": [1]}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row, ensure_ascii=True) + "\n")
    for _, read in read_rows(path, without=("token_ids", "logprobs", "last")):
        assert read["text"] == quoted
        assert str({**row, **read}) == str(row)
        assert row.keys() - read.keys() <= {"token_ids", "logprobs"}


def test_scores_in_many_chunks_count_the_same(tmp_path, monkeypatch):
    path = write_scored(tmp_path, many(20, 4)) / "scores.jsonl"
    whole = read_scores(path, 0.1, 0.1)
    monkeypatch.setattr("dasd_engine.scored.CHUNK", 7)
    parts = read_scores(path, 0.1, 0.1)
    assert np.array_equal(whole.types, parts.types) and np.array_equal(whole.histogram, parts.histogram)
    expected = {row["source"]: list(row["counts"].values()) for row in rows(path) if "error" not in row}
    for source, row in parts.row.items():
        teacher, common, student = parts.types[row].tolist()
        assert [teacher, student, common] == expected[source]

"""Mixed policy: caps and cuts, prefills, and the whole command on models whose every token is known."""

import functools
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from chain_models import OPENING, write_chain, write_questions
from chats import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from runs import environment
from safetensors.torch import load_file, save_file

from dasd_engine import mix_sampling
from dasd_engine.chat import Chat
from dasd_engine.errors import InputError
from dasd_engine.filters import Drop, Filters, normalise
from dasd_engine.mix import main, mix
from dasd_engine.mix_sampling import MixOptions
from dasd_engine.mixed_policy import (
    Cut,
    as_instruction,
    as_prefill,
    cut,
    hash_uniform,
    join,
    refusal,
    token_cap,
)
from dasd_engine.prepare import prepare
from dasd_engine.shards import Shards
from dasd_engine.teachers import Failed, Sampled, TeacherOptions

# ---------------------------------------------------------------------------------------------- caps and cuts


@pytest.mark.parametrize(("teacher", "factor", "cap"), [(10, 1.5, 15), (7, 1.5, 11), (10, 1.1, 11), (1, 0.5, 1)])
def test_the_cap_is_the_factor_times_the_teachers_tokens_rounded_up(teacher, factor, cap):
    assert token_cap(teacher, factor) == cap


def test_cuts_are_spread_evenly_over_the_second_half():
    shares = [0.5 + 0.5 * hash_uniform(0, f"question {i}", "cut") for i in range(4000)]
    assert min(shares) >= 0.5 and max(shares) < 1
    assert np.histogram(shares, bins=10, range=(0.5, 1))[0].min() > 340  # 400 expected, standard deviation 19
    assert shares[0] != 0.5 + 0.5 * hash_uniform(1, "question 0", "cut")


@functools.cache
def byte_tokenizer():
    return make_tokenizer("qwen3")


def byte_ids(text):
    """A token a byte, whatever merges the vocabulary has."""
    tokenizer = byte_tokenizer()
    characters = {**{b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}}
    others = [b for b in range(256) if b not in characters]
    characters |= {b: chr(256 + i) for i, b in enumerate(others)}
    return [tokenizer.token_to_id(characters[b]) for b in text.encode()]


@given(
    st.text(st.sampled_from("ab 1.\né漢🙂𝒳"), min_size=8, max_size=60).map(lambda text: "a" + text),
    st.integers(0, 99),
)
def test_what_is_in_front_of_a_cut_is_whole_characters_of_the_response(text, seed):
    ids = byte_ids(text)
    found = cut(ids, seed, "q", byte_tokenizer())
    assert isinstance(found, Cut)
    aimed = int(found.share * len(ids))
    assert aimed - 3 <= found.tokens <= aimed
    assert text.startswith(found.text)
    assert len(found.text.encode()) == found.tokens  # a token a byte: exactly the ids in front of the cut


def test_a_cut_inside_a_character_moves_back_to_its_beginning():
    ids = byte_ids("ab🙂")  # tokens: a b and four bytes; u·6 is 3, 4 or 5
    for seed in range(20):
        assert cut(ids, seed, "q", byte_tokenizer()) == Cut(0.5 + 0.5 * hash_uniform(seed, "q", "cut"), 2, "ab")


def test_tokens_that_spell_no_text_and_nothing_at_all_are_dropped():
    broken = [*byte_ids("a"), byte_ids("é")[0], *byte_ids("bcdefgh")]
    assert cut(broken, 0, "q", byte_tokenizer()).reason == "not_text"
    assert cut(byte_ids("a"), 0, "q", byte_tokenizer()).reason == "empty"
    assert cut(byte_ids("  \n  x"), 0, "q", byte_tokenizer()).reason == "empty"


# ---------------------------------------------------------------------------------------------- asking the teacher


@pytest.mark.parametrize(
    ("prefix", "prefill", "said", "whole"),
    [
        (
            "<think>\n1 +",
            "<|channel|>analysis<|message|>\n1 +",
            " 1<|end|><|start|>assistant<|channel|>final<|message|>2",
            "<think>\n1 + 1</think>2",
        ),
        (
            "<think>a</think>It",
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>It",
            " is 2",
            "<think>a</think>It is 2",
        ),
    ],
)
def test_a_harmony_teacher_is_prefilled_in_its_own_delimiters(prefix, prefill, said, whole):
    assert as_prefill(prefix, "harmony") == prefill
    assert normalise(join(prefix, said, markers="harmony", instructed=False)) == whole
    assert as_prefill(prefix, "think") == prefix


@given(st.text(max_size=30), st.text(max_size=30), st.booleans())
def test_a_prefix_survives_the_way_through_harmony(thinking, answer, finished):
    if "<|" in thinking + answer or "think>" in thinking + answer:
        return
    prefix = f"<think>{thinking}</think>{answer}" if finished else f"<think>{thinking}"
    end = "." if finished else "<|end|><|start|>assistant<|channel|>final<|message|>."
    assert normalise(as_prefill(prefix, "harmony") + end).startswith(prefix)


def test_an_instructed_teachers_own_thinking_is_left_out():
    [message] = as_instruction([{"role": "user", "content": "1 + 1?"}], "<think>\n1 +")
    assert message["content"].startswith("1 + 1?\n\n") and message["content"].endswith("<think>\n1 +")
    assert "write </think>" in message["content"]
    for own in ("<think>It wants more.</think>\n", ""):
        assert join("<think>\n1 +", f"{own} 1</think>2", markers="think", instructed=True) == "<think>\n1 + 1</think>2"


@pytest.mark.parametrize(
    ("prefix", "reason"),
    [
        ("<think>a<|im_start|>b", "special_token"),
        ("<think>a<think>b", "markers"),
        ("a</think>b", "markers"),
        ("a", "no_thinking"),
        ("<think>a", None),
        ("<think>a</think>b", None),
    ],
)
def test_what_cannot_become_a_response_is_not_sent_to_the_teacher(prefix, reason):
    drop = refusal(prefix, ["<|im_start|>", "<think>"], thinking=True)
    assert (drop and drop.reason) == reason


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A student that rambles, a teacher that does not, and the teacher's own responses."""
    root = tmp_path_factory.mktemp("mix")
    questions = [json.loads(line) for line in write_questions(root / "q.jsonl", 24).read_text().splitlines()]
    with open(root / "selected.jsonl", "w") as file:
        for row in questions:
            meta = {**json.loads(row["meta"]), "teacher_tokens": 12}
            file.write(json.dumps({**row, "output": "<think>1+2=3.</think>B", "meta": json.dumps(meta)}) + "\n")
    write_chain(root / "student", 0.1)
    write_chain(root / "teacher", 0.5)
    write_chain(root / "opening", 0.1, template=OPENING)
    return root


OPTIONS = MixOptions(ratio=(2, 1), filters=Filters(context=200))


def run(parts, out, student="student", options=OPTIONS, **more):
    teacher = TeacherOptions(path=str(parts / "teacher"))
    manifest = mix(parts / "selected.jsonl", parts / student, teacher, out, options=options, quiet=True, **more)
    return manifest["counts"], rows_of(out / "mixed.jsonl")


def rows_of(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_cut_off_responses_are_continued_and_joined_with_off_policy_ones(parts, tmp_path):
    counts, rows = run(parts, tmp_path / "out")
    rollouts = {row["id"]: row for row in rows_of(tmp_path / "out" / "rollouts.jsonl")}
    tokenizer = Chat.load(parts / "student").tokenizer
    assert counts["questions"] == len(rollouts) == 24 == counts["cut_off"] + counts["not_cut_off"]
    assert 0 < counts["cut_off"] < 24
    mixed, off_policy = [r for r in rows if "prefix" in r], [r for r in rows if "prefix" not in r]
    assert len(mixed) == counts["mixed"] > 2
    assert counts["mixed"] + sum(counts["dropped"].values()) == counts["cut_off"]
    assert len(off_policy) == counts["off_policy"] == min(24, 2 * len(mixed))
    assert all(row in rows_of(parts / "selected.jsonl") for row in off_policy)
    for row in mixed:
        rollout = rollouts[row["uuid"]]
        assert (rollout["cap"], rollout["length"], rollout["finish_reason"]) == (18, 18, "length")
        assert rollout["cut"] == len(row["prefix_ids"]) == int(rollout["share"] * 18)  # one byte a token here
        assert tokenizer.decode(row["prefix_ids"], skip_special_tokens=False) == row["prefix"]
        assert row["output"].startswith(row["prefix"]) and row["output"].count("</think>") == 1
        assert row["output"].endswith(tuple("ABCD"))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("student", ["student", "opening"])
def test_prepare_trains_the_ids_that_were_sampled(parts, tmp_path, masked, student):
    _, rows = run(parts, tmp_path / "out", student=student)
    prepare([tmp_path / "out" / "mixed.jsonl"], parts / student, tmp_path / "shards", context=200,
            mask_prefix=masked, quiet=True)  # fmt: skip
    shards, chat = Shards.open(tmp_path / "shards"), Chat.load(parts / student)
    for i, row in enumerate(rows):
        if "prefix" not in row:
            continue
        ids = shards.tokens[shards.offsets[i] : shards.offsets[i + 1]].tolist()
        prompt = chat.prompt_ids([{"role": "user", "content": row["input"]}])
        front = prompt + row["prefix_ids"]
        assert ids[: len(front)] == front
        [span] = [span.tolist() for span in shards.loss_spans if span[0] == i]
        assert span == [i, len(front) if masked else len(prompt), len(ids)]
        assert row["prefix"].startswith("<think>")  # sampled, or opened by the prompt


def test_a_finished_directory_is_left_alone_and_a_changed_one_refused(parts, tmp_path, capsys):
    run(parts, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.name != ".lock"}
    run(parts, tmp_path / "out")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.name != ".lock"}
    assert after == before
    with pytest.raises(InputError, match=r"was made differently \(parameters.cap: 1.5 then, 2 now\)"):
        run(parts, tmp_path / "out", options=MixOptions(cap=2, ratio=(2, 1), filters=Filters(context=200)))


KILL = """
import os, signal, sys
from dasd_engine import records
from dasd_engine.errors import run_cli
from dasd_engine.mix import main
write, left = records.Appender.write, [int(sys.argv.pop(1))]
def patched(self, row):
    write(self, row)
    left[0] -= 1
    if left[0] == 0:
        self._file.write(b'{"id": "q')  # what a crash leaves of the next row
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
records.Appender.write = patched
run_cli(main)
"""


def test_a_killed_run_ends_with_the_same_rows(parts, tmp_path):
    _, whole = run(parts, tmp_path / "whole")
    killed = tmp_path / "killed"
    arguments = [str(parts / "selected.jsonl"), "--student", str(parts / "student"), "--teacher"]
    arguments += [str(parts / "teacher"), "--out", str(killed), "--ratio", "2:1", "--context", "200", "--quiet"]
    for rows in (9, 20):  # among the student's responses, then among the teacher's
        done = subprocess.run([sys.executable, "-c", KILL, str(rows), *arguments], env=environment(), timeout=120)
        assert done.returncode == -9
    main(arguments)
    assert (killed / "mixed.jsonl").read_bytes() == (tmp_path / "whole" / "mixed.jsonl").read_bytes()
    for name in ("rollouts.jsonl", "continuations.jsonl"):
        counts = Counter(row["id"] for row in rows_of(killed / name))
        assert set(counts.values()) == {1}
        assert counts == Counter(row["id"] for row in rows_of(tmp_path / "whole" / name))
    facts = [json.loads((d / "manifest.json").read_text()) for d in (killed, tmp_path / "whole")]
    assert facts[0] | {"wall_seconds": 0} == facts[1] | {"wall_seconds": 0}
    assert whole


class Fake:
    """A teacher that answers every other request with an error, the others with `text`."""

    name, revision = "fake", None

    def __init__(self, text):
        self.text, self.requests = text, []

    def sample(self, requests):
        for i, request in enumerate(requests):
            self.requests.append(request)
            yield request, Failed("no") if i % 2 else Sampled(self.text, 0, [1], [-1.0], [len(self.text)], "stop")

    def close(self):
        pass


def test_failures_and_unfit_continuations_are_counted_and_kept(parts, tmp_path, monkeypatch):
    teacher = Fake("</think>B")
    monkeypatch.setattr(mix_sampling, "open_teacher", lambda options: teacher)
    counts, _ = run(parts, tmp_path / "out", options=MixOptions(continuation="instruct", filters=Filters(context=200)))
    drops = rows_of(tmp_path / "out" / "dropped.jsonl")
    assert Counter(row["reason"] for row in drops) == counts["dropped"]
    failed = counts["dropped"]["teacher_failed"]
    assert failed == len(teacher.requests) // 2
    assert {row["detail"] for row in drops if row["reason"] == "teacher_failed"} == {"no"}
    assert all(request.prefix == "" and "<think>" in request.messages[-1]["content"] for request in teacher.requests)
    assert len({request.seed for request in teacher.requests}) == len(teacher.requests)


def test_no_response_left_says_where_they_went(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(mix_sampling, "open_teacher", lambda options: Fake("no end of the thinking"))
    with pytest.raises(InputError, match=r"no mixed-policy response is left of 24 questions: .*no_answer"):
        run(parts, tmp_path / "out")
    assert not (tmp_path / "out" / "mixed.jsonl").exists()


def test_a_run_that_goes_on_asks_again_what_failed(parts, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(mix_sampling, "open_teacher", lambda options: Fake("no end of the thinking"))
        with pytest.raises(InputError, match="teacher_failed"):
            run(parts, tmp_path / "out")
    counts, _ = run(parts, tmp_path / "out")
    assert counts["mixed"] == counts["cut_off"] - counts["dropped"]["no_answer"]
    assert "teacher_failed" not in counts["dropped"]


def test_a_prompt_without_room_is_counted(parts, tmp_path):
    with pytest.raises(InputError, match="no_room"):
        run(parts, tmp_path / "out", options=MixOptions(filters=Filters(context=20)))


def test_a_student_without_numbers_is_told(parts, tmp_path):
    shutil.copytree(parts / "student", tmp_path / "student")
    weights = load_file(tmp_path / "student" / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, tmp_path / "student" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="student: gives no probabilities; are its weights damaged?"):
        run(parts, tmp_path / "out", student=tmp_path / "student")


def test_only_so_many_questions(parts, tmp_path):
    counts, _ = run(parts, tmp_path / "a", options=MixOptions(questions=8, filters=Filters(context=200)))
    assert counts["questions"] == 8
    ids = {row["id"] for row in rows_of(tmp_path / "a" / "rollouts.jsonl")}
    run(parts, tmp_path / "b", options=MixOptions(questions=8, filters=Filters(context=200), seed=3))
    assert ids != {row["id"] for row in rows_of(tmp_path / "b" / "rollouts.jsonl")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "20"], "--ratio 20: write off-policy:mixed-policy"),
        (["--cap", "0"], "cap = 0.0 is out of range"),
        (["--teacher-option", "pth=x"], "unknown key 'teacher.pth'; did you mean 'path'"),
        (["--teacher", "a", "http://b"], "--teacher a http://b"),
    ],
)
def test_bad_options_are_named(parts, tmp_path, arguments, message):
    line = [str(parts / "selected.jsonl"), "--student", str(parts / "student"), "--teacher", str(parts / "teacher")]
    with pytest.raises(InputError, match=message.replace("?", ".")):
        main([*line, "--out", str(tmp_path / "out"), *arguments])


def test_a_drop_is_no_cut():
    assert isinstance(cut([], 0, "q", byte_tokenizer()), Drop)

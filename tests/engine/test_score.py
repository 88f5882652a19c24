"""score: the student's logprobs beside transformers', sentences by a slow loop, bad candidates, ranks, kills, released
data."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import tokenizers
import torch
from chats import make_tokenizer, write_model
from scoring_runs import (
    QUESTION,
    TEXTS,
    candidate,
    geometric_mean,
    rows_of,
    teacher_tokenizer,
    write_candidates,
    write_rows,
    write_student,
)
from tiny_models import make_theirs

from dasd_engine.chat import Chat
from dasd_engine.errors import InputError
from dasd_engine.records import read_finished
from dasd_engine.score import main, score
from dasd_engine.sentence_scores import type_counts
from dasd_engine.sentences import is_marker, merge_short, split
from dasd_engine.token_text import TokenText

TEACHER = teacher_tokenizer()


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "student"
    return path, write_student(path)


def candidates(path, texts=TEXTS, **fields):
    return write_candidates(path, [candidate(text, i, TEACHER, **fields) for i, text in enumerate(texts)])


def slow_sentences(text, tokenizers_and_ids, minimum=3):
    """[(span, [token numbers under each tokeniser])] of a text, one token at a time."""
    data = text.encode()
    begins = []
    for tokenizer, ids in tokenizers_and_ids:
        _, ends = TokenText(tokenizer).text_and_ends(ids)
        starts = [0, *ends][:-1]
        begins.append([s if e > s and s < len(data) else None for s, e in zip(starts, ends, strict=True)])
    spans = [span for span in split(text) if not is_marker(data, span)]

    def members(span):
        return [[i for i, at in enumerate(row) if at is not None and span[0] <= at < span[1]] for row in begins]

    counts = [[len(members(span)[model]) for span in spans] for model in (0, 1)]
    return [(span, members(span)) for span in merge_short(spans, counts[0], counts[1], minimum)]


@pytest.mark.parametrize("template, family", [("qwen3", "qwen3"), ("chatml", "qwen2"), ("llama3", "llama")])
def test_scores_equal_transformers_and_a_slow_loop(tmp_path, template, family):
    """Another tokeniser, another family: logprobs of transformers' own forward, sentences by hand in float64."""
    theirs = write_student(tmp_path / "student", template, family=family)
    chat = Chat.load(tmp_path / "student")
    manifest = score(
        candidates(tmp_path / "c"), tmp_path / "student", tmp_path / "out", token_logprobs=True, tokens_per_batch=300,
        quiet=True,
    )  # fmt: skip
    assert manifest["counts"]["scored"] == len(TEXTS) and not manifest["counts"]["errors"]
    logprobs = {row["source"]: row["logprobs"] for row in rows_of(tmp_path / "out", "student_logprobs.jsonl")}
    teacher_rows = rows_of(tmp_path / "c", "candidates.jsonl")
    for row in rows_of(tmp_path / "out"):
        text = TEXTS[row["source"] - 1]
        ids, [(begin, end)] = chat.encode([*QUESTION, {"role": "assistant", "content": text}])
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        expected = [logits[i - 1, ids[i]].item() for i in range(begin, end - 1)]
        assert row["student_tokens"] == end - 1 - begin == len(expected)
        assert logprobs[row["source"]] == pytest.approx(expected, abs=1e-4)

        given = teacher_rows[row["source"] - 1]
        assert row["teacher_tokens"] == len(given["token_ids"])
        sentences = slow_sentences(text, [(TEACHER, given["token_ids"]), (chat.tokenizer, ids[begin : end - 1])])
        assert [tuple(entry[:2]) for entry in row["sentences"]] == [span for span, _ in sentences]
        for entry, (_, (teacher, own)) in zip(row["sentences"], sentences, strict=True):
            assert entry[4:] == [len(teacher), len(own)]
            assert entry[2] == pytest.approx(geometric_mean([given["logprobs"][i] for i in teacher]), rel=1e-6)
            assert entry[3] == pytest.approx(geometric_mean([expected[i] for i in own]), rel=1e-4)
        assert row["counts"] == type_counts(*zip(*(e[2:4] for e in row["sentences"]), strict=True), 0.1)


def test_types_follow_beta():
    assert type_counts([0.5, 0.5, 0.5, 0.25], [0.25, 0.5, 0.75, 0.5], 0.25) == {"teacher": 0, "student": 0, "common": 4}
    assert type_counts([0.5, 0.5, 0.4], [0.3, 0.5, 0.9], 0.1) == {"teacher": 1, "student": 1, "common": 1}


def test_the_part_that_counts(tmp_path, student):
    source = candidates(tmp_path / "c", TEXTS[:1])
    spans = {}
    for part in ("all", "think", "answer"):
        score(source, student[0], tmp_path / part, part=part, quiet=True)
        spans[part] = [tuple(entry[:2]) for entry in rows_of(tmp_path / part)[0]["sentences"]]
    closing = TEXTS[0].encode().index(b"</think>")
    assert spans["think"] + spans["answer"] == spans["all"]
    assert all(end <= closing for _, end in spans["think"]) and all(begin > closing for begin, _ in spans["answer"])
    assert spans["think"] and spans["answer"]


def test_a_distilled_model_adds_its_probability(tmp_path, student):
    from safetensors.torch import load_file, save_file

    distilled = tmp_path / "distilled"
    write_student(distilled)
    weights = load_file(distilled / "model.safetensors")
    save_file({name: t * 0.5 for name, t in weights.items()}, distilled / "model.safetensors", {"format": "pt"})
    source = candidates(tmp_path / "c", TEXTS[:2])
    score(source, student[0], tmp_path / "both", distilled_dir=distilled, quiet=True)
    score(source, student[0], tmp_path / "one", quiet=True)
    score(source, distilled, tmp_path / "other", quiet=True)
    for both, one, other in zip(*(rows_of(tmp_path / name) for name in ("both", "one", "other")), strict=True):
        assert [entry[:6] for entry in both["sentences"]] == one["sentences"]
        assert [entry[6] for entry in both["sentences"]] == [entry[3] for entry in other["sentences"]]
    write_model(tmp_path / "stranger", "chatml", "gpt2")
    with pytest.raises(InputError, match="is not the student's tokenizer"):
        score(source, student[0], tmp_path / "no", distilled_dir=tmp_path / "stranger", quiet=True)


# ---------------------------------------------------------------------------------------------- other forms of input


def test_ids_without_text_or_ends(tmp_path, student):
    """The teacher's tokeniser gives what the row leaves out; the scores are the same."""
    rows = [candidate(text, i, TEACHER) for i, text in enumerate(TEXTS)]
    (tmp_path / "teacher").mkdir()
    TEACHER.save(str(tmp_path / "teacher/tokenizer.json"))
    score(write_candidates(tmp_path / "c", rows), student[0], tmp_path / "full", quiet=True)
    full = (tmp_path / "full/scores.jsonl").read_bytes()
    for name, missing in (("ends", ("token_ends",)), ("text", ("token_ends", "text", "opened"))):
        less = [{key: value for key, value in row.items() if key not in missing} for row in rows]
        source = write_candidates(tmp_path / name, less)
        score(source, student[0], tmp_path / f"{name}-out", teacher_tokenizer=tmp_path / "teacher", quiet=True)
        assert (tmp_path / f"{name}-out/scores.jsonl").read_bytes() == full
        score(source, student[0], tmp_path / f"{name}-none", quiet=True)
        assert {row["error"].partition(":")[0] for row in rows_of(tmp_path / f"{name}-none")} == {
            "no teacher tokenizer"
        }


def test_a_template_that_opens_the_thinking(tmp_path):
    """R1's generation prompt ends in <think>: the student reads the rest, the sentences stay where they stand."""
    write_student(tmp_path / "r1", "r1")
    text = "<think>\n" + TEXTS[0].partition("\n")[2]
    score(candidates(tmp_path / "c", [text, "No thinking."]), tmp_path / "r1", tmp_path / "out", quiet=True)
    good, bad = rows_of(tmp_path / "out")
    data = text.encode()
    assert data[slice(*good["sentences"][0][:2])] == b"We add 2 and 2."
    assert bad["error"].startswith("template: messages[")


def test_text_that_the_student_composes(tmp_path, student):
    """NFC: y and a combining circumflex are one character to Qwen, two to this teacher."""
    text = "<think>\nSo y\u0302 = 2x, as before. Then e\u0301 follows.\n</think>\ny\u0302 = 4 is it."
    score(candidates(tmp_path / "c", [text]), student[0], tmp_path / "out", quiet=True)
    [row] = rows_of(tmp_path / "out")
    data = text.encode()
    assert [data[b:e].decode() for b, e, *_ in row["sentences"]] == [
        "So y\u0302 = 2x, as before.", " Then e\u0301 follows.\n", "y\u0302 = 4 is it."
    ]  # fmt: skip


def test_tokens_that_break_characters(tmp_path, student):
    """A response cut inside 設: its last bytes are no UTF-8, the text says so, and tokens still have their places."""
    ids = TEACHER.encode("<think>\nIt is so. Then 設", add_special_tokens=False).ids
    text, ends = TokenText(TEACHER).text_and_ends(ids[:-1])
    assert text.endswith("\N{REPLACEMENT CHARACTER}") and ends[-1] <= len(text.encode())
    fields = {"token_ids": ids[:-1], "logprobs": [-0.5] * (len(ids) - 1), "token_ends": ends}
    row = candidate("x", 0, TEACHER) | {"text": text, "finish_reason": "length", **fields}
    score(write_candidates(tmp_path / "c", [row]), student[0], tmp_path / "out", quiet=True)
    [scored] = rows_of(tmp_path / "out")
    assert [entry[2] for entry in scored["sentences"]] == [pytest.approx(math.exp(-0.5), rel=1e-6)] * 2


def test_teachers_of_other_delimiters_are_read_as_training_would(tmp_path, student):
    """Harmony: the student reads <think>…</think>; the spans are those of the teacher's own text."""
    inner = ["We add 2 and 2. That makes four.", "The answer is 4, of course."]
    harmony = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}".format(*inner)
    plain = "<think>{}</think>{}".format(*inner)
    score(candidates(tmp_path / "h", [harmony]), student[0], tmp_path / "harmony", quiet=True)
    score(candidates(tmp_path / "p", [plain]), student[0], tmp_path / "plain", quiet=True)
    [ours], [theirs] = rows_of(tmp_path / "harmony"), rows_of(tmp_path / "plain")
    assert [entry[3] for entry in ours["sentences"]] == [entry[3] for entry in theirs["sentences"]]
    cut = [harmony.encode()[slice(*entry[:2])] for entry in ours["sentences"]]
    assert cut == [b"We add 2 and 2.", b" That makes four.", b"The answer is 4, of course."]


# ---------------------------------------------------------------------------------------------- bad input


def bad_rows():
    good = candidate(TEXTS[0], 0, TEACHER)
    size, count = len(TEXTS[0].encode()), len(good["token_ids"])
    return {
        "no logprobs": good | {"logprobs": None},
        "no logprobs ": good | {"token_ids": [], "logprobs": [], "token_ends": []},
        "lengths": good | {"logprobs": good["logprobs"][1:]},
        "lengths ": good | {"token_ends": good["token_ends"][1:]},
        "logprobs": good | {"logprobs": [float("nan"), *good["logprobs"][1:]]},
        "logprobs ": good | {"logprobs": [float("-inf"), *good["logprobs"][1:]]},
        "logprobs  ": good | {"logprobs": [0.5, *good["logprobs"][1:]]},
        "logprobs   ": good | {"logprobs": ["-1", None, *good["logprobs"][2:]]},
        "token_ends": good | {"token_ends": [size + 5] * count},
        "token_ends ": good | {"token_ends": [*good["token_ends"][:-1], 0]},
        "token_ends  ": good | {"token_ends": ["a"] * count},
        "token_ends   ": good | {"token_ends": [1.5] * count},
        "token_ends    ": good | {"token_ends": 7},
        "token_ends     ": good | {"token_ends": [10**30] * count},
        "token_ends      ": good | {"opened": -1},
        "empty text": good | {"text": "  \n", "token_ends": [3] * count},
        "no sentences": good | {"text": "<think>\n\n</think>\n\n", "token_ends": [19] * count},
        "not Unicode": good | {"text": "half \ud83d of a pair", "token_ends": [17] * count},
        "template": good | {"messages": [{"role": "tutor", "content": "?"}, {"role": "user", "content": "?"}]},
        "template ": good | {"text": "All. <|im_end|> More.", "token_ends": [21] * count},
        "context": candidate("It is so. " * 1500, 0, TEACHER),
    }


def test_candidates_that_cannot_be_scored_say_why(tmp_path):
    template = "{% for m in messages %}{% if m.role == 'tutor' %}{{ raise_exception('no tutors') }}{% endif %}"
    template += "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    path = tmp_path / "student"
    write_model(path, "chatml", chat_template=template)
    size = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab_size()
    make_theirs(path, "qwen3", vocab_size=size)
    rows = bad_rows()
    good = candidate(TEXTS[0], 1, TEACHER)
    source = write_candidates(tmp_path / "c", [*rows.values(), good])
    manifest = score(source, path, tmp_path / "out", quiet=True)
    scored = rows_of(tmp_path / "out")
    kinds = [kind.strip() for kind in rows]
    assert [row.get("error", "good").partition(":")[0] for row in scored] == [*kinds, "good"]
    assert all(row["source"] == i and row["id"] == "q0" for i, row in enumerate(scored, 1))
    assert manifest["counts"]["errors"] == {kind: kinds.count(kind) for kind in kinds}
    assert manifest["counts"]["candidates"] == len(rows) + 1 and manifest["counts"]["scored"] == 1
    assert read_finished(tmp_path / "out", "score") == manifest


def test_files_that_are_wrong_are_refused(tmp_path, student):
    out = iter(range(99))

    def refused(match, source, **options):
        with pytest.raises(InputError, match=match):
            score(source, student[0], tmp_path / f"out{next(out)}", quiet=True, **options)

    good = candidate(TEXTS[0], 0, TEACHER)
    refused("no such file", tmp_path / "nothing.jsonl")
    refused("is empty", write_rows(tmp_path / "empty.jsonl", []))
    (tmp_path / "unfinished").mkdir()
    refused("sample has not finished it", tmp_path / "unfinished")
    file = tmp_path / "file.jsonl"
    for line, match in (
        ("{", r"file\.jsonl:2: is not valid JSON"),
        ("[1]", r"file\.jsonl:2: must be a JSON object"),
        (json.dumps(good | {"id": 7}), r"file\.jsonl:2: `id` must be a string"),
        (json.dumps(good | {"messages": [{"role": "user"}]}), r"file\.jsonl:2: `messages` must be"),
        (json.dumps({"uuid": "a", "input": "b", "output": "c"}), r"file\.jsonl:2: .*--teacher-logprobs"),
    ):
        file.write_text(json.dumps(good) + "\n" + line + "\n")
        refused(match, file)
    file.write_text(json.dumps(good) + "\n")
    refused("part middle: must be one of", file, part="middle")
    refused("beta 2: must be from 0 to 1", file, beta=2)
    refused("context -5: a document needs at least 2 tokens", file, context=-5)
    refused("threads = -1", file, threads=-1)
    refused("device 'gpu0': cannot be used here", file, device="gpu0")
    refused("gone.jsonl: cannot be read: No such file", file, teacher_logprobs=[tmp_path / "gone.jsonl"])


def test_a_model_without_numbers_is_told(tmp_path):
    from safetensors.torch import load_file, save_file

    write_student(tmp_path / "student")
    weights = load_file(tmp_path / "student/model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, tmp_path / "student/model.safetensors", {"format": "pt"})
    score(candidates(tmp_path / "c", TEXTS[:1]), tmp_path / "student", tmp_path / "out", quiet=True)
    assert rows_of(tmp_path / "out")[0]["error"].startswith("not finite")


# ---------------------------------------------------------------------------------------------- ranks and kills


def command(source, student, out, *options):
    return [str(source), "--student", str(student), "--out", str(out), "--tokens-per-batch", "150", *options]


def run(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=300)


def many(path, student_texts=6):
    texts = [text.replace("2", str(i + 2)) for i in range(student_texts) for text in TEXTS]
    rows = [candidate(text, i, TEACHER) for i, text in enumerate(texts)]
    rows[5]["logprobs"] = None
    return write_candidates(path, rows)


def test_two_ranks_give_what_one_gives(tmp_path, student, capsys):
    """The second run goes on, at two ranks, with what a run of eight ranks had written before it was killed."""
    source, one, two = many(tmp_path / "c"), tmp_path / "one", tmp_path / "two"
    main(command(source, student[0], one, "--token-logprobs"))
    assert "23 of 24 candidates scored" in capsys.readouterr().out
    two.mkdir()
    shutil.copy(one / "asked.json", two)
    kept = [row | {"was": "kept"} for row in rows_of(one)[3:7]]
    write_rows(two / "part-00007.jsonl", kept).open("a").write('{"id": "torn", "sour')
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dasd_engine.score")
    done = run(*launcher, *command(source, student[0], two, "--token-logprobs"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("23 of 24 candidates scored") == 1 and "not scored, no logprobs: 1" in done.stdout
    assert sum("was" in row for row in rows_of(two)) == 4
    assert [{k: v for k, v in row.items() if k != "was"} for row in rows_of(two)] == rows_of(one)
    theirs = [row for row in rows_of(one, "student_logprobs.jsonl") if row["source"] not in (4, 5, 7)]
    assert rows_of(two, "student_logprobs.jsonl") == theirs  # 6 is the error, those kept had none
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()} == {
        ".lock", "asked.json", "manifest.json", "scores.jsonl", "student_logprobs.jsonl"
    }  # fmt: skip


def test_a_finished_directory_is_left_as_it_is(tmp_path, student, capsys):
    source, out = candidates(tmp_path / "c", TEXTS[:1]), tmp_path / "out"
    main(command(source, student[0], out))
    before = (out / "scores.jsonl").stat()
    main(command(source, student[0], out))
    assert "nothing to do" in capsys.readouterr().out and (out / "scores.jsonl").stat() == before
    with pytest.raises(InputError, match="parameters.beta: 0.1 then, 0.2 now"):
        main(command(source, student[0], out, "--beta", "0.2"))
    candidates(tmp_path / "c", TEXTS[1:2])
    with pytest.raises(InputError, match="inputs.candidates"):
        main(command(source, student[0], out))


KILLED = """
import os, signal, sys
from dasd_engine import records, score
write, count = records.Appender.write, [0]
def patched(self, row):
    write(self, row)
    count[0] += 1
    if count[0] == 9:
        self._file.write(b'{"id": "torn", "sour')
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
records.Appender.write = patched
score.main()
"""


def test_a_killed_run_goes_on(tmp_path, student):
    source, out = many(tmp_path / "c"), tmp_path / "out"
    killed = run("-c", KILLED, *command(source, student[0], out))
    assert killed.returncode == -9 and not (out / "scores.jsonl").exists(), killed.stderr
    before = (out / "part-00000.jsonl").read_bytes()
    assert before.count(b"\n") == 9 and not before.endswith(b"\n")
    main(command(source, student[0], out, "--quiet"))
    main(command(source, student[0], tmp_path / "whole", "--quiet"))
    assert (out / "scores.jsonl").read_bytes() == (tmp_path / "whole/scores.jsonl").read_bytes()


# ---------------------------------------------------------------------------------------------- released data


def o200k_like():
    """A byte-level BPE with harmony's special tokens, as the released ids are."""
    tokenizer = make_tokenizer("chatml", "llama3")
    tokenizer.add_special_tokens([f"<|{name}|>" for name in ("start", "end", "message", "channel", "return", "call")])
    return tokenizer


def released(path, teacher, damage=()):
    """Rows of the released schema and of its logprob file, in another order; the first `damage` rows are changed."""
    rows, logprobs = [], []
    for i, text in enumerate(TEXTS[:3]):
        thinking, answer = text.removeprefix("<think>").split("</think>")
        row = {"uuid": f"u-{i}", "input": "What is 2 + 2?", "output": text, "domain": "math", "meta": "{}"}
        source = f"{thinking.strip()}<|end|><|start|>assistant<|channel|>final<|message|>{answer.strip()}<|return|>"
        ids = teacher.encode(source, add_special_tokens=False).ids
        rows.append(row)
        logprobs.append(
            {"sample_uuid": row["uuid"], "token_ids": ids, "logprobs": [-0.1 * (k % 7) for k in range(len(ids))]}
        )
    for change in damage:
        change(rows, logprobs)
    return write_rows(path / "released.jsonl", rows), write_rows(path / "logprobs.jsonl", logprobs[::-1])


def test_released_data_as_it_is(tmp_path, student):
    teacher = o200k_like()
    (tmp_path / "teacher").mkdir()
    teacher.save(str(tmp_path / "teacher/tokenizer.json"))
    source, logprobs = released(tmp_path, teacher)
    options = {"teacher_logprobs": [logprobs], "teacher_tokenizer": tmp_path / "teacher", "quiet": True}
    manifest = score(source, student[0], tmp_path / "out", **options)
    assert manifest["counts"]["scored"] == 3 and not manifest["counts"]["errors"]
    # The same texts as candidates: the student sees no difference, and neither do the sentences.
    score(candidates(tmp_path / "c", TEXTS[:3]), student[0], tmp_path / "plain", quiet=True)
    for row, plain in zip(rows_of(tmp_path / "out"), rows_of(tmp_path / "plain"), strict=True):
        assert row["id"] == f"u-{row['source'] - 1}" and row["temperature"] is None
        assert [e[:2] + e[3:4] + e[5:6] for e in row["sentences"]] == [
            e[:2] + e[3:4] + e[5:6] for e in plain["sentences"]
        ]
    [first, *_] = rows_of(tmp_path / "out")
    given = json.loads(logprobs.read_text().splitlines()[-1])
    spelt, ends = TokenText(teacher).text_and_ends(given["token_ids"])
    span = TEXTS[0].encode()[slice(*first["sentences"][-2][:2])].decode()  # the first sentence of the answer
    at = len(spelt[: spelt.index(span)].encode())
    own = [
        lp for lp, b, e in zip(given["logprobs"], [0, *ends], ends, strict=False) if at <= b < at + len(span.encode())
    ]
    assert first["sentences"][-2][2] == pytest.approx(geometric_mean(own), rel=1e-6)
    assert first["sentences"][-2][4] == len(own)


def test_released_rows_that_do_not_fit_are_counted(tmp_path, student):
    def other_text(rows, logprobs):
        rows[0]["output"] = rows[0]["output"].replace("counting", "guessing")

    def no_logprobs(rows, logprobs):
        logprobs[1]["sample_uuid"] = "u-9"

    teacher = o200k_like()
    (tmp_path / "teacher").mkdir()
    teacher.save(str(tmp_path / "teacher/tokenizer.json"))
    source, logprobs = released(tmp_path, teacher, (other_text, no_logprobs))
    options = {"teacher_tokenizer": tmp_path / "teacher", "quiet": True}
    manifest = score(source, student[0], tmp_path / "out", teacher_logprobs=[logprobs], **options)
    assert manifest["counts"]["errors"] == {"teacher's text": 1, "no logprobs": 1}
    assert "'We add 2 and 2." in rows_of(tmp_path / "out")[0]["error"]
    with pytest.raises(InputError, match="logprobs.jsonl:1: sample_uuid u-2 stands in .*logprobs.jsonl:1 already"):
        score(source, student[0], tmp_path / "twice", teacher_logprobs=[logprobs, logprobs], **options)
    logprobs.write_text('{"uuid": 1}\n')
    with pytest.raises(InputError, match="logprobs.jsonl:1: has no string `sample_uuid`"):
        score(source, student[0], tmp_path / "none", teacher_logprobs=[logprobs], **options)

"""report: the page says what the run's files say, holds hostile text as text, and tells what is missing."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from distill_runs import write_distillation
from report_runs import (
    HOSTILE,
    write_ablations,
    write_metrics,
    write_mixed,
    write_scored_run,
    write_selected,
    write_train_run,
)

from dasd_engine import distill
from dasd_engine.errors import InputError
from dasd_engine.filters import Filters
from dasd_engine.mix import mix
from dasd_engine.mix_sampling import MixOptions
from dasd_engine.prepare import prepare
from dasd_engine.report import main, report
from dasd_engine.score import score
from dasd_engine.teachers import TeacherOptions


class Page(html.parser.HTMLParser):
    """What a browser finds: scripts as they are, the text of everything else, addresses that it would load."""

    def __init__(self, path: Path):
        super().__init__()
        self.scripts: list[str] = []
        self.text, self.addresses, self._in = "", list[str](), ""
        self.feed(path.read_text(encoding="utf-8"))
        self.runs = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attributes):
        self._in = tag
        self.scripts += [""] if tag == "script" else []
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in == "script":
            self.scripts[-1] += data
        elif self._in != "style":
            self.text += data


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A real distillation as far as the selection."""
    recipe = write_distillation(tmp_path_factory.mktemp("report"))
    distill.main([str(recipe), "--until", "select", "--quiet"])
    return recipe.parent / "run"


def rows(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------- what it shows


def test_the_reader_shows_every_candidate_as_it_was_scored_and_chosen(scored, tmp_path):
    (run,) = Page(report(scored, tmp_path / "page.html")).runs
    candidates = {(r["id"], r["temperature"], r["candidate"]): r for r in rows(scored / "sample" / "candidates.jsonl")}
    scores = {(r["id"], r["temperature"], r["candidate"]): r for r in rows(scored / "score" / "scores.jsonl")}
    chosen = {
        (r["uuid"], meta["temperature"], meta["candidate"]): stage
        for stage in ("low", "high")
        for r in rows(scored / f"select-{stage}" / "selected.jsonl")
        if (meta := json.loads(r["meta"]))
    }
    shown = {(q["id"], c["temperature"], c["candidate"]): c for q in run["questions"] for c in q["candidates"]}
    assert set(shown) == set(candidates) and len(shown) == 48
    for key, one in shown.items():
        assert "".join(p if isinstance(p, str) else p[0] for p in one["pieces"]) == candidates[key]["text"]
        delta = [p[1] - p[2] for p in one["pieces"] if not isinstance(p, str)]
        counts = {"teacher": sum(d > 0.1 for d in delta), "student": sum(d < -0.1 for d in delta)}
        assert counts == {name: scores[key]["counts"][name] for name in counts}
        assert one["chosen"] == chosen.get(key)
    assert run["rule"] == {"name": "teacher_count", "takes": "the one with the most teacher sentences"}


def test_the_reader_tells_the_dropped_from_the_rejected(tmp_path):
    run = write_scored_run(tmp_path / "run", questions=2, sentences=2)
    assert Page(report(run)).runs[0]["rule"] is None  # nothing is chosen yet, and so nothing rejected
    (page,) = Page(report(write_selected(run, "q1"))).runs
    fates = {(q["id"], c["candidate"]): (c["chosen"], c["dropped"]) for q in page["questions"] for c in q["candidates"]}
    none, dropped = (None, None), (None, f"wrong_answer, {HOSTILE}")
    assert fates == {("q0", 0): none, ("q0", 1): none, ("q1", 0): dropped, ("q1", 1): ("low", None)}


def test_the_reader_shows_p_d_where_the_trained_student_was_scored(scored, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(scored, run)
    models = scored.parent
    score(run / "sample", models / "student", run / "score-after", distilled_dir=models / "teacher", quiet=True)
    (page,) = Page(report(run)).runs
    distilled = [s[6] for row in rows(run / "score-after" / "scores.jsonl") for s in row["sentences"]]
    pieces = [p for q in page["questions"] for c in q["candidates"] for p in c["pieces"] if not isinstance(p, str)]
    assert sorted(p[5] for p in pieces) == sorted(round(p, 4) for p in distilled)


def test_the_reader_says_who_wrote_what_of_a_mixed_policy_response(scored, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(scored, run)
    teacher = TeacherOptions(path=str(scored.parent / "teacher"), threads=1)
    student, options = scored.parent / "student", MixOptions(ratio=(2.0, 1.0), filters=Filters(context=192))
    mix(run / "select-high", student, teacher, run / "mix", options=options, quiet=True)
    prepare([run / "mix" / "mixed.jsonl"], student, run / "prepare-mixed", context=192, mask_prefix=True, quiet=True)
    made = {row["uuid"]: row for row in rows(run / "mix" / "mixed.jsonl") if "prefix" in row}
    (page,) = Page(report(run)).runs
    shown = {q["id"]: q["mixed"] for q in page["questions"] if "mixed" in q}
    assert made and set(shown) == set(made)
    for id, one in shown.items():
        assert one["student"] == made[id]["prefix"] and one["student"] + one["teacher"] == made[id]["output"]
        assert one["tokens"][0] == len(made[id]["prefix_ids"]) and one["masked"]


def test_figures_of_a_distillation_are_those_of_its_files(scored, tmp_path):
    page = Page(report(scored, tmp_path / "page.html"))
    (run,) = page.runs
    assert "select-high" in page.text and "no step" not in page.text
    for name in ("low", "high"):
        section = json.loads((scored / f"select-{name}" / "report.json").read_text())["temperatures"][0]
        assert run["deltas"][name]["selected"]["bins"] == section["histogram"]["selected"]
    assert [place["temperature"] for place in run["places"]] == [0.6, 1.0]
    for place in run["places"]:
        for part in zip(*place["shares"], strict=True):
            assert part == (None, None, None) or sum(part) == pytest.approx(1, abs=2e-4)
    lengths = [r["student_tokens"] for r in rows(scored / "score" / "scores.jsonl") if r["temperature"] == 0.6]
    number, mean, median, _ = run["lengths"]["figures"]["candidates at 0.6"]
    assert (number, mean, median) == (24, pytest.approx(np.mean(lengths), abs=0.05), np.median(lengths))
    assert sum(run["lengths"]["shares"]["candidates at 0.6"]) == pytest.approx(1, abs=1e-3)


def test_a_run_of_training_with_its_answers(tmp_path):
    page = Page(report(write_train_run(tmp_path / "run")))
    (run,) = page.runs
    assert [(c["stage"], c["steps"], c["tokens"]) for c in run["curves"]] == [("low", 20, 10000), ("high", 10, 5000)]
    assert run["curves"][0]["loss"][:7] == [8.0, 5.657, 4.619, 4.0, 3.578, 3.266, 99.0]
    for text in ("train low", "done", "unfinished", "2 × cpu", "torch 2.13", "95.0 %", "before training"):
        assert text in page.text
    assert run["samples"]["labels"] == ["before training", "after training"] and run["samples"]["total"] == 20
    first = run["samples"]["problems"][0]["answers"]
    assert [a["correct"] for a in first.values()] == [False, False]
    assert first["after training"]["output"] == f"{HOSTILE} after"


def test_long_curves_are_means_with_their_extremes(tmp_path):
    write_metrics(tmp_path, {"low": 10_000})
    (run,) = Page(report(tmp_path)).runs
    (curve,) = run["curves"]
    assert len(curve["loss"]) == len(curve["step"]) <= 600 and curve["each"] == 17
    sizes = np.diff([*curve["step"], 10_001])
    steps = np.arange(1, 10_001)
    whole = np.where(steps == 7, 99, 8 / np.sqrt(steps))
    assert np.average(curve["loss"], weights=sizes) == pytest.approx(whole.mean(), rel=1e-3)
    assert max(curve["greatest"]) == 99 and min(curve["least"]) == 0.08


def test_several_runs_on_one_page(tmp_path, capsys):
    paths = [str(write_train_run(tmp_path / name / "run")) for name in "ab"]
    main([paths[0], "--compare", paths[1], "--out", str(tmp_path / "page.html")])
    assert "page.html: 0." in capsys.readouterr().out
    page = Page(tmp_path / "page.html")
    assert [run["name"] for run in page.runs] == ["run (1)", "run (2)"]
    assert "run (2)" in page.text


def test_a_page_of_the_ablations_and_their_figures(tmp_path):
    results = write_ablations(tmp_path / "ablations.json")
    main([str(results), "--figures", str(tmp_path / "figures")])
    page = Page(tmp_path / "ablations.html")
    shown = ("the pilot", "chance: temperatures: above low", "−10.0 (−15.0 to −5.0)", "not told apart from low: both")
    assert all(text in page.text for text in shown)
    assert "Reader" not in page.text and not page.runs[0]["curves"]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "chance-temperature.svg", "pilot-temperature.svg",
    ]  # fmt: skip
    main([str(write_train_run(tmp_path / "run")), "--compare", str(results)])
    page = Page(tmp_path / "run" / "report.html")
    assert "chance: temperatures" in page.text and "Learning" not in page.text and "Reader" in page.text


# ---------------------------------------------------------------------------------------------- what it is made of


def test_the_page_loads_nothing(tmp_path):
    path = report(write_train_run(tmp_path / "run"))
    page = Page(path)
    assert {address for address in page.addresses if address[0] != "#"} == {"data:,"}
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", path.read_text())


def test_hostile_text_stays_text(tmp_path):
    scored = write_scored_run(tmp_path / "<b>&run", questions=3, sentences=4)
    write_train_run(scored / "train-low", 4)
    path = report(scored)
    page = Page(path)
    assert len(page.scripts) == 3 and not any("window.hacked" in script for script in page.scripts[1:])
    assert page.runs[0]["questions"][2]["question"] == HOSTILE
    assert "<b>&run" in page.text and "<b>" not in path.read_text().split("<script")[0]


def test_a_page_of_many_sentences_stays_small(tmp_path):
    scored = write_scored_run(tmp_path / "run", questions=400, sentences=10)
    write_metrics(scored / "train-low", {"low": 5000})
    path = report(scored)
    page = Page(path)
    assert 4000 < sum(len(c["pieces"]) for q in page.runs[0]["questions"] for c in q["candidates"]) <= 5000
    assert "250 of 400 questions can be read here" in page.text
    assert path.stat().st_size < 1.5e6


# ---------------------------------------------------------------------------------------------- bad and unfinished runs


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(InputError, match=r"none: no such directory"):
        report(tmp_path / "none")
    with pytest.raises(InputError, match=r"holds neither stages of dasd_engine.distill nor metrics.jsonl"):
        report(tmp_path)
    (tmp_path / "other.json").write_text('{"regimes": 3}')
    with pytest.raises(InputError, match=r"other.json: holds no results of python -m bench.ablations"):
        report(tmp_path / "other.json")
    (tmp_path / "bakeoff").mkdir()
    (tmp_path / "bakeoff" / "asked.json").write_text('{"command": "bakeoff"}')
    with pytest.raises(InputError, match=r"bakeoff: its runs are not finished; go on with the command"):
        report(tmp_path)
    (tmp_path / "bakeoff" / "result.json").write_text('{"groups": {}}')
    with pytest.raises(InputError, match=r"result.json: is no result of this version of bakeoff"):
        report(tmp_path / "bakeoff")
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(InputError, match=r"no step of training is in metrics.jsonl yet"):
        report(tmp_path)
    (tmp_path / "distilled" / "sample").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no stage has ended yet"):
        report(tmp_path / "distilled")


def test_half_written_files_are_told_and_left_out(tmp_path):
    run = write_train_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "sta')
    (run / "evaluation.json").write_text('{"before"')
    text = Page(report(run)).text
    assert "the last line of metrics.jsonl is cut off and left out" in text
    assert "run/evaluation.json is half-written and left out" in text
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:2], "{oops", *lines[2:-1], ""]))
    with pytest.raises(InputError, match=r"metrics\.jsonl:3: is no step of training"):
        report(run)


def test_a_distillation_on_its_way(scored, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(scored, run)
    (run / "score" / "manifest.json").unlink()
    text = Page(report(run)).text
    assert "not finished: score" in text and "no scores: no sentences to be shown" in text
    assert "unfinished" in text


def test_candidates_that_are_not_those_scored(tmp_path):
    run = write_scored_run(tmp_path / "run", questions=2, sentences=2)
    lines = (run / "sample" / "candidates.jsonl").read_text().splitlines()
    (run / "sample" / "candidates.jsonl").write_text("\n".join([*lines[::-1], ""]))
    with pytest.raises(InputError, match=r"candidates\.jsonl:1: is not the candidate that was scored"):
        report(run)


# ---------------------------------------------------------------------------------------------- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
VISITOR = """
const done = (v) => (document.title = JSON.stringify(v));
const key = (node, key) => node.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const drawn = () => document.querySelector("#training .u-legend .u-value");
const whenDrawn = (then) => (drawn() ? then() : setTimeout(whenDrawn, 50, then));
addEventListener("load", () => whenDrawn(() => {
  const reader = document.querySelector("#reader"), tip = document.getElementById("tip");
  const first = reader.querySelector("mark[tabindex='0']");
  first.focus();
  const said = tip.textContent;
  key(first, "ArrowRight");
  dispatchEvent(new Event("scroll")); // as reaching a sentence out of sight does
  const second = { text: document.activeElement.textContent, said: tip.hidden ? "" : tip.textContent };
  key(document.body, "n");
  const where = reader.querySelector("[role=status]").textContent;
  const why = [...reader.querySelectorAll(".page > p, h4")].map((h) => h.textContent);
  key(document.body, "m");
  const began = reader.querySelector("mark.began");
  began.focus();
  const went = reader.querySelector("mark.went").textContent;
  const mixed = { began: began.textContent, said: tip.textContent, went };
  const plot = document.querySelector("#training [role=img]");
  key(plot, "End");
  const canvases = [...document.querySelectorAll("canvas")].map((c) => c.width * c.height > 0);
  done({ said, second, where, why, mixed, drawn: canvases,
    legend: plot.querySelector(".u-legend .u-value").textContent,
    figures: document.querySelectorAll(".charts figure").length,
    forests: [...document.querySelectorAll("figure .forest")].map((f) => f.getBoundingClientRect().width),
    wide: document.documentElement.scrollWidth <= innerWidth, hacked: "hacked" in window });
}));
"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt install chromium)")
@pytest.mark.parametrize("size", ["1280,900", "500,900"])  # headless Chromium makes no narrower window
def test_in_a_browser(tmp_path, size):
    """No error in the console, all charts drawn, sentences and charts read by keyboard, nothing wider than the page."""
    run = write_mixed(write_selected(write_scored_run(tmp_path / "run", questions=3, sentences=4), "q1"), "q2")
    write_train_run(run / "train-low", 1500)
    path = report([run, write_ablations(tmp_path / "ablations.json")])
    path.write_text(path.read_text().replace("</body>", f"<script>{VISITOR}</script></body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
               f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size}", "--virtual-time-budget=5000"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))
    assert seen["said"] == "teacher sentence: p_T 0.900, p_S 0.000, p_D 0.800, Δ\u00a0+0.90 (9 and 8 tokens)"
    assert seen["second"]["text"].startswith(f"{HOSTILE[:20]} 0 0 1.")
    assert seen["second"]["said"] == "teacher sentence: p_T 0.900, p_S 0.100, p_D 0.800, Δ\u00a0+0.80 (9 and 8 tokens)"
    assert seen["where"] == "question 2 of 3" and seen["legend"] == "2,249"  # the first of the last point's steps
    assert seen["figures"] == len(seen["drawn"]) > 8 and all(seen["drawn"])
    rule, chosen, dropped = seen["why"]
    assert "by longest: " in rule and "the one with the most tokens of the student" in rule
    assert chosen.startswith("chosen for stage low · T = 1, candidate 1: ")
    assert dropped.startswith("dropped by the filters · ") and dropped.endswith(f"; wrong_answer, {HOSTILE}")
    told = "the student began: 7 tokens, 62.5 % of what it wrote under a cap of 20"
    assert seen["mixed"] == {"began": HOSTILE, "said": told, "went": " and on"}
    assert len(seen["forests"]) == 2 and min(seen["forests"]) > 600
    assert seen["wide"] and not seen["hacked"]

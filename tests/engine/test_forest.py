"""Forest plots: every mark and interval lies where its number says; verdicts in words; figures are documents."""

import re
from xml.etree import ElementTree

import pytest

from dasd_engine.comparisons import Comparison, Series, of_ablations, of_bakeoff, told
from dasd_engine.forest import draw, write_figures

DIFFERENCES = {"longest": (0.10, 0.02, 0.18), "ratio": (-0.034, -0.11, 0.042), "<b>&": (-0.2, -0.31, -0.09)}


def comparison(differences=None, sets=("A",)) -> Comparison:
    differences = DIFFERENCES if differences is None else differences
    arms = ["random", *differences]
    series = [
        Series(f"set {name}", differences, {arm: 0.5 + differences.get(arm, (0,))[0] for arm in arms},
               dict.fromkeys(arms, 1234.0)) for name in sets
    ]  # fmt: skip
    return Comparison("chance-rules", "rules & all", arms, series, ["cannot tell"])


def svg(drawn: str):
    return ElementTree.fromstring(re.sub(' xmlns="[^"]+"', "", drawn))


def scale(root):
    """Points by place, from two of the axis's ticks."""
    ticks = {x.text: float(x.get("x")) for x in root.iter("text") if re.fullmatch(r"[+−]?[\d.]+", x.text)}
    low, high = (next(t for t in ticks if t.startswith(sign)) for sign in "−+")
    a, b = (float(t.replace("−", "-")) / 100 for t in (low, high))
    return lambda x: a + (b - a) * (x - ticks[low]) / (ticks[high] - ticks[low])


@pytest.mark.parametrize("by", [1, 0.04, 3])
def test_marks_and_intervals_lie_where_their_numbers_say(by):
    scaled = {arm: tuple(by * value for value in d) for arm, d in DIFFERENCES.items()}
    root = svg(draw(comparison(scaled)))
    at = scale(root)
    lines = [line for line in root.iter("line") if line.get("class") == "s0"]
    marks = [float(re.search(r"\((\S+)", path.get("transform"))[1]) for path in root.iter("path")][1:]  # the legend's
    one = abs(at(1) - at(0)) * 0.06  # places have one decimal
    for (difference, low, high), line, mark in zip(scaled.values(), lines, marks, strict=True):
        assert at(float(line.get("x1"))) == pytest.approx(low, abs=one)
        assert at(float(line.get("x2"))) == pytest.approx(high, abs=one)
        assert at(mark) == pytest.approx(difference, abs=one)
    (zero,) = (line for line in root.iter("line") if line.get("class") == "zero")
    assert at(float(zero.get("x1"))) == pytest.approx(0, abs=one)


def test_every_number_is_text_and_what_leaves_out_0_is_bold():
    root = svg(draw(comparison()))
    bold = [x.text for x in root.iter("text") if "told" in x.get("class", "")]
    assert bold == ["+10.0 (+2.0 to +18.0)", "−20.0 (−31.0 to −9.0)"]
    text = [x.text for x in root.iter("text")]
    for one in ("random", "<b>&", "reference", "−3.4 (−11.0 to +4.2)", "50.0 %", "60.0 %", "1,234", "set A"):
        assert one in text


def test_arms_that_are_the_same_runs_are_drawn_on_the_line(tmp_path):
    root = svg(draw(comparison({"same": (0.0, 0.0, 0.0)}, sets=("A", "B"))))
    assert [x.text for x in root.iter("text")].count("0.0 (0.0 to 0.0)") == 2


def test_figures_are_documents_on_white_with_their_verdict(tmp_path):
    (path,) = write_figures([comparison()], tmp_path / "figures")
    assert path == tmp_path / "figures" / "chance-rules.svg"
    root = ElementTree.parse(path).getroot()
    name = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{name}svg" and root.find(f"{name}rect").get("fill") == "#fff"
    assert root.find(f"{name}desc").text == "cannot tell" and root.find(f"{name}title").text == "rules & all"
    assert "var(" not in path.read_text()


# ---------------------------------------------------------------------------------------------- from results


def pair(a, b, difference, low, high):
    return {"a": a, "b": b, "difference": difference, "interval": [low, high]}


def test_ablations_are_read_whichever_way_a_pair_was_compared():
    means, tokens = {"low": 0.5, "high": 0.4, "both": 0.6}, {"low": 10, "high": 20, "both": 30}
    pairs = [pair("low", "high", -0.1, -0.15, -0.05), pair("both", "low", -0.1, -0.2, 0.01)]
    pairs.append(pair("high", "both", 0.2, 0.1, 0.3))
    one = {"base": 0.3, "pass_at_1": means, "tokens": tokens, "pairs": pairs}
    family = {"title": "temperatures", "reference": "low", "arms": list(means), "sets": {"A": one, "B": one}}
    (found,) = of_ablations({"regimes": {"chance": {"about": "", "families": {"temperature": family}}}})
    assert (found.name, found.title) == ("chance-temperature", "chance: temperatures: above low")
    assert [s.name for s in found.series] == ["set A", "set B"] and found.arms == ["low", "high", "both"]
    assert found.series[0].against == {"high": (-0.1, -0.15, -0.05), "both": (0.1, -0.01, 0.2)}
    assert found.said == ["worse than low on set A and set B: high", "not told apart from low: both"]


def test_claims_and_the_sweep_are_drawn_too():
    one = {"difference": 0.1, "interval": [0.05, 0.15]}
    claims = [{"said": "high beats low", "verdict": "agrees", "sets": {"A": one, "B": one}}]
    sweep = [{"set": "A", "step": step, "base": 0.2, "above_random": {"ratio": one}} for step in (1000, 2000)]
    value = {"about": "", "families": {}, "claims": claims, "sweep": sweep}
    first, second = of_ablations({"regimes": {"chance": value}})
    assert (first.name, first.arms, first.said) == ("chance-claims", ["high beats low"], ["agrees: high beats low"])
    assert (second.name, second.arms) == ("chance-sweep-A", ["1,000 steps, 20.0 %", "2,000 steps, 20.0 %"])
    assert second.series == [Series("ratio", dict.fromkeys(second.arms, (0.1, 0.05, 0.15)))]
    text = [x.text for x in svg(draw(second)).iter("text")]
    assert text.count("+10.0 (+5.0 to +15.0)") == 2 and "tokens" not in text


def test_what_holds_on_one_set_alone_is_said_so():
    a = Series("set A", {"x": (0.1, 0.05, 0.15), "y": (0.1, 0.05, 0.15)})
    b = Series("set B", {"x": (0.0, -0.05, 0.05), "y": (-0.1, -0.15, -0.05)})
    assert told("r", ["r", "x", "y"], [a, b]) == [
        "better on one alone: x (set A), y (set A)", "worse on one alone: y (set B)",
    ]  # fmt: skip


def test_a_bakeoff_has_its_designs_side_by_side():
    verdict = {"best": "ratio", "alike": [], "partly": [], "worse": []}
    pairs = [pair("random", "ratio", 0.1, 0.05, 0.15)]
    group = {
        "reference": "random", "verdict": verdict, "detectable": {"planned": 0.05, "measured": {"samples": 0.04}},
        "pass_at_1": dict.fromkeys(("samples", "tokens"), {"random": 0.5, "ratio": 0.6}),
        "tokens": dict.fromkeys(("samples", "tokens"), {"random": 9.0, "ratio": 8.0}),
        "pairs": dict.fromkeys(("samples", "tokens"), pairs),
    }  # fmt: skip
    (found,) = of_bakeoff({"base": 0.4, "groups": {"rules": group}})
    assert [s.name for s in found.series] == ["equal samples", "equal tokens"]
    assert found.series[1].against == {"ratio": (0.1, 0.05, 0.15)}
    assert found.said[0] == "take ratio: better than random with equal samples and with equal tokens"

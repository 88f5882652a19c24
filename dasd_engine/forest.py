"""A comparison as a forest plot in SVG: of each arm the difference from the reference, and its interval across 0.

One drawing for two places: inside the page of `report` it takes the page's colours, light or dark; as a file, for a
text that shows it, it brings its own on white. All numbers are text in it. No library draws it: uPlot, the page's, has
no axis of names, and what matplotlib would make for files could not be recoloured in the page.
"""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from dasd_engine.comparisons import Comparison, Difference, Series
from dasd_engine.evaluation_report import percent

LINE, GAP, PLOT = 19, 7, 240  # a series' line, between arms, the plot's width; units are pixels
CHARACTER = 7.2  # a name's, at most in the mean
COLUMNS, HEADS = (162, 70, 70), ("difference (interval)", "pass@1", "tokens")  # right of the plot
MARKS = ("M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z", "M-4-4h8v8h-8z", "M0-6 6 0 0 6-6 0z", "M0-5 6 5H-6z")  # of series
_WHITE = {"back": "#fff", "ink": "#1b1f24", "soft": "#59636e", "grid": "#e6e9ed",
          "c0": "#0b62c4", "c1": "#b4530a", "c2": "#1a7f4e", "c3": "#8a3fc0"}  # fmt: skip
_STYLE = Template("""
.forest { font: 13px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
.forest text { fill: $ink; }
.forest .soft { fill: $soft; }
.forest .told { font-weight: 600; }
.forest .end { text-anchor: end; }
.forest .mid { text-anchor: middle; }
.forest .grid { stroke: $grid; }
.forest .zero { stroke: $soft; stroke-width: 1.5; }
.forest .s0 { stroke: $c0; fill: $c0; stroke-width: 2; }
.forest .s1 { stroke: $c1; fill: $back; stroke-width: 2; }
.forest .s2 { stroke: $c2; fill: $c2; stroke-width: 2; }
.forest .s3 { stroke: $c3; fill: $back; stroke-width: 2; }
""")


def style(white: bool = False) -> str:
    """CSS of the drawing: in the page's colours, or on white."""
    return _STYLE.substitute(_WHITE if white else {name: f"var(--{name})" for name in _WHITE})


def draw(comparison: Comparison, white: bool = False) -> str:
    """The SVG; `white`: a document of its own, with title and verdict in it."""
    c, top = comparison, 52 if white else 28
    left = max(90.0, CHARACTER * max(map(len, c.arms)) + 16)
    ticks = _ticks([d for one in c.series for d in one.against.values()])
    at = _Scale(left, ticks)
    columns = 3 if any(one.pass_at_1 for one in c.series) else 1
    edges = [left + PLOT + 14 + sum(COLUMNS[: i + 1]) for i in range(columns)]
    block = LINE * len(c.series) + GAP
    width, height = max(edges[-1], 8 * len(c.title) * white) + 8, top + len(c.arms) * block + 46
    heads = zip(edges, HEADS, strict=False)
    parts = [*_legend(c.series, left, top - 12), *(_text(x, top - 8, head, "soft end") for x, head in heads)]
    parts += _axis(at, ticks, top, height - 40)
    for i, arm in enumerate(c.arms):
        y = top + GAP / 2 + i * block
        parts.append(_text(8, y + LINE * len(c.series) / 2 + 5, arm))
        for j, one in enumerate(c.series):
            parts += _row(one, j, arm, at, edges, y + LINE * (j + 0.5))
    size = f'class="forest" width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    if not white:
        return f"<svg {size}>{''.join(parts)}</svg>"
    told = f"<title>{escape(c.title)}</title><desc>{escape('; '.join(c.said))}</desc><style>{style(True)}</style>"
    back = f'<rect width="100%" height="100%" fill="{_WHITE["back"]}"/>'
    title = _text(8, 20, c.title, "told")
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{told}{back}{title}{"".join(parts)}</svg>\n'


def write_figures(comparisons: Sequence[Comparison], directory: Path) -> list[Path]:
    """One SVG a comparison, on white, by its name."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{one.name}.svg" for one in comparisons]
    for one, path in zip(comparisons, paths, strict=True):
        path.write_text(draw(one, white=True), encoding="utf-8")
    return paths


# ---------------------------------------------------------------------------------------------- its parts


class _Scale:
    """A difference to its place; the first and the last tick end the plot."""

    def __init__(self, left: float, ticks: Sequence[float]):
        self.left, self.low, self.span = left, ticks[0], ticks[-1] - ticks[0]

    def __call__(self, difference: float) -> float:
        return self.left + PLOT * (difference - self.low) / self.span


def _ticks(found: Sequence[Difference]) -> list[float]:
    """Round numbers that enclose all intervals and 0, about six of them."""
    low, high = min([0.0, *(d[1] for d in found)]), max([0.0, *(d[2] for d in found)])
    if low == high:  # nothing differs by anything
        low, high = -0.01, 0.01
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * one for one in (1, 2, 5, 10) if power * one >= rough)
    return [step * i for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _axis(at: _Scale, ticks: Sequence[float], top: float, bottom: float) -> list[str]:
    parts = []
    for tick in ticks:
        name = "zero" if tick == 0 else "grid"
        parts.append(f'<line class="{name}" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="{top:g}" y2="{bottom:g}"/>')
        parts.append(_text(at(tick), bottom + 16, _signed(tick, 1 if ticks[1] - ticks[0] < 0.01 else 0), "soft mid"))
    return [*parts, _text(at.left + PLOT / 2, bottom + 33, "points of pass@1", "soft mid")]


def _legend(series: Sequence[Series], x: float, y: float) -> list[str]:
    parts = []
    for i, one in enumerate(series):
        parts += [_mark(i, x + 6, y), _text(x + 18, y + 4, one.name, "soft")]
        x += 34 + CHARACTER * len(one.name)
    return parts


def _row(one: Series, number: int, arm: str, at: _Scale, edges: Sequence[float], y: float) -> list[str]:
    parts, base = [], y + 5
    if arm in one.against:
        difference, low, high = one.against[arm]
        told = "told end" if low > 0 or high < 0 else "end"
        parts.append(f'<line class="s{number % 4}" x1="{at(low):.1f}" x2="{at(high):.1f}" y1="{y:g}" y2="{y:g}"/>')
        parts.append(_mark(number, at(difference), y))
        interval = f"{_signed(difference)} ({_signed(low)} to {_signed(high)})"
        parts.append(_text(edges[0], base, interval, told))
    else:
        parts.append(_text(edges[0], base, "reference", "soft end"))
    if arm in one.pass_at_1:
        parts.append(_text(edges[1], base, percent(one.pass_at_1[arm]), "end"))
        parts.append(_text(edges[2], base, f"{one.tokens[arm]:,.0f}", "end"))
    return parts


def _mark(number: int, x: float, y: float) -> str:
    return f'<path class="s{number % 4}" d="{MARKS[number % 4]}" transform="translate({x:.1f} {y:g})"/>'


def _text(x: float, y: float, text: str, name: str = "") -> str:
    named = f' class="{name}"' if name else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{named}>{escape(text)}</text>'


def _signed(share: float, digits: int = 1) -> str:
    """Points with their sign; none for nothing."""
    text = f"{100 * share:+.{digits}f}".replace("-", "−")
    return text if float(f"{100 * share:.{digits}f}") else text[1:]

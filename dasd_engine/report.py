"""One self-contained HTML page about a run: what ran, how training went, which responses were chosen and why.

    python -m dasd_engine.report runs/distill                          writes runs/distill/report.html
    python -m dasd_engine.report runs/a --compare runs/b runs/c --out all.html
    python -m dasd_engine.report runs/bakeoff --figures figures        its plots as SVG files too

RUN is a run of dasd_engine.train or the `out` of dasd_engine.distill, finished or on its way; a finished bake-off; or
the file with the results of the ablations. The page is opened from the file and loads nothing. What it shows:
docs/report.md.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from dasd_engine import forest
from dasd_engine.errors import InputError, run_cli
from dasd_engine.evaluation_report import percent
from dasd_engine.report_run import Run, read_run
from dasd_engine.selection import RULES

PAGE = Path(__file__).parent / "report_page"
BINS = 40  # of a histogram of lengths


def report(
    runs: Sequence[str | os.PathLike[str]] | str | os.PathLike[str], out: Path | None = None,
    figures: Path | None = None,
) -> Path:  # fmt: skip
    """Write the page about one run, or several side by side; returns its path, by default RUN/report.html, or
    RESULTS.html beside RESULTS.json. `figures`: a directory that gets what was compared as SVG files.

    Raises InputError for a directory that is no run, or in which nothing is there to be shown yet.
    """
    given = [runs] if isinstance(runs, str | os.PathLike) else list(runs)
    paths = [Path(run) for run in given]
    path = out or (paths[0].with_suffix(".html") if paths[0].is_file() else paths[0] / "report.html")
    read = [read_run(run) for run in paths]
    text = render(read)
    try:
        path.write_text(text, encoding="utf-8")
        if figures:
            forest.write_figures([one for run in read for one in run.comparisons], figures)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be written ({error.strerror}); name another") from None
    return path


def render(runs: Sequence[Run]) -> str:
    """The page as text. Names of several runs are told apart by a number where they are the same."""
    names = [run.name for run in runs]
    for i, run in enumerate(runs):
        if names.count(run.name) > 1:
            run.name = f"{names[i]} ({i + 1})"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(count=_count, duration=_duration, percent=percent, draw=forest.draw)
    files = {name: (PAGE / file).read_text(encoding="utf-8") for name, file in (
        ("css", "page.css"), ("js", "page.js"), ("uplot_css", "uPlot.min.css"), ("uplot_js", "uPlot.iife.min.js"),
        ("licence", "uPlot.LICENSE"),
    )}  # fmt: skip
    files["css"] += forest.style()
    return environment.get_template("page.html").render(runs=runs, data=_script([_data(run) for run in runs]), **files)


def _data(run: Run) -> dict[str, Any]:
    """What the page's script draws."""
    return {
        "name": run.name,
        "curves": run.curves,
        "lengths": _histograms(run.lengths),
        "deltas": run.deltas,
        "beta": run.texts.beta if run.texts else None,
        "rule": {"name": run.texts.rule, "takes": RULES[run.texts.rule]} if run.texts and run.texts.rule else None,
        "places": run.texts.places if run.texts else [],
        "questions": run.texts.questions if run.texts else [],
        "samples": vars(run.samples) if run.samples else None,
    }


def _script(value: Any) -> str:
    """JSON that ends no <script>, whatever the texts hold."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.encode("utf-8", "replace").decode()
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _histograms(groups: dict[str, np.ndarray]) -> dict[str, Any]:
    """Shares of each group in the same bins, from 0 to where all but a thousandth of every group ends."""
    groups = {name: values for name, values in groups.items() if len(values)}
    if not groups:
        return {}
    top = max(float(np.quantile(values, 0.999)) for values in groups.values())
    step = max(1, int(np.ceil((top + 1) / BINS)))
    edges = np.arange(0, (int(top) // step + 2) * step, step)
    shares = {
        name: np.round(np.histogram(values, edges)[0] / len(values), 5).tolist() for name, values in groups.items()
    }
    figures = {
        name: [len(values), *(round(float(x), 1) for x in (values.mean(), *np.quantile(values, (0.5, 0.95))))]
        for name, values in groups.items()
    }
    return {"edges": edges.tolist(), "shares": shares, "figures": figures}


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if seconds >= 60 else f"{seconds:.1f} s"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dasd_engine.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="directory of a run of train, distill or bakeoff, or results as JSON")
    add("--compare", type=Path, nargs="+", default=[], metavar="RUN", help="further runs, on the same page")
    add("--out", type=Path, metavar="FILE", help="default: RUN/report.html, or RESULTS.html beside RESULTS.json")
    add("--figures", type=Path, metavar="DIR", help="what was compared as SVG files, on white")
    args = parser.parse_args(arguments)
    path = report([args.run, *args.compare], args.out, args.figures)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB; open it in a browser")


if __name__ == "__main__":
    run_cli(main)

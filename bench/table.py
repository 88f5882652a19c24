"""Runs a benchmark suite and prints its table: ours, its peers and the hardware's floor, with rate, memory and error.

    python -m bench.table [kernels|packing|training|sampling|prepare|score] [--json]

A suite is bench/test_<suite>.py, run by pytest-benchmark; without a name all suites run. Each test is one case and
times ours with the `benchmark` fixture, best through `bench.compare.compare`, which interleaves the peers. What else
the table shows comes from `benchmark.extra_info`, every key optional:

    case        what was measured, with its sizes; the test's name when absent
    peers       {name: {"seconds": s, "peak_bytes": b, "error": e}} or {name: "why it was skipped"}
    floor       seconds that the hardware needs at least
    work        [amount, unit] done in one round, shown as a rate: [435_000, "documents"]
    peak_bytes  peak memory of ours above its inputs
    error       largest error of ours against the float64 reference
    notes       {name: value}, shown as they are: {"fill": "99.97 %"}

Times are medians over the rounds; "x ours" is a time over ours, above 1 where ours is faster. --json prints
{"machine": ..., "rows": [...], "skipped": [...]}: a row has suite, case, who ("ours", a peer's name or "floor"),
seconds, ratio, rate, unit, peak_bytes, error and notes; a skipped peer has suite, case, who and why.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
SUITES = ("kernels", "packing", "training", "sampling", "prepare", "score")


def run_suite(suite: str) -> dict[str, Any]:
    """Runs bench/test_<suite>.py in its own process, its output on stderr; returns pytest-benchmark's report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", str(HERE / f"test_{suite}.py"), "-q", "-p", "no:cacheprovider"]
        command += ["--benchmark-only", "--benchmark-disable-gc", f"--benchmark-json={report}"]
        done = subprocess.run(command, cwd=HERE.parent, stdout=sys.stderr)
        if done.returncode:
            raise SystemExit(f"error: the suite {suite} failed (pytest exit code {done.returncode}); see above")
        return json.loads(report.read_text())


def rows_of(suite: str, report: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The table's rows, ours first in each case, and the skipped peers."""
    rows, skipped = [], []
    for entry in report["benchmarks"]:
        info = entry["extra_info"]
        case = info.get("case", entry["name"])
        amount, unit = info.get("work", (None, None))
        ours = {**info, "seconds": entry["stats"]["median"]}
        shown = {"ours": ours, **info.get("peers", {})}
        if "floor" in info:
            shown["floor"] = {"seconds": info["floor"]}
        for who, values in shown.items():
            row = {"suite": suite, "case": case, "who": who}
            if isinstance(values, str):
                skipped.append({**row, "why": values})
                continue
            seconds = values["seconds"]
            row |= {"seconds": seconds, "ratio": seconds / ours["seconds"], "unit": unit}
            row["rate"] = amount / seconds if amount else None
            rows.append({**row, **{key: values.get(key) for key in ("peak_bytes", "error", "notes")}})
    return rows, skipped


def machine_of(report: dict[str, Any]) -> str:
    info = report["machine_info"]
    cpu = info.get("cpu", {}).get("brand_raw") or info.get("processor") or info.get("machine")
    return f"{cpu}, {os.cpu_count()} cores, Python {info.get('python_version')}, {report['datetime'][:10]}"


def human(value: float, unit: str) -> str:
    """1234.5, "B" -> "1.23 kB"; 0.0123, "s" -> "12.3 ms"; 2.5e7, "tokens/s" -> "25 M tokens/s"."""
    space = " " if len(unit) > 2 else ""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "u")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}{space if prefix else ''}{unit}"
    return f"{value:.3g} {unit}"


def table_of(suite: str, rows: list[dict[str, Any]], machine: str) -> Table:
    cells = []
    for row in rows:
        ours = row["who"] == "ours"
        cells.append(
            {
                "case": row["case"] if ours else "",
                "who": row["who"],
                "time": human(row["seconds"], "s"),
                "x ours": "" if ours else f"{row['ratio']:.3g}",
                "rate": human(row["rate"], f"{row['unit']}/s") if row["rate"] else "",
                "memory": "" if row["peak_bytes"] is None else human(row["peak_bytes"], "B"),
                "error": "" if row["error"] is None else f"{row['error']:.1e}",
                "notes": ", ".join(f"{key} {value}" for key, value in (row["notes"] or {}).items()),
            }
        )
    shown = [name for name in cells[0] if any(cell[name] for cell in cells)] if cells else []
    table = Table(title=f"{suite}: {machine}", title_justify="left")
    for name in shown:
        table.add_column(name, justify="left" if name in ("case", "who", "notes") else "right", overflow="fold")
    for row, cell in zip(rows, cells, strict=True):
        if row["who"] == "ours":
            table.add_section()
        table.add_row(*(cell[name] for name in shown))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", nargs="?", choices=SUITES, help="the suite to run; all of them when absent")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()

    present = [suite for suite in SUITES if (HERE / f"test_{suite}.py").exists()]
    if arguments.suite and arguments.suite not in present:
        raise SystemExit(f"error: bench/test_{arguments.suite}.py does not exist yet; there are {', '.join(present)}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    machine, all_rows, all_skipped = "", [], []
    for suite in [arguments.suite] if arguments.suite else present:
        report = run_suite(suite)
        machine = machine_of(report)
        rows, skipped = rows_of(suite, report)
        all_rows += rows
        all_skipped += skipped
        if not arguments.json:
            console.print(table_of(suite, rows, machine))
            for who, why in sorted({(skip["who"], skip["why"]) for skip in skipped}):
                console.print(f"skipped: {who} ({why})", markup=False, highlight=False)
    if arguments.json:
        print(json.dumps({"machine": machine, "rows": all_rows, "skipped": all_skipped}, indent=1))


if __name__ == "__main__":
    main()

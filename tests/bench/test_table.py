"""bench.table: rows from a suite's report, and the command's answer to a suite that does not exist."""

import subprocess
import sys
from pathlib import Path

from bench.table import human, rows_of

REPORT = {
    "benchmarks": [
        {
            "name": "test_a",
            "stats": {"median": 0.5},
            "extra_info": {
                "case": "a of 10",
                "peers": {"torch": {"seconds": 1.0, "peak_bytes": 2000, "error": 1e-3}, "trl": "not installed"},
                "floor": 0.25,
                "work": [10, "documents"],
                "error": 1e-4,
                "notes": {"fill": "99 %"},
            },
        },
        {"name": "test_b", "stats": {"median": 2.0}, "extra_info": {}},
    ]
}


def test_rows_come_from_extra_info():
    rows, skipped = rows_of("packing", REPORT)
    assert [(row["case"], row["who"], row["seconds"], row["ratio"], row["rate"]) for row in rows] == [
        ("a of 10", "ours", 0.5, 1.0, 20.0),
        ("a of 10", "torch", 1.0, 2.0, 10.0),
        ("a of 10", "floor", 0.25, 0.5, 40.0),
        ("test_b", "ours", 2.0, 1.0, None),
    ]
    assert [(row["peak_bytes"], row["error"]) for row in rows[:3]] == [(None, 1e-4), (2000, 1e-3), (None, None)]
    assert rows[0]["notes"] == {"fill": "99 %"}
    assert skipped == [{"suite": "packing", "case": "a of 10", "who": "trl", "why": "not installed"}]


def test_units():
    assert [human(value, "s") for value in (0, 2.5e-5, 0.0123, 4, 1500)] == ["0 s", "25 us", "12.3 ms", "4 s", "1.5 ks"]
    assert human(2.5e7, "tokens/s") == "25 M tokens/s" and human(25, "tokens/s") == "25 tokens/s"


def test_an_unknown_suite_is_refused():
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-m", "bench.table", "nonsense"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and "choose from" in done.stderr and not done.stdout

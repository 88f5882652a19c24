"""Benchmarks: pytest-benchmark suites (test_*.py) and the table that shows them (`python -m bench.table`)."""

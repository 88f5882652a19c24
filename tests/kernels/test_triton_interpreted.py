"""Runs triton_*cases.py in processes of their own: TRITON_INTERPRET=1 must be set before Triton
is imported, and would make the kernels of every other test interpreted too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.parametrize("file", ["triton_cases.py", "triton_kl_cases.py", "triton_adamw_cases.py"])
def test_triton_kernels_under_the_interpreter(file):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / file)]
    done = subprocess.run(command, env=env, cwd=HERE.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

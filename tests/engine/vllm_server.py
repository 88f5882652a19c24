"""A real vLLM for tests that ask for it, in an environment of its own: it pins its own versions of everything."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("DASD_VLLM_PYTHON", sys.executable if importlib.util.find_spec("vllm") else "")

marks = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="needs vLLM: set DASD_VLLM_PYTHON to a Python that has it"),
]


def environment() -> dict[str, str]:
    here = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return os.environ | here | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}


@contextmanager
def served(model: Path, name: str) -> Iterator[str]:
    """The URL of a server of `model`; it takes about half a minute to come up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--served-model-name", name]
    command += ["--max-num-batched-tokens", "32768"]  # on a CPU 0.32 dies of a seeded request whose prompt is split
    log = model.with_name("server.log")
    with open(log, "w") as out:
        server = subprocess.Popen(command, env=environment(), stdout=out, stderr=out, cwd=model.parent)
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and server.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        else:
            pytest.fail(f"vLLM did not start: {log.read_text()[-3000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)

"""Settings for the whole suite: one thread a process, as the tensors are small, and reproducible property tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it

from hypothesis import settings  # noqa: E402

# The same examples everywhere, however slow the machine.
settings.register_profile("dasd", derandomize=True, deadline=None)
settings.load_profile("dasd")

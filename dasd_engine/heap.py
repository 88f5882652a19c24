"""What a long-running process on the CPU asks of its allocator."""

import ctypes
import sys

from dasd_kernels import _C

# glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> None:
    """Have glibc keep memory that is freed instead of giving it back. A step frees what the next one takes: left alone,
    glibc returns every tensor over 32 MiB to the kernel, which clears it again, page by page, at its next first touch.

    For commands, before they allocate: it concerns the whole process. Without glibc it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return
    mallopt(M_ARENA_MAX, 1)  # other arenas would fall back to mmap for large tensors
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
    mallopt(M_TOP_PAD, 64 << 20)
    # The loss leaves its workspace to the heap, and backward takes it. A block larger than all others is not left: by
    # the next step small ones would lie in it, and the heap would grow by another.
    _C.Workspace.keep, _C.Workspace.keep_from = 0, 512 << 20


def release_freed_memory() -> None:
    """Give back, once, what is free now: after the start, whose tensors were not those of a step."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

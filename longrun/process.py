"""What this process asks of kernel, allocator and interpreter: to die with its parent, to give memory back."""

from __future__ import annotations

import contextlib
import gc
import sys
from pathlib import Path


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies (Linux; elsewhere the socket's end tells)."""
    if sys.platform == "linux":
        import ctypes
        import signal

        pr_set_pdeathsig = 1  # prctl(2)
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def moved_bytes(pid: int) -> int:
    """Bytes that a process and what it has started have read and written so far; 0 where that cannot be known.

    Of files that are mapped into memory, as weights are, those count that had to be fetched (proc(5), read_bytes).
    """
    here = Path(f"/proc/{pid}")
    moved = 0
    with contextlib.suppress(OSError, ValueError):
        facts = dict(line.split(": ") for line in (here / "io").read_text().splitlines())
        moved = sum(int(facts[key]) for key in ("rchar", "wchar", "read_bytes"))
        for child in (here / "task" / str(pid) / "children").read_text().split():
            moved += moved_bytes(int(child))
    return moved


def return_free_memory() -> None:
    """Collect what is garbage by now, and give back the pages that are free between blocks in use.

    Python looks for cycles among what has lived long only when a quarter as much has come, and glibc keeps what is
    free below the top of its heap: a process that lives for months would keep a part of every peak.
    """
    gc.collect()
    if sys.platform == "linux":
        import ctypes

        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if malloc_trim is not None:
            malloc_trim(0)


def return_large_blocks(large_bytes: int = 128 << 10) -> None:
    """Let large blocks of memory go back to the system when they are freed; glibc calls 128 KiB large at first.

    glibc takes the largest block that was ever freed, up to 32 MiB, for a size that is soon needed again, and keeps
    twice as much from then on: one bomb or long row among thousands of files would stay for the life of the process,
    and so would the text of a long lineage.
    """
    if sys.platform == "linux":
        import ctypes

        m_mmap_threshold = -3  # mallopt(3)
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none, nor the habit
        if mallopt is not None:
            mallopt(m_mmap_threshold, large_bytes)


def meet_many_names() -> None:
    """Let Python's table of names have from the start the size that it would reach after hours.

    Every part of a path is a name while it is used, and what was forgotten leaves a gap. When some 20,000 were met,
    CPython makes the table anew and twice as large: half a megabyte, once, that would look like a leak.
    """
    for number in range(22_000):
        sys.intern(f"name {number}")

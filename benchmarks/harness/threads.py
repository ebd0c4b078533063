"""One thread for all that computes, so that CPU seconds count work, and not threads that wait for each other."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from threadpoolctl import threadpool_limits

TASKS = Path("/proc/self/task")


def _here() -> list[int]:
    """All threads of this process."""
    return [int(task.name) for task in TASKS.iterdir()]


@contextlib.contextmanager
def pinned() -> Iterator[bool]:
    """Holds all threads of this process to one CPU, and BLAS to one thread; gives both back at the end.

    Yields:
      Whether there is one CPU: systems without `sched_setaffinity` hold BLAS only.
    """
    with threadpool_limits(1):
        if not (hasattr(os, "sched_setaffinity") and TASKS.exists()):
            yield False
            return
        before = os.sched_getaffinity(0)
        try:
            for thread in _here():
                os.sched_setaffinity(thread, {max(before)})
            yield True
        finally:
            for thread in _here():
                os.sched_setaffinity(thread, before)

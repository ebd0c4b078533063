"""What a stretch of work takes: seconds on the wall, and on all threads of this process together."""

import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax

T = TypeVar("T")


class Spent(NamedTuple):
    """Seconds on the wall, and processor seconds; the latter say less about what else the machine does."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def plus(self, other: "Spent") -> "Spent":
        """Both together."""
        return Spent(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)

    def named(self, prefix: str = "") -> dict[str, float]:
        """As metrics: `seconds` and `cpu_seconds`, with this in front."""
        return {f"{prefix}{name}": value for name, value in self._asdict().items()}


def timed(work: Callable[[], T]) -> tuple[T, Spent]:
    """What the work returns, once devices are done with it, and what that took."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(work())
    return result, Spent(time.perf_counter() - begin, time.process_time() - cpu_begin)

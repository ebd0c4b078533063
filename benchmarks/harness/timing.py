"""Timing of several programs against each other."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.harness.clock import Spent, timed

MOST_ROUNDS = 200


def relative_error(value: Any, exact: Any) -> np.ndarray:
    """‖value − exact‖ / ‖exact‖ along the last axis."""
    value, exact = np.asarray(value, float), np.asarray(exact, float)
    return np.linalg.norm(value - exact, axis=-1) / np.linalg.norm(exact, axis=-1)


def compiled(program: Callable, args: tuple) -> tuple[Callable, Spent, int | None]:
    """The compiled program, what this took, and its temporary bytes."""
    made, spent = timed(lambda: jax.jit(program).lower(*args).compile())
    memory = made.memory_analysis()
    return made, spent, memory.temp_size_in_bytes if memory else None


def interleaved(
    programs: Mapping[Any, Callable[[], Any]], rounds: int, budget: float, seed: int
) -> dict[Any, list[Spent]]:
    """What each program takes in each round, at least `rounds` of them, and more while the budget of seconds lasts."""
    order, draw, begin = list(programs), random.Random(seed), time.perf_counter()
    spent: dict[Any, list[Spent]] = {name: [] for name in order}
    for number in range(MOST_ROUNDS):
        if number >= rounds and time.perf_counter() - begin > budget:
            break
        draw.shuffle(order)
        for name in order:
            spent[name].append(timed(programs[name])[1])
    return spent


def ratios(seconds: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Time over the time of a reference, round by round."""
    return [own / other for own, other in zip(seconds, reference, strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return low, median, high

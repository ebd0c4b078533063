"""What a compiled program really runs, read off its optimized HLO text; for declared costs."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import jax

READABLE = jax.__version_info__ >= (0, 10)  # since when HLO text is printed in the form that is read here


class Dot(NamedTuple):
    """A matrix product of a compiled program.

    Attributes:
      contracted: the size that it sums over.
      returned: the shape of its result.
      times: how often it runs.

    Example:
        >>> from bilevax import testing
        >>> testing.Dot(contracted=7, returned=(11,), times=3).times
        3
    """

    contracted: int
    returned: tuple[int, ...]
    times: int


def executed_dots(program: str, unknown_trips: int = 1) -> list[Dot]:
    """All matrix products that an optimized HLO program runs.

    A loss whose gradient is one matrix product of known sizes thus counts its gradients, compiled loops, merged
    expressions and dropped code included; a callback in the loss would count traces. Compile for the CPU: other
    compilers write their products in other words.

    Args:
      program: `jax.jit(function).lower(*arguments).compile().as_text()`.
      unknown_trips: how often a `while` runs whose length the compiler does not know.

    Returns:
      A list of `Dot`; every branch of a conditional counts.

    Raises:
      KeyError: if the text is not that of an optimized program.

    Cost: reads the text once for each call that the program makes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bilevax import testing
        >>> A = jnp.ones((7, 11))
        >>> cube = jax.jit(lambda y: jax.lax.fori_loop(0, 3, lambda i, y: A.T @ (A @ y), y))
        >>> dots = testing.executed_dots(cube.lower(jnp.ones(11)).compile().as_text())
        >>> testing.products(dots, contracted=7, returned=11), testing.products(dots, contracted=11, returned=7)
        (3, 3)
    """
    shapes = re.findall(r"(%[\w.-]+) = \w+\[([\d,]+)\]", program)
    sizes = {name: tuple(int(size) for size in shape.split(",")) for name, shape in shapes}
    bodies = dict(re.findall(r"^(?:ENTRY )?(%[\w.-]+) \(.*?\{\n(.*?)^\}", program, re.M | re.S))

    def walk(computation: str, times: int) -> list[Dot]:
        dots = []
        for line in bodies[computation].splitlines():
            if dot := re.search(r"(%[\w.-]+) = .* dot\(.*?(%[\w.-]+), .*?lhs_contracting_dims=\{(\d+)\}", line):
                returned, left, axis = dot.groups()
                dots.append(Dot(sizes[left][int(axis)], sizes[returned], times))
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            inside = (int(trips[1]) if trips else unknown_trips) if " while(" in line else 1
            branches = re.findall(r"branch_computations=\{(.*?)\}", line)
            callees = re.findall(r"(?:body|calls|to_apply|true_computation|false_computation)=(%[\w.-]+)", line)
            for callee in callees + [name for names in branches for name in names.split(", ")]:
                dots += walk(callee, times * inside)
        return dots

    entries = re.findall(r"^ENTRY (%[\w.-]+)", program, re.M)
    return walk(entries[0] if entries else "ENTRY", 1)


def products(dots: Iterable[Dot], contracted: int, returned: int) -> int:
    """How many products of a vector with one matrix were run, batched ones counted for each vector.

    Args:
      dots: of `executed_dots`.
      contracted: the size that the product sums over.
      returned: the length of each result.

    Returns:
      A number.

    Raises:
      TypeError: if dots does not hold `Dot`s.

    Cost: one pass over dots.

    Example:
        >>> from bilevax import testing
        >>> testing.products([testing.Dot(7, (11,), 3), testing.Dot(7, (4, 11), 1), testing.Dot(2, (11,), 1)], 7, 11)
        7
    """
    found = [dot for dot in dots if dot.contracted == contracted and returned in dot.returned]
    return sum(dot.times * math.prod(dot.returned) // returned for dot in found)

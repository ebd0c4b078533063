"""What a compiled program really runs, read off its optimized HLO text."""

import re
from typing import NamedTuple


class Dot(NamedTuple):
    """A matrix product of a compiled program: the size it contracts, the sizes it returns, and how often it runs."""

    contracted: int
    returned: tuple[int, ...]
    times: int


def executed_dots(program: str, unknown_trips: int) -> list[Dot]:
    """All matrix products that an optimized HLO program runs; a `while` of unknown length counts `unknown_trips`,
    and every branch of a conditional counts."""
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

    return walk(re.search(r"^ENTRY (%[\w.-]+)", program, re.M)[1], 1)

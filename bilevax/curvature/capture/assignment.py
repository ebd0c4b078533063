"""Which blocks the leaves of y get, given how the model uses them."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from bilevax.curvature.capture.block import Block
from bilevax.curvature.capture.choices import Choice
from bilevax.curvature.capture.treatments import Treatment, Unsupported, answered, diagonal
from bilevax.curvature.capture.uses import Covered, Use
from bilevax.curvature.capture.view import WHOLE, Part


def assigned(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    uses: Sequence[Use],
    choices: Mapping[int, Choice],
    unsupported: Unsupported,
    n: int,
) -> list[Block]:
    """The blocks, of which some leaves have others than the rules say."""
    made = {
        leaf: answered(choice, {names[leaf]: "chosen by blocks"})[names[leaf]]
        for leaf, choice in choices.items()
        if not isinstance(choice, int)
    }
    by_name = {names[leaf]: treatment for leaf, treatment in made.items()}

    def answer(leaves: Mapping[str, str]) -> dict[str, Treatment]:
        rest = {name: what for name, what in leaves.items() if name not in by_name}
        return {**(answered(unsupported, rest) if rest else {}), **by_name}

    # A leaf with a treatment is none that the rules see; nor is it the bias of a layer, or has one
    left = []
    for use in uses:
        bias = None if use.bias is None or use.bias.leaf in made else use.bias
        if use.leaf not in made:
            left.append(use._replace(bias=bias))
        elif made[use.leaf].probes:
            left.append(use._replace(bias=bias, joins=None))
    what = {leaf: " and ".join(dict.fromkeys(use.what for use in uses if use.leaf == leaf)) for leaf in choices}
    ranks = {leaf: choice for leaf, choice in choices.items() if isinstance(choice, int)}
    blocks = []
    for block in _blocks(names, shapes, left, answer, n, {k: made[k] for k in made if made[k].probes}):
        if block.treatment is not None and what.get(block.leaf):
            block = block._replace(what=what[block.leaf])
        blocks.append(block._replace(rank=ranks.get(block.leaf) if block.matrix is not None else None))
    return blocks


def _blocks(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    uses: Sequence[Use],
    unsupported: Unsupported,
    n: int,
    wanted: Mapping[int, Treatment],
) -> list[Block]:
    """The blocks of every leaf: one, for a weight with its bias, or one for each part; diagonals where wanted."""
    by_leaf: dict[int, list[Use]] = {leaf: [] for leaf in range(len(names))}
    for use in uses:
        by_leaf[use.leaf].append(use)
    taps = [use for use in uses if use.explicit]
    for leaf in {use.leaf for use in taps}:
        by_leaf[leaf] = _observed(by_leaf[leaf], shapes[leaf])
    apart = {leaf for leaf, found in by_leaf.items() if _apart(found, shapes[leaf])}
    once = {leaf for leaf in apart & {*wanted} if _once(by_leaf[leaf])}
    apart -= {*wanted} - once
    biases = _biases([use for leaf in sorted(apart) for use in by_leaf[leaf]], taps)
    blocks: dict[int, list[Block]] = {}
    missing: dict[int, str] = {}
    shared: list[int] = []
    for leaf, name in enumerate(names):
        found = by_leaf[leaf]
        wrong = [use.what for use in found if not use.covered]
        wrong += [use.alone for use in found if use.alone and leaf not in _owners(biases)]
        if not found or wrong:
            missing[leaf] = ", ".join(dict.fromkeys(wrong)) or "meets no examples in model"
        elif leaf in apart and (leaf in _owners(biases) or any(use.matrix is not None for use in found)):
            blocks[leaf] = _parts(name, shapes[leaf], found, biases)
        elif leaf not in wanted and (twins := _twins(name, shapes[leaf], found)):
            blocks[leaf] = twins
        elif all(use.matrix is None and not use.derived for use in found) and len({use.stack for use in found}) == 1:
            blocks[leaf] = [_block(name, shapes[leaf], [use._replace(part=WHOLE) for use in found])]
        elif not all(use.divides for use in found):
            what = " and ".join(dict.fromkeys(use.what for use in found))
            missing[leaf] = f"used in different ways, {what}, where examples have no leaf of their own"
        else:
            shared.append(leaf)
    blocks |= _diagonals(names, shapes, {leaf: by_leaf[leaf] for leaf in shared}, n, wanted)
    if missing:
        treatments = answered(unsupported, {names[leaf]: what for leaf, what in missing.items()})
        for leaf, what in missing.items():
            treatment = treatments[names[leaf]]
            blocks[leaf] = [Block(names[leaf], treatment.rule, leaf, treatment=treatment, what=what)]
    for leaf in once:
        blocks[leaf] = [b if b.matrix is None else b._replace(rule="diagonal", diagonal=True) for b in blocks[leaf]]
    return [block for leaf in sorted(blocks) for block in blocks[leaf]]


def _span(part: Part, shape: Sequence[int]) -> Part:
    return Part.ordered(0, [(math.prod(shape), 1)]) if part == WHOLE else part


def _count(parts: Iterable[Part], size: int) -> np.ndarray:
    """How many of these parts of a leaf hold each of its elements."""
    count = np.zeros(size, np.uint8)
    for part in parts:
        np.lib.stride_tricks.as_strided(count[part.offset :], part.shape, part.strides)[...] += 1
    return count


def _observed(uses: Sequence[Use], shape: tuple[int, ...]) -> list[Use]:
    """The uses that count where the model marks some of them: these, and those of parts that it does not mark."""
    inner = shape[uses[0].stack :]
    marked = _count({_span(use.part, inner) for use in uses if use.explicit}, math.prod(inner)) > 0

    def free(use: Use) -> bool:
        return use.part != WHOLE and not marked[_count([use.part], len(marked)) > 0].any()

    return [use for use in uses if use.explicit or free(use)]


def _apart(uses: Sequence[Use], shape: tuple[int, ...]) -> bool:
    """Whether a leaf, or each part of it that the model uses, is used in one way, and no element in two parts."""
    ways = {(use.covers, use.stack, use.matrix, use.layers, use.inputs, use.outputs, use.by_row) for use in uses}
    parts = {use.part for use in uses}
    if len(ways) > len(parts) or len({use.stack for use in uses}) > 1 or not all(use.covered for use in uses):
        return False
    if any(use.derived for use in uses) or not parts:
        return False
    inner = shape[uses[0].stack :]
    return len(parts) == 1 or int(_count((_span(part, inner) for part in parts), math.prod(inner)).max()) < 2


def _once(uses: Sequence[Use]) -> bool:
    """Whether a leaf, or each part of it, is the weight of one layer, which is used once."""
    single = len({use.part for use in uses}) == len(uses)
    return single and all(use.matrix is not None and use.times == 1 for use in uses)


def _owners(biases: Mapping[Covered, Covered]) -> set[int]:
    return {covers.leaf for covers in biases.values()}


def _biases(uses: Sequence[Use], taps: Sequence[Use]) -> dict[Covered, Covered]:
    """Weight -> bias, where each use of the one is joined by the other and by nothing else."""
    # Leaves 0: b, 1: w of tanh(a w + b), whose product is equation 0: the use of w has the path (0,), that of b joins
    # (0,), so joined = {(0,): 0} and found = {1: 0}. In tanh(a w + b) w the second use of w is joined by none: {}
    by_part = defaultdict(list)
    for use in uses:
        by_part[use.covers].append(use)
    found = {use.covers: use.bias for use in taps if use.bias is not None}
    joined = {use.joins: use.covers for use in uses if use.joins is not None}
    for covers, here in by_part.items():
        paths = {(use.path, covers) for use in here}
        partners = {joined.get(path) for path in paths}
        bias = partners.pop() if len(partners) == 1 else None
        if bias is None or covers in found or (bias.part != WHOLE and covers.part == WHOLE):
            continue
        if all(use.joins in paths for use in by_part[bias]) and by_part[bias][0].stack == here[0].stack:
            found[covers] = bias
    return found


def _parts(name: str, shape: tuple[int, ...], uses: Sequence[Use], biases: Mapping[Covered, Covered]) -> list[Block]:
    """A block for each part of a leaf, and one for what the model does not use of it, whose curvature is 0."""
    by_part: dict[Part, list[Use]] = defaultdict(list)
    for use in uses:
        by_part[use.part].append(use)
    stack, leaf = uses[0].stack, uses[0].leaf
    inner = shape[stack:]
    blocks = []
    for part, here in by_part.items():
        if here[0].covers not in biases.values():
            text = "" if part == WHOLE else part.text(inner)
            blocks.append(_block(f"{name}{text}", shape, here, biases.get(here[0].covers)))
    if WHOLE not in by_part and not _count(by_part, math.prod(inner)).all():
        unused = Treatment("no curvature", lambda b, delta, scale: b / jnp.where(delta > 0, delta, scale))
        rest = Block(f"{name} (unused part)", unused.rule, leaf, stack=shape[:stack], shape=inner, treatment=unused)
        blocks.append(rest._replace(without=tuple(by_part), what="meets no examples in model"))
    return blocks


def _twins(name: str, shape: tuple[int, ...], uses: Sequence[Use]) -> list[Block]:
    """Two blocks of a leaf that is a matrix and its transpose, such as a table that is the output layer too."""
    blocks = []
    for covers in sorted({use.covers for use in uses}):
        here = [use for use in uses if use.covers == covers]
        if len({(use.stack, use.matrix, use.inputs, use.outputs, use.by_row) for use in here}) > 1 or here[0].layers:
            return []
        blocks.append(_block(name, shape, here))
    if len(blocks) != 2 or any(block.matrix is None or block.stack != blocks[0].stack for block in blocks):
        return []
    first, second = blocks
    straight: Any = first.matrix and first.matrix.reshape((first.inputs, first.outputs))
    turned: Any = second.matrix and second.matrix.reshape((second.inputs, second.outputs))
    if None in (straight, turned) or first.part != second.part or straight != turned.transpose((1, 0)):
        return []
    names = [f"{name}{'' if block.part == WHOLE else block.part.text(shape[len(block.stack) :])}" for block in blocks]
    one, other = names[0], f"{names[1]}.T"
    return [first._replace(name=one, twin=other), second._replace(name=other, twin=one, by_column=first.by_row)]


EXACT = 2**24
"""How many numbers (examples times elements) exact diagonals of leaves that are no layers may take together."""


def _diagonals(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    uses: Mapping[int, Sequence[Use]],
    n: int,
    wanted: Mapping[int, Treatment],
) -> dict[int, list[Block]]:
    """Diagonals of leaves that a layer is a function of, or that are used in several ways: exact for the small ones."""
    blocks, left = {}, EXACT
    for leaf in sorted(uses, key=lambda leaf: math.prod(shapes[leaf])):
        numbers = n * math.prod(shapes[leaf])
        stacks = {use.stack for use in uses[leaf]}
        exact = numbers <= left and len(stacks) == 1
        left -= numbers if exact else 0
        what = " and ".join(dict.fromkeys(use.what for use in uses[leaf]))
        estimated = wanted.get(leaf, diagonal({names[leaf]: what})[names[leaf]])
        treatment = None if exact else estimated
        depth = stacks.pop() if exact else 0
        block = Block(names[leaf], "diagonal", leaf, stack=shapes[leaf][:depth], shape=shapes[leaf][depth:])
        explicit = any(use.explicit for use in uses[leaf])
        block = block._replace(explicit=explicit, uses=len(uses[leaf]), treatment=treatment, what=what)
        blocks[leaf] = [block if treatment is None else block._replace(rule=treatment.rule)]
    return blocks


def _block(name: str, shape: tuple[int, ...], uses: Sequence[Use], bias: Covered | None = None) -> Block:
    """The block of a leaf, or of a part of it, with these uses."""
    use = uses[0]
    rule = " and ".join(dict.fromkeys(use.rule for use in uses))
    what = " and ".join(dict.fromkeys(use.what for use in uses))
    inner = shape[use.stack :] if use.part == WHOLE else use.part.shape
    stack = shape[: use.stack] + (() if use.matrix is None else use.matrix.shape[: use.layers])
    place = (use.leaf, None, stack, use.part, WHOLE, inner, ())
    kind = (use.matrix, use.inputs, use.outputs, use.positions, use.by_row, use.explicit)
    number = sum(use.times for use in uses)
    block = Block(name, rule, *place, *kind, uses=number, what=what, layers=use.layers)
    block = block._replace(turned=use.turned, slots=use.slots)
    return block if bias is None else block._replace(bias=bias.leaf, bias_part=bias.part)

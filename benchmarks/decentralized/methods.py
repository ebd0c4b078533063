"""What a method is to the harness, and how its derivative evaluations are counted."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import bilevax as bx
from benchmarks.decentralized.network import Network
from bilevax.typing import PyTree

MOST_PACE = 2.0


def counted(
    outer: float = 1, inner: float = 1, hessian: float = 1, cross: float = 1
) -> Callable[[Network], bx.problem.Calls]:
    """The same derivative evaluations in each iteration: ∇f, ∇_y g, Hessian and cross products."""
    return lambda network: bx.problem.Calls(outer, inner, hessian, cross)


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      name: in lower case, also the name of its files.
      make: `make(network, gossip, step_sizes, **setting) -> Algorithm`; the gossip is one, or `Levels` of them, and
        step sizes and settings may be traced.
      calls: `calls(network)`, the most derivative evaluations of an agent in one iteration.
      batch_size: examples that an evaluation reads of each kind; None for all.
      every: with a batch size, all examples are read in every so-manieth iteration, once; None for never.
      graphs: `graphs(topologies) -> topologies`, `Levels` of them: what it makes of the graphs.
      at_start: evaluations before the first iteration.
      symmetric: whether it needs a symmetric W.
      fixed: whether it needs one graph for all rounds.
      common: whether it needs one graph for all levels.
      needs_fit: whether it needs what of g reads data by its parts, `Network.fit`.
      largest: numbers in y from which on it is not run; None for no limit.
      settings: what is tried beside the step sizes, numbers by name, the usual one first; {} where there is nothing.
    """

    name: str
    make: Callable[..., bx.problem.Algorithm]
    calls: Callable[[Network], bx.problem.Calls] = counted()
    batch_size: int | None = None
    every: int | None = None
    graphs: Callable[[bx.Levels], bx.Levels] = lambda topologies: topologies
    at_start: int = 0
    symmetric: bool = False
    fixed: bool = False
    common: bool = False
    needs_fit: bool = False
    largest: int | None = None
    settings: Sequence[Mapping[str, float]] = ({},)


def size_of(tree: PyTree) -> int:
    """Numbers in a tree."""
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(tree))


def refusal(row: Row, network: Network, topologies: bx.Levels) -> str | None:
    """Why a row cannot run on this problem and these graphs, or None."""
    if row.largest is not None and size_of(network.y) > row.largest:
        return f"it is for y of at most {row.largest} numbers, not {size_of(network.y)}"
    if row.needs_fit and network.fit is None:
        return "it needs the parts of g, which this problem does not tell"
    if row.common and topologies.x is not topologies.y:
        return "it needs one graph for all levels"
    if row.fixed and not all(isinstance(one, bx.topology.Topology) for one in topologies):
        return "it needs one graph for all rounds"
    if row.symmetric and not all(bx.topology.is_symmetric(one) for one in topologies):
        return "it needs a symmetric W"
    return None


def shares(row: Row, network: Network) -> bx.problem.Calls:
    """What an evaluation reads of an agent's examples, on average, for each kind of derivative; 1 is all of them."""
    if row.batch_size is None:
        return bx.problem.Calls(1.0, 1.0, 1.0, 1.0)
    outer, inner = (row.batch_size / size for size in (network.sizes.outer, network.sizes.inner))
    return bx.problem.Calls(outer_gradients=outer, inner_gradients=inner, hessian_products=inner, cross_products=inner)


def evaluations(calls: bx.problem.Calls, share: Sequence[Any]) -> Any:
    """One evaluation is ∇f, ∇_y g, a Hessian and a cross product, a quarter each."""
    return sum(part * number for part, number in zip(share, calls, strict=True)) / len(calls)


def pace(row: Row, network: Network) -> float:
    """Iterations for each one of SLDBO, at most 2: so many that it evaluates no more derivatives."""
    cost = evaluations(row.calls(network), shares(row, network))
    if row.every:
        whole = evaluations(row.calls(network), bx.problem.Calls(0.5, 0.5, 0.5, 0.5))  # one point in place of two
        cost = (whole + (row.every - 1) * cost) / row.every
    return min(MOST_PACE, 1 / cost)

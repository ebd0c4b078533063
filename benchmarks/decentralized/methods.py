"""The methods that every decentralized task compares."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import bilevax as bx
from benchmarks.decentralized.network import Network

REFRESH = (0.5, 0.2, 0.1)
MOMENTUM = 0.4  # α of DSVRBGD, and its η: a = α η² = 0.1
RATE = 0.5
COMPRESSION = {0.3: 0.4, 0.1: 0.2}  # share of the entries that are sent -> step of CHOCO gossip
MOST_PACE = 2.0
ONE = bx.Calls(1, 1, 1, 1)
TWO = bx.Calls(2, 2, 2, 2)
IN_TURN = bx.Calls(1, 2, 1, 1)  # y moves in between


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      name: in lower case, also the name of its files.
      make: `make(network, gossip, step_sizes) -> Algorithm`; the gossip is one, or `Levels` of them.
      calls: the most derivative evaluations of an agent in one iteration.
      batch_size: examples that an evaluation reads of each kind; None for all.
      graphs: `graphs(topologies) -> topologies`, `Levels` of them: what it makes of the graphs.
      at_start: evaluations before the first iteration.
      symmetric: whether it needs a symmetric W.
      fixed: whether it needs one graph for all rounds.
      personal: whether it solves a lower level of each agent's own, and no common one.
    """

    name: str
    make: Callable[[Network, Any, bx.Levels], bx.Algorithm]
    calls: bx.Calls = ONE
    batch_size: int | None = None
    graphs: Callable[[bx.Levels], bx.Levels] = lambda topologies: topologies
    at_start: int = 0
    symmetric: bool = False
    fixed: bool = False
    personal: bool = False


def preset(method: Callable, **settings: Any) -> Callable:
    """`make` of a method that takes a problem, a gossip and step sizes, and these settings."""
    return lambda network, gossip, steps: method(network.problem, gossip, steps, **settings)


def drawn(method: Callable, size: int, **settings: Any) -> Callable:
    """The same for one that draws minibatches."""
    return lambda network, gossip, steps: method(
        network.problem, gossip, steps, sample=network.sample(size), **settings
    )


def compressed(make: Callable, fraction: float) -> Callable:
    """`make` over gossip that sends the largest entries of each change."""
    compression = bx.compression

    def wrapped(network: Network, gossip: Any, steps: bx.Levels) -> bx.Algorithm:
        def one(gossip: bx.Gossip) -> bx.Gossip:
            return compression.choco(gossip, compression.top_k(fraction), COMPRESSION[fraction])

        return make(network, each(one, gossip), steps)

    return wrapped


def each(function: Callable, value: Any) -> Any:
    """Of `Levels`, `function` of all three; or of the one value that holds for all."""
    return bx.Levels(*map(function, value)) if isinstance(value, bx.Levels) else function(value)


def lazy(levels: str) -> Callable[[bx.Levels], bx.Levels]:
    """(I + W)/2 on these levels."""
    return lambda topologies: topologies._replace(
        **{level: bx.topology.lazy(getattr(topologies, level)) for level in levels}
    )


def rows(coins: Callable, size: int) -> tuple[Row, ...]:
    """All methods.

    Args:
      coins: `coins(p)` of S3LDBO.
      size: of a minibatch.

    Returns:
      Those with a common lower level, then those with one of each agent's own.
    """
    methods, correction = bx.decentralized, bx.correction
    reduced = {"momentum": MOMENTUM, "rate": RATE}
    simultaneous = drawn(methods.dsvrbgd_simultaneous, size, **reduced)
    alternating = drawn(methods.dsvrbgd_alternating, size, **reduced)
    exact_diffusion, extra, tracking = correction.exact_diffusion(), correction.extra(), correction.tracking()
    mixed = bx.Levels(tracking, exact_diffusion, exact_diffusion)
    sparkle = functools.partial(preset, methods.sparkle)
    in_turn = functools.partial(Row, calls=IN_TURN)
    dual = functools.partial(in_turn, symmetric=True, fixed=True)
    sampled = functools.partial(Row, batch_size=size)
    return (
        Row("sldbo", preset(methods.sldbo)),
        *(Row(f"s3ldbo-{p:g}", preset(methods.s3ldbo, coins=coins(p)), at_start=1) for p in REFRESH),
        Row("s3ldbo-unbiased-0.2", preset(methods.s3ldbo_unbiased, coins=coins(0.2)), at_start=1),
        sampled("dsvrbgd", simultaneous, TWO),
        sampled("dsvrbgd-alternating", alternating, bx.Calls(2, 4, 2, 2)),
        dual("sparkle-ed", sparkle(corrections=exact_diffusion), graphs=lazy("xyv")),
        dual("sparkle-extra", sparkle(corrections=extra), graphs=lazy("xyv")),
        in_turn("sparkle-gt", sparkle(corrections=tracking)),
        dual("sparkle-mixed", sparkle(corrections=mixed), graphs=lazy("yv")),
        Row("d-soba", preset(methods.dsoba)),
        *(
            Row(f"sldbo-top{fraction:g}", compressed(preset(methods.sldbo), fraction), fixed=True)
            for fraction in COMPRESSION
        ),
        *(
            sampled(f"dsvrbgd-top{fraction:g}", compressed(simultaneous, fraction), TWO, fixed=True)
            for fraction in COMPRESSION
        ),
    )


def names(personal: bool = False) -> tuple[str, ...]:
    """Of all rows for tasks with a common lower level, or for those with personal ones."""
    return tuple(row.name for row in suitable(rows(bx.coins.independent, 1), personal))


def suitable(everything: tuple[Row, ...], personal: bool) -> tuple[Row, ...]:
    """The rows for a common lower level, or for personal ones."""
    return tuple(row for row in everything if row.personal == personal)


def refusal(row: Row, topologies: bx.Levels) -> str | None:
    """Why a row cannot run on these graphs, or None."""
    changing = [one for one in topologies if not isinstance(one, bx.topology.Topology)]
    if row.fixed and changing:
        return "it needs one graph for all rounds"
    if row.symmetric and not all(bx.topology.is_symmetric(one) for one in topologies):
        return "it needs a symmetric W"
    return None


def shares(row: Row, network: Network) -> bx.Calls:
    """What an evaluation reads of an agent's examples, on average, for each kind of derivative; 1 is all of them."""
    if row.batch_size is None:
        return bx.Calls(1.0, 1.0, 1.0, 1.0)
    outer, inner = (row.batch_size / size for size in (network.sizes.outer, network.sizes.inner))
    return bx.Calls(outer_gradients=outer, inner_gradients=inner, hessian_products=inner, cross_products=inner)


def pace(row: Row, network: Network) -> float:
    """Iterations for each one of SLDBO, at most 2: so many that it evaluates no more derivatives."""
    cost = sum(share * calls for share, calls in zip(shares(row, network), row.calls, strict=True)) / len(row.calls)
    return min(MOST_PACE, 1 / cost)

"""Gossip: the only thing that moves information between agents."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import checks
from bilevax.agents import topology as graphs
from bilevax.printing import as_called, by_text
from bilevax.problem import widen
from bilevax.typing import Array, Key, PyTree

Topologies = graphs.Topology | Sequence[graphs.Topology]


class GossipInit(Protocol):
    """The state of one message: () for a fixed matrix; a counter, reference copies or push-sum weights otherwise."""

    def __call__(self, tree: PyTree) -> Any: ...


class Mix(Protocol):
    """One round on leaves [n, ...]."""

    def __call__(self, key: Key | None, state: Any, tree: PyTree) -> tuple[PyTree, Any]: ...


class Bytes(Protocol):
    """What each agent sends to all its neighbours in the next round, float [local]."""

    def __call__(self, state: Any, tree: PyTree) -> Array: ...


class Gossip(NamedTuple):
    """How agents average with their neighbours, on pytrees with leaves [n, ...] (n/devices of them on each device).

    Attributes:
      init: `init(tree) -> state`: () for a fixed matrix; a counter, reference copies or push-sum weights otherwise.
      mix: `mix(key, state, tree) -> (tree, state)`: one round, (W s)_i = Σ_j w_ij s_j, which keeps Σ_i s_i. The state
        belongs to one message: each that an agent sends in an iteration has a state of its own.
      laplacian: `laplacian(key, state, tree) -> (tree, state)`: one round, Σ_j w_ij (s_i − s_j) = ((I − W) s)_i, summed
        edge by edge, so that its rounding errors vanish with the differences.
      mean: `mean(tree) -> tree`: the average over all agents; leaves [...].
      agents: `agents() -> int32 [local]`: the global ids of the agents held here; all n of them on one device.
      bytes: `bytes(state, tree) -> float [local]`: what each agent sends to its neighbours in the next round.
      weights: `weights(state) -> float [local]`, the push-sum weights ω; None where W is doubly stochastic.
      n: the number of agents.
      topology: the graph, or the sequence of graphs, that all this was made of.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> gossip = bx.gossip(bx.topology.ring(4))
        >>> s, _ = gossip.mix(None, gossip.init(jnp.zeros(4)), jnp.array([3.0, 0.0, 0.0, 0.0]))
        >>> [round(float(value), 6) for value in s]
        [1.0, 1.0, 0.0, 1.0]
    """

    init: GossipInit
    mix: Mix
    laplacian: Mix
    mean: Callable[[PyTree], PyTree]
    agents: Callable[[], Array]
    bytes: Bytes
    weights: Callable[[Any], Array | None]
    n: int
    topology: Topologies
    text: str = ""

    def __repr__(self) -> str:
        return by_text(self)

    def weigh(self, state: Any, tree: PyTree) -> PyTree:
        """Z = ω s, what is mixed over a directed graph; s itself where W is doubly stochastic or nothing is mixed."""
        weights = self.weights(state) if jax.tree.leaves(state) else None
        return tree if weights is None else per_agent(jnp.multiply, weights, tree)

    def debias(self, state: Any, tree: PyTree) -> PyTree:
        """S = z / ω, what the agents have; z itself where W is doubly stochastic or nothing is mixed."""
        weights = self.weights(state) if jax.tree.leaves(state) else None
        return tree if weights is None else per_agent(lambda w, leaf: leaf / w, weights, tree)


OnLeaf = Callable[[Array], Array]


class Form(NamedTuple):
    """One matrix as two functions of one leaf [n, ...]: `mix` is W s, `laplacian` is (I − W) s by edge differences."""

    mix: OnLeaf
    laplacian: OnLeaf


@as_called
def gossip(topology: Topologies) -> Gossip:
    """Averaging with the doubly stochastic matrix of a graph, or with a sequence of them in turn.

        s_i ← Σ_j w_ij s_j

    The program follows the structure of the graph: shifts of the agents' axis where few hops describe it (ring, torus,
    grid, hypercube, exponential, ...), one sum over edges where it is large and irregular, and a product with W
    otherwise. All three agree to rounding.

    Args:
      topology: a `Topology`, or a sequence of them that is taken in turn, one for each round.

    Returns:
      `Gossip`; its state is () for one graph and the number of past rounds for a sequence.

    Raises:
      ValueError: if a matrix is not doubly stochastic, if the graph (of a sequence: the union) is not connected, or if
        it is directed and column-stochastic only, which `push_sum` takes.

    Cost: one round; each agent sends its leaves to each neighbour. O(n · hops) work by shifts, O(edges) by edges, O(n²)
    by the matrix.

    Example:
        >>> import bilevax as bx
        >>> bx.gossip(bx.topology.ring(4096)).n
        4096
    """
    sequence = _checked(topology)
    if any(one.directed for one in sequence):
        raise ValueError(
            "topology must be doubly stochastic for gossip; got a directed graph whose columns alone sum to 1. Take "
            "bx.agents.push_sum(topology), which corrects for the rows."
        )
    return _on_one_device(topology)


@as_called
def push_sum(topology: Topologies) -> Gossip:
    """Averaging over a directed graph with a column-stochastic matrix C, each agent knowing its own out-degree alone.

        z⁺ = C z,   ω⁺ = C ω,   s = z / ω          from ω = 1

    What is mixed is z, whose sum is kept; what the agents have is s = `debias(state, z)`, and Σ_i ω_i = n. The engine
    hands z = `weigh(state, s)` to each correction: gradient tracking over push-sum is then Push-DIGing, and plain
    descent is stochastic gradient push.

    Args:
      topology: a `Topology` (directed or not), or a sequence of them that is taken in turn.

    Returns:
      `Gossip` whose state holds the weights ω [n].

    Raises:
      ValueError: if a matrix is not column-stochastic or the graph is not strongly connected; from `laplacian`, which
        exact diffusion and EXTRA need and a directed graph does not have.

    Cost: one round; each agent sends its leaves and one number to each out-neighbour.

    Reference: Nedić, Olshevsky and Shi, "Achieving geometric convergence for distributed optimization over time-varying
    graphs", arXiv 1607.03218 (Push-DIGing).

    Example:
        >>> import bilevax as bx, networkx as nx
        >>> graph = bx.topology.from_graph(nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)]))
        >>> graph.directed, bx.agents.push_sum(graph).n
        (True, 3)
    """
    _checked(topology)
    return with_push_sum(_on_one_device(topology))


def _checked(topology: Topologies) -> tuple[graphs.Topology, ...]:
    graphs.check(topology)
    return (topology,) if isinstance(topology, graphs.Topology) else tuple(topology)


def _on_one_device(topology: Topologies) -> Gossip:
    def mean(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.mean(leaf, 0), tree)

    return assemble(topology, by_structure, lambda n: jnp.arange(n, dtype=jnp.int32), mean)


def assemble(
    topology: Topologies,
    form: Callable[[graphs.Topology], Form],
    agents: Callable[[int], Array],
    mean: Callable[[PyTree], PyTree],
) -> Gossip:
    """A gossip out of the parts that depend on the placement of the agents.

    Args:
      topology: a `Topology` or a sequence of them.
      form: `form(topology) -> Form` on the leaves held here.
      agents: `agents(n) -> int32 [local]`.
      mean: `mean(tree) -> tree` over all agents.

    Returns:
      `Gossip`.
    """
    sequence = (topology,) if isinstance(topology, graphs.Topology) else tuple(topology)
    forms = [form(one) for one in sequence]
    n, period = sequence[0].n, len(sequence)
    out_degrees = np.stack([_out_degrees(one) for one in sequence])

    def init(tree: PyTree) -> Any:
        return () if period == 1 else jnp.zeros((), jnp.int32)

    def round_of(functions: list[OnLeaf]) -> Mix:
        branches = [partial(jax.tree.map, function) for function in functions]

        def apply(key: Key | None, state: Any, tree: PyTree) -> tuple[PyTree, Any]:
            local = len(agents(n))
            checks.agents_axis("tree", tree, local, f"Pass leaves of all agents; bx.replicate(tree, {n}) copies one.")
            checks.floating("tree", tree)
            if period == 1:
                return branches[0](tree), state
            return jax.lax.switch(state % period, branches, tree), state + 1

        return apply

    def sent(state: Any, tree: PyTree) -> Array:
        degrees = jnp.asarray(out_degrees, jnp.float32)[0 if period == 1 else state % period]
        return degrees[agents(n)] * message_bytes(tree)

    return Gossip(
        init,
        round_of([one.mix for one in forms]),
        round_of([one.laplacian for one in forms]),
        mean,
        lambda: agents(n),
        sent,
        lambda state: None,
        n,
        topology,
    )


def with_push_sum(plain: Gossip) -> Gossip:
    """Push-sum over the matrices of `plain`, which are column-stochastic."""

    def init(tree: PyTree) -> Any:
        return plain.init(tree), jnp.ones(plain.agents().shape)

    def mix(key: Key | None, state: Any, tree: PyTree) -> tuple[PyTree, Any]:
        (z, omega), inner = plain.mix(key, state[0], (tree, state[1]))
        return z, (inner, omega)

    def laplacian(key: Key | None, state: Any, tree: PyTree) -> Any:
        raise ValueError(
            "correction must be none or gradient tracking over push-sum; got one that needs a symmetric W (exact "
            "diffusion or EXTRA). Take bx.single_loop.correction.tracking()."
        )

    return plain._replace(
        init=init,
        mix=mix,
        laplacian=laplacian,
        bytes=lambda state, tree: plain.bytes(state[0], (tree, state[1])),
        weights=lambda state: state[1],
    )


def per_agent(function: Callable[[Array, Array], Array], weights: Array, tree: PyTree) -> PyTree:
    """Applies a function of one number for each agent to all that the agents have.

        leaf_i ← function(w_i, leaf_i)

    Args:
      function: `function(weight, leaf)`, elementwise, such as `jnp.multiply`.
      weights: [n], one for each agent held here.
      tree: a pytree of arrays, leaves [n, ...].

    Returns:
      The pytree, shapes and dtypes kept.

    Cost: one pass over the leaves; nothing is sent.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> bx.agents.per_agent(jnp.multiply, jnp.array([1.0, 10.0]), jnp.ones((2, 3))).tolist()
        [[1.0, 1.0, 1.0], [10.0, 10.0, 10.0]]
    """

    def apply(leaf: Array) -> Array:
        return function(_column(weights, leaf), leaf).astype(leaf.dtype)

    return jax.tree.map(apply, tree)


def message_bytes(tree: PyTree) -> float:
    """Bytes of one agent's part of a pytree: what it sends to one neighbour, if it sends all of it as it is.

    `gossip.bytes(state, tree)` is what it sends to all of them.

    Args:
      tree: a pytree of arrays, leaves [n, ...].

    Returns:
      A number.

    Cost: none, only shapes and dtypes are read.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> bx.agents.message_bytes({"w": jnp.zeros((8, 3), "float32"), "b": jnp.zeros(8, "float32")})
        16.0
    """
    return float(sum(leaf.size // leaf.shape[0] * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def _out_degrees(topology: graphs.Topology) -> np.ndarray:
    return np.bincount(graphs.edges(topology)[:, 1], minlength=topology.n)


def by_structure(topology: graphs.Topology) -> Form:
    """The cheapest of `shifts`, `dense` and `sparse` for this graph."""
    n, stored = topology.n, topology.matrix.nnz
    # A shift multiplies n rows, however few have the hop: ring(8) has 3 hops, 24 products for its 24 weights; star(8)
    # has all 8 hops, 64 products for its 22 weights
    number = np.unique(_hops(topology)).size
    if number == 1 or (2 * number <= n and number * n <= 4 * stored):
        return shifts(topology)
    return by_rows(topology, ALL_ROWS)


class HeldRows(NamedTuple):
    """The rows of W held here: those of part `part()` out of `parts`; `gather(leaf)` brings the rows of all agents."""

    parts: int
    part: Callable[[], Any]
    gather: OnLeaf


ALL_ROWS = HeldRows(1, lambda: 0, lambda leaf: leaf)


def by_rows(topology: graphs.Topology, held: HeldRows) -> Form:
    """The cheaper of `dense` and `sparse` for this graph."""
    n = topology.n
    return (dense if n <= 256 or 4 * topology.matrix.nnz > n**2 else sparse)(topology, held)


def dense(topology: graphs.Topology, held: HeldRows = ALL_ROWS) -> Form:
    """A product with W; the Laplacian agent by agent, in O(n) memory."""
    # ring(8) in 4 parts: W as [4, 2, 8], w [2, 8] of this part, its rows `wide` [2, ...], the gathered [8, ...]. The
    # Laplacian takes one w_i [8] and s_i [...] at a time, so that the differences are [8, ...] and never [2, 8, ...].
    matrix = topology.matrix.toarray().reshape(held.parts, -1, topology.n)

    def mix(wide: Array, leaf: Array) -> Array:
        w = jnp.asarray(matrix, wide.dtype)[held.part()]
        return jnp.tensordot(w, widen(held.gather(leaf)), 1, precision=jax.lax.Precision.HIGHEST)

    def laplacian(wide: Array, leaf: Array) -> Array:
        w, every = jnp.asarray(matrix, wide.dtype)[held.part()], widen(held.gather(leaf))
        return jax.lax.map(lambda row: jnp.tensordot(row[0], row[1][None] - every, 1), (w, wide))

    return Form(_wide(mix), _wide(laplacian))


def shifts(topology: graphs.Topology) -> Form:
    """W s = Σ_h w_h ⊙ s_{(i+h) mod n}: one shift of the agents' axis for each hop h of the graph."""
    return shifted(hop_weights(topology), lambda leaf, hop: jnp.roll(leaf, -hop, 0))


def shifted(
    hops: dict[int, np.ndarray], shift: Callable[[Array, int], Array], agents: Callable[[], Array] | None = None
) -> Form:
    """The form by shifts, given `shift(leaf, hop)` that brings row i + hop to row i.

    Args:
      hops: `hop_weights(topology)`.
      shift: how the rows of the agents' axis move.
      agents: `agents() -> ids` of the rows held here; None means all.

    Returns:
      `Form`.
    """

    # ring(8) has the hops 0, 1 and 7, each with the weight 1/3 for all agents: one number. grid(16) has 0, 1, 4, 12 and
    # 15; hop 1 has the weight 0 at the agents 3, 7, 11, 15, who end a row: a column [16, 1] for leaves [16, 2].
    def weight(hop: int, leaf: Array) -> Array:
        weights = hops[hop]
        if (weights == weights[0]).all():
            return jnp.asarray(weights[0], leaf.dtype)
        column = jnp.asarray(weights, leaf.dtype)
        return _column(column if agents is None else column[agents()], leaf)

    def mix(wide: Array, leaf: Array) -> Array:
        terms = (weight(hop, wide) * (widen(shift(leaf, hop)) if hop else wide) for hop in hops)
        return sum(terms, start=jnp.zeros_like(wide))

    def laplacian(wide: Array, leaf: Array) -> Array:
        differences = (weight(hop, wide) * (wide - widen(shift(leaf, hop))) for hop in hops if hop)
        return sum(differences, start=jnp.zeros_like(wide))

    return Form(_wide(mix), _wide(laplacian))


def sparse(topology: graphs.Topology, held: HeldRows = ALL_ROWS) -> Form:
    """One sum over the edges whose receivers are held here; the parts are padded with weights 0 to one length."""
    # star(4) in 2 parts: W has 10 entries, 6 in the rows 0 and 1 of part 0, 4 in the rows 2 and 3 of part 1, which is
    # padded with weights 0 to [2, 6] (part, slot), at its last row so that receivers stay sorted:
    #   receivers (here)  0 0 0 0 1 1    senders (of all)  0 1 2 3 0 1    weights  1/4 1/4 1/4 1/4 1/4 3/4
    #                     0 0 1 1 1 1                      0 2 0 3 3 3             1/4 3/4 1/4 3/4  0   0
    # A round takes one row of these, [6]: s at the senders [6, ...], weighted, summed to the receivers [2, ...].
    matrix, local = topology.matrix, topology.n // held.parts
    starts = matrix.indptr[::local, None]
    slots = starts[:-1] + np.arange(np.diff(starts, axis=0).max())
    inside = slots < starts[1:]
    slots = np.minimum(slots, matrix.nnz - 1)
    receivers = np.where(inside, matrix.tocoo().row[slots] % local, local - 1)
    senders, weights = matrix.indices[slots], np.where(inside, matrix.data[slots], 0.0)

    def edges(leaf: Array) -> tuple[Array, Array, Array]:
        part = held.part()
        to, sent = jnp.asarray(receivers)[part], widen(held.gather(leaf))[jnp.asarray(senders)[part]]
        return to, _column(jnp.asarray(weights, sent.dtype)[part], sent), sent

    def add(to: Array, terms: Array) -> Array:
        return jax.ops.segment_sum(terms, to, local, indices_are_sorted=True)

    def mix(wide: Array, leaf: Array) -> Array:
        to, weight, sent = edges(leaf)
        return add(to, weight * sent)

    def laplacian(wide: Array, leaf: Array) -> Array:
        to, weight, sent = edges(leaf)
        return add(to, weight * (wide[to] - sent))

    return Form(_wide(mix), _wide(laplacian))


def _hops(topology: graphs.Topology) -> np.ndarray:
    coordinates = topology.matrix.tocoo()
    return (coordinates.col.astype(np.int64) - coordinates.row) % topology.n


def hop_weights(topology: graphs.Topology) -> dict[int, np.ndarray]:
    """The weights w_{i, (i+h) mod n} of each agent i [n] by hop h, for the hops that occur in the graph."""
    hops, rows, weights = _hops(topology), topology.matrix.tocoo().row, topology.matrix.tocoo().data
    table = {int(hop): np.zeros(topology.n) for hop in np.unique(hops)}
    for hop, column in table.items():
        column[rows[hops == hop]] = weights[hops == hop]
    return table


def _column(weights: Array, leaf: Array) -> Array:
    return weights.reshape(weights.shape + (1,) * (leaf.ndim - 1))


def _wide(function: Callable[[Array, Array], Array]) -> OnLeaf:
    """Computes in at least float32, so that half-precision leaves keep their mean; they travel as they are."""
    return lambda leaf: function(widen(leaf), leaf).astype(leaf.dtype)


def replicate(tree: PyTree, n: int) -> PyTree:
    """Gives each of n agents its own copy of a pytree: the common start of all agents.

    Args:
      tree: a pytree of arrays or numbers, leaves [...].
      n: number of agents, >= 1.

    Returns:
      The pytree with leaves [n, ...].

    Raises:
      ValueError: if n < 1.

    Cost: n times the memory of the tree.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> bx.replicate({"w": jnp.zeros(3)}, 4)["w"].shape
        (4, 3)
    """
    n = checks.count("n", n, minimum=1)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (n, *jnp.shape(leaf))), tree)

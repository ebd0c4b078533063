"""What every gossip keeps: the mean of the agents, and what it says of itself.

A plain gossip is its matrix, and push-sum the column-stochastic one with its weights; of a compressed one the messages
are its own, and its rounds bring the agents together all the same.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import checks
from bilevax.agents._gossip import Gossip, message_bytes
from bilevax.agents.topology import Topology
from bilevax.testing._contract import Contract, contract, hold_all, name_of
from bilevax.testing.placement import directed, in_turn
from bilevax.testing.trees import same_form, truth
from bilevax.typing import Array, PyTree

__all__ = [
    "CONTRACTS",
    "GossipSubject",
    "agents_and_mean_are_all_of_them",
    "bytes_are_those_to_all_neighbours",
    "check_gossip",
    "laplacian_is_the_rest",
    "mean_is_kept",
    "mixing_is_the_matrix",
    "rounds_approach_the_mean",
    "state_keeps_its_form",
]


def __dir__() -> list[str]:
    return __all__


KEY = jax.random.key(0)
ROUNDS = 60


@dataclasses.dataclass(frozen=True, eq=False)
class GossipSubject:
    """A gossip, and what its contracts read.

    Attributes:
      gossip: a `Gossip` whose agents are all held here.
      compressed: whether its messages are something else than the vectors themselves.
      shrinks: how much closer to consensus the agents are to come in sixty rounds.

    Example:
        >>> import bilevax as bx
        >>> from bilevax import testing
        >>> subject = testing.GossipSubject(bx.gossip(bx.topology.ring(4)))
        >>> subject.rounds[0]["w"].shape
        (61, 4, 3)
    """

    gossip: Gossip
    compressed: bool = False
    shrinks: float = 0.8

    def __post_init__(self) -> None:
        """Raises ValueError unless it is a Gossip."""
        checks.instance("gossip", self.gossip, Gossip, "Make one of a graph, bx.gossip(topology).")

    @functools.cached_property
    def message(self) -> dict[str, Array]:
        """What the agents have at the start."""
        random, n = np.random.default_rng(0), self.gossip.n
        return {"w": jnp.asarray(random.normal(size=(n, 3))), "b": jnp.asarray(random.normal(size=n))}

    @functools.cached_property
    def rounds(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """(what the agents have, weights, bytes) at the start and after each round, leaves [rounds + 1, n, ...]."""

        def record(tree: PyTree, state: Any) -> tuple[PyTree, Array, Array]:
            weights = self.gossip.weights(state)
            weights = jnp.ones(self.gossip.n) if weights is None else weights
            return self.gossip.debias(state, tree), weights, self.gossip.bytes(state, tree)

        def one(carry: tuple[PyTree, Any], k: Array) -> tuple[tuple[PyTree, Any], tuple[PyTree, Array, Array]]:
            tree, state = self.gossip.mix(jax.random.fold_in(KEY, k), carry[1], carry[0])
            return (tree, state), record(tree, state)

        @jax.jit
        def run(tree: PyTree) -> tuple[PyTree, Array, Array]:
            state = self.gossip.init(tree)
            later: Any
            _, later = jax.lax.scan(one, (tree, state), jnp.arange(ROUNDS))
            return jax.tree.map(lambda a, b: jnp.concatenate([jnp.asarray(a)[None], b]), record(tree, state), later)

        return jax.tree.map(np.asarray, run(self.message))

    @property
    def graphs(self) -> list[Topology]:
        """The graphs, taken in turn."""
        return in_turn(self.gossip.topology)

    @property
    def directed(self) -> bool:
        """Whether it is push-sum."""
        return directed(self.gossip.topology)


@contract(
    "Return from mix and laplacian a tree like the one that came in, also in its dtypes, and a state like that of init."
)
def state_keeps_its_form(subject: GossipSubject) -> None:
    """By tracing alone, for leaves in half and in double precision."""
    gossip, tree = subject.gossip, dict(subject.message)
    tree["w"] = tree["w"].astype(jnp.bfloat16)
    state = jax.eval_shape(gossip.init, tree)
    for name in ("mix",) if subject.directed else ("mix", "laplacian"):
        got, after = jax.eval_shape(getattr(gossip, name), KEY, state, tree)
        same_form(f"what {name} returns", got, "what it gets", tree, weak=True)
        same_form(f"the state after {name}", after, "the state of init", state, weak=True)


@contract(
    "What is kept is the sum of what is mixed, Σ ω_i s_i with ω of gossip.weights (None for 1, unless it is push-sum), "
    "and Σ ω_i = n."
)
def mean_is_kept(subject: GossipSubject) -> None:
    """In each of sixty rounds."""
    tree, weights, _ = subject.rounds
    truth(np.allclose(weights.sum(1), subject.gossip.n, rtol=1e-12), f"the weights sum to {weights.sum(1)}")
    for leaf in jax.tree.leaves(tree):
        mean = (weights.reshape(*weights.shape, *[1] * (leaf.ndim - 2)) * leaf).mean(1)
        error = np.abs(mean - mean[0]).max(tuple(range(1, mean.ndim)))
        truth(error.max() < 1e-12, f"the mean is {error.max():.2g} off, first in round {np.argmax(error > 1e-12)}")


@contract(
    "Rounds must bring the agents closer to the mean of the start: over a directed graph gossip.weights says by what "
    "gossip.debias divides."
)
def rounds_approach_the_mean(subject: GossipSubject) -> None:
    """In sixty rounds by a factor."""
    for leaf in jax.tree.leaves(subject.rounds[0]):
        first, last = (np.abs(leaf[k] - leaf[0].mean(0)).max() for k in (0, -1))
        truth(last < subject.shrinks * first, f"from {first:.2g} off the mean of the start to {last:.2g}")


@contract(
    "Mixing is (W s)_i = Σ_j w_ij s_j with the matrix of gossip.topology, the next of a sequence in each round; over a "
    "directed graph that of the sums ω s, and of ω = gossip.weights. If messages are compressed, say compressed=True.",
    applies=lambda subject: not subject.compressed,
)
def mixing_is_the_matrix(subject: GossipSubject) -> None:
    """Leaf by leaf, in each round."""
    tree, weights, _ = subject.rounds
    sums = [weights.reshape(*weights.shape, *[1] * (leaf.ndim - 2)) * leaf for leaf in jax.tree.leaves(tree)]
    for name, leaf in (("ω", weights), *(("what the agents have", leaf) for leaf in sums)):
        for k in range(ROUNDS):
            W = subject.graphs[k % len(subject.graphs)].matrix.toarray()
            error = np.abs(leaf[k + 1] - np.tensordot(W, leaf[k], 1)).max()
            truth(error < 1e-12, f"in round {k} {name} is {error:.2g} off W times that before")


@contract(
    "laplacian is s − W s in one round, summed edge by edge, Σ_j w_ij (s_i − s_j), which vanishes for equal agents.",
    applies=lambda subject: not (subject.compressed or subject.directed),
)
def laplacian_is_the_rest(subject: GossipSubject) -> None:
    """Leaf by leaf; exactly 0 for equal agents."""
    gossip, tree = subject.gossip, subject.message
    equal = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1] / 3, leaf.shape), tree)

    @jax.jit
    def slopes(*trees: PyTree) -> list[PyTree]:
        return [gossip.laplacian(KEY, gossip.init(tree), tree)[0] for tree in trees]

    W = subject.graphs[0].matrix.toarray()
    slope, zero = slopes(tree, equal)
    for got, leaf in zip(jax.tree.leaves(slope), jax.tree.leaves(tree), strict=True):
        error = np.abs(got - (leaf - np.tensordot(W, leaf, 1))).max()
        truth(error < 1e-12, f"laplacian is {error:.2g} off s − W s")
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(zero))
    truth(largest == 0, f"laplacian of equal agents is {largest:.2g}")


@contract("agents are the global ids, int32 [n]; mean is that over all agents, n their number.")
def agents_and_mean_are_all_of_them(subject: GossipSubject) -> None:
    """All agents are held here."""
    gossip = subject.gossip
    ids = gossip.agents()
    truth(ids.dtype == jnp.int32 and np.array_equal(ids, np.arange(gossip.n)), f"agents() is {ids!r}")
    for got, leaf in zip(jax.tree.leaves(gossip.mean(subject.message)), jax.tree.leaves(subject.message), strict=True):
        truth(np.allclose(got, np.asarray(leaf).mean(0), rtol=1e-12), "mean(tree) is not the mean over the agents")


@contract(
    "bytes(state, tree) is what each agent sends in the next round to all its neighbours: to each the bytes of its "
    "leaves (and of its push-sum weight), or those of its compressed message."
)
def bytes_are_those_to_all_neighbours(subject: GossipSubject) -> None:
    """In each round, in the graph of that round; the messages of all agents are equally long."""
    _, weights, sent = subject.rounds
    size = message_bytes(subject.message) + (weights[0].itemsize if subject.directed else 0)
    for k in range(ROUNDS):
        matrix = subject.graphs[k % len(subject.graphs)].matrix.toarray()
        neighbours = ((matrix != 0) & ~np.eye(len(matrix), dtype=bool)).sum(0)
        to_each = sent[k].sum() / neighbours.sum() if subject.compressed else size
        truth(to_each > 0, f"in round {k} nothing is sent")
        expected = neighbours * to_each
        truth(np.allclose(sent[k], expected), f"in round {k} bytes are {sent[k]} in place of {expected}")


CONTRACTS: tuple[Contract, ...] = (
    state_keeps_its_form,
    mean_is_kept,
    rounds_approach_the_mean,
    mixing_is_the_matrix,
    laplacian_is_the_rest,
    agents_and_mean_are_all_of_them,
    bytes_are_those_to_all_neighbours,
)


def check_gossip(
    gossip: Gossip, compressed: bool = False, shrinks: float = 0.8, contracts: Sequence[Contract] = CONTRACTS
) -> None:
    """Checks what every gossip keeps: the mean, consensus in the end, its matrix, and the bytes that it declares.

    Args:
      gossip: a `Gossip` of all agents, over a graph of yours.
      compressed: whether its messages are something else than the vectors themselves; it is not its matrix then.
      shrinks: how much closer to consensus sixty rounds are to bring the agents, a factor.
      contracts: those to be checked, of `bilevax.testing.gossip.CONTRACTS`.

    Raises:
      ContractError: naming the contract that it breaks, what was seen, and what to do.
      ValueError: if gossip is none; or contracts are none, or those of something else.

    Cost: two programs.

    Example:
        >>> import bilevax as bx
        >>> from bilevax import testing
        >>> testing.check_gossip(bx.gossip(bx.topology.ring(4)), contracts=[testing.gossip.mean_is_kept])
    """
    hold_all(contracts, name_of(gossip), GossipSubject(gossip, compressed, shrinks))

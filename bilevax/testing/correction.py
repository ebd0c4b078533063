"""What every correction keeps: the mean of the agents moves along their mean direction, wherever each of them goes.

One level with a dict of two leaves and random directions is followed for twenty updates; and on quadratic losses with
different Hessians, d_i = H_i (s_i − b_i), an unbiased correction ends where their mean vanishes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import checks
from bilevax.agents._gossip import Gossip, Topologies
from bilevax.single_loop._preconditioned import Place
from bilevax.single_loop.correction.correction_type import Correction, Sent
from bilevax.single_loop.engine import Level
from bilevax.testing._contract import Contract, contract, hold_all, name_of
from bilevax.testing.placement import (
    DIRECTED,
    LAZY_RING,
    N,
    directed,
    equal,
    of_four_agents,
    on_one_device,
    on_two_parts,
)
from bilevax.testing.problems._quadratic import PROBLEM
from bilevax.testing.trees import same_form, truth
from bilevax.typing import Array, Key, PyTree

__all__ = [
    "CONTRACTS",
    "CorrectionSubject",
    "bytes_and_rounds_are_those_of_its_messages",
    "check_correction",
    "limit_is_that_of_the_mean_loss",
    "mean_moves_along_the_mean_direction",
    "placement_changes_nothing",
    "state_keeps_its_form",
]


def __dir__() -> list[str]:
    return __all__


KEY = jax.random.key(0)
STEP, UPDATES, LONG = 0.1, 20, 4000
NOWHERE = Place(PROBLEM, None, None)  # a step size that is a number does not ask where


@dataclasses.dataclass(frozen=True, eq=False)
class CorrectionSubject:
    """A correction on a graph, and what its contracts read.

    Attributes:
      correction: a `Correction`.
      topology: a graph of four agents, or several in turn.
      unbiased: whether it is to end where the mean direction vanishes.

    Example:
        >>> import bilevax as bx
        >>> from bilevax import testing
        >>> subject = testing.CorrectionSubject(bx.single_loop.correction.tracking())
        >>> subject.path["w"].shape  # the start and twenty updates
        (21, 4, 3)
    """

    correction: Correction
    topology: Topologies = LAZY_RING
    unbiased: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError unless it is a Correction on graphs of four agents."""
        fix = "Pass the value that a constructor returns, such as bx.single_loop.correction.tracking()."
        checks.instance("correction", self.correction, Correction, fix)
        of_four_agents(self.topology)

    def takes_the_topology(self) -> None:
        """By tracing alone.

        Raises:
          ValueError: if the correction refuses it, although it takes a lazy ring.
        """
        error = _refusal(self.correction, self.topology)
        if error is not None and _refusal(self.correction, LAZY_RING) is None:
            raise ValueError(
                f"topologies must be graphs that the correction takes; got {self.topology!r}, which it refuses: "
                f"{str(error).rstrip('.')}. Pass topologies=[bx.topology.lazy(bx.topology.ring({N}))]."
            ) from error

    @functools.cached_property
    def path(self) -> Any:
        """S at the start and after each update along random directions, leaves [updates + 1, n, ...]."""
        run = functools.partial(_follow, self.correction, on_one_device(self.topology))
        return jax.tree.map(np.asarray, jax.jit(run)(_start(), _directions()))


def _start() -> dict[str, Array]:
    """S of all agents."""
    random = np.random.default_rng(0)
    return {"w": jnp.asarray(random.normal(size=(N, 3))), "b": jnp.asarray(random.normal(size=N))}


def _directions() -> dict[str, Array]:
    """Directions, the agents' axis first, leaves [n, updates, ...]."""
    random = np.random.default_rng(1)
    return {"w": jnp.asarray(random.normal(size=(N, UPDATES, 3))), "b": jnp.asarray(random.normal(size=(N, UPDATES)))}


def _level(correction: Correction, gossip: Gossip) -> Level:
    """A level that moves by −a t, as the engine moves it: over a directed graph with the push-sum weights."""
    return Level("s", gossip, correction, STEP)


def _follow(correction: Correction, gossip: Gossip, s: PyTree, d: PyTree) -> PyTree:
    """S at the start and after each update along d, leaves [n, updates, ...]."""
    level = _level(correction, gossip)

    def update(carry: tuple[PyTree, Any], inputs: tuple[Array, PyTree]) -> tuple[tuple[PyTree, Any], PyTree]:
        (s, state), (k, d) = carry, inputs
        s, state, _ = level.update(jax.random.fold_in(KEY, k), state, s, d, NOWHERE, k)
        return (s, state), s

    first, d = s, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), d)
    carry = s, level.init(s, NOWHERE)
    path: Any
    _, path = jax.lax.scan(update, carry, (jnp.arange(UPDATES), d))
    return jax.tree.map(lambda one, many: jnp.concatenate([one[None], many]), first, path)


def _refusal(correction: Correction, topology: Topologies) -> ValueError | None:
    """What the correction says of a graph that it does not take."""
    level, s = _level(correction, on_one_device(topology)), _start()
    try:
        jax.eval_shape(lambda s: level.update(KEY, level.init(s, NOWHERE), s, s, NOWHERE, 0), s)
    except ValueError as error:
        return error
    return None


@contract(
    "Return from update (s⁺, state, Sent(bytes, rounds)): s⁺ with the shapes and dtypes of s (cast with "
    ".astype(leaf.dtype)), the state in the form in which init made it, and bytes [n]."
)
def state_keeps_its_form(subject: CorrectionSubject) -> None:
    """By tracing alone, for leaves in half and in double precision."""
    level, s = _level(subject.correction, on_one_device(subject.topology)), _start()
    s["w"] = s["w"].astype(jnp.bfloat16)
    state = jax.eval_shape(lambda s: level.init(s, NOWHERE), s)
    new, after, sent = jax.eval_shape(lambda state, s: level.update(KEY, state, s, s, NOWHERE, 0), state, s)
    same_form("the state after an update", after, "the state of init", state, weak=True)
    same_form("s⁺", new, "s", s)
    truth(sent.bytes.shape == (N,), f"bytes have shape {sent.bytes.shape}")


@contract(
    "Every agent's direction must enter the mean once: mean s⁺ = mean s − c a mean d with one c, which is 1 without "
    "damping. Of a tracker, mean t = mean d: t⁺ = W t + d⁺ − d, from t = d at first.",
    applies=lambda subject: not directed(subject.topology),
)
def mean_moves_along_the_mean_direction(subject: CorrectionSubject) -> None:
    """In each of twenty updates along random directions."""
    moved = _flat(jax.tree.map(lambda leaf: np.diff(leaf.mean(1), axis=0), subject.path))
    d = _flat(jax.tree.map(lambda leaf: np.asarray(leaf).mean(0), _directions()))
    share = -(moved[0] @ d[0]) / (STEP * d[0] @ d[0])
    truth(0 < share < 1 + 1e-9, f"the mean moves by {share:.3g} times the step along the mean direction")
    for k in range(UPDATES):
        error = np.abs(moved[k] + share * STEP * d[k]).max()
        truth(error < 1e-10, f"in update {k} the mean is {error:.2g} off the mean direction")


@contract(
    "Where all agents agree and their directions sum to 0, nothing may move: look for a bias of the step size, a wrong "
    "sign, or a correction that forgets. If the correction is meant to be biased, say unbiased=False.",
    applies=lambda subject: subject.unbiased,
)
def limit_is_that_of_the_mean_loss(subject: CorrectionSubject) -> None:
    """Of losses (s − b_i)ᵀH_i (s − b_i) / 2 with diagonal Hessians between 0.5 and 2."""
    random = np.random.default_rng(2)
    H, b = random.uniform(0.5, 2.0, size=(N, 3)), random.normal(size=(N, 3))
    level = _level(subject.correction, on_one_device(subject.topology))

    def update(k: Array, carry: tuple[Array, Any], H: Array, b: Array) -> tuple[Array, Any]:
        s, state = carry
        key = jax.random.fold_in(KEY, k)
        return level.update(key, state, s, H * (s - b), NOWHERE, k)[:2]

    @jax.jit
    def end(s: Array, H: Array, b: Array) -> Array:
        carry = s, level.init(s, NOWHERE)
        return jax.lax.fori_loop(0, LONG, lambda k, carry: update(k, carry, H, b), carry)[0]

    got, expected = np.asarray(end(jnp.zeros((N, 3)), H, b)), (H * b).sum(0) / H.sum(0)
    error = np.nan_to_num(np.abs(got - expected), nan=np.inf).max()
    truth(error < 1e-6, f"after {LONG} updates the agents are {error:.2g} off the minimum of the mean loss")


@contract(
    "Count in bytes what is handed to gossip.mix and gossip.laplacian, by gossip.bytes(state, message), and in rounds "
    "how often they are called in one update: Sent(bytes, rounds); both are returned by the branches of a jax.lax.cond."
)
def bytes_and_rounds_are_those_of_its_messages(subject: CorrectionSubject) -> None:
    """Read off the calls of the gossip in each of twenty updates; branches that are skipped do not call it."""
    gossip = on_one_device(subject.topology)
    sent: list[np.ndarray] = []

    def spied(send: Callable[..., tuple[PyTree, Any]]) -> Callable[..., tuple[PyTree, Any]]:
        def call(key: Key | None, state: Any, tree: PyTree) -> tuple[PyTree, Any]:
            jax.debug.callback(lambda size: sent.append(np.asarray(size)), gossip.bytes(state, tree))
            return send(key, state, tree)

        return call

    level = _level(subject.correction, gossip._replace(mix=spied(gossip.mix), laplacian=spied(gossip.laplacian)))

    @jax.jit
    def update(state: Any, s: PyTree, k: Array) -> tuple[Any, Sent]:
        return level.update(KEY, state, s, s, NOWHERE, k)[1:]

    state = jax.jit(lambda s: level.init(s, NOWHERE))(_start())
    for k in range(UPDATES):
        sent.clear()
        state, got = update(state, _start(), np.int32(k))
        jax.effects_barrier()
        expected = sum(sent, start=np.zeros(N))
        truth(np.allclose(got.bytes, expected), f"bytes are {got.bytes}, and the messages have {expected}")
        truth(got.rounds == len(sent), f"rounds={got.rounds} for {len(sent)} calls in update {k}")


@contract("Let nothing but gossip see more than one agent, and draw with keys into which gossip.agents() is folded.")
def placement_changes_nothing(subject: CorrectionSubject) -> None:
    """Two parts with two agents each, and one with four."""

    def end(gossip: Gossip, s: PyTree, d: PyTree) -> PyTree:
        return jax.tree.map(lambda path: path[-1], _follow(subject.correction, gossip, s, d))

    got = on_two_parts(end, subject.topology, _start(), _directions())
    equal(got, jax.tree.map(lambda path: path[-1], subject.path))


def _flat(tree: PyTree) -> np.ndarray:
    """Leaves [updates, ...] as one matrix [updates, entries]."""
    return np.concatenate([leaf.reshape(UPDATES, -1) for leaf in jax.tree.leaves(tree)], axis=1)


CONTRACTS: tuple[Contract, ...] = (
    state_keeps_its_form,
    bytes_and_rounds_are_those_of_its_messages,
    mean_moves_along_the_mean_direction,
    placement_changes_nothing,
    limit_is_that_of_the_mean_loss,
)


def check_correction(
    correction: Correction,
    unbiased: bool = True,
    topologies: Sequence[Topologies] = (LAZY_RING, DIRECTED),
    contracts: Sequence[Contract] = CONTRACTS,
) -> None:
    """Checks what every correction keeps: its form, where the mean of the agents moves, its limit, and what it sends.

    Args:
      correction: a `Correction`.
      unbiased: whether it ends where the mean of the agents' directions vanishes, although they differ; False for one
        that leaves a bias, such as `bx.single_loop.correction.none()`.
      topologies: graphs of four agents, one after the other: by default a lazy ring and a directed graph, over which
        gossip is push-sum. One that needs a symmetric W gets `[bx.topology.lazy(bx.topology.ring(4))]`.
      contracts: those to be checked, of `bilevax.testing.correction.CONTRACTS`.

    Raises:
      ContractError: naming the contract that it breaks, over which graph, what was seen, and what to do.
      ValueError: if correction is none, or refuses a graph; a graph has other than four agents; topologies or contracts
        are empty, or contracts are those of something else.

    Cost: four programs for each graph.

    Example:
        >>> import bilevax as bx
        >>> from bilevax import testing
        >>> form = testing.correction.state_keeps_its_form
        >>> testing.check_correction(bx.single_loop.correction.tracking(), contracts=[form])
    """
    if not topologies:
        raise ValueError("topologies must hold at least one graph; got none. Leave them out for two that are given.")
    subjects = [CorrectionSubject(correction, topology, unbiased) for topology in topologies]

    def all_are_taken() -> None:
        for subject in subjects:
            subject.takes_the_topology()

    for subject in subjects:
        hold_all(contracts, f"{name_of(correction)} over {subject.topology!r}", subject, all_are_taken)

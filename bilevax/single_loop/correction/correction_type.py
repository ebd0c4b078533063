"""What a correction is: how one level mixes, how it moves along a corrected direction, and what that sends."""

from typing import Any, NamedTuple, Protocol

import jax

from bilevax.agents._gossip import Gossip
from bilevax.printing import by_shape, by_text
from bilevax.typing import Array, Key, PyTree, Scalar


class MoveInit(Protocol):
    """The memory of a step size: moments of an optax transformation, factors of a curvature, or ()."""

    def __call__(self, s: PyTree) -> Any: ...


class MoveApply(Protocol):
    """The displacement along a corrected direction t, −a t for a step size a."""

    def __call__(self, t: PyTree, state: Any, s: PyTree) -> tuple[PyTree, Any]: ...


class Move(NamedTuple):
    """How a corrected direction becomes a displacement: a step size, or an optax transformation for each agent.

    Attributes:
      init: `init(s) -> state`.
      apply: `apply(t, state, s) -> (displacement, state)`, −a t for a step size a.
      linear: True for a step size.

    Example:
        >>> import bilevax as bx
        >>> half = bx.single_loop.correction.Move(lambda s: (), lambda t, state, s: (-0.5 * t, state), linear=True)
        >>> half.apply(2.0, half.init(0.0), 0.0)
        (-1.0, ())
    """

    init: MoveInit
    apply: MoveApply
    linear: bool


class Sent(NamedTuple):
    """What one update sends.

    Attributes:
      bytes: of each agent [n], to all its neighbours together.
      rounds: of communication, one after the other; scalar.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> bx.single_loop.correction.Sent(bytes=jnp.zeros(4), rounds=0).rounds  # a level of one's own
        0
    """

    bytes: Array
    rounds: Scalar


class CorrectionInit(Protocol):
    """The first state, a NamedTuple with the field `gossip`; s and what it is added to have leaves [n, ...]."""

    def __call__(self, gossip: Gossip, s: PyTree, move: Move) -> Any: ...


class CorrectionUpdate(Protocol):
    """One update of a level s along its direction d, at iteration k."""

    def __call__(
        self, key: Key | None, state: Any, gossip: Gossip, s: PyTree, d: PyTree, move: Move, k: Scalar
    ) -> tuple[PyTree, Any, Sent]: ...


class LargestStep(Protocol):
    """The least upper bound of a L over eigenvalues of W [m], up to which steps a are stable on a curvature L."""

    def __call__(self, eigenvalues: Any) -> Scalar: ...


def of_the_mean(eigenvalues: Any) -> Scalar:
    """The bound of descent itself, a L < 2, whatever W is."""
    return 2.0


class Correction(NamedTuple):
    """How one level mixes and moves, as a pair of pure functions.

    It is written for doubly stochastic matrices. Over a directed graph the engine hands it z = ω s in the place of s,
    takes s⁺ = z⁺ / ω⁺ from it, and undoes ω around a nonlinear move: nothing here divides by push-sum weights.

    Attributes:
      init: `init(gossip, s, move) -> state`, a NamedTuple whose field `gossip` is the state of the gossip that mixes s,
        or () where nothing is mixed. Each further message has a gossip state of its own.
      update: `update(key, state, gossip, s, d, move, k) -> (s⁺, state, Sent(bytes [n], rounds))`, at iteration k.
      text: what `print` shows.
      largest_step: `largest_step(eigenvalues)` -> the a L below which a step a is stable on a curvature L, for these
        real eigenvalues of W [m]; 2, that of descent, where nothing is known of W.

    Example:
        >>> import bilevax as bx
        >>> correction = bx.single_loop.correction.tracking_non_atc()
        >>> correction, round(float(correction.largest_step([1.0, -0.5])), 6)
        (tracking_non_atc(), 0.125)
    """

    init: CorrectionInit
    update: CorrectionUpdate
    text: str = ""
    largest_step: LargestStep = of_the_mean

    def __repr__(self) -> str:
        return by_text(self)


class CorrectionState(NamedTuple):
    """What one level remembers: the states of the gossip of s and of its move, and the memory of its correction.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> gossip, move = bx.gossip(bx.topology.ring(4)), bx.single_loop.correction.Move(lambda s: (), None, True)
        >>> bx.single_loop.correction.tracking().init(gossip, jnp.zeros(4), move).memory.last.tolist()
        [0.0, 0.0, 0.0, 0.0]
    """

    gossip: Any
    move: Any
    memory: Any

    def __repr__(self) -> str:
        return by_shape(self)


def damped(rate: Scalar, s: PyTree, new: PyTree) -> PyTree:
    """S + η (s⁺ − s); s⁺ itself where η is the number 1."""
    if isinstance(rate, float | int) and rate == 1:
        return new
    return jax.tree.map(lambda s, new: (s + rate * (new - s)).astype(s.dtype), s, new)

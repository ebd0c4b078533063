"""An estimate on trial, in the numbers of the user, and the place where it is examined, in float64."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevax.carried import carrying, parameters, with_parameters
from bilevax.hypergradients._reference import FlatProblem, flat_problem
from bilevax.problem import Batch, BilevelProblem, Hypergradient
from bilevax.typing import Array, Key, PyTree


class Clock(NamedTuple):
    """The time that is left, and who is told."""

    start: float
    budget: float
    progress: Callable[[str], Any] | None

    def waiting(self, what: str) -> bool:
        """Whether there is time for one more part, which is announced."""
        left = self.start + self.budget - time.monotonic()
        if self.progress is not None:
            self.progress(f"{time.monotonic() - self.start:6.1f} s  {what if left > 0 else f'left out: {what}'}")
        return left > 0


class Patient(NamedTuple):
    """An estimate in the numbers of the user.

    Attributes:
      estimate: jitted, `(key, state, x, batch) -> (grad, state, info)`.
      hypergrad: the estimator.
      key: of the estimate.
      x: outer variable.
      y: the start that was passed.
      batch: all the data.
      state: before the estimate.
      given: whether the state was passed.
      grad: the estimate.
      after: the state after it.
      info: its report.
      others: estimates with other keys.
      wide: whether float64 is on where the user is.
    """

    estimate: Callable[..., Any]
    hypergrad: Hypergradient
    key: Key | None
    x: PyTree
    y: PyTree
    batch: Batch
    state: Any
    given: bool
    grad: PyTree
    after: Any
    info: Any
    others: list[PyTree]
    wide: bool


def double(tree: PyTree) -> PyTree:
    """The tree with every floating-point leaf in float64."""

    def widen(leaf: Any) -> Any:
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return jnp.asarray(np.asarray(leaf, float))
        return leaf

    return jax.tree.map(widen, tree)


def flat(tree: PyTree) -> np.ndarray:
    """The parameters of a y, or a gradient, as one vector in float64."""
    leaves = [np.ravel(np.asarray(leaf, float)) for leaf in jax.tree.leaves(parameters(tree))]
    return np.concatenate(leaves)


class Room(NamedTuple):
    """Where the patient is examined: the problem in float64, and the points of the run."""

    problem: FlatProblem
    losses: BilevelProblem  # of x and the params alone
    unravel: Callable[[Array], PyTree]
    unravel_x: Callable[[Array], PyTree]
    x: PyTree
    batch: Batch
    first: np.ndarray
    last: np.ndarray


def furnished(problem: BilevelProblem, patient: Patient) -> Room:
    """Jits the problem in float64; what y carries stays as it is after the estimate."""
    x, batch, after = double((patient.x, patient.batch, patient.after.y))
    unravel, unravel_x = (ravel_pytree(tree)[1] for tree in (parameters(after), x))
    inner_loss = carrying("inner_loss", problem.inner_loss)

    def inner(x: PyTree, params: PyTree, data: PyTree) -> Array:
        return inner_loss(x, params, after, data)[0]

    def outer(x: PyTree, params: PyTree, data: PyTree) -> Array:
        return problem.outer_loss(x, with_parameters(after, params), data)

    made = flat_problem(outer, inner, unravel, batch, unravel_x)
    points = flat(patient.state.y), flat(patient.after.y)
    return Room(made, BilevelProblem(outer, inner), unravel, unravel_x, x, batch, *points)

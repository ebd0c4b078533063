"""Central differences of F, and of the run of an estimator itself, along a few directions of x."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevax.carried import parameters, with_parameters
from bilevax.problem import Batch, Hypergradient, Loss
from bilevax.typing import Array, Key, PyTree

STEPS = (1e-4, 1e-5, 1e-3, 1e-6)  # of a difference; each coordinate moves in proportion to itself
SMALL = 1e-8  # a change of x that moves F by less than so many times F is lost in rounding

Values = Callable[[np.ndarray], np.ndarray]
"""F at stacked x."""


class Directions(NamedTuple):
    """Where x is moved to.

    Attributes:
      x: flat, [N].
      moves: how far each coordinate moves, [N].
      rows: directions [4, N]: along the estimate; along its difference to the reference, where that decides between
        them; a random one; and the leaves that g does not contain, or a random one.
    """

    x: np.ndarray
    moves: np.ndarray
    rows: np.ndarray

    @classmethod
    def make(cls, x: np.ndarray, grad: np.ndarray, reference: np.ndarray, unread: np.ndarray) -> "Directions":
        """From the estimate, the implicit reference (NaN where there is none), and a mask of leaves."""
        moves = np.where(x == 0, 1.0, np.abs(x))
        random = np.random.default_rng(0).normal(size=(3, x.size)) / math.sqrt(x.size)
        along, apart = (_unit(moves * part) for part in (grad, grad - reference))
        decides = np.linalg.norm(moves * (grad - reference)) > 1e-6 * np.linalg.norm(moves * grad)
        rows = [along + random[0], apart if decides else random[1], random[2], random[1] * unread]
        rows[3] = rows[3] if unread.any() else random[1] + random[2]
        return cls(x, moves, np.stack([_unit(row) for row in rows]) * moves)

    def size(self, gradient: np.ndarray, level: float) -> float:
        """The length of a gradient as these directions see it; no less than what rounding leaves of F."""
        return max(float(np.linalg.norm(self.moves * gradient)), SMALL * abs(level)) or 1.0


def _unit(vector: np.ndarray) -> np.ndarray:
    vector = np.where(np.isfinite(vector), vector, 0.0)
    return vector / (np.linalg.norm(vector) or 1.0)


def measure(
    values: Values, at: Directions, gradient: np.ndarray, size: float, tol: float
) -> tuple[np.ndarray, np.ndarray]:
    """How far central differences along each direction are from those of a gradient, relative to a size.

    Of four steps the one that is nearest counts, for each direction; NaN where F is not finite. Returns the errors and
    the slopes, [4].
    """
    rows = len(at.rows)
    expected = at.rows @ gradient
    best, slopes = np.full(rows, math.nan), np.full(rows, math.nan)
    for step in STEPS:
        found = values(np.concatenate([at.x + step * at.rows, at.x - step * at.rows]))
        slope = (found[:rows] - found[rows:]) / (2 * step)
        errors = np.abs(slope - expected) / np.maximum(size, np.abs(slope))
        nearer = np.isfinite(errors) & ~(errors >= best)
        best, slopes = np.where(nearer, errors, best), np.where(nearer, slope, slopes)
        if np.all(best <= 0.1 * tol):
            break
    return best, slopes


class OwnRun(NamedTuple):
    """The run of an estimator in float64.

    Attributes:
      values: stacked x -> f(x, y_T(x)), each from the state that was given.
      both: the same with the y_T, flat.
      ends: stacked x and y_0 -> y_T, flat.
      gradient: the estimate in float64, flat.
    """

    values: Values
    both: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    ends: Callable[[np.ndarray, np.ndarray], np.ndarray]
    gradient: Callable[[], np.ndarray]


def own_run(hypergrad: Hypergradient, outer_loss: Loss, key: Key | None, state: Any, x: PyTree, batch: Batch) -> OwnRun:
    """Builds the two programs of `OwnRun`; state, x and batch are those of the estimate, widened."""
    flat_y, unravel_y = ravel_pytree(parameters(state.y))
    unravel_x = ravel_pytree(x)[1]
    y = np.asarray(flat_y)

    def moved(state: Any, row: Array) -> Any:
        return state._replace(y=with_parameters(state.y, unravel_y(row)))

    @jax.jit
    def program(xs: Array, ys: Array, state: Any, batch: Batch, key: Key | None) -> tuple[Array, Array]:
        def one(pair: tuple[Array, Array]) -> tuple[Array, Array]:
            x = unravel_x(pair[0])
            after = hypergrad.estimate(key, moved(state, pair[1]), x, batch)[1]
            params = parameters(after.y)  # f is given with what y carries, which no derivative sees
            return outer_loss(x, params, batch.outer), ravel_pytree(params)[0]

        return jax.lax.map(one, (xs, ys))

    def run(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, ends = program(xs, ys, state, batch, key)
        return np.asarray(values), np.asarray(ends)

    def gradient() -> np.ndarray:
        estimate = jax.jit(hypergrad.estimate)
        return np.asarray(ravel_pytree(estimate(key, state, x, batch)[0])[0], float)

    def both(xs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return run(xs, np.tile(y, (len(xs), 1)))

    return OwnRun(lambda xs: both(xs)[0], both, lambda xs, ys: run(xs, ys)[1], gradient)


def widened(state: Any, like: Any) -> Any:
    """The numbers of a state in the dtypes of another one of the same structure."""

    def cast(leaf: Any, target: Any) -> Any:
        return jnp.asarray(leaf, target.dtype) if jnp.issubdtype(jnp.result_type(leaf), jnp.number) else leaf

    return jax.tree.map(cast, state, like)

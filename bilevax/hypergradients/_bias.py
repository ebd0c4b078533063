"""Other systems whose solution an estimate may be: a damped one, a penalized one."""

import math
from collections.abc import Callable

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevax.hypergradients._reference import LocalModel, flat_problem, inner_solution
from bilevax.problem import Batch, BilevelProblem
from bilevax.typing import Array, PyTree

FEW = 3  # numbers of x: fewer are matched by some damping, or some multiplier, whatever they are


def fitted_damping(point: LocalModel, grad: np.ndarray) -> tuple[float, float]:
    """The damping whose implicit hypergradient at this point is nearest to grad, and the distance that is left.

    NaN at an infinite distance where none can be told: some damping always matches one or two numbers, the inverse of a
    large Hessian cannot be damped, and one without positive curvature gives no scale.
    """
    if grad.size < FEW or not point.matrix.size or not point.largest > 0:
        return math.nan, math.inf

    from scipy import optimize  # as long to import as all else of bilevax, and only the doctor needs it

    def distance(log: float) -> float:
        return float(np.linalg.norm(grad - point.hypergradient(point.largest * math.exp(log))))

    found = optimize.minimize_scalar(distance, bounds=(math.log(1e-6), math.log(100)), method="bounded")
    return point.largest * math.exp(found.x), found.fun


def fitted_multiplier(
    losses: BilevelProblem,
    unravel: Callable[[Array], PyTree],
    batch: Batch,
    x: PyTree,
    at: LocalModel,
    grad: np.ndarray,
) -> tuple[float, float]:
    """The multiplier λ of a penalty whose estimate is nearest to grad, and the distance that is left.

        y_λ = argmin_y g + f / λ          P(λ) = ∇_x f(x, y_λ) + λ (∇_x g(x, y_λ) − ∇_x g(x, y*))

    By what it returns alone, so that a penalty of your own is found too: its estimate lies on this curve, whatever its
    type. NaN at an infinite distance for an x of one or two numbers.
    """
    if grad.size < FEW:
        return math.nan, math.inf

    from scipy import optimize

    inner, outer = losses.inner_loss, losses.outer_loss

    def penalized(pair: tuple[PyTree, Array], y: PyTree, data: Batch) -> Array:
        x, weight = pair
        return inner(x, y, data.inner) + weight * outer(x, y, data.outer)

    @jax.jit
    def slopes(x: PyTree, y: Array, data: Batch) -> tuple[Array, Array]:
        parts = ((outer, data.outer), (inner, data.inner))
        f, g = (ravel_pytree(jax.grad(loss)(x, unravel(y), part))[0] for loss, part in parts)
        return f, g

    problem = flat_problem(outer, penalized, unravel, Batch(batch.outer, batch), lambda row: row)
    below = np.asarray(slopes(x, at.y, batch)[1])

    def distance(log: float) -> float:
        pair = (x, np.asarray(math.exp(-log)))
        y = inner_solution(problem, pair, at.y, 1e-10 * math.exp(-log), lambda text: True)
        f, g = map(np.asarray, slopes(x, y, batch))
        return float(np.linalg.norm(grad - (f + math.exp(log) * (g - below))))

    grid = np.log(10.0) * np.arange(-1, 7)
    nearest = float(min(grid, key=distance))
    found = optimize.minimize_scalar(distance, bounds=(nearest - 2.4, nearest + 2.4), method="bounded")
    return math.exp(found.x), found.fun

"""Problems of one machine whose inner solution and hypergradient are known: in closed form, or by dense linear algebra.

    ∇F(x) = ∇_x f − ∇²_xy g [∇²_yy g]⁻¹ ∇_y f      at      y*(x) = argmin_y g(x, y)

All numbers are in double precision, wherever they are made.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevax.problem import Batch, BilevelProblem
from bilevax.typing import Array, PyTree


class Known(NamedTuple):
    """A bilevel problem, a start, and its answers.

    Attributes:
      problem: the two losses.
      x: outer variable to begin with.
      y: inner variable to begin with; not the solution.
      batch: `Batch(outer, inner)`.
      solution: `solution(x) -> y*`, the minimizer of g near y.
      hypergradient: `hypergradient(x) -> ∇F`, a pytree like x.

    Example:
        >>> import jax
        >>> from bilevax import testing
        >>> known = testing.problems.ridge()
        >>> y = known.solution(known.x)
        >>> bool(abs(jax.grad(known.problem.inner_loss, 1)(known.x, y, known.batch.inner)).max() < 1e-6)
        True
    """

    problem: BilevelProblem
    x: PyTree
    y: PyTree
    batch: Batch
    solution: Callable[[PyTree], PyTree]
    hypergradient: Callable[[PyTree], PyTree]


def twice_identity(seed: int = 0) -> Known:
    """A quadratic with ∇²_yy g = 2 I, on which nearly every method is exact.

        g = ‖y − M x‖²          f = ½‖y − b‖² + ½‖x‖²          ∇F = Mᵀ(M x − b) + x

    Args:
      seed: of M and b.

    Returns:
      `Known`, with x [2] and y [3].

    Raises:
      TypeError: if seed is no number.

    Cost: none.

    Example:
        >>> from bilevax import testing
        >>> known = testing.problems.twice_identity()
        >>> known.hypergradient(known.x).shape
        (2,)
    """
    draw = np.random.default_rng(seed).normal
    M, b, x, y = draw(size=(3, 2)), draw(size=3), draw(size=2), draw(size=3)

    def outer_loss(x: PyTree, y: PyTree, b: PyTree) -> Array:
        return 0.5 * jnp.sum((y - b) ** 2) + 0.5 * jnp.sum(x**2)

    def inner_loss(x: PyTree, y: PyTree, M: PyTree) -> Array:
        return jnp.sum((y - M @ x) ** 2)

    problem = BilevelProblem(outer_loss, inner_loss)
    return Known(problem, x, y, Batch(b, M), lambda x: M @ x, lambda x: M.T @ (M @ x - b) + x)


def ridge(seed: int = 0) -> Known:
    """The strength of a ridge regression, tuned on a validation set.

        g = mean (A y − b)² + eˣ ‖y‖²          f = mean (C y − d)²

    Args:
      seed: of the data.

    Returns:
      `Known`, with a scalar x and y [4]; its answers are in closed form.

    Raises:
      TypeError: if seed is no number.

    Cost: one linear system of four equations for each answer.

    Example:
        >>> from bilevax import testing
        >>> testing.problems.ridge().y.shape
        (4,)
    """
    A, b, C, d = _regression(seed)

    def error(y: PyTree, rows: PyTree) -> Array:
        return jnp.mean((rows[0] @ y - rows[1]) ** 2)

    problem = BilevelProblem(
        lambda x, y, rows: error(y, rows), lambda x, y, rows: error(y, rows) + jnp.exp(x) * jnp.sum(y**2)
    )

    def solution(x: PyTree) -> np.ndarray:
        return np.linalg.solve(A.T @ A / len(A) + np.exp(x) * np.eye(4), A.T @ b / len(A))

    def hypergradient(x: PyTree) -> np.ndarray:
        y, hessian = solution(x), 2 * (A.T @ A / len(A) + np.exp(x) * np.eye(4))
        v = np.linalg.solve(hessian, 2 * C.T @ (C @ y - d) / len(C))
        return np.asarray(-2 * np.exp(x) * y @ v)

    return Known(problem, np.asarray(-1.0), np.zeros(4), Batch((C, d), (A, b)), solution, hypergradient)


def logistic(seed: int = 0) -> Known:
    """One strength for each weight of a logistic regression.

        g = mean log(1 + exp(−b · A y)) + ½ Σ exp(x_j) y_j²          f = mean log(1 + exp(−d · C y))

    Args:
      seed: of the data.

    Returns:
      `Known`, with x [4] and y [4]; its answers are found by Newton's method and dense solves.

    Raises:
      TypeError: if seed is no number.

    Cost: one program for all answers.

    Example:
        >>> from bilevax import testing
        >>> known = testing.problems.logistic()
        >>> known.hypergradient(known.x).shape
        (4,)
    """
    A, b, C, d = _regression(seed)

    def error(y: PyTree, rows: PyTree) -> Array:
        return jnp.mean(jax.nn.softplus(-rows[1] * (rows[0] @ y)))

    problem = BilevelProblem(
        lambda x, y, rows: error(y, rows), lambda x, y, rows: error(y, rows) + 0.5 * jnp.sum(jnp.exp(x) * y**2)
    )
    return _dense(problem, np.full(4, -2.0), np.zeros(4), Batch((C, np.sign(d)), (A, np.sign(b))))


def network(seed: int = 0) -> Known:
    """Weights of the examples of a small network with tanh units: nonconvex, and y is a dict.

        g = mean sigmoid(x_i) (net(A_i; y) − b_i)² + 0.05 ‖y‖²          f = mean (net(C; y) − d)²

    Args:
      seed: of the data and of the first y.

    Returns:
      `Known`, with x [20] and y of 15 numbers; its answers belong to the local minimum that Newton's method finds.

    Raises:
      TypeError: if seed is no number.

    Cost: one program for all answers.

    Example:
        >>> from bilevax import testing
        >>> known = testing.problems.network()
        >>> sorted(known.solution(known.x))
        ['first', 'last']
    """
    A, b, C, d = _regression(seed)

    def net(y: PyTree, inputs: PyTree) -> Array:
        return jnp.tanh(inputs @ y["first"]) @ y["last"]

    def outer_loss(x: PyTree, y: PyTree, rows: PyTree) -> Array:
        return jnp.mean((net(y, rows[0]) - rows[1]) ** 2)

    def inner_loss(x: PyTree, y: PyTree, rows: PyTree) -> Array:
        size = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y))
        return jnp.mean(jax.nn.sigmoid(x) * (net(y, rows[0]) - rows[1]) ** 2) + 0.05 * size

    draw = np.random.default_rng(seed + 1).normal
    y = {"first": draw(size=(4, 3)), "last": draw(size=3)}
    return _dense(BilevelProblem(outer_loss, inner_loss), np.zeros(20), y, Batch((C, d), (A, b)))


def _regression(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Twenty rows to train on and ten to validate on."""
    draw = np.random.default_rng(seed).normal
    A, C, truth = draw(size=(20, 4)), draw(size=(10, 4)), draw(size=4)
    return A, A @ truth + 0.5 * draw(size=20), C, C @ truth + 0.5 * draw(size=10)


def _dense(problem: BilevelProblem, x: PyTree, y: PyTree, batch: Batch) -> Known:
    """Answers by 300 steps of gradient descent and 20 of Newton's method, and one dense solve."""
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, y))

    def inner(x: PyTree, flat: PyTree) -> Any:
        return problem.inner_loss(x, unravel(flat), batch.inner)

    @jax.jit
    def answers(x: PyTree) -> tuple[PyTree, PyTree]:
        gradient, hessian = jax.grad(inner, 1), jax.hessian(inner, 1)
        near = jax.lax.fori_loop(0, 300, lambda _, y: y - 0.2 * gradient(x, y), flat)
        y = jax.lax.fori_loop(0, 20, lambda _, y: y - jnp.linalg.solve(hessian(x, y), gradient(x, y)), near)
        f_x, f_y = jax.grad(lambda x, y: problem.outer_loss(x, unravel(y), batch.outer), (0, 1))(x, y)
        v = jnp.linalg.solve(hessian(x, y), f_y)
        cross = jax.grad(lambda x: jnp.vdot(gradient(x, y), v))(x)
        return unravel(y), jax.tree.map(lambda a, b: a - b, f_x, cross)

    def answer(index: int) -> Callable[[PyTree], PyTree]:
        def read(x: PyTree) -> PyTree:
            with jax.enable_x64(True):
                return jax.tree.map(np.asarray, answers(x)[index])

        return read

    return Known(problem, x, y, batch, answer(0), answer(1))

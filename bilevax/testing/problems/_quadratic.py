"""Quadratic losses that differ from agent to agent, and the points that methods go to, by linear algebra alone.

    g_i = yᵀA_i y / 2 − yᵀ(B_i x + c_i)          f_i = yᵀQ_i y / 2 − e_iᵀy + xᵀR_i x / 2 + r_iᵀx + xᵀS_i y

Where agents differ, three problems are easily taken for one another; the point that a method goes to says which of them
it solves.

| point    | lower level                   | inverse Hessian                              |
|----------|-------------------------------|----------------------------------------------|
| `x_star` | one common y, of the mean g_i | that of the mean: the bilevel problem itself |
| `x_l`    | one common y, of the mean g_i | of each agent's own g_i                      |
| `x_p`    | each agent's own y_i          | of each agent's own g_i                      |
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bilevax.problem import Batch, BilevelProblem
from bilevax.typing import Array, PyTree

Invert = Callable[[np.ndarray], np.ndarray]  # of a Hessian, or what a method takes for it


class Quadratic(NamedTuple):
    """The coefficients of n agents (leaves [n, ...]), of one of them, or their average, and what follows from them.

    Attributes:
      A: ∇²_yy g, [n, d_y, d_y].
      B: −∇²_yx g, [n, d_y, d_x].
      c: the linear term of g, [n, d_y].
      Q: ∇²_yy f, [n, d_y, d_y].
      e: the linear term of f in y, [n, d_y].
      R: ∇²_xx f, [n, d_x, d_x].
      r: the linear term of f in x, [n, d_x].
      S: ∇²_xy f, [n, d_x, d_y].

    Example:
        >>> from bilevax.testing import problems
        >>> q = problems.quadratic(0, n=8, dx=2, dy=3)
        >>> q.x_star.shape, q.start[1].shape
        ((2,), (8, 3))
    """

    A: np.ndarray
    B: np.ndarray
    c: np.ndarray
    Q: np.ndarray
    e: np.ndarray
    R: np.ndarray
    r: np.ndarray
    S: np.ndarray

    @property
    def problem(self) -> BilevelProblem:
        """The two losses of one agent; `batch` has the coefficients."""
        return PROBLEM

    @property
    def batch(self) -> Batch:
        """What the losses read, leaves [n, ...]."""
        outer = {name: jnp.asarray(getattr(self, name)) for name in "QeRrS"}
        return Batch(outer=outer, inner={name: jnp.asarray(getattr(self, name)) for name in "ABc"})

    @property
    def start(self) -> tuple[Array, Array]:
        """X and y at the origin, [n, d_x] and [n, d_y]."""
        n, d_y, d_x = self.B.shape
        return jnp.zeros((n, d_x)), jnp.zeros((n, d_y))

    @property
    def mean(self) -> "Quadratic":
        """The average over the agents."""
        return Quadratic(*(leaf.mean(0) for leaf in self))

    @property
    def agents(self) -> list["Quadratic"]:
        """Each agent by itself."""
        return [Quadratic(*leaves) for leaves in zip(*self, strict=True)]

    @property
    def x_star(self) -> np.ndarray:
        """x*, the solution of the problem of the mean losses, [d_x]."""
        return self.solution[0]

    @property
    def x_l(self) -> np.ndarray:
        """Where a method goes that inverts each agent's own Hessian at the common y*(x), [d_x]."""
        return self.local_inverse()

    @property
    def x_p(self) -> np.ndarray:
        """Where a method goes whose agents each have a lower level of their own, [d_x]."""
        return self.personal()

    @property
    def solution(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(x*, y*, v*) of min_x mean f_i(x, y*(x)), y*(x) = argmin mean g_i(x, y), for n agents or a single one."""
        m = self.mean if self.A.ndim == 3 else self
        x = _root(_hypergradient(m, *_lower(m), np.linalg.inv(m.A)))
        y = np.linalg.solve(m.A, m.B @ x + m.c)
        return x, y, np.linalg.solve(m.A, m.Q @ y - m.e + m.S.T @ x)

    def local_inverse(self, inverse: Invert = np.linalg.inv) -> np.ndarray:
        """x_l with `inverse(A_i)` in place of the inverse, such as a truncated series."""
        common = _lower(self.mean)
        return _root(*(_hypergradient(a, *common, inverse(a.A)) for a in self.agents))

    def personal(self, inverse: Invert = np.linalg.inv) -> np.ndarray:
        """x_p with `inverse(A_i)` in place of the inverse, such as a truncated series."""
        return _root(*self.personal_hypergradients(inverse))

    def personal_hypergradients(self, inverse: Invert = np.linalg.inv) -> list[tuple[np.ndarray, np.ndarray]]:
        """(G, h) of each agent's own hypergradient G x + h, with its own lower level and `inverse(A_i)`."""
        return [_hypergradient(a, *_lower(a), inverse(a.A)) for a in self.agents]

    def penalized(self, multiplier: float) -> np.ndarray:
        """x_λ = argmin_x min_y mean f(x, y) + λ (mean g(x, y) − min_z mean g(x, z))."""
        m = self.mean
        inverse = np.linalg.inv(m.Q + multiplier * m.A)
        slope, offset = inverse @ (multiplier * m.B - m.S.T), inverse @ (m.e + multiplier * m.c)
        lower_slope, lower_offset = _lower(m)
        G = m.R + m.S @ slope - multiplier * m.B.T @ (slope - lower_slope)
        return _root((G, m.r + m.S @ offset - multiplier * m.B.T @ (offset - lower_offset)))


def outer_loss(x: PyTree, y: PyTree, b: PyTree) -> Array:
    """F of one agent."""
    return 0.5 * (y @ b["Q"] @ y + x @ b["R"] @ x) - b["e"] @ y + b["r"] @ x + x @ b["S"] @ y


def inner_loss(x: PyTree, y: PyTree, b: PyTree) -> Array:
    """The loss g of one agent."""
    return 0.5 * y @ b["A"] @ y - y @ (b["B"] @ x + b["c"])


PROBLEM = BilevelProblem(outer_loss, inner_loss)


def quadratic(
    seed: int, n: int = 8, dx: int = 2, dy: int = 3, heterogeneity: float = 1.0, indefinite: float = 0.0
) -> Quadratic:
    """Random agents around common coefficients.

    The eigenvalues of the mean of A are about 2 to 4, of its mean R about 1.5 to 3.

    Args:
      seed: of the draw.
      n: number of agents.
      dx: entries of x.
      dy: entries of y.
      heterogeneity: how far the agents are from the common coefficients; 0 makes them alike.
      indefinite: spreads the Hessians A_i (and, less, R_i) of the agents and keeps their mean; at 2.5 most of them have
        negative eigenvalues, and methods that invert an agent's own Hessian break.

    Returns:
      `Quadratic`, leaves [n, ...], in float64.

    Raises:
      ValueError: from numpy, if a size is negative.

    Cost: linear algebra of d_x and d_y.

    Example:
        >>> from bilevax.testing import problems
        >>> import numpy as np
        >>> q = problems.quadratic(0, indefinite=2.5)
        >>> bool(np.linalg.eigvalsh(q.A).min() < -4), bool(np.linalg.eigvalsh(q.mean.A).min() > 2)
        (True, True)
    """
    rng = np.random.default_rng(seed)

    def vary(common: np.ndarray, scale: float) -> np.ndarray:
        return common + heterogeneity * scale * rng.normal(size=(n, *common.shape))

    def definite(d: int, low: float, high: float) -> np.ndarray:
        basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
        common = (basis * np.linspace(low, high, d)) @ basis.T
        noise = vary(np.zeros((d, d)), 0.3)
        return common + noise @ noise.transpose(0, 2, 1)

    def symmetric(d: int, scale: float) -> np.ndarray:
        noise = rng.normal(size=(n, d, d))
        noise = scale * (noise + noise.transpose(0, 2, 1))
        return noise - noise.mean(0)

    return Quadratic(
        A=definite(dy, 2.0, 3.0) + symmetric(dy, indefinite),
        B=vary(rng.normal(size=(dy, dx)), 0.5),
        c=vary(rng.normal(size=dy), 1.0),
        Q=definite(dy, 0.5, 1.5),
        e=vary(rng.normal(size=dy), 1.0),
        R=definite(dx, 1.5, 2.5) + symmetric(dx, 0.3 * indefinite),
        r=vary(rng.normal(size=dx), 1.0),
        S=vary(0.2 * rng.normal(size=(dx, dy)), 0.2),
    )


def four_agents() -> Quadratic:
    """Four agents with one number each, whose iterates can be followed by hand.

    x* = −23/79, y* = 27/79 and v* = −10/79, while x_l = −117/191 and x_p = −137/293.

    Returns:
      `Quadratic`, leaves [4, 1] and [4, 1, 1].

    Cost: nothing.

    Example:
        >>> from bilevax.testing import problems
        >>> round(79 * float(problems.four_agents().x_star[0]), 9)
        -23.0
    """
    scalars = {"c": (0, 1, 2, 1), "e": (1, 3, -1, 1), "r": (-1, 0, 1, 2)}
    matrices = {"A": (1, 2, 3, 4), "B": (1, -1, 2, 0), "Q": (1, 1, 2, 4), "R": (1, 2, 1, 2), "S": (0, 0, 0, 0)}
    leaves = {name: np.array(value, float).reshape(4, 1) for name, value in scalars.items()}
    return Quadratic(**leaves, **{name: np.array(value, float).reshape(4, 1, 1) for name, value in matrices.items()})


def neumann(*, terms: int, step_size: float) -> Callable[[np.ndarray], np.ndarray]:
    """The truncated series c Σ_{j ≤ terms} (I − c A)ʲ, as a function of A, for `Quadratic.local_inverse`.

    Args:
      terms: the number of products with A.
      step_size: c.

    Returns:
      `A -> matrix`, both [d, d].

    Cost: `terms` matrix powers.

    Example:
        >>> from bilevax.testing import problems
        >>> import numpy as np
        >>> problems.neumann(terms=1, step_size=0.25)(np.array([[2.0]])).tolist()
        [[0.375]]
    """
    return partial(_series, terms, step_size)


def _series(terms: int, step: float, A: np.ndarray) -> np.ndarray:
    left = np.eye(len(A)) - step * A
    return step * np.sum([np.linalg.matrix_power(left, j) for j in range(terms + 1)], axis=0)


def _lower(a: Quadratic) -> tuple[np.ndarray, np.ndarray]:
    """(slope, offset) of y*(x) = slope x + offset."""
    return np.linalg.solve(a.A, a.B), np.linalg.solve(a.A, a.c)


def _hypergradient(
    a: Quadratic, slope: np.ndarray, offset: np.ndarray, inverse: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(G, h) of the affine ∇_x f + Bᵀ inverse ∇_y f = G x + h at y = slope x + offset."""
    lift = a.B.T @ inverse
    G = a.R + a.S @ slope + lift @ (a.Q @ slope + a.S.T)
    return G, a.r + a.S @ offset + lift @ (a.Q @ offset - a.e)


def _root(*affine: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Where the mean of G x + h vanishes."""
    G, h = (np.mean(part, axis=0) for part in zip(*affine, strict=True))
    return -np.linalg.solve(G, h)

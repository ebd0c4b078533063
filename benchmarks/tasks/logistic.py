"""Regularized logistic regression in NumPy: the exact value and gradient that the benchmarks report."""

from typing import NamedTuple

import numpy as np
import scipy
from scipy.sparse import csr_matrix, diags
from scipy.special import expit

DENSE = 1000  # unknowns up to which Newton's equation is solved by a factorization


class Examples(NamedTuple):
    """Examples.

    Attributes:
      features: sparse float64 [N, d].
      labels: -1 or 1, float64 [N].
    """

    features: csr_matrix
    labels: np.ndarray


class Exact(NamedTuple):
    """The outer loss at the solved inner problem.

    Attributes:
      value: F(x).
      gradient: ∇F(x) [d].
      y: the inner solution [d].
      residual: ‖∇_y g(x, y)‖ there.
    """

    value: float
    gradient: np.ndarray
    y: np.ndarray
    residual: float


def loss(rows: Examples, y: np.ndarray) -> float:
    """Mean of log(1 + exp(−b aᵀy))."""
    return float(np.mean(np.logaddexp(0, -rows.labels * (rows.features @ y))))


def gradient(rows: Examples, y: np.ndarray) -> np.ndarray:
    """Of the loss, [d]."""
    pull = rows.labels * expit(-rows.labels * (rows.features @ y))
    return -(rows.features.T @ pull) / len(pull)


def solve_newton(rows: Examples, penalty: np.ndarray, y: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Solves (∇² loss(y) + diag(penalty)) v = b: by Cholesky, or by conjugate gradients if there are many unknowns."""
    p = expit(rows.features @ y)
    curvature = p * (1 - p) / len(p)
    if len(y) <= DENSE:
        hessian = (rows.features.T @ diags(curvature) @ rows.features).toarray() + np.diag(penalty)
        return scipy.linalg.solve(hessian, b, assume_a="pos")
    diagonal = rows.features.power(2).T @ curvature + penalty
    root = 1 / np.sqrt(diagonal)  # Jacobi's preconditioner, as a scaling of both sides

    def product(v: np.ndarray) -> np.ndarray:
        v = root * v
        return root * (rows.features.T @ (curvature * (rows.features @ v)) + penalty * v)

    operator = scipy.sparse.linalg.LinearOperator((len(y), len(y)), matvec=product, dtype=float)
    v, _ = scipy.sparse.linalg.cg(operator, root * b, rtol=1e-11, maxiter=10 * len(y))
    return root * v


def exact(
    inner: Examples, outer: Examples, x: np.ndarray, y: np.ndarray, tol: float = 1e-10, steps: int = 100
) -> Exact:
    """Solves the inner problem by Newton's method with backtracking, and differentiates its solution.

        y = argmin_y g(x, y) = loss(inner, y) + ½ Σ_j exp(x_j) y_j²        F(x) = loss(outer, y)
        H v = ∇ loss(outer, y)                                            ∂F/∂x_j = −exp(x_j) y_j v_j

    Args:
      inner: rows to train on.
      outer: rows to validate on.
      x: outer variable [d].
      y: where to start [d].
      tol: wanted ‖∇_y g‖.
      steps: largest number of Newton steps.

    Returns:
      Value, gradient, and how well the inner problem is solved.
    """
    penalty = np.exp(x)

    def slope(y: np.ndarray) -> np.ndarray:
        return gradient(inner, y) + penalty * y

    def value(y: np.ndarray) -> float:
        return loss(inner, y) + penalty @ y**2 / 2

    for _ in range(steps):
        r = slope(y)
        if not np.linalg.norm(r) > tol:
            break
        step, size, decrease = -solve_newton(inner, penalty, y, r), 1.0, 1e-15
        while value(y + size * step) > value(y) * (1 + decrease) + 0.1 * size * (r @ step) and size > 1e-6:
            size /= 2
        y = y + size * step
    v = solve_newton(inner, penalty, y, gradient(outer, y))
    return Exact(loss(outer, y), -penalty * y * v, y, float(np.linalg.norm(slope(y))))

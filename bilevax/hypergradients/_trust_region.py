"""A trust-region method for the doctor's inner problem: Newton steps by conjugate gradients, in one program."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.typing import Array

STEPS = 5  # in one call
INNER = 500  # most products of one step


class Ground(NamedTuple):
    """Where a descent stands.

    Attributes:
      y: the flat inner variable.
      value: g there.
      gradient: ∇_y g there.
      radius: of the ball in which the model is trusted.
      enough: the ‖∇_y g‖ that is small enough.
      done: whether it was reached, or nothing moves any more.
    """

    y: Array
    value: Array
    gradient: Array
    radius: Array
    enough: Array
    done: Array

    @classmethod
    def at(cls, y: np.ndarray, value: Array, gradient: Array, enough: float) -> "Ground":
        """The start of a descent."""
        norm = np.linalg.norm(gradient)
        done = not (np.isfinite(norm) and np.isfinite(value)) or norm <= enough
        return cls(*(jnp.asarray(part) for part in (y, value, gradient, 1.0, enough, done)))

    @property
    def norm(self) -> Array:
        """‖∇_y g‖."""
        return jnp.linalg.norm(self.gradient)


def descend(loss: Callable[[Array], Array], ground: Ground) -> Ground:
    """Some steps of a trust-region method on `loss`; each one minimizes the quadratic model in a ball (Steihaug).

    y ← y + p where loss falls;   radius ← 2 radius where the model was good,   radius / 4 where it was not
    """
    gradient_of = jax.grad(loss)

    def step(_: Array, ground: Ground) -> Ground:
        y, value, gradient, radius, enough, _ = ground
        norm = jnp.linalg.norm(gradient)
        tol = norm * jnp.minimum(0.1, jnp.sqrt(norm / (1 + norm)))
        p, predicted = _steihaug(jax.linearize(gradient_of, y)[1], gradient, radius, tol)
        new_value, new_gradient = jax.value_and_grad(loss)(y + p)
        new_norm = jnp.linalg.norm(new_gradient)
        ratio = (value - new_value) / jnp.where(predicted > 0, predicted, 1)
        # near the minimum g changes by rounding alone: there its gradient is the judge
        level = jnp.abs(value - new_value) <= 1e-13 * (jnp.abs(value) + jnp.abs(new_value))
        good = ((ratio > 1e-3) & (new_value < value)) | (level & (new_norm < norm))
        good = good & jnp.isfinite(new_value + new_norm)
        size = jnp.linalg.norm(p)
        wider = jnp.where((ratio > 0.75) & (size > 0.9 * radius), 2 * radius, radius)
        radius = jnp.where(good & ((ratio > 0.25) | level), wider, 0.25 * jnp.minimum(size, radius))
        y, value, gradient, norm = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (y + p, new_value, new_gradient, new_norm),
            (y, value, gradient, norm),
        )
        still = (size == 0) | (radius < 1e-14 * (1 + jnp.linalg.norm(y)))
        return Ground(y, value, gradient, radius, enough, (norm <= enough) | still)

    def going(carry: tuple[Array, Ground]) -> Array:
        return (carry[0] < STEPS) & ~carry[1].done

    begin = jnp.zeros((), int), ground
    return jax.lax.while_loop(going, lambda carry: (carry[0] + 1, step(*carry)), begin)[1]


class _Solve(NamedTuple):
    """A conjugate-gradient solve of H p = −gradient inside a ball."""

    p: Array
    r: Array  # H p + gradient
    d: Array
    hp: Array
    k: Array
    done: Array


def _steihaug(product: Callable[[Array], Array], gradient: Array, radius: Array, tol: Array) -> tuple[Array, Array]:
    """A step in the ball that lowers the quadratic model, and by how much; to the border along negative curvature."""
    zeros = jnp.zeros_like(gradient)

    def step(s: _Solve) -> _Solve:
        hd = product(s.d)
        curvature, rr = s.d @ hd, s.r @ s.r
        alpha = rr / jnp.where(curvature > 0, curvature, 1)
        far = jnp.linalg.norm(s.p + alpha * s.d) >= radius
        border = (curvature <= 0) | far
        dd, pd, pp = s.d @ s.d, s.p @ s.d, s.p @ s.p
        to_border = (-pd + jnp.sqrt(jnp.maximum(pd**2 + dd * (radius**2 - pp), 0))) / jnp.where(dd > 0, dd, 1)
        alpha = jnp.where(border, to_border, alpha)
        p, hp, r = s.p + alpha * s.d, s.hp + alpha * hd, s.r + alpha * hd
        d = -r + (r @ r) / jnp.where(rr > 0, rr, 1) * s.d
        return _Solve(p, r, d, hp, s.k + 1, border | (jnp.linalg.norm(r) <= tol) | ~jnp.isfinite(alpha))

    def going(s: _Solve) -> Array:
        return (s.k < INNER) & ~s.done

    start = _Solve(zeros, gradient, -gradient, zeros, jnp.zeros((), int), gradient @ gradient == 0)
    end = jax.lax.while_loop(going, step, start)
    return end.p, -(gradient @ end.p + 0.5 * end.p @ end.hp)

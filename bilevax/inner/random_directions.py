"""Random directions in the space of x: what forward gradients and finite differences are taken along.

A `Sampler` draws v_1 ... v_b with E[v vᵀ] = I, so that (1/b) Σ (v_i · u) v_i is an unbiased estimate of any u. With N
the number of entries of x and P = 2ᵏ the next power of two, P >= N, its noise is

    E‖(1/b) Σ (v_i · u) v_i − u‖² = noise ‖u‖²

    sampler       v_i                                                     noise                         exact at
    rademacher    independent signs                                       (N − 1) / b                   N = 1
    gaussian      independent normal entries                              (N + 1) / b                   never
    sphere        uniform on the sphere of radius √N                      (N − 1) / b                   N = 1
    orthogonal    √N times uniformly distributed orthonormal vectors      (N − b) / b                   b = N
    hadamard      random signs times distinct rows of a Hadamard matrix   (N − 1)(P − b) / (b (P − 1))  b = P
    coordinate    √N times distinct unit vectors                          (N − b) / b                   b = N

`rademacher` is the cheapest for few directions. From b > N/8 on take one that repeats nothing: `hadamard`, whose v_i is
a function of the key and i (no factorization, nothing to send where devices share the directions), or `orthogonal`,
which factorizes an N × b matrix. `coordinate` at b = N is plain forward mode, without rounding errors; with fewer, a
single draw of it says little about ‖u‖. Antithetic pairs (v, −v) would give the same product twice.

The formula for Rademacher and Gaussian entries is (N + μ₄ − 2) / b with their fourth moment μ₄ = 1 and 3.

Reference: Shen et al., arXiv 2406.14095, section 3.1 (Rademacher); Flügel et al., arXiv 2410.17764 (orthogonal); Feng,
Wang, arXiv 2205.14737 (orthogonal differences).

Example:
    >>> import bilevax as bx, jax, jax.numpy as jnp
    >>> row = bx.inner.random_directions.hadamard.draw(jax.random.key(0), {"a": jnp.zeros(3), "b": 0.0}, 4)
    >>> V = jax.vmap(row)(jnp.arange(4))
    >>> V["a"].shape, V["b"].shape, float(V["a"][0] @ V["a"][1] + V["b"][0] * V["b"][1])
    ((4, 3), (4,), 0.0)
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from bilevax import checks
from bilevax.meshes import bare
from bilevax.printing import by_text
from bilevax.problem import arrays, wide_dtype, widen
from bilevax.typing import Array, Key, PyTree, Scalar

__all__ = ["Sampler", "coordinate", "gaussian", "hadamard", "orthogonal", "rademacher", "sphere"]


def __dir__() -> list[str]:
    return __all__


Row: TypeAlias = Callable[[Scalar], PyTree]
"""`row(i) -> v_i`."""
_DRAWS, _ENTRIES = 64, 4096


class Draw(Protocol):
    """`draw(key, like, number) -> row`, a function of yours or of this module."""

    def __call__(self, key: Key, like: PyTree, number: int, /) -> Row: ...


class Sampler(NamedTuple):
    """A way to draw b directions v_i with E[v_i v_iᵀ] = I.

    Attributes:
      draw: `draw(key, like, number) -> row`, and `row(i) -> v_i`, a pytree like `like`, for i = 0 ... number − 1, also
        traced: `jax.vmap(row)(jnp.arange(number))` has them all.
      noise: `noise(N, number) -> factor`: E‖(1/b) Σ (v_i · u) v_i − u‖² / ‖u‖² for N entries and b = number.
      text: what `print` shows.

    Example:
        >>> import bilevax as bx
        >>> bx.inner.random_directions.rademacher.noise(641, 16), bx.inner.random_directions.orthogonal.noise(64, 64)
        (40.0, 0.0)
    """

    draw: Draw
    noise: Callable[[int, int], float]
    text: str = ""

    def __repr__(self) -> str:
        return by_text(self)


def _rademacher(key: Key, like: PyTree, number: int) -> Row:
    return lambda i: optax.tree.random_like(jax.random.fold_in(key, i), like, jax.random.rademacher)


def _gaussian(key: Key, like: PyTree, number: int) -> Row:
    return lambda i: optax.tree.random_like(jax.random.fold_in(key, i), like, jax.random.normal)


def _sphere(key: Key, like: PyTree, number: int) -> Row:
    gaussian_row, radius = _gaussian(key, like, number), optax.tree.size(like) ** 0.5

    def row(i: Scalar) -> PyTree:
        v = gaussian_row(i)
        return optax.tree.cast_like(optax.tree.scale(radius / optax.tree.norm(widen(v)), widen(v)), v)

    return row


def _orthogonal(key: Key, like: PyTree, number: int) -> Row:
    size = _at_most("orthogonal", number, optax.tree.size(like))
    flat, unravel = ravel_pytree(like)
    q, r = jnp.linalg.qr(jax.random.normal(key, (size, number), wide_dtype(flat)))
    columns = size**0.5 * q * jnp.sign(jnp.diagonal(r))[None, :]  # without the signs, q is not uniform
    return lambda i: unravel(columns[:, i].astype(flat.dtype))


def _hadamard(key: Key, like: PyTree, number: int) -> Row:
    size = optax.tree.size(like)
    power = _at_most("hadamard", number, _power(size))
    sign_key, row_key = jax.random.split(key)
    flat, unravel = ravel_pytree(like)
    signs = jax.random.rademacher(sign_key, (size,), flat.dtype)
    rows = jax.random.permutation(row_key, jnp.arange(power, dtype=jnp.uint32))[:number]

    def row(i: Scalar) -> PyTree:
        odd = jax.lax.population_count(rows[i] & jnp.arange(size, dtype=jnp.uint32)) & 1
        return unravel(jnp.where(odd == 1, -signs, signs))

    return row


def _coordinate(key: Key, like: PyTree, number: int) -> Row:
    size = _at_most("coordinate", number, optax.tree.size(like))
    flat, unravel = ravel_pytree(like)
    entries = jax.random.permutation(key, size)[:number]
    return lambda i: unravel(jnp.zeros_like(flat).at[entries[i]].set(size**0.5))


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _at_most(name: str, number: int, most: int) -> int:
    if number > most:
        raise ValueError(
            f"directions must be at most {most} with random_directions.{name} and this x; got {number}. "
            f"Pass directions={most}, or take random_directions.rademacher."
        )
    return most


rademacher = Sampler(_rademacher, lambda size, number: (size - 1) / number, "rademacher")
gaussian = Sampler(_gaussian, lambda size, number: (size + 1) / number, "gaussian")
sphere = Sampler(_sphere, lambda size, number: (size - 1) / number, "sphere")
orthogonal = Sampler(_orthogonal, lambda size, number: (size - number) / number, "orthogonal")
hadamard = Sampler(
    _hadamard,
    lambda size, number: (size - 1) * (_power(size) - number) / (number * max(_power(size) - 1, 1)),
    "hadamard",
)
coordinate = Sampler(_coordinate, lambda size, number: (size - number) / number, "coordinate")


def check_sampler(sampler: Sampler, like: PyTree, number: int) -> None:
    """Raises ValueError unless the sampler draws `number` pytrees like `like` of mean square 1.

    The mean square is measured on fixed keys, for samplers of your own; that they are uncorrelated is not.

    Args:
      sampler: what to check.
      like: x, or its shapes.
      number: of directions.

    Raises:
      ValueError: if it is no `Sampler`, cannot draw so many, draws other shapes or dtypes, or has another mean square.

    Cost: for a sampler that is not of this module, about 64 draws.

    Example:
        >>> import bilevax as bx
        >>> bx.inner.random_directions.check_sampler(bx.inner.random_directions.rademacher, 0.5, 8)
    """
    checks.instance("sampler", sampler, Sampler, "Pass, say, bx.inner.random_directions.rademacher.")
    checks.function("sampler.draw", sampler.draw, "key", "like", "number")
    like = arrays(like)

    def first(key: Key, i: Scalar) -> PyTree:
        return sampler.draw(key, bare(like), number)(i)

    fix = "Return from draw(key, like, number) a function row(i) -> v, a pytree like `like`."
    key = jax.random.key(0)
    drawn = jax.eval_shape(first, key, 0)
    checks.same_shapes("v of the sampler", drawn, like, fix)
    for v, leaf in zip(jax.tree.leaves(drawn), jax.tree.leaves(like), strict=True):
        if v.dtype != leaf.dtype:
            raise ValueError(f"v of the sampler must have the dtype of x; got {v.dtype}, expected {leaf.dtype}. {fix}")
    if sampler in (rademacher, gaussian, sphere, orthogonal, hadamard, coordinate):
        return
    draws = max(_DRAWS, -(-_ENTRIES // optax.tree.size(like)))

    def mean_square(key: Key) -> Array:
        rows = jax.vmap(lambda i: optax.tree.norm(widen(first(key, i)), squared=True))
        return rows(jnp.arange(number)).mean()

    measure = jax.jit(lambda key: jax.lax.map(mean_square, jax.random.split(key, draws)))
    try:
        with jax.core.eval_context():  # one program, also while something else is traced
            squares = measure(jax.random.key(0))
    except jax.errors.UnexpectedTracerError:  # the sampler holds a traced array: what it draws is not known yet
        return
    squares = np.asarray(squares, float) / optax.tree.size(like)
    mean, error = squares.mean(), squares.std() / np.sqrt(draws)
    if not abs(mean - 1) <= max(0.1, 8 * error):
        raise ValueError(
            f"sampler must draw entries of mean square 1, E[v vᵀ] = I; got {mean:.3g}. Divide v by {np.sqrt(mean):.3g}."
        )

"""Samplers `sample(key, t, data) -> batch`: what a loss reads at inner step t."""

from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.typing import Array, Key, PyTree, Scalar

__all__ = [
    "Sample",
    "fold",
    "full",
    "minibatch",
    "needed",
    "per_step",
    "split",
]


def __dir__() -> list[str]:
    return __all__


K = TypeVar("K", bound=Key | None)  # a key, or none


class Sample(Protocol):
    """What a sampler is: `sample(key, t, data) -> batch`, a function of yours or of this module, read at step t.

    Example:
        >>> import bilevax as bx
        >>> def in_turn(key, t, data):
        ...     return data[t % len(data)]
        >>> sample: bx.sampling.Sample = in_turn  # as a type checker sees it
        >>> sample(None, 3, [1.0, 2.0])
        2.0
    """

    def __call__(self, key: Key | None, t: Scalar, data: PyTree, /) -> PyTree: ...


def check_key(key: Key | None) -> None:
    """Raises ValueError unless it is one key, or None."""
    if key is not None:
        typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        legacy = getattr(key, "dtype", None) == jnp.uint32
        if not (typed or legacy) or jnp.ndim(key) != legacy:
            what = f"shape {jnp.shape(key)} of {key.dtype}" if typed or legacy else repr(key)
            raise ValueError(
                f"key must be one jax.random.key, or None where nothing is random; got {what}. Pass jax.random.key(0); "
                f"take several keys one by one or under jax.vmap."
            )


def needed(key: Key | None, reason: str) -> Key:
    """The key of something that draws, and so must have one.

    Args:
      key: of `jax.random.key`, or None.
      reason: what draws, for the message.

    Returns:
      The key.

    Raises:
      ValueError: if there is none.

    Cost: none.

    Example:
        >>> import bilevax as bx, jax
        >>> bx.sampling.needed(jax.random.key(0), "a random choice").shape
        ()
    """
    if key is None:
        raise ValueError(f"key must be a jax.random.key for {reason}; got None. Pass key=jax.random.key(0).")
    return key


def split(key: K, number: int) -> list[K]:
    """Splits a key; no key (None) stays none, for what draws nothing.

    Args:
      key: of `jax.random.key`, or None.
      number: of keys.

    Returns:
      A list of `number` keys, or of as many None.

    Raises:
      ValueError: if the key is something else.

    Cost: that of `jax.random.split`.

    Example:
        >>> import bilevax as bx
        >>> bx.sampling.split(None, 2)
        [None, None]
    """
    check_key(key)
    keys: Any = [None] * number if key is None else list(jax.random.split(key, number))
    return keys


def fold(key: K, number: Scalar) -> K:
    """Folds a number into a key; no key (None) stays none, for what draws nothing.

    Args:
      key: of `jax.random.key`, or None.
      number: a whole number, traced or not: an iteration, the number of a use, the id of an agent.

    Returns:
      Another key, or None.

    Cost: that of `jax.random.fold_in`.

    Example:
        >>> import bilevax as bx, jax
        >>> draw = bx.sampling.fold(jax.random.key(0), 1)
        >>> jax.vmap(lambda agent: bx.sampling.fold(draw, agent))(jax.numpy.arange(4)).shape
        (4,)
    """
    folded: Any = None if key is None else jax.random.fold_in(key, number)
    return folded


def full(key: Key | None, t: Scalar, data: PyTree) -> PyTree:
    """All of the data at every step; the default. Needs no key.

    Example:
        >>> import bilevax as bx
        >>> bx.sampling.full(None, 0, [1, 2, 3])
        [1, 2, 3]
    """
    return data


def per_step(key: Key | None, t: Scalar, data: PyTree) -> PyTree:
    """Entry t of leaves stacked [T, ...]; scalars and typed keys pass through. Needs no key.

    A step beyond the stack reads NaN (the most negative number in integer leaves), never the last entry once more.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> float(bx.sampling.per_step(None, 1, jnp.array([3.0, 4.0])))
        4.0
    """

    def entry(leaf: Array) -> Array:
        if jnp.ndim(leaf) == 0:
            return leaf
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):  # which older JAX cannot fill
            return jax.random.wrap_key_data(entry(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        return jnp.asarray(leaf).at[t].get(mode="fill")

    return jax.tree.map(entry, data)


def minibatch(size: int) -> Sample:
    """Draws `size` examples uniformly, with replacement, on the device.

    All leaves of the data share their leading axis [N, ...]; scalars and typed keys pass through untouched. (A dropout
    key that travels along is thus the same at each step: fold t into it in a sampler of your own, or stack T of them
    and use `per_step`.)

    Args:
      size: number of examples in a batch, >= 1.

    Returns:
      `sample(key, t, data) -> batch`, leaves [size, ...].

    Raises:
      ValueError: if size < 1, if the leading axes differ, or, when it draws, if there is no key.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> bx.sampling.minibatch(4)(jax.random.key(0), 0, {"image": jnp.zeros((100, 8)), "l2": 0.1})["image"].shape
        (4, 8)
    """
    size = checks.count("size", size, minimum=1)

    def sample(key: Key | None, t: Scalar, data: PyTree) -> PyTree:
        key = needed(key, "a random sampler")
        lengths = {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(data) if jnp.ndim(leaf)}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"batch must hold at least one example, in arrays with one common leading axis [N, ...]; got "
                f"leading axes {sorted(lengths)}. Give every array one row per example; scalars and keys of "
                f"jax.random.key may travel along."
            )
        rows = jax.random.randint(key, (size,), 0, lengths.pop())
        return jax.tree.map(lambda leaf: leaf if jnp.ndim(leaf) == 0 else jnp.asarray(leaf)[rows], data)

    sample.__name__ = f"minibatch({size})"  # as print shows it
    return sample

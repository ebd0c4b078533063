"""Samplers `sample(key, t, data) -> batch`: what a loss reads at inner step t."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.meshes import entry, rows
from bilevax.typing import Array, Key, PyTree, Scalar

__all__ = [
    "Sample",
    "epochs",
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
_BEGAN: ContextVar[Scalar | None] = ContextVar("_BEGAN", default=None)  # the t at which the running call began


class Sample(Protocol):
    """What a sampler is: `sample(key, t, data) -> batch`, a function of yours or of this module, read at step t.

    Under `bx.hypergradient` t counts the inner steps of all outer steps; what keeps no count (`bx.differentiable`, an
    IHVP) begins at 0. The key is another one at each step.

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


@contextlib.contextmanager
def counted_from(t: Scalar | None) -> Iterator[None]:
    """Within it, `per_step` takes its t for a count of which t here was the first; None where it begins at 0."""
    token = _BEGAN.set(t)
    try:
        yield
    finally:
        _BEGAN.reset(token)


def per_step(key: Key | None, t: Scalar, data: PyTree) -> PyTree:
    """Entry i of leaves stacked [T, ...], at the i-th step of this call; scalars and typed keys pass through.

    Under `bx.hypergradient` t runs on over the outer steps, and each of them brings a stack of its own: there i is t
    less the t at which this outer step began, also in a sampler of yours that calls `per_step` (which has no `jax.jit`
    of its own). Elsewhere i is t. A step beyond the stack reads NaN (the most negative number in integer leaves), never
    the last entry once more. Needs no key.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> float(bx.sampling.per_step(None, 1, jnp.array([3.0, 4.0])))
        4.0
    """
    began = _BEGAN.get()
    row = t if began is None else jnp.maximum(t - began, 0)

    def read(leaf: Array) -> Array:
        if jnp.ndim(leaf) == 0:
            return leaf
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):  # which older JAX cannot fill
            return jax.random.wrap_key_data(read(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        return entry(jnp.asarray(leaf), row)

    return jax.tree.map(read, data)


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
        return _rows(data, jax.random.randint(key, (size,), 0, _length(data)))

    sample.__name__ = f"minibatch({size})"  # as print shows it
    return sample


def epochs(size: int, *, key: Key | None = None, mask: Callable[[PyTree, Array], PyTree] | None = None) -> Sample:
    """Goes through all examples, `size` at a time and without replacement, in a new random order in each epoch.

        epoch, i = divmod(t, batches)          batch = data[permutation(fold(key, epoch))[i · size : (i + 1) · size]]

    A function of t and of its own key alone. (The key that a sampler is called with is not read: solvers draw with
    another one at each step, and an order that changes on the way would miss rows.) So in steps 0, 1, 2, … every
    example comes once in each epoch, also where an epoch ends in the midst of an outer step: under `bx.hypergradient` t
    runs on from one outer step to the next. Where t begins at 0 in each call, as in `bx.differentiable` or with
    `initial=`, each call sees the same first batches.

    Args:
      size: number of examples in a batch, >= 1.
      key: makes the orders; by default `jax.random.key(0)`. May be traced: one for each run under `jax.vmap`.
      mask: `mask(batch, weights) -> batch`, which puts weights [size] of 1 and 0 where the loss reads them. With it the
        last batch of an epoch is filled up by rows of weight 0; without it the rows that fill no batch are left out,
        other ones in each epoch.

    Returns:
      `sample(key, t, data) -> batch`, leaves [size, ...]; scalars and typed keys pass through.

    Raises:
      ValueError: if size < 1, mask is no function, the leading axes differ, or, without mask, there are fewer than
        `size` examples.

    Cost: a random permutation of all N row numbers for each batch.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> sample, data = bx.sampling.epochs(2), jnp.arange(6)
        >>> sorted(row for t in range(3) for row in sample(None, t, data).tolist())
        [0, 1, 2, 3, 4, 5]
        >>> padded = bx.sampling.epochs(4, mask=lambda rows, weights: (rows, weights))
        >>> padded(None, 1, data)[1].tolist()
        [1.0, 1.0, 0.0, 0.0]
    """
    size = checks.count("size", size, minimum=1)
    check_key(key)
    if mask is not None:
        checks.function("mask", mask, "batch", "weights")

    def sample(_: Key | None, t: Scalar, data: PyTree) -> PyTree:
        length = _length(data)
        batches = length // size if mask is None else -(-length // size)
        if not batches:
            raise ValueError(
                f"size of epochs must be at most the {length} examples where there is no mask; got {size}. Pass "
                f"mask=lambda batch, weights: ..., which weighs the rows that fill up a batch by 0."
            )
        epoch, i = jnp.divmod(t, batches)
        order = jax.random.permutation(jax.random.fold_in(jax.random.key(0) if key is None else key, epoch), length)
        places = i * size + jnp.arange(size)
        batch = _rows(data, order[places % length])
        return batch if mask is None else mask(batch, (places < length).astype(float))

    sample.__name__ = f"epochs({size})"  # as print shows it
    return sample


def _length(data: PyTree) -> int:
    """The number N of examples."""
    lengths = {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(data) if jnp.ndim(leaf)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"batch must hold at least one example, in arrays with one common leading axis [N, ...]; got "
            f"leading axes {sorted(lengths)}. Give every array one row per example; scalars and keys of "
            f"jax.random.key may travel along."
        )
    return int(lengths.pop())


def _rows(data: PyTree, places: Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf if jnp.ndim(leaf) == 0 else rows(jnp.asarray(leaf), places), data)

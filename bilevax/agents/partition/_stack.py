"""Stacking the rows of all agents to one length, with weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import checks
from bilevax.agents.partition.deal import check_sizes
from bilevax.typing import PyTree


def pooled(sizes: np.ndarray) -> np.ndarray:
    """Shares n/N for `stack`: the mean over agents of mean_j(w_ij ℓ_ij) is the mean of ℓ over all N rows of all agents.

    With the weights w_ij = n · L / N that `stack` makes of them, the mean of w_ij ℓ_ij over a uniform minibatch of the
    agent's L rows, padding included, is an unbiased estimate of (n/N) Σ_j ℓ_ij, the agent's part of that loss.

    Args:
      sizes: rows of each agent [n].

    Returns:
      The share of the loss that a row of each agent has [n].

    Cost: none.

    Example:
        >>> pooled(np.array([1, 3])).tolist()
        [0.5, 0.5]
    """
    return np.full(len(sizes), len(sizes) / sizes.sum())


def local(sizes: np.ndarray) -> np.ndarray:
    """Shares 1/N_i for `stack`: mean_j(w_ij ℓ_ij) is the mean over the agent's own rows; each agent counts the same.

    With the weights w_ij = L / N_i that `stack` makes of them, the mean of w_ij ℓ_ij over a uniform minibatch of the
    agent's L rows, padding included, is an unbiased estimate of the mean over the agent's own rows.

    Args:
      sizes: rows of each agent [n].

    Returns:
      The share of the loss that a row of each agent has [n].

    Cost: none.

    Example:
        >>> local(np.array([1, 4])).tolist()
        [1.0, 0.25]
    """
    return 1 / sizes


def stack(
    data: PyTree, parts: list[np.ndarray], weigh: Callable[[np.ndarray], np.ndarray] = pooled
) -> tuple[PyTree, np.ndarray]:
    """Stacks the rows of every agent to one length L, with weights that leave nothing out and count nothing twice.

    Agents with fewer than L rows repeat theirs, with weight 0. The weights are for a MEAN over the L rows:

        mean_j(w_ij ℓ_ij) = jnp.mean(weights * losses)          w_ij = L · weigh(sizes)_i, and 0 for padding

    With `pooled` weights the mean of this over the agents is the loss on the undivided data. The same expression on a
    uniform minibatch of the rows, padding included (`bx.sampling.minibatch`), or on a uniform block of them
    (`bx.single_loop.estimator.saga`), is an unbiased estimate of it. (A weighted sum is not: over B of the rows
    it is B/L of that over all on average, while a regularizer beside it stays whole.)

    Args:
      data: arrays with one common leading axis [N, ...].
      parts: rows of each agent, n index arrays that together hold 0, …, N − 1 once each: one item of the list that a
        partition returns.
      weigh: a function (sizes [n]) -> share of the loss that a row of each agent has [n]: `pooled` (n/N) or `local`
        (1/N_i).

    Returns:
      The data with leaves [n, L, ...], where L is the largest number of rows of an agent, and the weights [n, L] in the
      default floating-point dtype of JAX: n · L / N (`pooled`) or L / N_i (`local`), 0 for padding.

    Raises:
      ValueError: if parts are those of several data sets, if an agent has no data, if parts lose or repeat a row, or if
        the leading axes are not N.

    Cost: n · L rows of memory, which is n times the whole data where one agent holds nearly all of it.

    Example:
        >>> data, weights = stack(np.array([5, 6, 7, 8]), [np.array([0]), np.array([2, 1, 3])])
        >>> data.tolist(), weights.tolist()
        ([[5, 5, 5], [7, 6, 8]], [[1.5, 0.0, 0.0], [1.5, 1.5, 1.5]])
    """
    checks.function("weigh", weigh, "sizes")
    parts = _one_set(parts)
    check_sizes([parts], 1)
    sizes = np.array([len(rows) for rows in parts])
    _check_complete(parts, data)
    length = sizes.max()
    rows = np.stack([np.resize(part, length) for part in parts])  # which repeats them
    weights = np.where(np.arange(length) < sizes[:, None], length * weigh(sizes)[:, None], 0)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[rows], data), weights.astype(jnp.result_type(float))


def _one_set(parts: list[Any]) -> list[np.ndarray]:
    nested = any(isinstance(rows, list | tuple) and any(np.ndim(row) for row in rows) for rows in parts)
    arrays = [] if nested else [np.asarray(rows) for rows in parts]
    if not arrays or any(rows.ndim != 1 for rows in arrays):
        got = "a list of lists" if nested else f"shapes {[rows.shape for rows in arrays]}"
        raise ValueError(
            f"parts must be n index arrays of ONE data set; got {got}. Unpack what a partition returns: "
            f"(rows,) = partition(labels), or rows_train, rows_validation = partition(train, validation)."
        )
    return arrays


def _check_complete(parts: list[np.ndarray], data: PyTree) -> None:
    rows = np.sort(np.concatenate(parts))
    if not np.array_equal(rows, np.arange(len(rows))):
        raise ValueError(
            f"parts must hold each of the rows 0, ..., {len(rows) - 1} once; got {len(np.unique(rows))} different rows "
            f"from {rows[0]} to {rows[-1]}. Divide the labels of this very data set."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        if np.shape(leaf)[:1] != (len(rows),):
            raise ValueError(
                f"data must have one row for each of the {len(rows)} rows in parts; got shape {np.shape(leaf)} at "
                f"data{jax.tree_util.keystr(path)}. Divide the labels of this very data set; close over scalars."
            )

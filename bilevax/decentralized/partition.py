"""Partitions of data sets over agents, drawn before training: who holds which rows.

A partition is a function of the labels [N] of one or more data sets. It returns, for each set, a list of n index arrays
that hold every row once. All sets given in one call share one draw, so that the classes of an agent come in the same
proportions in its training and in its validation data:

    train, validation = dirichlet(n=8, alpha=0.1, seed=0)(train_labels, validation_labels)
    (images, labels), weights = stack((train_images, train_labels), train)

The loss of an agent is then jnp.mean(weights * losses), over all of its rows or over a uniform minibatch of them.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from bilevax import checks

__all__ = [
    "classes_per_agent",
    "dirichlet",
    "dirichlet_balanced",
    "iid",
    "local",
    "pooled",
    "quantity_skew",
    "shards",
    "stack",
]

Partition = Callable[..., list[list[np.ndarray]]]
Shares = Callable[
    [np.random.Generator, np.ndarray], np.ndarray
]  # rows of each class [K] -> shares [K, n], rows sum to 1


def iid(n: int, seed: int) -> Partition:
    """Shuffles the rows and gives every agent as many, up to one.

    Args:
      n: number of agents.
      seed: an int >= 0.

    Returns:
      `partition(*labels)`, a list of n index arrays for each set; of the labels it reads the length alone.

    Raises:
      ValueError: if n < 1, or, when it is called, if labels are not one row each or there are fewer rows than agents.

    Cost: one shuffle of the rows.

    Example:
        >>> (parts,) = iid(n=3, seed=0)([0, 0, 1, 1, 1, 1, 1])
        >>> sorted(len(rows) for rows in parts)
        [2, 2, 3]
    """
    n = checks.count("n", n, minimum=1)
    seed = checks.count("seed", seed)
    return lambda *labels: _drawn(_unlabelled(labels), n, seed, lambda rng, counts: np.full((1, n), 1 / n))


def dirichlet(n: int, alpha: float, seed: int) -> Partition:
    """Divides each class in proportions drawn from Dir(α) over the agents: the plain variant, of very unequal sizes.

    α = 0.1 is severe (an agent holds few classes), 0.5 moderate, 5 and more mild. No draw is repeated or changed: an
    agent that is left without data is an error, which `dirichlet_balanced` avoids. Sizes are rounded at random.

    Args:
      n: number of agents.
      alpha: concentration, a number > 0.
      seed: an int >= 0.

    Returns:
      `partition(*labels)`, a list of n index arrays for each set, with the same proportions of each class in all sets.

    Raises:
      ValueError: if n < 1 or alpha <= 0, or, when it is called, if labels are not one row each or an agent gets none.

    Cost: one shuffle of the rows.

    Reference: Hsu, Qi, Brown, "Measuring the effects of non-identical data distribution for federated visual
    classification", arXiv 1909.06335 (who draw proportions over classes; here they are over agents).

    Example:
        >>> (parts,) = dirichlet(n=2, alpha=5.0, seed=0)([0, 0, 0, 0, 1, 1, 1, 1])
        >>> sum(len(rows) for rows in parts)
        8
    """
    n = checks.count("n", n, minimum=1)
    checks.positive("alpha", alpha)
    seed = checks.count("seed", seed)
    return lambda *labels: _drawn(
        labels, n, seed, lambda rng, counts: rng.dirichlet(np.full(n, float(alpha)), len(counts))
    )


def dirichlet_balanced(n: int, alpha: float, seed: int, minimum: int = 10) -> Partition:
    """Divides each class by Dir(α) proportions as NIID-Bench does, so that no agent stays far below the others.

    Class after class, agents that already hold N/n rows or more get nothing, and the others' shares are scaled up; the
    whole draw is repeated until every agent has `minimum` rows in every set. (N counts the rows of all sets.) Results
    differ from those of `dirichlet`.

    Args:
      n: number of agents.
      alpha: concentration, a number > 0.
      seed: an int >= 0.
      minimum: rows that each agent gets at least, in each set; 10 in NIID-Bench.

    Returns:
      `partition(*labels)`, a list of n index arrays for each set, with the same proportions of each class in all sets.

    Raises:
      ValueError: if n < 1, alpha <= 0 or minimum < 1, or, when it is called, if labels are not one row each or each of
        1,000 draws leaves an agent below the minimum.

    Cost: at most 1,000 shuffles of the rows, mostly a few.

    Reference: Li, Diao, Chen, He, "Federated learning on non-IID data silos", arXiv 2102.02079.

    Example:
        >>> (parts,) = dirichlet_balanced(n=2, alpha=0.1, seed=0, minimum=3)([0, 0, 0, 0, 1, 1, 1, 1])
        >>> min(len(rows) for rows in parts) >= 3
        True
    """
    n = checks.count("n", n, minimum=1)
    checks.positive("alpha", alpha)
    seed = checks.count("seed", seed)
    minimum = checks.count("minimum", minimum, minimum=1)

    def shares(rng: np.random.Generator, counts: np.ndarray) -> np.ndarray:
        held, rows = np.zeros(n), []
        for count in counts:
            row = rng.dirichlet(np.full(n, float(alpha))) * (held < counts.sum() / n)
            row = row / row.sum() if row.sum() else np.eye(n)[held.argmin()]
            held += count * row
            rows.append(row)
        return np.stack(rows)

    return lambda *labels: _drawn(labels, n, seed, shares, draws=1000, minimum=minimum)


def classes_per_agent(n: int, classes: int, seed: int) -> Partition:
    """Gives every agent `classes` classes, each divided equally among the agents that hold it.

    Agent after agent takes classes among those that the fewest hold so far, ties broken at random: every class finds a
    holder where n · classes is at least the number of classes. (NIID-Bench draws them freely, and may leave some out.)

    Args:
      n: number of agents.
      classes: number of classes of each agent, >= 1.
      seed: an int >= 0.

    Returns:
      `partition(*labels)`, a list of n index arrays for each set; an agent holds the same classes in all sets.

    Raises:
      ValueError: if n or classes is below 1, or, when it is called, if labels are not one row each, if there are fewer
        classes than an agent is to hold or more than all can hold, or if an agent gets no row.

    Cost: one shuffle of the rows.

    Reference: Li, Diao, Chen, He, "Federated learning on non-IID data silos", arXiv 2102.02079.

    Example:
        >>> (parts,) = classes_per_agent(n=2, classes=1, seed=0)([0, 0, 1, 1, 1])
        >>> sorted(len(rows) for rows in parts)
        [2, 3]
    """
    n = checks.count("n", n, minimum=1)
    classes = checks.count("classes", classes, minimum=1)
    seed = checks.count("seed", seed)

    def shares(rng: np.random.Generator, counts: np.ndarray) -> np.ndarray:
        if not classes <= len(counts) <= n * classes:
            raise ValueError(
                f"classes must let {n} agents hold all {len(counts)} classes, none twice; got {classes}. Pass "
                f"{-(-len(counts) // n)} to {len(counts)}, or dirichlet."
            )
        held = np.zeros((len(counts), n))
        for i in range(n):
            held[np.lexsort((rng.random(len(counts)), held.sum(axis=1)))[:classes], i] = 1
        return held / held.sum(axis=1, keepdims=True)

    return lambda *labels: _drawn(labels, n, seed, shares)


def shards(n: int, shards_per_agent: int = 1) -> Partition:
    """Sorts the rows by label, cuts them into n · shards_per_agent equal pieces, and deals these in turn.

    Agent i gets the pieces i, i + n, i + 2n, …: with one piece each, neighbours in the order hold neighbouring classes.
    Nothing is random. (FedAvg's experiments have two pieces per agent and deal them at random.)

    Args:
      n: number of agents.
      shards_per_agent: number of pieces of each agent, >= 1.

    Returns:
      `partition(*labels)`, a list of n index arrays for each set; the same pieces of the sorted rows in all sets.

    Raises:
      ValueError: if n or shards_per_agent is below 1, or, when it is called, if labels are not one row each or there
        are fewer rows than agents.

    Cost: one sort of the labels.

    Reference: McMahan et al., "Communication-efficient learning of deep networks from decentralized data",
    arXiv 1602.05629.

    Example:
        >>> (parts,) = shards(n=2)([1, 0, 1, 0])
        >>> [rows.tolist() for rows in parts]
        [[1, 3], [0, 2]]
    """
    n = checks.count("n", n, minimum=1)
    shards_per_agent = checks.count("shards_per_agent", shards_per_agent, minimum=1)

    def partition(*labels: Any) -> list[list[np.ndarray]]:
        sets = []
        for array in _arrays(labels):
            pieces = np.array_split(np.argsort(array, kind="stable"), n * shards_per_agent)
            sets.append([np.concatenate(pieces[i::n]) for i in range(n)])
        _check_sizes(sets, 1)
        return sets

    return partition


def quantity_skew(n: int, beta: float, seed: int) -> Partition:
    """Shuffles the rows and gives the agents shares of the whole drawn from Dir(β): unequal sizes, equal distributions.

    Args:
      n: number of agents.
      beta: concentration, a number > 0; small is unequal.
      seed: an int >= 0.

    Returns:
      `partition(*labels)`, a list of n index arrays for each set, with the same shares in all sets; of the labels it
      reads the length alone.

    Raises:
      ValueError: if n < 1 or beta <= 0, or, when it is called, if labels are not one row each or an agent gets none.

    Cost: one shuffle of the rows.

    Reference: Li, Diao, Chen, He, "Federated learning on non-IID data silos", arXiv 2102.02079.

    Example:
        >>> (parts,) = quantity_skew(n=2, beta=5.0, seed=0)([0, 0, 0, 0, 1, 1, 1, 1])
        >>> sum(len(rows) for rows in parts)
        8
    """
    n = checks.count("n", n, minimum=1)
    checks.positive("beta", beta)
    seed = checks.count("seed", seed)
    return lambda *labels: _drawn(
        _unlabelled(labels), n, seed, lambda rng, counts: rng.dirichlet(np.full(n, float(beta)), 1)
    )


def pooled(sizes: np.ndarray) -> np.ndarray:
    """Shares n/N for `stack`: the mean over agents of mean_j(w_ij ℓ_ij) is the mean of ℓ over all N rows of all agents.

    With the weights w_ij = n · L / N that `stack` makes of them, the mean of w_ij ℓ_ij over a uniform minibatch of the
    agent's L rows, padding included, is an unbiased estimate of (n/N) Σ_j ℓ_ij, the agent's part of that loss.

    Args:
      sizes: rows of each agent [n].

    Returns:
      The share of the loss that a row of each agent has [n].

    Raises:
      (nothing)

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

    Raises:
      (nothing)

    Cost: none.

    Example:
        >>> local(np.array([1, 4])).tolist()
        [1.0, 0.25]
    """
    return 1 / sizes


def stack(
    data: chex.ArrayTree, parts: list[np.ndarray], weigh: Callable[[np.ndarray], np.ndarray] = pooled
) -> tuple[chex.ArrayTree, np.ndarray]:
    """Stacks the rows of every agent to one length L, with weights that leave nothing out and count nothing twice.

    Agents with fewer than L rows repeat theirs, with weight 0. The weights are for a MEAN over the L rows:

        mean_j(w_ij ℓ_ij) = jnp.mean(weights * losses)          w_ij = L · weigh(sizes)_i, and 0 for padding

    With `pooled` weights the mean of this over the agents is the loss on the undivided data. The same expression on a
    uniform minibatch of the rows, padding included (`bx.inner.minibatch`), or on a uniform block of them
    (`bx.estimator.saga`), is an unbiased estimate of it. (A weighted sum is not: over B of the rows
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
    _check_sizes([parts], 1)
    sizes = np.array([len(rows) for rows in parts])
    _check_complete(parts, data)
    length = sizes.max()
    rows = np.stack([np.resize(part, length) for part in parts])  # which repeats them
    weights = np.where(np.arange(length) < sizes[:, None], length * weigh(sizes)[:, None], 0)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[rows], data), weights.astype(jnp.result_type(float))


def _drawn(
    labels: tuple, n: int, seed: int, shares: Shares, draws: int = 1, minimum: int = 1
) -> list[list[np.ndarray]]:
    """Deals the rows of each class by shares, the same in all sets; draws again while an agent has too few."""
    arrays = _arrays(labels)
    rng = np.random.default_rng(seed)
    classes, codes = np.unique(np.concatenate(arrays), return_inverse=True)
    of_set = np.split(codes, np.cumsum([len(array) for array in arrays])[:-1])
    for _ in range(draws):
        matrix = shares(rng, np.bincount(codes, minlength=len(classes)))
        sets = [_dealt(rng, code, matrix) for code in of_set]
        if min(len(rows) for parts in sets for rows in parts) >= minimum:
            break
    _check_sizes(sets, minimum)
    return sets


def _dealt(rng: np.random.Generator, codes: np.ndarray, shares: np.ndarray) -> list[np.ndarray]:
    """Cuts the shuffled rows of each class by its shares; sizes are rounded at random, and right in expectation."""
    parts: list[list[np.ndarray]] = [[] for _ in range(shares.shape[1])]
    for label, share in enumerate(shares):
        rows = rng.permutation(np.flatnonzero(codes == label))
        ends = np.cumsum(share) / share.sum() * len(rows)
        cuts = np.floor(ends + rng.random()).astype(int)[:-1]
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


def _unlabelled(labels: tuple) -> tuple:
    return tuple(np.zeros(len(array), int) for array in _arrays(labels))


def _arrays(labels: tuple) -> list[np.ndarray]:
    arrays = [np.asarray(array) for array in labels]
    if not arrays or any(array.ndim != 1 or not len(array) for array in arrays):
        raise ValueError(
            f"labels must be one or more arrays [N] with one label per row; got shapes {[a.shape for a in arrays]}. "
            f"Pass, say, train_labels, validation_labels; of one-hot labels pass .argmax(axis=1)."
        )
    return arrays


def _one_set(parts: list) -> list[np.ndarray]:
    nested = any(isinstance(rows, list | tuple) and any(np.ndim(row) for row in rows) for rows in parts)
    arrays = [] if nested else [np.asarray(rows) for rows in parts]
    if not arrays or any(rows.ndim != 1 for rows in arrays):
        got = "a list of lists" if nested else f"shapes {[rows.shape for rows in arrays]}"
        raise ValueError(
            f"parts must be n index arrays of ONE data set; got {got}. Unpack what a partition returns: "
            f"(rows,) = partition(labels), or rows_train, rows_validation = partition(train, validation)."
        )
    return arrays


def _check_sizes(sets: list[list[np.ndarray]], minimum: int) -> None:
    for number, parts in enumerate(sets):
        for agent, rows in enumerate(parts):
            if len(rows) < minimum:
                what = "no data" if len(rows) == 0 else f"{len(rows)} rows"
                raise ValueError(
                    f"agent {agent} of {len(parts)} gets {what} of data set {number}; expected {minimum} rows or more. "
                    f"Take a larger alpha or beta, dirichlet_balanced(..., minimum=...), fewer agents or another seed; "
                    f"where a minimum above 1 was asked for, a smaller one."
                )


def _check_complete(parts: list[np.ndarray], data: chex.ArrayTree) -> None:
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

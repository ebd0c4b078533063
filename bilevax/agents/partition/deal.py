"""Dealing the rows of data sets to agents."""

from collections.abc import Callable
from typing import Any

import numpy as np

from bilevax import checks

Partition = Callable[..., list[list[np.ndarray]]]
Shares = Callable[
    [np.random.Generator, np.ndarray], np.ndarray
]  # rows of each class [K] -> shares [K, n], rows sum to 1


def iid(n: int, *, seed: int) -> Partition:
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


def dirichlet(n: int, *, alpha: float, seed: int) -> Partition:
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


def dirichlet_balanced(n: int, *, alpha: float, seed: int, minimum: int = 10) -> Partition:
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


def classes_per_agent(n: int, *, classes: int, seed: int) -> Partition:
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


def shards(n: int, *, shards_per_agent: int = 1) -> Partition:
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
        check_sizes(sets, 1)
        return sets

    return partition


def quantity_skew(n: int, *, beta: float, seed: int) -> Partition:
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


def _drawn(
    labels: tuple[Any, ...], n: int, seed: int, shares: Shares, draws: int = 1, minimum: int = 1
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
    check_sizes(sets, minimum)
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


def _unlabelled(labels: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(np.zeros(len(array), int) for array in _arrays(labels))


def _arrays(labels: tuple[Any, ...]) -> list[np.ndarray]:
    arrays = [np.asarray(array) for array in labels]
    if not arrays or any(array.ndim != 1 or not len(array) for array in arrays):
        raise ValueError(
            f"labels must be one or more arrays [N] with one label per row; got shapes {[a.shape for a in arrays]}. "
            f"Pass, say, train_labels, validation_labels; of one-hot labels pass .argmax(axis=1)."
        )
    return arrays


def check_sizes(sets: list[list[np.ndarray]], minimum: int) -> None:
    """Raises ValueError unless every agent gets so many rows of every data set."""
    for number, parts in enumerate(sets):
        for agent, rows in enumerate(parts):
            if len(rows) < minimum:
                what = "no data" if len(rows) == 0 else f"{len(rows)} rows"
                raise ValueError(
                    f"agent {agent} of {len(parts)} gets {what} of data set {number}; expected {minimum} rows or more. "
                    f"Take a larger alpha or beta, dirichlet_balanced(..., minimum=...), fewer agents or another seed; "
                    f"where a minimum above 1 was asked for, a smaller one."
                )

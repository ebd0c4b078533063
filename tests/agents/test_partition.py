"""Partitions of data sets over agents: nothing lost, nothing doubled, and skewed as they say."""

import itertools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax.agents import partition
from bilevax.agents.partition import deal

LABELS = np.random.default_rng(0).integers(0, 10, 1000)
VALIDATION = np.random.default_rng(1).integers(0, 10, 400)
PARTITIONS = {
    "iid": partition.iid(8, seed=0),
    "dirichlet": partition.dirichlet(8, alpha=1.0, seed=0),
    "dirichlet_balanced": partition.dirichlet_balanced(8, alpha=0.1, seed=0),
    "classes_per_agent": partition.classes_per_agent(8, classes=2, seed=0),
    "shards": partition.shards(8, shards_per_agent=2),
    "quantity_skew": partition.quantity_skew(8, beta=1.0, seed=1),
}


def counts(labels, parts):
    """Rows of each class [n, K]."""
    return np.stack([np.bincount(labels[rows], minlength=10) for rows in parts])


def entropy(counts):
    """Mean over the agents of the entropy of their classes, in nats."""
    p = counts / counts.sum(axis=1, keepdims=True)
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(axis=1).mean()


def attempt(split, labels):
    """The parts of one set, or None where an agent is left without data, which the message has to say."""
    try:
        return split(labels)[0]
    except ValueError as error:
        if not re.search(r"agent \d of \d gets no data of data set 0", str(error)):
            raise
        return None


@pytest.mark.parametrize("split", PARTITIONS.values(), ids=PARTITIONS)
def test_every_row_is_held_once_in_every_set(split):
    for labels, parts in zip((LABELS, VALIDATION), split(LABELS, VALIDATION), strict=True):
        assert len(parts) == 8
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))


@hypothesis.settings(deadline=None, max_examples=30, derandomize=True)
@hypothesis.given(
    labels=st.lists(st.integers(-3, 3), min_size=12, max_size=40),
    n=st.integers(1, 4),
    skew=st.floats(0.05, 50),
    seed=st.integers(0, 2**40),
)
def test_nothing_is_lost_or_doubled(labels, n, skew, seed):
    classes = len(set(labels))
    for split in (
        partition.iid(n, seed=seed),
        partition.dirichlet(n, alpha=skew, seed=seed),
        partition.dirichlet_balanced(n, alpha=skew, seed=seed, minimum=1),
        partition.classes_per_agent(n, classes=-(-classes // n), seed=seed),
        partition.shards(n, shards_per_agent=3),
        partition.quantity_skew(n, beta=skew, seed=seed),
    ):
        parts = attempt(split, labels)
        if parts is None:
            continue
        data, weights = partition.stack(np.arange(len(labels)), parts)
        held = [row.tolist() for row in data]
        assert sorted(j for row, part in zip(held, parts, strict=True) for j in row[: len(part)]) == [
            *range(len(labels))
        ]
        assert all(set(row) == set(part.tolist()) for row, part in zip(held, parts, strict=True))
        assert [int((row > 0).sum()) for row in weights] == [len(part) for part in parts]


@pytest.mark.parametrize("split", PARTITIONS.values(), ids=PARTITIONS)
def test_a_call_repeats_itself(split):
    for first, second in zip(split(LABELS), split(LABELS), strict=True):
        for one, other in zip(first, second, strict=True):
            np.testing.assert_array_equal(one, other)


SEEDED = {
    "iid": partition.iid,
    "dirichlet": lambda n, seed: partition.dirichlet(n, alpha=1.0, seed=seed),
    "dirichlet_balanced": lambda n, seed: partition.dirichlet_balanced(n, alpha=1.0, seed=seed),
    "classes_per_agent": lambda n, seed: partition.classes_per_agent(n, classes=2, seed=seed),
    "quantity_skew": lambda n, seed: partition.quantity_skew(n, beta=1.0, seed=seed),
}


@pytest.mark.parametrize("make", SEEDED.values(), ids=SEEDED)
def test_another_seed_is_another_partition(make):
    (first,), (second,) = (make(8, seed=seed)(LABELS) for seed in (0, 1))
    assert any(not np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def test_iid_is_even_and_mixed():
    (parts,) = partition.iid(8, seed=0)(LABELS[:-3])
    assert sorted({len(rows) for rows in parts}) == [124, 125]
    assert entropy(counts(LABELS, parts)) > 0.97 * np.log(10)


def test_dirichlet_is_the_more_skewed_the_smaller_alpha():
    def mean_entropy(make, alpha):
        return np.mean([entropy(counts(LABELS, make(8, alpha=alpha, seed=seed)(LABELS)[0])) for seed in range(5, 10)])

    for make in (partition.dirichlet, partition.dirichlet_balanced):
        severe, moderate, mild = (mean_entropy(make, alpha) for alpha in (0.2, 1.0, 10.0))
        assert severe + 0.2 < moderate
        assert moderate + 0.2 < mild < np.log(10)


@pytest.mark.parametrize("name", ["dirichlet", "dirichlet_balanced", "classes_per_agent", "quantity_skew"])
def test_sets_of_one_call_share_their_proportions(name):
    """Counts are shares times rows, rounded: with a doubled set every count is doubled up to rounding."""
    twice = np.concatenate([LABELS, LABELS])
    one, two = PARTITIONS[name](LABELS, twice)
    if name == "quantity_skew":
        deviation = np.array([len(rows) for rows in two]) - 2 * np.array([len(rows) for rows in one])
    else:
        deviation = counts(twice, two) - 2 * counts(LABELS, one)
    assert np.abs(deviation).max() <= 3
    assert any(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_sizes_are_rounded_without_bias():
    """Three rows for eight agents: each gets one in 3/8 of the draws, the last as often as the first."""
    share = np.full((1, 8), 1 / 8)
    rng = np.random.default_rng(0)
    draws = np.array([[len(rows) for rows in deal._dealt(rng, np.zeros(3, int), share)] for _ in range(2000)])
    np.testing.assert_allclose(draws.mean(axis=0), 3 / 8, atol=4 * np.sqrt(3 / 8 * 5 / 8 / 2000))


def test_balanced_dirichlet_keeps_its_minimum_in_every_set():
    split = partition.dirichlet_balanced(8, alpha=0.1, seed=3, minimum=15)
    assert min(len(rows) for parts in split(LABELS, VALIDATION) for rows in parts) >= 15
    (plain,) = partition.dirichlet(8, alpha=0.1, seed=3)(LABELS)
    (balanced,) = split(LABELS)
    assert max(map(len, balanced)) < max(map(len, plain))


def test_classes_per_agent_counts():
    for n, classes, holders in ((8, 2, {1, 2}), (10, 3, {3}), (4, 3, {1, 2})):
        for labels, parts in zip(
            (LABELS, VALIDATION),
            partition.classes_per_agent(n, classes=classes, seed=0)(LABELS, VALIDATION),
            strict=True,
        ):
            held = counts(labels, parts) > 0
            assert (held.sum(axis=1) == classes).all()
            assert set(held.sum(axis=0).tolist()) == holders
    train, validation = partition.classes_per_agent(8, classes=2, seed=0)(LABELS, VALIDATION)
    np.testing.assert_array_equal(counts(LABELS, train) > 0, counts(VALIDATION, validation) > 0)


def test_shards_are_contiguous_in_the_sorted_order():
    order = np.argsort(LABELS, kind="stable")
    (parts,) = partition.shards(8)(LABELS)
    np.testing.assert_array_equal(np.concatenate(parts), order)
    (parts,) = partition.shards(8, shards_per_agent=2)(LABELS[:992])
    order = np.argsort(LABELS[:992], kind="stable")
    np.testing.assert_array_equal(parts[3], np.concatenate([order[3 * 62 : 4 * 62], order[11 * 62 : 12 * 62]]))


def test_quantity_skew_is_uneven_in_size_alone():
    (parts,) = PARTITIONS["quantity_skew"](LABELS)
    sizes = np.array([len(rows) for rows in parts])
    assert sizes.max() > 2 * sizes.mean()
    largest = counts(LABELS, parts)[sizes.argmax()]
    assert entropy(largest[None]) > 0.97 * np.log(10)


@pytest.mark.parametrize("name", ["iid", "dirichlet_balanced", "quantity_skew"])
def test_weighted_means(name):
    (parts,) = PARTITIONS[name](LABELS)
    loss = np.random.default_rng(2).normal(size=len(LABELS))
    stacked, weights = partition.stack({"loss": loss, "pair": np.stack([loss, LABELS], 1)}, parts)
    length = max(len(rows) for rows in parts)
    assert stacked["loss"].shape == weights.shape == (8, length)
    assert stacked["pair"].shape == (8, length, 2)
    np.testing.assert_allclose((weights * stacked["loss"]).mean(axis=1).mean(), loss.mean(), rtol=0, atol=1e-12)
    _, weights = partition.stack(loss, parts, partition.local)
    own = [loss[rows].mean() for rows in parts]
    np.testing.assert_allclose((weights * stacked["loss"]).mean(axis=1), own, rtol=0, atol=1e-12)
    with jax.enable_x64(False):
        assert partition.stack(loss, parts)[1].dtype == np.float32


@pytest.mark.parametrize("weigh", [partition.pooled, partition.local], ids=["pooled", "local"])
def test_minibatches_and_blocks_are_unbiased(weigh):
    """Of agents of very unequal sizes, filled up to 6 rows, in expectation over every minibatch or block."""
    parts = [np.array([3]), np.array([0, 2, 4, 6, 8, 9]), np.array([1, 5, 7])]
    loss = np.random.default_rng(3).normal(size=10) + 5
    expected = {
        "pooled": [3 * loss[rows].sum() / 10 for rows in parts],
        "local": [loss[rows].mean() for rows in parts],
    }[weigh.__name__]
    stacked, weights = partition.stack(loss, parts, weigh)

    def agents(rows):
        """The losses of all agents on so many of their L rows [..., B]; agents last."""
        return np.moveaxis(np.mean((weights * stacked)[:, rows], axis=-1), 0, -1)

    pairs = np.array(list(itertools.product(range(6), repeat=2)))  # each as likely as another
    np.testing.assert_allclose(agents(pairs).mean(axis=0), expected, rtol=0, atol=1e-12)
    for blocks in (2, 3, 6):
        np.testing.assert_allclose(agents(np.arange(6).reshape(blocks, -1)).mean(axis=0), expected, rtol=0, atol=1e-12)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = agents(np.asarray(jax.vmap(lambda key: bx.sampling.minibatch(2)(key, 0, jnp.arange(6)))(keys)))
    errors = np.abs(drawn.mean(axis=0) - expected)
    assert (errors < 4 * drawn.std(axis=0) / np.sqrt(len(keys))).all()


MISTAKES = {
    "no agents": (lambda: partition.iid(0, seed=0), "n must be an int >= 1"),
    "seed": (lambda: partition.iid(2, seed=-1), "seed must be an int >= 0"),
    "alpha": (lambda: partition.dirichlet(2, alpha=0.0, seed=0), "alpha must be a finite number > 0"),
    "minimum": (lambda: partition.dirichlet_balanced(2, alpha=1.0, seed=0, minimum=0), "minimum must be an int >= 1"),
    "beta": (lambda: partition.quantity_skew(2, beta=-1.0, seed=0), "beta must be a finite number > 0"),
    "no shards": (lambda: partition.shards(2, shards_per_agent=0), "shards_per_agent must be an int >= 1"),
    "one-hot": (lambda: partition.iid(2, seed=0)(np.eye(3)), "labels must be one or more arrays"),
    "no labels": (lambda: partition.shards(2)(), "labels must be one or more arrays"),
    "classes left": (
        lambda: partition.classes_per_agent(2, classes=1, seed=0)([0, 1, 2]),
        "let 2 agents hold all 3 classes.*Pass 2",
    ),
    "few classes": (
        lambda: partition.classes_per_agent(4, classes=3, seed=0)([0, 1, 1]),
        "let 4 agents hold all 2 classes",
    ),
    "few rows": (lambda: partition.iid(3, seed=0)([0, 1]), r"agent \d of 3 gets no data of data set 0.*fewer agents"),
    "nothing drawn": (
        lambda: partition.dirichlet(8, alpha=1e-3, seed=0)(LABELS),
        r"agent \d of 8 gets no data.*larger alpha.*minimum=.*fewer agents.*another seed",
    ),
    "small set": (
        lambda: partition.dirichlet_balanced(8, alpha=1.0, seed=0)(LABELS, LABELS[:40]),
        "rows of data set 1; expected 10 rows",
    ),
    "empty part": (lambda: partition.stack(LABELS, [np.arange(1000), np.arange(0)]), "agent 1 of 2 gets no data"),
    "twice": (
        lambda: partition.stack(LABELS[:3], [np.array([0, 1]), np.array([1])]),
        "parts must hold each of the rows",
    ),
    "lost": (lambda: partition.stack({"x": LABELS}, [np.arange(999)]), r"got shape \(1000,\) at data\['x'\]"),
    "scalar": (lambda: partition.stack([LABELS, 0.1], [np.arange(1000)]), r"got shape \(\) at data\[1\]"),
    "not unpacked": (
        lambda: partition.stack(LABELS, partition.iid(8, seed=0)(LABELS)),
        r"ONE data set; got a list of lists. Unpack .* \(rows,\) = partition\(labels\), or rows_train, rows_val",
    ),
    "two sets": (
        lambda: partition.stack(LABELS, PARTITIONS["dirichlet"](LABELS, VALIDATION)),
        r"parts must be n index arrays of ONE data set; got a list of lists. Unpack",
    ),
    "one array": (lambda: partition.stack(LABELS, np.arange(1000)), r"ONE data set; got shapes \[\(\), .*Unpack"),
    "no parts": (lambda: partition.stack(LABELS, []), r"ONE data set; got shapes \[\]"),
    "no function": (lambda: partition.stack(LABELS, [np.arange(1000)], "pooled"), "weigh must be a function"),
}


@pytest.mark.parametrize(("wrong", "says"), MISTAKES.values(), ids=MISTAKES)
def test_bad_input(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()

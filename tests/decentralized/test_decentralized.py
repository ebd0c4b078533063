"""The decentralized methods against linear algebra: golden iterates, trajectories, limits, invariants."""

import functools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from cases import (
    BOTH,
    DEFINITE,
    INDEFINITE,
    KEY,
    LAZY_RING,
    STEPS,
    TOY_RING,
    TOY_STEPS,
    W,
    all_directions,
    at,
    mean_dynamics,
    semi,
    toy_run,
)
from networks import at_solution, close, numbers, ring, roll, run, simulate, stacked

import bilevax as bx
from bilevax import coins, decentralized
from bilevax.single_loop import correction, estimator, single_loop
from bilevax.testing.problems import Quadratic, four_agents
from bilevax.testing.problems._quadratic import PROBLEM

# Golden numbers


@functools.cache
def snapshots():
    """Paths and infos of one program with three sets of coins: written down by hand, nobody, everybody."""
    hand = np.zeros((60, 4), bool)
    for k, agents in enumerate(([0, 2], [1], [3], [0, 1, 2, 3])):
        hand[k, agents] = True

    def path(masks):
        method = decentralized.s3ldbo(PROBLEM, TOY_RING, TOY_STEPS, coins=lambda key, k, gossip: masks[k])
        return roll(method, four_agents().batch, 60)[1:]

    return numbers(jax.jit(jax.vmap(path))(jnp.stack([hand, 0 * hand == 1, 0 * hand == 0])))


def golden_path(form):
    if form == "snapshot":
        path = [level[0] for level in snapshots()[0]]
    elif form == "semi":
        path = toy_run()[0]
    else:
        non_atc = correction.tracking_non_atc()
        path = toy_run(decentralized.sldbo(PROBLEM, TOY_RING, TOY_STEPS, correction=non_atc))[0]
    return [level[..., 0] for level in path]


GOLDEN = {
    ("semi", 1): (
        (-1 / 60, 0, -0.05, -1 / 30),
        (1 / 15, 0.1, 2 / 15, 0.1),
        (-1 / 6, -0.1, -0.1, -1 / 30),
    ),
    ("semi", 2): (
        (-0.0308333333, -0.0388888889, -0.0519444444, -0.0583333333),
        (0.155, 0.1738888889, 0.1855555556, 0.1672222222),
        (-0.1644444444, -0.2077777778, -0.1088888889, -0.1555555556),
    ),
    ("semi", 3): (
        (-0.0607638889, -0.0588611111, -0.0710046296, -0.0667870370),
        (0.2184351852, 0.2305648148, 0.2294629630, 0.2207870370),
        (-0.2066666667, -0.2038518519, -0.1755370370, -0.1608333333),
    ),
    ("non_atc", 1): ((0.05, 0, -0.05, -0.1), (0, 0.1, 0.2, 0.1), (-0.1, -0.3, 0.1, -0.1)),
    ("non_atc", 2): (
        (-0.0308333333, -0.015, -0.1075, -0.0566666667),
        (0.1383333333, 0.18, 0.1966666667, 0.16),
        (-0.3233333333, -0.13, -0.19, 0.0133333333),
    ),
    ("snapshot", 2): ((-0.0302777778, -0.0372222222, -0.0513888889, -0.0594444444),),
    ("snapshot", 3): ((-0.0629444444, -0.0594259259, -0.0733148148, -0.0681481481),),
    ("snapshot", 4): ((-0.0817469136, -0.0866913580, -0.0863148148, -0.0877654321),),
}


@pytest.mark.parametrize("form", ["semi", "non_atc", "snapshot"])
def test_golden_iterates(form):
    path = golden_path(form)
    for (name, k), levels in GOLDEN.items():
        if name == form:
            for got, expected in zip(path, levels, strict=False):
                np.testing.assert_allclose(got[k], expected, rtol=0, atol=6e-11)
    if form == "snapshot":
        golden_tracker(path[0])


def golden_tracker(x):
    tracker = (x[4] - np.linalg.solve(ring(4), x[5])) / TOY_STEPS[0]  # because x⁺ = W (x − α t)
    np.testing.assert_allclose(tracker, (0.2185493827, 0.4191234568, 0.0821790123, 0.3533580247), rtol=0, atol=6e-11)


def test_closed_forms_of_the_toy_tell_three_problems_apart():
    for got, expected in zip(four_agents().solution, (-23 / 79, 27 / 79, -10 / 79), strict=True):
        assert got[0] == pytest.approx(expected, abs=1e-14)
    assert four_agents().x_l[0] == pytest.approx(-117 / 191, abs=1e-14)
    assert four_agents().x_p[0] == pytest.approx(-137 / 293, abs=1e-14)


def test_directions_of_the_quadratic():
    """The written-out directions of this page against the package's, at a random point."""
    rng = np.random.default_rng(0)
    point = [rng.normal(size=(8, d)) for d in (2, 3, 3)]
    got = jax.jit(jax.vmap(functools.partial(bx.problem.directions, PROBLEM)))(*point, INDEFINITE.batch)
    close(tuple(got), networks.directions(INDEFINITE, point), 1e-12)


# Limits


def sldbo(form=correction.tracking, gossip=LAZY_RING):
    return lambda p: decentralized.sldbo(PROBLEM, gossip, STEPS, correction=form())


def s3ldbo(make_coins):
    return lambda p: decentralized.s3ldbo(PROBLEM, LAZY_RING, STEPS, coins=make_coins(p))


SHARES = np.stack([np.full(8, 0.5), np.full(8, 0.1), np.linspace(0.1, 1, 8)])
EXACT = {  # a method as a function of p, and the values of p that it is run with
    "sldbo": (sldbo(), [1.0]),
    "sldbo_atc": (sldbo(correction.tracking_atc), [1.0]),
    "sldbo_non_atc": (sldbo(correction.tracking_non_atc), [1.0]),
    "s3ldbo_independent": (s3ldbo(coins.independent), SHARES),
    "s3ldbo_common": (s3ldbo(coins.common), [0.5, 0.2]),
    "s3ldbo_subset_of_blocks": (s3ldbo(lambda p: coins.subset(0.25, block=4)), [0.25]),
    "s3ldbo_cyclic": (s3ldbo(lambda p: coins.cyclic(0.25)), [0.25]),
    "s3ldbo_ed": (
        lambda p: decentralized.s3ldbo(
            PROBLEM, LAZY_RING, STEPS, coins=coins.cyclic(0.25, block=4), correction=correction.exact_diffusion()
        ),
        [0.25],
    ),
    "s3ldbo_unbiased": (lambda p: decentralized.s3ldbo_unbiased(PROBLEM, LAZY_RING, STEPS, probability=p), [0.5, 1.0]),
}


def long_run(name):
    """(paths, infos), leaves [values of p, problems, iterations, n, ...], on definite and indefinite local Hessians."""
    make, p = EXACT[name]

    def one(p, batch):
        return roll(make(p), batch, 2500)[1:]

    return numbers(jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(jnp.asarray(p), BOTH))


@pytest.mark.parametrize("name", EXACT)
def test_trajectory_and_limit(name):
    """By the recursion in numpy, to the solution of the mean problem; for every value of p, on both problems."""
    path, info = long_run(name)
    for row in range(len(EXACT[name][1])):
        for column, q in enumerate((DEFINITE, INDEFINITE)):
            at_solution(at(path, row, column), q)
        follow = follows_snapshot if name.startswith("s3ldbo") else follows_sldbo
        follow = {"s3ldbo_unbiased": follows_unbiased}.get(name, follow)
        follow(at(path, row, 1), at(info, row, 1), RECURSIONS.get(name, networks.semi), W)
    counts(name, np.asarray(EXACT[name][1]), info.calls)
    assert not np.any(info.breakdown)


RECURSIONS = {"s3ldbo_ed": networks.exact_diffusion, "sldbo_atc": networks.atc, "sldbo_non_atc": networks.non_atc}


def test_the_indefinite_problem_is_one():
    assert np.linalg.eigvalsh(INDEFINITE.A).min() < -4
    assert np.linalg.eigvalsh(INDEFINITE.mean.A).min() > 2
    x = INDEFINITE.x_star
    assert np.linalg.norm(INDEFINITE.x_l - x) > 0.1
    assert np.linalg.norm(INDEFINITE.x_p - x) > 0.1


# Trajectories and invariants


def stored_directions(q, path, evaluated):
    """The directions that each agent took last; everybody takes the first ones."""
    fresh = all_directions(q, path, len(evaluated))
    last = np.zeros(len(q.A), int)
    rows = []
    for k, who in enumerate(evaluated):
        last = np.where(who, k, last)
        rows.append([d[last, np.arange(len(last))] for d in fresh])
    return stacked(rows)


CHANGING = [networks.doubly_stochastic(seed, 8) for seed in range(3)]


def test_tracking_under_changing_matrices():
    """Each level with a tracking of its own, and matrices that are neither symmetric nor alike."""
    forms = bx.Levels(correction.tracking_atc(), correction.tracking_non_atc(), correction.tracking())
    gossip = bx.gossip(networks.topology(*CHANGING))
    method = single_loop(PROBLEM, gossip, STEPS, estimator.full(), forms)
    state, path, _ = numbers(run(method, INDEFINITE.batch, 40))
    mean_dynamics(path, all_directions(INDEFINITE, path, 40), STEPS)
    atc, *others = (level.memory for level in state.corrections)
    for tracker in (atc.tracker, *others):
        np.testing.assert_allclose(tracker.mixed.mean(0), tracker.last.mean(0), rtol=0, atol=1e-14)
    recursions = [networks.atc(), networks.non_atc(), networks.semi()]
    close(path, stacked(simulate(INDEFINITE, recursions, STEPS, [CHANGING[k % 3] for k in range(40)], 40)), 1e-12)


def some_ids(key, k, gossip):
    return jnp.array([0, 4]) + k % 4


@pytest.mark.parametrize("choose", [coins.independent(0.4), some_ids], ids=["mask", "ids"])
def test_snapshot_tracking_under_changing_matrices(choose):
    method = decentralized.s3ldbo(PROBLEM, bx.gossip(networks.topology(*CHANGING)), STEPS, coins=choose)
    _, path, info = numbers(run(method, INDEFINITE.batch, 40))
    evaluated = follows_snapshot(path, info, networks.semi, [CHANGING[k % 3] for k in range(40)])
    if choose is some_ids:
        np.testing.assert_array_equal(evaluated[1:], [np.arange(8) % 4 == k % 4 for k in range(39)])


def follows_sldbo(path, info, recursion, matrix):
    expected = simulate(INDEFINITE, [recursion() for _ in range(3)], STEPS, matrix, 60)
    close([level[:61] for level in path], stacked(expected), 1e-12)
    mean_dynamics(path, all_directions(INDEFINITE, path, 60), STEPS)


def follows_snapshot(path, info, recursion, matrices):
    """Who evaluated is read from `info.calls`, so that the counts are those of the real coins."""
    evaluated = info.calls.outer_gradients[:40] == 1
    mean_dynamics(path, stored_directions(INDEFINITE, path, evaluated), STEPS)
    refreshed = [np.flatnonzero(row) for row in evaluated[1:]]
    moves = [recursion() for _ in range(3)]
    expected = simulate(INDEFINITE, moves, STEPS, matrices, 40, coins=refreshed)
    close([level[:41] for level in path], stacked(expected), 1e-12)
    return evaluated


def follows_unbiased(path, info, recursion, matrix):
    evaluated = info.calls.outer_gradients
    share = evaluated[1:].mean()
    p = 1.0 if share == 1 else 0.5
    expected = networks.unbiased_recursion(INDEFINITE, matrix, STEPS, p, evaluated, 60)
    close([level[:61] for level in path], stacked(expected), 1e-12)
    if p == 1:
        follows_sldbo(path, info, recursion, matrix)


# Coins


def counts(name, p, calls):
    """Shares of the iterations after the first in which each agent evaluates; leaves [values of p, problems, ...]."""
    for count in calls:
        np.testing.assert_array_equal(count, calls.outer_gradients)
    evaluated = calls.cross_products[:, 0, 1:]
    share = evaluated.mean(1)
    p = np.broadcast_to(p.reshape(len(share), -1), share.shape)
    np.testing.assert_array_less(np.abs(share - p), 5 * np.sqrt(p * (1 - p) / 2500) + 1e-12)
    if name == "s3ldbo_common":
        np.testing.assert_array_equal(evaluated, np.repeat(evaluated[..., :1], 8, -1))
    if name in ("s3ldbo_independent", "s3ldbo_unbiased"):
        assert np.abs(np.corrcoef(evaluated[0].T) - np.eye(8)).max() < 0.1
    if name.startswith(("s3ldbo_subset", "s3ldbo_cyclic", "s3ldbo_ed")):
        np.testing.assert_array_equal(evaluated.sum(-1), 2)
    if name in ("s3ldbo_subset_of_blocks", "s3ldbo_ed"):
        np.testing.assert_array_equal(evaluated.reshape(-1, 2, 4).sum(-1), 1)
    if name in ("s3ldbo_cyclic", "s3ldbo_ed"):
        np.testing.assert_array_equal(evaluated[0, :20].reshape(5, 4, 8).sum(1), np.ones((5, 8)))


@pytest.mark.parametrize("kind", [coins.independent, coins.common, coins.subset])
def test_sure_coins_give_the_bits_of_sldbo(kind):
    """Of a subset that is everybody, in another order, the rounding may differ."""
    path, info = toy_run(decentralized.s3ldbo(PROBLEM, TOY_RING, TOY_STEPS, coins=kind(1.0)))
    close(path, toy_run()[0], 1e-15 if kind is coins.subset else 0.0)
    assert np.all(info.calls.hessian_products[1:] == 1)


def test_coins_that_choose_nobody_freeze_the_directions():
    path, info = at(snapshots(), 1)
    frozen = networks.directions(four_agents(), (np.zeros((4, 1)),) * 3)
    for level, d, a in zip(path, frozen, TOY_STEPS, strict=True):
        line = -a * np.arange(61)[:, None] * d.mean(0)
        np.testing.assert_allclose(level.mean(1), line, rtol=0, atol=1e-13)
        np.testing.assert_allclose(level[-1] - level[-2], np.tile(-a * d.mean(0), (4, 1)), rtol=0, atol=1e-12)
    for count in info.calls:
        assert np.sum(count) == 0


def test_coins_that_choose_everybody_are_sldbo():
    path, info = at(snapshots(), 2)
    close(path, toy_run()[0], 1e-14)
    for count in info.calls:  # the first iteration finds the directions of init
        np.testing.assert_array_equal(count, np.tile(np.arange(60)[:, None] > 0, 4))


@pytest.mark.parametrize("p", [0.1, 0.125, np.float32(0.3), 0.45, 0.95, 1.0])
def test_in_turn_everybody_refreshes_as_often_as_p_says(p):
    """Wherever 1/p iterations in a row begin, and after more of them than the square of a number of 32 bits holds."""
    turns = numbers(jax.jit(jax.vmap(lambda k: coins.cyclic(p)(None, k, LAZY_RING)))(2**30 + jnp.arange(100)))
    chosen = [turn[turn < 8] for turn in turns]
    wait = int(np.ceil(1 / p))
    assert all(np.unique(turn).size == len(turn) and len(turn) in (int(8 * p), int(np.ceil(8 * p))) for turn in chosen)
    assert all(np.unique(turns[k : k + wait]).size >= 8 for k in range(100 - wait))
    np.testing.assert_allclose(np.bincount(np.concatenate(chosen)), 100 * p, rtol=0, atol=1)


def test_in_turn_nobody_evaluates_where_it_is_nobodys_turn():
    """One of 4 agents in 4 of 5 iterations: their order by hand, and 4, who is nobody, in the fifth."""
    order = [4, 0, 1, 2, 3]
    assert [coins.cyclic(0.2)(None, k, TOY_RING).item() for k in range(10)] == 2 * order
    _, info = toy_run(decentralized.s3ldbo(PROBLEM, TOY_RING, TOY_STEPS, coins=coins.cyclic(0.2)))
    evaluated = np.asarray(info.calls.inner_gradients)
    turns = np.array([order[max(k - 1, 0) % 5] for k in range(len(evaluated))])
    np.testing.assert_array_equal(evaluated, turns[:, None] == np.arange(4))


def test_coin_of_an_agent_does_not_depend_on_the_other_agents():
    @jax.jit
    @jax.vmap
    def thrown(key):
        return [coins.independent(0.5)(key, 3, gossip) for gossip in (TOY_RING, LAZY_RING)]

    few, many = thrown(jax.random.split(KEY, 5))
    np.testing.assert_array_equal(few, many[:, :4])


# Projection


def test_projection_above_and_below_the_norm_of_v():
    solution = DEFINITE.solution
    radii = np.linalg.norm(solution[2]) * np.array([3.0, 1.5, 1.01, 0.99, 0.5])

    def final(radius):
        return roll(decentralized.sldbo(PROBLEM, LAZY_RING, STEPS, radius=radius), DEFINITE.batch, 2500)[1]

    path = numbers(jax.jit(jax.vmap(final))(jnp.asarray(radii)))
    error = [max(np.abs(level[row, -1] - s).max() for level, s in zip(path, solution, strict=True)) for row in range(5)]
    assert max(error[:3]) < 1e-10
    assert 1e-4 < error[3] < error[4]
    x_error = np.abs(path[0][:, -1] - solution[0]).max((1, 2))
    assert x_error[3] > 1e-5
    assert x_error[4] > 1e-2
    lengths = np.linalg.norm(path[2], axis=-1)
    assert np.all(lengths.max((1, 2)) <= radii * (1 + 1e-12))
    assert lengths[4, 1:].min() < 0.99 * radii[4]  # what lies inside stays
    expected = stacked(simulate(DEFINITE, semi(), STEPS, W, 100, radius=radii[4]))
    close(at(path, 4, slice(101)), expected, 1e-13)


# Equivalences


CENTRAL = [("tracking", "tracking_atc", "exact_diffusion"), ("exact_diffusion", "none", "tracking")]


def centralized(q, start, iterations):
    mean = Quadratic(*(leaf.mean(0, keepdims=True) for leaf in q))
    point = tuple(leaf[:1] for leaf in start)
    return stacked(simulate(mean, [networks.none() for _ in range(3)], STEPS, np.eye(1), iterations, point))


def equal_start(n):
    x, y = np.array([0.3, -0.2]), np.array([0.1, 0.4, -0.5])
    return tuple(np.tile(leaf, (n, 1)) for leaf in (x, y, np.zeros(3)))


@pytest.mark.parametrize("forms", CENTRAL, ids="-".join)
def test_complete_graph_with_equal_start_is_centralized(forms):
    gossip = bx.gossip(networks.topology(networks.complete(8)))
    corrections = bx.Levels(*(getattr(correction, form)() for form in forms))
    method = single_loop(PROBLEM, gossip, STEPS, estimator.full(), corrections)
    _, path, _ = run(method, INDEFINITE.batch, 60, start=equal_start(8)[:2])
    close(path, [np.repeat(level, 8, axis=1) for level in centralized(INDEFINITE, equal_start(8), 60)], 1e-13)


def test_one_agent_is_centralized():
    alone = Quadratic(*(leaf[:1] for leaf in DEFINITE))
    start = equal_start(1)
    method = decentralized.sldbo(PROBLEM, bx.gossip(networks.topology(np.eye(1))), STEPS)
    _, path, info = run(method, alone.batch, 60, start=start[:2])
    close(path, centralized(alone, start, 60), 1e-14)
    assert np.all(info.bytes == 0)


def test_permuted_agents_give_permuted_iterates():
    order = np.random.default_rng(0).permutation(8)
    star = bx.topology.star(8).matrix.toarray()
    matrix = star @ W @ star  # irregular
    paths = []
    for chosen in (np.arange(8), order):
        q = Quadratic(*(leaf[chosen] for leaf in INDEFINITE))
        gossip = bx.gossip(networks.topology(matrix[chosen][:, chosen]))
        paths.append(run(decentralized.sldbo(PROBLEM, gossip, STEPS, radius=0.3), q.batch, 60)[1])
    close(paths[1], jax.tree.map(lambda leaf: leaf[:, order], paths[0]), 1e-13)

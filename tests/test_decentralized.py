"""The decentralized methods against linear algebra: golden iterates, whole trajectories, limits, invariants, costs."""

import functools
import re

import flax.linen
import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
from networks import PROBLEM, at_solution, close, jit, lazy, numbers, quadratic, ring, roll, run, simulate, stacked, toy

import bilevax as bx
from bilevax import coins, correction, decentralized, estimator

KEY = networks.KEY
STEPS = (0.01, 0.025, 0.025)
TOY_STEPS = (0.05, 0.1, 0.1)
DEFINITE, INDEFINITE = quadratic(0), quadratic(0, indefinite=2.5)
BOTH = jax.tree.map(lambda *leaves: jnp.stack(leaves), DEFINITE.batch, INDEFINITE.batch)
W = lazy(ring(8))
LAZY_RING = bx.gossip(networks.topology(W))
TOY_RING = bx.gossip(networks.topology(ring(4)))
TOY_SLDBO = decentralized.sldbo(PROBLEM, TOY_RING, TOY_STEPS)


def semi():
    return [networks.semi() for _ in range(3)]


def toy_run(method=TOY_SLDBO, batch=None):
    return numbers(run(method, batch or toy().batch, 60)[1:])


# Golden numbers


@functools.cache
def snapshots():
    """Paths and infos of one program with three sets of coins: written down by hand, nobody, everybody."""
    hand = np.zeros((60, 4), bool)
    for k, agents in enumerate(([0, 2], [1], [3], [0, 1, 2, 3])):
        hand[k, agents] = True

    def path(masks):
        method = decentralized.s3ldbo(PROBLEM, TOY_RING, TOY_STEPS, lambda key, k, gossip: masks[k])
        return roll(method, toy().batch, 60)[1:]

    return numbers(jit(jax.vmap(path))(jnp.stack([hand, 0 * hand == 1, 0 * hand == 0])))


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
    for got, expected in zip(networks.solution(toy()), (-23 / 79, 27 / 79, -10 / 79), strict=True):
        assert got[0] == pytest.approx(expected, abs=1e-14)
    assert networks.local_inverse_solution(toy())[0] == pytest.approx(-117 / 191, abs=1e-14)
    assert networks.personal_solution(toy())[0] == pytest.approx(-137 / 293, abs=1e-14)


def test_directions_of_the_quadratic():
    """The written-out directions of this page against the package's, at a random point."""
    rng = np.random.default_rng(0)
    point = [rng.normal(size=(8, d)) for d in (2, 3, 3)]
    got = jit(jax.vmap(functools.partial(bx.directions, PROBLEM)))(*point, INDEFINITE.batch)
    close(tuple(got), networks.directions(INDEFINITE, point), 1e-12)


# Limits


def sldbo(form=correction.tracking, gossip=LAZY_RING):
    return lambda p: decentralized.sldbo(PROBLEM, gossip, STEPS, correction=form())


def s3ldbo(make_coins):
    return lambda p: decentralized.s3ldbo(PROBLEM, LAZY_RING, STEPS, make_coins(p))


SHARES = np.stack([np.full(8, 0.5), np.full(8, 0.1), np.linspace(0.1, 1, 8)])
EXACT = {  # a method as a function of p, and the values of p that it is run with
    "sldbo": (sldbo(), [1.0]),
    "sldbo_atc": (sldbo(correction.tracking_atc), [1.0]),
    "sldbo_non_atc": (sldbo(correction.tracking_non_atc), [1.0]),
    "sldbo_plain_ring": (sldbo(gossip=bx.gossip(networks.topology(ring(8)))), [1.0]),
    "s3ldbo_independent": (s3ldbo(coins.independent), SHARES),
    "s3ldbo_common": (s3ldbo(coins.common), [0.5, 0.2]),
    "s3ldbo_subset": (s3ldbo(lambda p: coins.subset(0.25)), [0.25]),
    "s3ldbo_subset_of_blocks": (s3ldbo(lambda p: coins.subset(0.25, block=4)), [0.25]),
    "s3ldbo_unbiased": (lambda p: decentralized.s3ldbo_unbiased(PROBLEM, LAZY_RING, STEPS, p), [0.5, 1.0]),
}


def long_run(name):
    """(paths, infos), leaves [values of p, problems, iterations, n, ...], on definite and indefinite local Hessians."""
    make, p = EXACT[name]

    def one(p, batch):
        return roll(make(p), batch, 2500)[1:]

    return numbers(jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(jnp.asarray(p), BOTH))


def at(tree, *index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


@pytest.mark.parametrize("name", EXACT)
def test_trajectory_and_limit(name):
    """By the recursion in numpy, to the solution of the mean problem; for every value of p, on both problems."""
    path, info = long_run(name)
    for row in range(len(EXACT[name][1])):
        for column, q in enumerate((DEFINITE, INDEFINITE)):
            at_solution(at(path, row, column), q)
        follow = follows_snapshot if name.startswith("s3ldbo") else follows_sldbo
        follow = {"s3ldbo_unbiased": follows_unbiased}.get(name, follow)
        follow(at(path, row, 1), at(info, row, 1), RECURSIONS.get(name, networks.semi), GRAPHS.get(name, W))
    counts(name, np.asarray(EXACT[name][1]), info.calls)
    assert not np.any(info.breakdown)


RECURSIONS = {"sldbo_atc": networks.atc, "sldbo_non_atc": networks.non_atc}
GRAPHS = {"sldbo_plain_ring": ring(8)}


def test_the_indefinite_problem_is_one():
    assert np.linalg.eigvalsh(INDEFINITE.A).min() < -4
    assert np.linalg.eigvalsh(INDEFINITE.mean.A).min() > 2
    x = networks.solution(INDEFINITE)[0]
    assert np.linalg.norm(networks.local_inverse_solution(INDEFINITE) - x) > 0.1
    assert np.linalg.norm(networks.personal_solution(INDEFINITE) - x) > 0.1


# Trajectories and invariants


def mean_dynamics(path, directions, steps, atol=1e-12):
    """Mean s⁺ = mean s − step · mean direction; with x⁺ = W(x − a t) this says mean t = mean d."""
    for level, d, a in zip(path, directions, steps, strict=True):
        got = -np.diff(level[: len(d) + 1].mean(1), axis=0) / a
        np.testing.assert_allclose(got, d.mean(1), rtol=0, atol=atol)


def all_directions(q, path, iterations):
    return stacked([networks.directions(q, [level[k] for level in path]) for k in range(iterations)])


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
    method = decentralized.single_loop(PROBLEM, gossip, STEPS, estimator.full(), forms)
    state, path, _ = numbers(run(method, INDEFINITE.batch, 40))
    mean_dynamics(path, all_directions(INDEFINITE, path, 40), STEPS)
    for level in state.corrections:
        np.testing.assert_allclose(level.memory.mixed.mean(0), level.memory.last.mean(0), rtol=0, atol=1e-14)
    recursions = [networks.atc(), networks.non_atc(), networks.semi()]
    close(path, stacked(simulate(INDEFINITE, recursions, STEPS, [CHANGING[k % 3] for k in range(40)], 40)), 1e-12)


def some_ids(key, k, gossip):
    return jnp.array([0, 4]) + k % 4


@pytest.mark.parametrize("choose", [coins.independent(0.4), some_ids], ids=["mask", "ids"])
def test_snapshot_tracking_under_changing_matrices(choose):
    method = decentralized.s3ldbo(PROBLEM, bx.gossip(networks.topology(*CHANGING)), STEPS, choose)
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
    if name.startswith("s3ldbo_subset"):
        np.testing.assert_array_equal(evaluated.sum(-1), 2)
    if name == "s3ldbo_subset_of_blocks":
        np.testing.assert_array_equal(evaluated.reshape(-1, 2, 4).sum(-1), 1)


@pytest.mark.parametrize("kind", [coins.independent, coins.common, coins.subset])
def test_sure_coins_give_the_bits_of_sldbo(kind):
    """Of a subset that is everybody, in another order, the rounding may differ."""
    path, info = toy_run(decentralized.s3ldbo(PROBLEM, TOY_RING, TOY_STEPS, kind(1.0)))
    close(path, toy_run()[0], 1e-15 if kind is coins.subset else 0.0)
    assert np.all(info.calls.hessian_products[1:] == 1)


def test_coins_that_choose_nobody_freeze_the_directions():
    path, info = at(snapshots(), 1)
    frozen = networks.directions(toy(), (np.zeros((4, 1)),) * 3)
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


def test_coin_of_an_agent_does_not_depend_on_the_other_agents():
    for key in jax.random.split(KEY, 5):
        few, many = (coins.independent(0.5)(key, 3, gossip) for gossip in (TOY_RING, LAZY_RING))
        np.testing.assert_array_equal(few, many[:4])


# Projection


def test_projection_above_and_below_the_norm_of_v():
    solution = networks.solution(DEFINITE)
    radii = np.linalg.norm(solution[2]) * np.array([3.0, 1.5, 1.01, 0.99, 0.5])

    def final(radius):
        return roll(decentralized.sldbo(PROBLEM, LAZY_RING, STEPS, radius=radius), DEFINITE.batch, 2500)[1]

    path = numbers(jit(jax.vmap(final))(jnp.asarray(radii)))
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
    mean = networks.Quadratic(*(leaf.mean(0, keepdims=True) for leaf in q))
    point = tuple(leaf[:1] for leaf in start)
    return stacked(simulate(mean, [networks.none() for _ in range(3)], STEPS, np.eye(1), iterations, point))


def equal_start(n):
    x, y = np.array([0.3, -0.2]), np.array([0.1, 0.4, -0.5])
    return tuple(np.tile(leaf, (n, 1)) for leaf in (x, y, np.zeros(3)))


@pytest.mark.parametrize("forms", CENTRAL, ids="-".join)
def test_complete_graph_with_equal_start_is_centralized(forms):
    gossip = bx.gossip(networks.topology(networks.complete(8)))
    corrections = bx.Levels(*(getattr(correction, form)() for form in forms))
    method = decentralized.single_loop(PROBLEM, gossip, STEPS, estimator.full(), corrections)
    _, path, _ = run(method, INDEFINITE.batch, 60, start=equal_start(8)[:2])
    close(path, [np.repeat(level, 8, axis=1) for level in centralized(INDEFINITE, equal_start(8), 60)], 1e-13)


def test_one_agent_is_centralized():
    alone = networks.Quadratic(*(leaf[:1] for leaf in DEFINITE))
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
        q = networks.Quadratic(*(leaf[chosen] for leaf in INDEFINITE))
        gossip = bx.gossip(networks.topology(matrix[chosen][:, chosen]))
        paths.append(run(decentralized.sldbo(PROBLEM, gossip, STEPS, radius=0.3), q.batch, 60)[1])
    close(paths[1], jax.tree.map(lambda leaf: leaf[:, order], paths[0]), 1e-13)


# DSVRBGD: one recursion with its own previous points


def noisy(q, iterations, noise):
    """Coefficients [n, iterations, ...], of which iteration t reads row t; `noise` names those that change."""
    rng = np.random.default_rng(3)

    def draw(name, leaf):
        change = 0.3 * rng.normal(size=(len(leaf), iterations, *leaf.shape[1:]))
        if name in "AQR":
            change = change + np.swapaxes(change, -1, -2)
        return leaf[:, None] + (name in noise) * change

    return networks.Quadratic(*(draw(name, leaf) for name, leaf in zip(q._fields, q, strict=True)))


DSVRBGD = {"simultaneous": decentralized.dsvrbgd, "alternating": decentralized.dsvrbgd_alternating}
RATE = 0.6


def dsvrbgd(kind, a, rate=RATE, sample=bx.inner.per_step):
    """With the momentum a = α η² itself."""
    return DSVRBGD[kind](PROBLEM, LAZY_RING, STEPS, sample=sample, momentum=a / rate**2, rate=rate)


@functools.partial(jit, static_argnums=0)
def noisy_run(kind, batch, momenta):
    return jax.vmap(lambda a: roll(dsvrbgd(kind, a), batch, 30)[:2])(momenta)


MOMENTA = jnp.array([0.0, 0.1, 1.0])


@pytest.mark.parametrize("kind", DSVRBGD)
def test_dsvrbgd_follows_its_recursion_for_any_samples(kind):
    data = noisy(INDEFINITE, 30, noise="ABcQeRrS")
    _, path = noisy_run(kind, data.batch, MOMENTA)
    samples = [networks.Quadratic(*(leaf[:, t] for leaf in data)) for t in range(30)]
    for row, a in enumerate(MOMENTA):
        expected = networks.storm_recursion(samples, W, STEPS, float(a), RATE, kind == "alternating")
        close(at(path, row), stacked(expected), 1e-12)


@pytest.mark.parametrize("kind", DSVRBGD)
def test_no_momentum_freezes_the_error_of_additive_noise(kind):
    """One sample at both points: the first error stays for ever. A fresh one at the second would make it walk."""
    data = noisy(INDEFINITE, 30, noise="cer")
    state, path = at(numbers(noisy_run(kind, data.batch, MOMENTA)), 0)
    origin = tuple(np.zeros((8, d)) for d in (2, 3, 3))
    first = networks.directions(networks.Quadratic(*(leaf[:, 0] for leaf in data)), origin)
    errors = [got - d for got, d in zip(first, networks.directions(INDEFINITE, origin), strict=True)]
    assert min(np.abs(error).max() for error in errors) > 0.1

    def exact(k):
        (x, y, v), (_, new_y, new_v) = at(path, k), at(path, k + 1)
        if kind == "simultaneous":
            return networks.directions(INDEFINITE, (x, y, v))
        d_y, d_v = networks.direction_y(INDEFINITE, x, y), networks.direction_v(INDEFINITE, x, new_y, v)
        return networks.direction_x(INDEFINITE, x, new_y, new_v), d_y, d_v

    estimates = [[d + e for d, e in zip(exact(k), errors, strict=True)] for k in range(30)]
    mean_dynamics(path, stacked(estimates), [RATE * a for a in STEPS])
    order = (0, 1, 2) if kind == "simultaneous" else (1, 2, 0)
    close(state.estimators, [estimates[-1][level] for level in order], 1e-13)


@pytest.mark.parametrize("kind", DSVRBGD)
def test_dsvrbgd_without_noise_reaches_the_solution_whatever_its_momentum(kind):
    def path(a):
        return roll(dsvrbgd(kind, a, 1.0, bx.inner.full), INDEFINITE.batch, 2500)[1]

    got = numbers(jit(jax.vmap(path))(MOMENTA))
    for row in range(3):
        at_solution(at(got, row), INDEFINITE)
        close(at(got, row, slice(50)), at(got, 0, slice(50)), 1e-12)


# SPIDER and PAGE


def over_examples(loss):
    return lambda x, y, batch: jnp.mean(jax.vmap(loss, (None, None, 0))(x, y, batch))


def one_in_turn(key, k, data):
    return jax.tree.map(lambda leaf: leaf[k % 4][None], data)


@pytest.mark.parametrize("kind", ["spider", "page"])
def test_recursive_estimates_restart_from_the_exact_directions(kind):
    """u = d(s) when an iteration counts one evaluation, u + d(s; ξ) − d(previous s; ξ) when it counts two."""
    problem = bx.BilevelProblem(over_examples(networks.outer_loss), over_examples(networks.inner_loss))
    restarts = {"spider": estimator.spider(3, one_in_turn), "page": estimator.page(0.3, one_in_turn)}
    data = noisy(DEFINITE, 4, noise="ABcQeRrS")
    method = decentralized.single_loop(problem, LAZY_RING, STEPS, restarts[kind], correction.none())
    start = tuple(jnp.zeros((8, d)) for d in (2, 3))
    _, path, info = numbers(run(method, data.batch, 20, start))
    mean = networks.Quadratic(*(leaf.mean(1) for leaf in data))
    samples = [networks.Quadratic(*(leaf[:, t] for leaf in data)) for t in range(4)]
    exact = info.calls.outer_gradients == 1
    np.testing.assert_array_equal(info.calls.cross_products, np.where(exact, 1, 2))
    for k in range(20):
        point, last = at(path, k), at(path, k - 1)
        if exact[k, 0]:
            u = networks.directions(mean, point)
        else:
            now, then = (networks.directions(samples[k % 4], s) for s in (point, last))
            u = [u + a - b for u, a, b in zip(u, now, then, strict=True)]
        for level, d, a in zip(path, u, STEPS, strict=True):
            np.testing.assert_allclose(level[k + 1], W @ (level[k] - a * d), rtol=0, atol=1e-13)
    assert exact[0].all()
    if kind == "spider":
        np.testing.assert_array_equal(exact[:, 0], np.arange(20) % 3 == 0)
    assert 1 < exact[:, 0].sum() < 12


# D-SOBA


def test_dsoba_keeps_a_bias_that_is_about_linear_in_the_step():
    """And none where the agents are alike; with a moving average of d_x in between."""
    alike = networks.Quadratic(*(np.broadcast_to(leaf.mean(0), leaf.shape) for leaf in DEFINITE))
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[DEFINITE.batch] * 3, alike.batch)

    def final(scale, batch):
        method = decentralized.dsoba(PROBLEM, LAZY_RING, tuple(2 * scale * a for a in STEPS), theta=0.5)
        return roll(method, batch, 6000)[1]

    path = numbers(jit(jax.vmap(final))(jnp.array([1.0, 0.5, 0.25, 1.0]), batches))
    bias = np.linalg.norm(path[0][:3, -1].mean(1) - networks.solution(DEFINITE)[0], axis=1)
    assert bias[0] > 1e-3
    ratios = bias[1:] / bias[:-1]
    assert np.all((ratios > 0.4) & (ratios < 0.8))
    at_solution(at(path, 3), DEFINITE)


# Info: what a method says that it costs


LAZY_SQUARE = bx.gossip(networks.topology(lazy(ring(4))))
LINEAR = bx.BilevelProblem(
    lambda x, y, batch: jnp.sum(x) + jnp.sum(y), lambda x, y, batch: 0.5 * jnp.sum(y**2) + jnp.sum(x) * y[0]
)
ED, EXTRA, GT, ATC = correction.exact_diffusion, correction.extra, correction.tracking, correction.tracking_atc


def make(preset, *choices):
    return lambda problem, gossip: preset(problem, gossip, STEPS, *choices)


def variance_reduced(preset):
    return make(preset, bx.inner.full, 0.1, 1.0)


def sparkle(*forms):
    return make(decentralized.sparkle, bx.Levels(*(form() for form in forms)))


COSTS = {  # bytes to each neighbour for d_x = 784 and d_y = 7840; F, G, H and J per agent; rounds
    "sldbo": (make(decentralized.sldbo), 131_712, (1, 1, 1, 1), 1),
    "sldbo_atc": (make(decentralized.sldbo, None, ATC()), 131_712, (1, 1, 1, 1), 2),
    "s3ldbo": (make(decentralized.s3ldbo, coins.independent(0.5)), 131_712, None, 1),
    "s3ldbo_unbiased": (make(decentralized.s3ldbo_unbiased, 0.5), 131_712, None, 1),
    "dsvrbgd_simultaneous": (variance_reduced(decentralized.dsvrbgd_simultaneous), 131_712, (2, 2, 2, 2), 1),
    "dsvrbgd_alternating": (variance_reduced(decentralized.dsvrbgd_alternating), 131_712, (2, 4, 2, 2), 3),
    "sparkle_gt": (sparkle(GT, GT, GT), 131_712, (1, 2, 1, 1), 3),
    "sparkle_ed": (sparkle(ED, ED, ED), 65_856, (1, 2, 1, 1), 3),
    "sparkle_extra": (sparkle(EXTRA, EXTRA, EXTRA), 65_856, (1, 2, 1, 1), 3),
    "sparkle_mixed": (sparkle(GT, ED, EXTRA), 68_992, (1, 2, 1, 1), 3),
    "dsoba": (make(decentralized.dsoba), 65_856, (1, 1, 1, 1), 1),
}


@pytest.mark.parametrize("name", COSTS)
def test_declared_cost(name):
    preset, size, calls, rounds = COSTS[name]
    method = preset(LINEAR, LAZY_SQUARE)
    batch = bx.Batch(outer=jnp.zeros((4, 1)), inner=jnp.zeros((4, 1)))

    @jit
    def info(keys):
        state = method.init(*(jnp.zeros((4, d), jnp.float32) for d in (784, 7840)), batch)
        state, _ = method.step(keys[0], state, batch)
        return method.step(keys[1], state, batch)[1]._replace(moves=None, breakdown=None)

    got = info(jax.random.split(KEY, 2))
    np.testing.assert_array_equal(got.bytes, np.full(4, 2 * size))
    assert got.rounds == rounds
    for count, expected in zip(got.calls, calls or [got.calls.outer_gradients] * 4, strict=True):
        np.testing.assert_array_equal(count, np.broadcast_to(expected, 4))
    assert set(np.asarray(got.calls.outer_gradients).tolist()) <= ({0, 1} if calls is None else {calls[0]})


def flops(function, *args):
    return jit(function).lower(*args).compile().cost_analysis()["flops"]


WIDE = quadratic(0, n=4, dx=48, dy=64)


@pytest.mark.parametrize("name", ["sldbo", "dsvrbgd_simultaneous", "dsvrbgd_alternating", "sparkle_ed"])
def test_declared_calls_are_those_of_the_compiled_program(name):
    """Products with matrices of 64 rows are nearly all of the work, and the compiler counts them."""
    x, y = networks.zeros(WIDE.batch)
    unit = flops(jax.vmap(functools.partial(bx.directions, PROBLEM)), x, y, y, WIDE.batch)
    gradient = flops(jax.vmap(jax.grad(networks.inner_loss, 1)), x, y, WIDE.batch.inner)
    method = COSTS[name][0](PROBLEM, LAZY_SQUARE)
    state = jax.eval_shape(method.init, x, y)
    compiled = flops(lambda state, batch: method.step(None, state, batch)[0], state, WIDE.batch)
    f, g, *_ = COSTS[name][2]
    least = f * unit  # the second linearization of a quadratic costs nothing
    assert least < compiled < 1.05 * (least + (g - f) * gradient)


def test_skipping_really_skips():
    """A subset evaluates its own agents only; a common coin stays a branch of the program."""
    q = quadratic(0, n=16, dx=48, dy=64)
    gossip, (x, y) = bx.gossip(bx.topology.ring(16)), networks.zeros(q.batch)

    def compiled(method):
        state = jax.eval_shape(method.init, x, y, q.batch)
        return jit(lambda key, state, batch: method.step(key, state, batch)[0]).lower(KEY, state, q.batch).compile()

    everybody = compiled(decentralized.sldbo(PROBLEM, gossip, STEPS))
    some = compiled(decentralized.s3ldbo(PROBLEM, gossip, STEPS, coins.subset(0.25)))
    assert some.cost_analysis()["flops"] < 0.35 * everybody.cost_analysis()["flops"]
    assert " conditional(" in compiled(decentralized.s3ldbo(PROBLEM, gossip, STEPS, coins.common(0.25))).as_text()
    assert " conditional(" not in everybody.as_text()


def test_moves_are_lengths_of_displacements():
    path, info = toy_run()
    for level, move in zip(path, info.moves, strict=True):
        np.testing.assert_allclose(move, np.linalg.norm(np.diff(level, axis=0), axis=-1), rtol=1e-6)


def test_breakdown_names_the_agents_that_are_not_finite():
    batch = toy().batch
    batch.outer["r"] = batch.outer["r"].at[2].set(jnp.nan)
    path, info = toy_run(batch=batch)
    finite = np.all([np.isfinite(level[1:, :, 0]) for level in path], axis=0)
    np.testing.assert_array_equal(info.breakdown, ~finite)
    assert info.breakdown[0, 2]
    assert np.all(info.breakdown[-1])


# Bad input


X, Y, BATCH = jnp.zeros((4, 1)), jnp.zeros((4, 1)), toy().batch
IMAGES = bx.BilevelProblem(lambda x, y, batch: jnp.sum(x["w"] * y), lambda x, y, batch: jnp.sum((x["w"] - y) ** 2))
DIRECTED = np.array([[0.5, 0, 0, 0.5], [0.5, 0.5, 0, 0], [0, 0.25, 0.5, 0], [0, 0.25, 0.5, 0.5]])


def start(x, y=Y, batch=BATCH, problem=PROBLEM):
    return lambda: decentralized.sldbo(problem, TOY_RING, TOY_STEPS).init(x, y, batch)


def steps(step_sizes):
    return lambda: decentralized.sldbo(PROBLEM, TOY_RING, step_sizes)


def corrected(*forms, gossip=TOY_RING):
    return lambda: decentralized.sparkle(PROBLEM, gossip, TOY_STEPS, bx.Levels(*(form() for form in forms))).init(X, Y)


def keyless(preset, *choices):
    method = preset(PROBLEM, TOY_RING, TOY_STEPS, *choices)

    def step():
        state = jax.eval_shape(method.init, X, Y, BATCH)
        jax.eval_shape(functools.partial(method.step, None), state, BATCH)

    return step


BAD = {
    "x_leading_axis": (r"\bx\b.*\(3, 1\)", start(X[:3])),
    "y_leading_axis": (r"\by\b.*\(5, 1\)", start(X, jnp.zeros((5, 1)))),
    "leaf_of_x": (r"x\['w'\]", start({"w": jnp.zeros(2)}, Y[:, 0], bx.Batch(X, X), IMAGES)),
    "scalar_leaf": (r"\bx\b.*\(\)", start(jnp.array(0.0))),
    "batch_at_init": (r"batch.inner\['A'\]", start(X, batch=BATCH._replace(inner={"A": X[:3]}))),
    "batch_is_no_batch": (r"bx\.Batch", start(X, batch=BATCH.inner)),
    "integer_x": ("int", start(X.astype(int))),
    "p_zero": (r"\bp\b.*0\.0", lambda: coins.independent(0.0)),
    "p_above_one": (r"\bp\b.*1\.5", lambda: coins.independent(1.5)),
    "p_negative": (r"\bp\b.*-0\.1", lambda: coins.common(-0.1)),
    "p_of_a_subset": (r"\bp\b.*1\.01", lambda: coins.subset(1.01)),
    "p_of_one_agent": (r"\bp\b.*\(0, 1\]", lambda: coins.independent(jnp.array([0.5, 0.0]))),
    "p_not_a_number": (r"\bp\b.*nan", lambda: coins.independent(float("nan"))),
    "p_of_other_agents": (r"\bp\b.*\(3,\)", lambda: coins.independent(jnp.full(3, 0.5))(KEY, 0, TOY_RING)),
    "p_common_to_nobody": (r"coins\.independent", lambda: coins.common(jnp.full(4, 0.5))),
    "p_unbiased": (r"\bp\b", lambda: decentralized.s3ldbo_unbiased(PROBLEM, TOY_RING, TOY_STEPS, 0.0)),
    "blocks": ("block.*block=2", lambda: coins.subset(0.5, block=6)(KEY, 0, TOY_RING)),
    "two_step_sizes": ("step_sizes.*tuple of 2", steps((0.1, 0.2))),
    "negative_step_size": (r"step_sizes\.y.*-0\.1", steps((0.1, -0.1, 0.1))),
    "step_sizes_by_name": ("step_sizes.*dict", steps({"x": 0.1, "y": 0.1, "v": 0.1})),
    "nested_step_sizes": ("step_sizes", steps((0.1, {"w": 0.1}, 0.1))),
    "radius": ("radius.*-1", lambda: decentralized.sldbo(PROBLEM, TOY_RING, TOY_STEPS, radius=-1.0)),
    "exact_diffusion_on_an_even_ring": ("lazy", corrected(ED, ED, ED)),
    "extra_on_an_even_ring": (r"-0\.333.*lazy", corrected(GT, GT, EXTRA)),
    "exact_diffusion_on_changing_graphs": (
        "tracking",
        corrected(GT, ED, GT, gossip=bx.gossip(networks.topology(*[lazy(ring(4))] * 2))),
    ),
    "extra_on_an_asymmetric_graph": (
        "symmetric.*tracking",
        corrected(GT, EXTRA, GT, gossip=bx.gossip(networks.topology(lazy(networks.doubly_stochastic(1, 4))))),
    ),
    "transformation_of_exact_diffusion": (
        "tracking",
        lambda: decentralized.sparkle(PROBLEM, LAZY_SQUARE, optax.adam(0.1), ED()).init(X, Y),
    ),
    "graphs_of_different_sizes": (
        r"\[4, 8, 4\]",
        lambda: decentralized.sldbo(PROBLEM, (TOY_RING, LAZY_RING, TOY_RING), TOY_STEPS),
    ),
    "gossip_is_a_topology": ("bx.gossip", lambda: decentralized.sldbo(PROBLEM, bx.topology.ring(4), TOY_STEPS)),
    "directed_graph": ("push_sum", lambda: bx.gossip(networks.topology(DIRECTED)._replace(directed=True))),
    "no_batch_at_init": (
        r"batch.*init\(x, y, batch\)",
        lambda: decentralized.s3ldbo(PROBLEM, TOY_RING, TOY_STEPS, coins.independent(0.5)).init(X, Y),
    ),
    "no_key_for_a_mask": (r"key.*jax\.random\.key", keyless(decentralized.s3ldbo, coins.independent(0.5))),
    "no_key_for_one_coin": (r"key.*jax\.random\.key", keyless(decentralized.s3ldbo, coins.common(0.5))),
    "no_key_for_a_subset": (r"key.*jax\.random\.key", keyless(decentralized.s3ldbo, coins.subset(0.5))),
    "no_key_for_a_minibatch": (r"key.*jax\.random\.key", keyless(decentralized.dsoba, bx.inner.minibatch(1))),
    "coins_no_function": ("coins.*0.5", lambda: decentralized.s3ldbo(PROBLEM, TOY_RING, TOY_STEPS, 0.5)),
    "coins_of_another_length": (
        r"bool \[4\].*bool \[3\]",
        keyless(decentralized.s3ldbo, lambda key, k, gossip: jnp.ones(3, bool)),
    ),
    "coins_that_are_probabilities": (
        "coins.*float",
        keyless(decentralized.s3ldbo, lambda key, k, gossip: jnp.full(4, 0.5)),
    ),
    "momentum": ("momentum.*-0.1", make(decentralized.dsvrbgd_simultaneous, bx.inner.full, -0.1)),
    "rate": ("rate.*1.5", make(decentralized.dsvrbgd_alternating, bx.inner.full, 0.1, 1.5)),
    "theta": ("theta.*0.0", make(decentralized.dsoba, bx.inner.full, 0.0)),
    "order": (
        "order",
        lambda: decentralized.single_loop(PROBLEM, TOY_RING, 0.1, estimator.full(), GT(), order=(("y",), ("x",))),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    message, call = BAD[name]
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)) as error:
        call(*([PROBLEM, TOY_RING] if name in ("momentum", "rate", "theta") else []))
    assert len(str(error.value)) > 40


# Pytrees, dtypes, transformations of JAX


def nested_outer(x, y, batch):
    return sum(jnp.sum((leaf - batch) ** 2) for leaf in jax.tree.leaves(y)) + jnp.sum(x["penalty"]["log"] ** 2)


def nested_inner(x, y, batch):
    weight = 1 + jnp.sum(x["penalty"]["log"] ** 2)
    return sum(jnp.sum((leaf - batch * x["scale"]) ** 2) + weight * jnp.sum(leaf**2) for leaf in jax.tree.leaves(y))


NESTED = bx.BilevelProblem(nested_outer, nested_inner)
CONTRACT = {
    "s3ldbo": make(decentralized.s3ldbo, coins.subset(0.5), 1.0),
    "s3ldbo_unbiased": make(decentralized.s3ldbo_unbiased, 0.5),
    "dsvrbgd_alternating": variance_reduced(decentralized.dsvrbgd_alternating),
    "sparkle": sparkle(ED, EXTRA, ATC),
}


def nested_start(dtype):
    x = {"penalty": {"log": jnp.full(2, 0.5, dtype)}, "scale": jnp.array(0.7, dtype)}
    y = {"w": jnp.ones((2, 3), dtype), "b": (jnp.zeros(3, dtype), jnp.array(0.1, dtype))}
    batch = bx.Batch(*[jnp.linspace(-1, 1, 4).astype(dtype)] * 2)
    return *bx.replicate((x, y), 4), batch


def described(tree):
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)


@pytest.mark.parametrize("name", CONTRACT)
def test_contract(name):
    """Nested pytrees keep shapes and dtypes; one trace for ten steps; a scan is a loop; vmap over seeds."""
    method = CONTRACT[name](NESTED, LAZY_SQUARE)
    *point, batch = nested_start(jnp.bfloat16)
    state = jax.eval_shape(method.init, *point, batch)
    assert described(jax.eval_shape(method.step, KEY, state, batch)[0]) == described(state)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.x, state.y, state.v))} == {jnp.dtype(jnp.bfloat16)}
    x, y, batch = nested_start(jnp.float64)
    traces = []

    @jit
    def step(key, state):
        traces.append(key)
        return method.step(key, state, batch)

    keys = jax.random.split(KEY, 10)
    state = first = jit(method.init)(x, y, batch)
    assert all(leaf.shape[:1] == (4,) for leaf in jax.tree.leaves(first) if leaf.ndim)
    for key in keys:
        state, info = step(key, state)
    assert len(traces) == 1
    scan = jit(jax.vmap(lambda keys: jax.lax.scan(lambda s, k: method.step(k, s, batch), first, keys)))
    scanned, infos = scan(jnp.stack([keys, jax.random.split(jax.random.key(9), 10)]))
    assert described(at(scanned, 0)) == described(state)
    close(at(scanned, 0), state, 1e-13)
    assert jax.tree.map(jnp.shape, infos) == jax.tree.map(lambda leaf: (2, 10, *jnp.shape(leaf)), info)
    assert all(leaf.shape == (4,) for leaf in jax.tree.leaves(info._replace(rounds=())))


def test_step_outside_jit_is_the_same_step():
    method = decentralized.sldbo(PROBLEM, TOY_RING, TOY_STEPS)
    state, _ = method.step(None, method.init(X, Y), BATCH)
    close((state.x, state.y, state.v), [level[1] for level in toy_run()[0]], 1e-15)


def test_vmap_over_step_sizes():
    def path(scale):
        return roll(decentralized.sldbo(PROBLEM, TOY_RING, bx.Levels(*(scale * a for a in TOY_STEPS))), BATCH, 20)[1]

    scales = (0.5, 1.0)
    got = jit(jax.vmap(path))(jnp.array(scales))
    for row, scale in enumerate(scales):
        expected = simulate(toy(), semi(), [scale * a for a in TOY_STEPS], ring(4), 20)
        close(at(got, row), stacked(expected), 1e-13)


def test_schedules_and_transformations_per_level():
    """A schedule, a number, and a clipping by the norm of each agent's own direction."""
    schedule = optax.exponential_decay(0.05, 1, 0.5)
    clip = optax.chain(optax.clip_by_global_norm(0.1), optax.scale(-0.1))
    method = decentralized.sldbo(PROBLEM, TOY_RING, (schedule, 0.1, clip), correction=correction.none())
    path, _ = toy_run(method)
    x, y, v = all_directions(toy(), path, 4)
    v = v * np.minimum(1, 0.1 / np.abs(v).clip(1e-30))
    for k in range(4):
        for level, d, a in zip(path, (x, y, v), (0.05 * 0.5**k, 0.1, 0.1), strict=True):
            np.testing.assert_allclose(level[k + 1], ring(4) @ (level[k] - a * d[k]), rtol=0, atol=1e-8)


def test_adam_on_tracked_directions_converges():
    adam = optax.adam(optax.exponential_decay(0.05, 100, 0.5))
    _, path, _ = run(decentralized.sldbo(PROBLEM, LAZY_RING, adam), DEFINITE.batch, 2500)
    at_solution(path, DEFINITE, 1e-4)


def test_parameters_of_a_network_descend():
    """A ridge weight x and a small flax network y for every agent."""
    network = flax.linen.Sequential([flax.linen.Dense(4), jnp.tanh, flax.linen.Dense(1)])
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16, 2)))
    data = inputs, jnp.sin(inputs.sum(-1, keepdims=True))

    def fit(x, params, data):
        return jnp.mean((network.apply(params, data[0]) - data[1]) ** 2)

    def ridge(x, params, data):
        return fit(x, params, data) + jnp.exp(x) * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    method = decentralized.s3ldbo(
        bx.BilevelProblem(fit, ridge), TOY_RING, (0.05, 0.1, 0.02), coins.subset(0.5), radius=5.0
    )
    batch = bx.Batch(data, data)

    @jit
    def train(params):
        state = method.init(bx.replicate(jnp.array(-2.0), 4), bx.replicate(params, 4), batch)
        keys = jax.random.split(KEY, 300)
        end, info = jax.lax.scan(lambda s, k: method.step(k, s, batch), state, keys)
        losses = [jnp.mean(jax.vmap(fit)(s.x, s.y, data)) for s in (state, end)]
        return losses, end, info

    losses, end, info = train(jax.jit(network.init)(jax.random.key(1), inputs[0]))
    assert losses[1] < 0.7 * losses[0]
    assert end.x.mean() < -2.1
    assert not np.any(info.breakdown)

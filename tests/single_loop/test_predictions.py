"""Predicted directions: literal recursions, limits that do not depend on the model, what each model says and learns."""

import functools
import itertools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from cases import DEFINITE, ED, GT, KEY, LAZY_RING, STEPS, W
from networks import at_solution, close, roll, run, stacked

import bilevax as bx
from bilevax.single_loop import GAUSS_SEIDEL, JACOBI, estimator, prediction
from bilevax.testing.problems._quadratic import PROBLEM

RNG = np.random.default_rng(0)
SIZES = (2, 3, 3)
ENDS = np.cumsum(SIZES)[:-1]


def jacobians():
    """∂(d_x, d_y, d_v)/∂(x, y, v) of each agent of the quadratic, [8, 8, 8]: its directions are affine."""

    def d(z):
        return np.concatenate(networks.directions(DEFINITE, np.split(np.tile(z, (8, 1)), ENDS, 1)), 1)

    return np.stack([d(unit) - d(0 * unit) for unit in np.eye(8)], 2)


def linear(C):
    """The model C s of an agent; C [8, 8], or None to read it from the agent's outer data."""

    def change(memory, problem, start, end, batch):
        step = jnp.concatenate([b - a for a, b in zip(start, end, strict=True)])
        matrix = batch.outer["C"] if C is None else C
        return bx.Levels(*jnp.split(matrix @ step, ENDS))

    return prediction.Prediction(lambda *refreshed: (), lambda memory, *moved: memory, change)


def with_models(C):
    """The data of the quadratic, and a matrix for each agent; no loss reads it."""
    return bx.Batch({**DEFINITE.batch.outer, "C": jnp.asarray(C)}, DEFINITE.batch.inner)


def recursion(C, masks):
    """Semi-ATC tracking of d̂ = D + C s in numpy."""
    point = [np.zeros((8, size)) for size in SIZES]
    snapshot, D = point, networks.directions(DEFINITE, point)
    mixed, last, path = [0.0] * 3, [0.0] * 3, [point]
    for k in range(len(masks)):
        chosen = masks[max(k - 1, 0), :, None] & (k > 0)
        fresh = networks.directions(DEFINITE, point)
        D, snapshot = (
            [np.where(chosen, *each) for each in zip(new, old, strict=True)]
            for new, old in ((fresh, D), (point, snapshot))
        )
        step = np.concatenate([a - b for a, b in zip(point, snapshot, strict=True)], 1)
        change = np.split(np.einsum("nij,nj->ni", C, step), ENDS, 1)
        d = [one + by for one, by in zip(D, change, strict=True)]
        t = [m + new - old for m, new, old in zip(mixed, d, last, strict=True)]
        point = [W @ (s - a * one) for s, a, one in zip(point, STEPS, t, strict=True)]
        mixed, last = [W @ one for one in t], d
        path.append(point)
    return stacked(path)


def test_trajectory_of_a_linear_model():
    masks, C = RNG.random((40, 8)) < 0.3, RNG.normal(size=(8, 8, 8))
    method = bx.decentralized.s3ldbo(
        PROBLEM, LAZY_RING, STEPS, coins=lambda key, k, gossip: jnp.asarray(masks)[k], predict=linear(None)
    )
    _, path, info = run(method, with_models(C), 40)
    close(path, recursion(C, masks), 1e-11)
    np.testing.assert_array_equal(info.calls.hessian_products[1:], masks[:-1])


def test_an_exact_model_is_sldbo():
    sldbo = bx.decentralized.sldbo(PROBLEM, LAZY_RING, STEPS)
    method = bx.decentralized.s3ldbo(PROBLEM, LAZY_RING, STEPS, coins=bx.coins.subset(0.25), predict=linear(None))
    batch = with_models(jacobians())
    close(run(method, batch, 100)[1], run(sldbo, batch, 100)[1], 1e-12)


MODELS = (0 * jacobians(), -jacobians(), np.abs(RNG.normal(size=(8, 8, 8))))  # frozen, of the wrong sign, of nothing
COINS = {"independent": bx.coins.independent(0.3), "subset": bx.coins.subset(0.25), "common": bx.coins.common(0.3)}
ORDERS = {"jacobi": JACOBI, "gauss_seidel": GAUSS_SEIDEL}
CORRECTIONS = {"tracking": GT(), "exact_diffusion": ED()}
EVERY_DAY = {("independent", "jacobi", "tracking"), ("subset", "gauss_seidel", "exact_diffusion")}


def snapshot_method(coins, order, correction, predict):
    lazy = estimator.lazy_snapshot(COINS[coins], predict=predict)
    return bx.single_loop.single_loop(PROBLEM, LAZY_RING, STEPS, lazy, CORRECTIONS[correction], order=ORDERS[order])


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(parts, id="-".join(parts), marks=() if parts in EVERY_DAY else pytest.mark.slow)
        for parts in itertools.product(COINS, ORDERS, CORRECTIONS)
    ],
)
def test_the_limit_is_that_of_the_problem_whatever_the_model(parts):
    method = snapshot_method(*parts, linear(None))
    paths = jax.jit(jax.vmap(lambda C: roll(method, with_models(C), 1500)[1]))(np.stack(MODELS))
    for number in range(len(MODELS)):
        at_solution([level[number] for level in paths], DEFINITE)


PENALTIES = bx.BilevelProblem(
    lambda x, y, _: 0.1 * jnp.sum(x**2) * jnp.sum(y), lambda x, y, _: jnp.exp(x[0]) * jnp.sum(y**4)
)  # parts of no loss: a model that is wrong
SECANTS = prediction.chain(prediction.data_free(PENALTIES), prediction.trusted(prediction.secants(3)))


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(("common", "jacobi", "exact_diffusion"), marks=pytest.mark.slow),
        ("subset", "gauss_seidel", "tracking"),
    ],
)
def test_limit_of_secants(parts):
    _, path, _ = run(snapshot_method(*parts, SECANTS), DEFINITE.batch, 1500)
    at_solution(path, DEFINITE)


# Secants, of one agent whose directions are H z


H, MOVES = RNG.normal(size=(8, 8)), RNG.normal(size=(6, 8)) * np.repeat([1e-3, 1.0, 10.0], SIZES)


def levels(z, dtype=float):
    return bx.Levels(*(jnp.asarray(part, dtype) for part in np.split(np.asarray(z), ENDS)))


@functools.partial(jax.jit, static_argnums=0)
def told(model, moves, matrix, step):
    """The change along a step that is predicted after these moves [m, 8], and the memory."""
    zero = bx.Levels(*jnp.split(0 * step, ENDS))

    def learn(memory, move):
        end, change = (bx.Levels(*jnp.split(one, ENDS)) for one in (move, matrix @ move))
        return model.update(memory, None, zero, end, change, None), None

    memory, _ = jax.lax.scan(learn, model.init(None, zero, zero, None), moves)
    return jnp.concatenate(model.change(memory, None, zero, bx.Levels(*jnp.split(step, ENDS)), None)), memory


def literal(moves, step, pairs, damping, scale):
    """θ ΔD (ΔZᵀ M ΔZ + λ I)⁻¹ ΔZᵀ M s with pairs scaled to length 1, levels to one sum, and then the diagonal to 1."""
    Z = (moves / np.linalg.norm(moves, axis=1)[:, None])[-pairs:].T
    sums = [np.sum(level**2) for level in np.split(Z, ENDS)]
    M = np.repeat([1 / one if one else 0.0 for one in sums], SIZES)
    Z = Z / np.sqrt(np.einsum("dm,d,dm->m", Z, M, Z))
    return scale * H @ Z @ np.linalg.solve(Z.T @ (M[:, None] * Z) + damping * np.eye(pairs), Z.T @ (M * step))


@pytest.mark.parametrize(("number", "pairs"), [(6, 4), (4, 4), (1, 1)])
def test_secants_are_regularised_least_squares(number, pairs):
    model, step = prediction.secants(pairs, damping=0.1, scale=0.7), RNG.normal(size=8)
    got, _ = told(model, MOVES[:number], H, step)
    np.testing.assert_allclose(got, literal(MOVES[:number], step, pairs, 0.1, 0.7), rtol=1e-9, atol=1e-11)


def test_along_remembered_moves_secants_are_exact():
    step = RNG.normal(size=4) @ MOVES[-4:]
    got, _ = told(prediction.secants(4, damping=1e-12), MOVES, H, step)
    np.testing.assert_allclose(got, H @ step, rtol=1e-7)


@pytest.mark.parametrize("size", [1.0, 1e-25, 1e12])
def test_secants_know_no_scale_in_single_precision(size):
    model = prediction.secants(4, damping=0.01)
    got, memory = told(model, np.float32(size * MOVES), np.float32(H), np.float32(size * MOVES[2]))
    expected = literal(MOVES, MOVES[2], 4, 0.01, 1.0)
    np.testing.assert_allclose(np.asarray(got) / size, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    assert {leaf.dtype.name for leaf in jax.tree.leaves(memory)} == {"float32"}


def test_pairs_that_are_none_say_nothing():
    model, zeros, step = prediction.secants(4), np.zeros((2, 8)), np.ones(8)
    before, _ = told(model, zeros, H, step)
    np.testing.assert_array_equal(before, 0)
    some = told(model, MOVES[:2], H, step)
    later = told(model, np.concatenate([MOVES[:2], zeros, zeros]), H, step)
    close(later, some, 0)  # a refresh where the last one was teaches nothing
    still = np.concatenate([MOVES[:, :2], np.zeros((6, 6))], 1)  # y and v have not moved
    got, memory = told(model, still, H, step)
    assert np.isfinite(got).all()
    assert memory.weights[0] > 0
    np.testing.assert_array_equal(memory.weights[1:], 0)


# What reads no data

RIDGE = bx.curvature.ModelLoss(
    lambda y, inputs: inputs @ y["w"],
    bx.curvature.squared_error,
    lambda x, batch: batch,
    weights=lambda x, batch: jax.nn.sigmoid(x[:5]),
    l2=lambda x: {"w": jnp.exp(x[5])},
    center=lambda x: {"w": jnp.outer(x[:3], x[:2])},
)
ALONE = bx.BilevelProblem(
    lambda x, y, batch: jnp.zeros(()),
    lambda x, y, batch: 0.5 * jnp.exp(x[5]) * jnp.sum((y["w"] - jnp.outer(x[:3], x[:2])) ** 2),
)


def far_points():
    return [
        bx.Levels(jnp.asarray(RNG.normal(size=6)), *({"w": jnp.asarray(RNG.normal(size=(3, 2)))} for _ in range(2)))
        for _ in range(2)
    ]


def test_the_penalty_of_a_model_loss_is_what_reads_no_data():
    start, end = far_points()
    ridge = bx.BilevelProblem(RIDGE, RIDGE)
    change = jax.jit(lambda model, problem: model.change((), problem, start, end, None), static_argnums=(0, 1))
    read, given = change(prediction.data_free(), ridge), change(prediction.data_free(ALONE), ridge)
    directions = jax.jit(lambda point: bx.problem.directions(ALONE, *point, bx.Batch(None, None)))
    expected = jax.tree.map(jnp.subtract, directions(end), directions(start))
    close(read, bx.Levels(*expected), 1e-12)
    close(given, read, 1e-12)
    without_v = change(prediction.data_free(), ridge)._replace(x=None, v=None)
    start, end = (point._replace(v=()) for point in (start, end))
    got = jax.jit(lambda: prediction.data_free().change((), ridge, start, end, None))()
    assert (got.x, got.v) == (None, None)
    close(got.y, without_v.y, 1e-12)


def test_what_reads_no_data_at_all_needs_no_refresh():
    """Directions without data are predicted exactly: the path is that of everybody in every iteration."""
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), DEFINITE.batch)
    known = bx.BilevelProblem(
        lambda x, y, _: PROBLEM.outer_loss(x, y, one.outer), lambda x, y, _: PROBLEM.inner_loss(x, y, one.inner)
    )
    alike = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (8, *leaf.shape)), one)
    rare = bx.coins.subset(0.125)
    start = jnp.ones((8, 2)), jnp.ones((8, 3))
    paths = [
        run(method, alike, 60, start)[1]
        for method in (
            bx.decentralized.s3ldbo(PROBLEM, LAZY_RING, STEPS, coins=rare, predict=prediction.data_free(known)),
            bx.decentralized.sldbo(PROBLEM, LAZY_RING, STEPS),
        )
    ]
    close(*paths, 1e-12)


def test_the_last_link_learns_what_the_first_leaves():
    """An exact first link leaves nothing."""
    model = prediction.chain(linear(jnp.asarray(H)), prediction.secants(4))
    got, (_, memory) = told(model, MOVES, H, np.ones(8))
    np.testing.assert_allclose(got, H @ np.ones(8), rtol=1e-12)
    close(memory.changes, jax.tree.map(jnp.zeros_like, memory.changes), 1e-12)
    double = prediction.chain(linear(jnp.asarray(3 * H)), prediction.secants(4, damping=1e-12))
    step = MOVES[-2] - 2 * MOVES[-1]
    np.testing.assert_allclose(told(double, MOVES, H, step)[0], H @ step, rtol=1e-7)


RIGHT, SILENT = (prediction.trusted(linear(jnp.asarray(C))) for C in (H, 0 * H))


@pytest.mark.parametrize(("multiple", "trust"), [(1.0, 1.0), (-1.0, 0.0), (4.0, 0.25), (0.5, 1.0), (0.0, 0.0)])
def test_a_model_is_trusted_as_far_as_it_was_right(multiple, trust):
    """One that says too little is not multiplied; one whose sign is wrong, or that says nothing, changes nothing."""
    model, truth = (RIGHT, H / multiple) if multiple else (SILENT, H)
    got, memory = told(model, MOVES[:1], truth, np.ones(8))
    np.testing.assert_allclose(got, trust * H @ np.ones(8), rtol=1e-12, atol=1e-14)
    later, after = told(model, np.concatenate([MOVES[:1], np.zeros((1, 8))]), truth, np.ones(8))
    close((later, after), (got, memory), 0)  # a refresh where the last one was teaches nothing
    np.testing.assert_array_equal(told(model, MOVES[:0], truth, np.ones(8))[0], 0)  # believed when it was right once


def test_trust_is_a_running_mean_of_each_level():
    """Of a model that is right at first and wrong in the end, whose y is always right."""
    flip = jnp.asarray(np.repeat([1.0, 0.0, 0.0], SIZES))

    def change(memory, problem, start, end, batch):
        step = jnp.concatenate([b - a for a, b in zip(start, end, strict=True)])
        return bx.Levels(*jnp.split(jnp.where((memory > 0) & (flip > 0), -1, 1) * (H @ step), ENDS))

    counting = prediction.Prediction(lambda *refreshed: jnp.zeros(()), lambda memory, *moved: memory + 1, change)
    _, memory = told(prediction.trusted(counting, rate=0.25), MOVES[:2], H, np.ones(8))
    once, twice = 0.25, 0.25 * 0.75  # ‖p‖ = ‖c‖, and cosines of ±1
    np.testing.assert_allclose(memory.size, twice + once, rtol=1e-12)
    np.testing.assert_allclose(memory.agreement, [twice - once, twice + once, twice + once], rtol=1e-12)


# What is refused


def returning(change):
    return prediction.Prediction(lambda *refreshed: 0.0, lambda memory, *moved: memory, lambda *moved: change(*moved))


def stepped(predict):
    method = bx.decentralized.s3ldbo(PROBLEM, LAZY_RING, STEPS, coins=bx.coins.subset(0.25), predict=predict)
    state = jax.eval_shape(method.init, jnp.zeros((8, 2)), jnp.zeros((8, 3)), DEFINITE.batch)
    return jax.eval_shape(method.step, KEY, state, DEFINITE.batch)


def wider(memory, problem, start, end, batch):
    return bx.Levels(jnp.zeros(3), None, None)


REFUSED = {
    "no_prediction": (r"predict must be a Prediction; got 3 .*secants", lambda: stepped(3)),
    "a_model_without_arguments": (
        r"predict\.change must be a function \(memory, problem, start, end, batch\)",
        lambda: stepped(returning(wider)._replace(change=lambda memory: memory)),
    ),
    "a_change_that_is_no_levels": (
        r"what predict\.change returns must be a Levels; got",
        lambda: stepped(returning(lambda *moved: 0.0)),
    ),
    "a_change_of_another_shape": (r"change of x of predict\.change must keep its", lambda: stepped(returning(wider))),
    "a_memory_of_another_form": (
        r"memory after predict\.update must keep its structure",
        lambda: stepped(linear(jnp.eye(8))._replace(update=lambda *moved: 1.0)),
    ),
    "no_pairs": ("pairs must be an int >= 1; got 0", lambda: prediction.secants(0)),
    "no_damping": ("damping must be a finite number > 0; got 0", lambda: prediction.secants(2, damping=0.0)),
    "too_large_a_scale": (r"scale must be in \(0, 1\]; got 2", lambda: prediction.secants(2, scale=2.0)),
    "one_link": ("last must be a Prediction; got None", lambda: prediction.chain(prediction.secants(2), None)),
    "trust_in_nothing": ("predict must be a Prediction; got None", lambda: prediction.trusted(None)),
    "no_rate": (r"rate must be in \(0, 1\]; got 0", lambda: prediction.trusted(prediction.secants(2), rate=0.0)),
    "a_penalty_for_a_problem": (
        "problem must be a BilevelProblem; got",
        lambda: prediction.data_free(lambda x, y: 0.0),
    ),
    "a_penalty_of_two_arguments": (
        r"problem\.inner_loss must be a function \(x, y, batch\)",
        lambda: prediction.data_free(bx.BilevelProblem(lambda x, y, _: 0.0, lambda x, y: 0.0)),
    ),
    "a_penalty_that_reads_data": (
        r"problem\.inner_loss must be the part of a loss that reads no data.*got TypeError",
        lambda: stepped(prediction.data_free(bx.BilevelProblem(lambda x, y, _: 0.0, lambda x, y, batch: batch[0]))),
    ),
    "a_plain_loss_without_its_penalty": (
        r"problem must say what of the losses reads no data.*; got None beside",
        lambda: stepped(prediction.data_free()),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    message, call = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_predictions_print_as_their_calls():
    assert repr(SECANTS).startswith("chain(data_free(BilevelProblem(outer_loss=<lambda>, inner_loss=<lambda>)), trus")
    method = bx.decentralized.s3ldbo(
        PROBLEM, LAZY_RING, STEPS, coins=bx.coins.subset(0.25), predict=prediction.secants(6)
    )
    assert "predict=secants(6)" in repr(method)
    assert repr(linear(None)) == "Prediction(init, update, change)"

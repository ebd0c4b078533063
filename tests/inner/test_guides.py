"""Guesses of a hypergradient: no bias whatever they are, and the noise that their angle predicts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from directional_cases import (
    CLEANING,
    DIRECT,
    KEY,
    QUADRATIC,
    QUADRATIC_GRADIENT,
    QUADRATIC_SGD,
    WEIGHTS,
    Y0,
    N,
    assert_mean,
    cleaning_estimate,
    cleaning_loss,
    estimate,
    flat,
    from_x,
    linear_loss,
    probe,
    quadratic_estimate,
    rows,
    signs,
    tracking_loss,
    validation_loss,
)

import bilevax as bx
from bilevax.inner import chain, forward_gradient, implicit, no_gradient, reverse
from bilevax.inner.guides import at_solution, blocks, fixed, from_start, running_mean, several

MOMENTUM = optax.sgd(0.3, momentum=0.9)
U = np.array([1.0, -2.0, 3.0, 0.5, 4.0])
GUESSES = np.array([[1.0, -1.0, 2.0, 0.0, 3.0], [0.0, 1.0, 1.0, 1.0, -1.0]])


def truncated(loss, optimizer, steps, last, sample=bx.sampling.full, initial=None):
    first = no_gradient(loss, optimizer, steps - last, initial=initial, sample=sample)
    return from_start(chain(first, reverse(loss, optimizer, last, sample=sample)))


def quadratic(directions, **options):
    return forward_gradient(QUADRATIC.inner_loss, QUADRATIC_SGD, 2, directions=directions, **options)


# A quadratic whose numbers are known.


def over_signs(directions, **options):
    """Estimates for all four r = (±1, ±1) as the one random direction: [4, 2], in the order of `signs`."""
    run = jax.vmap(lambda V: quadratic_estimate(quadratic(directions, sampler=rows(V), **options)))
    grads, _, info = run(signs(2)[:, None, :])
    return np.asarray(grads), info.inner.detail


ONE_STEP = truncated(QUADRATIC.inner_loss, QUADRATIC_SGD, 2, 1)  # proposes (1/4, −1/2)
IMPLICIT = at_solution(implicit(QUADRATIC.inner_loss, ihvp=bx.ihvp.exact()))  # proposes (1, −1)


@pytest.mark.parametrize("guide", [ONE_STEP, fixed(jnp.array([[-1.0, 2.0]]))], ids=["truncated", "fixed"])
def test_guided_by_the_last_step(guide):
    """Only the direction of the guess counts, not its length or sign."""
    grads, detail = over_signs(2, guide=guide)
    plus, minus = [0.4775, -0.73], [0.3975, -0.77]  # r = (1, 1) and (1, −1); −r gives the same
    np.testing.assert_allclose(grads, [plus, minus, minus, plus], atol=1e-12)
    np.testing.assert_allclose(grads.mean(axis=0), QUADRATIC_GRADIENT, atol=1e-12)
    np.testing.assert_allclose(np.sum((grads - QUADRATIC_GRADIENT) ** 2, axis=1), 1 / 500, atol=1e-12)
    # ‖Qᵀu‖² = 961/1280 of 193/256, and v · u = 3/40 along v = (6, 3)/5, 1/40 along (2, 1)/5.
    unexplained = np.array([9, 1, 1, 9]) / 1600
    np.testing.assert_allclose(detail.cosine**2, 961 / 1280 / (961 / 1280 + unexplained), rtol=1e-12)
    assert 961 / 1280 + unexplained.mean() == pytest.approx(193 / 256, rel=1e-12)


@pytest.mark.parametrize(("shift", "error"), [(ONE_STEP, 25 / 256), (IMPLICIT, 97 / 256)], ids=["last", "implicit"])
def test_control_variates(shift, error):
    """The noise is that of what the guess misses, ‖u − c‖²; a plain estimate has 193/256."""
    grads, detail = over_signs(1, control_variate=shift)
    np.testing.assert_allclose(grads.mean(axis=0), QUADRATIC_GRADIENT, atol=1e-12)
    np.testing.assert_allclose(np.sum((grads - QUADRATIC_GRADIENT) ** 2, axis=1), error, atol=1e-12)
    assert detail.variance.mean() == pytest.approx(error, rel=1e-12)


# Five numbers, all 32 vectors of signs.


@functools.partial(jax.jit, static_argnums=(0, 1))
def over_all_signs(directions, make, guesses):
    options = make(guesses)
    return jax.vmap(lambda V: probe(directions, jnp.asarray(U), sampler=rows(V), **options))(signs(5)[:, None, :])


def enumerate_signs(directions, make, guesses):
    """Estimates of U [32, 5] for all r = (±1, ... ±1) as the one random direction."""
    grads, _, info = over_all_signs(directions, make, jnp.asarray(guesses))
    return np.asarray(grads), info.inner


def plain(guesses):
    return {}


def guided(guesses):
    return {"guide": fixed(guesses)}


def shifted(guesses):
    return {"control_variate": fixed(guesses)}


def both(guesses):
    return {"guide": fixed(guesses[:1]), "control_variate": fixed(guesses[1:])}


def outside(guesses):
    q, _ = np.linalg.qr(np.asarray(guesses).T)
    return np.eye(len(q)) - q @ q.T


def plain_noise(projection, u):
    """E‖P r (r · u) − u‖² for signs r and u = P u, to the last digit."""
    return np.trace(projection) * (u @ u) + 2 * (u @ u) - 2 * u**2 @ np.diag(projection) - u @ u


@pytest.mark.parametrize("k", [1, 2])
def test_guided_is_unbiased_and_within_the_bound(k):
    grads, info = enumerate_signs(k + 1, guided, GUESSES[:k])
    projection = outside(GUESSES[:k])
    rest = projection @ U
    squared_errors = np.sum((grads - U) ** 2, axis=1)
    np.testing.assert_allclose(grads.mean(axis=0), U, atol=1e-12)
    assert squared_errors.mean() == pytest.approx(plain_noise(projection, rest), rel=1e-12)
    assert squared_errors.mean() <= (5 - k + 1) * (rest @ rest)
    assert not info.breakdown.any()
    # w² is the unbiased estimate of what the guesses leave, and gives the cosine that is reported.
    explained = U @ U - rest @ rest
    unexplained = explained * (1 / info.detail.cosine**2 - 1)
    assert unexplained.mean() == pytest.approx(rest @ rest, rel=1e-10)
    # The predicted variance is the true one on average.
    assert info.detail.variance.mean() == pytest.approx(squared_errors.mean(), rel=1e-10)


@pytest.mark.parametrize("make", [shifted, both])
def test_control_variate_is_unbiased_and_of_the_predicted_noise(make):
    guesses = GUESSES if make is both else GUESSES[:1]
    grads, info = enumerate_signs(len(guesses), make, guesses)
    projection = outside(GUESSES[:1]) if make is both else np.eye(5)
    rest = projection @ (U - guesses[-1])
    np.testing.assert_allclose(grads.mean(axis=0), U, atol=1e-12)
    error = np.sum((grads - U) ** 2, axis=1).mean()
    assert error == pytest.approx(plain_noise(projection, rest), rel=1e-12)
    assert info.detail.variance.mean() == pytest.approx(error, rel=1e-10)


def test_a_perfect_guess_is_exact():
    for make in (guided, shifted):
        grads, info = enumerate_signs(2, make, -3 * U[None] if make is guided else U[None])
        np.testing.assert_allclose(grads, np.broadcast_to(U, (32, 5)), atol=1e-12)
        np.testing.assert_allclose(info.detail.relative_error, 0, atol=1e-12)
        np.testing.assert_allclose(info.detail.step_scale, 1, atol=1e-12)
        if make is guided:
            np.testing.assert_allclose(info.detail.cosine, 1, atol=1e-12)
        else:
            assert info.detail.cosine is None


def test_a_guess_at_right_angles_leaves_the_plain_estimate():
    c = np.array([[2.0, 1.0, 0.0, 0.0, 0.0]])
    expected, _ = enumerate_signs(1, plain, c)
    grads, info = enumerate_signs(2, guided, c)
    np.testing.assert_allclose(grads, expected @ outside(c), atol=1e-12)
    np.testing.assert_allclose(info.detail.cosine, 0, atol=1e-12)


@pytest.mark.parametrize("column", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("others", [1, 0])
def test_a_useless_guess_does_no_harm(column, others):
    """Not finite, or zero: the others still guide, and nothing is biased."""
    useless = np.array([1, 1, column, 1, 1]) if column else np.zeros(5)
    guesses = np.concatenate([useless[None], GUESSES[:others]])
    grads, info = enumerate_signs(2 + others, guided, guesses)
    assert not info.breakdown.any()
    assert (info.detail.refused == 1).all()
    np.testing.assert_allclose(grads.mean(axis=0), U, atol=1e-12)
    rest = outside(GUESSES[:1]) @ U if others else U
    assert np.sum((grads - U) ** 2, axis=1).mean() <= 5 * (rest @ rest)
    grads, info = enumerate_signs(1, shifted, useless[None])
    np.testing.assert_allclose(grads, enumerate_signs(1, plain, useless[None])[0], atol=1e-12)
    assert not info.breakdown.any()
    assert (info.detail.refused == 1).all()


def test_guesses_that_repeat_themselves():
    grads, info = enumerate_signs(3, guided, np.stack([GUESSES[0], -2 * GUESSES[0]]))
    np.testing.assert_allclose(grads.mean(axis=0), U, atol=1e-12)
    rest = outside(GUESSES[:1]) @ U
    assert np.sum((grads - U) ** 2, axis=1).mean() <= 5 * (rest @ rest)
    assert np.isfinite(info.detail.cosine).all()


def test_several_are_the_same_as_all_at_once():
    expected, info = enumerate_signs(3, guided, GUESSES)
    grads, other = enumerate_signs(3, lambda c: {"guide": several(fixed(c[1:]), fixed(c[:1]))}, GUESSES)
    np.testing.assert_allclose(grads, expected, atol=1e-12)
    np.testing.assert_allclose(other.detail.cosine, info.detail.cosine, rtol=1e-12)
    assert several(fixed(jnp.asarray(GUESSES)), blocks(3), running_mean(0.5)).number == 6


# Each guide.


def test_blocks_span_the_block_constant_vectors():
    u = {"a": jnp.array([2.0, 2.0, 2.0]), "b": jnp.array([[2.0, -1.0], [-1.0, -1.0]])}  # four and three of a kind
    outer_loss = lambda x, y, batch: optax.tree.vdot(u, y)  # noqa: E731
    inner_loss = lambda x, y, batch: optax.tree.norm(optax.tree.sub(y, x), squared=True) / 2  # noqa: E731
    solver = forward_gradient(inner_loss, optax.sgd(1.0), 1, directions=3, guide=blocks(2))
    grad, _, info = estimate(solver, outer_loss, optax.tree.zeros_like(u), optax.tree.zeros_like(u))
    np.testing.assert_allclose(flat(grad), flat(u), atol=1e-12)
    assert info.inner.detail.cosine == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(("number", "share"), [(1, 0.99), (16, 0.999)])
def test_blocks_explain_most_of_a_smooth_schedule(number, share):
    """Learning rates of 64 steps: a few numbers say nearly all about their gradient."""
    h, rates, y = jnp.geomspace(0.01, 1.0, 20), jnp.full(64, np.log(0.1)), jnp.ones(20)

    def loss(x, y, batch):
        return jnp.sum(h * jnp.log(jnp.cosh(3 * y))) + jnp.sum(y) ** 2 / 40

    def by_schedule(x):
        return optax.sgd(lambda count: jnp.exp(x[count]))

    options = {"sampler": bx.inner.random_directions.hadamard, "guide": blocks(number)}
    grad, _, info = estimate(forward_gradient(loss, by_schedule, 64, directions=32 + number, **options), loss, rates, y)
    u = np.asarray(estimate(reverse(loss, by_schedule, 64), loss, rates, y)[0])
    means = u.reshape(number, -1).mean(axis=1)
    explained = 64 / number * (means @ means) / (u @ u)
    assert explained > share
    np.testing.assert_allclose(np.asarray(grad).reshape(number, -1).mean(axis=1), means, rtol=1e-10)
    assert np.sum((grad - u) ** 2) < 4 * (1 - explained) * (u @ u)
    assert info.inner.detail.cosine**2 == pytest.approx(explained, abs=0.05)


@pytest.mark.parametrize("role", ["guide", "control_variate"])
def test_running_mean_moves_by_its_rate(role):
    """c ← c + rate (ĝ − c), from zero, through five estimates with known directions and a u that moves."""
    rate, random = 0.3, np.random.default_rng(0)
    V, x = random.choice([-1.0, 1.0], size=(5, 2, 5)), jnp.zeros(5)

    def make(V):
        options = {"directions": 2 + (role == "guide"), "sampler": rows(V), role: running_mean(rate)}
        return bx.hypergradient(linear_loss, forward_gradient(tracking_loss, optax.sgd(1.0), 1, **options))

    step = jax.jit(lambda V, state, u: make(V).estimate(KEY, state, x, bx.Batch(u, None))[:2])
    state, c = make(jnp.asarray(V[0])).init(x, x), np.zeros(5)
    for k in range(5):
        u = U + k
        grad, state = step(V[k], state, u)
        if k > 0 or role == "control_variate":  # a guide without a guess takes any direction
            known = c if role == "control_variate" else c * (c @ u) / (c @ c)
            projection = np.eye(5) if role == "control_variate" else outside(c[None])
            expected = known + projection @ np.mean([v * (v @ (u - known)) for v in V[k]], axis=0)
            np.testing.assert_allclose(grad, expected, atol=1e-10)
        c = c + rate * (np.asarray(grad) - c)
        np.testing.assert_allclose(getattr(state.solver, role), c, atol=1e-12)


def test_running_mean_as_control_variate_removes_the_noise():
    """DIANA's shift: at a standing u with the rate b / (b + N) the noise decays to nothing."""
    N, b = 5, 2
    solver = forward_gradient(tracking_loss, optax.sgd(1.0), 1, directions=b, control_variate=running_mean(b / (b + N)))
    hypergrad, x = bx.hypergradient(linear_loss, solver), jnp.zeros(N)

    def step(state, key):
        grad, state, info = hypergrad.estimate(key, state, x, bx.Batch(U, None))
        return state, (jnp.sum((grad - U) ** 2), info.inner.detail.variance)

    _, (errors, predicted) = jax.jit(jax.lax.scan, static_argnums=0)(
        step, hypergrad.init(x, x), jax.random.split(KEY, 150)
    )
    assert errors[:10].mean() > 10
    assert errors[-1] < 1e-6
    assert predicted[-1] < 1e-6


def test_a_guess_from_the_start_with_minibatches():
    """From all steps of the same unroll it is exact: the same batches, the same start."""
    sample = bx.sampling.minibatch(8)
    shared = {"directions": 2, "sample": sample, "initial": from_x}
    expected, _, _ = cleaning_estimate(reverse(cleaning_loss, MOMENTUM, 5, initial=from_x, sample=sample))
    guess = from_start(reverse(cleaning_loss, MOMENTUM, 5, initial=from_x, sample=sample))
    grad, _, _ = cleaning_estimate(forward_gradient(cleaning_loss, MOMENTUM, 5, **shared, control_variate=guess))
    np.testing.assert_allclose(flat(grad), flat(expected), atol=1e-10)


GUIDES = {
    "several": several(
        truncated(cleaning_loss, MOMENTUM, 6, 2),
        at_solution(implicit(cleaning_loss, ihvp=bx.ihvp.neumann(terms=3, step_size=0.3))),
        running_mean(0.2),
    ),
    "implicit": at_solution(implicit(cleaning_loss, ihvp=bx.ihvp.cg(maxiter=3, damping=0.1))),
}


@pytest.mark.parametrize(("name", "role"), [("several", "guide"), ("implicit", "control_variate")])
def test_mean_and_variance_over_many_keys(name, role):
    """A guess is taken where the forward gradient itself ends, and the reported cosine is the true one."""
    solver = forward_gradient(cleaning_loss, MOMENTUM, 6, directions=8, **{role: GUIDES[name]})
    hypergrad = bx.hypergradient(validation_loss, solver)
    exact = flat(cleaning_estimate(reverse(cleaning_loss, MOMENTUM, 6))[0])
    run = jax.jit(jax.vmap(hypergrad.estimate, (0, None, None, None)))
    start, keys = hypergrad.init(WEIGHTS, Y0, CLEANING), jax.random.split(jax.random.key(3), 1000)
    _, states, _ = run(keys, start, WEIGHTS, CLEANING)
    state = start._replace(solver=jax.tree.map(lambda leaf: leaf[0], states.solver))  # a running mean of something
    grads, _, info = run(jax.random.split(jax.random.key(4), 1000), state, WEIGHTS, CLEANING)
    squared_errors = np.sum((flat(grads, axes=1) - exact) ** 2, axis=1)
    assert_mean(flat(grads, axes=1), exact)
    assert_mean(squared_errors - info.inner.detail.variance, 0)
    if role == "guide":
        u, k = exact - DIRECT, 3
        rest = squared_errors.mean() * (8 - k) / (N - k)  # nearly: fourth moments
        assert info.inner.detail.cosine.mean() == pytest.approx(np.sqrt(1 - rest / (u @ u)), abs=0.05)
        assert squared_errors.mean() < (N - 1) / 8 * (u @ u)


@pytest.mark.parametrize(("role", "solves"), [("guide", 2), ("control_variate", 1)])
def test_calls_of_the_guides_are_counted(role, solves):
    """A guide has its directions pushed in a second run."""

    def info_of(solver):
        return quadratic_estimate(solver)[2].inner

    own = implicit(QUADRATIC.inner_loss, ihvp=bx.ihvp.neumann(terms=3, step_size=0.2))
    none, alone = info_of(quadratic(3)).calls, info_of(own).calls
    info = info_of(quadratic(3, **{role: at_solution(own)}))
    again = bx.problem.Calls(inner_gradients=2 * (solves - 1), outer_gradients=-1)
    assert info.calls == jax.tree.map(lambda *counts: sum(counts), none, alone, again)
    assert (info.detail.solves, info.detail.tangents) == (solves, 3)


# The house around it.


@pytest.mark.usefixtures("uncached")
def test_states_keep_their_shapes():
    """A scan would refuse a state that changes; the second phase starts where the first one ends."""
    outer_loss = lambda x, y, u: jnp.sum((y - u) ** 2) / 2  # noqa: E731
    sgd = optax.sgd(0.5)
    guide = several(
        truncated(tracking_loss, sgd, 3, 1),
        at_solution(implicit(tracking_loss, ihvp=bx.ihvp.neumann(terms=2, step_size=0.3))),
        running_mean(0.2),
    )
    second = bx.hypergradient(outer_loss, forward_gradient(tracking_loss, sgd, 3, directions=5, guide=guide))
    first = bx.hypergradient(outer_loss, implicit(tracking_loss, sgd, 3, ihvp=bx.ihvp.identity(0.3)))
    hypergrad, batch = bx.two_phase(3, first, second), bx.Batch(jnp.asarray(U), None)

    def step(carry, key):
        x, state = carry
        grad, new_state, info = hypergrad.estimate(key, state, x, batch)
        return (x - 0.1 * grad, new_state), (x, state, grad, info)

    def run(state, keys):
        return jax.lax.scan(step, (jnp.zeros(5), state), keys)[1]

    keys, state = jax.random.split(KEY, 6), hypergrad.init(jnp.zeros(5), jnp.ones(5))
    compiled = jax.jit(run).lower(state, keys).compile()
    xs, states, grads, info = compiled(state, keys)
    assert "conditional(" in compiled.as_text()
    np.testing.assert_array_equal(info.phase, [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(info.second.inner.detail.cosine != 0, [False] * 3 + [True] * 3)
    x, state = jax.tree.map(lambda leaf: leaf[3], (xs, states))
    expected, _, _ = jax.jit(second.estimate)(keys[3], second.init(x, state.y), x, batch)
    np.testing.assert_allclose(grads[3], expected, rtol=1e-10)


def test_more_guesses_than_numbers():
    for guide in (fixed(jnp.ones((6, 5))), several(fixed(jnp.asarray(GUESSES)), blocks(4))):
        with pytest.raises(ValueError, match="guesses"):
            probe(8, jnp.asarray(U), guide=guide)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: blocks(0), ["number must be", "got 0"]),
        (lambda: blocks(2.5), ["number must be", "got float"]),
        (lambda: running_mean(0.0), ["rate must be in (0, 1]", "got 0.0"]),
        (lambda: running_mean(1.5), ["rate must be in (0, 1]", "got 1.5"]),
        (lambda: at_solution(bx.ihvp.exact()), ["solver must be an InnerSolver"]),
        (lambda: from_start(3), ["solver must be an InnerSolver", "got 3"]),
        (lambda: from_start(quadratic(2)), ["must not push random directions itself"]),
        (lambda: at_solution(quadratic(2)), ["must not push random directions itself"]),
        (lambda: fixed(jnp.arange(3)), ["directions must hold floating-point arrays", "got int64"]),
        (lambda: fixed(jnp.array(1.0)), ["directions must have leaves [k, *x]"]),
        (lambda: fixed((jnp.ones((2, 3)), jnp.ones((1, 3)))), ["directions must have leaves [k, *x] of one k"]),
        (lambda: several(), ["guides must be one Guide or more"]),
        (lambda: several(blocks(2), 0.1), ["guides must be a Guide", "got 0.1"]),
        (lambda: probe(2, U, guide=blocks(2)), ["directions must be more than the 2 guesses", "got 2"]),
        (
            lambda: probe(9, U, guide=blocks(6)),
            ["guide must propose at most as many guesses as x has entries, 5", "got 6"],
        ),
        (lambda: probe(2, U, guide=fixed(jnp.ones((1, 4)))), ["directions of guides.fixed", "(4,)", "(5,)"]),
        (lambda: probe(9, U, control_variate=blocks(2)), ["control_variate must propose one guess", "got one with 2"]),
        (
            lambda: probe(
                2, U, guide=blocks(1)._replace(propose=lambda key, s, x, solution: (x, s, bx.problem.Calls()))
            ),
            ["guesses of a guide must keep its structure and shapes", "(5,)", "(1, 5)"],
        ),
    ],
)
def test_mistakes(make, says):
    with pytest.raises(ValueError, match="must") as caught:
        make()
    assert [part for part in says if part not in str(caught.value)] == []

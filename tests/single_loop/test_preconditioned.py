"""Steps that the curvature of each agent has rescaled: the same limit, whatever the coordinates of y."""

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from cases import BATCH, DEFINITE, LAZY_RING, LAZY_SQUARE, TOY_RING, W, X, Y
from networks import at_solution, close, numbers, run, simulate, stacked

import bilevax as bx
from bilevax import decentralized
from bilevax.single_loop import correction, preconditioned
from bilevax.testing.problems import four_agents
from bilevax.testing.problems._quadratic import PROBLEM

NEWTON = preconditioned(0.2, bx.ihvp.exact())
STEPS = bx.Levels(0.05, NEWTON, NEWTON)
T = np.diag([1.0, 6.0, 30.0])
INVERSES = np.linalg.inv(DEFINITE.A)


def in_other_coordinates(q):
    """The same agents with y = T z: Hessians whose condition number is a thousand times that of before."""
    return q._replace(A=T @ q.A @ T, B=T @ q.B, c=q.c @ T, Q=T @ q.Q @ T, e=q.e @ T, S=q.S @ T)


def newton_tracking():
    return networks._tracked(
        lambda W, s, t, a: W @ (s - a * np.einsum("nij,nj->ni", INVERSES, t)), matrix_on_change=False
    )


def test_the_corrected_direction_is_rescaled_and_the_limit_stays():
    """The other way round, own Newton directions that are tracked lead to the zero of their mean."""
    _, path, info = run(decentralized.sldbo(PROBLEM, LAZY_RING, STEPS), DEFINITE.batch, 2500)
    at_solution(path, DEFINITE)
    moves = [networks.semi(), newton_tracking(), newton_tracking()]
    expected = simulate(DEFINITE, moves, (0.05, 0.2, 0.2), W, 60)
    close([level[:61] for level in path], stacked(expected), 1e-12)
    np.testing.assert_array_equal(info.bytes[0], np.full(8, 2 * 8 * 2 * (2 + 3 + 3)))


def test_other_coordinates_of_y_do_not_matter():
    """With numbers for steps they do, though these are as long as stability allows."""
    q = in_other_coordinates(DEFINITE)
    assert np.linalg.cond(q.mean.A) > 500
    _, here, _ = numbers(run(decentralized.sldbo(PROBLEM, LAZY_RING, STEPS), DEFINITE.batch, 600))
    _, there, _ = numbers(run(decentralized.sldbo(PROBLEM, LAZY_RING, STEPS), q.batch, 600))
    close([there[0], there[1] @ T, there[2] @ T], here, 1e-10)
    step = 0.8 / np.linalg.eigvalsh(q.A).max()
    plain = decentralized.sldbo(PROBLEM, LAZY_RING, (0.05, step, step))
    _, slow, _ = numbers(run(plain, q.batch, 600))
    x = q.x_star
    assert np.abs(there[0][-1] - x).max() < 1e-6
    assert 1e-3 < np.abs(slow[0][-1] - x).max() < 1.0


OTHERS = {
    "ma_dsbo": lambda: decentralized.ma_dsbo(PROBLEM, LAZY_RING, STEPS, steps=2, v_steps=2, track=True),
    "gbdsbo": lambda: decentralized.gbdsbo(PROBLEM, LAZY_RING, bx.Levels(0.05, NEWTON)),
    "diamond": lambda: decentralized.diamond(
        PROBLEM,
        LAZY_RING,
        bx.Levels(0.05, NEWTON),
        sample=bx.sampling.full,
        momentum=0.3,
        terms=50,
        inverse_step=0.28,
    ),
    "c2dfb": lambda: decentralized.c2dfb(
        PROBLEM,
        LAZY_RING,
        STEPS,
        steps=5,
        multiplier=10.0,
        compressor=bx.agents.compression.top_k(1.0),
        gossip_step=0.5,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_keep_their_limits_too(name):
    method = OTHERS[name]()
    start = method.init(*networks.zeros(DEFINITE.batch), DEFINITE.batch)

    @jax.jit
    def last(state, batch):
        return jax.lax.fori_loop(0, 2500, lambda _, state: method.step(None, state, batch)[0], state).x

    limits = {"diamond": DEFINITE.x_p, "c2dfb": DEFINITE.penalized(10.0)}
    x = limits.get(name, DEFINITE.x_star)
    np.testing.assert_allclose(last(start, DEFINITE.batch), np.tile(x, (8, 1)), rtol=0, atol=1e-10)


def by_sldbo(problem, newton):
    return decentralized.sldbo(problem, LAZY_SQUARE, bx.Levels(0.1, newton, newton), correction=correction.none())


def by_gbdsbo(problem, newton):
    return decentralized.gbdsbo(problem, LAZY_SQUARE, bx.Levels(0.1, newton))


def one_step(make, fisher, key):
    """The y of four agents with the same data after a step from one start."""
    loss = bx.curvature.ModelLoss(
        lambda y, inputs: inputs @ y, bx.curvature.softmax_cross_entropy, lambda x, batch: batch, l2=0.1
    )
    problem = bx.BilevelProblem(lambda x, y, batch: jnp.sum(y**2) + x**2, loss)
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))
    data = bx.replicate((inputs, jnp.arange(6) % 3), 4)
    method = make(problem, preconditioned(1.0, bx.ihvp.kfac(damping=0.01, fisher=fisher)))
    start = method.init(*bx.replicate((jnp.ones(()), jnp.zeros((3, 3))), 4), bx.Batch(data, data))
    return numbers(jax.jit(method.step)(key, start, bx.Batch(data, data))[0].y)


@pytest.mark.parametrize("make", [by_sldbo, by_gbdsbo])
def test_every_agent_draws_labels_of_its_own(make):
    sampled = one_step(make, bx.curvature.fisher.sampled(), jax.random.key(1))  # no two draws of equal counts
    assert np.abs(sampled).max() > 0.1
    assert np.unique(sampled[:, 0, 0].round(9)).size == 4
    exact = one_step(make, bx.curvature.fisher.exact, None)
    np.testing.assert_allclose(exact, exact[:1].repeat(4, 0), rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="key"):
        one_step(make, bx.curvature.fisher.sampled(), None)


def test_memory_of_the_curvature_is_carried_along():
    """The second moments of ∇_y g at the points that were visited, on all data."""
    step = preconditioned(0.1, bx.ihvp.diagonal(scale=1.0, decay=0.9, eps=1.0))
    method = decentralized.sldbo(PROBLEM, TOY_RING, bx.Levels(0.05, step, 0.1))
    state, path, _ = numbers(run(method, BATCH, 20))
    moments = 0.0
    for k in range(20):
        moments = 0.9 * moments + 0.1 * networks.direction_y(four_agents(), path[0][k], path[1][k]) ** 2
    np.testing.assert_array_equal(state.corrections.y.move.step, np.full(4, 20))
    np.testing.assert_allclose(state.corrections.y.move.moments, moments, rtol=1e-12)


def started(steps, form=correction.tracking):
    return lambda: decentralized.sldbo(PROBLEM, LAZY_SQUARE, steps, correction=form()).init(X, Y, BATCH)


BAD = {
    "x": (r"step_sizes\.x must be a number.*Precondition y and v", started(bx.Levels(NEWTON, 0.1, 0.1))),
    "all": (r"step_sizes\.x must be a number", started(NEWTON)),
    "exact_diffusion": (r"exact_diffusion must be numbers.*tracking", started(STEPS, correction.exact_diffusion)),
    "extra": (r"extra must be numbers.*tracking", started(STEPS, correction.extra)),
    "not_linear": (r"ihvp must be linear.*bx\.ihvp\.kfac", lambda: preconditioned(0.5, bx.ihvp.cg(maxiter=5))),
    "no_ihvp": (r"ihvp must be an? IHVP", lambda: preconditioned(0.5, jnp.eye(3))),
    "negative": (r"step_size.*-0\.5", lambda: preconditioned(-0.5, bx.ihvp.identity())),
    "vector": (r"step_size must be one number", lambda: preconditioned(jnp.ones(3), bx.ihvp.identity())),
    "schedule": (r"step_size must be a function \(k\)", lambda: preconditioned(lambda k, n: 1.0, bx.ihvp.identity())),
    "adasdbo": (r"step_sizes", lambda: decentralized.adasdbo(PROBLEM, TOY_RING, STEPS)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    message, call = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert len(str(error.value)) > 40

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from benchmarks.__main__ import main
from benchmarks.decentralized import markov, policy_evaluation
from benchmarks.decentralized.exact import Effort, evaluator
from benchmarks.decentralized.network import mean

TASK = "decentralized-policy-evaluation"


@pytest.fixture(autouse=True)
def single_precision():
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="module", params=[None, 0.5], ids=["alike", "uneven"])
def chain(request):
    return markov.draw(1, agents=4, states=20, features=3, discount=0.9, differing=1.0, uneven=request.param)


def in_double_precision(data):
    """The batch before it is rounded, and the network of it."""
    network = policy_evaluation.network(data, 4)
    batch = network.batch
    inner = batch.inner._replace(
        weights=data.visits,
        rewards=np.einsum("st,nst->ns", data.chances, data.rewards),
        features=np.broadcast_to(data.chances @ data.features, batch.inner.features.shape),
    )
    outer = batch.outer._replace(features=np.broadcast_to(data.features, batch.outer.features.shape))
    return network, bx.Batch(outer, inner)


def test_a_chain_has_rows_of_probabilities_and_visits_of_mean_one(chain):
    np.testing.assert_allclose(chain.chances.sum(axis=1), 1)
    np.testing.assert_allclose(chain.visits.mean(axis=0), 1)
    assert (chain.chances >= 0).all()
    assert chain.rewards[0].shape == chain.chances.shape
    assert not np.allclose(chain.rewards[0], chain.rewards[1])


def test_the_mean_losses_over_agents_are_those_of_the_mean_rewards_but_for_a_constant(chain):
    network, x = policy_evaluation.network(chain, 4), np.array([1.0, -2.0, 0.5], np.float32)
    reached = chain.discount * chain.chances @ chain.features @ x + chain.expected
    y, other = np.random.default_rng(0).normal(size=(2, 20)).astype(np.float32)

    def gap(y):
        return np.mean((y - reached) ** 2) / 2

    inner = functools.partial(network.loss, network.problem.inner_loss, x, batch=network.batch.inner)
    np.testing.assert_allclose(inner(y) - inner(other), gap(y) - gap(other), rtol=2e-4)
    outer = network.loss(network.problem.outer_loss, x, y, network.batch.outer)
    np.testing.assert_allclose(outer, np.mean((chain.features @ x - y) ** 2) / 2, rtol=1e-5)


def test_the_accurate_solution_is_the_closed_form_and_the_gradient_vanishes_at_the_known_x(chain):
    x = np.array([1.0, -2.0, 0.5])
    matrix = chain.features - chain.discount * chain.chances @ chain.features
    with jax.enable_x64(True):
        network, batch = in_double_precision(chain)
        exactly = evaluator(network, Effort())
        at, best = (exactly(jnp.asarray(point), jnp.zeros(20), batch) for point in (x, chain.solution))
    np.testing.assert_allclose(at.y, chain.features @ x - matrix @ x + chain.expected, rtol=1e-9)
    np.testing.assert_allclose(at.loss, np.mean((matrix @ x - chain.expected) ** 2) / 2, rtol=1e-9)
    np.testing.assert_allclose(at.gradient, matrix.T @ (matrix @ x - chain.expected) / 20, rtol=1e-9)
    np.testing.assert_allclose(best.gradient, 0, atol=1e-12)


def test_the_values_solve_the_bellman_equation(chain):
    np.testing.assert_allclose(chain.values, chain.expected + chain.discount * chain.chances @ chain.values)
    numbers = policy_evaluation.scores(chain)(chain.solution, None)
    assert numbers["distance"] < 1e-12
    assert 0 < numbers["value_error"] < 1


def test_the_mean_over_drawn_successors_is_unbiased_and_leaves_the_rest_as_it_is(chain):
    network = policy_evaluation.network(chain, 4)
    outer, inner = jax.tree.map(lambda leaf: leaf[0], network.batch)
    assert markov.successors(4)(jax.random.key(0), 0, outer) is outer
    drawn = markov.successors(20_000)(jax.random.key(0), 0, inner)
    np.testing.assert_allclose(drawn.rewards, inner.rewards, atol=0.06)
    np.testing.assert_allclose(drawn.features, inner.features, atol=0.03)
    assert drawn.weights is inner.weights


def test_the_curvature_bounds_every_hessian(chain):
    network = policy_evaluation.network(chain, 4)
    hessian = jax.jacfwd(jax.grad(network.problem.inner_loss, 1), 1)
    hessians = jax.vmap(hessian, (None, None, 0))(network.x, network.y, network.batch.inner)
    np.testing.assert_allclose(np.linalg.eigvalsh(hessians).max(), network.curvature(), rtol=1e-5)


def test_a_method_reaches_the_known_solution(chain):
    network = policy_evaluation.network(chain, 4)
    gossip = bx.gossip(bx.topology.ring(4))
    method = bx.decentralized.sldbo(network.problem, gossip, bx.Levels(0.5, 6.0, 6.0))

    def step(state, _):
        return method.step(None, state, network.batch)[0], None

    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, None, 6000))(method.init(*network.start))
    assert network.scores(*map(np.asarray, (mean(state.x), mean(state.y))))["distance"] < 1e-3


def test_a_run_writes_records_with_the_distance_to_the_solution(tmp_path, capsys):
    options = "--quick --states 20 --features 3 --agents 4 --outer-steps 24 --methods sldbo dsvrbgd --results"
    assert main([TASK, *options.split(), str(tmp_path)]) == 0
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*/*-seed0.json")}
    assert set(records) == {"sldbo-seed0", "dsvrbgd-seed0"}
    for record in records.values():
        assert record["task"] == "decentralized_policy_evaluation"
        distances = record["curve"]["distance"]
        assert distances[0] == pytest.approx(1)  # from x = 0
        assert distances[-1] < 1
        assert record["configuration"]["states"] == 20
    assert records["dsvrbgd-seed0"]["configuration"]["pace"] > 0.5
    assert len([*tmp_path.glob("*/*.png")]) == 1
    assert "value" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--features 0", "features must be an int >= 1; got 0."),
        ("--states 10", "states must be more than features; got 10 states and 10 features. Pass, say, --states 100."),
        ("--heterogeneity -1", "heterogeneity must be a number >= 0; got -1."),
        ("--uneven 0", "uneven must be a number > 0; got 0. Pass, say, --uneven 1, or nothing."),
        ("--methods interact", "; got interact. Pass, say, --methods sldbo."),
    ],
)
def test_bad_values_are_refused_with_the_fix(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([TASK, *arguments.split()])
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())

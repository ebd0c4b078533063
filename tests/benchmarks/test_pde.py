import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.tasks import pde, pde_methods, pde_solvers
from benchmarks.tasks.pde_solvers import EQUATIONS, solve, solve_by_scipy

TIMES = np.array([1, 2, 3]) / 4
ROWS = {row.name: row for row in pde_methods.ROWS}


@pytest.fixture(scope="module")
def solvers():
    """The compiled JAX solver of each equation, (viscosity, field) -> u at the times."""
    return {name: jax.jit(functools.partial(solve, equation, times=3)) for name, equation in EQUATIONS.items()}


def cole_hopf(viscosity, s, t):
    """Solves Burgers' equation from −sin πs, by Gauss–Hermite quadrature of the transformed heat equation."""
    nodes, weights = np.polynomial.hermite.hermgauss(200)
    shifted = s[:, None] - np.sqrt(4 * viscosity * t) * nodes
    mass = weights * np.exp(-np.cos(np.pi * shifted) / (2 * np.pi * viscosity))
    return -(mass * np.sin(np.pi * shifted)).sum(axis=1) / mass.sum(axis=1)


def test_burgers_equation_is_solved_as_cole_and_hopf_did(solvers):
    equation = EQUATIONS["burgers"]
    found = solvers["burgers"](0.1, equation.first(equation.grid))
    np.testing.assert_allclose(found, [cole_hopf(0.1, equation.grid, t) for t in TIMES], atol=1e-8)
    assert np.abs(np.gradient(found[-1], equation.grid)).max() > 2


def test_weak_waves_decay_as_heat_does(solvers):
    wave = np.cos(3 * np.pi * EQUATIONS["burgers"].grid)
    found = solvers["burgers"](0.05, 1e-9 * wave)
    np.testing.assert_allclose(found, 1e-9 * np.exp(-0.05 * (3 * np.pi) ** 2 * TIMES)[:, None] * wave, atol=1e-15)


def test_allen_cahn_reacts_as_its_ordinary_equation_and_grows_by_its_linear_rate(solvers):
    grid = EQUATIONS["allen-cahn"].grid
    found = solvers["allen-cahn"](1e-3, np.full(len(grid), 0.3))
    expected = 0.3 * np.exp(5 * TIMES) / np.sqrt(1 + 0.09 * np.expm1(10 * TIMES))
    np.testing.assert_allclose(found, np.outer(expected, np.ones(len(grid))), rtol=1e-8)
    wave = 1e-7 * np.sin(2 * np.pi * grid)
    growth = np.exp((5 - 0.01 * (2 * np.pi) ** 2) * TIMES)
    np.testing.assert_allclose(solvers["allen-cahn"](0.01, wave), np.outer(growth, wave), atol=1e-14)


@pytest.mark.parametrize("name", EQUATIONS)
def test_scipy_finds_the_solution_that_jax_finds(solvers, name):
    equation = EQUATIONS[name]
    field = equation.first(equation.grid) + 0.2 * np.cos(2 * np.pi * equation.grid)
    found = solve_by_scipy(equation, equation.viscosity, field, 3)
    np.testing.assert_allclose(found, solvers[name](equation.viscosity, field), atol=3e-5)


def test_a_solution_that_scipy_does_not_find_is_an_error(monkeypatch):
    given_up = types.SimpleNamespace(success=False, message="step size too small")
    monkeypatch.setattr(pde_solvers, "solve_ivp", lambda *arguments, **options: given_up)
    with pytest.raises(ArithmeticError, match=r"no solution for viscosity 0.5: step size too small"):
        solve_by_scipy(EQUATIONS["burgers"], 0.5, np.zeros(128), 3)


SMALL = EQUATIONS["burgers"]._replace(points=16, viscosity=0.05)
PROBLEM = pde.Problem(SMALL, modes=4, observations=2)


@pytest.fixture(scope="module")
def exact():
    """A point, the observations of another one, F and ∇F there."""
    data = pde.load(PROBLEM, 0.0, seed=0)
    x = data.truth + jnp.array([-0.7, 0.3, -0.1, 0.2, 0.1])
    value, grad = jax.jit(
        jax.value_and_grad(lambda x: PROBLEM.misfit(x, PROBLEM.solve(x, None, None), data.batch.outer))
    )(x)
    return x, data.batch, value, grad


def estimate(name, exact):
    x, batch, _, _ = exact
    row = ROWS[name]
    hypergrad = pde_methods.counted(row.hypergradient(PROBLEM, row.directions(len(x))), row.passes)
    return jax.jit(hypergrad.estimate)(jax.random.key(1), hypergrad.init(x, jnp.zeros((2, 16))), x, batch)


@pytest.mark.parametrize(
    ("name", "passes", "tolerance"),
    [
        ("forward-gradient", 6, 1e-11),
        ("zeroth-order", 6, 2e-4),
        ("full-zeroth-order", 11, 1e-6),
        ("reverse-checkpointed", 2, 1e-11),
        ("implicit-whole", 3, 1e-11),
    ],
)
def test_rows_that_know_all_of_the_solver_give_the_gradient(exact, name, passes, tolerance):
    _, _, value, expected = exact
    grad, state, info = estimate(name, exact)
    np.testing.assert_allclose(info.outer_loss, value, rtol=1e-12)
    np.testing.assert_allclose(grad, expected, atol=tolerance * np.linalg.norm(expected))
    assert state.passes == passes
    assert not bool(info.inner.breakdown)


def test_shooting_gives_the_gradient_where_its_products_are_solved_for(exact):
    expected = exact[3]
    grad, state, info = estimate("implicit-shooting", exact)
    np.testing.assert_allclose(grad, expected, atol=1e-4 * np.linalg.norm(expected))
    assert 5 < info.inner.calls.hessian_products < 22
    assert state.passes == 5 + 2 * info.inner.calls.hessian_products
    biased, state, _ = estimate("hessian-free-shooting", exact)
    assert np.linalg.norm(biased - expected) > 0.1 * np.linalg.norm(expected)
    assert state.passes == 5


def test_one_direction_is_exact_for_the_viscosity_alone():
    problem = PROBLEM._replace(modes=0)
    batch = pde.load(problem, 0.0, seed=0).batch
    x = jnp.log(jnp.array([0.02]))
    slope = jax.jit(jax.grad(lambda x: problem.misfit(x, problem.solve(x, None, None), batch.outer)))(x)
    hypergrad = pde_methods.forward(problem, 1)
    state = hypergrad.init(x, jnp.zeros((2, 16)))
    grads, _, info = jax.jit(jax.vmap(hypergrad.estimate, (0, None, None, None)))(
        jax.random.split(jax.random.key(0), 6), state, x, batch
    )
    np.testing.assert_allclose(grads, np.tile(slope, (6, 1)), rtol=1e-11)
    np.testing.assert_array_equal(info.inner.detail.variance, 0)


def test_noise_is_a_share_of_what_is_observed_and_seeds_draw_the_field():
    problem = PROBLEM._replace(observations=12)
    clean, noisy = (pde.load(problem, *drawn) for drawn in ((0.0, 3), (0.1, 3)))
    np.testing.assert_array_equal(clean.truth, noisy.truth)
    share = np.std(noisy.batch.outer - clean.batch.outer) / np.sqrt(np.mean(clean.batch.outer**2))
    assert 0.07 < share < 0.13
    assert np.abs(clean.truth[1:] - pde.load(PROBLEM, 0.0, 4).truth[1:]).min() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"observations": 0}, "observations must be >= 1; got 0. Pass, say, --observations 4"),
        ({"noise": -0.1}, "noise must be a share >= 0; got -0.1. Pass, say, --noise 0.05"),
        ({"start": 0.0}, "start must be > 0; got 0. Pass, say, --start 0.25"),
        ({"rate": float("nan")}, "rate must be > 0; got nan"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pde.Config(**arguments)


def test_a_run_in_float64_comes_closer_by_a_black_box_and_by_forward_gradients(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(EQUATIONS, "burgers", SMALL)
    monkeypatch.setitem(pde.SETTINGS, "field", pde.PDESetting(4, 3, 0.05))
    command = f"pde --unknown field --quick --methods forward-gradient-4 zeroth-order-scipy --results {tmp_path}"
    with jax.enable_x64(False):
        assert main(command.split()) == 0
        assert jnp.ones(()).dtype == jnp.float32
    assert "passes" in capsys.readouterr().out
    folder = tmp_path / "pde-burgers-field-quick"
    for name, passes in (("forward-gradient-4", 100), ("zeroth-order-scipy", 100)):
        record = json.loads((folder / f"{name}-seed0.json").read_text())
        assert record["metrics"]["passes"] == passes
        first, last = record["curve"]["misfit"]
        assert last < 0.9 * first
        assert record["configuration"]["directions"] == 4
    assert (folder / f"{folder.name}.png").read_bytes().startswith(b"\x89PNG")


def test_double_precision_leaves_the_settings_as_they_were():
    with jax.enable_x64(False):
        with pde.float64():
            assert jnp.ones(()).dtype == jnp.float64
        assert jnp.ones(()).dtype == jnp.float32
    assert jnp.ones(()).dtype == jnp.float64

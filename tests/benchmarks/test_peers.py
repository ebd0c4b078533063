import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from rich.console import Console

import bilevax as bx

if missing := [name for name in ("jaxopt", "lineax", "optimistix") if importlib.util.find_spec(name) is None]:
    pytest.skip(f"needs the extra peers: {', '.join(missing)}", allow_module_level=True)

from benchmarks.__main__ import main
from benchmarks.harness import timing
from benchmarks.harness.clock import Spent
from benchmarks.studies import libraries, peers, peers_table

SETTINGS = {"digits softmax", "CG-10", "reverse T = 10", "10 outer steps, error 0.001"}


def tiny(seed=0, hidden=None):
    keys = jax.random.split(jax.random.key(seed), 2)
    images, labels = jax.random.normal(keys[0], (30, 4)), jax.random.randint(keys[1], (30,), 0, 10)
    batch = bx.Batch(outer=(images[20:], labels[20:]), inner=(images[:20], labels[:20]))
    return peers.problem("digits softmax", seed, batch, hidden, l2=0.2, step_size=0.3)


def dense(case, y):
    """The implicit hypergradient from a Hessian and a cross derivative that are formed."""
    flat, unravel = ravel_pytree(y)
    gradient = jax.grad(lambda x, flat: case.losses.inner_loss(x, unravel(flat), case.batch.inner), argnums=1)
    b = jax.grad(lambda flat: case.losses.outer_loss(case.x, unravel(flat), case.batch.outer))(flat)
    v = jnp.linalg.solve(jax.jacobian(gradient, argnums=1)(case.x, flat), b)
    return -jax.jacobian(gradient)(case.x, flat).T @ v


def unrolled(case, steps):
    """jax.grad of a Python loop."""

    def value(x):
        y = case.y
        for _ in range(steps):
            gradient = jax.grad(case.losses.inner_loss, argnums=1)(x, y, case.batch.inner)
            y = optax.tree.add_scale(y, -case.step_size, gradient)
        return case.losses.outer_loss(x, y, case.batch.outer)

    return jax.grad(value)(case.x)


@pytest.fixture(scope="module")
def network():
    case = tiny(hidden=2)
    return case, jax.jit(lambda: dense(case, case.trained))(), jax.jit(lambda: unrolled(case, 3))()


@pytest.fixture(scope="module")
def convex():
    case = tiny()
    y = jax.tree.map(jnp.zeros_like, case.y)
    solved = jax.jit(lambda: libraries.newton(case.losses, case.x, y, case.batch.inner, 8))()
    return case, y, jax.jit(lambda: dense(case, solved))()


@pytest.mark.parametrize("library", libraries.IMPLICIT)
def test_implicit_equals_a_dense_solve_in_every_library(library, network):
    case, exact, _ = network
    hypergrad = peers._implicit(case, library, steps=0, iterations=40, warm=False)
    grad = jax.jit(peers.gradient(hypergrad))(case.x, case.trained, case.batch)
    np.testing.assert_allclose(grad, exact, atol=1e-10)


@pytest.mark.parametrize("library", libraries.REVERSE)
def test_reverse_equals_a_python_loop_in_every_library(library, network):
    case, _, exact = network
    hypergrad = libraries.REVERSE[library](case.losses, optax.sgd(case.step_size), 3)
    grad = jax.jit(peers.gradient(hypergrad))(case.x, case.y, case.batch)
    np.testing.assert_allclose(grad, exact, atol=1e-12)


@pytest.mark.parametrize("library", libraries.IMPLICIT)
def test_y_and_v_stay_warm_in_every_library(library, convex):
    case, y, exact = convex
    program = peers.along(peers._implicit(case, library, 3, 2, warm=True, step_size=case.step_size))
    errors = timing.relative_error(jax.jit(program)(jnp.tile(case.x, (40, 1)), y, case.batch), exact)
    assert errors[-1] < 1e-4 < 1e-2 < errors[0]


def test_the_exact_trajectory_starts_at_x_and_holds_exact_hypergradients(convex):
    case, y, exact = convex
    trajectory = jax.jit(lambda: libraries.trajectory(case.losses, case.x, y, case.batch, 3, optax.sgd(0.1)))
    points, grads, size = trajectory()
    np.testing.assert_array_equal(points[0], case.x)
    np.testing.assert_allclose(grads[0], exact, atol=1e-9)
    np.testing.assert_allclose(points[1], points[0] - 0.1 * grads[0], atol=1e-15)
    assert size < 1e-10


def test_ratios_and_quartiles():
    assert timing.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert timing.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 3.0, 4.0)
    np.testing.assert_allclose(timing.relative_error([[3.0, 4.0], [0.0, 5.0]], [0.0, 5.0]), [10**0.5 / 5, 0])


def row(library, seconds, error, note=""):
    return peers_table.Row("p", "s", library, [seconds], [2 * seconds], [1.0], Spent(0.1, 0.2), 8, error, note)


def test_the_fastest_is_another_library_with_a_right_answer():
    rows = [row("plain JAX", 3.0, 1e-7), row("bilevax", 1.0, 1e-7), row("fast", 0.5, 0.3), row("nan", 0.1, np.nan)]
    assert peers_table.fastest([*rows, row("jaxopt", 2.0, 1.2e-7)]).library == "jaxopt"
    sought = [row("plain JAX", 3.0, 2e-4, "CG-40"), row("jaxopt", 2.0, 9e-4, "CG-20"), row("fast", 1.0, 2e-3, "no")]
    assert peers_table.fastest(sought).library == "jaxopt"


def test_each_round_runs_every_program_once_in_shuffled_order():
    order = []
    programs = {name: lambda name=name: order.append(name) for name in "abcd"}
    spent = timing.interleaved(programs, rounds=6, budget=1e-9, seed=0)
    assert all(len(times) == 6 and min(map(min, times)) >= 0 for times in spent.values())
    rounds = [tuple(order[start : start + 4]) for start in range(0, 24, 4)]
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len(set(rounds)) > 1


def test_a_wrong_answer_gets_no_ratio(capsys):
    rows = [row("plain JAX", 2.0, 1e-7), row("bilevax", 1.0, 1e-7), row("lineax", 1.0, np.nan)]
    peers_table.show(rows, Console(width=120, highlight=False))
    output = capsys.readouterr().out
    (line,) = [line for line in output.splitlines() if line.strip().startswith("lineax ")]
    assert "nan" in line
    assert "1.00" not in line
    assert "p, s: bilevax / plain JAX = 0.50 [0.50, 0.50]" in output


def test_a_run_prints_one_table_and_writes_the_records(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(peers.PROBLEMS, "digits", tiny)
    monkeypatch.setattr(peers, "QUICK_BUDGETS", ((1, 1),))
    for table, names in (("IMPLICIT", ("plain JAX", "bilevax")), ("REVERSE", ("plain JAX", "optimistix"))):
        monkeypatch.setattr(libraries, table, {name: getattr(libraries, table)[name] for name in names})
    with jax.enable_x64(False):
        assert main(["peers", "--quick", "--results", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in (*SETTINGS, "The same hypergradient", "bilevax (not reached)"))
    records = [json.loads(path.read_text()) for path in (tmp_path / "peers-quick").glob("*-seed0.json")]
    assert len(records) == 3 + 2 + 2
    assert (tmp_path / "peers-quick" / "peers.png").read_bytes().startswith(b"\x89PNG")
    for record in records:
        assert set(record) >= {"task", "method", "seed", "configuration", "versions", "device", "metrics", "curve"}
        assert record["metrics"]["rounds"] == len(record["curve"]["seconds"]) == 3
        assert record["metrics"]["cpu_seconds"] == np.median(record["curve"]["cpu_seconds"])
    assert all(record["metrics"]["error"] < 1e-5 for record in records if "reverse" in record["method"])
    assert {record["configuration"]["note"] for record in records} == {"", "not reached"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rounds 0", "rounds must be an int >= 1; got 0. Pass --rounds 5."),
        ("--budget nan", "budget must be a number of seconds > 0; got nan. Pass, say, --budget 20."),
        ("--problems", "problems must be some of digits, mnist; got none. Pass, say, --problems digits."),
    ],
)
def test_bad_values_are_refused_with_the_fix(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["peers", *arguments.split()])
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())

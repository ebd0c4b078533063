import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro

import bilevax as bx
from benchmarks.harness.loop import Outcome, active
from benchmarks.harness.report import Run, mean_and_error
from benchmarks.networks.dense import perceptron
from benchmarks.studies import two_phase, unrolling, unrolling_methods, unrolling_tails
from benchmarks.tasks.estimators import MOMENTUM, Inner
from benchmarks.tasks.hyper_cleaning import L2, inner_loss

SMALL = {"train": 20, "validation": 15, "corruption": 0.5}


@pytest.fixture
def small(monkeypatch):
    for task in (unrolling, two_phase, unrolling_tails):
        monkeypatch.setattr(task, "SPLIT", SMALL)
    monkeypatch.setattr(two_phase, "INNER_STEPS", 2)
    with jax.enable_x64(False):
        yield


def start(config, arguments, results):
    arguments = [*arguments.split(), "--results", str(results)]
    return tyro.cli(config, args=arguments, config=(tyro.conf.FlagCreatePairsOff,)).run()


def records(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_info_of_two_phases_is_that_of_the_active_one():
    def info(loss, breakdown, detail):
        calls = bx.problem.Calls(inner_gradients=int(10 * loss))
        return bx.hypergradients.HypergradientInfo(
            loss, bx.problem.SolverInfo(loss + 1, loss + 2, breakdown, calls, detail)
        )

    first, second = info(1.0, True, ()), info(2.0, False, (3.0,))
    nested = bx.hypergradients.TwoPhaseInfo(0, second, first)
    for phase, chosen in ((0, first), (1, second)):
        for whole in (
            bx.hypergradients.TwoPhaseInfo(phase, first, second),
            bx.hypergradients.TwoPhaseInfo(phase, first, nested),
        ):
            found = active(whole)
            assert found.outer_loss == chosen.outer_loss
            assert found.inner.gradient_norm == chosen.inner.gradient_norm
            assert found.inner.breakdown == chosen.inner.breakdown
            assert found.inner.calls.inner_gradients == chosen.inner.calls.inner_gradients
    assert active(first) is first


@pytest.mark.parametrize("plain", [False, True])
def test_exact_is_the_derivative_of_the_steps(small, plain):
    net, steps = unrolling.network(2), 2
    at = unrolling.problem(net, seed=1)
    found = unrolling.exact(net, Inner(inner_loss(net), net.curvature, unrolling.RATE, steps), plain, at)

    def cross_entropies(y, images, labels):
        logits = jax.nn.log_softmax(perceptron(y, images))
        return -jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]

    def g(y, x):
        images, labels, _ = at.batch.inner
        return jnp.mean(jax.nn.sigmoid(x) * cross_entropies(y, images, labels)) + L2 / 2 * optax.tree.norm(y) ** 2

    rate, decay = (unrolling.RATE / (1 - MOMENTUM), 0.0) if plain else (unrolling.RATE, MOMENTUM)

    @jax.jit
    @jax.grad
    def derivative(x):
        y, moment = at.y, optax.tree.zeros_like(at.y)
        for _ in range(steps):
            slope = jax.grad(g)(y, x)
            moment = jax.tree.map(lambda m, s: decay * m + s, moment, slope)
            y = jax.tree.map(lambda leaf, m: leaf - rate * m, y, moment)
        return jnp.mean(cross_entropies(y, *at.batch.outer))

    assert found.dtype == np.float64
    np.testing.assert_allclose(derivative(at.x), found, rtol=2e-3, atol=1e-5 * np.abs(found).max())


def test_estimates_are_compared_with_the_answer():
    answer, keys, calls = np.array([3.0, 4.0]), range(4), []

    def run(key, at):
        calls.append(key)
        return np.array([[3.0, 4.0], [0.0, 0.0], [-3.0, -4.0], [6.0, 8.0]][key]), ()

    found = unrolling.estimated(run, keys, None, answer, budget=60.0)
    assert found["estimates"] == 4
    assert found["error"] == pytest.approx(np.sqrt((0 + 1 + 4 + 1) / 4))
    assert found["cosine"] == pytest.approx((1 + 0 - 1 + 1) / 4)
    assert min(found["seconds"], found["cpu_seconds"]) >= 0
    calls.clear()
    assert unrolling.estimated(run, keys, None, answer, budget=-1.0)["error"] == 0
    assert calls == [0]


def assert_makes_a_hypergradient(row):
    net, key = unrolling.network(2), jax.random.key(0)
    at = jax.eval_shape(functools.partial(unrolling.problem, net, 0))
    assert at.x.shape == (unrolling_methods.EXAMPLES,)
    inner = Inner(inner_loss(net), net.curvature, unrolling.RATE, max(2, row.least))
    grad, y = jax.eval_shape(unrolling.program(net, row.solver(inner)), key, at)
    assert grad.shape == at.x.shape
    assert jax.tree.structure(y) == jax.tree.structure(at.y)


FAMILIES = {row.family: row for row in reversed(unrolling.ROWS)}  # the first of each


def test_every_row_has_a_solver_and_a_name_of_its_own():
    names = [row.name for row in unrolling.ROWS]
    assert len(set(names)) == len(names)
    assert {*unrolling.QUICK_METHODS} <= {*names}
    net = unrolling.network(2)
    for row in unrolling.ROWS:
        inner = Inner(inner_loss(net), net.curvature, unrolling.RATE, max(2, row.least))
        assert isinstance(row.solver(inner), bx.problem.InnerSolver)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_each_family_makes_a_hypergradient(family):
    assert_makes_a_hypergradient(FAMILIES[family])


@pytest.mark.slow
@pytest.mark.parametrize("row", unrolling.ROWS, ids=[row.name for row in unrolling.ROWS])
def test_every_row_makes_a_hypergradient(row):
    assert_makes_a_hypergradient(row)


def test_a_run_prints_tables_and_writes_the_records(small, tmp_path, capsys):
    methods = ("two-level", "forward-1")
    chosen = f"--hidden 2 --steps 9 --budget 60 --seeds 2 --methods {' '.join(methods)}"
    assert start(unrolling.Config, chosen, tmp_path) == 0
    output, found = capsys.readouterr().out, records(tmp_path / "unrolling")
    assert set(found) == {f"{method}-seed{seed}" for method in methods for seed in (0, 1)}
    curves = {name: record["curve"] for name, record in found.items()}
    for seed in (0, 1):
        exact, forward = curves[f"two-level-seed{seed}"], curves[f"forward-1-seed{seed}"]
        assert exact["steps"] == forward["steps"] == [9]
        assert exact["error"][0] < 1e-4
        assert exact["cosine"][0] > 1 - 1e-6
        assert forward["estimates"] == [8]
        assert 1 < forward["error"][0] < 4 * 19**0.5  # N − 1 = 19, one direction
        assert min(exact["temp_bytes"] + forward["temp_bytes"]) > 0
    mean, error = mean_and_error([found[f"forward-1-seed{seed}"]["metrics"]["error_9"] for seed in (0, 1)])
    assert f"{mean:.2g} ± {error:.2g}" in output
    assert (tmp_path / "unrolling" / "unrolling.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_too_large_or_too_slow_is_left_out(small, monkeypatch, tmp_path):
    answer = np.ones(SMALL["train"])

    def compiled(program, args):
        return (lambda key, at: (answer, ())), 0.0, 2**31 if "reverse" in str(program) else 100

    def solver(name):
        return lambda inner: name

    def estimated(run, keys, at, answer, budget):
        return {"error": 0.5, "cosine": 1.0, "seconds": next(seconds), "estimates": 1}

    seconds = iter([1.0, 20.0, 3.0])
    names = {"reverse": 1, "forward": 1, "late": 1000}
    rows = [unrolling_methods.Row(name, name, solver(name), least) for name, least in names.items()]
    monkeypatch.setattr(unrolling, "ROWS", rows)
    monkeypatch.setattr(unrolling, "exact", lambda *args: answer)
    monkeypatch.setattr(unrolling, "program", lambda net, solver: solver)
    monkeypatch.setattr(unrolling, "compiled", compiled)
    monkeypatch.setattr(unrolling, "estimated", estimated)
    chosen = f"--steps 10 100 1000 --methods {' '.join(names)} --longest 100"
    assert start(unrolling.Config, chosen, tmp_path) == 0
    found = {name: record["curve"] for name, record in records(tmp_path / "unrolling").items()}
    assert found["reverse-seed0"]["temp_bytes"] == [2**31] * 3
    assert found["reverse-seed0"]["seconds"] == [None] * 3
    assert found["forward-seed0"]["seconds"] == [1.0, 20.0, None]  # 200 s would be more than 100 s
    assert found["forward-seed0"]["temp_bytes"] == [100, 100, None]
    assert found["late-seed0"]["steps"] == [1000]


def test_tails_are_compared_with_all_steps(small, monkeypatch, tmp_path, capsys):
    """Each row has a solver; two of them run, for K = 1 and 2 of three steps: what forgets no step is exact."""
    monkeypatch.setattr(unrolling_tails, "STEPS", 3)
    net, rows = unrolling.network(2), unrolling_tails.UNROLLED | unrolling_tails.ALONE
    steps = unrolling_tails.Steps(inner_loss(net), bx.sampling.full)
    assert all(isinstance(solver(steps, 2), bx.problem.InnerSolver) for solver in rows.values())
    monkeypatch.setattr(unrolling_tails, "UNROLLED", {"reverse": rows["reverse"]})
    monkeypatch.setattr(unrolling_tails, "ALONE", {"exact": unrolling_tails.EXACT})
    assert start(unrolling.Config, "--unrolled 1 2 --hidden 2 --quick", tmp_path) == 0
    found = records(tmp_path / "unrolling-tails-quick" / "weak-128")
    assert found["exact-seed0"]["curve"]["cosine"] == pytest.approx([1, 1], abs=1e-5)
    one, two = found["reverse-seed0"]["curve"]["cosine"]
    assert 0 < one < two < 1
    assert f"{two:.3f}" in capsys.readouterr().out
    assert (tmp_path / "unrolling-tails-quick" / "unrolling-tails.png").read_bytes().startswith(b"\x89PNG")


def test_two_phases_run_one_after_the_other(small, monkeypatch, tmp_path, capsys):
    rows = (two_phase.CG, two_phase.FORWARD._replace(settings=lambda inner: {"directions": 1}))
    methods = [two_phase.Phases(row.name, (row,)) for row in rows] + [two_phase.Phases("two-phase", rows)]
    monkeypatch.setattr(two_phase, "METHODS", methods)
    names = [phases.name for phases in methods]
    assert start(two_phase.Config, f"--quick --seeds 2 --outer-steps 3 --methods {' '.join(names)}", tmp_path) == 0
    found = records(tmp_path / "two-phase-quick")
    assert set(found) == {f"{name}-seed0" for name in names}
    gradients = {name: found[f"{name}-seed0"]["metrics"]["inner_gradients"] for name in names}
    assert 3 * gradients["two-phase"] == 2 * gradients["cg"] + gradients["forward-gradient"]
    record = found["two-phase-seed0"]
    assert record["configuration"]["phases"] == ["cg", "forward-gradient"]
    assert record["configuration"]["switch_at"] == 2
    assert record["metrics"]["outer_loss"] == pytest.approx(found["cg-seed0"]["metrics"]["outer_loss"], rel=1e-5)
    assert "two-phase" in capsys.readouterr().out
    assert (tmp_path / "two-phase-quick" / "two-phase-quick.png").read_bytes().startswith(b"\x89PNG")


def test_gaps_are_to_the_exact_run_of_the_same_seed():
    def run(method, seed, losses):
        return Run("two-phase", method, seed, {}, Outcome((), {}, {"outer_loss": losses}))

    runs = [run("exact", 0, [3.0, 1.0]), run("exact", 1, [2.0]), run("cg", 0, [3.5, 3.0]), run("cg", 1, [2.5, 2.0])]
    found = [beside.outcome for beside in two_phase.beside_exact([*runs, run("cg", 2, [1.0])])]
    assert [outcome.curve["gap"] for outcome in found] == [[0, 0], [0], [0.5, 2], [0.5, None], [None]]
    assert [outcome.metrics["gap"] for outcome in found] == [0, 0, 2, None, None]


def test_every_method_of_two_phases_can_be_built():
    inner = Inner(inner_loss(two_phase.MODEL), two_phase.MODEL.curvature, two_phase.RATE, 2)
    for phases in two_phase.METHODS:
        made = two_phase.method(phases, inner, 150, two_phase.SPLIT)
        assert isinstance(made.hypergradient(), bx.problem.Hypergradient)
        assert made.configuration["switch_at"] == 100
        json.dumps(made.configuration)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("lu",)}, "methods must be some of no-gradient"),
        ({"methods": ()}, "got none"),
        ({"steps": (0, 3)}, "steps must be ints >= 1"),
        ({"unrolled": (1, 600)}, "unrolled must be ints from 1 to 599"),
        ({"hidden": 0}, "hidden must be an int >= 1"),
        ({"seeds": 0}, "seeds must be an int >= 1"),
        ({"memory": 0.0}, "memory must be a number > 0"),
    ],
)
def test_bad_values_are_refused_with_the_fix(change, message):
    with pytest.raises(ValueError, match=message):
        unrolling.Config(**change)


def test_unknown_methods_of_two_phases_are_refused():
    with pytest.raises(ValueError, match="methods must be some of exact"):
        two_phase.Config(dataclasses.replace(two_phase.DEFAULTS, methods=("lu",)))

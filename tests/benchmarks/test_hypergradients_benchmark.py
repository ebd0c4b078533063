import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from jax.flatten_util import ravel_pytree

import bilevax as bx
from benchmarks.data.images import Data
from benchmarks.harness.clock import Spent
from benchmarks.harness.report import mean_and_error
from benchmarks.harness.timing import relative_error
from benchmarks.studies import hypergradients, hypergradients_end_to_end, hypergradients_methods, hypergradients_points
from benchmarks.tasks.hyper_cleaning import numbered

TINY = hypergradients_points.network(hypergradients_points.feedforward, (4, 3), (3, 10))
L2 = 1e-2


def tiny(name="digits", seed=0, **split):
    keys = jax.random.split(jax.random.key(seed), 3)
    images, labels = jax.random.normal(keys[0], (30, 4)), jax.random.randint(keys[1], (30,), 0, 10)
    given = jnp.where(jax.random.bernoulli(keys[2], 0.6, (20,)), labels[:20], 0)
    batch = bx.Batch(outer=(images[20:], labels[20:]), inner=(images[:20], given))
    return Data(seed=seed, batch=batch, test=(images, labels), truth=labels[:20])


@pytest.fixture(scope="module")
def found():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hypergradients_points, "SIDE", 2)
        return list(hypergradients_points.points(TINY, L2, "random", tiny()))


def losses(x, batch):
    """g and f as functions of a flat y, written apart from the benchmark."""
    _, unravel = ravel_pytree(TINY.init(jax.random.key(0), 4))

    def entropies(flat, images, labels):
        first, last = unravel(flat)
        hidden = jnp.tanh(images @ first["weights"] + first["bias"][None])
        logits = jax.nn.log_softmax(hidden @ last["weights"] + last["bias"][None])
        return -jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]

    def g(x, flat):
        return jnp.mean(jax.nn.sigmoid(x) * entropies(flat, *batch.inner)) + L2 / 2 * flat @ flat

    return g, lambda flat: jnp.mean(entropies(flat, *batch.outer))


@pytest.mark.compiles(90)  # with a search for points
def test_points_are_where_they_say(found):
    assert [point.stage for point in found] == ["start", "middle", "end"]
    data = tiny()
    x = jnp.asarray(hypergradients_points.random(data))
    g, _ = losses(x, data.batch)
    slope, y = jax.jit(jax.grad(g, argnums=1)), ravel_pytree(TINY.init(jax.random.key(0), 4))[0]
    every = [np.asarray(y)]
    for _ in range(200):
        every.append(every[-1] - np.float32(hypergradients_points.STEP_SIZE) * np.asarray(slope(x, every[-1])))
    for point, steps in zip(found, (20, 200), strict=False):
        path = jax.jit(jax.vmap(lambda tree: ravel_pytree(tree)[0]))(point.path)
        np.testing.assert_allclose(path, np.stack(every[steps - 19 : steps + 1]), atol=1e-6)
        assert point.gradient_norm > 1e-3
    end = found[-1]
    assert end.gradient_norm < 1e-7
    assert end.smallest > 0
    assert found[0].smallest < 0
    assert all(np.ptp(leaf, axis=0).max() == 0 for leaf in jax.tree.leaves(end.path))


@pytest.mark.compiles(90)  # with a search for points
def test_exact_at_a_minimum_is_the_slope_of_the_solved_problem(found):
    """Against finite differences: solve again for two x, by Newton steps from the minimum."""
    data, end = tiny(), found[-1]
    x = jnp.asarray(hypergradients_points.random(data))
    g, f = losses(x, data.batch)
    y = ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(leaf[-1], float), end.path))[0]
    direction = jax.random.normal(jax.random.key(1), x.shape)

    @jax.jit
    def solved(x):
        def newton(_, y):
            return y - jnp.linalg.solve(jax.hessian(g, argnums=1)(x, y), jax.grad(g, argnums=1)(x, y))

        return f(jax.lax.fori_loop(0, 6, newton, y))

    h = 1e-4
    difference = (solved(x + h * direction) - solved(x - h * direction)) / (2 * h)
    np.testing.assert_allclose(end.exact @ direction, difference, rtol=1e-5)


def test_exact_before_a_minimum_divides_by_the_shifted_hessian(found):
    data, start = tiny(), found[0]
    x = jnp.asarray(hypergradients_points.random(data))
    g, f = losses(x, data.batch)
    y = ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(leaf[-1], float), start.path))[0]
    hessian, slope, cross = jax.jit(
        lambda x, y: (jax.hessian(g, argnums=1)(x, y), jax.grad(f)(y), jax.jacrev(jax.grad(g, argnums=1))(x, y))
    )(x, y)
    eigenvalues, vectors = np.linalg.eigh(hessian)
    np.testing.assert_allclose(start.smallest, eigenvalues[0], rtol=1e-4)
    v = vectors @ (vectors.T @ slope / (eigenvalues - eigenvalues[0] + L2))
    np.testing.assert_allclose(start.exact, -cross.T @ v, rtol=1e-4, atol=1e-8)


def test_methods_are_compared_at_the_y_of_the_exact_answer(found):
    """With conjugate gradients to the end the cosine is 1, and unrolling lands at y."""
    end, batch = found[-1], numbered(tiny().batch)
    with jax.enable_x64(False):
        batch = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32 if leaf.dtype == float else jnp.int32), batch)
        row = hypergradients_methods.cg(maxiter=100)
        args = hypergradients.arguments(end, 0, batch)
        result = hypergradients.compared(jax.jit(hypergradients.estimates(row, TINY))(*args), end)
    assert result["cosine"] > 1 - 1e-4
    assert result["error"] < 2e-2
    assert result["products"] > 10


def test_comparison_and_means(found):
    point = found[-1]
    calls = bx.problem.Calls(hessian_products=3)
    rows = []
    for grad, cosine, error in ((2 * point.exact, 1, 1), (-point.exact, -1, 2), (0 * point.exact, 0, 1)):
        row = hypergradients.compared((grad, calls, False), point)
        np.testing.assert_allclose([row["cosine"], row["error"]], [cosine, error], atol=1e-12)
        assert row["error"] == relative_error(grad, point.exact)
        rows.append(row)
    rows.append({**rows[0], "stage": "start", "products": 9, "breakdown": True})
    numbers = hypergradients.metrics(rows, [Spent(0.02, 0.05), Spent(0.01, 0.04), Spent(0.03, 0.03)])
    assert numbers["cosine_end"] == pytest.approx(0)
    assert numbers["cosine_start"] == pytest.approx(1)
    assert numbers["error_end"] == pytest.approx(4 / 3)
    assert numbers["l2=0.01, random"] == pytest.approx(0)
    assert (numbers["products"], numbers["milliseconds"], numbers["cpu_milliseconds"]) == (3, 2, 4)
    assert numbers["breakdowns"] == 1


def test_every_method_has_a_name_and_the_lists_name_methods():
    names = [row.name for row in hypergradients.ROWS]
    assert len(set(names)) == len(names)
    assert {*hypergradients.QUICK_METHODS, *hypergradients_methods.END_TO_END} <= {*names}


def start(arguments, results):
    arguments = [*arguments.split(), "--results", str(results)]
    return tyro.cli(hypergradients.Config, args=arguments, config=(tyro.conf.FlagCreatePairsOff,)).run()


@pytest.fixture
def small(monkeypatch):
    for module in (hypergradients_points, hypergradients_end_to_end):
        monkeypatch.setattr(module, "SIDE", 2, raising=False)
    monkeypatch.setattr(hypergradients, "NETS", {"mlp": TINY})
    monkeypatch.setattr(hypergradients, "load", tiny)
    monkeypatch.setattr(hypergradients_end_to_end, "NET", TINY)
    monkeypatch.setattr(hypergradients_end_to_end, "load", tiny)
    with jax.enable_x64(False):
        yield


@pytest.mark.compiles(90)  # a whole run of a command
def test_a_run_prints_tables_and_writes_the_records(small, tmp_path, capsys):
    methods = ("reverse-5", "kfac-every-10")
    assert start(f"--nets mlp --l2 0.01 --seeds 2 --budget 1e-9 --methods {' '.join(methods)}", tmp_path) == 0
    output, folder = capsys.readouterr().out, tmp_path / "hypergradients"
    records = {path.stem: json.loads(path.read_text()) for path in folder.glob("mlp/*.json")}
    assert set(records) == {f"{method}-seed{seed}" for method in methods for seed in (0, 1)}
    for record in records.values():
        assert len(record["curve"]["cosine"]) == 9
        assert all(abs(cosine) <= 1 for cosine in record["curve"]["cosine"])
        assert record["metrics"]["rounds"] == 3
        assert record["metrics"]["milliseconds"] > 0
    assert records["reverse-5-seed0"]["metrics"]["products"] == 5
    mean, error = mean_and_error([records[f"kfac-every-10-seed{seed}"]["metrics"]["cosine_end"] for seed in (0, 1)])
    assert f"{mean:.3f} ± {error:.3f}" in output
    assert "cosine at the end, by setting" in output
    assert (folder / "hypergradients.png").read_bytes().startswith(b"\x89PNG")


def test_end_to_end_names_unrolled_methods_by_family(small, tmp_path, capsys):
    assert start("--end-to-end 3 --methods kfac reverse-10 --outer-steps 2 --seeds 2", tmp_path) == 0
    files = {path.stem for path in tmp_path.glob("hypergradients-end-to-end-3/*.json")}
    assert files == {f"{method}-seed{seed}" for method in ("kfac", "reverse") for seed in (0, 1)}
    assert "3 inner steps, 2 outer steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nets": ()}, "nets must name at least one"),
        ({"l2": (0.0,)}, "l2 must be numbers > 0"),
        ({"common": dataclasses.replace(hypergradients.DEFAULTS, methods=("lu",))}, "methods must be some of identity"),
    ],
)
def test_bad_values_are_refused_with_the_fix(change, message):
    with pytest.raises(ValueError, match=message):
        hypergradients.Config(**change)

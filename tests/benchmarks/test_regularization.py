import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse import csr_matrix

import bilevax as bx
from benchmarks.__main__ import main
from benchmarks.tasks import logistic, regularization
from benchmarks.tasks.logistic import Examples, exact
from benchmarks.tasks.regularization import RegularizationSetting

FEATURES = 5


def rows(seed, number, features=FEATURES):
    random = np.random.default_rng(seed)
    matrix = random.normal(size=(number, features)) * (random.random((number, features)) < 0.7)
    signs = np.where(matrix.sum(axis=1) + random.normal(size=number) > 0, 1.0, -1.0)
    return Examples(csr_matrix(matrix), signs)


@pytest.fixture
def x():
    return np.random.default_rng(2).uniform(-3, 1, FEATURES)


@pytest.mark.parametrize("dense", [0, 1000])
def test_the_exact_value_and_gradient_agree_with_a_dense_solve(monkeypatch, x, dense):
    monkeypatch.setattr(logistic, "DENSE", dense)
    inner, outer = rows(0, 40), rows(1, 30)
    loss = functools.partial(regularization.inner_loss, 0.0)

    def scaled(part):
        return jnp.asarray(part.features.toarray()), jnp.asarray(part.labels)

    def g(y):
        return loss(x, y / (jnp.exp(x) ** -0.5), scaled(inner))

    @jax.jit
    def f(y):
        return jnp.mean(jnp.log1p(jnp.exp(-scaled(outer)[1] * (scaled(outer)[0] @ y))))

    @jax.jit
    def solve(y, b):
        return jnp.linalg.solve(jax.hessian(g)(y), b)

    slope = jax.jit(jax.grad(g))
    y = functools.reduce(lambda y, _: y - np.asarray(solve(y, slope(y))), range(12), np.zeros(FEATURES))
    v = np.asarray(solve(y, jax.grad(f)(y)))
    at = exact(inner, outer, x, np.zeros(FEATURES))
    assert at.residual <= 1e-10
    np.testing.assert_allclose(at.y, y, atol=1e-10)
    np.testing.assert_allclose(at.value, f(y), rtol=1e-12)
    np.testing.assert_allclose(at.gradient, -np.exp(x) * y * v, rtol=1e-8, atol=1e-12)


def test_the_exact_gradient_agrees_with_finite_differences(x):
    inner, outer, step, zeros = rows(0, 40), rows(1, 30), 1e-5, np.zeros(FEATURES)
    for index, slope in enumerate(exact(inner, outer, x, zeros).gradient):
        ends = (exact(inner, outer, x + sign * step * np.eye(FEATURES)[index], zeros).value for sign in (1, -1))
        np.testing.assert_allclose((next(ends) - next(ends)) / (2 * step), slope, rtol=1e-6)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_methods_solve_the_same_problem_in_scaled_unknowns(monkeypatch, x, share):
    monkeypatch.setattr(regularization, "DENSE", share)
    setting = RegularizationSetting(lambda seed, full: (rows(0, 40), rows(1, 30)), 0.5, 100)
    data = regularization.load(setting, False, 0)
    inner, outer = (functools.partial(loss, 0.5) for loss in (regularization.inner_loss, regularization.outer_loss))
    at = exact(data.inner, data.outer, x, np.zeros(FEATURES))
    z = at.y / np.asarray(regularization.scale(0.5, x))
    hypergrad = bx.hypergradient(outer, bx.inner.implicit(inner, ihvp=bx.ihvp.cg(maxiter=20, tol=1e-12)))
    x, estimate = jnp.asarray(x), jax.jit(hypergrad.estimate)
    grad, _, info = estimate(jax.random.key(0), hypergrad.init(x, jnp.asarray(z)), x, data.batch)
    np.testing.assert_allclose(info.outer_loss, at.value, rtol=1e-12)
    np.testing.assert_allclose(grad, at.gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("features", [csr_matrix(np.eye(3)), csr_matrix(np.eye(3)[:, :0])])
def test_separable_and_empty_rows_have_a_finite_solution(features):
    part = Examples(features, np.array([1.0, -1.0, 1.0]))
    at = exact(part, part, np.full(features.shape[1], -14.0), np.zeros(features.shape[1]))
    assert at.residual <= 1e-10
    assert np.isfinite(at.value)


def test_x_stays_in_the_box():
    optimizer = regularization.boxed(regularization.optax.sgd(1.0))
    x = jnp.array([0.0, 5.0, -13.0])
    updates, _ = optimizer.update(jnp.array([1.0, -9.0, 9.0]), optimizer.init(x), x)
    np.testing.assert_array_equal(x + updates, [-1.0, 6.0, -14.0])


def test_a_run_reports_exact_numbers_whatever_the_method_did(monkeypatch, tmp_path, capsys):
    parts = rows(0, 60), rows(1, 50)
    monkeypatch.setitem(regularization.SETTINGS, "ijcnn1", RegularizationSetting(lambda seed, full: parts, 0.5, 100))
    with jax.enable_x64(False):
        code = main(f"regularization --quick --seeds 2 --methods cg truncated --results {tmp_path}".split())
    output = capsys.readouterr().out
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("regularization-ijcnn1-quick/*.json")}
    assert code == 0
    assert set(records) == {f"{method}-seed{seed}" for method in ("cg", "truncated") for seed in (0, 1)}
    first = exact(*parts, np.zeros(FEATURES), np.zeros(FEATURES)).value
    for record in records.values():
        assert record["task"] == "regularization"
        assert record["metrics"]["outer_steps"] == 20
        assert record["metrics"]["residual"] <= 1e-10
        assert record["curve"]["exact_loss"][-1] == record["metrics"]["exact_loss"] < first
        assert record["metrics"]["breakdowns"] == 0
    assert records["cg-seed0"]["metrics"]["exact_loss"] == pytest.approx(
        records["truncated-seed0"]["metrics"]["exact_loss"], rel=0.02
    )
    assert "|∇F(x)|²" in output
    assert (
        (tmp_path / "regularization-ijcnn1-quick" / "regularization-ijcnn1-quick.png")
        .read_bytes()
        .startswith(b"\x89PNG")
    )


def test_seeds_may_have_different_numbers_of_nonzeros(monkeypatch, tmp_path):
    monkeypatch.setattr(regularization, "DENSE", 1.0)
    whole = rows(0, 61)
    setting = RegularizationSetting(lambda seed, full: regularization.halves(whole, seed), 0.5, 2)
    monkeypatch.setitem(regularization.SETTINGS, "w8a", setting)
    first, second = (regularization.halves(whole, seed)[0].features.nnz for seed in (0, 1))
    assert first != second
    assert main(f"regularization --data w8a --seeds 2 --methods identity --results {tmp_path}".split()) == 0


def test_a_seed_splits_in_halves_without_losing_a_row():
    part = Examples(csr_matrix(np.arange(1.0, 8)[:, None]), np.ones(7))
    first, second = regularization.halves(part, 0)
    again, _ = regularization.halves(part, 1)
    split = [*first.features.toarray()[:, 0], *second.features.toarray()[:, 0]]
    assert sorted(split) == [*range(1, 8)]
    assert [*again.features.toarray()[:, 0]] != split[:4]


def test_the_most_frequent_words_are_kept_and_rows_have_norm_one(monkeypatch):
    counts, groups = csr_matrix([[5.0, 1, 0], [0, 2, 3], [0, 1, 0]]), np.array([1.0, 10, 11])
    monkeypatch.setattr(regularization.download, "libsvm", lambda name, features: (counts, groups))
    monkeypatch.setattr(regularization, "WORDS", 2)
    kept, everything = regularization.frequent_words(False), regularization.frequent_words(True)
    assert kept.features.shape == (3, 2)
    assert everything.features.shape == (3, 3)
    np.testing.assert_array_equal(kept.labels, [-1, -1, 1])
    np.testing.assert_allclose(kept.features.power(2).sum(axis=1).ravel(), np.ones((1, 3)))


def here(name):
    folder = os.environ.get("BILEVAX_DATA", "")
    return folder and any(os.path.exists(f"{folder}/libsvm/{name}{end}") for end in ("", ".xz", ".bz2", ".gz"))


needs_data = functools.partial(pytest.mark.skipif, reason="BILEVAX_DATA names no folder with this data set")


@needs_data(not here("ijcnn1"))
def test_ijcnn1_has_the_known_value_and_gradient_at_zero():
    at = exact(*regularization.official("ijcnn1", 22), np.zeros(22), np.zeros(22))
    assert at.value == pytest.approx(0.657063249627510, abs=1e-12)
    assert at.gradient @ at.gradient == pytest.approx(2.610910e-4, rel=1e-6)


@pytest.mark.slow
@needs_data(not here("ijcnn1"))
def test_conjugate_gradients_come_close_to_the_lowest_known_value_on_ijcnn1(tmp_path):
    code = main(f"regularization --methods cg --budget 120 --results {tmp_path}".split())
    metrics = json.loads((tmp_path / "regularization-ijcnn1" / "cg-seed0.json").read_text())["metrics"]
    assert code == 0
    assert metrics["exact_loss"] < 0.206


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a9a", "w8a", "news20"])
def test_the_other_data_sets_run(name, tmp_path):
    if not here(name):
        pytest.skip("BILEVAX_DATA names no folder with this data set")
    assert main(f"regularization --data {name} --methods cg --outer-steps 2 --results {tmp_path}".split()) == 0

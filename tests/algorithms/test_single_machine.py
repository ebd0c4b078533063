"""The methods of one machine besides those of the engine: limits, contracts, costs and bad input."""

import functools
import math

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
from networks import numbers

import bilevax as bx
from bilevax.testing import executed_dots
from bilevax.testing.problems import quadratic
from bilevax.testing.problems._quadratic import inner_loss, outer_loss
from bilevax.testing.trees import finite, strictly, writable

DATA = quadratic(5, n=12)  # its leading axis counts examples here
MEAN = DATA.mean
EXACT = DATA.solution
START = jnp.array([0.3, -0.2]), jnp.array([0.1, 0.4, -0.5])
STEPS = (0.1, 0.2, 0.3)
FULL, SMALL = bx.sampling.full, bx.sampling.minibatch(4)
KEY = jax.random.key(0)
A = bx.algorithms
MANY = 25  # terms of a series that leave nothing: the eigenvalues of I − 0.3 ∇²_yy g are below 0.4


def over_examples(loss):
    return lambda x, y, batch: jnp.mean(jax.vmap(loss, (None, None, 0))(x, y, batch))


PROBLEM = bx.BilevelProblem(over_examples(outer_loss), over_examples(inner_loss))


def exact_descent(problem, sample):
    solver = bx.inner.implicit(problem.inner_loss, optax.sgd(0.3), 40, ihvp=bx.ihvp.exact())
    return A.descent(bx.hypergradient(problem.outer_loss, solver), optax.sgd(0.1, momentum=0.5))


MAKE = {  # (problem, sample) -> method
    "srba": lambda problem, sample: A.srba(problem, STEPS, sample=sample, every=3),
    "fsla": lambda problem, sample: A.fsla(problem, STEPS, sample=sample),
    "mrbo": lambda problem, sample: A.mrbo(problem, STEPS, sample=sample, terms=3),
    "vrbo": lambda problem, sample: A.vrbo(problem, STEPS, sample=sample, every=3, steps=2, terms=3),
    "stocbio": lambda problem, sample: A.stocbio(problem, STEPS, sample=sample, steps=3, terms=3),
    "amigo": lambda problem, sample: A.amigo(problem, (optax.adam(0.1), *STEPS[1:]), sample=sample, steps=3, v_steps=2),
    "bsa": lambda problem, sample: A.bsa(problem, STEPS, sample=sample, terms=3),
    "ttsa": lambda problem, sample: A.ttsa(problem, STEPS, sample=sample, terms=3),
    "f2sa": lambda problem, sample: A.f2sa(
        problem, STEPS[:2], sample=sample, multiplier=lambda k: 10.0 + jnp.asarray(k, float), steps=3
    ),
    "pzobo": lambda problem, sample: A.pzobo(problem, STEPS[:2], sample=sample, steps=3, directions=2),
    "descent": exact_descent,
}


def run(method, iterations):
    """(x, y, info) of all iterations."""

    def step(state, key):
        state, info = method.step(key, state, DATA.batch)
        return state, (state.x, state.y, info)

    return jax.lax.scan(step, method.init(*START, DATA.batch), jax.random.split(networks.KEY, iterations))[1]


def limit(method, iterations=300):
    x, y, info = numbers(jax.jit(lambda: run(method, iterations))())
    assert not np.any(info.breakdown)
    return x, y


EXACT_LIMITS = {
    "srba": MAKE["srba"](PROBLEM, SMALL),
    "fsla": MAKE["fsla"](PROBLEM, FULL),
    "mrbo": A.mrbo(PROBLEM, STEPS, sample=FULL, terms=MANY),
    "vrbo": A.vrbo(PROBLEM, STEPS, sample=SMALL, every=3, steps=2, terms=MANY),
    "stocbio": A.stocbio(PROBLEM, STEPS, sample=FULL, steps=2, terms=MANY),
    "amigo": A.amigo(PROBLEM, STEPS, sample=FULL, steps=2),
    "descent": exact_descent(PROBLEM, FULL),
}


@pytest.mark.parametrize("name", EXACT_LIMITS)
def test_converges_to_the_solution(name):
    x, y = limit(EXACT_LIMITS[name])
    np.testing.assert_allclose(x[-1], EXACT[0], rtol=0, atol=1e-8)
    np.testing.assert_allclose(y[-1], EXACT[1], rtol=0, atol=1e-8)


def root(inverse):
    """Where ∇_x f + Bᵀ · inverse · ∇_y f = 0 at y = y*(x): an affine equation."""
    m = MEAN

    def residual(x):
        y = np.linalg.solve(m.A, m.B @ x + m.c)
        return m.R @ x + m.r + m.S @ y + m.B.T @ inverse @ (m.Q @ y - m.e + m.S.T @ x)

    zero = residual(np.zeros(2))
    return -np.linalg.solve(np.stack([residual(one) - zero for one in np.eye(2)], axis=1), zero)


def test_the_limits_of_truncated_series():
    """Drawn as a whole, or one term at random: the same mean, and the stated bias."""
    terms, c = 2, 0.2
    series = c * sum(np.linalg.matrix_power(np.eye(3) - c * MEAN.A, q) for q in range(terms))
    expected = root(series)
    assert np.linalg.norm(expected - EXACT[0]) > 0.03
    np.testing.assert_allclose(root(np.linalg.inv(MEAN.A)), EXACT[0], rtol=1e-12)
    steps = (0.1, 0.3, c)
    x, _ = limit(A.stocbio(PROBLEM, steps, sample=FULL, steps=9, terms=terms), 200)
    np.testing.assert_allclose(x[-1], expected, rtol=0, atol=1e-8)
    x, _ = limit(A.bsa(PROBLEM, steps, sample=FULL, steps=2, terms=terms), 1500)
    np.testing.assert_allclose(x[750:].mean(0), expected, rtol=0, atol=0.03)


def test_the_bias_of_a_constant_multiplier_is_of_order_one_over_it():
    def end(multiplier):
        method = A.f2sa(PROBLEM, (0.1, 0.25), sample=FULL, multiplier=multiplier, steps=10)
        return run(method, 200)[0][-1]

    ends = np.asarray(jax.jit(jax.vmap(end))(jnp.array([50.0, 100.0, 200.0])))
    bias = np.linalg.norm(ends - EXACT[0], axis=1)
    np.testing.assert_allclose(bias[:2] / bias[1:], 2, rtol=0.05)
    assert 1e-4 < bias[2] < 1e-2


def test_more_directions_are_less_noise():
    spread = []
    for directions in (1, 16):
        x, _ = limit(A.pzobo(PROBLEM, (0.02, 0.3), sample=FULL, steps=12, directions=directions), 600)
        np.testing.assert_allclose(x[200:].mean(0), EXACT[0], rtol=0, atol=0.1)
        spread.append(x[200:].std(0).mean())
    assert spread[1] < 0.5 * spread[0]


def test_amigo_averages_over_minibatches():
    x, _ = limit(A.amigo(PROBLEM, (0.02, 0.05, 0.05), sample=SMALL, steps=2), 600)
    np.testing.assert_allclose(x[300:].mean(0), EXACT[0], rtol=0, atol=0.05)


# Contracts


def spec(tree):
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)


@pytest.mark.parametrize("name", MAKE)
def test_state_keeps_its_form_and_its_dtypes(name):
    """x in single, y in double precision, by tracing alone."""
    method = MAKE[name](PROBLEM, SMALL)
    x, y = START[0].astype(jnp.float32), START[1]
    state = jax.eval_shape(method.init, x, y, DATA.batch)
    new, info = jax.eval_shape(method.step, jax.eval_shape(lambda: jax.random.key(0)), state, DATA.batch)
    assert spec(state) == spec(new)
    assert (new.x.dtype, new.y.dtype) == (x.dtype, y.dtype)
    assert {leaf.shape for leaf in jax.tree.leaves(info)} == {()}


@pytest.mark.parametrize("name", [name for name in MAKE if name != "amigo"])  # whose Adam promotes, in optax
def test_debuggers_find_nothing_in_a_trace(name):
    method, key = MAKE[name](PROBLEM, SMALL), jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(method.init, *START, DATA.batch)
    with strictly():
        jax.eval_shape(method.step, key, state, DATA.batch)


@functools.cache
def jitted(name):
    method, traces = MAKE[name](PROBLEM, SMALL), []

    def step(*arguments):
        traces.append(None)
        return method.step(*arguments)

    return method, jax.jit(step), traces


CALLS = {  # ∇f, ∇_y g, Hessian products, cross products of the third iteration
    "srba": (2, 2, 2, 2),
    "fsla": (2, 4, 2, 2),
    "mrbo": (2, 2, 6, 2),
    "vrbo": (6, 6, 18, 6),
    "stocbio": (1, 4, 3, 1),
    "amigo": (1, 4, 2, 1),
    "bsa": (1, 3, None, 1),
    "ttsa": (1, 2, None, 1),
    "f2sa": (4, 8, 0, 0),
    "pzobo": (1, 9, 0, 0),
    "descent": (1, 41, None, 1),
}


@pytest.mark.parametrize("name", MAKE)
def test_ten_steps_are_one_trace_and_cost_what_is_declared(name):
    method, step, traces = jitted(name)
    state = jax.jit(method.init)(*START, DATA.batch)
    for k, key in enumerate(jax.random.split(KEY, 10)):
        before = state
        state, info = step(key, state, DATA.batch)
        assert info.moves.x > 0
        assert not info.breakdown
        if k == 2:
            for got, expected in zip(info.calls, CALLS[name], strict=True):
                assert expected in (None, got)
    assert len(traces) == 1
    assert int(state.k) == 10
    finite("state", before)
    finite("info", info)
    writable("state", before)
    spoiled = jax.tree.map(spoil, before)
    assert step(KEY, spoiled, DATA.batch)[1].breakdown


def spoil(leaf):
    return np.full(leaf.shape, np.nan, leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


@pytest.mark.compiles(130)  # eager is its subject
@pytest.mark.parametrize("name", ["f2sa"])
def test_compiled_equals_not_compiled(name):
    method, step, _ = jitted(name)
    start = method.init(*START, DATA.batch)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    jax.tree.map(close, step(KEY, start, DATA.batch), method.step(KEY, start, DATA.batch))


def costly_inner_loss(x, y, batch):
    """One A y in each gradient and in each Hessian product, which contracts 11 to 7; one Bᵀv in each cross product."""
    A, B = batch
    return jnp.sum(jax.nn.softplus(A @ jnp.tanh(y))) + jnp.sum(y**2) + y @ (B @ x)


def costly_outer_loss(x, y, C):
    """One Cᵀr in each gradient, which contracts 13."""
    return jnp.sum(jax.nn.softplus(C @ (y * jnp.sum(x))))


OWN_BATCH = ("stocbio", "amigo")  # each product on a batch of its own takes one more gradient there


@pytest.mark.usefixtures("uncached")
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="reads HLO text as it is printed since jax 0.10")
@pytest.mark.parametrize("name", ["mrbo", "amigo", "f2sa"])
def test_declared_calls_are_those_that_the_compiled_program_runs(name):
    def sample(key, t, data):
        return jax.tree.map(lambda leaf: leaf[jax.random.randint(key, (), 0, 2)], data)

    random = np.random.default_rng(0)
    C, A, B = (jnp.asarray(random.normal(size=(2, *shape)) / 3) for shape in ((13, 11), (7, 11), (11, 5)))
    method, batch = MAKE[name](bx.BilevelProblem(costly_outer_loss, costly_inner_loss), sample), bx.Batch(C, (A, B))
    state = jax.jit(method.init)(jnp.ones(5), jnp.ones(11), batch)
    with jax.default_device(jax.devices("cpu")[0]):
        compiled = jax.jit(method.step).lower(KEY, state, batch).compile()
        calls = compiled(KEY, state, batch)[1].calls
    dots = executed_dots(compiled.as_text(), unknown_trips=1)

    def products(contracted, returned):
        found = [dot for dot in dots if dot.contracted == contracted and returned in dot.returned]
        return sum(dot.times * math.prod(dot.returned) / returned for dot in found)

    assert products(13, 11) == calls.outer_gradients
    again = calls.hessian_products if name in OWN_BATCH else 0
    assert products(11, 7) == calls.inner_gradients + calls.hessian_products + again
    assert products(11, 5) == calls.cross_products + (2 if name == "f2sa" else 0)  # its two ∇_x g


def test_step_sizes_that_fall():
    np.testing.assert_allclose(bx.single_loop.decay(0.3, 0.5)(jnp.arange(9))[jnp.array([0, 8])], [0.3, 0.1])
    problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: 0.5 * (y - x) ** 2)
    by_number = A.ttsa(problem, (0.1, 0.5, 1.0), sample=FULL, terms=1)
    by_schedule = A.bsa(
        problem, (bx.single_loop.decay(0.1, 0.6), bx.single_loop.decay(0.5, 0.4), 1.0), sample=FULL, steps=1, terms=1
    )
    for method in (by_number, by_schedule):
        state, step = method.init(1.0, 0.0), jax.jit(method.step)
        for _ in range(2):
            state, _ = step(KEY, state, bx.Batch(None, None))
        y = 0.5
        x = 1 - 0.1 * 2 * y
        y = y - 0.5 * 2**-0.4 * (y - x)
        x = x - 0.1 * 2**-0.6 * 2 * y
        np.testing.assert_allclose([state.x, state.y], [x, y], rtol=1e-6)


BAD = {
    "every": (r"every.*0", lambda: A.srba(PROBLEM, STEPS, sample=SMALL, every=0)),
    "every_vrbo": ("every", lambda: A.vrbo(PROBLEM, STEPS, sample=SMALL, every=0)),
    "steps_vrbo": ("steps", lambda: A.vrbo(PROBLEM, STEPS, sample=SMALL, every=2, steps=0)),
    "momentum": (r"^momentum.*1\.5", lambda: A.fsla(PROBLEM, STEPS, sample=SMALL, momentum=1.5)),
    "terms_mrbo": ("terms", lambda: A.mrbo(PROBLEM, STEPS, sample=SMALL, terms=-1)),
    "steps_amigo": ("steps", lambda: A.amigo(PROBLEM, STEPS, sample=SMALL, steps=0)),
    "v_steps_amigo": ("v_steps", lambda: A.amigo(PROBLEM, STEPS, sample=SMALL, v_steps=0)),
    "optimizer_of_v": (r"step_sizes\.v", lambda: A.amigo(PROBLEM, (0.1, 0.1, optax.adam(0.1)), sample=SMALL)),
    "negative_step": (r"step_sizes\.x.*-1", lambda: A.stocbio(PROBLEM, (-1.0, 0.1, 0.1), sample=SMALL)),
    "two_step_sizes": ("step_sizes", lambda: A.bsa(PROBLEM, (0.1, 0.1), sample=SMALL)),
    "steps_bsa": ("steps", lambda: A.bsa(PROBLEM, STEPS, sample=SMALL, steps=-1)),
    "multiplier": ("multiplier", lambda: A.f2sa(PROBLEM, STEPS[:2], sample=SMALL, multiplier=-1.0)),
    "directions": ("directions", lambda: A.pzobo(PROBLEM, STEPS[:2], sample=SMALL, directions=0)),
    "mu": ("mu", lambda: A.pzobo(PROBLEM, STEPS[:2], sample=SMALL, mu=0.0)),
    "power": ("power", lambda: bx.single_loop.decay(0.1, -1.0)),
    "series_mrbo": (r"step_sizes\.v.*> 0; got 0", lambda: A.mrbo(PROBLEM, (0.1, 0.1, 0), sample=SMALL)),
    "schedule_of_a_series_mrbo": (
        r"step_sizes\.v must be one number",
        lambda: A.mrbo(PROBLEM, (0.1, 0.1, lambda k: 0.1), sample=SMALL),
    ),
    "no_series_mrbo": (r"step_sizes\.v.*None", lambda: A.mrbo(PROBLEM, (0.1, 0.1, None), sample=SMALL)),
    "series_vrbo": (r"step_sizes\.v.*> 0; got 0", lambda: A.vrbo(PROBLEM, (0.1, 0.1, 0), sample=SMALL, every=2)),
    "schedule_of_a_series_vrbo": (
        r"step_sizes\.v must be one number",
        lambda: A.vrbo(PROBLEM, (0.1, 0.1, lambda k: 0.1), sample=SMALL, every=2),
    ),
    "no_series_vrbo": (r"step_sizes\.v.*None", lambda: A.vrbo(PROBLEM, (0.1, 0.1, None), sample=SMALL, every=2)),
    "series_stocbio": (r"step_sizes\.v.*> 0; got 0", lambda: A.stocbio(PROBLEM, (0.1, 0.1, 0), sample=SMALL)),
    "series_bsa": (r"step_sizes\.v.*> 0; got 0", lambda: A.bsa(PROBLEM, (0.1, 0.1, 0), sample=SMALL)),
    "series_ttsa": (r"step_sizes\.v.*> 0; got 0", lambda: A.ttsa(PROBLEM, (0.1, 0.1, 0), sample=SMALL)),
    "terms_stocbio": (r"^terms.*0", lambda: A.stocbio(PROBLEM, STEPS, sample=SMALL, terms=0)),
    "terms_bsa": (r"^terms.*0", lambda: A.bsa(PROBLEM, STEPS, sample=SMALL, terms=0)),
    "terms_ttsa": (r"^terms.*0", lambda: A.ttsa(PROBLEM, STEPS, sample=SMALL, terms=0)),
    "steps_stocbio": (r"^steps.*-1", lambda: A.stocbio(PROBLEM, STEPS, sample=SMALL, steps=-1)),
    "steps_f2sa": (r"^steps.*-1", lambda: A.f2sa(PROBLEM, STEPS[:2], sample=SMALL, multiplier=10.0, steps=-1)),
    "two_multipliers": (
        r"multiplier must be one number.*\(2,\)",
        lambda: A.f2sa(PROBLEM, STEPS[:2], sample=SMALL, multiplier=jnp.ones(2)),
    ),
    "multiplier_of_two": (
        r"multiplier must be a function \(k\)",
        lambda: A.f2sa(PROBLEM, STEPS[:2], sample=SMALL, multiplier=lambda k, n: 1.0),
    ),
    "steps_of_random_neumann": (
        "step_size must be one number",
        lambda: bx.ihvp.random_neumann(terms=2, step_size=jnp.ones(3)),
    ),
    "dampings_of_random_neumann": (
        "damping must be one number",
        lambda: bx.ihvp.random_neumann(terms=2, step_size=0.1, damping=jnp.ones(3)),
    ),
    "optimizer_of_y_amigo": (
        r"step_sizes\.y must be a number or a schedule",
        lambda: A.amigo(PROBLEM, (0.1, optax.sgd(0.1), 0.1), sample=SMALL),
    ),
    "optimizer_of_y_vrbo": (
        r"step_sizes\.y must be a number or a schedule",
        lambda: A.vrbo(PROBLEM, (0.1, optax.sgd(0.1), 0.1), sample=SMALL, every=2),
    ),
    "sample_f2sa": (r"^sample must be a function.*64", lambda: A.f2sa(PROBLEM, STEPS[:2], sample=64, multiplier=10.0)),
    **{
        f"sample_{name}": (
            "^sample must be a function.*64",
            functools.partial(getattr(A, name), PROBLEM, STEPS, sample=64),
        )
        for name in ("bsa", "ttsa", "stocbio", "pzobo", "amigo", "mrbo", "fsla")
    },
    "problem": ("problem", lambda: A.stocbio(outer_loss, STEPS, sample=SMALL)),
    "hypergrad": (
        "^hypergrad must be a Hypergradient, or a function k -> Hypergradient; got 3.0",
        lambda: A.descent(3.0, 0.1),
    ),
    "hypergrad_of_k": (r"^hypergrad\(k\) must be a Hypergradient", lambda: A.descent(lambda k: 3.0, 0.1).init(*START)),
    "state": ("state", lambda: MAKE["amigo"](PROBLEM, FULL).step(KEY, START, DATA.batch)),
    "batch": (
        "batch",
        lambda: MAKE["descent"](PROBLEM, FULL).step(KEY, MAKE["descent"](PROBLEM, FULL).init(*START), 0),
    ),
    "integer_x": ("int", lambda: MAKE["vrbo"](PROBLEM, FULL).init(jnp.zeros(2, int), START[1])),
    "no_v_in_f2sa": (
        "step_sizes must hold no v.*got 0.3.*bx.Levels",
        lambda: A.f2sa(PROBLEM, (0.1, 0.2, 0.3), sample=SMALL, multiplier=10.0),
    ),
    "no_v_in_pzobo": ("step_sizes must hold no v.*got 0.3", lambda: A.pzobo(PROBLEM, (0.1, 0.2, 0.3), sample=SMALL)),
    "no_key": ("key", lambda: keyless("ttsa")),
    "no_key_for_directions": ("key", lambda: keyless("pzobo")),
}


def keyless(name):
    method = MAKE[name](PROBLEM, FULL)
    method.step(None, method.init(*START), DATA.batch)


@pytest.mark.compiles(70)  # some operation by operation
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    message, call = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()

"""Every inverse-Hessian-vector product, inner solver and estimator keeps the contracts of `bilevax.testing`.

A new method enters `IHVPS`, `SOLVERS` or `ESTIMATORS` by one line. What is dear is asked of representatives; of all
methods by `pytest -m slow`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from written import assert_read_back

import bilevax as bx
from bilevax.testing import HypergradientSubject, IHVPSubject, hypergradient, ihvp, points, solver, solver_subject
from bilevax.testing.compiled import READABLE
from bilevax.testing.structure import as_model

STEPS = 4
KEY = jax.random.key(0)
EXACT_FISHER = bx.curvature.fisher.exact


def gmres(tol):
    import lineax

    return lineax.GMRES(rtol=tol, atol=tol)


def preconditioned_cg(number, sample):
    preconditioner = bx.ihvp.neumann(terms=1, step_size=0.2, sample=sample)
    return bx.ihvp.cg(maxiter=3, damping=number, preconditioner=preconditioner, sample=sample)


def factored(make):
    return lambda number, sample: make(damping=number, fisher=EXACT_FISHER, sample=sample)


def rescaled(number, sample):
    return bx.ihvp.rescaled(bx.ihvp.identity(), damping=number, curvature=bx.curvature.hessian, sample=sample)


STRUCTURED = {"cold": True, "structured": True, "counted": False}  # their passes are those of the model, not of g
UNBIASED = {"cold": True, "biased": True}  # right in the mean alone
EXACT = {"counted": False, "half": False}  # lineax counts iterations; half precision misses this tolerance
IHVPS = {  # number, sample -> method; the number that inverts H = 2 I; what it declares
    "identity": (lambda number, sample: bx.ihvp.identity(number), 0.5, {"cold": True, "samples": False}),
    "exact": (lambda number, sample: bx.ihvp.exact(damping=number, sample=sample), 0.0, {"cold": True}),
    "neumann": (lambda number, sample: bx.ihvp.neumann(terms=3, step_size=number, sample=sample), 0.5, {}),
    "cg": (lambda number, sample: bx.ihvp.cg(maxiter=3, damping=number, sample=sample), 0.0, {}),
    "cg_preconditioned": (preconditioned_cg, 0.0, {}),
    "kfac": (factored(bx.ihvp.kfac), 0.0, STRUCTURED),
    "ekfac": (factored(bx.ihvp.ekfac), 0.0, STRUCTURED),
    "diagonal": (lambda number, sample: bx.ihvp.diagonal(scale=number, sample=sample), 0.5, UNBIASED),
    "random_neumann": (
        lambda number, sample: bx.ihvp.random_neumann(terms=3, step_size=number, sample=sample),
        0.5,
        UNBIASED,
    ),
    "rescaled": (rescaled, 0.0, {"cold": True}),
    "nystrom": (lambda number, sample: bx.ihvp.nystrom(rank=3, damping=number, sample=sample), 0.0, {"cold": True}),
    "sgd": (lambda number, sample: bx.ihvp.sgd(steps=3, step_size=number, sample=sample), 0.5, {}),
    "linear": (lambda number, sample: bx.ihvp.lineax(gmres(1e-12), damping=number, sample=sample), 0.0, EXACT),
}
NOT_LINEAR = ("cg", "cg_preconditioned", "random_neumann", "rescaled", "sgd", "linear")


def modelled(make):
    """An IHVP that needs structure, on losses that have none."""

    def with_structure(number, sample):
        sound = make(number, sample)

        def prepare(key, state, loss, point):
            return sound.prepare(key, state, as_model(loss, *point[:2]), point)

        return bx.problem.IHVP(sound.init, prepare, sound.spd)

    return with_structure


def implicit(name, steps=STEPS, **options):
    make, number, declared = IHVPS[name]
    if "structured" in declared:
        make = modelled(make)
    return lambda loss, optimizer, sample: bx.inner.implicit(
        loss, optimizer, steps, ihvp=make(number, sample), sample=sample, cross_sample=sample, **options
    )


def solved(loss, optimizer, sample):
    """The user's own solver, here one plain gradient step on all of the data."""

    def solve(x, y, batch):
        return optax.tree.add_scale(y, -0.5, jax.grad(loss, 1)(x, y, batch))

    return bx.inner.implicit(loss, ihvp=bx.ihvp.exact(damping=0.0, sample=sample), solve=solve, cross_sample=sample)


def fixed_point(loss, optimizer, sample):
    """Of a gradient step of its own length."""

    def step(x, y, batch):
        return optax.tree.cast_like(optax.tree.add_scale(y, -0.2, jax.grad(loss, 1)(x, y, batch)), y)

    return bx.inner.fixed_point(step, inner_loss=loss, tol=1e-13)


def root(loss, optimizer, sample):
    """Of the gradient, by a loop that is long enough."""

    def solve(x, y, batch):
        return jax.lax.fori_loop(0, 60, lambda _, y: step(x, y, batch), y)

    def step(x, y, batch):
        return optax.tree.cast_like(optax.tree.add_scale(y, -0.2, jax.grad(loss, 1)(x, y, batch)), y)

    return bx.inner.root(jax.grad(loss, 1), solve, inner_loss=loss, tol=1e-13)


def reverse(steps=STEPS, **options):
    return lambda loss, optimizer, sample: bx.inner.reverse(loss, optimizer, steps, sample=sample, **options)


def no_gradient(steps=STEPS):
    return lambda loss, optimizer, sample: bx.inner.no_gradient(loss, optimizer, steps, sample=sample)


def first_order(loss, optimizer, sample):
    return bx.inner.first_order(loss, optimizer, STEPS, sample=sample)


def chain(first, last):
    return lambda *parts: bx.inner.chain(first(*parts), last(*parts))


def _all_coordinates(key, like, number):
    """√b times the unit vectors, and zero beyond them: exact for every x of at most b entries."""
    flat, unravel = ravel_pytree(like)
    rows = jnp.sqrt(jnp.asarray(number, flat.dtype)) * jnp.eye(number, flat.size, dtype=flat.dtype)
    return lambda i: unravel(rows[i])


COORDINATES = bx.inner.random_directions.Sampler(_all_coordinates, lambda size, number: 0.0)
MOST = 10  # entries of x


def forward_gradient(steps=STEPS):
    return lambda loss, optimizer, sample: bx.inner.forward_gradient(
        loss, optimizer, steps, directions=MOST, sampler=COORDINATES, sample=sample
    )


def guided(loss, optimizer, sample):
    guide = bx.inner.guides.at_solution(implicit("cg", steps=0)(loss, optimizer, sample))
    return bx.inner.forward_gradient(
        loss, optimizer, STEPS, directions=MOST + 1, sampler=COORDINATES, sample=sample, guide=guide
    )


def shifted(loss, optimizer, sample):
    shift = bx.inner.guides.from_start(chain(no_gradient(STEPS - 1), reverse(1))(loss, optimizer, sample))
    return bx.inner.forward_gradient(
        loss, optimizer, STEPS, directions=MOST, sampler=COORDINATES, sample=sample, control_variate=shift
    )


def unrolled(loss, optimizer, sample):
    """The steps as a black box with a key of its own: differences of any length are exact where it is linear in x."""
    steps = bx.inner.no_gradient(loss, optimizer, STEPS, sample=sample)
    return lambda x, y, batch: steps.forward(KEY, (), x, steps.start(x, y), batch)[0].y


def zeroth_order(loss, optimizer, sample):
    def last(x, y, batch):
        """The loss on the batch of the last step, for a report."""
        return loss(x, y, sample(KEY, STEPS - 1, batch))

    solve, central = unrolled(loss, optimizer, sample), bx.inner.central
    return bx.inner.zeroth_order(
        solve, directions=MOST, mu=1.0, difference=central, sampler=COORDINATES, inner_loss=last
    )


def pushed(steps, detail=lambda info: info.inner.detail):
    """Cross products in forward mode, of one v for all steps, which the compiler takes out of the loop."""
    return lambda info: bx.problem.Calls(cross_products=-steps * detail(info).tangents)


def solves(info):
    """The steps inside of the black box."""
    return bx.problem.Calls(inner_gradients=STEPS * info.inner.detail.solves)


def first_detail(info):
    return info.inner.detail[0].detail


TAKES = {"steps": STEPS}
UNROLLS = {"steps": STEPS, "unrolls": True}
BLACK_BOX = {"steps": STEPS, "keyed": False, "uncounted": solves}
GUIDED = UNROLLS | {"counted": False}  # their second solve, which the compiler merges with the first
EQUATION = {"counted": False}  # gradients of g inside of T are not
SOLVERS = {  # loss, optimizer, sample -> solver; what it declares
    "implicit_cg": (implicit("cg"), TAKES),
    "implicit_cold": (implicit("cg", warm_start=False), TAKES),
    "implicit_no_steps": (implicit("exact", steps=0), {"solves": False, "cold": True}),
    "implicit_solve": (solved, {"cold": True}),  # its one gradient is also that which the report starts with
    "fixed_point": (fixed_point, EQUATION),
    "root": (root, EQUATION | {"cold": True}),
    "reverse": (reverse(), UNROLLS),
    "reverse_two_level": (reverse(checkpoint=bx.inner.two_level), UNROLLS),
    "reverse_store_all": (reverse(checkpoint=bx.inner.store_all), UNROLLS),
    "reverse_store_products": (reverse(checkpoint=bx.inner.store_products()), UNROLLS),
    "no_gradient": (no_gradient(), TAKES | {"biased": True}),
    "first_order": (first_order, TAKES | {"biased": True}),
    "chain_no_gradient_reverse": (chain(no_gradient(2), reverse(2)), TAKES),
    "chain_reverse_reverse": (chain(reverse(2), reverse(2)), UNROLLS),
    "chain_implicit_reverse": (chain(implicit("cg", 2), reverse(2)), TAKES),
    "chain_reverse_implicit": (chain(reverse(2), implicit("cg", 2)), TAKES),
    "forward_gradient": (forward_gradient(), UNROLLS | {"uncounted": pushed(STEPS)}),
    "forward_gradient_guide": (guided, GUIDED),
    "forward_gradient_control_variate": (shifted, GUIDED),
    "chain_forward_gradient_reverse": (
        chain(forward_gradient(2), reverse(2)),
        UNROLLS | {"uncounted": pushed(2, first_detail)},
    ),
    "zeroth_order": (zeroth_order, BLACK_BOX),
}


def of_solver(name):
    make, _ = SOLVERS[name]
    return lambda problem, *parts: bx.hypergradient(problem.outer_loss, make(problem.inner_loss, *parts))


def two_phase(switch_at):
    first, second = of_solver("implicit_cg"), of_solver("reverse")
    return lambda *parts: bx.two_phase(switch_at, first(*parts), second(*parts))


def penalty(problem, optimizer, sample):
    return bx.penalty(problem, optimizer, STEPS, multiplier=10.0, sample=sample, cross_sample=sample)


def full_zeroth_order(problem, optimizer, sample):
    solve = unrolled(problem.inner_loss, optimizer, sample)
    return bx.hypergradients.full_zeroth_order(problem.outer_loss, solve, directions=MOST, mu=1.0, sampler=COORDINATES)


PHASES = TAKES | {"cold": True, "counted": False}  # of two states one is read; the counts are those of the parts
ESTIMATORS = {  # problem, optimizer, sample -> estimator; what it declares
    "two_phase": (two_phase(3), PHASES),
    "two_phase_second": (two_phase(0), PHASES | {"unrolls": True}),
    "penalty": (
        penalty,
        TAKES | {"biased": True, "uncounted": lambda info: bx.problem.Calls(cross_products=2)},
    ),  # two ∇_x g
    "full_zeroth_order": (full_zeroth_order, BLACK_BOX | {"half": False}),  # losses in bfloat16 have no digits left
}
INSIDE_IMPLICIT = {  # for `pytest -m slow`
    f"implicit_{name}": (implicit(name), TAKES | {key: declared[key] for key in ("biased", "half") if key in declared})
    for name, (_, _, declared) in IHVPS.items()
    if name != "cg"  # which stands above
}
REPRESENTATIVES = ("implicit_cg", "reverse", "forward_gradient", "penalty")
KINDS = (*REPRESENTATIVES, "no_gradient", "chain_implicit_reverse", "zeroth_order", "two_phase", "full_zeroth_order")


@functools.lru_cache(maxsize=1)
def ihvp_subject(name):
    make, number, declared = IHVPS[name]
    return IHVPSubject(make, number, **declared)


@functools.lru_cache(maxsize=1)
def subject(name):
    if name in ESTIMATORS:
        make, declared = ESTIMATORS[name]
        return HypergradientSubject(make, **declared)
    make, declared = (SOLVERS | INSIDE_IMPLICIT)[name]
    return solver_subject(make, **({"cold": True, "counted": False} if name in INSIDE_IMPLICIT else {}), **declared)


LINEAR = ihvp.spd_is_symmetric_and_positive_definite
EAGER = hypergradient.jit_equals_eager
VARIANTS = (  # of others, which hand on the same forms: they differ in what they compute
    *("implicit_cold", "reverse_two_level", "reverse_store_all", "reverse_store_products"),
    *("chain_reverse_reverse", "chain_reverse_implicit", "chain_forward_gradient_reverse"),
    *("first_order", "forward_gradient_guide", "forward_gradient_control_variate", "two_phase_second"),
)
OTHERS = tuple(name for name in SOLVERS | ESTIMATORS if name not in VARIANTS)
FORMS = (*KINDS, "fixed_point", "root")  # one of each kind, and the equations
OFTEN = {  # of whom it is asked every day: what takes programs of its own, and what is about forms alone
    EAGER: REPRESENTATIVES,
    hypergradient.half_precision_is_near_double: KINDS,
    solver.differentiable_is_the_first_estimate: KINDS,
    solver.forward_and_backward_return_what_they_say: OTHERS,
    hypergradient.python_floats_are_numbers: FORMS,
    hypergradient.single_precision_stays_single: FORMS,
    hypergradient.weak_types_are_kept: FORMS,
    hypergradient.debuggers_find_nothing: KINDS,
    ihvp.debuggers_find_nothing: ("identity", "cg", "kfac", "random_neumann", "linear"),
    hypergradient.y_is_that_of_a_loop_by_hand: OTHERS,
    hypergradient.one_program_serves_all_steps: OTHERS,
    hypergradient.vmap_of_scan_equals_a_loop: FORMS,
}

KEPT = (("linear", ihvp.debuggers_find_nothing),) if jax.__version_info__ >= (0, 12) else ()  # lineax keeps a program


def compiles(one):
    """Programs that a contract may take: an eager estimate takes one for each operation."""
    return 300 if one is EAGER else 40


def pairs(names, contracts, of, often=None):
    """Methods and contracts: all that apply, or those of every day, or those that remain."""
    return [
        pytest.param(name, one, id=f"{name}-{one.name}", marks=pytest.mark.compiles(compiles(one)))
        for name in names
        for one in contracts
        if (name not in NOT_LINEAR if one is LINEAR else one.applies(of(name)))
        and (name, one) not in KEPT
        and often in (None, name in OFTEN.get(one, names))
    ]


over = functools.partial(pytest.mark.parametrize, ("name", "contract"))


@over(pairs(IHVPS, ihvp.CONTRACTS, ihvp_subject, often=True))
def test_ihvp(name, contract):
    contract.hold(name, ihvp_subject(name))


@pytest.mark.parametrize("name", IHVPS)
def test_ihvp_says_that_it_is_linear_or_not(name):
    assert LINEAR.applies(ihvp_subject(name)) == (name not in NOT_LINEAR)


@over(pairs(SOLVERS, solver.CONTRACTS, subject, often=True))
def test_solver(name, contract):
    contract.hold(name, subject(name))


@over(pairs(ESTIMATORS, hypergradient.CONTRACTS, subject, often=True))
def test_estimator(name, contract):
    contract.hold(name, subject(name))


@pytest.mark.parametrize("point", points.POINTS)
@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_estimate_returns_a_gradient_like_x(name, point):
    hypergradient.same_gradient_form(subject(name), points.POINTS[point]())


@pytest.mark.parametrize("point", points.POINTS)
@pytest.mark.parametrize("name", ["cg", "kfac"])
def test_ihvp_returns_v_like_b(name, point):
    ihvp.same_form_of_v(ihvp_subject(name), points.POINTS[point]())


# The rest of the product


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in IHVPS if name not in ("cg", "kfac")])
def test_every_ihvp_returns_v_like_b(name):
    for point in points.POINTS.values():
        ihvp.same_form_of_v(ihvp_subject(name), point())


@pytest.mark.slow
@pytest.mark.compiles(300)
@pytest.mark.parametrize("name", [name for name in SOLVERS | ESTIMATORS if name not in REPRESENTATIVES])
def test_every_estimate_returns_a_gradient_like_x(name):
    for point in points.POINTS.values():
        hypergradient.same_gradient_form(subject(name), point())


@pytest.mark.slow
@over(pairs(IHVPS, ihvp.CONTRACTS, ihvp_subject, often=False))
def test_every_ihvp(name, contract):
    contract.hold(name, ihvp_subject(name))


@pytest.mark.slow
@over(pairs(SOLVERS, solver.CONTRACTS, subject, often=False))
def test_every_solver(name, contract):
    contract.hold(name, subject(name))


@pytest.mark.slow
@over(pairs(ESTIMATORS, hypergradient.CONTRACTS, subject, often=False))
def test_every_estimator(name, contract):
    contract.hold(name, subject(name))


@pytest.mark.slow
@over(pairs(INSIDE_IMPLICIT, solver.CONTRACTS, subject))
def test_every_ihvp_inside_implicit(name, contract):
    contract.hold(name, subject(name))


# What single methods keep


@pytest.mark.compiles(100)
def test_states_are_written_and_read(tmp_path):
    """Of all estimators and inverse-Hessian-vector products, by flax, pickle, equinox and bx.checkpoint."""
    names = (*SOLVERS, *ESTIMATORS)
    like = {name: subject(name).start for name in names} | {f"ihvp_{name}": ihvp_subject(name).start for name in IHVPS}
    kept = bx.ihvp.kfac(ema=0.5, damping=1.0), bx.ihvp.ekfac(ema=0.5, damping=1.0)
    y, batch = jnp.ones((3, 2)), (jnp.ones((5, 3)), jnp.ones((5, 2)))
    loss = bx.curvature.ModelLoss(lambda y, a: a @ y, bx.curvature.squared_error, lambda x, batch: batch)
    like["factors"] = [ihvp.init(jnp.zeros(()), y, batch, loss) for ihvp in kept]
    other = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf) + np.ones((), leaf.dtype)), like)
    assert_read_back(other, like, tmp_path)


def test_linear_solver_of_lineax_in_half_precision():
    """With a tolerance that bfloat16 can meet."""
    loose = IHVPSubject(bx.ihvp.lineax(gmres(1e-3)), counted=False)
    ihvp.half_precision_is_near_double.hold("linear", loose)


@pytest.mark.skipif(not READABLE, reason="reads HLO text as it is printed since jax 0.10")
def test_cg_counts_the_products_of_its_preconditioner():
    exact = IHVPSubject(bx.ihvp.cg(maxiter=3, preconditioner=bx.ihvp.exact(damping=1.0)))
    ihvp.declared_calls_are_compiled_calls.hold("cg", exact)


def test_solve_may_return_the_python_float_that_it_got():
    made = bx.inner.implicit(points.PROBLEM.inner_loss, solve=lambda x, y, batch: y)
    hypergrad = bx.hypergradient(points.PROBLEM.outer_loss, made)
    estimate = jax.jit(lambda: hypergrad.estimate(KEY, hypergrad.init(0.5, -1.2), 0.5, points.make_batch()))
    assert estimate()[1].y == -1.2


def test_flax_models():
    """A linen model, an nnx model and a plain matrix product with the same weights have one hypergradient."""
    import flax.linen
    import flax.nnx

    inputs, targets = np.linspace(-1, 1, 12).reshape(4, 3), np.linspace(0, 1, 8).reshape(4, 2)
    linen, linen_y = flax.linen.Dense(2), points.POINTS["linen"]()[1]
    weights = linen_y["params"]
    graph, nnx_y = flax.nnx.split(flax.nnx.Linear(3, 2, rngs=flax.nnx.Rngs(0)))
    nnx_y.kernel.set_value(weights["kernel"])
    nnx_y.bias.set_value(weights["bias"])
    models = {
        "plain": (lambda y: inputs @ y["kernel"] + y["bias"][None, :], weights),
        "linen": (lambda y: linen.apply(y, inputs), linen_y),
        "nnx": (lambda y: flax.nnx.merge(graph, y)(inputs), nnx_y),
    }

    def estimate(predict, y):
        fit = lambda y: jnp.mean((predict(y) - targets) ** 2)  # noqa: E731
        ridge = lambda x, y, batch: fit(y) + jnp.exp(x["log_l2"]) * optax.tree.norm(y, squared=True)  # noqa: E731
        made = chain(implicit("cg", 2), reverse(2))(ridge, optax.sgd(0.1), bx.sampling.full)
        hypergrad = bx.hypergradient(lambda x, y, batch: fit(y), made)
        x = {"log_l2": jnp.array(-1.0)}
        grad, state, _ = jax.jit(hypergrad.estimate)(KEY, hypergrad.init(x, y), x, bx.Batch(None, None))
        assert jax.tree.structure(state.y) == jax.tree.structure(y)
        return grad["log_l2"]

    plain, *others = (estimate(*model) for model in models.values())
    assert plain != 0
    np.testing.assert_allclose(others, plain, rtol=1e-12)

"""An inverse-Hessian-vector product of another package keeps the contracts; broken ones fail by name."""

import functools

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import testing

RANDOM = np.random.default_rng(0)  # drawn from while a function is traced, it makes each trace another one


def richardson(step_size, sample, steps=3):
    """v ← v + step_size (b − H v), from v0 or from zero."""

    def init(x, y, batch=None, inner_loss=None):
        return ()

    def prepare(key, state, inner_loss, point):
        x, y, data = point
        product = bx.curvature.hessian(inner_loss, x, y, sample(key, 0, data))

        def apply(b, v0=None):
            def step(v, _):
                r = jax.tree.map(lambda b, hv: b - hv, b, product(v))
                return jax.tree.map(lambda v, r: (v + step_size * r).astype(v.dtype), v, r), None

            v = jax.tree.map(lambda b: step_size * b, b) if v0 is None else v0
            v, _ = jax.lax.scan(step, optax.tree.cast_like(v, b), length=steps)
            bad = ~jnp.isfinite(sum(jnp.sum(leaf, dtype=float) for leaf in jax.tree.leaves(v)))
            return v, bx.problem.IHVPInfo(steps, steps, 0, None, None, bad)

        return apply, state

    return bx.problem.IHVP(init, prepare, spd=True)


def changed(change, spd=True):
    """A constructor of `richardson` whose `apply` is `change(apply, b, v0)`."""

    def make(number, sample):
        sound = richardson(number, sample)

        def prepare(*arguments):
            apply, state = sound.prepare(*arguments)
            return functools.partial(change, apply), state

        return bx.problem.IHVP(sound.init, prepare, spd)

    return make


def cold(apply, b, v0=None):
    return apply(b)


def wrong_sign(apply, b, v0=None):
    v, info = apply(b, v0)
    return optax.tree.scale(-1, v), info


def single_precision(apply, b, v0=None):
    v, info = apply(b, v0)
    return optax.tree.cast(v, jnp.float32), info


def hidden_nan(apply, b, v0=None):
    v, info = apply(b, v0)
    return jax.tree.map(jnp.nan_to_num, v), info._replace(breakdown=jnp.zeros((), bool))


def unmeasured(apply, b, v0=None):
    v, info = apply(b, v0)
    return v, info._replace(residual=jnp.nan)


def keeping_a_key(number, sample):
    return richardson(number, sample)._replace(init=lambda *point: jax.random.key(0))


def one_product_too_few(apply, b, v0=None):
    v, info = apply(b, v0)
    return v, info._replace(products=info.products - 1)


def triangular(apply, b, v0=None):
    """Right at H = 2 I; not symmetric."""
    v, info = apply(b, v0)
    return jax.tree.map(lambda v, b: v + 0.1 * jnp.roll(v - b / 2, 1), v, b), info


def random_start(apply, b, v0=None):
    return apply(b, jax.tree.map(lambda leaf: jnp.full_like(leaf, RANDOM.normal()), b))


def weak_memory(number, sample):
    """Made of a Python number in init, of an array in prepare."""
    sound = richardson(number, sample)

    def prepare(key, state, *problem):
        return sound.prepare(key, (), *problem)[0], jnp.zeros(())

    return bx.problem.IHVP(lambda *point: jnp.asarray(0.0), prepare, spd=True)


def two_draws(number, sample):
    """Draws another batch in each application of one Hessian."""
    sound = richardson(number, sample, steps=1)

    def prepare(key, *arguments):
        first, last = (sound.prepare(jax.random.fold_in(key, i), *arguments)[0] for i in range(2))

        def apply(b, v0=None):
            return last(b, first(b, v0)[0])

        return apply, ()

    return bx.problem.IHVP(sound.init, prepare, spd=True)


def one_key(number, sample):
    """The same draws for all keys."""
    sound = richardson(number, sample)
    return sound._replace(prepare=lambda key, *arguments: sound.prepare(jax.random.key(7), *arguments))


def small_steps(number, sample):
    """Right in double precision; in bfloat16 a step is soon too small to be added."""
    return richardson(number / 100, sample, steps=2400)


def branching(number, sample):
    if number > 1:
        raise ValueError("number must be at most 1")
    return richardson(number, sample)


@pytest.mark.compiles(200)
def test_foreign_ihvp():
    testing.check_ihvp(richardson, number=0.5)
    testing.check_ihvp(richardson(0.5, bx.sampling.full))


@pytest.mark.compiles(100)
def test_checks_are_in_double_precision_wherever_they_are_called():
    with jax.enable_x64(False):
        testing.check_ihvp(richardson(0.5, bx.sampling.full))
        with pytest.raises(testing.ContractError, match="inverts_twice_the_identity"):
            testing.check_ihvp(richardson(0.4999999, bx.sampling.full, steps=0))


BROKEN = {
    "a warm v is not used": (changed(cold), "v0_is_used"),
    "the sign is wrong": (changed(wrong_sign), "inverts_twice_the_identity"),
    "v is single precision": (changed(single_precision), "v_is_like_b"),
    "v is double precision": (changed(foreign.double), "single_precision_stays_single"),
    "what is not measured is NaN": (changed(unmeasured), "debuggers_find_nothing"),
    "a key in the state": (keeping_a_key, "state_is_made_of_arrays"),
    "a weak type of the state is not kept": (weak_memory, "one_program_serves_all_calls"),
    "it starts from outside of the trace": (changed(random_start), "vmap_equals_a_loop"),
    "NaN is hidden": (changed(hidden_nan), "nan_is_reported"),
    "a product is not counted": (changed(one_product_too_few), "declared_calls_are_compiled_calls"),
    "it is not symmetric": (changed(triangular), "spd_is_symmetric_and_positive_definite"),
    "it draws for each application": (two_draws, "spd_is_symmetric_and_positive_definite"),
    "the key is not used": (one_key, "draws_depend_on_the_key_alone"),
    "its steps are small": (small_steps, "half_precision_is_near_double"),
    "it branches on its number": (branching, "number_may_be_traced"),
}


@pytest.mark.parametrize("fault", foreign.faults(BROKEN))
def test_broken_ihvp(fault):
    make, name = BROKEN[fault]

    def check(contracts):
        testing.check_ihvp(make, contracts, number=0.5)

    foreign.broken(check, testing.ihvp, name, fault)


def test_each_contract_has_a_broken_method():
    foreign.same_names(BROKEN, (name for _, name in BROKEN.values()), testing.ihvp.CONTRACTS)

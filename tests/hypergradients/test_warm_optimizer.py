"""The optimizer of y goes on over the outer steps, as in a loop by hand that keeps its state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

STEPS, OUTER = 3, 4
KEY = jax.random.key(0)
Y = jnp.array([0.5, -1.0, 2.0])
X = jnp.array(-1.0)
DATA = jax.random.normal(jax.random.key(1), (5, 3))
BATCH = bx.Batch(None, DATA)

OPTIMIZERS = {
    "momentum": optax.sgd(optax.linear_schedule(0.2, 0.02, 9), momentum=0.8),
    "adamw": optax.adamw(optax.warmup_cosine_decay_schedule(0.01, 0.2, 4, 12), weight_decay=1e-2, eps_root=1e-6),
    "multisteps": optax.MultiSteps(optax.adam(0.1, eps_root=1e-6), 2).gradient_transformation(),
    "schedule_free": optax.contrib.schedule_free(optax.sgd(0.2), 0.2, b1=0.9),
}


def inner_loss(x, y, batch):
    return jnp.mean((batch @ y - 1) ** 2) + jnp.exp(x) * jnp.sum(y**2)


def outer_loss(x, y, batch):
    return jnp.sum((y - 1) ** 2)


def row(key, t, data):  # whose draw depends on the key and on the running t
    return data * (1 + 0.1 * jnp.sin(t) + 0.1 * jax.random.uniform(key))


def make(kind, optimizer, steps=STEPS, sample=row):
    build = functools.partial(kind, inner_loss, optimizer, sample=sample)
    if kind is bx.inner.forward_gradient:
        return build(steps=steps, directions=1, sampler=bx.inner.random_directions.coordinate)
    return build(steps=steps)


def chained(inner_loss, optimizer, steps, sample):
    first = bx.inner.no_gradient(inner_loss, optimizer, steps - 1, sample=sample)
    return bx.inner.chain(first, bx.inner.reverse(inner_loss, optimizer, 1, sample=sample))


@functools.partial(jax.jit, static_argnames=("optimizer", "steps", "sample"))
def advance(optimizer, x, z, key, steps=STEPS, sample=row):
    """The same steps by hand."""
    key = bx.inner.step_keys(key).steps

    def step(z, _):
        y, opt_state, t = z
        gradient = jax.grad(inner_loss, 1)(x, y, sample(jax.random.fold_in(key, t), t, DATA))
        updates, opt_state = optimizer.update(gradient, opt_state, y)
        return (optax.apply_updates(y, updates), opt_state, t + 1), None

    return jax.lax.scan(step, z, length=steps)[0]


@functools.cache
def by_hand(name):
    """What a loop that keeps the state sees: y, optimizer states and derivatives of all outer steps."""
    optimizer = OPTIMIZERS[name]

    def outer_step(carry, key):
        x, z = carry

        def value(x):
            after = advance(optimizer, x, z, key)
            return outer_loss(x, after[0], None), after

        grad, z = jax.grad(value, has_aux=True)(x)
        return (x + 0.1, z), (grad, z)

    z = Y, optimizer.init(Y), jnp.zeros((), jnp.int32)
    return jax.jit(lambda: jax.lax.scan(outer_step, (X, z), jax.random.split(KEY, OUTER))[1])()


def run(hypergrad, state, batch=BATCH, outer=OUTER):
    """Gradients, states and infos of all outer steps."""

    def outer_step(carry, key):
        x, state = carry
        grad, state, info = hypergrad.estimate(key, state, x, batch)
        return (x + 0.1, state), (grad, state, info)

    keys = jax.random.split(KEY, outer)
    return jax.jit(lambda state: jax.lax.scan(outer_step, (X, state), keys)[1])(state)


def close(got, expected, rtol=1e-14):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


KINDS = bx.inner.reverse, bx.inner.forward_gradient, bx.inner.implicit, bx.inner.no_gradient, chained


def rows():
    """Every day each kind with one optimizer, and each optimizer with one kind."""
    for kind in KINDS:
        for name in OPTIMIZERS:
            often = name == "adamw" or kind is bx.inner.reverse
            yield pytest.param(kind, name, id=f"{kind.__name__}-{name}", marks=[] if often else pytest.mark.slow)


@pytest.mark.parametrize(("kind", "name"), list(rows()))
def test_y_and_optimizer_go_on_as_in_a_loop_by_hand(kind, name):
    hypergrad = bx.hypergradient(outer_loss, make(kind, OPTIMIZERS[name]))
    grads, states, _ = run(hypergrad, hypergrad.init(X, Y))
    expected, (y, opt_state, t) = by_hand(name)
    close((states.y, states.opt_state, states.t), (y, opt_state, t))
    if kind in (bx.inner.reverse, bx.inner.forward_gradient):
        same_mode = kind is bx.inner.reverse or name != "multisteps"  # whose jvp and vjp by JAX differ by 2e-8
        close(grads, expected, rtol=1e-13 if same_mode else 1e-7)


def test_the_forward_pass_is_the_scan_by_hand_to_the_bit():
    optimizer = OPTIMIZERS["adamw"]
    hypergrad = bx.hypergradient(outer_loss, make(bx.inner.no_gradient, optimizer))
    state, z = hypergrad.init(X, Y), (Y, optimizer.init(Y), jnp.zeros((), jnp.int32))
    estimate = jax.jit(hypergrad.estimate)
    for key in jax.random.split(KEY, OUTER):
        state, z = estimate(key, state, X, BATCH)[1], advance(optimizer, X, z, key)
        assert all(map(np.array_equal, jax.tree.leaves((state.y, state.opt_state, state.t)), jax.tree.leaves(z)))


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: training_state(state)], ids=["loop", "TrainState"])
def test_the_optimizer_of_a_training_so_far_is_taken_over(wrap):
    optimizer = OPTIMIZERS["adamw"]
    z = advance(optimizer, X, (Y, optimizer.init(Y), jnp.zeros((), jnp.int32)), jax.random.key(7))
    hypergrad = bx.hypergradient(outer_loss, make(bx.inner.reverse, optimizer))
    _, state, _ = jax.jit(hypergrad.estimate)(KEY, hypergrad.init(X, z[0], opt_state=wrap(z[1])), X, BATCH)
    expected = advance(optimizer, X, (*z[:2], jnp.zeros((), jnp.int32)), KEY)
    close((state.y, state.opt_state, state.t), expected)


def training_state(opt_state):
    from flax.training.train_state import TrainState

    made = TrainState.create(apply_fn=None, params=Y, tx=OPTIMIZERS["adamw"])
    return made.replace(opt_state=opt_state).opt_state


def test_the_optimizer_of_flax_nnx_is_taken_over():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(3, 1, rngs=nnx.Rngs(0), param_dtype=float)

        def loss(self, data):
            return jnp.mean((self.layer(data) - 1) ** 2)

    model, adam = Model(), optax.adam(optax.linear_schedule(0.1, 0.0, 9))
    trainer = nnx.Optimizer(model, adam, wrt=nnx.Param)

    @nnx.jit
    def train(model, trainer):
        for _ in range(STEPS):
            trainer.update(model, nnx.grad(Model.loss)(model, DATA))

    train(model, trainer)
    graph, first = nnx.split(model)

    def g(x, y, data):
        return nnx.merge(graph, y).loss(data)

    hypergrad = bx.hypergradient(lambda x, y, batch: x, bx.inner.no_gradient(g, adam, STEPS))
    states = [hypergrad.init(X, first, opt_state=trainer.opt_state)]
    pure = bx.hypergradient(lambda x, y, batch: x, bx.inner.no_gradient(lambda x, y, data: 0 * x, adam, STEPS))
    states.append(pure.init(X, nnx.to_pure_dict(first), opt_state=trainer.opt_state))
    close(*(jax.tree.leaves(state.opt_state) for state in states), rtol=0)
    state = jax.jit(hypergrad.estimate)(None, states[0], X, BATCH)[1]
    train(model, trainer)
    close(jax.tree.leaves(state.y), jax.tree.leaves(nnx.state(model, nnx.Param)), rtol=1e-13)
    close(jax.tree.leaves(state.opt_state), jax.tree.leaves(trainer.opt_state), rtol=1e-13)


def test_an_optimizer_state_that_does_not_fit_is_refused():
    hypergrad = bx.hypergradient(outer_loss, make(bx.inner.reverse, OPTIMIZERS["momentum"]))
    wrong = {
        "another optimizer": optax.adam(0.1).init(Y),
        "another y": OPTIMIZERS["momentum"].init(jnp.zeros(4)),
        "the moments of another optimizer": optax.chain(optax.scale_by_rms(), optax.scale_by_schedule(abs)).init(Y),
    }
    for opt_state in wrong.values():
        with pytest.raises(ValueError, match="opt_state must keep its structure and shapes"):
            hypergrad.init(X, Y, opt_state=opt_state)
    single = OPTIMIZERS["momentum"].init(Y.astype("float32"))
    with pytest.raises(ValueError, match="opt_state must keep its dtypes"):
        hypergrad.init(X, Y, opt_state=single)
    with pytest.raises(ValueError, match="opt_state of the state must keep its structure"):
        hypergrad.estimate(KEY, hypergrad.init(X, Y)._replace(opt_state=()), X, BATCH)


def test_an_optimizer_state_that_nothing_would_read_is_refused():
    optimizer = OPTIMIZERS["momentum"]
    initial = bx.inner.reverse(inner_loss, optimizer, 1, initial=lambda x: Y)
    restarted = bx.hypergradient(outer_loss, make(bx.inner.reverse, optimizer), restart_optimizer=True)
    black = bx.hypergradients.full_zeroth_order(outer_loss, lambda x, y, batch: y)
    for hypergrad in (bx.hypergradient(outer_loss, initial), restarted, black):
        with pytest.raises(ValueError, match="opt_state must be None where"):
            hypergrad.init(X, Y, opt_state=optimizer.init(Y))
    solved = bx.hypergradient(outer_loss, bx.inner.implicit(inner_loss, solve=lambda x, y, batch: y))
    with pytest.raises(ValueError, match="opt_state must be None where the solver has no optimizer; got one"):
        solved.init(X, Y, opt_state=optimizer.init(Y))


def test_what_holds_an_optimizer_state_or_is_another_one_is_named():
    from flax.training.train_state import TrainState

    hypergrad = bx.hypergradient(outer_loss, make(bx.inner.reverse, OPTIMIZERS["momentum"]))
    whole = TrainState.create(apply_fn=None, params=Y, tx=OPTIMIZERS["momentum"])
    with pytest.raises(ValueError, match=r"got TrainState\. Pass its opt_state: opt_state=given"):
        hypergrad.init(X, Y, opt_state=whole)
    with pytest.raises(ValueError, match=r"got ScaleByAdamState.*expected TraceState"):
        hypergrad.init(X, Y, opt_state=optax.adam(0.1).init(Y))


@pytest.mark.parametrize("kind", [bx.inner.reverse, bx.inner.forward_gradient, chained], ids=lambda kind: kind.__name__)
def test_a_restarted_optimizer_begins_at_y_and_t_runs_on(kind):
    optimizer = OPTIMIZERS["adamw"]
    hypergrad = bx.hypergradient(outer_loss, make(kind, optimizer), restart_optimizer=True)
    _, states, _ = run(hypergrad, hypergrad.init(X, Y), outer=2)
    assert states.opt_state == ()
    z = Y, None, jnp.zeros((), jnp.int32)
    for i, key in enumerate(jax.random.split(KEY, 2)):
        z = advance(optimizer, X + 0.1 * i, (z[0], optimizer.init(z[0]), z[2]), key)
        close((states.y[i], states.t[i]), (z[0], z[2]))


def test_with_initial_everything_starts_afresh():
    first = bx.inner.no_gradient(inner_loss, OPTIMIZERS["momentum"], 2, initial=lambda x: Y + x, sample=row)
    last = bx.inner.reverse(inner_loss, OPTIMIZERS["momentum"], 1, sample=row)
    hypergrad = bx.hypergradient(outer_loss, bx.inner.chain(first, last))
    state = hypergrad.init(X, Y)
    estimate = jax.jit(hypergrad.estimate)
    once = estimate(KEY, state, X, BATCH)
    again = estimate(KEY, once[1], X, BATCH)
    close(again, once, rtol=0)
    assert int(once[1].t) == STEPS


def numbers_in_the_state(x):
    return optax.inject_hyperparams(optax.adam)(jnp.exp(x), b1=0.8, eps_root=1e-6)


@pytest.mark.parametrize(
    ("kind", "jitted"),
    [
        (bx.inner.reverse, True),
        (bx.inner.forward_gradient, False),
        pytest.param(bx.inner.reverse, False, marks=pytest.mark.slow),
        pytest.param(bx.inner.forward_gradient, True, marks=pytest.mark.slow),
    ],
)
def test_an_optimizer_made_of_x_keeps_its_state_and_takes_the_new_numbers(kind, jitted):
    """Also where they stand in the state, beside the moments: as if they were none of it."""

    def injected(x):
        made = numbers_in_the_state(x)
        return made._replace(init=jax.jit(made.init)) if jitted else made

    pairs = injected, lambda x: optax.adam(jnp.exp(x), b1=0.8, eps_root=1e-6)
    seen = []
    for optimizer in pairs:
        hypergrad = bx.hypergradient(outer_loss, make(kind, optimizer))
        seen.append(run(hypergrad, hypergrad.init(X, Y))[:2])
    (grads, states), (expected, plain) = seen
    close((grads, states.y), (expected, plain.y), rtol=1e-12)
    close(states.opt_state.hyperparams["learning_rate"], jnp.exp(X + 0.1 * jnp.arange(OUTER)), rtol=1e-12)
    close(states.opt_state.inner_state[0].mu, plain.opt_state[0].mu, rtol=1e-12)


@functools.partial(jax.jit, static_argnames="optimizer")
def penalized_by_hand(optimizer, weight, opt_state):
    def step(z, i):
        def loss(y):
            return inner_loss(X + 0.1 * (i // STEPS), y, DATA) + weight * outer_loss(X, y, None)

        updates, opt_state = optimizer.update(jax.grad(loss)(z[0]), z[1], z[0])
        return (optax.apply_updates(z[0], updates), opt_state), None

    return jax.lax.scan(step, (Y, opt_state), jnp.arange(OUTER * STEPS))[0]


def test_penalty_keeps_both_optimizers():
    optimizer, multiplier = OPTIMIZERS["adamw"], 50.0
    problem = bx.BilevelProblem(outer_loss, lambda x, y, batch: inner_loss(x, y, batch))
    hypergrad = bx.penalty(problem, optimizer, STEPS, multiplier=multiplier)
    given = advance(optimizer, X, (Y, optimizer.init(Y), 0), KEY)[1]
    _, states, _ = run(hypergrad, hypergrad.init(X, Y, opt_state=given))
    state = jax.tree.map(lambda leaf: leaf[-1], states)
    for y, opt_state, weight in (
        (state.y, state.opt_state, 0),
        (state.penalized, state.penalized_opt_state, 1 / multiplier),
    ):
        close((y, opt_state), penalized_by_hand(optimizer, weight, given), rtol=1e-13)
    assert int(state.t) == OUTER * STEPS


def test_two_phases_hand_the_optimizer_over_where_the_states_agree():
    optimizer = OPTIMIZERS["adamw"]
    first = bx.hypergradient(outer_loss, make(bx.inner.no_gradient, optimizer))
    second = bx.hypergradient(outer_loss, make(bx.inner.reverse, optimizer))
    hypergrad = bx.two_phase(2, first, second)
    _, states, infos = run(hypergrad, hypergrad.init(X, Y))
    y, opt_state, t = by_hand("adamw")[1]
    close((states.y, states.opt_state, states.t), (y, opt_state, t))
    assert infos.handed_over.all()


def test_two_phases_say_where_the_second_optimizer_starts_afresh():
    optimizer = OPTIMIZERS["momentum"]
    first = bx.hypergradient(outer_loss, make(bx.inner.no_gradient, OPTIMIZERS["adamw"]))
    second = bx.hypergradient(outer_loss, make(bx.inner.reverse, optimizer))
    hypergrad = bx.two_phase(1, first, second)
    _, states, infos = run(hypergrad, hypergrad.init(X, Y), outer=2)
    z = by_hand("adamw")[1]
    y, t = z[0][0], z[2][0]
    expected = advance(optimizer, X + 0.1, (y, optimizer.init(y), t), jax.random.split(KEY, 2)[1])
    last = jax.tree.map(lambda leaf: leaf[-1], states)
    close((last.y, last.second.opt_state, last.t), expected)
    assert last.opt_state is None
    assert not infos.handed_over.any()

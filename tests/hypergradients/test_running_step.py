"""What the running step count t means to a sampler, over several outer steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

STEPS, OUTER = 2, 5
X, Y = jnp.zeros(()), jnp.zeros(3)
STACKS = jax.random.normal(jax.random.key(1), (OUTER, STEPS, 3))  # rows of all inner steps, for each outer step
per_step = bx.sampling.per_step


def g(x, y, row):  # plain descent with step size 1 adds up the rows
    return -jnp.sum(row * y) * (1 + x)


def f(x, y, batch):
    return jnp.sum(y)


def wrapped(key, t, data):
    return 2 * per_step(key, t, data / 2)


def chained(g, optimizer, steps, sample):
    first = bx.inner.no_gradient(g, optimizer, 1, sample=sample)
    return bx.inner.chain(first, bx.inner.reverse(g, optimizer, steps - 1, sample=sample))


def run(hypergrad, inner):
    """The states of all outer steps, one for each entry of the inner data."""

    def outer_step(state, now):
        key, data = now
        _, state, _ = hypergrad.estimate(key, state, X, bx.Batch(None, data))
        return state, state

    keys = jax.random.split(jax.random.key(0), len(inner))
    return jax.jit(lambda: jax.lax.scan(outer_step, hypergrad.init(X, Y), (keys, inner))[1])()


ROWS = {
    "reverse": lambda sample: bx.inner.reverse(g, optax.sgd(1.0), STEPS, sample=sample),
    "forward": lambda sample: bx.inner.forward_gradient(g, optax.sgd(1.0), STEPS, directions=1, sample=sample),
    "chain": lambda sample: chained(g, optax.sgd(1.0), STEPS, sample),
}


@pytest.mark.parametrize("sample", [per_step, wrapped], ids=lambda sample: sample.__name__)
@pytest.mark.parametrize("name", ROWS)
def test_per_step_reads_the_stack_of_each_outer_step_from_its_first_row(name, sample):
    states = run(bx.hypergradient(f, ROWS[name](sample)), STACKS)
    np.testing.assert_allclose(states.y, jnp.cumsum(STACKS.sum(1), 0), rtol=1e-12)
    assert states.t.tolist() == [STEPS * (k + 1) for k in range(OUTER)]


def test_per_step_of_a_penalty_reads_from_the_first_row_too():
    problem = bx.BilevelProblem(lambda x, y, batch: 0 * x, g)
    sample = {"sample": per_step, "cross_sample": per_step}
    states = run(bx.penalty(problem, optax.sgd(1.0), STEPS, multiplier=1.0, **sample), STACKS)
    np.testing.assert_allclose(states.y, jnp.cumsum(STACKS.sum(1), 0), rtol=1e-12)
    np.testing.assert_allclose(states.penalized, states.y, rtol=1e-12)


def test_the_cross_term_sees_the_last_step_and_an_ihvp_its_own():
    """H = 1, the cross term is minus the last row, and the IHVP takes one step on the first row of its stack."""
    data = {"cross": STACKS, "curvature": jnp.ones((OUTER, 1))}

    def quadratic(x, y, rows):
        return 0.5 * jnp.sum(rows["curvature"] * y**2) - x * jnp.sum(rows["cross"] * y)

    def steps_only(key, t, rows):
        return {"cross": per_step(key, t, rows["cross"]), "curvature": jnp.ones(())}

    def ihvp_sample(key, t, rows):
        return {"curvature": per_step(key, t, rows["curvature"]), "cross": rows["cross"][0]}

    ihvp = bx.ihvp.sgd(steps=1, step_size=1.0, sample=ihvp_sample)
    solver = bx.inner.implicit(
        quadratic, optax.sgd(0.1), STEPS, ihvp=ihvp, sample=steps_only, cross_sample=steps_only, warm_start=False
    )
    hypergrad = bx.hypergradient(lambda x, y, batch: jnp.sum(y), solver)

    def outer_step(state, data):
        grad, state, _ = hypergrad.estimate(jax.random.key(0), state, X, bx.Batch(None, data))
        return state, grad

    grads = jax.jit(lambda: jax.lax.scan(outer_step, hypergrad.init(X, Y), data)[1])()
    np.testing.assert_allclose(grads, STACKS[:, -1].sum(-1), rtol=1e-12)


def test_a_solve_inside_a_loss_counts_from_zero():
    """Its per_step reads its own stack, whatever the outer step of the hypergradient around it."""
    middle = bx.differentiable(bx.inner.reverse(g, optax.sgd(1.0), STEPS, sample=per_step))

    def loss(x, y, stack):
        return -jnp.sum(middle(x, jnp.zeros(3), stack) * y)

    states = run(bx.hypergradient(f, bx.inner.reverse(loss, optax.sgd(1.0), STEPS)), STACKS)
    np.testing.assert_allclose(states.y, STEPS * jnp.cumsum(STACKS.sum(1), 0), rtol=1e-12)


def test_beyond_the_stack_per_step_reads_nan_in_every_outer_step():
    states = run(bx.hypergradient(f, ROWS["reverse"](per_step)), STACKS[:, :1])
    assert np.isnan(states.y).all()


@pytest.mark.parametrize("size", [4, 5])
def test_epochs_go_on_over_the_outer_steps_whatever_their_keys(size):
    """Rows are unit vectors, so that y counts how often each one came."""
    data, batches = jnp.eye(12), 12 // size
    sample = bx.sampling.epochs(size)
    solver = bx.inner.reverse(lambda x, y, rows: -jnp.sum(rows @ y), optax.sgd(1.0), STEPS, sample=sample)
    hypergrad = bx.hypergradient(f, solver)

    def outer_step(state, key):
        _, state, _ = hypergrad.estimate(key, state, X, bx.Batch(None, data))
        return state, state.y

    keys = jax.random.split(jax.random.key(0), 3 * batches)
    counts = jax.jit(lambda: jax.lax.scan(outer_step, hypergrad.init(X, jnp.zeros(12)), keys)[1])()
    for step in range(STEPS, STEPS * len(keys) + 1, STEPS):
        epoch, rest = divmod(step, batches)
        count = counts[step // STEPS - 1]
        assert count.sum() == step * size
        if size == 4:  # which fills epochs
            assert {*count.tolist()} == ({epoch} if rest == 0 else {epoch, epoch + 1})
        else:
            assert count.max() <= epoch + (rest > 0)


@pytest.mark.parametrize(("length", "size"), [(12, 4), (12, 1), (11, 4), (3, 3), (3, 5)])
def test_an_epoch_holds_every_row_once(length, size):
    """What fills up the last batch has weight 0; without weights the rows that fill no batch are left out."""
    rows = {"row": jnp.arange(length), "rate": 0.5}
    padded = bx.sampling.epochs(size, mask=lambda batch, weights: (batch, weights))
    batches, epochs = -(-length // size), 3
    draw = jax.jit(jax.vmap(lambda t: padded(None, t, rows)))
    batch, weights = draw(jnp.arange(batches * epochs))
    assert batch["row"].shape == weights.shape == (batches * epochs, size)
    np.testing.assert_array_equal(batch["rate"], 0.5)
    seen = (
        np.asarray(batch["row"]).reshape(epochs, -1)[np.asarray(weights).reshape(epochs, -1) == 1].reshape(epochs, -1)
    )
    np.testing.assert_array_equal(np.sort(seen), np.tile(np.arange(length), (epochs, 1)))
    assert length == 3 or len({*map(tuple, seen.tolist())}) == epochs
    if size <= length:
        dropped = bx.sampling.epochs(size)
        kept = jax.jit(jax.vmap(lambda t: dropped(None, t, rows)))(jnp.arange(length // size * epochs))["row"]
        orders = np.asarray(kept).reshape(epochs, -1)
        np.testing.assert_array_equal(orders, seen[:, : orders.shape[1]])


def test_each_key_makes_its_own_order_of_epochs():
    draw = jax.jit(jax.vmap(lambda seed: bx.sampling.epochs(20, key=jax.random.key(seed))(None, 0, jnp.arange(20))))
    orders = np.asarray(draw(jnp.arange(3)))
    np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(20), (3, 1)))
    assert len({*map(tuple, orders.tolist())}) == 3
    np.testing.assert_array_equal(orders[0], bx.sampling.epochs(20)(jax.random.key(5), 0, jnp.arange(20)))

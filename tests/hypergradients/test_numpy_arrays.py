"""NumPy arrays are arrays of JAX to a differentiable solve, also behind jit and vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

SGD = optax.sgd(0.5)
TASKS = np.arange(6).reshape(3, 2)


def inner_loss(x, y, batch):
    return 0.5 * jnp.sum((y - x * batch) ** 2)


SOLVERS = {
    "implicit": bx.inner.implicit(inner_loss, SGD, 2),
    "reverse": bx.inner.reverse(inner_loss, SGD, 2),
    "forward_gradient": bx.inner.forward_gradient(inner_loss, SGD, 2, directions=1),
}


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
@pytest.mark.parametrize("name", SOLVERS)
def test_tasks_of_numpy_under_jit_and_vmap(name, dtype):
    """0.75 x of each task after two steps from zero, with and without a derivative, and with NumPy starts."""
    solve, tasks, key = bx.differentiable(SOLVERS[name]), TASKS.astype(dtype), jax.random.key(0)

    @jax.jit
    def evaluate(x):
        from_data = jax.vmap(lambda batch: solve(x, jnp.zeros(2), batch, key))(tasks)
        from_starts = jax.vmap(lambda y0: solve(x, y0, tasks[1], key))(np.zeros((3, 2)))
        slopes = jax.vmap(lambda batch: jax.grad(lambda x: solve(x, jnp.zeros(2), batch, key).sum())(x))(tasks)
        return from_data, from_starts, slopes

    from_data, from_starts, slopes = evaluate(jnp.asarray(2.0, float))
    wide = np.asarray(tasks, float)
    np.testing.assert_allclose(from_data, 1.5 * wide, rtol=1e-12)
    np.testing.assert_allclose(from_starts, np.tile(1.5 * wide[1], (3, 1)), rtol=1e-12)
    np.testing.assert_allclose(slopes, (1.0 if name == "implicit" else 0.75) * wide.sum(1), rtol=1e-12)


def test_doubles_of_numpy_are_single_where_jax_is():
    solve = bx.differentiable(SOLVERS["reverse"])
    with jax.enable_x64(False):
        y = jax.jit(lambda x: jax.vmap(lambda batch: solve(x, jnp.zeros(2), batch))(TASKS.astype(float)))(jnp.ones(()))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, 0.75 * TASKS, rtol=1e-6)

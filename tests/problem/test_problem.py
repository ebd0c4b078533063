"""Closed forms of the three directions, and of the products that they are made of."""

import jax
import jax.numpy as jnp
import numpy as np

import bilevax as bx


def inner_loss(x, y, batch):
    return jnp.sum(jnp.exp(x["a"]) * y**4) + jnp.sum(jnp.sin(y) * x["b"]) + batch * jnp.sum(y**2)


def outer_loss(x, y, batch):
    return jnp.sum(y * x["b"]) + batch * jnp.sum(jnp.cos(x["a"]))


X = {"a": jnp.array(0.3), "b": jnp.array([1.0, -2.0, 0.5])}
Y = jnp.array([0.2, -0.4, 1.1])
V = jnp.array([1.0, 2.0, -3.0])


def test_directions_equal_dense_derivatives():
    batch = bx.Batch(outer=2.0, inner=0.7)
    grad_y = jax.grad(inner_loss, 1)

    @jax.jit
    def both():
        d = bx.problem.directions(bx.BilevelProblem(outer_loss, inner_loss), X, Y, V, batch)
        dense = grad_y(X, Y, batch.inner), jax.jacobian(grad_y, (0, 1))(X, Y, batch.inner)
        return d, *dense, jax.grad(outer_loss, (0, 1))(X, Y, batch.outer)

    d, g_y, (jac_x, jac_y), (f_x, f_y) = jax.device_get(both())
    np.testing.assert_allclose(d.y, g_y, rtol=1e-14)
    np.testing.assert_allclose(d.v, jac_y @ V - f_y, rtol=1e-13)
    for leaf in X:
        np.testing.assert_allclose(d.x[leaf], f_x[leaf] - V @ jac_x[leaf], rtol=1e-13)


def test_directions_at_the_solution_are_the_hypergradient_and_zero():
    a, c = jnp.array([1.0, 4.0]), jnp.array([3.0, -1.0])
    problem = bx.BilevelProblem(lambda x, y, b: 0.5 * jnp.sum((y - c) ** 2), lambda x, y, b: 0.5 * a @ y**2 - x @ y)
    x = jnp.array([2.0, 8.0])
    y = x / a
    d = bx.problem.directions(problem, x, y, (y - c) / a, bx.Batch(None, None))
    np.testing.assert_allclose(d.x, (x / a - c) / a, rtol=1e-15)
    np.testing.assert_array_equal(d.y, 0)
    np.testing.assert_array_equal(d.v, 0)


def test_products_equal_dense_second_derivatives():
    @jax.jit
    def both():
        products = (curvature(inner_loss, X, Y, 0.7)(V) for curvature in (bx.curvature.hessian, bx.curvature.cross))
        return *products, jax.jacobian(jax.grad(inner_loss, 1), (0, 1))(X, Y, 0.7)

    product, cross, (jac_x, jac_y) = jax.device_get(both())
    np.testing.assert_allclose(product, jac_y @ V, rtol=1e-13)
    for leaf in X:
        np.testing.assert_allclose(cross[leaf], V @ jac_x[leaf], rtol=1e-13)


def test_damping_adds_a_multiple_of_the_vector():
    product = bx.curvature.hessian(inner_loss, X, Y, 0.7)
    np.testing.assert_allclose(bx.curvature.damped(product, 0.25)(V), product(V) + 0.25 * V, rtol=1e-14)


def test_hessian_takes_wider_vectors_than_y():
    y = jnp.array([0.5, 1.0], jnp.bfloat16)
    product = bx.curvature.hessian(lambda x, y, b: jnp.sum(y**2), 0.0, y, None)
    v = product(jnp.array([1.0, 3.0], jnp.float32))
    assert v.dtype == jnp.float32
    np.testing.assert_array_equal(v, [2.0, 6.0])

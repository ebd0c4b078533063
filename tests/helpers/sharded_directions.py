"""Random directions spread over the devices of this process, beside the same on one device; prints findings as JSON."""

import json

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import bilevax as bx

MATRIX = jax.random.normal(jax.random.key(0), (4, 5))
X, Y = {"a": jnp.linspace(-1, 1, 4), "b": jnp.array(0.2)}, jnp.ones(4)
BATCH = bx.Batch(None, jnp.linspace(0, 1, 12))
KEY = jax.random.key(1)


def inner_loss(x, y, batch):
    seen = jnp.tanh(jnp.concatenate([x["a"], x["b"][None]]))
    return 0.5 * jnp.sum((y - MATRIX @ seen) ** 2) + 0.1 * jnp.mean(jnp.cos(jnp.sum(y) + batch))


def outer_loss(x, y, batch):
    return jnp.sum(jnp.sin(y)) + jnp.sum(x["a"] ** 2)


def solve(x, y, batch):
    return jax.lax.fori_loop(0, 20, lambda t, y: y - 0.2 * jax.grad(inner_loss, 1)(x, y, batch), y)


def makers():
    """Hypergradients of the name of an axis, which is None on one device."""

    def forward(directions, **options):
        return lambda axis: bx.hypergradient(
            outer_loss,
            bx.inner.forward_gradient(
                inner_loss,
                optax.adam(0.1),
                6,
                directions=directions,
                sample=bx.sampling.minibatch(5),
                axis=axis,
                **options,
            ),
        )

    guide = bx.inner.guides.at_solution(bx.inner.implicit(inner_loss))
    sampler = bx.inner.random_directions
    return {
        "rademacher": forward(8),
        "orthogonal": forward(4, sampler=sampler.orthogonal),
        "hadamard, chunk": forward(8, sampler=sampler.hadamard, chunk=1),
        "guide, control variate": forward(5, guide=guide, control_variate=bx.inner.guides.running_mean(0.1)),
        "zeroth order": lambda axis: bx.hypergradient(
            outer_loss, bx.inner.zeroth_order(solve, directions=8, axis=axis)
        ),
    }


def off(got, expected):
    """The largest difference of gradients, y and reported errors."""

    def numbers(result):
        grad, state, info = result
        return jax.tree.leaves((grad, state.y, info.inner.detail.variance, info.inner.detail.relative_error))

    pairs = zip(numbers(got), numbers(expected), strict=True)
    return max(float(jnp.abs(jax.device_get(one) - jax.device_get(other)).max()) for one, other in pairs)


def refused(make, **options):
    mesh = Mesh(jax.devices(), ("devices",))
    everywhere = PartitionSpec()
    hypergrad = make("devices")
    shard = jax.shard_map(hypergrad.estimate, mesh=mesh, in_specs=everywhere, out_specs=everywhere, **options)
    try:
        shard(KEY, hypergrad.init(X, Y), X, BATCH)
    except ValueError as error:
        return str(error)
    return ""


def main():
    mesh, found = Mesh(jax.devices(), ("devices",)), {}
    for name, make in makers().items():
        one = make(None)
        state = one.init(X, Y, BATCH)
        expected = jax.jit(one.estimate)(KEY, state, X, BATCH)
        sharded = jax.jit(bx.parallel.shard_directions(make, mesh).estimate)(KEY, state, X, BATCH)
        found[name] = [off(sharded, expected)]
        if name == "rademacher":
            mapped = bx.parallel.pmap_directions(make, jax.devices()).estimate(KEY, state, X, BATCH)
            found[name].append(off(mapped, expected))
            grid = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
            x = jax.device_put(
                X, {"a": NamedSharding(grid, PartitionSpec("a")), "b": NamedSharding(grid, PartitionSpec())}
            )
            spread = jax.jit(bx.parallel.shard_directions(make, grid).estimate)(KEY, state, x, BATCH)
            found[name].append(off(spread, expected))
            lies = spread[0]["a"].sharding.is_equivalent_to(x["a"].sharding, 1)
    few = lambda axis: bx.hypergradient(outer_loss, bx.inner.zeroth_order(solve, directions=6, axis=axis))  # noqa: E731
    messages = {"checked": refused(makers()["rademacher"]), "few": refused(few, check_vma=False)}
    print(json.dumps({"devices": len(jax.devices()), "off": found, "lies": lies, "messages": messages}))


if __name__ == "__main__":
    main()

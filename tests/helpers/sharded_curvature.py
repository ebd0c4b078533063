"""KFAC with its parameters and examples spread over the devices of this process, beside the same on one device."""

import json

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bilevax as bx


def model(y, inputs):
    return jnp.tanh(inputs @ y["first"] + y["bias"][None]) @ y["last"]


def main():
    keys = jax.random.split(jax.random.key(0), 4)
    y = {"first": jax.random.normal(keys[0], (6, 8)), "bias": jnp.ones(8), "last": jax.random.normal(keys[1], (8, 4))}
    batch = (jax.random.normal(keys[2], (16, 6)), jax.random.randint(keys[3], (16,), 0, 4))
    loss = bx.curvature.ModelLoss(
        model, bx.curvature.softmax_cross_entropy, lambda x, batch: batch, lambda x, batch: x, l2=0.1
    )
    x = jnp.linspace(0.5, 1.5, 16)

    @jax.jit
    def solve(x, y, batch):
        apply, _ = bx.ihvp.ekfac().prepare(jax.random.key(1), (), loss, (x, y, batch))
        return apply(y)[0]

    mesh = Mesh(jax.devices(), ("devices",), axis_types=(AxisType.Auto,))

    def spread(tree, spec):
        return jax.device_put(tree, NamedSharding(mesh, spec))

    columns = {"first": spread(y["first"], P(None, "devices")), "bias": spread(y["bias"], P("devices"))}
    columns["last"] = spread(y["last"], P("devices", None))
    expected = solve(x, y, batch)
    got = solve(spread(x, P("devices")), columns, spread(batch, P("devices")))
    off = jax.tree.map(lambda a, b: float(jnp.abs(a - jax.device_get(b)).max() / jnp.abs(a).max()), expected, got)
    print(json.dumps({"devices": len(jax.devices()), "off": max(jax.tree.leaves(off))}))


if __name__ == "__main__":
    main()

"""Every IHVP, solver and estimator of the contracts on a problem that may be spread over a mesh with Explicit axes.

    rows      one axis: rows of the data are spread, x and y are whole on each device
    both      two axes: rows over the first, entries of x and columns of y over the second

As a program it runs some of them on eight devices and on one, and prints as JSON how far they are off:
`sharded_methods.py "both, Explicit" epochs reverse`, or `everywhere` for all layouts and kinds of axes.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bilevax as bx

sys.path.append(str(pathlib.Path(__file__).parent.parent / "testing"))  # where the lists are
from test_contracts import ESTIMATORS, IHVPS, SOLVERS

KEY = jax.random.key(0)
ROWS, INPUTS, OUTPUTS = 32, 4, 8
INNER_LOSS = bx.curvature.ModelLoss(
    lambda y, inputs: inputs @ y["w"] + y["b"][None],
    bx.curvature.squared_error,
    lambda x, batch: batch[:2],
    weights=lambda x, batch: batch[2],
    l2=lambda x: {"w": jnp.exp(x)[None] * jnp.ones((INPUTS, 1)), "b": jnp.exp(x)},
)
LAYOUTS = {  # axes of the mesh, and how x, y and the rows lie on it
    "rows": ((8,), P(), {"w": P(), "b": P()}, (P("a"), P("a"), P("a"))),
    "both": ((4, 2), P("b"), {"w": P(None, "b"), "b": P("b")}, (P("a"), P("a", "b"), P("a"))),
}


def outer_loss(x, y, batch):
    return INNER_LOSS(x - 9, y, batch) + 0.1 * jnp.sum(x**2) + jnp.sum(jnp.sin(y["b"]))


def contracting(x, y, batch):
    """Refused by JAX with Explicit axes, since it does not say how a sum over spread entries shall lie."""
    return INNER_LOSS(x, y, batch) + jnp.sin(jnp.vdot(y["b"], x))


def point():
    """x, y and the rows."""
    draw = np.random.default_rng(0).normal
    x, y = draw(size=OUTPUTS) / 3, {"w": draw(size=(INPUTS, OUTPUTS)) / 3, "b": draw(size=OUTPUTS) / 3}
    return x, y, (draw(size=(ROWS, INPUTS)), draw(size=(ROWS, OUTPUTS)), np.linspace(0.5, 1.5, ROWS))


def laid(layout, make_mesh, kind, put):
    """The point, each leaf put on the mesh."""
    axes, *specs = LAYOUTS[layout]
    mesh = make_mesh(axes, ("a", "b")[: len(axes)], axis_types=(kind,) * len(axes))
    return jax.tree.map(lambda leaf, spec: put(leaf, NamedSharding(mesh, spec)), point(), tuple(specs))


def placed(layout, kind):
    """The point on the devices of this process."""
    return laid(layout, jax.make_mesh, kind, jax.device_put)


def abstract(layout):
    """The types that the point has there with Explicit axes."""

    def typed(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return laid(layout, AbstractMesh, AxisType.Explicit, typed)


def implicit(make, number):
    sample = bx.sampling.minibatch(16)
    return bx.inner.implicit(INNER_LOSS, ihvp=make(number + 0.1, sample), cross_sample=sample)


def kept_factors(number, sample):
    return bx.ihvp.kfac(damping=number, ema=0.5, inverse_every=2, sample=sample)


def hypergradients():
    """Name -> estimator, with momentum where it may be, and batches of the spread rows."""
    problem, sample = bx.BilevelProblem(outer_loss, INNER_LOSS), bx.sampling.minibatch(16)
    plain, momentum = optax.sgd(0.2), optax.sgd(0.2, momentum=0.5)
    solvers = {f"ihvp {name}": implicit(make, number) for name, (make, number, _) in IHVPS.items()}
    solvers["ihvp kfac, kept"] = implicit(kept_factors, 0.0)
    for name, (make, _) in SOLVERS.items():
        solvers[name] = make(INNER_LOSS, plain if "implicit" in name else momentum, sample)
    solvers["epochs"] = bx.inner.reverse(INNER_LOSS, momentum, 4, sample=bx.sampling.epochs(12))
    solvers["contracting, implicit"] = bx.inner.implicit(contracting, plain, 4, ihvp=bx.ihvp.exact(), sample=sample)
    solvers["contracting, reverse"] = bx.inner.reverse(contracting, momentum, 4, sample=sample)
    found = {name: bx.hypergradient(outer_loss, solver) for name, solver in solvers.items()}
    return found | {name: make(problem, plain, sample) for name, (make, _) in ESTIMATORS.items()}


def estimate(hypergrad, x, y, rows):
    """The gradient and the state, and x and the state before."""
    batch = bx.Batch(rows, rows)
    state = hypergrad.init(x, y, batch)
    grad, after, _ = hypergrad.estimate(KEY, state, x, batch)
    return (grad, after), (x, state)


def main(place, *names):
    methods = hypergradients()

    @jax.jit
    def run(x, y, rows):
        """All in one program, for compiling is what takes the time."""
        results = {name: estimate(methods[name], x, y, rows)[0] for name in names}
        return {name: (grad, state.y) for name, (grad, state) in results.items()}

    def off(got, expected):
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
        return max(float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max()) for a, b in pairs)

    def lies(got, x, y):
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves((x, y)), strict=True)
        return all(one.sharding.is_equivalent_to(other.sharding, one.ndim) for one, other in pairs)

    expected, found = run(*point()), {}
    for layout in LAYOUTS:
        for kind in (AxisType.Explicit, AxisType.Auto):
            if place not in (where := f"{layout}, {kind.name}", "everywhere"):
                continue
            x, y, rows = placed(layout, kind)
            got = run(x, y, rows)
            found[where] = {name: [off(got[name], expected[name]), lies(got[name], x, y)] for name in names}
    print(json.dumps({"devices": len(jax.devices()), "found": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])

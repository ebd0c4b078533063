"""Problems, graphs and small steps that the tests of decentralized methods share."""

import jax
import jax.numpy as jnp
import networks
import numpy as np
from networks import lazy, numbers, ring, run, stacked

import bilevax as bx
from bilevax import decentralized
from bilevax.single_loop import correction
from bilevax.testing.problems import four_agents, quadratic
from bilevax.testing.problems._quadratic import PROBLEM

KEY = networks.KEY
STEPS = (0.01, 0.025, 0.025)
TOY_STEPS = (0.05, 0.1, 0.1)
DEFINITE, INDEFINITE = quadratic(0), quadratic(0, indefinite=2.5)
BOTH = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), DEFINITE.batch, INDEFINITE.batch)
W = lazy(ring(8))
LAZY_RING = bx.gossip(networks.topology(W))
TOY_RING = bx.gossip(networks.topology(ring(4)))
TOY_SLDBO = decentralized.sldbo(PROBLEM, TOY_RING, TOY_STEPS)
LAZY_SQUARE = bx.gossip(networks.topology(lazy(ring(4))))
ED, EXTRA, GT, ATC = correction.exact_diffusion, correction.extra, correction.tracking, correction.tracking_atc
X, Y, BATCH = jnp.zeros((4, 1)), jnp.zeros((4, 1)), four_agents().batch


def semi():
    return [networks.semi() for _ in range(3)]


def toy_run(method=TOY_SLDBO, batch=None):
    return numbers(run(method, batch or four_agents().batch, 60)[1:])


def at(tree, *index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def mean_dynamics(path, directions, steps, atol=1e-12):
    """Mean s⁺ = mean s − step · mean direction; with x⁺ = W(x − a t) this says mean t = mean d."""
    for level, d, a in zip(path, directions, steps, strict=True):
        got = -np.diff(level[: len(d) + 1].mean(1), axis=0) / a
        np.testing.assert_allclose(got, d.mean(1), rtol=0, atol=atol)


def all_directions(q, path, iterations):
    return stacked([networks.directions(q, [level[k] for level in path]) for k in range(iterations)])


WITHOUT_V = ("mdbo", "vrdbo", "gbdsbo", "interact", "interact_svr", "diamond")


def steps_of(preset, steps):
    """Of these steps those that a preset takes: of x and y alone, if it has no v."""
    return steps[:2] if preset.__name__ in WITHOUT_V else steps


def make(preset, **options):
    return lambda problem, gossip: preset(problem, gossip, steps_of(preset, STEPS), **options)

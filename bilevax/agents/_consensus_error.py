"""How far apart agents are."""

import functools

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.agents._gossip import Gossip
from bilevax.problem import widen
from bilevax.typing import Array, PyTree


def consensus_error(gossip: Gossip, tree: PyTree) -> Array:
    """How far the agents' variables are from their mean, which is what one takes home.

        √(mean_i ‖s_i − s̄‖²),      s̄ = gossip.mean(s)

    It says whether s̄ speaks for all of them: beside the distance that s̄ has moved it should be small. Over a directed
    graph, pass what the agents have, such as `state.x`, and not the sums that push-sum mixes.

    Args:
      gossip: of n agents.
      tree: a pytree of floating-point arrays, leaves [n, ...], or [n/devices, ...] on each of several devices.

    Returns:
      A scalar in at least float32, the same on every device; its gradient is 0 where all agents agree.

    Raises:
      ValueError: if there is no leaf, one is not of floating-point numbers, or one lacks the agents' axis.

    Cost: two means over the agents, which no neighbour-to-neighbour message pays for: it is for judging a run, not for
    a method.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> gossip, x = bx.gossip(bx.topology.ring(4)), jnp.array([1.0, 3.0, 1.0, 3.0])
        >>> float(gossip.mean(x)), float(bx.agents.consensus_error(gossip, x))
        (2.0, 1.0)
    """
    checks.instance("gossip", gossip, Gossip, "Pass, say, bx.gossip(bx.topology.ring(8)).")
    checks.floating("tree", tree)
    checks.agents_axis("tree", tree, gossip.agents().size, "Pass leaves of all agents, such as state.x.")
    wide = widen(tree)
    away = jax.tree.map(lambda leaf, mean: leaf - mean[None], wide, gossip.mean(wide))
    square = gossip.mean(jax.vmap(functools.partial(optax.tree.norm, squared=True))(away))
    agree = square == 0
    return jnp.where(agree, 0, jnp.sqrt(jnp.where(agree, 1, square)))

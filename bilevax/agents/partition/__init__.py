"""Partitions of data sets over agents, drawn before training: who holds which rows.

A partition is a function of the labels [N] of one or more data sets. It returns, for each set, a list of n index arrays
that hold every row once. All sets given in one call share one draw, so that the classes of an agent come in the same
proportions in its training and in its validation data:

    train, validation = dirichlet(n=8, alpha=0.1, seed=0)(train_labels, validation_labels)
    (images, labels), weights = stack((train_images, train_labels), train)

The loss of an agent is then jnp.mean(weights * losses), over all of its rows or over a uniform minibatch of them.
"""

from bilevax.agents.partition._stack import local, pooled, stack
from bilevax.agents.partition.deal import classes_per_agent, dirichlet, dirichlet_balanced, iid, quantity_skew, shards

__all__ = [
    "classes_per_agent",
    "dirichlet",
    "dirichlet_balanced",
    "iid",
    "local",
    "pooled",
    "quantity_skew",
    "shards",
    "stack",
]


def __dir__() -> list[str]:
    return __all__

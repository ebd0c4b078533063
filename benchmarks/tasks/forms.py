"""How x makes the weights of examples, and how it moves: scores under a sigmoid, or the weights themselves.

Reference: Liao, Dangel, Yu, arXiv 2603.29108, whose code learns weights in [0, 1] by projected steps.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax.typing import Array, PyTree

CERTAIN = 30.0  # sigmoid(±30) is 1 or 0 in float32
MOMENTUM = 0.9


class Form(NamedTuple):
    """How weights are written, and how they are learnt.

    Attributes:
      weights: x -> weights.
      start: weights in [0, 1] -> x.
      l2: weight decay in g.
      optimizer: moves x.
      named: the optimizer, for the JSON files.
      label: of the axis of x in a plot.
    """

    weights: Callable[[Array], Array]
    start: Callable[[Array], Array]
    l2: float
    optimizer: optax.GradientTransformation
    named: Mapping[str, Any]
    label: str


def scores(l2: float, learning_rate: float) -> Form:
    """Weights are sigmoids of x, which Adam moves."""
    return Form(
        jax.nn.sigmoid,
        lambda weights: jnp.clip(jax.scipy.special.logit(weights), -CERTAIN, CERTAIN),
        l2,
        optax.adam(learning_rate),
        {"adam": {"learning_rate": learning_rate}},
        "outer variable x (weight = sigmoid x)",
    )


def projected(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Steps that end in [0, 1]; the optimizer knows of no bounds."""

    def update(grads: PyTree, state: Any, x: PyTree) -> tuple[PyTree, Any]:
        updates, state = optimizer.update(grads, state, x)
        moved = optax.projections.projection_box(optax.apply_updates(x, updates), 0.0, 1.0)
        return optax.tree.sub(moved, x), state

    return optax.GradientTransformation(optimizer.init, update)


def published(learning_rate: float) -> Form:
    """Weights are x itself, which SGD with momentum moves within [0, 1]; there is no weight decay."""
    return Form(
        lambda x: x,
        lambda weights: weights,
        0.0,
        projected(optax.sgd(learning_rate, MOMENTUM)),
        {"projected_sgd": {"learning_rate": learning_rate, "momentum": MOMENTUM}},
        "outer variable x (the weight)",
    )

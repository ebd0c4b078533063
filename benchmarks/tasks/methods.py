"""From what the methods of a task share, and how each differentiates, to the rows of its table."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

import bilevax as bx
from benchmarks.harness.loop import Carry
from benchmarks.harness.plugin import finished
from benchmarks.harness.runner import Method
from benchmarks.networks.model import Model
from bilevax.typing import Array, Key, PyTree


class Shared(NamedTuple):
    """What the methods of a task on images have in common.

    Attributes:
      outer_loss: f.
      optimizer: moves x.
      start: `start(data) -> (x, y)`, the first point.
      evaluate: `evaluate(data, carry)`, more numbers for the table.
      configuration: for the JSON files.
      batch: `batch(data)`, what is trained and validated on.
      around: makes of the hypergradient what an outer step takes.
    """

    outer_loss: Callable[..., Array]
    optimizer: optax.GradientTransformation
    start: Callable[[Any], tuple[PyTree, PyTree]]
    evaluate: Callable[[Any, Carry], dict[str, float | None]]
    configuration: Mapping[str, Any]
    batch: Callable[[Any], Any] = lambda data: data.batch
    around: Callable[[bx.problem.Hypergradient], bx.problem.Hypergradient] = lambda hypergradient: hypergradient

    def fixed(self, **changes: Any) -> "Shared":
        """The same for anchors, whose x stays what it is at first."""
        chosen = {**self.configuration, "outer_optimizer": None}
        return self._replace(optimizer=optax.set_to_zero(), configuration=chosen, **changes)

    def method(
        self, name: str, solver: Callable[..., bx.problem.InnerSolver], inner: Any, settings: Mapping[str, Any]
    ) -> Method:
        """The row whose inner solver is `solver(inner, **settings)`."""
        return Method(
            name=name,
            hypergradient=lambda: self.around(finished(self.outer_loss, solver(inner, **settings))),
            optimizer=self.optimizer,
            start=self.start,
            batch=self.batch,
            evaluate=self.evaluate,
            configuration={**self.configuration, "settings": named(settings)},
        )


def draw_outer(hypergradient: bx.problem.Hypergradient, size: int) -> bx.problem.Hypergradient:
    """The hypergradient with a minibatch of the outer data in each outer step."""
    draw = bx.sampling.minibatch(size)

    def estimate(key: Key | None, state: Any, x: PyTree, batch: bx.Batch) -> tuple:
        outer_key, key = bx.sampling.split(key, 2)
        return hypergradient.estimate(key, state, x, batch._replace(outer=draw(outer_key, 0, batch.outer)))

    return bx.problem.Hypergradient(hypergradient.init, estimate)


def first_weights(model: Model, data: Any) -> PyTree:
    """The first y of a seed."""
    return model.init(jax.random.key(data.seed), data.batch.inner[0].shape[1])


def named(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the names of functions in their place, for the JSON files."""
    return {key: getattr(value, "__name__", value) for key, value in settings.items()}

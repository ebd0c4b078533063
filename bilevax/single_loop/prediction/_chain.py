"""Two predictions, one after the other."""

from typing import Any

from bilevax import checks
from bilevax.printing import as_called
from bilevax.problem import Batch, BilevelProblem
from bilevax.single_loop._levels import Levels
from bilevax.single_loop.prediction.prediction_type import Prediction, added
from bilevax.typing import PyTree


@as_called
def chain(first: Prediction, last: Prediction) -> Prediction:
    """The sum of two predictions; the last one learns what the first leaves.

        change = change_first + change_last          update_last(…, change − change_first)

    Of three, chain two, and what is made of them with the third.

    Args:
      first: a `Prediction`, which is told the whole change.
      last: the same; it is told what is left of it by the first, with what that has just learnt.

    Returns:
      `Prediction` whose memory is a pair of theirs.

    Raises:
      ValueError: if one of them is no `Prediction`.

    Cost: theirs, and one `change` of the first for each refresh.

    Example:
        >>> import bilevax as bx
        >>> bx.single_loop.prediction.chain(bx.single_loop.prediction.data_free(), bx.single_loop.prediction.secants(4))
        chain(data_free(), secants(4))
    """
    for name, value in (("first", first), ("last", last)):
        checks.instance(name, value, Prediction, "Pass, say, bx.single_loop.prediction.data_free().")

    def init(problem: BilevelProblem, point: Levels[PyTree], d: Levels[PyTree], batch: Batch) -> Any:
        return first.init(problem, point, d, batch), last.init(problem, point, d, batch)

    def update(
        memory: Any,
        problem: BilevelProblem,
        start: Levels[PyTree],
        end: Levels[PyTree],
        change: Levels[PyTree],
        batch: Batch,
    ) -> Any:
        known = first.update(memory[0], problem, start, end, change, batch)
        rest = added(change, first.change(known, problem, start, end, batch), sign=-1)
        return known, last.update(memory[1], problem, start, end, rest, batch)

    def change(
        memory: Any, problem: BilevelProblem, start: Levels[PyTree], end: Levels[PyTree], batch: Batch
    ) -> Levels[PyTree]:
        one, other = (
            part.change(known, problem, start, end, batch) for part, known in zip((first, last), memory, strict=True)
        )
        both = added(one, other)
        return Levels(*(by if total is None else total for total, by in zip(both, other, strict=True)))

    return Prediction(init, update, change)

"""The runs of a task as its claims read them: steps are chosen for each target on some seeds, and judged on others."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.decentralized.levels import Choice, Curve, Level, Spent, Try, best, choose, find, spent_until
from benchmarks.decentralized.records import Results

BASE = "sldbo"
Tries = Mapping[int, Sequence[Try]]  # seed -> tries


class Measured(NamedTuple):
    """The runs of one task on one graph.

    Attributes:
      tuning: method -> seed -> the tries of the whole grid, in one order.
      judged: method -> seed -> the tries that were chosen.
      base: SLDBO's best try on the tuning seeds, whose end sets the targets of F; None without it.
    """

    tuning: Mapping[str, Tries]
    judged: Mapping[str, Tries]
    base: Try | None

    @property
    def methods(self) -> tuple[str, ...]:
        """That were tuned and judged."""
        return tuple(method for method in self.tuning if method in self.judged)

    def bases(self, tries: Mapping[str, Tries]) -> dict[int, Curve]:
        """SLDBO's curves with that choice, of the seeds that have it."""
        like = self.base
        if like is None:
            return {}
        found = {seed: find(seed_tries, like) for seed, seed_tries in tries.get(BASE, {}).items()}
        return {seed: one.curve for seed, one in found.items() if one is not None}

    def targets(self, tries: Mapping[str, Tries], level: Level) -> dict[int, float]:
        """The target on each seed that has one."""
        values = {seed: level.target(curve) for seed, curve in self.bases(tries).items()}
        return {seed: value for seed, value in values.items() if not math.isnan(value)}

    def chosen(self, method: str, level: Level, cost: str) -> tuple[Try, Choice] | None:
        """The try of a method for a target, and how it was chosen; None without runs, or a target on all seeds."""
        targets, tries = self.targets(self.tuning, level), self.tuning.get(method, {})
        grids = [tries[seed] for seed in sorted(tries)]
        if not grids or not grids[0] or not set(tries) <= set(targets):
            return None
        choice = choose(grids, level.metric, cost, [targets[seed] for seed in sorted(tries)])
        return grids[0][choice.place], choice

    def spent(
        self, method: str, level: Level, cost: str, like: Try | None = None, by: str | None = None
    ) -> dict[int, Spent]:
        """What a method spends on each judged seed until it is at a level.

        Args:
          method: of the rows.
          level: to reach.
          cost: that is counted.
          like: the steps; by default those that are chosen for this level.
          by: the cost that they are chosen by, where it is another one.

        Returns:
          The costs of the seeds that have a target and a run with these steps.
        """
        if like is None:
            if (choice := self.chosen(method, level, by or cost)) is None:
                return {}
            like = choice[0]
        targets = self.targets(self.judged, level)
        runs = {seed: find(tries, like) for seed, tries in self.judged.get(method, {}).items() if seed in targets}
        return {
            seed: spent_until(run.curve, cost, level.metric, targets[seed])
            for seed, run in sorted(runs.items())
            if run is not None
        }


def measured(results: Results, job: str) -> Measured:
    """The runs of a job."""
    tuning: dict[str, dict[int, Sequence[Try]]] = {}
    judged: dict[str, dict[int, Sequence[Try]]] = {}
    for record in results.get(job, ()):
        side = judged if record.judged else tuning
        side.setdefault(record.method, {})[record.seed] = record.attempts
    seeds = [*tuning.get(BASE, {}).values()]
    return Measured(tuning, judged, seeds[0][best(seeds)] if seeds and seeds[0] else None)


def pairs(one: Mapping[int, Spent], two: Mapping[int, Spent]) -> list[tuple[Spent, Spent]]:
    """Of the seeds that both have, in order."""
    return [(one[seed], two[seed]) for seed in sorted(set(one) & set(two))]

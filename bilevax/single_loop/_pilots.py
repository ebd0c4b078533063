"""Short runs of a method that tell which step sizes it bears, one after the other, in one loop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax.agents._gossip import Gossip
from bilevax.problem import Algorithm, Batch, BilevelProblem
from bilevax.single_loop._averaging import Average
from bilevax.single_loop._curvatures import Spent
from bilevax.single_loop._levels import Levels
from bilevax.typing import Array, Key

WARM_UP, PILOT, CONFIRMATION, END = range(4)  # the phases
LENGTHS = WARM, LENGTH, CONFIRMED = 10, 5, 15  # ∇f of each agent in each of them, at least
READ = max(LENGTHS)  # of more ∇f the last ones are read
LATE = 5  # last of a run of a warm-up, in which losses are judged
ROUNDING = 1e-2  # part of g that is no swing
GROWTH = 2.0  # of the moves of y and v in a warm-up, at most
LONGEST = 100.0  # iterations for each ∇f of an agent, at most
SHORTER = 4.0  # what the step of x is divided by after a pilot that fails
LESS = 2.0  # a warm-up goes on where its later half divides the step of x by more
LONGER = 64  # times WARM it goes on at most
SHARE = 4  # into so many parts a longer warm-up is divided: the confirmation has the length of one

MakeAlgorithm = Callable[[Levels[Any]], Algorithm]
Run = Callable[[Levels[Array], Any, Array, Spent], tuple[Any, Array, Spent]]
Read = Callable[[Array, Spent], tuple[Array, Spent]]
FirstStep = Callable[[Any, Array, Array, Spent], tuple[Array, Spent]]


def runner(make: MakeAlgorithm, problem: BilevelProblem, gossip: Gossip, key: Key, batch: Batch) -> Run:
    """`run(steps, state, length, spent) -> (state, seen [1 + READ, 4, n], spent)`, the same draws in each.

    Its length is told in ∇f of an agent, at most one in each iteration, and traced: a program holds one copy of the
    method's step. Seen are each agent's f, g, and moves of y and v at the start and after each ∇f, of the last READ;
    after the end the last ones again.
    """

    def look(state: Any, moves: Array) -> Array:
        pair = (jax.vmap(loss)(state.x, state.y, data) for loss, data in zip(problem, batch, strict=True))
        return jnp.stack([*(jnp.asarray(each, float) for each in pair), *moves])

    def run(steps: Levels[Array], state: Any, length: Array, spent: Spent) -> tuple[Any, Array, Spent]:
        begun, still = spent, jnp.zeros((2, *gossip.agents().shape))

        def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            state, spent, _ = carry
            state, info = make(paced(steps, spent)).step(key, state, batch)
            moves = jnp.stack([jnp.asarray(part, float) for part in info.moves[1:]])
            return state, spent.with_iteration(info, gossip), moves

        def part(number: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:  # of number 0 there is the look alone
            enough, most = begun.refreshes + number, begun.iterations + LONGEST * number

            def goes_on(carry: tuple[Any, ...]) -> Array:
                return (carry[1].refreshes < enough) & (carry[1].iterations < most)

            state, spent, moves, seen = carry
            state, spent, moves = jax.lax.while_loop(goes_on, step, (state, spent, moves))
            place = jnp.maximum(number - early, 0)
            return state, spent, moves, seen.at[place].set(look(state, moves))

        early, nothing = jnp.maximum(length - READ, 0), jnp.zeros((1 + READ, 4, *gossip.agents().shape))
        end, spent, _, seen = jax.lax.fori_loop(0, length + 1, part, (state, spent, still, nothing))
        later = jnp.arange(len(seen)) > length
        return end, jnp.where(later[:, None, None], seen[jnp.minimum(length, READ)], seen), spent

    return run


def reader(gossip: Gossip, fine: Average, key: Key) -> Read:
    """`read(seen [length + 1, 4, n], spent) -> (means [4, length + 1], spent)`."""

    def read(seen: Array, spent: Spent) -> tuple[Array, Spent]:
        means, size = fine.apply(key, jnp.transpose(seen, (2, 1, 0)))
        return gossip.mean(means), spent.sent(size, fine.rounds)

    return read


def paced(steps: Levels[Array], spent: Spent) -> Levels[Array]:
    """Where agents skip, shorter steps."""
    return Levels(*(spent.pace() * step for step in steps))


def risen(read: Array) -> Array:
    """What a loss rises along a run."""
    return jnp.maximum(jnp.diff(read), 0).sum()


def steady(read: Array, begun: Array) -> Array:
    """Whether a loss, which began at a value, does not swing: what its changes change by is less than they are.

    It may rise: where agents come closer, each gives up what suited itself.
    """
    changes = jnp.diff(read, append=read[-1:])  # it could stand still afterwards
    return jnp.abs(jnp.diff(changes)).sum() <= jnp.abs(changes).sum() + ROUNDING * jnp.abs(begun)


def falls(read: Array, before: Array, since: int) -> Array:
    """Whether a loss stays finite along a run, and from one of its readings on at or below a level."""
    return jnp.isfinite(read).all() & (read[since:].max() <= before)


class Search(NamedTuple):
    """The next run, with what steps and state it begins, and what was found so far.

    Attributes:
      phase: of the next run.
      warm_ups: those that failed one after the other.
      warmed: ∇f of each agent in this warm-up so far.
      moved: what y and v moved together after its first ∇f.
      begun: g at its start.
      said: the step of x that `first` says where it is now.
      pilots: all of them so far.
      steps, state: that it begins with; at the end, those of the last run.
      warm: the state after the warm-up.
      part: of the first step of x that `first` says, that is taken after the next warm-up.
      most_x: the largest step of x that may be: one that failed, or half of it.
      usual: what f rises at the end of the warm-up, where x stays.
      tried: the steps of each pilot [pilots].
      scores: how each ended [pilots].
      good: whether the last run was.
      spent: so far.
    """

    phase: Array
    warm_ups: Array
    warmed: Array
    moved: Array
    begun: Array
    said: Array
    pilots: Array
    steps: Levels[Array]
    state: Any
    warm: Any
    part: Array
    most_x: Array
    usual: Array
    tried: Levels[Array]
    scores: Array
    good: Array
    spent: Spent

    def turn_to(self, phase: int | Array, state: Any) -> "Search":
        """With a run of a phase next, from a state."""
        return self._replace(phase=jnp.full_like(self.phase, phase), state=state)


def search(
    run: Run,
    read: Read,
    first: FirstStep,
    start: Any,
    steps: Levels[Array],
    most: int,
    spent: Spent,
    warm_up: int,
) -> Search:
    """Runs one after the other: each says what the next one is.

    A warm-up begins with two runs of half its least length, and goes on, each time as long again, until it is as long
    as is asked for, and then while y and v converge so slowly that the step of x that `first` says became much shorter
    in its later half. Where it went on, that step is divided once more by what this half has divided it by.
    """
    zero, longest = jnp.zeros((), jnp.int32), max(warm_up, LONGER * WARM)

    def lengths(now: Search) -> Array:
        """Of the next run, in ∇f of an agent, in each phase."""
        return jnp.stack([jnp.maximum(now.warmed, WARM // 2), LENGTH, jnp.maximum(now.warmed // SHARE, CONFIRMED)])

    def anew(now: Search, x: float) -> Search:
        """From the start, with half the steps of y and v, to which that of x is in proportion, and x times that of x.

        It is found again after the warm-up, whose end is another one now, but does not grow over `most_x`.

        Not from the warm state, since memories of y and v may belong to the steps they had.
        """
        _, y, v = now.steps
        now = now._replace(warm_ups=jnp.zeros_like(now.warm_ups), warmed=zero, part=now.part * x)
        return now.turn_to(WARM_UP, start)._replace(steps=Levels(jnp.zeros_like(y), y / 2, v / 2))

    def shorter(now: Search) -> Search:
        """From the end of the warm-up, with a shorter step of x."""
        return now.turn_to(PILOT, now.warm)._replace(steps=now.steps._replace(x=now.steps.x / SHORTER))

    def after_warm_up(now: Search, end: Any, seen: Array) -> Search:
        outer, inner, *moves = seen
        early, length, before = now.warmed == 0, lengths(now)[WARM_UP], now.said
        late = jnp.minimum(length, READ) - jnp.arange(LATE + 1)[::-1]
        said, spent = first(end, now.steps.y, outer[-1], now.spent)
        now = now._replace(
            warmed=now.warmed + length,
            moved=jnp.where(early, moves[0][1] + moves[1][1], now.moved),
            begun=jnp.where(early, inner[0], now.begun),
            said=said,
            spent=spent,
        )
        calm = moves[0][-1] + moves[1][-1] <= GROWTH * now.moved
        good = jnp.isfinite(seen[:2]).all() & (early | (steady(inner[late], now.begun) & calm))
        slowly = (LESS * said < before) & (2 * now.warmed <= longest)
        goes_on = good & (early | (now.warmed < warm_up) | slowly)

        extrapolates = good & (now.warmed > WARM)
        x = jnp.where(extrapolates, jnp.minimum(said / before, 1.0), 1.0) * said
        x = jnp.minimum(now.part * x, now.most_x)
        pilot = now.turn_to(jnp.where(jnp.isfinite(x) & (x > 0), PILOT, END), end)
        pilot = pilot._replace(steps=now.steps._replace(x=x), usual=risen(outer[late]), warm=end)
        again = anew(now, 1.0)._replace(warm_ups=now.warm_ups + 1)
        to_pilots = good | (now.warm_ups + 1 >= most)
        return chosen(goes_on, now.turn_to(WARM_UP, end), chosen(to_pilots, pilot, again))

    def after_pilot(now: Search, end: Any, seen: Array) -> Search:
        outer, place = seen[0], now.pilots
        good = falls(outer, outer[0] + 2 * now.usual, 1 + LENGTH // 2)
        now = now._replace(
            pilots=place + 1,
            tried=jax.tree.map(lambda all, one: all.at[place].set(one), now.tried, paced(now.steps, now.spent)),
            scores=now.scores.at[place].set(jnp.where(good, outer[-1], jnp.inf)),
            good=good,
        )
        slower = anew(now._replace(most_x=now.steps.x), 2.0)
        other = chosen(place + 1 >= most, now.turn_to(END, end), chosen(place > 0, shorter(now), slower))
        return chosen(good, now.turn_to(CONFIRMATION, end), other)

    def after_confirmation(now: Search, end: Any, seen: Array) -> Search:
        outer, half = seen[0], 1 + CONFIRMED // 2
        now = now._replace(good=falls(outer, outer[:half].max() + 2 * now.usual, half))
        other = chosen(now.warmed > WARM, shorter(now), anew(now._replace(most_x=now.steps.x / 2), 1.0))
        return chosen(now.good | (now.pilots >= most), now.turn_to(END, end), other)

    def turn(now: Search) -> Search:
        end, seen, spent = run(now.steps, now.state, lengths(now)[now.phase], now.spent)
        means, spent = read(seen, spent)
        after = after_warm_up, after_pilot, after_confirmation
        return jax.lax.switch(now.phase, after, now._replace(spent=spent), end, means)

    no, none = jnp.zeros((), bool), jnp.full(most, jnp.nan, steps.x.dtype)
    part, most_x, unknown = (jnp.full_like(none[0], number) for number in (1.0, jnp.inf, 0.0))
    runs = (zero, zero, zero, unknown, unknown, unknown, zero, steps, start, start, part, most_x, unknown)
    begun = Search(*runs, Levels(none, none, none), none, no, spent)
    return jax.lax.while_loop(lambda now: now.phase < END, turn, begun)


def chosen(first: Array, one: Any, other: Any) -> Any:
    """One tree or another of its form."""
    return jax.tree.map(lambda a, b: jnp.where(first, a, b), one, other)

"""What every decentralized method keeps, whatever it computes.

All contracts are checked on one problem (`problems.countable`) with four agents, and on one compiled program: ten steps
of it are kept, and read by one contract after the other.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevax import checks
from bilevax.agents._gossip import Gossip, Topologies
from bilevax.problem import Algorithm, Batch, BilevelProblem
from bilevax.sampling import Sample, minibatch
from bilevax.single_loop._levels import Levels
from bilevax.single_loop.step_sizes import StepSize
from bilevax.testing._contract import Contract, contract, hold_all, name_of
from bilevax.testing.compiled import READABLE, executed_dots, products
from bilevax.testing.placement import LAZY_RING, N, equal, of_four_agents, on_one_device, on_two_parts
from bilevax.testing.problems._countable import CROSS, ENTRIES_OF_Y, INNER, OUTER, countable
from bilevax.testing.trees import WHAT_IS_WRITTEN, WHAT_THEY_FIND, finite, same_form, strictly, truth, writable
from bilevax.typing import Array, Key, PyTree

__all__ = [
    "CONTRACTS",
    "AlgorithmSubject",
    "calls_are_those_declared",
    "calls_are_those_of_the_compiled_program",
    "check_algorithm",
    "debuggers_find_nothing",
    "every_agent_moves",
    "nan_is_reported_by_the_agent_that_has_it",
    "placement_changes_nothing",
    "scan_equals_a_loop",
    "somebody_evaluates",
    "state_is_made_of_arrays",
    "state_keeps_its_form",
    "ten_steps_are_one_trace",
    "vmap_over_keys_equals_a_loop",
]


def __dir__() -> list[str]:
    return __all__


class MakeAlgorithm(Protocol):
    """A method over whatever it is given, a function of yours."""

    def __call__(
        self, problem: BilevelProblem, gossip: Gossip, step_sizes: Levels[StepSize], /, *, sample: Sample
    ) -> Algorithm: ...


Declared = Sequence[float] | Callable[[int], Sequence[float]]  # calls, or a function of the number of entries of y

ARGUMENTS = ("problem", "gossip", "step_sizes")
KEY = jax.random.key(0)
ITERATIONS, PLACED = 10, 3
STEPS = Levels(0.02, 0.05, optax.constant_schedule(0.05))


@dataclasses.dataclass(frozen=True, eq=False)
class AlgorithmSubject:
    """A method, on the problem on which its contracts are checked; what has been compiled is kept.

    Attributes:
      make: `make(problem, gossip, step_sizes, sample=...) -> Algorithm`.
      calls: declared evaluations of ∇f and ∇_y g, Hessian and cross products of an agent in an iteration, the mean of
        the first ten; or a function of the number of entries of y that returns them; None where they are random.
      topology: the graph or graphs of the four agents.
      counted: the products of the compiled program are those that run for `calls`; False where they are not, as with
        a `jax.lax.cond`, every branch of which counts.

    Example:
        >>> import bilevax as bx
        >>> from bilevax import testing
        >>> make = lambda problem, gossip, steps, sample: bx.decentralized.dsoba(problem, gossip, steps, sample=sample)
        >>> testing.AlgorithmSubject(make, calls=(1, 1, 1, 1)).gossip.n
        4
    """

    make: MakeAlgorithm
    calls: Declared | None = None
    topology: Topologies = LAZY_RING
    counted: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError unless make can be called, calls are four numbers, and graphs have four agents."""
        checks.function("make", self.make, *ARGUMENTS, keywords=("sample",))
        of_four_agents(self.topology)
        if self.calls is not None and np.shape(self.declared) != (4,):
            raise ValueError(
                f"calls must be four numbers, of ∇f, ∇_y g, Hessian and cross products, or a function that returns "
                f"them; got {self.declared!r:.80}. Pass, say, calls=(1, 1, 1, 1)."
            )

    @property
    def gossip(self) -> Gossip:
        """On one device; of directed graphs, push-sum."""
        return on_one_device(self.topology)

    @property
    def declared(self) -> Sequence[float]:
        """`calls` in numbers; none where they are random."""
        calls = self.calls(ENTRIES_OF_Y) if callable(self.calls) else self.calls
        return () if calls is None else calls

    @functools.cached_property
    def point(self) -> tuple[PyTree, PyTree, Batch]:
        """x, y and the batch."""
        return countable(N)[1:]

    def method(self, gossip: Gossip) -> Algorithm:
        """The method over some gossip."""
        method = self.make(countable(N)[0], gossip, STEPS, sample=minibatch(1))
        checks.instance(f"make({', '.join(ARGUMENTS)}, sample=)", method, Algorithm, "Return Algorithm(init, step).")
        return method

    def made(self) -> Algorithm:
        """The method on one device, made to see whether make is what is meant.

        Raises:
          ValueError: if it raises with these arguments, or returns no Algorithm.
        """
        try:
            return self.method(self.gossip)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"make must be a function ({', '.join(ARGUMENTS)}, sample=) -> Algorithm; got {name_of(self.make)}, "
                f"which says: {error} Where it takes other arguments, wrap it: "
                f"lambda {', '.join(ARGUMENTS)}, sample: my_method(problem, gossip, step_sizes)."
            ) from error

    @functools.cached_property
    def step(self) -> tuple[Any, list[None]]:
        """(the jitted step, a list that grows with its traces)."""
        method = self.method(self.gossip)
        traces: list[None] = []

        def step(*arguments: Any) -> tuple[Any, Any]:
            traces.append(None)
            return method.step(*arguments)

        return jax.jit(step), traces

    @functools.cached_property
    def history(self) -> tuple[Any, list[Any], list[Any]]:
        """(start, the states and the infos of ten steps) from the compiled step, in a loop."""
        *point, batch = self.point
        state = start = jax.jit(self.method(self.gossip).init)(*point, batch)
        step, states, infos = self.step[0], [], []
        for key in _keys():
            state, info = step(key, state, batch)
            states.append(state)
            infos.append(info)
        return start, states, infos

    @functools.cached_property
    def executed(self) -> tuple[float, float, float]:
        """∇f, passes through ∇_y g and cross products of an agent in the compiled step."""
        start, _, _ = self.history
        text = self.step[0].lower(KEY, start, self.point[-1]).compile().as_text()
        dots = executed_dots(text)
        outer, inner, cross = (products(dots, *sizes) / N for sizes in (OUTER, INNER, CROSS))
        return outer, inner, cross


def _keys() -> Array:
    """One for each iteration."""
    return jax.random.split(KEY, ITERATIONS)


def _stacked(trees: list[Any]) -> Any:
    """Trees of arrays as one tree with a leading axis, by numpy."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


@contract(
    "Return from step what init returns: the same NamedTuple, shapes and dtypes, agents first in every leaf but "
    "counters. Cast what mixes dtypes back with .astype(leaf.dtype), and start counters as jnp.zeros((), jnp.int32). "
    "Info has moves, breakdown, calls and bytes [n]; zeros are jnp.zeros(n). What init and step get has all agents, "
    "leaves [n, ...]: jax.vmap what is meant for one."
)
def state_keeps_its_form(subject: AlgorithmSubject) -> None:
    """By tracing alone, for x in half precision and y in double and single."""
    method, (x, y, batch) = subject.method(subject.gossip), subject.point
    x = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), x)
    state = jax.eval_shape(method.init, x, y, batch)
    new, info = jax.eval_shape(method.step, jax.eval_shape(lambda: jax.random.key(0)), state, batch)
    same_form("the state after a step", new, "the state of init", state, weak=True)
    same_form("x", new.x, "the x that init got", x)
    same_form("y", new.y, "the y that init got", y)
    odd = [leaf.shape for leaf in jax.tree.leaves((state, info)) if leaf.ndim and leaf.shape[0] != N]
    truth(not odd, f"leaves {odd} of {N} agents")
    shapes = {leaf.shape for leaf in jax.tree.leaves(info._replace(rounds=()))}
    truth(shapes == {(N,)}, f"info has shapes {shapes} in place of {(N,)}")
    truth(new.k.shape == (), "the counter state.k is no scalar")


@contract(WHAT_THEY_FIND)
def debuggers_find_nothing(subject: AlgorithmSubject) -> None:
    """One trace with strict promotion and a search for leaks, in one dtype; and all numbers of ten steps are finite."""
    method, (x, y, batch) = subject.method(subject.gossip), subject.point
    y = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, float)), y)
    state = jax.eval_shape(method.init, x, y, batch)
    with strictly():
        jax.eval_shape(method.step, jax.eval_shape(lambda: jax.random.key(0)), state, batch)
    _, states, infos = subject.history
    finite("state", states[-1])
    finite("info", infos[-1])


@contract(WHAT_IS_WRITTEN)
def state_is_made_of_arrays(subject: AlgorithmSubject) -> None:
    """So that every library can write and read it, as far as it can write x and y."""
    start, states, _ = subject.history
    writable("state", start)
    writable("state", states[-1])


@contract("Let nothing in step depend on Python numbers that change, and return no weakly typed leaves.")
def ten_steps_are_one_trace(subject: AlgorithmSubject) -> None:
    """Whatever the iteration, and `state.k` counts it."""
    _, states, _ = subject.history
    traces = len(subject.step[1])
    truth(traces == 1, f"{traces} traces of step in ten calls")
    truth(int(states[-1].k) == ITERATIONS, f"state.k is {int(states[-1].k)} after {ITERATIONS} steps")


@contract("Look for a level that is never updated, a zero direction, or a step size that is not used.")
def every_agent_moves(subject: AlgorithmSubject) -> None:
    """On each of its levels, all the way, by what Info reports and by what the state says."""
    start, states, infos = subject.history
    truth(not np.any([info.breakdown for info in infos]), "a breakdown is reported on a smooth problem")
    for name, moves in Levels(*infos[-1].moves)._asdict().items():
        still = np.flatnonzero(np.asarray(moves) <= 0)
        truth(still.size == 0, f"agents {still} do not move in {name}")
    for got, old in zip(
        jax.tree.leaves((states[-1].x, states[-1].y)), jax.tree.leaves((start.x, start.y)), strict=True
    ):
        moved = np.abs(np.asarray(got) - old).reshape(N, -1).max(1)
        truth(np.all(moved > 0), f"x and y of agents {np.flatnonzero(moved == 0)} stay at the start")


@contract("Keep all memory in the state: a step is a pure function of (key, state, batch).")
def scan_equals_a_loop(subject: AlgorithmSubject) -> None:
    """Ten steps under `jax.lax.scan`, and ten calls of the jitted step."""
    start, states, infos = subject.history
    method, batch = subject.method(subject.gossip), subject.point[-1]
    scan = jax.jit(lambda start, batch: jax.lax.scan(lambda s, key: method.step(key, s, batch), start, _keys()))
    equal(scan(start, batch), (states[-1], _stacked(infos)))


@contract("Take branches by jnp.where or jax.lax.cond on traced values, and draw with the key that step is given.")
def vmap_over_keys_equals_a_loop(subject: AlgorithmSubject) -> None:
    """One step with three keys at once."""
    _, states, _ = subject.history
    (step, _), batch = subject.step, subject.point[-1]
    together = jax.jit(jax.vmap(step, (0, None, None)))(_keys()[:3], states[0], batch)
    equal(together, _stacked([step(key, states[0], batch) for key in _keys()[:3]]))


@contract("Set info.breakdown to ~isfinite of what each agent has: bilevax.single_loop.moved does.")
def nan_is_reported_by_the_agent_that_has_it(subject: AlgorithmSubject) -> None:
    """Agent 2 gets a y that is no number."""
    start, _, _ = subject.history
    y = jax.tree.map(np.array, start.y)
    for leaf in jax.tree.leaves(y):
        leaf[2] = np.nan
    _, info = subject.step[0](KEY, start._replace(y=jax.tree.map(jnp.asarray, y)), subject.point[-1])
    truth(info.breakdown[2], "breakdown is False for the agent whose y is NaN")


@contract(
    "Let information move by gossip alone (gossip.mix, laplacian, mean), and fold gossip.agents(), the global ids, "
    "into every key: no sum or maximum over the agents' axis, no draw for all agents at once, no n where those held "
    "here are meant."
)
def placement_changes_nothing(subject: AlgorithmSubject) -> None:
    """Two devices that hold two agents each, played by `jax.vmap` with a named axis, against one with four."""
    _, states, _ = subject.history

    def run(gossip: Gossip, x: PyTree, y: PyTree, batch: Batch) -> Any:
        method = subject.method(gossip)

        def step(state: Any, key: Key) -> tuple[Any, None]:
            return method.step(key, state, batch)[0], None

        return jax.lax.scan(step, method.init(x, y, batch), _keys()[:PLACED])[0]

    got, expected = on_two_parts(run, subject.topology, *subject.point), states[PLACED - 1]
    equal((got.x, got.y), (expected.x, expected.y))


@contract("A coin must choose an agent now and then: one that never does leaves all directions as they were at init.")
def somebody_evaluates(subject: AlgorithmSubject) -> None:
    """In ten iterations of four agents at least once, by `info.calls`."""
    _, _, infos = subject.history
    total = np.sum([info.calls.inner_gradients for info in infos])
    truth(total > 0, "no ∇_y g in ten iterations of four agents")


@contract(
    "Compare info.calls with what step evaluates, sample by sample; calls=None if their number is random.",
    applies=lambda subject: subject.calls is not None,
)
def calls_are_those_declared(subject: AlgorithmSubject) -> None:
    """The mean of ten iterations, the same for every agent."""
    _, _, infos = subject.history
    got = np.asarray(_stacked([info.calls for info in infos])).mean((1, 2))
    expected = subject.declared
    truth(np.allclose(got, expected, rtol=1e-6), f"info.calls are {got} an iteration, declared are {expected}")


@contract(
    "Count in info.calls each ∇f and ∇_y g (with all their arguments), each product with ∇²_yy g and ∇²_xy g. Look for "
    "a point that is evaluated twice, or for a sample that is drawn twice where one is meant. Every branch of a cond "
    "counts, whichever runs: of a sound method with branches, say counted=False.",
    applies=lambda subject: subject.calls is not None and subject.counted and READABLE,
)
def calls_are_those_of_the_compiled_program(subject: AlgorithmSubject) -> None:
    """Products of the compiled step; a Hessian and a cross product may share a pull-back, and every branch counts."""
    outer, inner, hessian, cross = subject.declared
    outer_found, passes, cross_found = subject.executed
    truth(outer_found == outer, f"the program runs {outer_found} ∇f, declared are {outer}")
    least, most = inner + max(hessian, cross), inner + hessian + cross
    truth(least <= passes <= most, f"the program runs {passes} passes through ∇_y g, declared are {least} to {most}")
    most = cross or inner  # a method of first derivatives has one such product in each ∇_x g
    truth(cross <= cross_found <= most, f"the program runs {cross_found} cross products, declared are {cross}")


CONTRACTS: tuple[Contract, ...] = (
    state_keeps_its_form,
    debuggers_find_nothing,
    state_is_made_of_arrays,
    ten_steps_are_one_trace,
    every_agent_moves,
    nan_is_reported_by_the_agent_that_has_it,
    somebody_evaluates,
    calls_are_those_declared,
    calls_are_those_of_the_compiled_program,
    scan_equals_a_loop,
    vmap_over_keys_equals_a_loop,
    placement_changes_nothing,
)


def check_algorithm(
    make: MakeAlgorithm,
    calls: Declared | None = None,
    topology: Topologies = LAZY_RING,
    contracts: Sequence[Contract] = CONTRACTS,
    counted: bool = True,
) -> None:
    """Checks what every decentralized method keeps: its form, its reports, its placement, and what it says it costs.

    The contract `calls_are_those_of_the_compiled_program` is left out with JAX before 0.10, which prints
    its programs in another form.

    Args:
      make: `make(problem, gossip, step_sizes, sample=...) -> Algorithm`, the method over whatever it is given;
        `step_sizes` are `Levels` and `sample` is a sampler of one agent's data; ignore what the method does not take.
      calls: declared evaluations of ∇f and ∇_y g, Hessian and cross products of an agent in an iteration (the mean of
        the first ten); a function of the number of entries of y, if they depend on it. With None, as where a coin
        decides, the contracts `calls_…` are left out.
      topology: a graph of four agents, or several in turn, if the method needs another than a lazy ring.
      contracts: those to be checked, of `bilevax.testing.algorithm.CONTRACTS`.
      counted: False where the compiled program does not show how often `calls` run, as with a `jax.lax.cond`: every
        branch of it counts. `calls` are then compared with `info.calls` alone.

    Raises:
      ContractError: naming the contract that the method breaks, what was seen, and what to do.
      ValueError: if make takes other arguments, fails with these, or returns no Algorithm; calls are not four numbers;
        a graph has other than four agents; or contracts are none, or those of something else.

    Cost: about five programs.

    Example:
        >>> import bilevax as bx
        >>> from bilevax import testing
        >>> make = lambda problem, gossip, steps, sample: bx.decentralized.dsoba(problem, gossip, steps, sample=sample)
        >>> testing.check_algorithm(make, contracts=[testing.algorithm.state_keeps_its_form])
    """
    subject = AlgorithmSubject(make, calls, topology, counted)
    hold_all(contracts, name_of(make), subject, subject.made)

"""An estimator of a hypergradient on trial, and the programs that its contracts share."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevax import checks
from bilevax.hypergradients._hypergradient import HypergradientInfo
from bilevax.problem import Batch, BilevelProblem, Calls, Hypergradient, InnerSolver
from bilevax.sampling import Sample, full
from bilevax.testing import ground
from bilevax.typing import Array, Key, PyTree, Scalar

RATE = 0.1  # of the inner optimizer
STEPS = 5  # outer steps in one program
NEAR = 1e-5  # of two points whose difference is a derivative

Estimated = tuple[PyTree, Any, Any]  # the gradient, the state after, the info
Seen = tuple[PyTree, PyTree, Any]  # gradients, y and infos of outer steps, stacked
Scanned = tuple[tuple[Array, Any], Seen]  # x and the state at the end, and what was seen
Trial = tuple[Key, Any, Array, Batch]  # the key, the state, x and the batch of what runs at once


class MakeHypergradient(Protocol):
    """An estimator of a problem, a function of yours; it may leave optimizer and sampler aside."""

    def __call__(
        self, problem: BilevelProblem, optimizer: optax.GradientTransformation, sample: Sample, /
    ) -> Hypergradient: ...


def no_more(info: HypergradientInfo) -> Calls:
    """Nothing is run beside the declared calls."""
    return Calls()


@dataclasses.dataclass(frozen=True, eq=False)
class HypergradientSubject:
    """An estimator on trial, and the programs that its contracts share.

    Attributes:
      make: `make(problem, optimizer, sample) -> Hypergradient`; it may leave optimizer and sampler aside.
      steps: how many steps of the optimizer lead from y to the next y, each on a draw of the sampler; None where
        something else makes y.
      unrolls: the gradient is the derivative of these steps.
      keyed: the draws of the steps come from the key of an estimate; False where the solver has a key of its own.
      solves: it makes y better; False where the y of the state is taken as it is.
      biased: the gradient is not even right at the solution y of a quadratic g with H = 2 I.
      cold: an estimate does not read all of the state.
      half: it has enough digits left in bfloat16.
      counted: `info` counts products with the matrices of the two losses.
      uncounted: `uncounted(info) -> Calls`: what a compiled program runs beside the declared calls.
      make_solver: of an inner solver, `make_solver(inner_loss, optimizer, sample) -> InnerSolver`.

    Example:
        >>> import bilevax as bx
        >>> from bilevax import testing
        >>> def make(problem, optimizer, sample):
        ...     return bx.penalty(problem, optimizer, steps=4, multiplier=10.0, sample=sample, cross_sample=sample)
        >>> testing.HypergradientSubject(make, steps=4, biased=True).steps
        4
    """

    make: MakeHypergradient
    steps: int | None = None
    unrolls: bool = False
    keyed: bool = True
    solves: bool = True
    biased: bool = False
    cold: bool = False
    half: bool = True
    counted: bool = True
    uncounted: Callable[[HypergradientInfo], Calls] = no_more
    make_solver: Callable[..., InnerSolver] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError unless make can be called."""
        checks.function("make", self.make, "problem", "optimizer", "sample")

    def at(self, problem: BilevelProblem, rate: Scalar = RATE, sample: Sample = full) -> Hypergradient:
        """The estimator of this problem with plain gradient steps."""
        made = self.make(problem, optax.sgd(rate), sample)
        fix = "Return Hypergradient(init, estimate)."
        checks.instance("make(problem, optimizer, sample)", made, Hypergradient, fix)
        return made

    @functools.cached_property
    def start(self) -> Any:
        """The first state on the proving ground."""
        return self.at(ground.PROBLEM).init(*ground.make_point(), ground.make_batch())

    @functools.cached_property
    def program(self) -> jax.stages.Compiled:
        """`estimate` on full batches, for any learning rate of the inner optimizer."""

        def estimate(rate: Array, key: Key, state: Any, x: Array, batch: Batch) -> Estimated:
            return self.at(ground.PROBLEM, rate).estimate(key, state, x, batch)

        x, _ = ground.make_point()
        arguments = jnp.asarray(RATE), keys()[0], self.start, x, ground.make_batch()
        return jax.jit(estimate).lower(*arguments).compile()

    def estimate(
        self,
        state: Any = None,
        x: Array | None = None,
        batch: Batch | None = None,
        rate: float = RATE,
        key: Key | None = None,
    ) -> Estimated:
        """`(grad, state, info)` on the proving ground, by a program that is compiled once."""
        x = ground.make_point()[0] if x is None else x
        batch = ground.make_batch() if batch is None else batch
        state = self.start if state is None else state
        return self.program(jnp.asarray(rate), keys()[0] if key is None else key, state, x, batch)

    def run(self, key: Key, state: Any, x: Array, batch: Batch) -> tuple[tuple[Array, Any], tuple[Array, Any]]:
        """Outer steps one by one: `(x, state), (gradients, infos)`."""
        seen = []
        for _ in range(STEPS):
            grad, state, info = self.estimate(state, x, batch, key=key)
            x = jnp.asarray(np.asarray(x) - RATE * np.asarray(grad))
            seen.append((grad, info))
        return (x, state), jax.tree.map(lambda *leaves: np.stack(leaves), *seen)

    @functools.cached_property
    def trials(self) -> dict[str, Trial]:
        """`(key, state, x, batch)` of what runs at once."""
        return _trials(self)

    @functools.cached_property
    def mapped(self) -> tuple[dict[str, int], Scanned]:
        """Outer steps in `jax.lax.scan` under `jax.vmap` over trials, on streams; and the names of the trials."""
        hypergrad = self.at(ground.PROBLEM, sample=ground.stream)

        def scan(key: Key, state: Any, x: Array, batch: Batch) -> Scanned:
            def step(carry: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], Seen]:
                x, state = carry
                grad, state, info = hypergrad.estimate(key, state, x, batch)
                return (x - RATE * grad, state), (grad, state.y, info)

            return jax.lax.scan(step, (x, state), length=STEPS)

        named = self.trials
        stacked = jax.jit(lambda *trials: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trials))(*named.values())
        return {name: i for i, name in enumerate(named)}, jax.jit(jax.vmap(scan))(*stacked)

    def trial(self, name: str) -> Seen:
        """`(grad, y, info)` of the outer steps of a trial, stacked."""
        names, (_, seen) = self.mapped
        return jax.tree.map(lambda leaf: leaf[names[name]], seen)


@jax.jit
def keys() -> tuple[Key, Key]:
    """The key of an ordinary estimate, and another one."""
    return jax.random.key(1), jax.random.key(2)


def _trials(subject: HypergradientSubject) -> dict[str, Trial]:
    (key, other), batch = keys(), ground.make_batch()
    constant = batch._replace(outer=jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape)), batch.outer))

    def trial(key: Key, batch: Batch, seed: int = 0, ahead: float = 0.0) -> Trial:
        x, y = ground.make_point(seed)
        x = jnp.asarray(np.asarray(x) + ahead)
        return key, subject.at(ground.PROBLEM).init(x, y, batch), x, batch

    return {
        "plain": trial(key, batch),
        "another": trial(key, ground.make_batch(seed=101), seed=1),
        "varied": trial(key, ground.varied(batch)),
        "noisy": trial(key, ground.noisy(batch)),
        "again": trial(key, ground.noisy(batch)),
        "ahead": trial(key, ground.noisy(batch), ahead=NEAR),
        "behind": trial(key, ground.noisy(batch), ahead=-NEAR),
        "other key": trial(other, ground.noisy(batch)),
        "constant": trial(key, ground.noisy(ground.varied(constant))),
    }

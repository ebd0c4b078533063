"""VRBO: recursive differences of y and of the hypergradient, with several steps on y for each on x."""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.algorithms._descent import DescentInfo, stepped
from bilevax.printing import as_called, by_shape
from bilevax.problem import Algorithm, Batch, BilevelProblem, Directions, arrays, norm, owned
from bilevax.sampling import Sample, check_key, fold, split
from bilevax.single_loop._levels import Levels, at, levels
from bilevax.single_loop.local_directions import own_neumann
from bilevax.single_loop.step_sizes import StepSizes, check_schedule, check_step_size, outer_step
from bilevax.typing import Array, Key, PyTree

Followed: TypeAlias = tuple[Directions, tuple[PyTree, PyTree], tuple[PyTree, PyTree]]  # u, the point before, the point


class VRBOState(NamedTuple):
    """The state of VRBO.

    Attributes:
      k: iterations so far; scalar.
      x: outer variable.
      y: inner variable.
      u: `Directions(x, y, None)`, the estimates at x and y.
      optimizer: the state of the outer optimizer; () for a number or a schedule.

    Example:
        >>> import bilevax as bx
        >>> problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2)
        >>> bx.algorithms.vrbo(problem, 0.1, sample=bx.sampling.full, every=3).init(1.0, 2.0)
        VRBOState(
          k=0,
          x=1,
          y=2,
          u=Directions(x=0, y=0, v=None),
          optimizer=(),
        )
    """

    k: Array
    x: PyTree
    y: PyTree
    u: Directions
    optimizer: Any

    def __repr__(self) -> str:
        return by_shape(self)


@as_called
def vrbo(
    problem: BilevelProblem, step_sizes: StepSizes, *, sample: Sample, every: int, steps: int = 10, terms: int = 10
) -> Algorithm:
    """SPIDER at both levels: one step on x, then `steps` on y, and the estimates follow every move.

        d_y = ∇_y g          d_x = ∇_x f − ∇²_xy g · a_v Σ_{j=0}^{terms} (I − a_v ∇²_yy g)ʲ ∇_y f
        u = d(x, y) on all data, if k mod q = 0
        x ← x − a_x u_x
        `steps` times:      u ← u + d(point; ξ_t) − d(previous point; ξ_t),      y ← y − a_y u_y
        u ← u + d(point; ξ) − d(previous point; ξ)

    With constant steps it converges, to a point that is biased by (1 − a_v μ)^(terms+1) alone: the differences vanish
    with the moves, and with them the noise. `srba` has no bias and no series to compute.

    Args:
      problem: f and g, means over their examples.
      step_sizes: `Levels(x, y, v)`: of x and y numbers or schedules k -> number, of x also an optax transformation;
        that of v, a number in (0, 2 / L), is that of the series.
      sample: `sample(key, t, data) -> batch`, such as `bx.sampling.minibatch(64)`.
      every: q >= 1, iterations from one exact evaluation to the next.
      steps: steps on y in each iteration, >= 1.
      terms: Hessian products of each series, >= 0.

    Returns:
      `Algorithm(init, step)` with `VRBOState` and `DescentInfo` (whose losses are None), on x and y without an agents'
      axis.

    Raises:
      ValueError: if `every` < 1, `steps` < 1 or `terms` < 0, a step size is negative or of another kind, or that of v
        is not a positive number; if there is no key.

    Cost: 2 (`steps` + 1) evaluations, each one ∇f, one ∇_y g, `terms` Hessian products and one cross product on a
    sample; in every `every`-th iteration one on all data besides.

    Reference: Yang, Ji and Liang, "Provably faster algorithms for bilevel optimization", arXiv 2106.04692, algorithm 2.
    Deviation: one sample for all factors of a series, where the paper draws each; the exact evaluation is on all data.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> loss = lambda x, y, c: ((y - x * c) ** 2).mean()
        >>> problem = bx.BilevelProblem(loss, loss)
        >>> method = bx.algorithms.vrbo(problem, (0.1, 0.5, 0.1), sample=bx.sampling.minibatch(2), every=4)
        >>> data = jnp.arange(8.0)
        >>> state, info = jax.jit(method.step)(jax.random.key(0), method.init(1.0, 2.0), bx.Batch(data, data))
    """
    checks.instance("problem", problem, BilevelProblem, "Pass bx.BilevelProblem(outer_loss, inner_loss).")
    sizes = levels("step_sizes", step_sizes)
    check_step_size("step_sizes.x", sizes.x)
    check_schedule("step_sizes.y", sizes.y)
    checks.scalar("step_sizes.v", sizes.v)
    checks.positive("step_sizes.v", sizes.v)
    rule = own_neumann(terms=terms, inverse_step=sizes.v)
    checks.function("sample", sample, "key", "t", "data")
    every = checks.count("every", every, minimum=1)
    steps = checks.count("steps", steps, minimum=1)
    unit = rule.calls(("x", "y"), ())

    def init(x: PyTree, y: PyTree, batch: Batch | None = None) -> VRBOState:
        """The first state, of k = 0 and directions of zero; no batch is read."""
        checks.floating("x", x)
        checks.floating("y", y)
        x, y = arrays(x), arrays(y)
        u = Directions(optax.tree.zeros_like(x), optax.tree.zeros_like(y), None)
        optimizer = sizes.x.init(x) if isinstance(sizes.x, optax.GradientTransformation) else ()
        return owned(VRBOState(jnp.zeros((), jnp.int32), x, y, u, optimizer))

    def step(key: Key | None, state: VRBOState, batch: Batch) -> tuple[VRBOState, DescentInfo]:
        """One step on x, and the steps on y that follow it: (state, info)."""
        checks.instance("state", state, VRBOState, "Pass step(key, state, batch) the state of init or of a step.")
        checks.instance("batch", batch, Batch, "Pass bx.Batch(outer=..., inner=...).")
        check_key(key)
        key, k = fold(key, state.k), state.k

        def follow(t: Array, u: Directions, before: tuple[PyTree, PyTree], after: tuple[PyTree, PyTree]) -> Directions:
            outer_key, inner_key = split(fold(key, t), 2)
            drawn = Batch(sample(outer_key, t, batch.outer), sample(inner_key, t, batch.inner))
            change = optax.tree.sub(*(rule.evaluate(problem, *point, (), drawn) for point in (after, before)))
            return optax.tree.cast_like(optax.tree.add(u, change), u)

        def move(carry: Followed, t: Array) -> tuple[Followed, None]:
            u, before, (x, y) = carry
            u = follow(t, u, before, (x, y))
            return (u, (x, y), (x, stepped(y, -at(k, sizes.y), u.y))), None

        refresh = k % every == 0
        u = jax.lax.cond(refresh, lambda: rule.evaluate(problem, state.x, state.y, (), batch), lambda: state.u)
        x, optimizer = outer_step(sizes.x, k, u.x, state.optimizer, state.x)
        carry = u, (state.x, state.y), (x, state.y)
        (u, before, (x, y)), _ = jax.lax.scan(move, carry, jnp.arange(steps))
        u = follow(jnp.asarray(steps), u, before, (x, y))
        moves: Levels[Any] = Levels(norm(optax.tree.sub(x, state.x)), norm(optax.tree.sub(y, state.y)), ())
        calls = jax.tree.map(lambda one: one * (2 * (steps + 1) + jnp.asarray(refresh, int)), unit)
        info = DescentInfo(moves, ~jnp.isfinite(moves.x + moves.y), calls, None, None)
        return VRBOState(k + 1, x, y, u, optimizer), info

    return Algorithm(init, step)

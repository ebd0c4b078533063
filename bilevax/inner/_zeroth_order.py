"""Hypergradients through a black box: finite differences of the inner solution along random directions."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.carried import parameters
from bilevax.inner._directional import Plan, Push, directional, make_plan, no_loss, tangent_leaves
from bilevax.inner._optimizer_steps import Initial, Solve, optimizer_steps, solution
from bilevax.inner.guides import Guide
from bilevax.inner.random_directions import Sampler, rademacher
from bilevax.printing import as_called, by_text
from bilevax.problem import Calls, InnerSolver, Iterate, Loss
from bilevax.sampling import full
from bilevax.typing import Array, Key, PyTree, Scalar


class Change(Protocol):
    """An approximation of the derivative of a function along `step`, a function of yours or of this file."""

    def __call__(self, function: Callable[[PyTree], PyTree], x: PyTree, value: PyTree, step: PyTree, /) -> PyTree: ...


class Difference(NamedTuple):
    """A finite difference.

    Attributes:
      change: `change(function, x, value, step)`, an approximation of its derivative along `step`; `value` is
        `function(x)`.
      evaluations: of `function`, besides `value`.
      text: what `print` shows.

    Example:
        >>> import bilevax as bx
        >>> bx.inner.central.change(lambda x: x**2, 3.0, 9.0, 0.5), bx.inner.one_sided.evaluations
        (3.0, 1)
    """

    change: Change
    evaluations: int
    text: str = ""

    def __repr__(self) -> str:
        return by_text(self)


def _one_sided(function: Callable[[PyTree], PyTree], x: PyTree, value: PyTree, step: PyTree) -> PyTree:
    return optax.tree.sub(function(optax.tree.add(x, step)), value)


def _central(function: Callable[[PyTree], PyTree], x: PyTree, value: PyTree, step: PyTree) -> PyTree:
    ahead, behind = function(optax.tree.add(x, step)), function(optax.tree.sub(x, step))
    return optax.tree.scale(0.5, optax.tree.sub(ahead, behind))


one_sided = Difference(_one_sided, 1, "one_sided")
central = Difference(_central, 2, "central")


@as_called
def zeroth_order(
    solve: Solve,
    *,
    directions: int = 8,
    mu: Scalar = 1e-3,
    difference: Difference | None = None,
    sampler: Sampler = rademacher,
    guide: Guide | None = None,
    control_variate: Guide | None = None,
    inner_loss: Loss | None = None,
    initial: Initial | None = None,
    chunk: int | None = None,
    axis: str | tuple[str, ...] | None = None,
) -> InnerSolver:
    """Differentiates a black-box solver S by finite differences of its solution along random directions.

        y_T = S(x)      ẏ_i = (S(x + μ v_i) − y_T) / μ      or      (S(x + μ v_i) − S(x − μ v_i)) / 2μ
        x_bar = (1/b) Σ ⟨y_bar, ẏ_i⟩ v_i,   z0_bar = 0

    The outer loss is differentiated exactly: only the solver is a black box. (`full_zeroth_order` differences both.)
    The error is O(μ) one-sided and O(μ²) central, besides rounding and the solver's own tolerance divided by μ, and
    the noise of the sampler as in `forward_gradient`. For x of order 1 a μ about 1e-4 suits float64, and 1e-3
    (one-sided) or 1e-2 (central) float32; let `solve` take logarithms or multiples of what has another scale. Where
    x + μ v is rounded to x, the estimate is NaN.

    All evaluations of one estimate see the same y0 and the same batch. Where the solver is random, let it take its key
    from the batch: with fresh randomness in each evaluation the difference would be noise divided by μ.

    Use it where the solver cannot be differentiated in any mode. Where JAX can push a tangent through it,
    `forward_gradient(solve=...)` costs about as much for one direction and is exact along it.

    Args:
      solve: S, a function (x, y0, batch) -> y_T: a JAX function, or a Python function in `bx.inner.black_box`. (A
        `jax.pure_callback` of your own needs its vmap_method, or chunk=1.)
      directions: b >= 1, guesses of the guide included.
      mu: μ > 0, the length of the difference.
      difference: `one_sided` or `central`; by default central for one or two directions, where that is one or two
        solves more, and one-sided for more, whose noise is larger than the error of a difference.
      sampler: of the random directions; see `random_directions`.
      guide: proposes some of the directions; see `guides`.
      control_variate: proposes what is subtracted before the estimate and added after it.
      inner_loss: g, for the report alone; without it there is none.
      initial: y_0 as a function of x; by default y_0 is the warm y, the same for all evaluations.
      chunk: how many evaluations run at once, under `jax.vmap`; by default all, with 1 one after the other.
      axis: name of the device axis, or names, whose devices share the random directions; see
        `parallel.shard_directions`.

    Returns:
      An `InnerSolver` with state `DirectionalState(guide, control_variate)` and `info.detail` a `DirectionalInfo`.

    Raises:
      ValueError: if directions < 1, or not more than the guesses; if mu is not positive; if `solve` returns a pytree
        that does not look like y0; from `init`, if the sampler cannot draw so many, or draws something else.

    Cost: b + 1 solves one-sided, 2 b + 1 central; memory for b copies of y. The report adds two gradients of g.

    Reference: Shen et al., arXiv 2406.14095, section 3.2; Feng, Wang, arXiv 2205.14737, for orthogonal directions.

    Example:
        >>> import bilevax as bx, jax, numpy as np
        >>> cube_root = bx.inner.black_box(lambda x, y0, batch: np.cbrt(x))
        >>> solver = bx.inner.zeroth_order(cube_root, directions=1, mu=0.05)
        >>> hypergrad = bx.hypergradient(lambda x, y, batch: 3 * y, solver)
        >>> x, batch = jax.numpy.array(8.0), bx.Batch(None, None)
        >>> grad, state, info = jax.jit(hypergrad.estimate)(jax.random.key(0), hypergrad.init(x, x), x, batch)
        >>> round(float(grad), 3), float(state.y), int(info.inner.detail.solves)
        (0.25, 2.0, 3)
    """
    checks.function("solve", solve, "x", "y0", "batch")
    directions = checks.count("directions", directions, minimum=1)
    if difference is None:
        difference = central if directions <= 2 else one_sided
    checks.instance("difference", difference, Difference, "Pass bx.inner.one_sided or bx.inner.central.")
    checks.function("difference.change", difference.change, "function", "x", "value", "step")
    checks.scalar("mu", mu)
    checks.positive("mu", mu)
    start, _, _, report_on = optimizer_steps(
        no_loss if inner_loss is None else inner_loss, optax.identity(), initial, full
    )

    def prepare(key: Key, x: PyTree, z: Iterate, batch: PyTree, z_T: Iterate | None = None) -> Push:
        def at(x: PyTree) -> PyTree:
            y0 = z.y if initial is None else start(x, z.y).y
            return solution(solve(x, y0, batch), y0)

        base = z._replace(y=at(x)) if z_T is None else z_T

        def along(v: PyTree) -> tuple[Iterate, Iterate]:
            step = optax.tree.cast_like(optax.tree.scale(mu, v), x)
            change = difference.change(lambda x: parameters(at(x)), x, parameters(base.y), step)
            change = tangent_leaves(Iterate(optax.tree.scale(1 / mu, change)))
            lost = jnp.any(jnp.stack(jax.tree.leaves(jax.tree.map(_lost, x, step, v))))
            return base, jax.tree.map(lambda leaf: jnp.where(lost, jnp.nan, leaf), change)

        return Push(lambda: base, along)

    def solves(plan: Plan) -> int:
        return plan.devices + difference.evaluations * (plan.random + plan.devices * plan.guesses)

    def report(key: Key | None, data: PyTree, x: PyTree, z: Iterate) -> tuple[Array, Array]:
        return report_on(None, data, x, z)

    def calls(solves: int, tangents: int) -> Calls:
        return Calls()

    chosen = make_plan(directions, sampler, guide, control_variate, chunk, axis)
    reports, fresh = inner_loss is not None, initial is not None
    return directional(start, prepare, report, chosen, solves, calls, reports, fresh)


def _lost(x: Array, step: Array, v: Array) -> Array:
    """Whether rounding swallows the step in an entry that should move by about μ."""
    return jnp.any((jnp.abs(x + step - x) < 0.5 * jnp.abs(step)) & (jnp.abs(v) > 0.5))

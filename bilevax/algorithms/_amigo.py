"""AmIGO: some steps on y, some on v, one on x; y and v stay warm."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.algorithms._descent import DescentInfo, stepped
from bilevax.printing import as_called, by_shape
from bilevax.problem import Algorithm, Batch, BilevelProblem, Calls, arrays, inner_gradient, norm, owned
from bilevax.sampling import Sample, check_key, fold, split
from bilevax.single_loop._levels import Levels, at, levels
from bilevax.single_loop.step_sizes import StepSizes, check_schedule, check_step_size, outer_step
from bilevax.typing import Array, Key, PyTree


class AMIGOState(NamedTuple):
    """The state of AmIGO.

    Attributes:
      k: iterations so far; scalar.
      x: outer variable.
      y: inner variable.
      v: inverse-Hessian-vector product, 0 at the start.
      optimizer: the state of the outer optimizer; () for a number or a schedule.

    Example:
        >>> import bilevax as bx
        >>> problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2)
        >>> bx.algorithms.amigo(problem, 0.1, sample=bx.sampling.full).init(1.0, 2.0)
        AMIGOState(
          k=0,
          x=1,
          y=2,
          v=0,
          optimizer=(),
        )
    """

    k: Array
    x: PyTree
    y: PyTree
    v: PyTree
    optimizer: Any

    def __repr__(self) -> str:
        return by_shape(self)


@as_called
def amigo(
    problem: BilevelProblem, step_sizes: StepSizes, *, sample: Sample, steps: int = 10, v_steps: int | None = None
) -> Algorithm:
    """Amortized implicit gradient optimization: stochastic steps on y and v from where the last iteration left them.

        y ← y − a_y ∇_y g(x, y; ξ_t)                            `steps` times
        b = ∇_y f(x, y; ζ)
        v ← v − a_v (∇²_yy g(x, y; ξ'_t) v − b)                 `v_steps` times
        x ← x − a_x (∇_x f(x, y; ζ) − ∇²_xy g(x, y; ξ'') v)

    v averages over the batches of many iterations, and is kept whatever a single batch says of it. (`ihvp.sgd` in
    `inner.implicit` drops a v that is no better than zero on its batch, which suits an exact ∇_y f: where a small ∇_y f
    is drawn with noise that happens often, and the average is lost.) With constant steps it converges to a ball around
    the solution. Take `soba` where an iteration should cost one batch, `saba` where the data are fixed and few.

    Args:
      problem: f and g.
      step_sizes: `Levels(x, y, v)` of numbers or schedules k -> number; that of x may be an optax transformation.
      sample: `sample(key, t, data) -> batch`, such as `bx.sampling.minibatch(64)`; each use has its own draw.
      steps: steps on y in each iteration, >= 1.
      v_steps: steps on v, >= 1; as many as on y by default.

    Returns:
      `Algorithm(init, step)` with `AMIGOState` and `DescentInfo`, on x and y without an agents' axis.

    Raises:
      ValueError: if a number of steps is below 1, or a step size is negative or of another kind; when it draws,
        if there is no key.

    Cost: one ∇f, `steps` + 1 ∇_y g, `v_steps` Hessian products and one cross product, on a sample each; each product on
    a sample of its own takes one more ∇_y g there.

    Reference: Arbel and Mairal, "Amortized implicit differentiation for stochastic bilevel optimization", arXiv
    2111.14580, algorithms 1 to 3. Deviation: batches of one size.

    Example:
        >>> import bilevax as bx, jax
        >>> problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2)
        >>> method = bx.algorithms.amigo(problem, (0.1, 0.5, 0.5), sample=bx.sampling.full, steps=1)
        >>> state, info = jax.jit(method.step)(jax.random.key(0), method.init(1.0, 2.0), bx.Batch(None, None))
        >>> round(float(state.x), 6), float(state.y), float(state.v)
        (0.8, 1.0, 1.0)
    """
    checks.instance("problem", problem, BilevelProblem, "Pass bx.BilevelProblem(outer_loss, inner_loss).")
    outer_loss = checks.scalar_loss("outer_loss", problem.outer_loss)
    inner_loss = checks.scalar_loss("inner_loss", problem.inner_loss)
    sizes = levels("step_sizes", step_sizes)
    check_step_size("step_sizes.x", sizes.x)
    check_schedule("step_sizes.y", sizes.y)
    check_schedule("step_sizes.v", sizes.v)
    checks.function("sample", sample, "key", "t", "data")
    steps = checks.count("steps", steps, minimum=1)
    v_steps = steps if v_steps is None else checks.count("v_steps", v_steps, minimum=1)

    def init(x: PyTree, y: PyTree, batch: Batch | None = None) -> AMIGOState:
        """The first state, of k = 0 and v of zero; no batch is read."""
        checks.floating("x", x)
        checks.floating("y", y)
        x, y = arrays(x), arrays(y)
        optimizer = sizes.x.init(x) if isinstance(sizes.x, optax.GradientTransformation) else ()
        return owned(AMIGOState(jnp.zeros((), jnp.int32), x, y, optax.tree.zeros_like(y), optimizer))

    def step(key: Key | None, state: AMIGOState, batch: Batch) -> tuple[AMIGOState, DescentInfo]:
        """The steps on y, those on v, and one on x: (state, info)."""
        checks.instance("state", state, AMIGOState, "Pass step(key, state, batch) the state of init or of a step.")
        checks.instance("batch", batch, Batch, "Pass bx.Batch(outer=..., inner=...).")
        check_key(key)
        y_key, outer_key, v_key, x_key = split(fold(key, state.k), 4)
        x = state.x

        def y_step(y: PyTree, t: Array) -> tuple[PyTree, None]:
            gradient = jax.grad(inner_loss, argnums=1)(x, y, sample(fold(y_key, t), t, batch.inner))
            return stepped(y, -at(state.k, sizes.y), gradient), None

        y, _ = jax.lax.scan(y_step, state.y, jnp.arange(steps))
        outer = sample(outer_key, state.k, batch.outer)
        value, (outer_x, outer_y) = jax.value_and_grad(outer_loss, argnums=(0, 1))(x, y, outer)

        def v_step(v: PyTree, t: Array) -> tuple[PyTree, None]:
            inner = inner_gradient(inner_loss, x, y, sample(fold(v_key, t), t, batch.inner))
            return stepped(v, -at(state.k, sizes.v), optax.tree.sub(inner.pull_back(v)[1], outer_y)), None

        v, _ = jax.lax.scan(v_step, state.v, jnp.arange(v_steps))
        inner = inner_gradient(inner_loss, x, y, sample(x_key, state.k, batch.inner))
        direction = optax.tree.sub(outer_x, inner.pull_back(v)[0])
        new, optimizer = outer_step(sizes.x, state.k, direction, state.optimizer, x)
        moves = Levels(*(norm(optax.tree.sub(*pair)) for pair in ((new, x), (y, state.y), (v, state.v))))
        info = DescentInfo(moves, ~jnp.isfinite(sum(moves)), Calls(1, steps + 1, v_steps, 1), value, inner.loss)
        return AMIGOState(state.k + 1, new, y, v, optimizer), info

    return Algorithm(init, step)

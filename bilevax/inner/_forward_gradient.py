"""Forward gradient unrolling: an unbiased hypergradient in memory that does not grow with the inner steps."""

import jax
import optax

from bilevax import checks
from bilevax.inner._directional import Plan, Push, directional, make_plan, no_loss, tangent_leaves
from bilevax.inner._optimizer_steps import Initial, Optimizer, Solve, optimizer_steps, solution, step_keys
from bilevax.inner.guides import Guide
from bilevax.inner.random_directions import Sampler, rademacher
from bilevax.printing import as_called
from bilevax.problem import Calls, InnerSolver, Iterate, Loss
from bilevax.sampling import Sample, full
from bilevax.typing import Array, Key, PyTree

CACHED = 4 * 2**20  # bytes of tangents that are pushed at once on a CPU, where no chunk is given


@as_called
def forward_gradient(
    inner_loss: Loss | None,
    optimizer: Optimizer | None = None,
    steps: int | None = None,
    *,
    directions: int = 8,
    sampler: Sampler = rademacher,
    guide: Guide | None = None,
    control_variate: Guide | None = None,
    solve: Solve | None = None,
    initial: Initial | None = None,
    sample: Sample = full,
    chunk: int | None = None,
    axis: str | tuple[str, ...] | None = None,
) -> InnerSolver:
    """Pushes tangents in random directions through all inner steps: (FG)²U.

        z_t = Φ(z_{t−1}, x),   ż_t = (∂Φ/∂z) ż_{t−1} + (∂Φ/∂x) v,   ż_0 = (∂z_0/∂x) v        t = 1 ... T
        x_bar = (1/b) Σ ⟨z_bar, ż_T(v_i)⟩ v_i,   E x_bar = [dz_T/dx]ᵀ z_bar,   z0_bar = 0

    Unbiased for every T and every differentiable optimizer, momentum, moments and schedules included, whether or not
    the inner problem is solved. Memory does not depend on T. The price is noise: E‖x_bar − u‖² is about (N − 1)/b ‖u‖²
    for an x of N entries (`random_directions` has the formulas; `info.inner.detail` measures it), which asks for step
    sizes smaller by `detail.step_scale`. The direct part ∇_x f, which `hypergradient` adds, is exact.

    Use it where reverse mode is impossible (a `lax.while_loop` with a stopping rule, operations without a transpose),
    where even √T copies of z do not fit, where N is a handful (`random_directions.coordinate`, b = N, is exact and
    cheap), or where many devices share the directions. Otherwise `inner.reverse` with checkpoints is exact for the cost
    of two to four directions. From scratch the noise loses against a good biased estimator: guide it by one, or use it
    as the second phase after one (`two_phase`).

    Args:
      inner_loss: g, a function (x, y, batch) -> scalar; None with a `solve` of your own, if no report is wanted.
      optimizer: any optax transformation, or a function x ↦ transformation.
      steps: T >= 0.
      directions: b >= 1, tangents in all, guesses of the guide included.
      sampler: of the random directions; see `random_directions`.
      guide: proposes some of the directions, for less noise; see `guides`. It is asked when z_T and z_bar are known,
        and its directions are pushed in a second run. It needs only the direction of its guess.
      control_variate: proposes what is subtracted before the estimate and added after it. It needs the length too.
      solve: your own `solve(x, y0, batch) -> y_T` in place of optimizer and steps: any function with forward-mode
        derivatives. Randomness comes from keys in the batch.
      initial: y_0 as a function of x; by default y_0 is the warm y, and has no tangent.
      sample: how inner step t draws its batch from the data.
      chunk: how many tangents are pushed at once. By default all, and on a CPU four where b >= 8 tangents of z would
        take more than 4 MiB: in about the same time, and in a third of the memory for b = 16. With chunks they are
        pushed in the backward pass, and none is kept; the estimate is the same up to the order of sums. chunk=b pushes
        all.
      axis: name of the device axis, or names, whose devices share the random directions; see
        `parallel.shard_directions`.

    Returns:
      An `InnerSolver` with state `DirectionalState(guide, control_variate)` and `info.detail` a `DirectionalInfo`. In a
      `chain` it can be the first link alone: `chain(forward_gradient(T − K), reverse(K))`.

    Raises:
      ValueError: if directions < 1, or not more than the guesses; if steps comes without the optimizer or with `solve`;
        from `init`, if the sampler cannot draw so many, or draws something else; from `forward`, without a key.

    Cost: T gradients and b T products with the Hessian and the cross derivative at once, in one run of the primal, or
    in one for each chunk and one more; a guide another run. The report adds two gradients. Memory of 1 + b copies of
    z and of one step, of 1 + chunk with chunks.

    Reference: Shen et al., "Memory-efficient gradient unrolling for large-scale bi-level optimization", arXiv
    2406.14095, section 3; Baydin et al., arXiv 2202.08587, for forward gradients.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp, optax
        >>> loss = lambda x, y, batch: 0.5 * jnp.sum((y - x) ** 2)
        >>> exact = bx.inner.random_directions.coordinate
        >>> solver = bx.inner.forward_gradient(loss, optax.sgd(0.5), steps=2, directions=3, sampler=exact)
        >>> solve = bx.differentiable(solver)
        >>> x, weights = jnp.zeros(3), jnp.array([1.0, 2.0, 4.0])
        >>> outer = lambda x: jnp.sum(weights * solve(x, jnp.ones(3), None, jax.random.key(0)))
        >>> [round(g, 4) for g in jax.jit(jax.grad(outer))(x).tolist()]
        [0.75, 1.5, 3.0]
    """
    if solve is None and (optimizer is None or steps is None):
        raise ValueError(
            f"optimizer and steps must be given where there is no solve; got optimizer={optimizer!r:.60}, "
            f"steps={steps!r}. Pass, say, optax.sgd(0.1), steps=100, or solve=..."
        )
    if solve is not None:
        if optimizer is not None or steps is not None:
            raise ValueError(
                f"solve replaces optimizer and steps; got solve and optimizer={optimizer!r:.60}, steps={steps!r}. Drop "
                f"one of them."
            )
        checks.function("solve", solve, "x", "y0", "batch")
    length = 0 if solve else checks.count("steps", steps)
    if inner_loss is None and solve is None:
        raise ValueError(
            "inner_loss must be a function (x, y, batch) -> scalar where there is no solve; got None. Pass the loss."
        )
    loss = no_loss if inner_loss is None else inner_loss
    start, step, _, report_on = optimizer_steps(loss, optimizer or optax.identity(), initial, sample)

    def run(key: Key | None, x: PyTree, z: Iterate, batch: PyTree) -> Iterate:
        if solve is None:
            return jax.lax.scan(lambda z, _: (step(key, batch, x, z), None), z, length=length)[0]
        return z._replace(y=solution(solve(x, z.y, batch), z.y))

    def prepare(key: Key, x: PyTree, z: Iterate, batch: PyTree, z_T: Iterate | None = None) -> Push:
        step_key = step_keys(key).steps

        def along(v: PyTree) -> tuple[Iterate, Iterate]:
            _, z_dot = jax.jvp(lambda x: start(x, z.y), (x,), (v,))
            z_T, z_T_dot = jax.jvp(lambda x, z: run(step_key, x, z, batch), (x, z), (v, z_dot))
            return z_T, tangent_leaves(z_T_dot)

        return Push(lambda: run(step_key, x, z, batch) if z_T is None else z_T, along)

    def report(key: Key | None, data: PyTree, x: PyTree, z: Iterate) -> tuple[Array, Array]:
        return report_on(step_keys(key).steps, data, x, z)

    def calls(solves: int, tangents: int) -> Calls:
        pushed = tangents * length
        return Calls(0, solves * length, pushed, pushed)

    chosen = make_plan(directions, sampler, guide, control_variate, chunk, axis)._replace(cached=CACHED)
    reports, fresh = inner_loss is not None, initial is not None
    return directional(start, prepare, report, chosen, _solves, calls, reports, fresh)


def _solves(plan: Plan) -> int:
    """Runs of the primal: one for all directions, or one for each chunk and one for z_T; once more for the guesses."""

    def batches(number: int) -> int:
        return 1 if plan.chunk is None else -(-number // plan.chunk)

    random = batches(plan.random // plan.devices) + (plan.chunk is not None)
    return plan.devices * (random + (batches(plan.guesses) if plan.guesses else 0))

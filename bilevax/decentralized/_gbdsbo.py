"""GBDSBO: the agents track their mean Jacobian and Hessian, matrices and all."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from bilevax import checks
from bilevax.agents._gossip import Gossip
from bilevax.printing import as_called, by_shape
from bilevax.problem import Algorithm, Batch, BilevelProblem, Calls, arrays, inner_gradient, owned, widen
from bilevax.sampling import Sample, fold, full
from bilevax.single_loop._levels import Levels
from bilevax.single_loop._preconditioned import Place
from bilevax.single_loop.estimator.estimator_type import draw
from bilevax.single_loop.method import Info, check_start, check_step, moved
from bilevax.single_loop.step_sizes import StepSizes, move, read_steps
from bilevax.typing import Array, Key, PyTree, Scalar


class Tracked(NamedTuple):
    """What the agents average by gradient tracking: leaves [n, ...], y as a flat vector of d entries.

    Attributes:
      outer_x: ∇_x f.
      outer_y: ∇_y f, [n, d].
      inner_y: ∇_y g, [n, d].
      cross: ∂∇_y g / ∂x, leaves [n, d, ...].
      hessians: ∇²_yy g, one for each term, [n, terms, d, d].
    """

    outer_x: PyTree
    outer_y: Array
    inner_y: Array
    cross: PyTree
    hessians: Array


MIX, DRAW = 0, 1  # what the key of an iteration folds in; the draws of further Hessians, and the moves, follow DRAW


class GBDSBOState(NamedTuple):
    """The state of `gbdsbo`, leaves [n, ...].

    Attributes:
      k: iterations so far; scalar.
      x: outer variables.
      y: inner variables.
      last: q, what the agents evaluated in the iteration before.
      mixed: W t, what they received of the trackers.
      gossip: the state of the gossip of the message (x, y, t).
      moves: the memories of the step sizes of x and y.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> gossip = bx.gossip(bx.topology.ring(4))
        >>> method = bx.decentralized.gbdsbo(problem, gossip, (0.1, 0.2))
        >>> method.init(jnp.zeros(4), jnp.zeros(4)).last.hessians.shape  # agents, Hessians, d_y, d_y
        (4, 1, 1, 1)
    """

    k: Array
    x: PyTree
    y: PyTree
    last: Tracked
    mixed: Tracked
    gossip: Any
    moves: tuple[Any, Any]

    def __repr__(self) -> str:
        return by_shape(self)


@as_called
def gbdsbo(
    problem: BilevelProblem,
    gossip: Gossip,
    step_sizes: StepSizes,
    *,
    sample: Sample = full,
    terms: int | None = None,
    inverse_step: Scalar | None = None,
) -> Algorithm:
    """Gossip-based decentralized stochastic bilevel optimization: gradients, Jacobians and Hessians are all averaged.

    For the agents' own q_i = (∇_x f, ∇_y f, ∇_y g, ∂∇_y g/∂x, H_1, …, H_b) at (x_i, y_i):

        t_i ← Σ_j w_ij t_j + q_i(new) − q_i(old)
        v_i = c Σ_{j=0}^{b} Π_{l ≤ j} (I − c t_i^{H_l}) t_i^{∇_y f},      or (t_i^H)⁻¹ t_i^{∇_y f} without factors
        x_i ← Σ_j w_ij (x_j − a_x (t_j^{∇_x f} − (t_j^{∂∇_y g/∂x})ᵀ v_j)),      y_i ← Σ_j w_ij (y_j − a_y t_j^{∇_y g})

    The mean Hessian is inverted, as it should: without factors it converges to x*. Do not use it where d_y is more than
    a few hundred: it forms and sends matrices of d_x d_y and d_y² numbers, and serves best as an expensive reference.

    Args:
      problem: f_i and g_i.
      gossip: a `Gossip`, for everything.
      step_sizes: `Levels(x, y)` of numbers, schedules or optax transformations.
      sample: `sample(key, t, data) -> batch` for the data of one agent, drawn anew for each Hessian factor.
      terms: b >= 1 independent Hessians of a Neumann series of b + 1 terms (j = 0..b); None for one Hessian that
        is inverted.
      inverse_step: c > 0, usually 1 / L, with `terms`.

    Returns:
      `Algorithm(init, step)` with `GBDSBOState`.

    Raises:
      ValueError: if `terms` < 1, or `inverse_step` is missing or not positive with `terms`, or given without; as
        `bx.single_loop.single_loop`; when it draws, if there is no key.

    Cost: for each agent and iteration one ∇f, max(1, b) ∇_y g, d_y max(1, b) Hessian and d_y cross products, and
    without factors a solve of d_y unknowns; 2 d_x + 3 d_y + d_x d_y + max(1, b) d_y² numbers to each neighbour in one
    round.

    Reference: Yang, Zhang and Wang, "Decentralized gossip-based stochastic bilevel optimization over communication
    networks", arXiv 2206.10870. Reconstructed: averaged gradients and Hessians with several independent factors are the
    paper's; that all are tracked is the reading taken here. Deviation: of the size of y it sends y, ∇_y f and ∇_y g,
    3 d_y numbers, where the published count is 2 d_y.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> gossip, batch = bx.gossip(bx.topology.ring(4)), bx.Batch(jnp.arange(4.0), jnp.zeros(4))
        >>> method = bx.decentralized.gbdsbo(problem, gossip, (0.1, 0.2))
        >>> state, info = jax.jit(method.step)(None, method.init(jnp.zeros(4), jnp.zeros(4)), batch)
        >>> float(info.bytes[0]) / state.x.dtype.itemsize  # to two neighbours: 2 d_x + 3 d_y + d_x d_y + d_y²
        14.0
    """
    checks.instance("problem", problem, BilevelProblem, "Pass bx.BilevelProblem(outer_loss, inner_loss).")
    checks.instance("gossip", gossip, Gossip, "Pass bx.gossip(bx.topology.ring(8)).")
    steps = read_steps(step_sizes, ("x", "y"))
    checks.function("sample", sample, "key", "t", "data")
    number = 1 if terms is None else checks.count("terms", terms, minimum=1)
    if (terms is None) != (inverse_step is None):
        raise ValueError(
            f"inverse_step and terms go together; got terms={terms!r} and inverse_step={inverse_step!r}. Pass "
            f"both for a Neumann series, or none of them to invert the Hessian."
        )
    if inverse_step is not None:
        checks.scalar("inverse_step", inverse_step)
        checks.positive("inverse_step", inverse_step)
    outer_loss = checks.scalar_loss("outer_loss", problem.outer_loss)

    def evaluate(x: Any, y: Any, data: tuple[Batch, ...]) -> Tracked:
        """Q of one agent, on one draw for each factor; the first serves everything else."""
        outer_x, outer_y = jax.grad(outer_loss, argnums=(0, 1))(x, y, data[0].outer)
        flat, unravel = ravel_pytree(y)
        products = []
        for one in data:
            inner = inner_gradient(problem.inner_loss, x, y, one.inner)
            rows, hessian = jax.vmap(inner.pull_back)(jax.vmap(unravel)(jnp.eye(flat.size, dtype=flat.dtype)))
            flat_hessian = jax.vmap(lambda row: ravel_pytree(row)[0])(hessian)
            products.append((ravel_pytree(inner.gradient)[0], rows, flat_hessian))
        gradient, cross, _ = products[0]
        return Tracked(
            outer_x, ravel_pytree(outer_y)[0], gradient, cross, jnp.stack([hessian for *_, hessian in products])
        )

    def inverse(hessians: Array, b: Array) -> Array:
        if inverse_step is None:
            return jnp.linalg.solve(widen(hessians[0]), widen(b))
        term, v = b, b
        for hessian in hessians:
            term = term - inverse_step * hessian @ term
            v = v + term
        return jnp.asarray(inverse_step * v)

    def init(x: PyTree, y: PyTree, batch: Batch | None = None) -> GBDSBOState:
        check_start(gossip, x, y, batch)
        x, y = arrays(x), arrays(y)
        one = jax.tree.map(lambda leaf: leaf[0], y)
        flat = jax.eval_shape(lambda y: ravel_pytree(y)[0], one)
        n, d = len(gossip.agents()), flat.size
        vector = jnp.zeros((n, d), flat.dtype)
        cross = jax.tree.map(lambda leaf: jnp.zeros((n, d, *leaf.shape[1:]), leaf.dtype), x)
        zeros = Tracked(optax.tree.zeros_like(x), vector, vector, cross, jnp.zeros((n, number, d, d), flat.dtype))
        place = Place(problem, (x, y, ()), batch)
        moves = move(steps.x, 0, place).init(x), move(steps.y, 0, place).init(y)
        return owned(GBDSBOState(jnp.zeros((), jnp.int32), x, y, zeros, zeros, gossip.init((x, y, zeros)), moves))

    def step(key: Key | None, state: GBDSBOState, batch: Batch) -> tuple[GBDSBOState, Info]:
        check_step(gossip, key, state, GBDSBOState, batch)
        agents, key, mixing = gossip.agents(), fold(key, state.k), state.gossip
        data = tuple(draw(fold(key, DRAW + factor), sample, state.k, batch, agents) for factor in range(number))
        q = jax.vmap(evaluate)(state.x, state.y, data)
        sums = jax.tree.map(lambda m, new, old: m + (new - old).astype(m.dtype), state.mixed, q, state.last)
        t = gossip.debias(mixing, sums)
        v = jax.vmap(inverse)(t.hessians, t.outer_y)
        unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], state.y))[1]

        def outer(direct: Any, cross: Any, v: Array) -> Any:
            return jax.tree.map(lambda d, rows: (d - jnp.tensordot(v, rows, 1)).astype(d.dtype), direct, cross)

        along = jax.vmap(outer)(t.outer_x, t.cross, v), jax.vmap(unravel)(t.inner_y)
        place = Place(problem, (state.x, state.y, ()), batch, fold(key, DRAW + number), agents)
        by_x, of_x = move(steps.x, state.k, place).apply(along[0], state.moves[0], state.x)
        by_y, of_y = move(steps.y, state.k, place).apply(along[1], state.moves[1], state.y)
        point = optax.apply_updates(state.x, by_x), optax.apply_updates(state.y, by_y)
        message = *gossip.weigh(mixing, point), sums
        sent = gossip.bytes(mixing, message)
        (*point, sums), mixing = gossip.mix(fold(key, MIX), mixing, message)
        x, y = gossip.debias(mixing, tuple(point))
        ones = jnp.ones_like(agents)
        calls = Calls(ones, number * ones, number * t.inner_y.shape[1] * ones, t.inner_y.shape[1] * ones)
        info = Info(*moved(Levels(state.x, state.y, ()), Levels(x, y, ())), calls, sent, 1)
        return GBDSBOState(state.k + 1, x, y, q, sums, mixing, (of_x, of_y)), info

    return Algorithm(init, step)

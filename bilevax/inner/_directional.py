"""The estimate that forward gradients and finite differences share: u from its products with random directions."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.carried import Carried, parameters
from bilevax.inner import random_directions
from bilevax.inner._optimizer_steps import Begin, Report, check_point, diverged
from bilevax.inner.guides import Guide, Solution
from bilevax.inner.random_directions import Row, Sampler
from bilevax.meshes import bare, dot, like, ravel, zeros_like
from bilevax.printing import brief, by_shape
from bilevax.problem import Calls, InnerSolver, Iterate, SolverInfo, Start, added, arrays, norm, widen
from bilevax.sampling import check_key, needed
from bilevax.typing import Array, Key, PyTree, Scalar

_DRAW = 2**31 - 1  # folded into the key of `forward` to draw directions, beyond every step that is folded into it
FEW = 4  # tangents that are pushed at once where those of all directions would leave the cache of a CPU


class DirectionalInfo(NamedTuple):
    """How far an estimate from random directions can be trusted, measured by these directions themselves; scalars.

    Attributes:
      variance: the predicted E‖ĝ − g‖², the noise of the sampler times the mean square of the directional derivatives
        that neither guide nor control variate explains.
      relative_error: √variance / ‖u‖, with u the indirect gradient (in a chain the part that comes through this link);
        above 1 the noise is longer than the gradient. Without guide and control variate it is √noise, known beforehand.
      cosine: that of the angle between u and the span of the guesses, 0 where all are refused; None without a guide.
      step_scale: 1 / (1 + relative_error²): times the step size that suits the exact gradient, it is one that suits
        this one. (The noise shrinks with the gradient, so that convergence stays linear.)
      solves: runs of the inner solver.
      tangents: directions that were pushed through it.
      refused: guesses that were zero or not finite, in whose place an arbitrary direction was pushed, or nothing taken
        away. The estimate is unbiased all the same.

    Example:
        >>> import bilevax as bx
        >>> info = bx.inner.DirectionalInfo(4.0, 2.0, cosine=0.9, step_scale=0.2, solves=1, tangents=8, refused=0)
        >>> info.step_scale
        0.2
    """

    variance: Scalar
    relative_error: Scalar
    cosine: Scalar | None
    step_scale: Scalar
    solves: Scalar
    tangents: Scalar
    refused: Scalar

    def __repr__(self) -> str:
        return brief(self)


class DirectionalState(NamedTuple):
    """What an estimate from random directions keeps: the states of its guides, () without one.

    Example:
        >>> import bilevax as bx
        >>> bx.inner.DirectionalState(guide=(), control_variate=()).guide
        ()
    """

    guide: Any
    control_variate: Any

    def __repr__(self) -> str:
        return by_shape(self)


class Push(NamedTuple):
    """A solve of the inner problem, and its derivatives along directions of x.

    Attributes:
      solve: `solve() -> z_T`.
      along: `along(v) -> (z_T, ż_T)`, the tangents of the floating-point parts of z_T.
    """

    solve: Callable[[], Iterate]
    along: Callable[[PyTree], tuple[Iterate, Iterate]]


class Prepare(Protocol):
    """A solve from z, to be pushed; with z_T one that is already known."""

    def __call__(self, key: Key, x: PyTree, z: Iterate, batch: PyTree, z_T: Iterate | None = None) -> Push: ...


class DirectionalResidual(NamedTuple):
    """What the estimate is made from: the tangents of z_T along all directions, or None where they wait for it."""

    key: Key
    x: PyTree
    z: Iterate
    end: Iterate
    tangents: Iterate | None
    batch: PyTree


class Guesses(NamedTuple):
    """What a guide answered: vectors [k, *x] in at least float32, its state, its cost, and how many are of no use."""

    vectors: PyTree | None
    state: Any
    calls: Calls
    refused: Array


class Plan(NamedTuple):
    """Which directions are pushed, and how.

    Attributes:
      directions: b, guesses included.
      sampler: draws the others.
      guide: proposes k of the b directions, or None.
      control_variate: proposes what is taken away, or None.
      chunk: how many are pushed at once; None for all.
      axis: name of the device axis that shares the random ones, or None.
      cached: bytes of tangents that a CPU pushes at once, where no chunk is given.
    """

    directions: int
    sampler: Sampler
    guide: Guide | None
    control_variate: Guide | None
    chunk: int | None
    axis: str | tuple[str, ...] | None
    cached: float = float("inf")

    @property
    def guesses(self) -> int:
        """Those that the guide proposes."""
        return self.guide.number if self.guide else 0

    @property
    def random(self) -> int:
        """Those that are drawn."""
        return self.directions - self.guesses

    @property
    def devices(self) -> int:
        """Those that share the random ones."""
        try:
            return jax.lax.axis_size(self.axis) if self.axis else 1
        except NameError as error:
            raise ValueError(
                f"axis must be the name of a device axis around the estimate; got {self.axis!r}, which is unbound. Use "
                f"bx.parallel.shard_directions, or drop axis= on one device."
            ) from error


def fitted(plan: Plan, z: Iterate) -> Plan:
    """The plan for this z: a few at a time where the tangents of all would leave the cache of a CPU."""
    number = plan.random // plan.devices
    size = number * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tangent_leaves(z)))
    large = plan.chunk is None and number >= 2 * FEW and size > plan.cached
    return plan._replace(chunk=FEW) if large and jax.default_backend() == "cpu" else plan


def make_plan(
    directions: int,
    sampler: Sampler,
    guide: Guide | None,
    control_variate: Guide | None,
    chunk: int | None,
    axis: str | tuple[str, ...] | None,
) -> Plan:
    """Checks what a user asks for."""
    directions = checks.count("directions", directions, minimum=1)
    for name, given in (("guide", guide), ("control_variate", control_variate)):
        if given is not None:
            checks.instance(name, given, Guide, "Pass, say, bx.inner.guides.blocks(4).")
            checks.function(f"{name}.propose", given.propose, "key", "state", "x", "solution")
    if guide is not None and guide.number >= directions:
        raise ValueError(
            f"directions must be more than the {guide.number} guesses of the guide, or the estimate is biased; got "
            f"{directions}. Pass directions={guide.number + 1} or more."
        )
    if control_variate is not None and control_variate.number != 1:
        raise ValueError(
            f"control_variate must propose one guess; got one with {control_variate.number}. Pass it as guide."
        )
    if chunk is not None:
        chunk = checks.count("chunk", chunk, minimum=1)
    return Plan(directions, sampler, guide, control_variate, chunk, axis)


def no_loss(x: PyTree, y: PyTree, batch: PyTree) -> Array | tuple[Array, PyTree]:
    """Stands for an inner loss that is not known, of which nothing is reported."""
    return (jnp.zeros(()), y.carried) if isinstance(y, Carried) else jnp.zeros(())


def tangent_leaves(z: Iterate) -> Iterate:
    """The floating-point leaves of each part, those that have a tangent, as lists; none of what y carries."""
    z = z._replace(y=parameters(z.y))
    parts = ([leaf for leaf in jax.tree.leaves(part) if jnp.issubdtype(leaf.dtype, jnp.inexact)] for part in z)
    return Iterate(*parts)


def directional(
    start: Start,
    prepare: Prepare,
    report: Report,
    plan: Plan,
    solves: Callable[[Plan], int],
    calls: Callable[[int, int], Calls],
    reports: bool,
    fresh: bool,
) -> InnerSolver:
    """An inner solver that estimates x_bar from directional derivatives.

    Args:
      start: `start(x, y) -> z`.
      prepare: `prepare(key, x, z, batch, z_T=None) -> Push`; z_T where the solve is already known.
      report: `report(key, data, x, z_T) -> (g, ‖∇_y g‖)`.
      plan: of the directions.
      solves: `solves(plan)`, runs of the inner solver.
      calls: `calls(solves, tangents) -> Calls` of these.
      reports: whether there is anything to report: a gradient, evaluated before and after the steps.
      fresh: whether `start` makes y out of x.

    Returns:
      An `InnerSolver`.
    """

    def init(x: PyTree, y: PyTree, batch: PyTree = None) -> DirectionalState:
        """The memories of the guides, for this inner data; what is to be pushed is checked against x."""
        check_point(x, y)
        if plan.guesses > (size := optax.tree.size(x)):
            raise ValueError(
                f"guide must propose at most as many guesses as x has entries, {size}; got {plan.guesses}. Without it, "
                f"directions={size} with sampler=random_directions.coordinate is exact."
            )
        random_directions.check_sampler(plan.sampler, x, plan.random)
        guides = (plan.guide, plan.control_variate)
        return DirectionalState(*(guide.init(x, y, batch) if guide else () for guide in guides))

    def forward(
        key: Key | None, state: DirectionalState, x: PyTree, z: Iterate, batch: PyTree
    ) -> tuple[Iterate, DirectionalResidual, DirectionalState]:
        """z_T, of the shapes of z; its tangents [b, ...] along the random directions of x, unless in chunks."""
        check_key(key)
        key = needed(key, "random directions")
        x = arrays(x)
        push, (row, indices) = prepare(key, x, z, batch), _rows(key, x, plan)
        if fitted(plan, z).chunk is None:
            z_T, tangents = jax.vmap(lambda i: push.along(row(i)), out_axes=(None, 0))(indices)
        else:  # pushed in the backward pass, where they shrink to numbers
            z_T, tangents = push.solve(), None
        return z_T, DirectionalResidual(key, x, z, z_T, tangents, batch), state

    # x = {w [3, 2], b [2]}, N = 8 entries; y [5]; 6 directions, of which a guide guesses k = 2:
    #   tangents ż [4, 5] of the 4 random rows, from the forward pass; along = ⟨z_bar, ż⟩ [4]
    #   guesses and basis {w [2, 3, 2], b [2, 2]}; exact [2], the derivatives along the basis; known and x_bar as x
    # The rows themselves are not kept: row(i) draws one again from the key. With chunks their tangents are pushed here,
    # [chunk, 5] at a time.
    def backward(
        residual: DirectionalResidual, state: DirectionalState, z_bar: Iterate
    ) -> tuple[tuple[PyTree, Iterate], DirectionalState, SolverInfo]:
        """x_bar like x, the estimate from b products ⟨z_bar, ż_T⟩; z0_bar is zeros like y."""
        key, x, z, z_T, tangents, batch = residual
        fit = fitted(plan, z)
        solution, (row, indices) = Solution(z, z_T, z_bar, batch), _rows(key, x, plan)
        push, zeros = prepare(key, x, z, batch, z_T), zeros_like(widen(x))

        def derivatives(row: Row, indices: Array) -> Array:
            return _over(lambda i: _product(z_bar, push.along(row(i))[1]), indices, fit.chunk)

        shift, guesses = (
            _ask(guide, key, kept, x, solution) if guide else Guesses(None, (), Calls(), jnp.zeros((), int))
            for guide, kept in ((plan.control_variate, state.control_variate), (plan.guide, state.guide))
        )
        basis = None if guesses.vectors is None else _orthonormal(guesses.vectors)
        known = zeros if shift.vectors is None else _outside(basis, _entry(shift.vectors, 0))
        explained = None
        if basis is not None:
            length = optax.tree.size(x) ** 0.5  # that of a random direction, for the sake of finite differences
            columns = optax.tree.cast_like(optax.tree.scale(length, basis), x)
            exact = derivatives(lambda j: _entry(columns, j), jnp.arange(plan.guesses)) / length
            known, explained = optax.tree.add(known, _combine(exact, basis)), jnp.sum(exact**2)

        along = derivatives(row, indices) if tangents is None else jax.vmap(lambda one: _product(z_bar, one))(tangents)
        estimate, variance, square = _estimate(known, along, basis, row, indices, fit)
        x_bar = optax.tree.cast_like(estimate, x)
        cosine = None
        if explained is not None:
            square = jnp.maximum(square, explained)
            cosine = jnp.where(guesses.refused < plan.guesses, jnp.sqrt(_ratio(explained, square)), 0)
        relative = _ratio(variance, square)
        runs, refused = solves(fit), guesses.refused + shift.refused
        detail = DirectionalInfo(
            *(variance, jnp.sqrt(relative), cosine, 1 / (1 + relative), runs, plan.directions, refused)
        )
        seen: tuple[Array | None, Array | None] = (None, None)
        breakdown = ~jnp.isfinite(norm(tangent_leaves(z_T)) + norm(x_bar))
        if reports:
            begin, seen = Begin(jnp.asarray(True), *report(key, batch, x, z)), (end := report(key, batch, x, z_T))
            breakdown |= diverged(begin, *end)
        each = added(Calls(inner_gradients=2 * reports), added(shift.calls, guesses.calls))
        total = added(calls(runs, plan.directions), optax.tree.scale(plan.devices, each))
        states = (
            guide.update(asked.state, x_bar) if guide else ()
            for guide, asked in ((plan.guide, guesses), (plan.control_variate, shift))
        )
        info = SolverInfo(*seen, breakdown, total, detail)
        return (x_bar, Iterate(zeros_like(parameters(z.y)))), DirectionalState(*states), info

    return InnerSolver(init, start, forward, backward, pushes_tangents=True, fresh=fresh)


def _rows(key: Key, x: PyTree, plan: Plan) -> tuple[Row, Array]:
    """Draws the random directions, and counts those of this device."""
    if plan.random % plan.devices:
        raise ValueError(
            f"directions must be a multiple of the {plan.devices} devices that share them, besides the guesses of the "
            f"guide; got {plan.random} random ones. Pass directions={plan.guesses + plan.devices}, say."
        )
    local = plan.random // plan.devices
    indices = jnp.arange(local)
    if plan.axis:
        device = jax.lax.axis_index(plan.axis)
        if jax.typeof(device) != jax.typeof(jnp.zeros((), device.dtype)):
            raise ValueError(
                f"axis={plan.axis!r} must be one of jax.shard_map(..., check_vma=False): with its checks, derivatives "
                f"at values that all devices share would be summed over them. Use bx.parallel.shard_directions."
            )
        indices += device * local
    row = plan.sampler.draw(jax.random.fold_in(key, _DRAW), bare(x), plan.random)
    return lambda i: like(row(i), x), indices


def _over(function: Callable[[Array], PyTree], indices: Array, chunk: int | None) -> PyTree:
    """The function of each index, in chunks; one after the other (no vmap) where a chunk is one."""
    if chunk is None:
        return jax.vmap(function)(indices)
    return jax.lax.map(function, indices, batch_size=None if chunk == 1 else chunk)


def _product(z_bar: Iterate, z_dot: Iterate) -> Array:
    """⟨z_bar, ż⟩; a part of z_bar that is None is zero."""
    pairs = (
        pair
        for bar, dots in zip(z_bar, z_dot, strict=True)
        if bar is not None
        for pair in zip(tangent_leaves(Iterate(bar)).y, dots, strict=True)
    )
    products = (dot(widen(bar), widen(tangent)) for bar, tangent in pairs)
    return jnp.asarray(sum(products))


def _combine(weights: Array, vectors: PyTree) -> PyTree:
    """Σ weights_i vectors_i for leaves [i, ...]."""
    highest = jax.lax.Precision.HIGHEST
    return jax.tree.map(
        lambda leaf: jnp.tensordot(weights.astype(leaf.dtype), leaf, 1, precision=highest), widen(vectors)
    )


def _sum(weights: Array, row: Row, indices: Array, chunk: int | None) -> PyTree:
    """Σ weights_i row(i), drawn once more; with chunks one at a time."""
    if chunk is None:
        return _combine(weights, jax.vmap(row)(indices))

    def add(total: PyTree, entry: tuple[Array, Array]) -> tuple[PyTree, None]:
        weight, i = entry
        return jax.tree.map(lambda sum, leaf: sum + weight.astype(leaf.dtype) * leaf, total, widen(row(i))), None

    zeros = optax.tree.zeros_like(jax.eval_shape(lambda: widen(row(0))))
    return jax.lax.scan(add, zeros, (weights, indices))[0]


def _entry(stacked: PyTree, i: Scalar) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[i], stacked)


def _ratio(part: Array, whole: Array) -> Array:
    """Part / whole, 0 of 0."""
    return part / jnp.where(part == 0, 1, whole)


def _ask(guide: Guide, key: Key, state: Any, x: PyTree, solution: Solution) -> Guesses:
    """What a guide proposes; guesses that are not finite become zero."""
    vectors, state, calls = guide.propose(key, state, x, solution)
    expected = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((guide.number, *leaf.shape), leaf.dtype), x)
    fix = "Return from propose(key, state, x, solution) leaves [number, *x], the state, and bx.problem.Calls()."
    checks.same_shapes("guesses of a guide", vectors, expected, fix)
    vectors = jax.vmap(lambda one: like(one, x))(vectors)
    lengths = jax.vmap(norm)(vectors)

    def clean(leaf: Array) -> Array:
        return jnp.where(jnp.isfinite(lengths).reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0)

    refused = jnp.sum(~(jnp.isfinite(lengths) & (lengths > 0)))
    return Guesses(jax.tree.map(clean, widen(vectors)), state, calls, refused)


def _orthonormal(guesses: PyTree) -> PyTree:
    """An orthonormal basis [k, ...] that spans the guesses [k, ...].

    Guesses that are zero or depend on others are made up for by further vectors, which do no harm.
    """
    # w [2, 3, 2], b [2, 2] -> unit vectors, one row for each guess [2, 8] -> Q of the QR of its transpose [8, 2], whose
    # columns are orthonormal also where the guesses are not independent -> [2, 8] -> w [2, 3, 2], b [2, 2]
    lengths = jax.vmap(norm)(guesses)
    unit = jax.vmap(optax.tree.scale)(1 / jnp.where(lengths > 0, lengths, 1), guesses)
    unravel = ravel(_entry(unit, 0))[1]
    return jax.vmap(unravel)(jnp.linalg.qr(jax.vmap(lambda one: ravel(one)[0])(unit).T)[0].T)


def _inside(basis: PyTree, tree: PyTree) -> Array:
    return jax.vmap(lambda one: dot(one, tree))(basis)


def _outside(basis: PyTree | None, tree: PyTree) -> PyTree:
    """The projection of a tree to the orthogonal complement of the basis."""
    return tree if basis is None else optax.tree.sub(tree, _combine(_inside(basis, tree), basis))


def _estimate(
    known: PyTree, along: Array, basis: PyTree | None, row: Row, indices: Array, plan: Plan
) -> tuple[PyTree, Array, Array]:
    """Estimates of u, of its own variance and of ‖u‖², from what is known and what the rows say beyond it."""
    # 4 random rows: along [4] is u · v_i, unknown [4] what known · v_i leaves of it, rest = 1/4 Σ unknown_i v_i without
    # its part in the basis. E v vᵀ = I, so E unknown_i² = ‖u − known‖², and `unexplained` is their mean [].
    unknown = along - _over(lambda i: dot(widen(row(i)), known), indices, plan.chunk)
    rest, unexplained = _mean((_sum(unknown, row, indices, plan.chunk), jnp.sum(unknown**2)), plan)
    rest = _outside(basis, rest)
    share = jnp.ones(()) if basis is None else _share_outside(basis, unknown, row, indices, plan)
    variance = plan.sampler.noise(optax.tree.size(known), plan.random) * share * unexplained
    # u = known + (u − known), whose second part has the length √unexplained: that bounds their product
    length = optax.tree.norm(known)
    most = length * jnp.sqrt(unexplained)
    square = length**2 + 2 * jnp.clip(dot(known, rest), -most, most) + unexplained
    return optax.tree.add(known, rest), variance, square


def _share_outside(basis: PyTree, unknown: Array, row: Row, indices: Array, plan: Plan) -> Array:
    """The part of the noise that the projection leaves, 1 − k/N on average over the guesses."""

    # With r = u − known, (v · r) v misses r by (v · r)² (‖v‖² − 1) in the mean square, and (v · r)² ‖Qᵀv‖² of it lie in
    # the basis Q, where r has nothing. For N = 8 and k = 2, ‖v‖² = 8 and ‖Qᵀv‖² is about 2: some 3/4 are left.
    def squares(i: Scalar) -> tuple[Array, Array]:
        v = widen(row(i))
        return jnp.sum(_inside(basis, v) ** 2), optax.tree.norm(v, squared=True) - 1

    inside, all_but_one = (unknown**2 @ part for part in _over(squares, indices, plan.chunk))
    inside, all_but_one = _mean((inside, all_but_one), plan)
    some = all_but_one > 0
    return 1 - jnp.where(some, inside / jnp.where(some, all_but_one, 1), 0)


def _mean(sums: PyTree, plan: Plan) -> PyTree:
    """Sums over the rows of this device, made means over all."""
    return optax.tree.scale(1 / plan.random, jax.lax.psum(sums, plan.axis) if plan.axis else sums)

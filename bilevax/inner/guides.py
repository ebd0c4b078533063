"""Guesses of a hypergradient, from which a random estimate of it gets less noise and no bias.

A forward gradient pushes tangents in b directions. A `Guide` proposes k of them, c_1 ... c_k, from what is known before
they are pushed: x, the iterates, their cotangent. Two uses, both unbiased for ANY guess, with u the indirect gradient:

    guide             Q = orthonormal basis of the guesses, and the other b − k directions at random, r
                      ĝ = Q Qᵀu + (1/(b−k)) Σ (v · u) v,   v = (I − Q Qᵀ) r        E‖ĝ − u‖² ≈ noise ‖u − Q Qᵀu‖²
    control variate   ĝ = c + (1/b) Σ (v · u − v · c) v                            E‖ĝ − u‖² = noise ‖u − c‖²

A guide needs only the direction of the guess, and with one guess it divides the noise by about 1/(1 − cos²). A control
variate needs its length too: it makes things worse where ‖u − c‖ > ‖u‖, as with the too short or too long steps of a
damped inverse, and pays where the guess converges to u (a running mean), since no direction is spent on it.

Good guesses: `at_solution(implicit(ihvp=kfac()))` near a minimum; `from_start` of a truncated unroll anywhere;
`blocks` where x is a smooth schedule; `running_mean` where x moves slowly; `several` of them.

Reference: Shen et al., arXiv 2406.14095, for the forward gradient; Maheswaranathan et al., arXiv 1806.10230, and Meier
et al., arXiv 1910.05268, for search directions from guesses; Mishchenko et al., arXiv 1901.09269, for the running mean
as control variate (DIANA's shift).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from bilevax import checks
from bilevax.inner._optimizer_steps import full_cotangent
from bilevax.meshes import bare, zeros_like
from bilevax.printing import as_called, by_text
from bilevax.problem import Calls, InnerSolver, Iterate, SolverInit, added, arrays
from bilevax.typing import Key, PyTree, Scalar

__all__ = ["Guide", "Solution", "at_solution", "blocks", "fixed", "from_start", "running_mean", "several"]


def __dir__() -> list[str]:
    return __all__


_AT_SOLUTION = 2**31 - 2  # folded into the key of the guided solver, beyond every step that is folded into it


class Solution(NamedTuple):
    """What a guide may read: a solve of the inner problem, before any tangent was pushed through it.

    Attributes:
      start: z_0, an `Iterate`.
      end: z_T.
      cotangent: of z_T.
      batch: that of the inner problem.

    Example:
        >>> import bilevax as bx
        >>> begin, end, cotangent = (bx.problem.Iterate(y) for y in (0.0, 1.0, 2.0))
        >>> bx.inner.guides.Solution(begin, end, cotangent, None).end.y
        1.0
    """

    start: Iterate
    end: Iterate
    cotangent: Iterate
    batch: PyTree


def _keep(state: Any, estimate: PyTree) -> Any:
    return state


class Propose(Protocol):
    """`propose(key, state, x, solution) -> (guesses, state, Calls)`, a function of yours or of this module."""

    def __call__(self, key: Key, state: Any, x: PyTree, solution: Solution, /) -> tuple[PyTree, Any, Calls]: ...


class Guide(NamedTuple):
    """A proposal of directions, as pure functions.

    Attributes:
      init: `init(x, y, batch=None) -> state`.
      propose: `propose(key, state, x, solution) -> (guesses, state, Calls)`: leaves [k, *x], from the key of the solve,
        and what it cost. Guesses that are not finite are taken for zero.
      number: k.
      update: `update(state, estimate) -> state`, told the estimate that came out.
      text: what `print` shows.

    Example:
        >>> import bilevax as bx
        >>> bx.inner.guides.blocks(4).number
        4
    """

    init: SolverInit
    propose: Propose
    number: int = 1
    update: Callable[[Any, PyTree], Any] = _keep
    text: str = ""

    def __repr__(self) -> str:
        return by_text(self)


def _single(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tree)


def _check_solver(name: str, solver: InnerSolver) -> None:
    checks.instance("solver", solver, InnerSolver, "Pass, say, bx.inner.implicit(inner_loss, ihvp=bx.ihvp.kfac()).")
    if solver.pushes_tangents:
        raise ValueError(
            f"solver of guides.{name} must not push random directions itself; got one that does, whose guess would "
            f"depend on the directions it guides. Take inner.implicit, or a truncated inner.reverse."
        )


@as_called
def at_solution(solver: InnerSolver) -> Guide:
    """The hypergradient that another solver gives at the solution, as a guess.

        c = x_bar of `solver`, started at y_T

    Args:
      solver: without steps of its own: `inner.implicit(inner_loss, ihvp=bx.ihvp.kfac())`, with any IHVP. It keeps its
        state (v, factors) from one outer step to the next.

    Returns:
      A `Guide` with one guess.

    Raises:
      ValueError: if solver is none, or one that pushes random directions.

    Cost: that of the solver.

    Example:
        >>> import bilevax as bx, jax, optax
        >>> loss = lambda x, y, batch: 0.5 * ((y - x) ** 2).sum()
        >>> guide = bx.inner.guides.at_solution(bx.inner.implicit(loss, ihvp=bx.ihvp.identity()))
        >>> solver = bx.inner.forward_gradient(loss, optax.sgd(0.5), 4, directions=2, guide=guide)
        >>> hypergrad = bx.hypergradient(lambda x, y, batch: (y * batch).sum(), solver)
        >>> x, batch = jax.numpy.zeros(3), bx.Batch(jax.numpy.array([1.0, 2.0, 3.0]), None)
        >>> grad, _, info = jax.jit(hypergrad.estimate)(jax.random.key(0), hypergrad.init(x, x), x, batch)
        >>> [round(g, 4) for g in grad.tolist()], round(float(info.inner.detail.cosine), 4)
        ([0.9375, 1.875, 2.8125], 1.0)
    """
    _check_solver("at_solution", solver)

    def propose(key: Key, state: Any, x: PyTree, solution: Solution) -> tuple[PyTree, Any, Calls]:
        z = solver.start(x, solution.end.y)._replace(t=solution.end.t)
        _, residual, state = solver.forward(jax.random.fold_in(key, _AT_SOLUTION), state, x, z, solution.batch)
        (x_bar, _), state, info = solver.backward(residual, state, Iterate(solution.cotangent.y))
        return _single(x_bar), state, info.calls

    return Guide(solver.init, propose)


@as_called
def from_start(solver: InnerSolver) -> Guide:
    """The hypergradient that another solver gives when it solves the inner problem once more, as a guess.

        c = x_bar of `solver`, started at z_0, and what z0_bar adds through `initial`

    It gets the same key: with the same loss, optimizer and sampler it makes the same steps to the same y_T.

    Args:
      solver: a truncated unroll, `chain(no_gradient(steps=T - K), reverse(steps=K))`, or any other.

    Returns:
      A `Guide` with one guess.

    Raises:
      ValueError: if solver is none, or one that pushes random directions.

    Cost: that of the solver: T gradients, and memory for K states in a truncated unroll.

    Example:
        >>> import bilevax as bx, jax, optax
        >>> loss, sgd = lambda x, y, batch: 0.5 * ((y - x) ** 2).sum(), optax.sgd(0.5)
        >>> truncated = bx.inner.chain(bx.inner.no_gradient(loss, sgd, 3), bx.inner.reverse(loss, sgd, 1))
        >>> guide = bx.inner.guides.from_start(truncated)
        >>> solver = bx.inner.forward_gradient(loss, sgd, 4, directions=2, guide=guide)
        >>> hypergrad = bx.hypergradient(lambda x, y, batch: (y * batch).sum(), solver)
        >>> x, batch = jax.numpy.zeros(3), bx.Batch(jax.numpy.array([1.0, 2.0, 3.0]), None)
        >>> grad, _, _ = jax.jit(hypergrad.estimate)(jax.random.key(0), hypergrad.init(x, x), x, batch)
        >>> [round(g, 4) for g in grad.tolist()]
        [0.9375, 1.875, 2.8125]
    """
    _check_solver("from_start", solver)

    def propose(key: Key, state: Any, x: PyTree, solution: Solution) -> tuple[PyTree, Any, Calls]:
        _, residual, state = solver.forward(key, state, x, solution.start, solution.batch)
        (x_bar, z0_bar), state, info = solver.backward(residual, state, solution.cotangent)
        _, pull_start = jax.vjp(lambda x: solver.start(x, solution.start.y), x)
        (start_bar,) = pull_start(full_cotangent(z0_bar, solution.start))
        return _single(optax.tree.add(x_bar, start_bar)), state, info.calls

    return Guide(solver.init, propose)


@as_called
def blocks(number: int) -> Guide:
    """Block-constant vectors: the entries of x, in order, in blocks of about one length.

    For schedules and other x whose neighbours move alike.

    Args:
      number: k >= 1, of blocks.

    Returns:
      A `Guide` with k guesses.

    Raises:
      ValueError: if number < 1; from `init`, if x has fewer entries.

    Cost: k vectors like x.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> bx.inner.guides.blocks(2).propose(None, (), jnp.zeros(5), None)[0].tolist()
        [[1.0, 1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 1.0]]
    """
    number = checks.count("number", number, minimum=1)

    def init(x: PyTree, y: PyTree, batch: PyTree = None) -> tuple[()]:
        if (size := optax.tree.size(x)) < number:
            raise ValueError(f"number of blocks must be at most the {size} entries of x; got {number}. Pass {size}.")
        return ()

    def propose(key: Key, state: tuple[()], x: PyTree, solution: Solution) -> tuple[PyTree, tuple[()], Calls]:
        flat, unravel = ravel_pytree(bare(x))
        block = jnp.arange(flat.size) * number // flat.size
        return jax.vmap(lambda i: unravel((block == i).astype(flat.dtype)))(jnp.arange(number)), state, Calls()

    return Guide(init, propose, number)


@as_called
def running_mean(rate: Scalar) -> Guide:
    """The running mean of past estimates.

        c ← c + rate (ĝ − c),   c = 0 at first

    Args:
      rate: in (0, 1]. As a control variate with rate b / (b + N) it is DIANA's shift.

    Returns:
      A `Guide` with one guess. Estimates that are not finite do not enter it.

    Raises:
      ValueError: if rate is not in (0, 1]; from `estimate`, if x does not look like that of `init`.

    Cost: one vector like x, in the state.

    Example:
        >>> import bilevax as bx
        >>> guide = bx.inner.guides.running_mean(0.25)
        >>> float(guide.update(guide.init(0.0, 0.0), 8.0))
        2.0
    """
    checks.fraction("rate", rate)

    def init(x: PyTree, y: PyTree, batch: PyTree = None) -> PyTree:
        return zeros_like(arrays(x))

    def propose(key: Key, state: PyTree, x: PyTree, solution: Solution) -> tuple[PyTree, PyTree, Calls]:
        checks.same_shapes("x", x, state, "Call init(x, y) again, or pass the x that belongs to this state.")
        return _single(state), state, Calls()

    def update(state: PyTree, estimate: PyTree) -> PyTree:
        mean = optax.tree.add_scale(state, rate, optax.tree.sub(estimate, state))
        finite = jnp.isfinite(optax.tree.norm(mean))
        return optax.tree.cast_like(optax.tree.where(finite, mean, state), state)

    return Guide(init, propose, 1, update)


@as_called
def fixed(directions: PyTree) -> Guide:
    """Guesses that never change.

    Args:
      directions: leaves [k, *x].

    Returns:
      A `Guide` with k guesses.

    Raises:
      ValueError: if the leaves have no common first axis; from `init`, if they do not look like x behind it.

    Cost: none.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> bx.inner.guides.fixed(jnp.eye(3)[:2]).number
        2
    """
    checks.floating("directions", directions)
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(directions)}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise ValueError(
            f"directions must have leaves [k, *x] of one k >= 1; got first axes {sorted(lengths)}. Stack them with "
            f"jax.tree.map(lambda *leaves: jnp.stack(leaves), ...)."
        )
    ((number,),) = lengths

    def init(x: PyTree, y: PyTree, batch: PyTree = None) -> tuple[()]:
        one = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], directions)
        checks.same_shapes("directions of guides.fixed", one, x, "Pass leaves [k, *x].")
        return ()

    def propose(key: Key, state: tuple[()], x: PyTree, solution: Solution) -> tuple[PyTree, tuple[()], Calls]:
        return directions, state, Calls()

    return Guide(init, propose, number)


@as_called
def several(*guides: Guide) -> Guide:
    """The guesses of several guides together; the estimate is exact along each of them.

    Args:
      guides: one or more.

    Returns:
      A `Guide` with the sum of their numbers.

    Raises:
      ValueError: if there is none, or one is no `Guide`.

    Cost: the sum of theirs.

    Example:
        >>> import bilevax as bx
        >>> bx.inner.guides.several(bx.inner.guides.blocks(4), bx.inner.guides.running_mean(0.1)).number
        5
    """
    if not guides:
        raise ValueError("guides must be one Guide or more; got none. Pass, say, bx.inner.guides.blocks(4).")
    for guide in guides:
        checks.instance(
            "guides", guide, Guide, "Pass, say, bx.inner.guides.blocks(4), bx.inner.guides.running_mean(0.1)."
        )

    def init(x: PyTree, y: PyTree, batch: PyTree = None) -> tuple[Any, ...]:
        return tuple(guide.init(x, y, batch) for guide in guides)

    def propose(
        key: Key, state: tuple[Any, ...], x: PyTree, solution: Solution
    ) -> tuple[PyTree, tuple[Any, ...], Calls]:
        parts = [guide.propose(key, part, x, solution) for guide, part in zip(guides, state, strict=True)]
        guesses, states, calls = zip(*parts, strict=True)
        together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *guesses)
        return together, states, functools.reduce(added, calls)

    def update(state: tuple[Any, ...], estimate: PyTree) -> tuple[Any, ...]:
        return tuple(guide.update(part, estimate) for guide, part in zip(guides, state, strict=True))

    return Guide(init, propose, sum(guide.number for guide in guides), update)

"""What an agent evaluates: the directions along which its own losses ask x, y and v to move.

| local directions | d_y    | d_v                       | d_x                                            | levels  |
|------------------|--------|---------------------------|------------------------------------------------|---------|
| `second_order`   | ∇_y g  | ∇²_yy g v − ∇_y f         | ∇_x f − ∇²_xy g v                              | x, y, v |
| `first_order`    | ∇_y g  | the same by differences of ∇_y g and ∇_x g at y ± δ v                    || x, y, v |
| `own_neumann`    | ∇_y g  | none                      | ∇_x f − ∇²_xy g · (Neumann series of ∇_y f)    | x, y    |
"""

from typing import Any, NamedTuple, Protocol

import jax
import optax

from bilevax import checks, ihvp
from bilevax.printing import as_called, by_text
from bilevax.problem import Batch, BilevelProblem, Calls, Directions, directions, inner_gradient
from bilevax.typing import PyTree, Scalar

__all__ = [
    "LocalDirections",
    "first_order",
    "own_neumann",
    "second_order",
]


def __dir__() -> list[str]:
    return __all__


class Evaluate(Protocol):
    """The directions of one agent at a point; v is () where there is none."""

    def __call__(self, problem: BilevelProblem, x: PyTree, y: PyTree, v: PyTree, batch: Batch) -> Directions: ...


class DeclaredCalls(Protocol):
    """What one evaluation costs, for the levels of a group, where `seen` were evaluated at the same (x, y)."""

    def __call__(self, group: tuple[str, ...], seen: tuple[str, ...]) -> Calls: ...


class LocalDirections(NamedTuple):
    """The directions of one agent at a point, and what they cost.

    Attributes:
      evaluate: `evaluate(problem, x, y, v, batch) -> Directions`, for one agent.
      calls: `calls(group, seen) -> Calls` of one evaluation for the levels of a group, such as ("x", "y", "v"), where
        `seen` are the levels that groups since the last move of y have evaluated at the same (x, y).
      levels: those that move; without "v" it is () everywhere.
      text: what `print` shows.

    Example:
        >>> import bilevax as bx
        >>> bx.single_loop.local_directions.own_neumann(terms=3, inverse_step=0.5).levels  # there is no v
        ('x', 'y')
    """

    evaluate: Evaluate
    calls: DeclaredCalls
    levels: tuple[str, ...] = ("x", "y", "v")
    text: str = ""

    def __repr__(self) -> str:
        return by_text(self)


@as_called
def second_order() -> LocalDirections:
    """The three directions, from one pull-back of v; the default of every single-loop method.

        d_y = ∇_y g          d_v = ∇²_yy g v − ∇_y f          d_x = ∇_x f − ∇²_xy g v

    Returns:
      `LocalDirections`.

    Cost: one ∇f, one ∇_y g, one Hessian and one cross product, which share a pull-back where x and v move at once.

    Reference: Dagréou et al., arXiv 2201.13409; see `bx.problem.directions`.

    Example:
        >>> import bilevax as bx
        >>> problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2)
        >>> d = bx.single_loop.local_directions.second_order().evaluate(problem, 3.0, 3.0, 3.0, bx.Batch(None, None))
        >>> float(d.x), float(d.y), float(d.v)
        (6.0, 0.0, 0.0)
    """

    def calls(group: tuple[str, ...], seen: tuple[str, ...]) -> Calls:
        return Calls(_outer(group, seen), int(not seen), int("v" in group), int("x" in group))

    return LocalDirections(directions, calls)


@as_called
def first_order(mu: Scalar) -> LocalDirections:
    """The three directions from first derivatives alone.

        d_y = ∇_y g(x, y)
        d_v = [∇_y g(x, y + δ v) − ∇_y g(x, y − δ v)] / 2δ − ∇_y f
        d_x = ∇_x f − [∇_x g(x, y + δ v) − ∇_x g(x, y − δ v)] / 2δ

    Its error is of order δ² ‖v‖³, and none for a quadratic g; rounding adds about 10⁻⁷ ‖∇g‖ / δ in float32.

    Args:
      mu: δ > 0.

    Returns:
      `LocalDirections`.

    Raises:
      ValueError: if a concrete `mu` is not positive.

    Cost: one ∇f and three ∇g (one at y, two at y ± δ v), no second derivative; with levels that move in turn, the two
    of x are not those of v.

    Reference: Kong et al., arXiv 2402.03167 (D-SOBA-FO).

    Example:
        >>> import bilevax as bx
        >>> problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2)
        >>> d = bx.single_loop.local_directions.first_order(0.5).evaluate(problem, 3.0, 3.0, 3.0, bx.Batch(None, None))
        >>> float(d.x), float(d.y), float(d.v)
        (6.0, 0.0, 0.0)
    """
    checks.scalar("mu", mu)
    checks.positive("mu", mu)

    def evaluate(problem: BilevelProblem, x: Any, y: Any, v: Any, batch: Batch) -> Directions:
        outer_loss = checks.scalar_loss("outer_loss", problem.outer_loss)
        inner_loss = checks.scalar_loss("inner_loss", problem.inner_loss)
        outer_x, outer_y = jax.grad(outer_loss, argnums=(0, 1))(x, y, batch.outer)
        gradient = jax.grad(inner_loss, argnums=(0, 1))
        above, below = (gradient(x, optax.tree.add_scale(y, step, v), batch.inner) for step in (mu, -mu))
        cross, hessian = optax.tree.scale(1 / (2 * mu), optax.tree.sub(above, below))
        d = Directions(optax.tree.sub(outer_x, cross), gradient(x, y, batch.inner)[1], optax.tree.sub(hessian, outer_y))
        return Directions(*(optax.tree.cast_like(part, like) for part, like in zip(d, (x, y, y), strict=True)))

    def calls(group: tuple[str, ...], seen: tuple[str, ...]) -> Calls:
        return Calls(_outer(group, seen), int("y" in group) + 2 * bool({"x", "v"} & {*group}))

    return LocalDirections(evaluate, calls)


@as_called
def own_neumann(*, terms: int, inverse_step: Scalar) -> LocalDirections:
    """The hypergradient of each agent with the inverse of its OWN Hessian, by a Neumann series; there is no v.

        d_y = ∇_y g          d_x = ∇_x f − ∇²_xy g · c Σ_{j=0}^{J} (I − c ∇²_yy g)ʲ ∇_y f

    The inverse of a mean Hessian is not the mean of inverses: with one common y, the agents' mean of d_x is not the
    hypergradient of the mean losses unless the agents are alike. It is right where every agent has its own y.

    Args:
      terms: J, the number of Hessian products, >= 0. The error shrinks as (1 − c μ)^(J+1).
      inverse_step: c in (0, 2 / λ_max(∇²_yy g)), usually 1 / L.

    Returns:
      `LocalDirections` with the levels x and y.

    Raises:
      ValueError: if `terms` < 0 or a concrete `inverse_step` is not positive.

    Cost: one ∇f, one ∇_y g, J Hessian products and one cross product.

    Reference: the local estimates of MDBO, see `bx.decentralized.mdbo`; the whole series in place of one random term.

    Example:
        >>> import bilevax as bx
        >>> problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2)
        >>> rule = bx.single_loop.local_directions.own_neumann(terms=0, inverse_step=0.5)  # exact for a Hessian of 2
        >>> float(rule.evaluate(problem, 3.0, 3.0, (), bx.Batch(None, None)).x)
        6.0
    """
    terms = checks.count("terms", terms)
    checks.scalar("inverse_step", inverse_step)
    checks.positive("inverse_step", inverse_step)

    def evaluate(problem: BilevelProblem, x: Any, y: Any, v: Any, batch: Batch) -> Directions:
        outer_loss = checks.scalar_loss("outer_loss", problem.outer_loss)
        outer_x, outer_y = jax.grad(outer_loss, argnums=(0, 1))(x, y, batch.outer)
        inner = inner_gradient(problem.inner_loss, x, y, batch.inner)

        def product(v: Any) -> Any:
            return inner.pull_back(optax.tree.cast_like(v, y))[1]

        series = ihvp.neumann(terms=terms, step_size=inverse_step, curvature=lambda *point: product)
        apply, _ = series.prepare(None, (), problem.inner_loss, (x, y, batch.inner))
        cross, _ = inner.pull_back(apply(outer_y)[0])
        return Directions(optax.tree.sub(outer_x, cross), inner.gradient, None)

    def calls(group: tuple[str, ...], seen: tuple[str, ...]) -> Calls:
        moves_x = "x" in group
        return Calls(int(moves_x), int(not seen), terms * moves_x, int(moves_x))

    return LocalDirections(evaluate, calls, levels=("x", "y"))


def _outer(group: tuple[str, ...], seen: tuple[str, ...]) -> int:
    """One ∇f where x or v moves, unless it is known at this (x, y)."""
    return int(bool({"x", "v"} & {*group}) and not {"x", "v"} & {*seen})

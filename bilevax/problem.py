"""The nouns of bilevel optimization, and the three directions that every method is built from.

    min_x  F(x) = f(x, y*(x))      with   y*(x) = argmin_y g(x, y)
    ∇F(x) = ∇_x f − ∇²_xy g · v     with   [∇²_yy g] v = ∇_y f

`x` is the outer variable, `y` the inner variable, `f` the outer loss, `g` the inner loss and `v` the
inverse-Hessian-vector product; outer means upper level, inner means lower level. Any pytree of floating-point arrays is
a valid x, y or v. Losses have ONE signature, `loss(x, y, batch) -> scalar`, and `batch` is any pytree. (Where y is a
`bx.inner.Carried(params, carried)`, the inner loss returns `(scalar, new carried)`.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.meshes import like
from bilevax.printing import brief, by_text
from bilevax.typing import Array, Key, PyTree, Scalar

__all__ = [
    "IHVP",
    "Algorithm",
    "Batch",
    "BilevelProblem",
    "Calls",
    "Directions",
    "Hypergradient",
    "IHVPInfo",
    "InnerGradient",
    "InnerSolver",
    "Iterate",
    "Loss",
    "SolverInfo",
    "arrays",
    "directions",
    "inner_gradient",
    "norm",
    "widen",
]


def __dir__() -> list[str]:
    return __all__


T = TypeVar("T")


class Loss(Protocol):
    """What a loss is: `loss(x, y, batch) -> scalar`, a function of yours; batch is any pytree.

    Example:
        >>> import bilevax as bx
        >>> def ridge(x, y, batch):
        ...     return (y - batch) ** 2 + x * y**2
        >>> loss: bx.problem.Loss = ridge  # as a type checker sees it
        >>> loss(0.5, 2.0, 1.0)
        3.0
    """

    def __call__(self, x: PyTree, y: PyTree, batch: PyTree, /) -> Any: ...


class BilevelProblem(NamedTuple):
    """An outer loss f and an inner loss g of one signature `loss(x, y, batch) -> scalar`.

    Example:
        >>> import bilevax as bx
        >>> problem = bx.BilevelProblem(lambda x, y, batch: (y - batch) ** 2, lambda x, y, batch: (y - x) ** 2)
        >>> problem.outer_loss(0.0, 3.0, 1.0)
        4.0
    """

    outer_loss: Loss
    inner_loss: Loss

    def __repr__(self) -> str:
        return brief(self)


class Batch(NamedTuple):
    """What the two losses take as their `batch`: any two pytrees of arrays.

    Example:
        >>> import bilevax as bx
        >>> bx.Batch(outer=[1.0, 2.0], inner=3.0).inner
        3.0
    """

    outer: Any
    inner: Any


class Calls(NamedTuple):
    """Numbers of derivative evaluations, declared by each method and equal to what its compiled program runs.

    One `hessian_product` and one `cross_product` at the same point and vector share a single pull-back of ∇_y g. An
    IHVP that draws a batch of its own evaluates one more gradient there; on the same batch the compiler merges them,
    as it does with work that loops of a single step happen to share. None is a number that nobody counts.

    Example:
        >>> import bilevax as bx
        >>> bx.problem.Calls(inner_gradients=20, cross_products=1).inner_gradients
        20
    """

    outer_gradients: Scalar = 0
    inner_gradients: Scalar = 0
    hessian_products: Any = 0  # or None
    cross_products: Scalar = 0

    def __repr__(self) -> str:
        return brief(self)


def added(one: Any, other: Any) -> Any:
    """The sum of two numbers, or of two `Calls` field by field; None, unknown, where one of them is."""

    def add(a: Any, b: Any) -> Any:
        return None if a is None or b is None else a + b

    return jax.tree.map(add, one, other, is_leaf=lambda part: part is None)


class Directions(NamedTuple):
    """The three directions of a bilevel problem at a point (x, y, v); pytrees like x, y and y.

    Example:
        >>> import bilevax as bx
        >>> bx.problem.Directions(x=1.0, y=2.0, v=3.0).y
        2.0
    """

    x: PyTree
    y: PyTree
    v: PyTree


class InnerGradient(NamedTuple):
    """The inner gradient at a point, with the pull-back that yields both second-order products.

    `pull_back(v)` returns (∇²_xy g · v, ∇²_yy g · v), pytrees like x and y.

    Example:
        >>> import bilevax as bx
        >>> inner = bx.problem.inner_gradient(lambda x, y, batch: x * y**2, 3.0, 2.0, None)
        >>> float(inner.loss), float(inner.gradient), [float(product) for product in inner.pull_back(1.0)]
        (12.0, 12.0, [4.0, 6.0])
    """

    loss: Array
    gradient: PyTree
    pull_back: Callable[[PyTree], tuple[PyTree, PyTree]]


def inner_gradient(inner_loss: Loss, x: PyTree, y: PyTree, batch: Any) -> InnerGradient:
    """Evaluates g and ∇_y g, and linearizes (x, y) ↦ ∇_y g(x, y) once, in reverse mode.

    Args:
      inner_loss: g, a function (x, y, batch) -> scalar.
      x: outer variable, any floating-point pytree.
      y: inner variable, any floating-point pytree.
      batch: what g takes as its batch.

    Returns:
      `InnerGradient(loss, gradient, pull_back)`; `pull_back(v)` is (∇²_xy g · v, ∇²_yy g · v).

    Raises:
      ValueError: if g does not return a floating-point scalar.

    Cost: one gradient of g, and about two more for each call of `pull_back`.

    Example:
        >>> import bilevax as bx
        >>> float(bx.problem.inner_gradient(lambda x, y, batch: (y - x) ** 2, 1.0, 3.0, None).gradient)
        4.0
    """
    loss = checks.scalar_loss("inner_loss", inner_loss)

    def gradient_and_value(x: PyTree, y: PyTree) -> tuple[PyTree, Array]:
        value, gradient = jax.value_and_grad(loss, argnums=1)(x, y, batch)
        return gradient, value

    gradient, pull_back, value = jax.vjp(gradient_and_value, x, y, has_aux=True)
    return InnerGradient(value, gradient, lambda v: pull_back(like(v, gradient)))


def directions(problem: BilevelProblem, x: PyTree, y: PyTree, v: PyTree, batch: Batch) -> Directions:
    """The directions along which x, y and v descend in every single-loop method.

        d_y = ∇_y g          d_v = ∇²_yy g v − ∇_y f          d_x = ∇_x f − ∇²_xy g v

    At y = y*(x) and v = v*(x) the last one is ∇F(x), and the first two are zero.

    Args:
      problem: the two losses.
      x: outer variable, any floating-point pytree.
      y: inner variable, any floating-point pytree.
      v: estimate of [∇²_yy g]⁻¹ ∇_y f, a pytree like y.
      batch: `Batch(outer, inner)`.

    Returns:
      `Directions(x, y, v)`.

    Raises:
      ValueError: if a loss does not return a floating-point scalar.

    Cost: one gradient of f, one of g, and ONE pull-back of v for both second-order products.

    Reference: Dagréou et al., "A framework for bilevel optimization that enables stochastic and global variance
    reduction algorithms", arXiv 2201.13409: its D_z, D_v and D_x, with the opposite sign of v.

    Example:
        >>> import bilevax as bx
        >>> problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2)
        >>> d = bx.problem.directions(problem, x=3.0, y=3.0, v=3.0, batch=bx.Batch(None, None))
        >>> float(d.x), float(d.y), float(d.v)
        (6.0, 0.0, 0.0)
    """
    outer_loss = checks.scalar_loss("outer_loss", problem.outer_loss)
    outer_x, outer_y = jax.grad(outer_loss, argnums=(0, 1))(x, y, batch.outer)
    inner = inner_gradient(problem.inner_loss, x, y, batch.inner)
    cross, hessian = inner.pull_back(v)
    return Directions(optax.tree.sub(outer_x, cross), inner.gradient, optax.tree.sub(hessian, outer_y))


def arrays(tree: PyTree) -> PyTree:
    """Makes each leaf an array that insists on its dtype, so that a state looks the same after every step.

    A Python float is of a weak type, which gives way in a sum; a state that holds one has another type after a step,
    which makes a second program, or is refused by `jax.lax.scan`.

    Args:
      tree: a pytree of arrays and numbers.

    Returns:
      The pytree of arrays, shapes and dtypes kept.

    Cost: none for what is an array already.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> [array.weak_type for array in (jnp.asarray(0.5), bx.problem.arrays(0.5))]
        [True, False]
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), tree)


def owned(state: T) -> T:
    """Copies all arrays, so that none shares its memory with another one or with the caller: a state may be donated.

    What is traced is left as it is: a compiled program returns arrays of its own.
    """

    def copy(leaf: Any) -> Any:
        concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
        return jax.device_put(leaf, may_alias=False) if concrete else leaf

    copied: T = jax.tree.map(copy, state)
    return copied


def widen(tree: PyTree) -> PyTree:
    """Casts each leaf to at least float32, so that sums over half-precision leaves keep their digits.

    Args:
      tree: a pytree of floating-point arrays and numbers.

    Returns:
      The pytree with leaves in float32 or, where they were, in float64; `optax.tree.cast_like(result, tree)` undoes it.

    Cost: a copy of the leaves in half precision.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> bx.problem.widen({"w": jnp.zeros(3, jnp.bfloat16)})["w"].dtype
        dtype('float32')
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, wide_dtype(leaf)), tree)


def wide_dtype(*leaves: Any) -> Any:
    """The widest dtype of real leaves, float32 at least; also where JAX is asked to promote nothing by itself."""
    return jnp.dtype("float64" if any(jnp.result_type(leaf) == jnp.float64 for leaf in leaves) else "float32")


def norm(tree: PyTree) -> Array:
    """The Euclidean norm in at least float32, without the overflow or underflow of its square.

        ‖s‖ = c ‖s / c‖,      c = max |s|

    Of stacked agents, leaves [n, ...], it is `jax.vmap(norm)`, [n].

    Args:
      tree: a pytree of floating-point arrays and numbers.

    Returns:
      A scalar; NaN where a leaf has NaN.

    Cost: two passes over the leaves.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> float(bx.problem.norm({"w": jnp.asarray([3e20], "float32"), "b": jnp.asarray(4e20, "float32")})) > 4.9e20
        True
    """
    dtype = wide_dtype(*jax.tree.leaves(tree))
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)
    largest = optax.tree.max(jax.tree.map(jnp.abs, wide))
    scale = jnp.where(largest > 0, largest, 1)
    return scale * optax.tree.norm(jax.tree.map(lambda leaf: leaf / scale, wide))


class IHVPInfo(NamedTuple):
    """What one application of an inverse-Hessian-vector product reports; scalars.

    In every info, a number that a method never measures is None, which is no leaf of the pytree; one that it did not
    get to measure this time is 0. Neither is NaN, so that `jax.debug_nans` stops at a NaN of yours alone.

    Attributes:
      iterations: iterations of the solver.
      products: Hessian (or other curvature) products of this application; None where nobody counts them.
      setup_products: those that `prepare` needed, once for all applications.
      residual: ‖b − (H + damping I) v‖ / ‖b‖; None where the solver does not measure it.
      curvature: the smallest pᵀ(H + damping I)p / pᵀp that was seen; None where the solver does not look, 0 where it
        looked along no direction (b = 0).
      breakdown: True where the solve was cut short or cannot be trusted: negative curvature, a preconditioner that is
        not positive definite, divergence, or numbers that are not finite.
      setup_gradients: backward passes through the inner loss that `prepare` needed, such as those of Kronecker factors.

    Example:
        >>> import bilevax as bx
        >>> info = bx.problem.IHVPInfo(5, products=6, setup_products=0, residual=1e-7, curvature=0.1, breakdown=False)
        >>> info.products
        6
    """

    iterations: Scalar
    products: Scalar | None
    setup_products: Scalar
    residual: Scalar | None
    curvature: Scalar | None
    breakdown: Scalar
    setup_gradients: Scalar = 0

    def __repr__(self) -> str:
        return brief(self)


Point = tuple[PyTree, PyTree, PyTree]  # x, y, batch


class Apply(Protocol):
    """v ≈ H⁻¹ b at one point, from v0 where the method can start there; lives inside one trace."""

    def __call__(self, b: PyTree, v0: PyTree | None = None) -> tuple[PyTree, IHVPInfo]: ...


class IHVPInit(Protocol):
    """What is worth keeping from one solve to the next; batch is the inner data."""

    def __call__(self, x: PyTree, y: PyTree, batch: PyTree = None, inner_loss: Loss | None = None) -> Any: ...


class IHVPPrepare(Protocol):
    """Measures the curvature at a point, once for all right-hand sides."""

    def __call__(self, key: Key | None, state: Any, inner_loss: Loss, point: Point) -> tuple[Apply, Any]: ...


class IHVP(NamedTuple):
    """An inverse-Hessian-vector product v ≈ [∇²_yy g]⁻¹ b as a pair of pure functions.

    Attributes:
      init: `init(x, y, batch=None, inner_loss=None) -> state`: what is worth keeping from one solve to the next. Where
        its shapes depend on the model, it asks for the batch and the loss.
      prepare: `prepare(key, state, inner_loss, (x, y, batch)) -> (apply, state)`, and
        `apply(b, v0=None) -> (v, IHVPInfo)`, a plain function that lives inside this trace.
      spd: True where `apply(b)` is linear, symmetric and (for a positive definite H) positive definite in b, so that
        it is a valid preconditioner of `ihvp.cg`.
      text: what `print` shows.

    Example:
        >>> import bilevax as bx
        >>> solver = bx.ihvp.identity(0.5)
        >>> apply, state = solver.prepare(None, solver.init(1.0, 1.0), lambda x, y, batch: x * y**2, (1.0, 1.0, None))
        >>> float(apply(4.0)[0])
        2.0
    """

    init: IHVPInit
    prepare: IHVPPrepare
    spd: bool = False
    text: str = ""

    def __repr__(self) -> str:
        return by_text(self)


class Iterate(NamedTuple):
    """The whole iterate z of an inner solver: y, the optimizer state, and the number t of steps taken so far.

    Under `bx.hypergradient` the steps of all outer steps count.

    As a cotangent, `opt_state=None` and `t=None` stand for zero, and y is like `y.params` of a `bx.inner.Carried`.

    Example:
        >>> import bilevax as bx
        >>> bx.problem.Iterate(y=1.0).y
        1.0
    """

    y: PyTree
    opt_state: Any = None
    t: Any = None


class SolverInfo(NamedTuple):
    """What the backward pass of an inner solver reports.

    Attributes:
      inner_loss: g(x, y) at the returned y; scalar, or None where a black box is given no g.
      gradient_norm: ‖∇_y g(x, y)‖ at the returned y; the same. (`inner.fixed_point` and `inner.root` without g report
        half the squared norm of their residual, and its norm.) Implicit rules are wrong where it is not small. It and
        `inner_loss` are taken on the batch of `cross_sample` (all data by default) in `inner.implicit`, and on the
        batch of the last step in the other solvers: under minibatches those are noisy.
      breakdown: True where the derivative cannot be trusted: the inverse-Hessian-vector product broke down, a loss or
        a gradient is not finite, or the steps diverge: they left g larger than they found it, and ∇_y g more than ten
        times as long. Of `inner.implicit` also where its steps stop although ∇_y g points far away, as at a constraint;
        of `inner.fixed_point` and `inner.root` where the equation or its adjoint is not solved.
      calls: `Calls` of the forward and the backward pass together.
      detail: `IHVPInfo` for `inner.implicit`, `EquationInfo` for `inner.fixed_point` and `inner.root`,
        `DirectionalInfo` for `inner.forward_gradient` and `inner.zeroth_order`, the two infos for `inner.chain`, ()
        otherwise.

    Example:
        >>> import bilevax as bx
        >>> calls = bx.problem.Calls()
        >>> info = bx.problem.SolverInfo(inner_loss=0.5, gradient_norm=1e-6, breakdown=False, calls=calls, detail=())
        >>> info.breakdown
        False
    """

    inner_loss: Scalar | None
    gradient_norm: Scalar | None
    breakdown: Scalar
    calls: Calls
    detail: Any

    def __repr__(self) -> str:
        return brief(self)


class SolverInit(Protocol):
    """The memory of a solver; batch is the inner data."""

    def __call__(self, x: PyTree, y: PyTree, batch: PyTree = None) -> Any: ...


class Start(Protocol):
    """The first iterate: y itself, or `initial(x)`."""

    def __call__(self, x: PyTree, y: PyTree) -> Iterate: ...


class Forward(Protocol):
    """Solves from z; the residual is what `backward` needs of it."""

    def __call__(
        self, key: Key | None, state: Any, x: PyTree, z: Iterate, batch: PyTree
    ) -> tuple[Iterate, Any, Any]: ...


class Backward(Protocol):
    """Pulls a cotangent of the last iterate back to x and to the first one."""

    def __call__(self, residual: Any, state: Any, z_bar: Iterate) -> tuple[tuple[PyTree, Iterate], Any, SolverInfo]: ...


class Tangent(Protocol):
    """The tangent of the solution y along that of x, a pytree like what of y is optimized."""

    def __call__(self, key: Key | None, x: PyTree, y: PyTree, batch: PyTree, x_dot: PyTree) -> PyTree: ...


class InnerSolver(NamedTuple):
    """How the inner problem is solved AND how that solution is differentiated.

    Attributes:
      init: `init(x, y, batch=None) -> state`: the memory between outer steps.
      start: `start(x, y) -> z`: the first iterate, from y itself or from `initial(x)`.
      forward: `forward(key, state, x, z, batch) -> (z_T, residual, state)`.
      backward: `backward(residual, state, z_bar) -> ((x_bar, z0_bar), state, SolverInfo)`, the pull-back of
        (x, z_0) ↦ z_T.
      pushes_tangents: True where it pushes tangents from x through `start` itself and has no derivative with respect to
        z_0 to send back: it cannot be the last link of a chain.
      fresh: True where y, optimizer and t start anew at each outer step, since `start` makes y out of x.
      tangent: `tangent(key, x, y, batch, x_dot) -> y_dot` of the solution y, where y depends on x alone; with the key
        of `forward`. Linear in x_dot, so that JAX can transpose it, and itself differentiable. `differentiable` takes
        it in the place of `backward`; None where derivatives have one mode and one order.
      text: what `print` shows.

    Example:
        >>> import bilevax as bx, optax
        >>> solver = bx.inner.reverse(lambda x, y, batch: 0.5 * (y - x) ** 2, optax.sgd(0.5), steps=2)
        >>> z, residual, state = solver.forward(None, solver.init(1.0, 0.0), 1.0, solver.start(1.0, 0.0), None)
        >>> (x_bar, z0_bar), state, info = solver.backward(residual, state, bx.problem.Iterate(1.0))
        >>> float(z.y), float(x_bar), float(z0_bar.y)
        (0.75, 0.75, 0.25)
    """

    init: SolverInit
    start: Start
    forward: Forward
    backward: Backward
    pushes_tangents: bool = False
    fresh: bool = False
    tangent: Tangent | None = None
    text: str = ""

    def __repr__(self) -> str:
        return by_text(self)


class Init(Protocol):
    """The first state; the batch is read where a method keeps what depends on it, or evaluates at the start."""

    def __call__(self, x: PyTree, y: PyTree, batch: Batch | None = None) -> Any: ...


class HypergradientInit(Protocol):
    """The first state; `opt_state` is what the optimizer of y has kept so far, None for a new one."""

    def __call__(self, x: PyTree, y: PyTree, batch: Batch | None = None, *, opt_state: Any = None) -> Any: ...


class Estimate(Protocol):
    """One estimate of ∇F(x)."""

    def __call__(self, key: Key | None, state: Any, x: PyTree, batch: Batch) -> tuple[PyTree, Any, Any]: ...


class Hypergradient(NamedTuple):
    """An estimator of ∇F(x) with a memory, to be fed to any optax optimizer.

    Attributes:
      init: `init(x, y, batch=None, *, opt_state=None) -> state`; every state is a NamedTuple with a field `y`. (One of
        your own that has no inner optimizer need not read opt_state.)
      estimate: `estimate(key, state, x, Batch(outer, inner)) -> (grad, state, info)`; grad is a pytree like x.
      text: what `print` shows.

    Example:
        >>> import bilevax as bx
        >>> def loss(x, y, batch):
        ...     return (y - x) ** 2
        >>> bx.hypergradient(loss, bx.inner.implicit(loss, ihvp=bx.ihvp.cg(maxiter=5)))
        hypergradient(loss, implicit(loss, ihvp=cg(maxiter=5)))
    """

    init: HypergradientInit
    estimate: Estimate
    text: str = ""

    def __repr__(self) -> str:
        return by_text(self)


class Step(Protocol):
    """One iteration of a whole method."""

    def __call__(self, key: Key | None, state: Any, batch: Batch) -> tuple[Any, Any]: ...


class Algorithm(NamedTuple):
    """A whole method as a pair of pure functions; one `jax.lax.scan` drives it.

    Attributes:
      init: `init(x, y, batch=None) -> state`, leaves [n, ...]; the batch where the method evaluates at the start.
      step: `step(key, state, batch) -> (state, info)`; the key may be None where nothing is random.
      text: what `print` shows.

    Example:
        >>> import bilevax as bx
        >>> def loss(x, y, batch):
        ...     return (y - x) ** 2
        >>> bx.algorithms.soba(bx.BilevelProblem(loss, loss), (0.1, 0.2, 0.2))
        soba(BilevelProblem(outer_loss=loss, inner_loss=loss), (0.1, 0.2, 0.2))
    """

    init: Init
    step: Step
    text: str = ""

    def __repr__(self) -> str:
        return by_text(self)

"""Kronecker factors of an agent's own curvature, as they were at its last refresh."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.carried import parameters
from bilevax.curvature.fisher import Fisher, exact
from bilevax.curvature.forms import Factors, Kronecker
from bilevax.curvature.kronecker import factors, product, spectral
from bilevax.curvature.model_loss import ModelLoss, held, structured
from bilevax.printing import as_called
from bilevax.problem import Batch, BilevelProblem, Loss
from bilevax.single_loop._levels import Levels
from bilevax.single_loop.prediction.prediction_type import Prediction
from bilevax.typing import Array, PyTree, Scalar


class KroneckerState(NamedTuple):
    """What one agent keeps of its last refresh.

    Attributes:
      factors: name of a weight -> its factors A and B.
      slopes: ⟨∇_y loss_n, v⟩ of each value of the output loss [N, ...], by which weights of the examples couple x with
        y; () where they have none, or a method has no v.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> loss = bx.curvature.ModelLoss(lambda y, a: a @ y, bx.curvature.squared_error, lambda x, batch: batch)
        >>> problem = bx.BilevelProblem(lambda x, y, batch: jnp.sum(y), loss)
        >>> point = bx.Levels(jnp.zeros(()), jnp.ones((3, 1)), jnp.ones((3, 1)))
        >>> batch = jnp.ones((5, 3)), jnp.ones((5, 1))
        >>> memory = bx.single_loop.prediction.kronecker().init(problem, point, None, bx.Batch(None, batch))
        >>> memory.factors["y"].A.shape, memory.slopes
        ((3, 3), ())
    """

    factors: Any
    slopes: Any


@as_called
def kronecker(inner_loss: ModelLoss | None = None, *, fisher: Fisher | None = None) -> Prediction:
    """The curvature of each agent's own data by Kronecker factors, and what weights of examples say of x exactly.

        d̂_y = d_y + G (y − y_r)            d̂_v = d_v + G (v − v_r)            G = blockdiag(A ⊗ B) at z_r
        d̂_x = d_x − [∂w(x)/∂x − ∂w(x_r)/∂x]ᵀ q        q_n = ⟨∇_y loss_n(y_r), v_r⟩ / N

    A ⊗ B is the Gauss–Newton matrix of the data, without the penalty, which `data_free` evaluates: chain the two. Each
    example counts in A by the trace of its output curvature L_n, so that the matrix is exact where a linear model has
    one output, where all L_n are one, or with one example. d̂_x, which is there where the loss has `weights`, is exact
    as long as y and v stand. What f says of v as y moves is left to `outer_kronecker`; how the weights pull at y is
    left out.

    With softmax regression and agents of few classes each it pays where secants gain nothing. Where steps are long,
    `bounded` keeps it from diverging. Where x are the weights of a network it does not help, since no factor says how
    the directions change with x.

    Args:
      inner_loss: g, or what of it is a `bx.curvature.ModelLoss`; None for the inner loss of the problem.
      fisher: which pseudo-gradients B is made of, one that draws nothing; None for `bx.curvature.fisher.exact`.

    Returns:
      `Prediction` whose memory is `KroneckerState`.

    Raises:
      TypeError: from `init`, if the inner loss is no `ModelLoss`.
      ValueError: from `init`, if a leaf of y is covered by no rule.

    Cost: for each refresh the factors, N (d_in² + d_out²) operations and a backward pass for each output; for each
    agent and iteration two products of 2 d_in d_out (d_in + d_out) operations for each layer, where an evaluation needs
    about 8 N d_in d_out. None of it counts in `Info.calls`: it saves work where an agent has many more examples than a
    layer has inputs.

    Reference: own; the factors are those of Martens and Grosse, arXiv 1503.05671, but for the traces in A. There their
    inverse preconditions a step; here they say what an agent would evaluate, and the step stays what it is, so
    that exact diffusion, which refuses preconditioned steps, takes them.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> loss = bx.curvature.ModelLoss(lambda y, a: a @ y, bx.curvature.squared_error, lambda x, batch: batch)
        >>> problem = bx.BilevelProblem(lambda x, y, batch: jnp.sum(y), loss)
        >>> batch = bx.Batch(None, (jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1))))
        >>> start, end = (bx.Levels(jnp.zeros(()), *2 * [jnp.full((1, 1), s)]) for s in (0.0, 2.0))
        >>> model = bx.single_loop.prediction.kronecker()
        >>> memory = model.init(problem, start, None, batch)
        >>> model.change(memory, problem, start, end, batch).y.round(4).tolist()
        [[10.0]]
    """
    if inner_loss is not None:
        checks.instance("inner_loss", inner_loss, ModelLoss, "Pass the bx.curvature.ModelLoss, or leave it out.")
    chosen = exact if fisher is None else fisher
    checks.function("fisher", chosen, "key", "loss", "outputs", "targets")

    def parts(problem: BilevelProblem) -> Any:
        return problem.inner_loss if inner_loss is None else inner_loss

    def init(problem: BilevelProblem, point: Levels[PyTree], d: Levels[PyTree], batch: Batch) -> KroneckerState:
        loss, (x, y, v) = parts(problem), point
        found = weighted_factors(loss, x, y, batch.inner, chosen)
        return KroneckerState(found, _slopes(loss, x, y, v, batch.inner))

    def update(
        memory: KroneckerState,
        problem: BilevelProblem,
        start: Levels[PyTree],
        end: Levels[PyTree],
        change: Levels[PyTree],
        batch: Batch,
    ) -> KroneckerState:
        return init(problem, end, change, batch)

    def change(
        memory: KroneckerState, problem: BilevelProblem, start: Levels[PyTree], end: Levels[PyTree], batch: Batch
    ) -> Levels[PyTree]:
        loss = parts(problem)
        times = product(memory.factors, loss, start.x, start.y, batch.inner)
        y = times(optax.tree.sub(end.y, start.y))
        v = times(optax.tree.sub(end.v, start.v)) if jax.tree.leaves(end.v) else None
        return Levels(_of_weights(loss, memory.slopes, start.x, end.x, batch.inner), y, v)

    return Prediction(init, update, change)


def weighted_factors(loss: Loss, x: PyTree, y: PyTree, batch: PyTree, fisher: Fisher) -> Factors:
    """Kronecker factors in which examples count in A by the traces of their output curvatures.

    A = Σ_n q_n ā_n ā_nᵀ,   q_n ∝ w_n tr L_n          B = 1/N Σ_n w_n Σ_k u_nk u_nkᵀ
    """
    loss, y = structured(held(loss, y), "Kronecker factors"), parameters(y)
    inputs, targets = loss.inputs_and_targets(x, batch)
    outputs = loss.model(y, inputs)
    traces = _traces(loss, outputs, targets)

    def weights(x: PyTree, batch: PyTree) -> Array:
        own = jnp.ones(len(traces), traces.dtype) if loss.weights is None else loss.weights(x, batch)
        return own.reshape(own.shape + (1,) * (traces.ndim - own.ndim)) * traces

    def of(loss: ModelLoss) -> Factors:
        return factors(None, loss, x, y, batch, fisher=fisher, inverse=spectral)

    def merged(curved: Any, weighted: Any) -> Any:  # a diagonal has no A
        return curved._replace(a=weighted.a, mass=weighted.mass) if isinstance(curved, Kronecker) else curved

    curved, weighted = of(loss), of(dataclasses.replace(loss, weights=weights))
    return {name: merged(one, weighted[name]) for name, one in curved.items()}


def _traces(loss: ModelLoss, outputs: Array, targets: PyTree) -> Array:
    """Of the curvature of each value of the output loss [N, ...]."""
    columns, column = exact(None, loss.loss, outputs, targets)

    def square(k: Scalar) -> Array:
        return jnp.sum(column(k) ** 2, axis=-1)

    return jax.lax.fori_loop(1, columns, lambda k, total: total + square(k), square(0))


def _slopes(loss: ModelLoss, x: PyTree, y: PyTree, v: PyTree, batch: PyTree) -> Any:
    if loss.weights is None or not jax.tree.leaves(v):
        return ()
    inputs, targets = loss.inputs_and_targets(x, batch)
    return jax.jvp(lambda y: loss.loss.value(loss.model(y, inputs), targets), (y,), (optax.tree.cast_like(v, y),))[1]


def _of_weights(loss: ModelLoss, slopes: Any, start: PyTree, end: PyTree, batch: PyTree) -> PyTree | None:
    """−[∂w(x)/∂x − ∂w(x_r)/∂x]ᵀ q, like x; None where the weights say nothing of it."""
    if not jax.tree.leaves(slopes):
        return None

    def pull(x: PyTree) -> Array:
        return jnp.sum(loss.scale(slopes, x, batch) * slopes)

    return optax.tree.sub(jax.grad(pull)(start), jax.grad(pull)(end))

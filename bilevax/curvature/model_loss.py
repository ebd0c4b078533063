"""An inner loss with structure: a model, an output loss that knows its curvature, example weights, and a penalty."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.carried import Carried, carrying, pair, parameters, with_parameters
from bilevax.curvature.capture.blocks import Model
from bilevax.curvature.output_loss import OutputLoss
from bilevax.curvature.products import Product
from bilevax.meshes import like
from bilevax.printing import brief
from bilevax.problem import Loss, widen
from bilevax.typing import Array, PyTree, Scalar


@dataclasses.dataclass(frozen=True)
class ModelLoss:
    """An inner loss made of parts. It IS a `loss(x, y, batch)`, and curvatures read its parts.

        g(x, y) = 1/N Σ_n w_n Σ_t m_nt loss(z_nt, target_nt) + ½ Σ l2 · (y − center)²          z = model(y, inputs)

    Its Gauss–Newton matrix G = 1/N Σ_n w_n J_nᵀ L_n J_n + diag(l2) is positive semidefinite wherever the weights are
    not negative, also far from a minimum, where the Hessian of a network is not: see `curvature.gauss_newton`.

    Args:
      model: `model(y, inputs) -> outputs [N, ..., C]`, a function of y and inputs alone. With y a
        `bx.inner.Carried` it returns (outputs, new carried), and so does the loss: (value, new carried). The penalty is
        one of y.params, and curvatures are those of the params, with what is carried as it is.
      loss: an `OutputLoss`: `softmax_cross_entropy`, `sigmoid_cross_entropy` or `squared_error`.
      split: `split(x, batch) -> (inputs, targets)`; x may make the inputs (condensation, poisoning).
      weights: `weights(x, batch) -> [N]`, all >= 0, or one for each value of the output loss, [N, T] for tokens; by
        default 1 for each example. Negative ones are neither refused nor clamped: G is indefinite with them, and
        solvers report it.
      l2: weight decay, a number or a function x -> a number or a pytree like y.
      center: `center(x) -> pytree like y`, what the penalty pulls y to (iMAML); by default 0.
      mask: `mask(batch) -> [N, ...]` with 1 for positions that count and 0 for padding, like the loss's values.
      examples: `examples(inputs)` -> the axis of each array of the inputs that counts the examples, None for what all
        share, or one axis for a part of them, as `in_axes` of `jax.vmap`; by default the first axis wherever it has N
        rows. For inputs [T, N, d], or a mask [T, T] where T = N; only curvatures read it.

    Raises:
      ValueError: if a part is no function (or no `OutputLoss`) or l2 is negative; when it is called, if weights, mask,
        targets or center do not fit.

    Cost: that of the model.

    Reference: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural
    Computation 14(7), 2002; Martens, arXiv 1412.1193, section 8.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> loss = bx.curvature.ModelLoss(
        ...     model=lambda y, inputs: inputs @ y,
        ...     loss=bx.curvature.squared_error,
        ...     split=lambda x, batch: batch,
        ...     weights=lambda x, batch: jax.nn.sigmoid(x),
        ...     l2=0.5,
        ... )
        >>> float(loss(jnp.zeros(2), jnp.ones((1, 1)), (jnp.array([[1.0], [2.0]]), jnp.ones((2, 1)))))
        0.375
    """

    model: Model
    loss: OutputLoss
    split: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    weights: Callable[[PyTree, PyTree], Array] | None = None
    l2: Scalar | Callable[[PyTree], PyTree] = 0.0
    center: Callable[[PyTree], PyTree] | None = None
    mask: Callable[[PyTree], Array] | None = None
    examples: Callable[[PyTree], PyTree] | None = None

    def __post_init__(self) -> None:
        """Refuses parts of the wrong kind."""
        checks.function("model", self.model, "y", "inputs")
        checks.instance("loss", self.loss, OutputLoss, "Pass, say, bx.curvature.softmax_cross_entropy.")
        checks.function("split", self.split, "x", "batch")
        for name, arguments in (
            ("weights", ("x", "batch")),
            ("center", ("x",)),
            ("mask", ("batch",)),
            ("examples", ("inputs",)),
        ):
            if getattr(self, name) is not None:
                checks.function(name, getattr(self, name), *arguments)
        if callable(self.l2):
            checks.function("l2", self.l2, "x")
        else:
            checks.nonnegative("l2", self.l2)

    def __repr__(self) -> str:
        """The parts that are given, functions by their names."""
        given = [field for field in dataclasses.fields(self) if getattr(self, field.name) is not field.default]
        return f"ModelLoss({', '.join(f'{field.name}={brief(getattr(self, field.name))}' for field in given)})"

    def __call__(self, x: PyTree, y: PyTree, batch: PyTree) -> Any:
        """The loss g(x, y) on this batch; with a `Carried` y the pair of it and what the model carries on."""
        inputs, targets = self.inputs_and_targets(x, batch)
        params, outputs = parameters(y), self.model(y, inputs)
        if isinstance(y, Carried):
            outputs, carried = pair("model", "outputs", outputs)
        values = widen(self.loss.value(outputs, targets))
        fit = jnp.sum(self.scale(values, x, batch) * values)
        value = fit + self.penalty_value(x, params)
        return (value, carried) if isinstance(y, Carried) else value

    def inputs_and_targets(self, x: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        """What `split` returns, which must be a pair."""
        parts = self.split(x, batch)
        if not isinstance(parts, tuple | list) or len(parts) != 2:
            raise ValueError(
                f"split must return (inputs, targets); got {parts!r:.80}. Leave the rest of the batch out: "
                f"split=lambda x, batch: (batch[0], batch[1])."
            )
        return parts[0], parts[1]

    def scale(self, values: Array | jax.ShapeDtypeStruct, x: PyTree, batch: PyTree) -> Array:
        """w_n m_nt / N, what each of the output loss's values [N, ...] counts, broadcast to them."""
        scale = self.weight_scale(values.shape[0], values.dtype, x, batch)
        if scale.ndim > 1 and scale.shape != values.shape:
            raise self._weights_that_do_not_fit(scale.shape, values.shape)
        scale = jnp.broadcast_to(scale.reshape(scale.shape + (1,) * (values.ndim - scale.ndim)), values.shape)
        if self.mask is None:
            return scale
        mask = self.mask(batch)
        if jnp.shape(mask) != values.shape:
            raise ValueError(
                f"mask must return one number for each value of the output loss; got shape {jnp.shape(mask)}, expected "
                f"{values.shape}. Return an array of ones, and zeros for padding."
            )
        return scale * mask

    def weight_scale(self, n: int, dtype: jnp.dtype, x: PyTree, batch: PyTree) -> Array:
        """w_n / N for each of the n examples, [N]; w_nt / N for each of their values where weights are for these."""
        scale = jnp.full((n,), 1 / n, dtype)
        if self.weights is None:
            return scale
        weights = self.weights(x, batch)
        if jnp.shape(weights)[:1] != (n,):
            raise self._weights_that_do_not_fit(jnp.shape(weights), (n, "..."))
        return scale.reshape((n,) + (1,) * (jnp.ndim(weights) - 1)) * weights

    def _weights_that_do_not_fit(self, got: tuple[int, ...], values: tuple[object, ...]) -> ValueError:
        return ValueError(
            f"weights must return one number for each of the {values[0]} examples, or for each value of the output "
            f"loss; got shape {got}, expected ({values[0]},) or ({', '.join(map(str, values))}). Return an array that "
            f"belongs to the batch."
        )

    def penalty_value(self, x: PyTree, y: PyTree) -> Array:
        """½ Σ l2 · (y − center)², the part of the loss that reads no data."""
        decay, center = self.penalty(x, y)
        terms = jax.tree.map(lambda rate, leaf, middle: jnp.sum(rate * (leaf - middle) ** 2), decay, y, center)
        return 0.5 * optax.tree.sum(terms)

    def penalty(self, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        """The decay rates and the center of the penalty, both as pytrees like y (the rates may be scalars)."""
        rate = self.l2(x) if callable(self.l2) else self.l2
        got, expected = (str(jax.tree.structure(tree)) for tree in (rate, y))
        if jax.tree_util.all_leaves([rate]):
            rate = jax.tree.map(lambda leaf: rate, y)
        elif got != expected:
            raise ValueError(
                f"l2 must be, or return, a number or a pytree like y; got {got}, expected {expected}. Return one rate "
                f"for each leaf of y."
            )
        if self.center is None:
            return rate, optax.tree.zeros_like(y)
        center = self.center(x)
        checks.same_shapes("pytree under center", center, y, "Return from center(x) a pytree like y.")
        return rate, center


def structured(inner_loss: Loss, what: str) -> ModelLoss:
    """Returns the loss; raises TypeError with the three lines to write unless it is a `ModelLoss`."""
    if isinstance(inner_loss, ModelLoss):
        return inner_loss
    raise TypeError(
        f"inner_loss must be a bx.curvature.ModelLoss for {what}, which reads its parts; got {inner_loss!r:.80}. "
        f"Write, say,\n"
        f"    model = lambda y, inputs: ...  # outputs [N, C]\n"
        f"    split = lambda x, batch: batch  # inputs and targets\n"
        f"    inner_loss = bx.curvature.ModelLoss(model, bx.curvature.softmax_cross_entropy, split)"
    )


def held(inner_loss: Loss, y: PyTree) -> Loss:
    """The loss as one of the parameters alone, with what y carries as it is; a `ModelLoss` stays one."""
    if not isinstance(y, Carried):
        return inner_loss
    if isinstance(inner_loss, ModelLoss):
        model = inner_loss.model

        def outputs(params: PyTree, inputs: PyTree) -> Array:
            return pair("model", "outputs", model(with_parameters(y, params), inputs))[0]

        return dataclasses.replace(inner_loss, model=outputs)
    loss = carrying("inner_loss", inner_loss)

    @functools.wraps(inner_loss)
    def of_parameters(x: PyTree, params: PyTree, batch: PyTree) -> Array:
        return loss(x, params, y, batch)[0]

    return of_parameters


def gauss_newton(inner_loss: Loss, x: PyTree, y: PyTree, batch: PyTree) -> Product:
    """Products with the generalized Gauss–Newton matrix of a `ModelLoss`, linearized once at this point.

        G = 1/N Σ_n w_n J_nᵀ L_n J_n + diag(l2)          J_n = ∂model(y, inputs_n)/∂y,   L_n = S_n S_nᵀ

    It equals the Hessian where the model is linear in y or fits its data, and it is positive semidefinite everywhere:
    the curvature to take for a network that is not at a minimum.

    Args:
      inner_loss: g, a `ModelLoss`.
      x: outer variable.
      y: inner variable.
      batch: what g takes as its batch.

    Returns:
      `product(v) = G v`, a pytree like v; v may be wider than y. Of a `bx.inner.Carried` y it is like y.params.

    Raises:
      TypeError: if `inner_loss` is a bare function, whose parts cannot be seen.

    Cost: one forward pass of the model, once, and one forward and one backward pass for each product: less than a
    Hessian product.

    Reference: Schraudolph, Neural Computation 14(7), 2002; Martens, arXiv 1412.1193, section 8.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> loss = bx.curvature.ModelLoss(lambda y, a: a * y, bx.curvature.squared_error, lambda x, batch: batch)
        >>> product = bx.curvature.gauss_newton(loss, 0.0, 1.0, (jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1))))
        >>> float(product(1.0))
        5.0
    """
    inner_loss, y = structured(held(inner_loss, y), "a Gauss–Newton product"), parameters(y)
    inputs, targets = inner_loss.inputs_and_targets(x, batch)
    outputs, push = jax.linearize(lambda y: inner_loss.model(y, inputs), y)
    pull = jax.linear_transpose(push, y)
    scale = inner_loss.scale(jax.eval_shape(inner_loss.loss.value, outputs, targets), x, batch)
    rate, _ = inner_loss.penalty(x, y)

    def product(v: PyTree) -> PyTree:
        narrow = like(optax.tree.cast_like(v, y), y)
        curved = scale[..., None] * inner_loss.loss.product(outputs, targets, push(narrow))
        (fit,) = pull(like(curved.astype(outputs.dtype), outputs))
        total = jax.tree.map(lambda a, r, leaf: a + r * leaf, fit, rate, narrow)
        return optax.tree.cast_like(total, v)

    return product

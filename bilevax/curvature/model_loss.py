"""An inner loss with structure: a model, an output loss that knows its curvature, example weights, and a penalty."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.curvature.products import Product
from bilevax.problem import Loss, widen


class OutputLoss(NamedTuple):
    """A convex loss of a model's outputs that knows a root of its own second derivative L = ∂²value/∂z².

    Attributes:
      value: `value(outputs, targets) -> [N, ...]`, outputs [N, ..., C]: one number for each example and position.
      root: `root(outputs, targets, s) -> u`, linear in s and like the outputs: u = S s with S Sᵀ = L at every position.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> bx.curvature.squared_error.value(jnp.array([[1.0, 2.0]]), jnp.zeros((1, 2))).tolist()
        [2.5]
    """

    value: Callable[[chex.Array, chex.Array], chex.Array]
    root: Callable[[chex.Array, chex.Array, chex.Array], chex.Array]

    def product(self, outputs: chex.Array, targets: chex.Array, s: chex.Array) -> chex.Array:
        """The product L s = S Sᵀ s, like the outputs; never negative in sᵀL s, in floating point too."""

        def root(s: chex.Array) -> chex.Array:
            return self.root(outputs, targets, s)

        (half,) = jax.linear_transpose(root, s)(s)
        return root(half)


def _component_axis(outputs: chex.Array) -> None:
    if jnp.ndim(outputs) < 2:
        raise ValueError(
            f"model must return outputs of shape [N, ..., C]; got {jnp.shape(outputs)}. Add a last axis for the "
            f"components, outputs[:, None] where there is one, and the same to targets of that shape."
        )


def _same_shape(targets: chex.Array, outputs: chex.Array) -> None:
    _component_axis(outputs)
    if jnp.shape(targets) != jnp.shape(outputs):
        raise ValueError(
            f"targets must have the shape of the outputs, {jnp.shape(outputs)}; got {jnp.shape(targets)}. Return both "
            f"with a last axis for the components, of length 1 where there is one."
        )


def _class_mass(targets: chex.Array, outputs: chex.Array) -> chex.Array:
    """The sum of the targets over the classes, [N, ..., 1]; checks that they are labels or probabilities."""
    _component_axis(outputs)
    if jnp.issubdtype(jnp.result_type(targets), jnp.integer) and jnp.shape(targets) == jnp.shape(outputs)[:-1]:
        return jnp.ones_like(outputs[..., :1])
    if jnp.issubdtype(jnp.result_type(targets), jnp.floating) and jnp.shape(targets) == jnp.shape(outputs):
        return jnp.sum(targets, axis=-1, keepdims=True)
    raise ValueError(
        f"targets must be integer labels of shape {jnp.shape(outputs)[:-1]} or probabilities of shape "
        f"{jnp.shape(outputs)}, for outputs of that shape; got {jnp.shape(targets)} of {jnp.result_type(targets)}. "
        f"Cast labels with .astype(int)."
    )


def _softmax_value(outputs: chex.Array, targets: chex.Array) -> chex.Array:
    _class_mass(targets, outputs)
    if jnp.ndim(targets) == jnp.ndim(outputs):
        return optax.losses.softmax_cross_entropy(outputs, targets)
    return optax.losses.softmax_cross_entropy_with_integer_labels(outputs, targets)


def _softmax_root(outputs: chex.Array, targets: chex.Array, s: chex.Array) -> chex.Array:
    p = jax.nn.softmax(outputs)  # S = diag(√p) − p √pᵀ
    u = jnp.sqrt(p) * s - p * jnp.sum(jnp.sqrt(p) * s, axis=-1, keepdims=True)
    return jnp.sqrt(_class_mass(targets, outputs)) * u


def _sigmoid_value(outputs: chex.Array, targets: chex.Array) -> chex.Array:
    _same_shape(targets, outputs)
    return jnp.sum(optax.losses.sigmoid_binary_cross_entropy(outputs, targets), axis=-1)


def _sigmoid_root(outputs: chex.Array, targets: chex.Array, s: chex.Array) -> chex.Array:
    return jnp.sqrt(jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs)) * s


def _squared_value(outputs: chex.Array, targets: chex.Array) -> chex.Array:
    _same_shape(targets, outputs)
    return 0.5 * jnp.sum((outputs - targets) ** 2, axis=-1)


def _squared_root(outputs: chex.Array, targets: chex.Array, s: chex.Array) -> chex.Array:
    return s


softmax_cross_entropy = OutputLoss(_softmax_value, _softmax_root)
"""−Σ_c t_c log softmax(z)_c; integer labels [N, ...] or probabilities [N, ..., C]. L = diag(p) − p pᵀ."""
sigmoid_cross_entropy = OutputLoss(_sigmoid_value, _sigmoid_root)
"""−Σ_c t_c log σ(z_c) + (1 − t_c) log σ(−z_c); targets in [0, 1] like the outputs. L = diag(σ(z) σ(−z))."""
squared_error = OutputLoss(_squared_value, _squared_root)
"""½ Σ_c (z_c − t_c)²; targets like the outputs. L = I."""


@dataclasses.dataclass(frozen=True)
class ModelLoss:
    """An inner loss made of parts. It IS a `loss(x, y, batch)`, and curvatures read its parts.

        g(x, y) = 1/N Σ_n w_n Σ_t m_nt loss(z_nt, target_nt) + ½ Σ l2 · (y − center)²          z = model(y, inputs)

    Its Gauss–Newton matrix G = 1/N Σ_n w_n J_nᵀ L_n J_n + diag(l2) is positive semidefinite wherever the weights are
    not negative, also far from a minimum, where the Hessian of a network is not: see `curvature.gauss_newton`.

    Args:
      model: `model(y, inputs) -> outputs [N, ..., C]`, a function of y and inputs alone.
      loss: an `OutputLoss`: `softmax_cross_entropy`, `sigmoid_cross_entropy` or `squared_error`.
      split: `split(x, batch) -> (inputs, targets)`; x may make the inputs (condensation, poisoning).
      weights: `weights(x, batch) -> [N]`, all >= 0; by default 1 for each example. Negative ones are neither refused
        nor clamped: G is indefinite with them, and solvers report it.
      l2: weight decay, a number or a function x -> a number or a pytree like y.
      center: `center(x) -> pytree like y`, what the penalty pulls y to (iMAML); by default 0.
      mask: `mask(batch) -> [N, ...]` with 1 for positions that count and 0 for padding, like the loss's values.

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

    model: Callable[[Any, Any], chex.Array]
    loss: OutputLoss
    split: Callable[[Any, Any], tuple[Any, Any]]
    weights: Callable[[Any, Any], chex.Array] | None = None
    l2: chex.Numeric | Callable[[Any], Any] = 0.0
    center: Callable[[Any], Any] | None = None
    mask: Callable[[Any], chex.Array] | None = None

    def __post_init__(self) -> None:
        """Refuses parts of the wrong kind."""
        checks.function("model", self.model, "y", "inputs")
        checks.instance("loss", self.loss, OutputLoss, "Pass, say, bx.curvature.softmax_cross_entropy.")
        checks.function("split", self.split, "x", "batch")
        for name, arguments in (("weights", ("x", "batch")), ("center", ("x",)), ("mask", ("batch",))):
            if getattr(self, name) is not None:
                checks.function(name, getattr(self, name), *arguments)
        if callable(self.l2):
            checks.function("l2", self.l2, "x")
        else:
            checks.nonnegative("l2", self.l2)

    def __call__(self, x: Any, y: Any, batch: Any) -> chex.Array:
        """The loss g(x, y) on this batch."""
        inputs, targets = self.inputs_and_targets(x, batch)
        values = widen(self.loss.value(self.model(y, inputs), targets))
        fit = jnp.sum(self.scale(values, x, batch) * values)
        decay, center = self.penalty(x, y)
        terms = jax.tree.map(lambda rate, leaf, middle: jnp.sum(rate * (leaf - middle) ** 2), decay, y, center)
        return fit + 0.5 * optax.tree.sum(terms)

    def inputs_and_targets(self, x: Any, batch: Any) -> tuple[Any, Any]:
        """What `split` returns, which must be a pair."""
        parts = self.split(x, batch)
        if not isinstance(parts, tuple | list) or len(parts) != 2:
            raise ValueError(
                f"split must return (inputs, targets); got {parts!r:.80}. Leave the rest of the batch out: "
                f"split=lambda x, batch: (batch[0], batch[1])."
            )
        return parts[0], parts[1]

    def scale(self, values: chex.Array, x: Any, batch: Any) -> chex.Array:
        """w_n m_nt / N, what each of the output loss's values [N, ...] counts, broadcast to them."""
        scale = jnp.full(jnp.shape(values)[:1], 1 / jnp.shape(values)[0], values.dtype)
        if self.weights is not None:
            weights = self.weights(x, batch)
            if jnp.shape(weights) != scale.shape:
                raise ValueError(
                    f"weights must return one number for each of the {scale.shape[0]} examples; got shape "
                    f"{jnp.shape(weights)}, expected {scale.shape}. Return an array [N] that belongs to the batch."
                )
            scale = scale * weights
        scale = jnp.broadcast_to(scale.reshape(scale.shape + (1,) * (values.ndim - 1)), values.shape)
        if self.mask is None:
            return scale
        mask = self.mask(batch)
        if jnp.shape(mask) != values.shape:
            raise ValueError(
                f"mask must return one number for each value of the output loss; got shape {jnp.shape(mask)}, expected "
                f"{values.shape}. Return an array of ones, and zeros for padding."
            )
        return scale * mask

    def penalty(self, x: Any, y: Any) -> tuple[Any, Any]:
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


def gauss_newton(inner_loss: Loss, x: chex.ArrayTree, y: chex.ArrayTree, batch: Any) -> Product:
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
      `product(v) = G v`, a pytree like v; v may be wider than y.

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
    if not isinstance(inner_loss, ModelLoss):
        raise TypeError(
            f"inner_loss must be a bx.curvature.ModelLoss for a Gauss–Newton product, which reads its parts; got "
            f"{inner_loss!r:.80}. Write, say,\n"
            f"    model = lambda y, inputs: ...  # outputs [N, C]\n"
            f"    split = lambda x, batch: batch  # inputs and targets\n"
            f"    inner_loss = bx.curvature.ModelLoss(model, bx.curvature.softmax_cross_entropy, split)"
        )
    inputs, targets = inner_loss.inputs_and_targets(x, batch)
    outputs, push = jax.linearize(lambda y: inner_loss.model(y, inputs), y)
    pull = jax.linear_transpose(push, y)
    scale = inner_loss.scale(jax.eval_shape(inner_loss.loss.value, outputs, targets), x, batch)
    rate, _ = inner_loss.penalty(x, y)

    def product(v: chex.ArrayTree) -> chex.ArrayTree:
        narrow = optax.tree.cast_like(v, y)
        curved = scale[..., None] * inner_loss.loss.product(outputs, targets, push(narrow))
        (fit,) = pull(curved.astype(outputs.dtype))
        total = jax.tree.map(lambda a, r, leaf: a + r * leaf, fit, rate, narrow)
        return optax.tree.cast_like(total, v)

    return product

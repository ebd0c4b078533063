"""Losses of a model's outputs that know a root of their own second derivative, and how to draw labels."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.printing import as_called, by_text
from bilevax.problem import widen
from bilevax.typing import Array, Key

LARGEST = 64  # outputs for which a Hessian is decomposed at every position


class Root(Protocol):
    """S s, linear in s, with S Sᵀ the curvature at these outputs."""

    def __call__(self, outputs: Array, targets: Array, s: Array, /) -> Array: ...


class Draw(Protocol):
    """A random vector u with E[u uᵀ] = S Sᵀ."""

    def __call__(self, key: Key, outputs: Array, targets: Array, /) -> Array: ...


class OutputLoss(NamedTuple):
    """A convex loss of a model's outputs that knows a root of its own second derivative L = ∂²value/∂z².

    Attributes:
      value: `value(outputs, targets) -> [N, ...]`, outputs [N, ..., C]: one number for each example and position.
      root: `root(outputs, targets, s) -> u`, linear in s and like the outputs: u = S s with S Sᵀ = L at every position.
      draw: `draw(key, outputs, targets) -> u`, a random vector with E[u uᵀ] = L: the gradient at a label drawn from the
        model's own distribution. None where there is no such distribution: u = S s with random signs s then.
      text: what `print` shows.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> bx.curvature.squared_error.value(jnp.array([[1.0, 2.0]]), jnp.zeros((1, 2))).tolist()
        [2.5]
    """

    value: Callable[[Array, Array], Array]
    root: Root
    draw: Draw | None = None
    text: str = ""

    def __repr__(self) -> str:
        return by_text(self)

    def product(self, outputs: Array, targets: Array, s: Array) -> Array:
        """The product L s = S Sᵀ s, like the outputs; never negative in sᵀL s, in floating point too."""

        def root(s: Array) -> Array:
            return self.root(outputs, targets, s)

        (half,) = jax.linear_transpose(root, s)(s)
        return root(half)


def _component_axis(outputs: Array) -> None:
    if jnp.ndim(outputs) < 2:
        raise ValueError(
            f"model must return outputs of shape [N, ..., C]; got {jnp.shape(outputs)}. Add a last axis for the "
            f"components, outputs[:, None] where there is one, and the same to targets of that shape."
        )


def _same_shape(targets: Array, outputs: Array) -> None:
    _component_axis(outputs)
    if jnp.shape(targets) != jnp.shape(outputs):
        raise ValueError(
            f"targets must have the shape of the outputs, {jnp.shape(outputs)}; got {jnp.shape(targets)}. Return both "
            f"with a last axis for the components, of length 1 where there is one."
        )


def _class_mass(targets: Array, outputs: Array) -> Array:
    """The sum of the targets over the classes, [N, ..., 1]; checks that they are labels or probabilities."""
    _component_axis(outputs)
    if jnp.shape(outputs)[-1] < 2:
        raise ValueError(
            f"model must return outputs [N, ..., C] with C >= 2 classes for softmax_cross_entropy; got shape "
            f"{jnp.shape(outputs)}. Use bx.curvature.sigmoid_cross_entropy for one output."
        )
    if jnp.issubdtype(jnp.result_type(targets), jnp.integer) and jnp.shape(targets) == jnp.shape(outputs)[:-1]:
        return jnp.ones_like(outputs[..., :1])
    if jnp.issubdtype(jnp.result_type(targets), jnp.floating) and jnp.shape(targets) == jnp.shape(outputs):
        return jnp.sum(targets, axis=-1, keepdims=True)
    raise ValueError(
        f"targets must be integer labels of shape {jnp.shape(outputs)[:-1]} or probabilities of shape "
        f"{jnp.shape(outputs)}, for outputs of that shape; got {jnp.shape(targets)} of {jnp.result_type(targets)}. "
        f"Cast labels with .astype(int)."
    )


def _softmax_value(outputs: Array, targets: Array) -> Array:
    _class_mass(targets, outputs)
    if jnp.ndim(targets) == jnp.ndim(outputs):
        return optax.losses.softmax_cross_entropy(outputs, targets)
    return optax.losses.softmax_cross_entropy_with_integer_labels(outputs, targets)


def _softmax_root(outputs: Array, targets: Array, s: Array) -> Array:
    p = jax.nn.softmax(outputs)  # S = diag(√p) − p √pᵀ
    u = jnp.sqrt(p) * s - p * jnp.sum(jnp.sqrt(p) * s, axis=-1, keepdims=True)
    return jnp.sqrt(_class_mass(targets, outputs)) * u


def _sigmoid_value(outputs: Array, targets: Array) -> Array:
    _same_shape(targets, outputs)
    return jnp.sum(optax.losses.sigmoid_binary_cross_entropy(outputs, targets), axis=-1)


def _sigmoid_root(outputs: Array, targets: Array, s: Array) -> Array:
    return jnp.sqrt(jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs)) * s


def _squared_value(outputs: Array, targets: Array) -> Array:
    _same_shape(targets, outputs)
    return 0.5 * jnp.sum((outputs - targets) ** 2, axis=-1)


def _squared_root(outputs: Array, targets: Array, s: Array) -> Array:
    return s


def _softmax_draw(key: Key, outputs: Array, targets: Array) -> Array:
    labels = jax.random.categorical(key, outputs)
    u = jax.nn.softmax(outputs) - jax.nn.one_hot(labels, outputs.shape[-1], dtype=outputs.dtype)
    return jnp.sqrt(_class_mass(targets, outputs)) * u


def _sigmoid_draw(key: Key, outputs: Array, targets: Array) -> Array:
    p = jax.nn.sigmoid(outputs)
    return p - jax.random.bernoulli(key, p).astype(outputs.dtype)


def _squared_draw(key: Key, outputs: Array, targets: Array) -> Array:
    return jax.random.normal(key, outputs.shape, outputs.dtype)


softmax_cross_entropy = OutputLoss(_softmax_value, _softmax_root, _softmax_draw, text="softmax_cross_entropy")
"""−Σ_c t_c log softmax(z)_c; integer labels [N, ...] or probabilities [N, ..., C]. L = diag(p) − p pᵀ."""
sigmoid_cross_entropy = OutputLoss(_sigmoid_value, _sigmoid_root, _sigmoid_draw, text="sigmoid_cross_entropy")
"""−Σ_c t_c log σ(z_c) + (1 − t_c) log σ(−z_c); targets in [0, 1] like the outputs. L = diag(σ(z) σ(−z))."""
squared_error = OutputLoss(_squared_value, _squared_root, _squared_draw, text="squared_error")
"""½ Σ_c (z_c − t_c)²; targets like the outputs. L = I."""


@as_called
def convex(value: Callable[[Array, Array], Array]) -> OutputLoss:
    """Any convex loss of a few outputs, through its Hessian [C, C] at every position.

        S = Q √Λ   with   ∂²value/∂z² = Q Λ Qᵀ

    Args:
      value: `value(outputs, targets) -> [N, ...]`, outputs [N, ..., C]: convex in the outputs of each position, and a
        function of these alone. Where it is not convex, the negative eigenvalues are left out.

    Returns:
      An `OutputLoss`.

    Raises:
      ValueError: if value is no such function, or, when it is used, if C > 64.

    Cost: C products with the Hessian of the loss alone, and a decomposition [C, C], at every position.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> poisson = bx.curvature.convex(lambda z, t: jnp.sum(jnp.exp(z) - t * z, axis=-1))
        >>> z = jnp.log(jnp.array([[4.0, 9.0]]))
        >>> poisson.root(z, jnp.zeros((1, 2)), jnp.ones((1, 2))).round(4).tolist()
        [[2.0, 3.0]]
    """
    checks.function("value", value, "outputs", "targets")

    def checked(outputs: Array, targets: Array) -> Array:
        _component_axis(outputs)
        values = value(outputs, targets)
        if jnp.shape(values) != jnp.shape(outputs)[:-1]:
            raise ValueError(
                f"value must return one number for the C outputs of each position, {jnp.shape(outputs)[:-1]}; got "
                f"shape {jnp.shape(values)}. Sum over the last axis alone."
            )
        return values

    def root(outputs: Array, targets: Array, s: Array) -> Array:
        _component_axis(outputs)
        size = outputs.shape[-1]
        if size > LARGEST:
            raise ValueError(
                f"outputs must have at most {LARGEST} components for curvature.convex, which decomposes a matrix "
                f"[C, C] at every position; got {size}. Write an OutputLoss with a root of its own."
            )
        gradient = jax.grad(lambda outputs: jnp.sum(checked(outputs, targets)))
        columns = jax.vmap(lambda e: jax.jvp(gradient, (outputs,), (jnp.broadcast_to(e, outputs.shape),))[1])
        hessian = widen(jnp.moveaxis(columns(jnp.eye(size, dtype=outputs.dtype)), 0, -1))
        eigenvalues, basis = jnp.linalg.eigh((hessian + jnp.swapaxes(hessian, -1, -2)) / 2)
        halves = jnp.sqrt(jnp.maximum(eigenvalues, 0)) * s
        return jnp.einsum("...ij,...j->...i", basis, halves).astype(s.dtype)

    return OutputLoss(checked, root)

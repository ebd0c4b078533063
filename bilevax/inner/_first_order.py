"""Steps of the inner optimizer whose derivative counts as the identity in y_0: first-order MAML."""

from typing import Any

from bilevax.inner._no_gradient import no_gradient
from bilevax.inner._optimizer_steps import Initial, Optimizer
from bilevax.printing import as_called
from bilevax.problem import InnerSolver, Iterate, Loss, SolverInfo
from bilevax.sampling import Sample, full
from bilevax.typing import PyTree


@as_called
def first_order(
    inner_loss: Loss,
    optimizer: Optimizer,
    steps: int,
    *,
    initial: Initial | None = None,
    sample: Sample = full,
) -> InnerSolver:
    """Runs `steps` steps of the inner optimizer, and takes ∂y_T/∂y_0 for the identity.

        z_t = Φ(z_{t−1}, x),  t = 1..T          x_bar = 0,   y0_bar = y_bar

    First-order MAML: the gradient of f at the adapted weights moves the start, for the price of the forward pass. It is
    right to first order in the learning rate. Where x is not the start but enters g, its derivative is dropped.

    Args:
      inner_loss: g, a function (x, y, batch) -> scalar.
      optimizer: any optax transformation, or a function x ↦ transformation.
      steps: T >= 0.
      initial: y_0 as a function of x (MAML: `lambda x: x`); by default y_0 is the warm y.
      sample: how step t draws its batch from the data.

    Returns:
      An `InnerSolver` without state.

    Raises:
      ValueError: if steps is negative, the optimizer is none, or its updates do not look like y.

    Cost: T gradients, memory of one step. The report adds one gradient.

    Reference: Finn, Abbeel, Levine, "Model-agnostic meta-learning for fast adaptation of deep networks", arXiv
    1703.03400, section 5.2; Nichol, Achiam, Schulman, "On first-order meta-learning algorithms", arXiv 1803.02999.

    Example:
        >>> import bilevax as bx, jax, optax
        >>> support_loss = lambda x, y, task: 0.5 * (y - task) ** 2
        >>> solve = bx.differentiable(bx.inner.first_order(support_loss, optax.sgd(0.5), steps=1))
        >>> meta_loss = lambda w, task: 0.5 * (solve(w, w, task) - task) ** 2
        >>> float(jax.jit(jax.grad(meta_loss))(3.0, 1.0))  # y_1 = 2; MAML itself has half of it
        1.0
    """
    steps_alone = no_gradient(inner_loss, optimizer, steps, initial=initial, sample=sample)

    def backward(residual: Any, state: tuple[()], z_bar: Iterate) -> tuple[tuple[PyTree, Iterate], Any, SolverInfo]:
        """Zeros like x, and for y_0 the cotangent of y_T."""
        (x_bar, _), state, info = steps_alone.backward(residual, state, z_bar)
        return (x_bar, Iterate(z_bar.y)), state, info

    return steps_alone._replace(backward=backward)

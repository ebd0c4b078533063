"""What is kept of the curvature of a block: Kronecker factors, or a diagonal."""

from typing import NamedTuple

import jax.numpy as jnp

from bilevax.typing import Array


class Kronecker(NamedTuple):
    """The factors of one block as means over the data, which add up over batches and agents; leading axes: layers.

    Attributes:
      a: 1/N Σ_n w_n Σ_t m_nt ā ā_ᵀ, [d_in, d_in] with the bias last; the diagonal [rows] for a table.
      mass: 1/N Σ_n w_n Σ_t m_nt, that of a.
      b: B, [d_out, d_out].

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> bx.curvature.kronecker.Kronecker(jnp.array([[6.0]]), jnp.array(2.0), jnp.eye(1)).A.tolist()
        [[3.0]]
    """

    a: Array
    mass: Array
    b: Array

    @property
    def A(self) -> Array:  # noqa: N802
        """The normalised factor A = a / mass; 0 where every weight is 0."""
        mass = jnp.where(self.mass > 0, self.mass, 1)
        return self.a / mass.reshape(mass.shape + (1,) * (self.a.ndim - mass.ndim))

    @property
    def B(self) -> Array:  # noqa: N802
        """The factor B."""
        return self.b


class Diagonal(NamedTuple):
    """The diagonal of one block.

    Attributes:
      diagonal: shaped like the leaf.

    Example:
        >>> import bilevax as bx
        >>> bx.curvature.kronecker.Diagonal(1.0).diagonal
        1.0
    """

    diagonal: Array


Factors = dict[str, Kronecker | Diagonal]  # by the name of the weight

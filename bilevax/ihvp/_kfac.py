"""The inverse of Kronecker-factored curvature."""

from bilevax import checks
from bilevax.curvature import capture
from bilevax.curvature.capture.choices import Blocks
from bilevax.curvature.fisher import Fisher, sampled
from bilevax.curvature.inverse import Damping, Inverse, by_shape
from bilevax.curvature.passes import measure
from bilevax.curvature.sharing import ChooseSharing, Sharing, expand
from bilevax.curvature.traced_loss import Positions
from bilevax.ihvp._curved import Options, Passes, Refresh, Schedule, curved
from bilevax.printing import as_called
from bilevax.problem import IHVP
from bilevax.sampling import Sample, full
from bilevax.typing import Scalar


@as_called
def kfac(
    *,
    damping: Damping = 1e-3,
    fisher: Fisher | None = None,
    inverse: Inverse = by_shape,
    sharing: Sharing | ChooseSharing = expand,
    positions: Positions | None = None,
    ema: Scalar = 0.0,
    factors_every: Schedule = 1,
    inverse_every: Schedule = 1,
    largest: int = 8192,
    blocks: Blocks | None = None,
    unsupported: capture.Unsupported = capture.error,
    sample: Sample = full,
) -> IHVP:
    """Inverts a Kronecker-factored, block-diagonal Gauss–Newton matrix: one backward pass and no product.

        H ≈ blockdiag(A ⊗ B) + (l2 + damping) I          A = Q_A D_A Q_Aᵀ,   B = Q_B D_B Q_Bᵀ
        v = Q_A [(Q_Aᵀ b Q_B) / (d_A d_Bᵀ + l2 + damping)] Q_Bᵀ

    It reads the parts of a `ModelLoss`, and finds the layers by itself, in flax, in other libraries and in plain
    functions alike: `print(bx.curvature.describe(inner_loss, x, y, batch))` shows what it makes of each leaf. It is
    positive definite everywhere, so that an inner problem that is not solved does no harm, and no derivative flows
    through its factors. How each factor is kept and inverted follows from its shape.

    Args:
      damping: a number >= 0 that is added to the weight decay; or a function of the eigenvalues [d_in, d_out] of a
        layer, `lambda eigenvalues: 0.1 * eigenvalues.mean()`.
      fisher: which pseudo-gradients: `fisher.sampled()` by default; `fisher.exact` for few classes and few examples.
      inverse: `kronecker.by_shape`, from the rows of a factor where they are few, else by its eigenvectors, and by
        those of a sketch above 1024; `kronecker.low_rank(rank)`, `kronecker.spectral` (eigenvectors of whole factors),
        or `kronecker.factored` (Cholesky factors).
      sharing: what becomes of several positions: `expand`, `reduce`, or a function of the name of the leaf.
      positions: batch -> [N, T] of ones and zeros, which tokens count; by default the mask of the loss.
      ema: decay of the moving averages of the factors, in [0, 1).
      factors_every: outer steps from one measurement to the next, or a function step -> bool. Without averages, those
        at every step are measured only when they are decomposed.
      inverse_every: outer steps from one decomposition to the next, or a function step -> bool. The first step always
        does both. Under `jax.vmap` of the state, `lax.cond` runs both branches, which saves nothing.
      largest: a factor of more rows or columns is kept as its diagonal, as that of an embedding is.
      blocks: what certain leaves get instead, {path or pattern: choice} or a function path -> choice or None:
        `capture.diagonal` (exact where the leaf is a layer that is used once), `identity`, `zero`, a function like
        these, or the rank of a sketch of the factors.
      unsupported: what to do with leaves that no rule covers; `capture.error` refuses them.
      sample: how the batch of the factors is drawn from the inner data; it is asked with t = 0.

    Returns:
      An `IHVP`; `spd`. Its state is () as long as ema and both periods keep their defaults, and `KFACState` otherwise:
      `init` needs a batch then. A weight decay that varies inside a block counts with its mean. The residual is not
      measured. `info.setup_gradients` counts the backward passes.

    Raises:
      TypeError: if the inner loss is a bare function, when it is prepared.
      ValueError: if an option is out of range, a leaf is covered by no rule, or a sampled Fisher gets no key.

    Cost: one forward and, by default, one backward pass of the model. For each layer, with R = N T rows and factors of
    size d: by rows R d numbers, 2 R² d operations to decompose and 4 R d_in d_out to apply; whole 2 R d², about 10 d³
    and 4 d_in d_out (d_in + d_out); by a sketch of rank r 4 R d r, 5 d r² and 4 r d_in d_out.

    Reference: Liao, Dangel, Yu, arXiv 2603.29108, for hypergradients; Martens and Grosse, arXiv 1503.05671. Here
    example weights enter both factors, and weight decay is folded into the eigenvalues.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> parts = lambda y, a: a @ y, bx.curvature.squared_error, lambda x, batch: batch
        >>> loss = bx.curvature.ModelLoss(*parts, l2=1.0)
        >>> point = (0.0, jnp.zeros((1, 1)), (jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1))))
        >>> apply, _ = bx.ihvp.kfac(damping=0.0, fisher=bx.curvature.fisher.exact).prepare(None, (), loss, point)
        >>> apply(jnp.array([[12.0]]))[0].round(4).tolist()
        [[2.0]]
    """
    checks.instance(
        "inverse", inverse, Inverse, "Pass, say, bx.curvature.kronecker.by_shape or kronecker.low_rank(64)."
    )
    chosen = sampled() if fisher is None else fisher
    checks.function("fisher", chosen, "key", "loss", "outputs", "targets")
    passes = Passes(lambda key, here, kept: measure(key, here, chosen, kept), inverse)
    options = Options(damping, sharing, positions, largest, blocks, unsupported, sample)
    return curved(passes, options, Refresh.of(ema, factors_every, inverse_every))

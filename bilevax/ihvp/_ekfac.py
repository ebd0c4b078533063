"""The inverse of Kronecker-factored curvature with corrected eigenvalues."""

from bilevax import checks
from bilevax.curvature import capture
from bilevax.curvature.capture.choices import Blocks
from bilevax.curvature.fisher import Fisher, sampled
from bilevax.curvature.inverse import Damping, by_shape
from bilevax.curvature.passes import curvatures, measure
from bilevax.curvature.sharing import ChooseSharing, Sharing, expand
from bilevax.curvature.traced_loss import Positions
from bilevax.ihvp._curved import Options, Passes, Refresh, Schedule, curved
from bilevax.printing import as_called
from bilevax.problem import IHVP
from bilevax.sampling import Sample, full
from bilevax.typing import Scalar


@as_called
def ekfac(
    *,
    damping: Damping = 1e-3,
    fisher: Fisher | None = None,
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
    """Inverts Kronecker factors with corrected eigenvalues: the diagonal of the curvature in the basis of `kfac`.

        E = 1/N Σ_n w_n Σ_k [Q_Aᵀ (Σ_t ā_nt u_nktᵀ) Q_B]²          v = Q_A [(Q_Aᵀ b Q_B) / (E + l2 + damping)] Q_Bᵀ

    With `fisher.exact` no other diagonal in this basis is closer to the block; the basis of a factor that is sketched,
    above 1024, is that of its sketch alone. A weight that is used several times in one pass counts as several
    independent layers. E is measured anew with the factors and with the basis, and is not averaged. Between
    decompositions a basis follows averaged factors (`ema`, `factors_every`) by one step of orthogonal iteration
    whenever these are measured, Q ← qr(A Q).

    Args:
      damping: a number >= 0 that is added to the weight decay, or a function of the eigenvalues E of a layer.
      fisher: which pseudo-gradients; `fisher.sampled()` by default.
      sharing: what becomes of several positions in the factors.
      positions: batch -> [N, T] of ones and zeros, which tokens count; by default the mask of the loss.
      ema: decay of the moving averages of the factors, in [0, 1).
      factors_every: outer steps from one measurement to the next, or a function step -> bool.
      inverse_every: outer steps from one basis to the next, or a function step -> bool.
      largest: a factor of more rows or columns is kept as its diagonal, as that of an embedding is.
      blocks: what certain leaves get instead, {path or pattern: choice} or a function path -> choice or None:
        `capture.diagonal` (exact where the leaf is a layer that is used once), `identity`, `zero`, a function like
        these, or the rank of a sketch of the factors.
      unsupported: what to do with leaves that no rule covers.
      sample: how the batch of the factors is drawn from the inner data; it is asked with t = 0.

    Returns:
      An `IHVP`; `spd`; otherwise as `kfac`.

    Raises:
      TypeError: if the inner loss is a bare function, when it is prepared.
      ValueError: if an option is out of range, a leaf is covered by no rule, or a sampled Fisher gets no key.

    Cost: that of `kfac`, one more forward pass and as many more backward passes; N d_in d_out operations for each
    layer, times T where it has T positions.

    Reference: George et al., arXiv 1806.03884, equation 6; Vyas et al., arXiv 2409.11321, for the bases in between.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> parts = lambda y, a: a @ y, bx.curvature.squared_error, lambda x, batch: batch
        >>> loss = bx.curvature.ModelLoss(*parts, l2=1.0)
        >>> point = (0.0, jnp.zeros((1, 1)), (jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1))))
        >>> apply, _ = bx.ihvp.ekfac(damping=0.0, fisher=bx.curvature.fisher.exact).prepare(None, (), loss, point)
        >>> apply(jnp.array([[12.0]]))[0].round(4).tolist()
        [[2.0]]
    """
    chosen = sampled() if fisher is None else fisher
    checks.function("fisher", chosen, "key", "loss", "outputs", "targets")
    passes = Passes(
        measure=lambda key, here, kept: measure(key, here, chosen, kept),
        inverse=by_shape,
        correct=lambda key, here, bases: curvatures(key, here, chosen, bases),
    )
    options = Options(damping, sharing, positions, largest, blocks, unsupported, sample)
    return curved(passes, options, Refresh.of(ema, factors_every, inverse_every))

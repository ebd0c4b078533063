"""Inner solvers, and what they are put together from."""

from bilevax.inner.chain import ChainState, chain
from bilevax.inner.directional import DirectionalInfo, DirectionalState
from bilevax.inner.forward_gradient import forward_gradient
from bilevax.inner.implicit import ImplicitState, implicit
from bilevax.inner.no_gradient import no_gradient
from bilevax.inner.reverse import Checkpoint, every_step, reverse, store_all, store_products, two_level
from bilevax.inner.unroll_with_tail import unroll_with_tail
from bilevax.inner.zeroth_order import Difference, central, one_sided, zeroth_order
from bilevax.sampling import full, minibatch, per_step

__all__ = [
    "ChainState",
    "Checkpoint",
    "Difference",
    "DirectionalInfo",
    "DirectionalState",
    "ImplicitState",
    "central",
    "chain",
    "every_step",
    "forward_gradient",
    "full",
    "implicit",
    "minibatch",
    "no_gradient",
    "one_sided",
    "per_step",
    "reverse",
    "store_all",
    "store_products",
    "two_level",
    "unroll_with_tail",
    "zeroth_order",
]

"""Inner solvers, and what they are put together from."""

from bilevax.inner.chain import ChainState, chain
from bilevax.inner.implicit import ImplicitState, implicit
from bilevax.inner.no_gradient import no_gradient
from bilevax.inner.reverse import Checkpoint, every_step, reverse, store_all, store_products, two_level
from bilevax.inner.unroll_with_tail import unroll_with_tail
from bilevax.sampling import full, minibatch, per_step

__all__ = [
    "ChainState",
    "Checkpoint",
    "ImplicitState",
    "chain",
    "every_step",
    "full",
    "implicit",
    "minibatch",
    "no_gradient",
    "per_step",
    "reverse",
    "store_all",
    "store_products",
    "two_level",
    "unroll_with_tail",
]

"""Inner solvers, and what they are put together from."""

from bilevax.carried import Carried
from bilevax.inner import guides, random_directions
from bilevax.inner._black_box import black_box
from bilevax.inner._chain import ChainState, chain
from bilevax.inner._directional import DirectionalInfo, DirectionalState
from bilevax.inner._equation import EquationInfo, EquationState
from bilevax.inner._first_order import first_order
from bilevax.inner._fixed_point import fixed_point
from bilevax.inner._forward_gradient import forward_gradient
from bilevax.inner._implicit import ImplicitState, implicit
from bilevax.inner._no_gradient import no_gradient
from bilevax.inner._optimizer_steps import StepKeys, step_keys
from bilevax.inner._reverse import Checkpoint, every_step, reverse, store_all, store_products, two_level
from bilevax.inner._root import root
from bilevax.inner._unroll_with_tail import unroll_with_tail
from bilevax.inner._zeroth_order import Difference, central, one_sided, zeroth_order

__all__ = [
    "Carried",
    "ChainState",
    "Checkpoint",
    "Difference",
    "DirectionalInfo",
    "DirectionalState",
    "EquationInfo",
    "EquationState",
    "ImplicitState",
    "StepKeys",
    "black_box",
    "central",
    "chain",
    "every_step",
    "first_order",
    "fixed_point",
    "forward_gradient",
    "guides",
    "implicit",
    "no_gradient",
    "one_sided",
    "random_directions",
    "reverse",
    "root",
    "step_keys",
    "store_all",
    "store_products",
    "two_level",
    "unroll_with_tail",
    "zeroth_order",
]


def __dir__() -> list[str]:
    return __all__

"""Products with second derivatives, losses with structure, and Kronecker factors of their curvature."""

from bilevax.curvature import capture, fisher, kronecker
from bilevax.curvature._describe import Report, describe
from bilevax.curvature.capture._observe import observe
from bilevax.curvature.damped_blocks import inverted
from bilevax.curvature.model_loss import ModelLoss, gauss_newton
from bilevax.curvature.output_loss import (
    OutputLoss,
    convex,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
    squared_error,
)
from bilevax.curvature.products import cross, damped, hessian
from bilevax.curvature.sharing import Sharing, expand, reduce

__all__ = [
    "ModelLoss",
    "OutputLoss",
    "Report",
    "Sharing",
    "capture",
    "convex",
    "cross",
    "damped",
    "describe",
    "expand",
    "fisher",
    "gauss_newton",
    "hessian",
    "inverted",
    "kronecker",
    "observe",
    "reduce",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "squared_error",
]


def __dir__() -> list[str]:
    return __all__

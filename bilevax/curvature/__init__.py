"""Products with second derivatives, and losses with structure."""

from bilevax.curvature.model_loss import (
    ModelLoss,
    OutputLoss,
    gauss_newton,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
    squared_error,
)
from bilevax.curvature.products import cross, damped, hessian

__all__ = [
    "ModelLoss",
    "OutputLoss",
    "cross",
    "damped",
    "gauss_newton",
    "hessian",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "squared_error",
]

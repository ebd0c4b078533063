"""Automatic capture: which block of the Gauss–Newton matrix each leaf of y gets, read off the traced model.

The model is traced once and its program walked equation by equation. A leaf that is contracted with data is a dense
layer, whatever the framework called it; the kernel of a convolution is a dense layer on patches; rows of a table that
are picked by index are an embedding; what meets the examples element by element has a diagonal block. Reshapes,
transposes, casts and broadcasts are looked through; jit, remat, custom rules and scans are entered.
"""

from bilevax.curvature.capture.block import Block
from bilevax.curvature.capture.blocks import Capture, trace
from bilevax.curvature.capture.treatments import Treatment, Unsupported, diagonal, error, identity, zero

__all__ = [
    "Block",
    "Capture",
    "Treatment",
    "Unsupported",
    "diagonal",
    "error",
    "identity",
    "trace",
    "zero",
]


def __dir__() -> list[str]:
    return __all__

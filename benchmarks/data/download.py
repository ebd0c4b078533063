"""Public data sets: found or downloaded, checked, and read into arrays.

Files lie in the folder that the environment variable BILEVAX_DATA names, or else in a cache folder; one that is missing
is downloaded from its public home. Nothing is unpacked to disk, and nothing is read that was not published so.
"""

import hashlib
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch
from scipy.sparse import csr_matrix

from benchmarks.data.readers import drawings, idx, sparse
from benchmarks.data.retrieval import FAILURES, retrieve
from benchmarks.data.unpacking import SLACK, SUFFIXES, UNREADABLE, unpacked
from benchmarks.harness.errors import DataError
from benchmarks.harness.files import replacing

FOLDER = "BILEVAX_DATA"

MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"
FASHION_MNIST = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
OMNIGLOT = "https://raw.githubusercontent.com/bitsandscraps/omniglot/9514cfd6780ed78e96a4d88bae8c85f3ee31359e"
LIBSVM = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets"


class Source(NamedTuple):
    """A public file.

    Attributes:
      url: its home, which may serve it compressed.
      size: bytes of the uncompressed file; not one more is ever unpacked.
      sha256: of the uncompressed file.
    """

    url: str
    size: int
    sha256: str


SOURCES = {
    "mnist/train-images-idx3-ubyte": Source(
        f"{MNIST}/train-images-idx3-ubyte.gz",
        47_040_016,
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "mnist/train-labels-idx1-ubyte": Source(
        f"{MNIST}/train-labels-idx1-ubyte.gz",
        60_008,
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "mnist/t10k-images-idx3-ubyte": Source(
        f"{MNIST}/t10k-images-idx3-ubyte.gz",
        7_840_016,
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "mnist/t10k-labels-idx1-ubyte": Source(
        f"{MNIST}/t10k-labels-idx1-ubyte.gz",
        10_008,
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "fashion-mnist/train-images-idx3-ubyte": Source(
        f"{FASHION_MNIST}/train-images-idx3-ubyte.gz",
        47_040_016,
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    "fashion-mnist/train-labels-idx1-ubyte": Source(
        f"{FASHION_MNIST}/train-labels-idx1-ubyte.gz",
        60_008,
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    "fashion-mnist/t10k-images-idx3-ubyte": Source(
        f"{FASHION_MNIST}/t10k-images-idx3-ubyte.gz",
        7_840_016,
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    "fashion-mnist/t10k-labels-idx1-ubyte": Source(
        f"{FASHION_MNIST}/t10k-labels-idx1-ubyte.gz",
        10_008,
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
    "omniglot/images_background.npz": Source(
        f"{OMNIGLOT}/images_background.npz",
        3_340_794,
        "8bf84167413cd00beacdce3fe582f780ab538d8dbef043a6d688f2527bbce199",
    ),
    "omniglot/images_evaluation.npz": Source(
        f"{OMNIGLOT}/images_evaluation.npz",
        2_415_269,
        "0b84c7ffd94c4841c0040e529c86a82eaaccb986d8eadad5673f7991b7475276",
    ),
    "libsvm/a9a": Source(
        f"{LIBSVM}/binary/a9a", 2_329_875, "f5d5ffd8d865ff41328e7ee043e4b020816914ff6843ff15b98905ddbedce906"
    ),
    "libsvm/a9a.t": Source(
        f"{LIBSVM}/binary/a9a.t", 1_164_628, "1f448a153f0320399a7e40836eb207655b0bde0f21fc941cc472193daa9f5de9"
    ),
    "libsvm/w8a": Source(
        f"{LIBSVM}/binary/w8a", 3_478_238, "6a9fa8fd5f524303240a5db07d4b3d4a51e8b7b4b20a914105d8e3e8c81640f2"
    ),
    "libsvm/ijcnn1": Source(
        f"{LIBSVM}/binary/ijcnn1.bz2", 7_744_897, "16506cad788cf7c9607454150ed1994788204bac2ff4c9cb3b320036b6950d3f"
    ),
    "libsvm/ijcnn1.t": Source(
        f"{LIBSVM}/binary/ijcnn1.t.bz2", 14_213_968, "e7b0bbd518641980dc322746c6bc59d019d3153934e6258e48f9d8cfae2c4bb8"
    ),
    "libsvm/news20": Source(
        f"{LIBSVM}/multiclass/news20.bz2",
        9_003_251,
        "1d6eb77c42e1c78e86f36af834268de933da3607f38e3703aef15f7a9f11e506",
    ),
}


def folder() -> Path:
    """Where the files lie: $BILEVAX_DATA, or else a cache folder."""
    named = os.environ.get(FOLDER)
    if not named:
        return Path(pooch.os_cache("bilevax"))
    path = Path(named).expanduser()
    if not path.is_dir():
        raise DataError(f"{FOLDER} must name a folder; got {named}, which is none. Create it, or unset {FOLDER}.")
    return path


def fetch(name: str) -> bytes:
    """The checked content of a public file, uncompressed.

    Args:
      name: a key of SOURCES, which is also its path in the folder; there it may end in .gz, .bz2 or .xz as well.

    Returns:
      The bytes that were published.

    Raises:
      DataError: where the file is missing and cannot be downloaded, cannot be read, or has the wrong content.
    """
    source, stem = SOURCES[name], folder() / name
    paths = {suffix: stem.with_name(stem.name + suffix) for suffix in SUFFIXES}
    at_home = next(suffix for suffix in reversed(SUFFIXES) if source.url.endswith(suffix))
    suffix = next((suffix for suffix, path in paths.items() if os.path.isfile(path)), None)
    if suffix is None:
        return _downloaded(source, at_home, stem, paths[at_home])
    path = paths[suffix]
    try:
        return _checked(path, suffix, source)
    except DataError as error:
        raise DataError(
            f"{path} {error}. Delete it and run again, or delete it and download {source.url} to {paths[at_home]}."
        ) from error


def _checked(path: Path, suffix: str, source: Source) -> bytes:
    try:
        with path.open("rb") as file:
            packed = file.read(source.size + SLACK + 1)
        content = unpacked(packed, suffix, source.size + 1)
    except UNREADABLE as error:
        raise DataError(f"cannot be read: {error or type(error).__name__}") from error
    if len(content) != source.size:
        size = f"{len(content)} bytes" if len(content) < source.size else "more"
        raise DataError(f"must have {source.size} bytes when uncompressed; got {size}")
    if (sha256 := hashlib.sha256(content).hexdigest()) != source.sha256:
        raise DataError(f"must have the sha256 {source.sha256} when uncompressed; got {sha256}")
    return content


def _downloaded(source: Source, suffix: str, stem: Path, path: Path) -> bytes:
    print(f"Downloading {source.url} to {path}", file=sys.stderr)
    try:
        with replacing(path) as temporary:
            retrieve(source.url, temporary, source.size + SLACK)
            return _checked(temporary, suffix, source)
    except (DataError, *FAILURES) as error:
        said = f"What came {error}" if isinstance(error, DataError) else f"The download said: {error}"
        raise DataError(
            f"{stem} is missing (plain, or with {', '.join(filter(None, SUFFIXES))}), and it could not be downloaded. "
            f"Name a folder that has it with {FOLDER}=<folder>, or download {source.url} to {path} by hand. {said}"
        ) from error


def images(name: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    """MNIST or Fashion-MNIST.

    Args:
      name: "mnist" or "fashion-mnist".
      part: "train" or "t10k".

    Returns:
      Images, uint8 [N, 28, 28], and labels, uint8 [N].
    """
    files = {f"{name}/{part}-images-idx3-ubyte": 3, f"{name}/{part}-labels-idx1-ubyte": 1}
    images, labels = (idx(fetch(file), dimensions, file) for file, dimensions in files.items())
    return images, labels


def shrunk(images: np.ndarray, times: int) -> np.ndarray:
    """Means over times × times pixels, of images [..., side, side]; float32 [..., side / times, side / times]."""
    side = images.shape[-1] // times
    blocks = images.reshape(*images.shape[:-2], side, times, side, times)
    return blocks.mean(axis=(-3, -1), dtype=np.float32)


def libsvm(name: str, features: int) -> tuple[csr_matrix, np.ndarray]:
    """A LIBSVM data set, such as "ijcnn1.t": sparse rows, float64 [N, features], and labels as given, float64 [N]."""
    return sparse(fetch(f"libsvm/{name}"), features, f"libsvm/{name}")


def omniglot(part: str) -> np.ndarray:
    """The drawings of Omniglot's "background" or "evaluation" classes: bool [class, drawer, 105, 105], False is ink."""
    return drawings(fetch(f"omniglot/images_{part}.npz"), f"omniglot/images_{part}.npz")

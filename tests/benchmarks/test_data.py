import bz2
import functools
import gzip
import hashlib
import io
import lzma
import pickle
import zipfile
import zlib

import numpy as np
import pooch
import pytest
import requests

from benchmarks.__main__ import main
from benchmarks.data import download, readers, unpacking
from benchmarks.data.download import Source
from benchmarks.harness.errors import DataError

TEXT = b"-1 1:0.5 3:2\n+1 2:-1\n" * 200
NAME = "libsvm/small"
PACK = {
    "": lambda content: content,
    ".gz": functools.partial(gzip.compress, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def place(folder, content, name=NAME):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def idx_file(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def npz(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A download fails as it does without network, and says what it was asked for."""

    def send(adapter, request, **arguments):
        raise requests.ConnectionError(f"no network for {request.url}")

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    source = Source("https://example.org/small.bz2", len(TEXT), hashlib.sha256(TEXT).hexdigest())
    monkeypatch.setattr(download, "SOURCES", {**download.SOURCES, NAME: source})
    monkeypatch.setenv("BILEVAX_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("suffix", PACK)
def test_a_file_is_read_without_network_however_it_is_packed(folder, suffix):
    place(folder, PACK[suffix](TEXT), NAME + suffix)
    assert download.fetch(NAME) == TEXT
    assert [path.name for path in folder.rglob("*") if path.is_file()] == [f"small{suffix}"]


def test_a_missing_file_is_downloaded_once_to_where_it_is_looked_for(folder, monkeypatch, capsys):
    asked = []

    def retrieve(url, file, most):
        asked.append(url)
        file.write_bytes(bz2.compress(TEXT))

    monkeypatch.setattr(download, "retrieve", retrieve)
    assert download.fetch(NAME) == TEXT
    assert download.fetch(NAME) == TEXT
    assert asked == ["https://example.org/small.bz2"]
    assert "Downloading https://example.org/small.bz2" in capsys.readouterr().err


def test_a_download_that_is_something_else_is_not_kept(folder, monkeypatch):
    monkeypatch.setattr(download, "retrieve", lambda url, file, most: file.write_bytes(b"<html>log in</html>"))
    with pytest.raises(DataError, match=r"small is missing.* by hand. What came cannot be read"):
        download.fetch(NAME)
    assert not any(path.is_file() for path in folder.rglob("*"))


def test_without_the_variable_files_lie_in_the_cache_folder(monkeypatch):
    monkeypatch.delenv("BILEVAX_DATA", raising=False)
    assert str(download.folder()) == str(pooch.os_cache("bilevax"))


def test_a_missing_file_without_network_says_which_where_and_what_to_do(folder):
    with pytest.raises(DataError) as error:
        download.fetch(NAME)
    for words in (
        str(folder / NAME),
        "is missing",
        "BILEVAX_DATA=<folder>",
        "no network",
        f"download https://example.org/small.bz2 to {folder / 'libsvm' / 'small.bz2'} by hand",
    ):
        assert words in str(error.value)


def test_a_folder_that_is_none_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("BILEVAX_DATA", str(tmp_path / "typo"))
    with pytest.raises(DataError, match=r"BILEVAX_DATA must name a folder; got .*typo"):
        download.fetch("libsvm/a9a")


BOMB = bytes(10**7)


WRONG = {
    "a byte less": ("", TEXT[:-1], f"must have {len(TEXT)} bytes when uncompressed; got {len(TEXT) - 1} bytes"),
    "a byte more": ("", TEXT + b"\n", f"must have {len(TEXT)} bytes when uncompressed; got more"),
    "another byte": ("", b"+" + TEXT[1:], "must have the sha256"),
    "empty": ("", b"", f"must have {len(TEXT)} bytes when uncompressed; got 0 bytes"),
    "damaged": (".gz", PACK[".gz"](TEXT)[:12] + bytes(40), "cannot be read"),
    **{f"truncated {end}": (end, PACK[end](TEXT)[:-10], "cannot be read") for end in (".gz", ".bz2", ".xz")},
    **{f"a web page as {end}": (end, b"<html>404</html>", "cannot be read") for end in (".gz", ".bz2", ".xz")},
    **{f"a bomb {end}": (end, PACK[end](BOMB), "must have") for end in (".gz", ".bz2", ".xz")},
}


@pytest.mark.parametrize(("suffix", "content", "what"), WRONG.values(), ids=WRONG)
def test_a_file_with_another_content_is_refused_with_the_fix(folder, suffix, content, what):
    path = place(folder, content, NAME + suffix)
    with pytest.raises(DataError) as error:
        download.fetch(NAME)
    assert str(error.value).startswith(f"{path} {what}")
    fix = f"Delete it and run again, or delete it and download https://example.org/small.bz2 to {folder / NAME}.bz2."
    assert fix in str(error.value)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_no_more_is_unpacked_than_was_published(suffix):
    packed = PACK[suffix](TEXT)
    for most in (0, 1, len(TEXT) - 1, len(TEXT), len(TEXT) + 1):
        assert unpacking.unpacked(packed, suffix, most) == TEXT[:most]
    assert unpacking.unpacked(packed + packed + bytes(8), suffix, 10**6) == TEXT * 2
    with pytest.raises(EOFError, match="more than 100 streams"):
        unpacking.unpacked(PACK[suffix](b"") * 101, suffix, 10)


def test_an_xz_file_that_asks_for_much_memory_is_refused(folder):
    packed = lzma.compress(TEXT)
    head = packed[12:16] + bytes([38]) + packed[17:20]  # of the first block: a dictionary of 2 GiB
    place(folder, packed[:12] + head + zlib.crc32(head).to_bytes(4, "little") + packed[24:], NAME + ".xz")
    with pytest.raises(DataError, match=r"small\.xz cannot be read: Memory usage limit"):
        download.fetch(NAME)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 4), (0,)])
def test_idx_files_are_read(shape):
    array = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(readers.idx(idx_file(array), len(shape), "mnist/x"), array)


HOSTILE_IDX = {
    "empty": b"",
    "no sizes": b"\0\0\x08\x03",
    "one dimension": idx_file(np.zeros(24)),
    "a byte less": idx_file(np.zeros((2, 3, 4)))[:-1],
    "a byte more": idx_file(np.zeros((2, 3, 4))) + b"\0",
    "sizes that no array has": bytes([0, 0, 8, 3]) + bytes(4) + b"\xff" * 8,
    "sizes far beyond the file": bytes([0, 0, 8, 3]) + b"\xff" * 12,
    "floats": bytes([0, 0, 13, 3]) + idx_file(np.zeros((2, 3, 4)))[4:],
}


@pytest.mark.parametrize("content", HOSTILE_IDX.values(), ids=HOSTILE_IDX)
def test_hostile_idx_files_are_refused(content):
    with pytest.raises(DataError, match=r"mnist/x, an idx file.*must.*; got .* Delete it"):
        readers.idx(content, 3, "mnist/x")


def test_images_come_with_their_labels(folder, monkeypatch):
    images, labels = np.arange(24).reshape(2, 3, 4), np.array([3, 1])
    for name, array in (("t10k-images-idx3-ubyte", images), ("t10k-labels-idx1-ubyte", labels)):
        content = idx_file(array)
        source = Source("https://example.org", len(content), hashlib.sha256(content).hexdigest())
        monkeypatch.setitem(download.SOURCES, f"mnist/{name}", source)
        place(folder, gzip.compress(content), f"mnist/{name}.gz")
    for read, written in zip(download.images("mnist", "t10k"), (images, labels), strict=True):
        np.testing.assert_array_equal(read, written)


def test_libsvm_files_are_read():
    rows, labels = readers.sparse(b"-1 1:0.5 3:2e0\n+1 2:-1 # a comment\n\n2\n", 4, "libsvm/x")
    np.testing.assert_array_equal(rows.toarray(), [[0.5, 0, 2, 0], [0, -1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(labels, [-1, 1, 2])


@pytest.mark.parametrize(
    "content",
    [
        b"1 5:1\n",
        b"1 0:1\n",
        b"1 -2:1\n",
        b"1 2:1 1:1\n",
        b"1 1:nan\n",
        b"inf 1:1\n",
        b"one 1:1\n",
        b"1 1\n",
        b"\x80\0",
        b"1 1:1e999\n",
        b"1 99999999999999999999:1\n",
        b"1 " + b"9" * 5000 + b":1\n",
        b"1 1:1:1\n",
    ],
)
def test_hostile_libsvm_files_are_refused(content):
    with pytest.raises(DataError, match=r"libsvm/x, line 2, must be 'label index:value …'.*from 1 to 4"):
        readers.sparse(b"1 1:1\n" + content, 4, "libsvm/x")


def test_drawings_are_read():
    images = np.zeros((2, 20, 105, 105), bool)
    images[1, 3, 5, 7] = True
    np.testing.assert_array_equal(readers.drawings(npz(images=images, labels=np.arange(2)), "omniglot/x"), images)


def npz_of(member, content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def encrypted(content):
    place = content.index(b"PK\x01\x02") + 8  # the flags of the first file
    return content[:place] + b"\1" + content[place + 1 :]


class Trap:
    def __reduce__(self):
        return pytest.fail, ("a pickle was run",)


HOSTILE_NPZ = {
    "empty": b"",
    "no zip file": b"not a zip file",
    "truncated": npz(images=np.zeros((1, 20, 105, 105), bool))[:-30],
    "no images": npz(labels=np.zeros(3)),
    "another shape": npz(images=np.zeros((1, 20, 105, 104), bool)),
    "another dtype": npz(images=np.zeros((1, 20, 105, 105), np.uint8)),
    "a pickle": npz_of("images.npy", pickle.dumps(Trap())),
    "an array of objects": npz_of("images.npy", npy(np.array([Trap()], object))),
    "a shape far beyond the file": npz_of(
        "images.npy", npy(np.zeros(9)).replace(b"(9,), }" + b" " * 15, b"(9999999999999999,), }")
    ),
    "a path that escapes": npz_of("../../images.npy", npy(np.zeros(9))),
    "another order": npz(images=np.asfortranarray(np.zeros((2, 20, 105, 105), bool))),
    "brackets without end": npz_of("images.npy", b"\x93NUMPY\x01\x00" + (4000).to_bytes(2, "little") + b"(" * 4000),
    "an encrypted member": encrypted(npz(images=np.zeros((1, 20, 105, 105), bool))),
}


@pytest.mark.parametrize("content", HOSTILE_NPZ.values(), ids=HOSTILE_NPZ)
def test_hostile_npz_files_are_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"omniglot/x must be an npz file with images\.npy, bool .* Delete it"):
        readers.drawings(content, "omniglot/x")
    assert not list(tmp_path.iterdir())


def test_an_npz_bomb_is_refused_before_it_is_unpacked(monkeypatch):
    monkeypatch.setattr(readers, "LARGEST", 10**6)
    with pytest.raises(DataError, match="unpacks to 1000001 bytes, more than 1000000"):
        readers.drawings(npz_of("images.npy", bytes(10**6 + 1)), "omniglot/x")


def test_the_program_prints_a_data_error_without_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BILEVAX_DATA", str(tmp_path))
    code = main(["regularization", "--data", "a9a", "--quick", "--results", str(tmp_path / "results")])
    output = capsys.readouterr()
    assert code == 1
    assert f"{tmp_path / 'libsvm' / 'a9a'} is missing" in output.err
    assert "Traceback" not in output.err

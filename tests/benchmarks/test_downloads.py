"""Downloads from a server on this machine that keeps to no rule."""

import bz2
import gzip
import hashlib
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.data import download, retrieval
from benchmarks.data.download import Source
from benchmarks.harness.errors import DataError

TEXT = b"-1 1:0.5 3:2\n+1 2:-1\n" * 300  # 6,300 bytes
NAME = "libsvm/small"
BOMB = bz2.compress(bytes(10**7))


def answer(handler, code, body=b"", **headers):
    handler.send_response(code)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def endless(handler, code=200, pause=0.0, piece=bytes(2**16), **headers):
    answer(handler, code, **headers)
    while not handler.server.over.wait(pause) and handler.server.sent < 2**28:
        handler.wfile.write(piece)
        handler.server.sent += len(piece)


def slow_head(handler):
    while not handler.server.over.wait(0.05):
        handler.wfile.write(b"H")
        handler.wfile.flush()


PAGES = {
    "/good.bz2": lambda handler: answer(handler, 200, bz2.compress(TEXT)),
    "/moved.bz2": lambda handler: answer(handler, 302, Location="/good.bz2"),
    "/endless.bz2": endless,
    "/moved-endless.bz2": lambda handler: endless(handler, 302, Location="/good.bz2"),
    "/slow.bz2": lambda handler: endless(handler, pause=0.05, piece=b"B"),
    "/slow-head.bz2": slow_head,
    "/silent.bz2": lambda handler: handler.server.over.wait(),
    "/file.bz2": lambda handler: answer(handler, 302, Location="file:///etc/hostname"),
    "/ftp.bz2": lambda handler: answer(handler, 302, Location="ftp://127.0.0.1/small.bz2"),
    "/circle.bz2": lambda handler: answer(handler, 302, Location="/circle.bz2"),
    "/absent.bz2": lambda handler: answer(handler, 404, b"<html>none</html>"),
    "/cut.bz2": lambda handler: answer(handler, 200, bz2.compress(TEXT)[:50], Content_Length="9000"),
    "/page.bz2": lambda handler: answer(handler, 200, b"<html>log in</html>"),
    "/other.bz2": lambda handler: answer(handler, 200, bz2.compress(TEXT[::-1])),
    "/bomb.bz2": lambda handler: answer(handler, 200, BOMB),
    # Packed once more on the way, for which nobody asked: 10 MB in 30 kB, of which none are unpacked
    "/twice.bz2": lambda handler: answer(handler, 200, gzip.compress(bytes(10**6)), Content_Encoding="gzip"),
    "/garbage.bz2": lambda handler: handler.wfile.write(b"\0\xff no answer\r\n\r\n"),
}
REFUSED = {
    "/endless.bz2": r"at most \d+ bytes; more came",
    "/slow.bz2": "too slow",
    "/slow-head.bz2": "too slow",
    "/silent.bz2": "timed out",
    "/file.bz2": "only http and https are followed; it leads to file:///etc/hostname",
    "/ftp.bz2": "only http and https are followed",
    "/circle.bz2": "more than 5 other addresses",
    "/absent.bz2": "404",
    "/cut.bz2": "IncompleteRead",
    "/page.bz2": "What came cannot be read",
    "/other.bz2": "What came must have the sha256",
    "/bomb.bz2": f"What came must have {len(TEXT)} bytes when uncompressed; got more",
    "/twice.bz2": "What came cannot be read",
    "/garbage.bz2": "The download said",
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        PAGES[self.path](self)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    over = threading.Event()
    sent = 0

    def handle_error(self, request, client_address):
        pass  # the other end has left


@pytest.fixture(scope="module")
def server():
    with Server(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield served
        served.over.set()
        served.shutdown()


@pytest.fixture
def fetch(server, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("BILEVAX_DATA", str(tmp_path))

    def ask(page):
        monkeypatch.setattr(retrieval, "GRACE", 0.3 if "slow" in page else 10)
        monkeypatch.setattr(retrieval, "TIMEOUT", 0.3 if page == "/silent.bz2" else 10)
        source = Source(f"http://127.0.0.1:{server.server_port}{page}", len(TEXT), hashlib.sha256(TEXT).hexdigest())
        monkeypatch.setitem(download.SOURCES, NAME, source)
        return download.fetch(NAME)

    return ask


@pytest.mark.parametrize("page", ["/good.bz2", "/moved.bz2", "/moved-endless.bz2"])
def test_a_file_is_downloaded_whole(fetch, server, tmp_path, page):
    server.sent = 0
    assert fetch(page) == TEXT
    assert server.sent < 2**24
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["small.bz2"]
    assert fetch("/absent.bz2") == TEXT  # it is there


@pytest.mark.parametrize("page", REFUSED)
def test_what_a_server_does_is_borne(fetch, server, tmp_path, page):
    server.sent, start = 0, time.monotonic()
    with pytest.raises(DataError, match=REFUSED[page]) as error:
        fetch(page)
    assert "by hand" in str(error.value)
    assert time.monotonic() - start < 5
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    assert server.sent < 2**24  # of 2**28 it would have sent: what fits in the buffers of both ends


def test_other_addresses_than_of_the_web_are_not_opened(tmp_path):
    with pytest.raises(ValueError, match="only http and https"):
        retrieval.retrieve("file:///etc/hostname", tmp_path / "file", 100)
    assert not (tmp_path / "file").exists()


def test_a_folder_that_cannot_be_written_is_named(fetch, tmp_path, monkeypatch):
    (tmp_path / "libsvm").write_text("a file")
    with pytest.raises(DataError, match=r"small is missing.*could not be downloaded"):
        fetch("/good.bz2")

"""Downloads that end: after so many bytes, so many redirects, and so much time."""

import threading
import time
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

CHUNK = 2**14
TIMEOUT = 30.0  # seconds without a byte
GRACE = 60.0  # seconds that a server has to begin
SLOWEST = 2**13  # bytes a second that must have come since then
REDIRECTS = 5
FAILURES = (OSError, ValueError, urllib3.exceptions.HTTPError)  # errors of requests are OSErrors


def _opened(url: str) -> requests.Response:
    """The answer to a request, its body still to be read.

    Redirects are followed here, by adapters alone: a session reads the whole body of each, also of one that is endless.
    """
    session = requests.Session()
    for _ in range(REDIRECTS + 1):
        if urlsplit(url).scheme not in ("http", "https"):
            raise ValueError(f"only http and https are followed; it leads to {url[:200]}")
        request = session.prepare_request(requests.Request("GET", url, headers={"Accept-Encoding": "identity"}))
        settings = session.merge_environment_settings(url, {}, True, None, None)
        response = session.get_adapter(url).send(request, timeout=TIMEOUT, **settings)
        if response.ok and not response.is_redirect:
            return response
        response.close()
        response.raise_for_status()
        url = urljoin(url, response.headers["location"])
    raise ValueError(f"it leads to more than {REDIRECTS} other addresses")


def retrieve(url: str, file: Path, most: int) -> None:
    """Downloads a file.

    Args:
      url: its address, http or https; so must be all that it leads to.
      file: where it goes; what lies there is overwritten, and what failed may lie there in part.
      most: bytes that it may have.

    Raises:
      OSError, ValueError, urllib3.exceptions.HTTPError: where it cannot be had, has more bytes, or comes too slowly;
        all are in FAILURES.
    """
    received, stopped = 0, threading.Event()
    failed: list[BaseException] = []

    def transfer() -> None:
        nonlocal received
        try:
            with _opened(url) as response, file.open("wb") as out:
                for chunk in response.raw.stream(CHUNK, decode_content=False):
                    received += len(chunk)
                    if received > most:
                        raise ValueError(f"it must have at most {most} bytes; more came")
                    if stopped.is_set():
                        return
                    out.write(chunk)
        except BaseException as error:
            failed.append(error)

    # In a thread, for a server that sends a byte now and then keeps each read, of the headers too, within its timeout.
    thread, start = threading.Thread(target=transfer, daemon=True), time.monotonic()
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.05)
            seconds = time.monotonic() - start
            if received < SLOWEST * (seconds - GRACE):
                raise TimeoutError(f"{received} bytes came within {seconds:.0f} seconds, which is too slow")
    finally:
        stopped.set()
    if failed:
        raise failed[0]

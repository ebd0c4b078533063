"""How a command is stopped: SIGTERM as Ctrl-C, and neither is lost."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPTED = 130  # what a job returns that was stopped, whatever the signal
CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: 143}  # as shells have them
DEAF = ("_xla_gc_callback", "__del__")  # functions where Python drops an exception
AGAIN = 0.05  # seconds


def _deaf(frame: FrameType | None) -> bool:
    """Whether an exception that is raised now would be dropped."""
    while frame is not None:
        if frame.f_code.co_name in DEAF:
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], int]]:
    """In the block both signals raise KeyboardInterrupt, at the next instruction of Python; a second SIGTERM does not.

    Yields:
      What says the exit code of the signal that came: 143 of SIGTERM, else 130.
    """
    received: list[int] = []

    def heed(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and received:
            return  # one who waits for the end of this process may send several
        if number != signal.SIGALRM:
            received.append(number)
        if _deaf(frame):
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        else:
            raise KeyboardInterrupt

    def code() -> int:
        return CODES[signal.Signals(received[0])] if received else CODES[signal.SIGINT]

    before = {}
    with contextlib.suppress(ValueError):  # another thread than the main one heeds no signals
        for number in (*CODES, *([signal.SIGALRM] if os.name == "posix" else [])):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as of a command that runs in the background
                before[number] = signal.signal(number, heed)
    try:
        yield code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

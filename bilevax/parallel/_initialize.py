"""Joining the processes of a run, and ending all of them where one is gone."""

import atexit
import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from bilevax import checks

EXIT_CODE = 75  # of sysexits.h: try again
_BEATS, _GONE, _LEFT = "bilevax/beats/", "bilevax/gone/", "bilevax/left/"  # keys in JAX's coordination service
_ADVICE = "Start all processes again, as many or fewer: bx.checkpoint.restore reads the newest step that is complete."
_CLOSED = "it held the coordination service, which has closed"
_STATUS = re.compile(r"[A-Z_]{5,}: ")  # "UNKNOWN: Gloo all-reduce failed": of XLA, in a ValueError or JaxRuntimeError
_handlers: list[Any] = []  # C calls them: they must stay


class _Run(NamedTuple):
    """What the threads of this process know.

    Attributes:
      client: of JAX's coordination service, which lives in process 0.
      coordinator: its host and port.
      process: number of this one.
      processes: how many.
      timeout: seconds.
      advice: how to resume.
      over: is set when this process leaves in peace.
      ending: is held by the thread that ends this process.
    """

    client: Any
    coordinator: str
    process: int
    processes: int
    timeout: float
    advice: str
    over: threading.Event
    ending: threading.Lock

    @property
    def every(self) -> float:
        """Seconds between two signs of life."""
        return min(1.0, self.timeout / 10)

    def write(self, key: str, value: str) -> None:
        self.client.key_value_set(key, value, allow_overwrite=True)

    def read(self, folder: str) -> dict[str, str]:
        return {key.removeprefix(folder): value for key, value in self.client.key_value_dir_get(folder)}


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: float = 20.0,
    advice: str = _ADVICE,
) -> None:
    """Joins the processes of a run: `jax.distributed.initialize`, and an end for all where one of them is gone.

    Every process writes signs of life into JAX's coordination service and reads those of the others. Where one was
    killed, or has ended by an exception, the others say which one and end with exit code 75, also out of a collective
    that waits for it. JAX itself would wait longer and abort.

    Args:
      coordinator: "host:port" of process 0; like the next two found by JAX under SLURM, Open MPI, Kubernetes and on
        TPU pods.
      processes: how many.
      process: number of this one, from 0.
      timeout: seconds without a sign of life after which a process is gone; the end of process 0 is seen at once.
      advice: a sentence about how to resume, for the message.

    Raises:
      ValueError: if `timeout` is not positive; what JAX raises, for instance if it has already started.

    Cost: three threads, and a few short messages to process 0 in every second, ten times in `timeout` at least.

    Example:
        >>> import bilevax as bx
        >>> bx.parallel.initialize("10.0.0.1:1234", processes=4, process=0)  # doctest: +SKIP
    """
    checks.scalar("timeout", timeout)
    checks.positive("timeout", timeout)
    late = max(100, round(5 * timeout))  # after which JAX aborts this process, if all of what is below has failed
    jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=late)
    state: Any = multihost_utils.distributed.global_state
    if state.num_processes == 1:
        return
    place = state.client, state.coordinator_address, state.process_id, state.num_processes
    run = _Run(*place, timeout, advice, threading.Event(), threading.Lock())
    threads = [threading.Thread(target=one, args=(run,), daemon=True) for one in (_beat, _watch, _hold)]
    for thread in threads:
        thread.start()
    _at_abort(run)
    _at_exceptions(run)
    atexit.register(_leave, run, threads)  # before JAX leaves, which has registered that earlier


def _leave(run: _Run, threads: list[threading.Thread]) -> None:
    """Tells the others that no more signs of life will come; JAX waits for them."""
    run.over.set()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone, and JAX says so
        run.write(f"{_LEFT}{run.process}", "")
    for thread in threads:
        thread.join()


def _beat(run: _Run) -> None:
    beats = 0
    while not run.over.wait(run.every):
        try:
            run.write(f"{_BEATS}{run.process}", str(beats))
        except jax.errors.JaxRuntimeError:
            return  # `_hold` sees it too
        beats += 1


def _watch(run: _Run) -> None:
    """Ends this process where another one has failed, or where its sign of life has not changed at so many looks.

    Looks are counted, not seconds: where this process was halted, it is not the others that are gone.
    """
    most = round(run.timeout / run.every)
    last: dict[str, str] = {}
    unchanged = {str(process): 0 for process in range(run.processes) if process != run.process}
    while not run.over.wait(run.every):
        try:
            gone, beats, left = (run.read(folder) for folder in (_GONE, _BEATS, _LEFT))
            for process, reason in gone.items():
                if process != str(run.process):
                    return _end(run, process, reason)
            for process in unchanged:
                unchanged[process] = unchanged[process] + 1 if beats.get(process) == last.get(process) else 0
                if unchanged[process] >= most and process not in left:
                    reason = f"no sign of life for {run.timeout:g} s"
                    run.write(f"{_GONE}{process}", reason)
                    return _end(run, process, reason)
            last = beats
        except jax.errors.JaxRuntimeError:
            return  # `_hold` sees it too


def _hold(run: _Run) -> None:
    """Waits for a key that this process writes last: where process 0 goes, the service goes, and the wait ends."""
    while not run.over.is_set():
        try:
            run.client.blocking_key_value_get(f"{_LEFT}{run.process}", 3_600_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                return _end(run, "0", _CLOSED)


def _end(run: _Run, process: str, reason: str) -> None:
    """Says which process is gone, and ends this one; the first thread that comes here."""
    if run.over.is_set() or not run.ending.acquire(blocking=False):
        return
    text = (
        f"\nbilevax: process {process} of {run.processes} is gone: {reason}. Process {run.process} ends too, with exit "
        f"code {EXIT_CODE}.\n{run.advice}\n"
    )
    os.write(2, text.encode())  # at once: the main thread may hold the lock of sys.stderr
    _wait_for_readers(run)
    os._exit(EXIT_CODE)


def _wait_for_readers(run: _Run) -> None:
    """With process 0 goes the service in which the others read what has happened."""
    if run.process == 0:
        time.sleep(3 * run.every)


def _at_abort(run: _Run) -> None:
    """Where process 0 is gone, JAX aborts from a thread of C++, after a message of its own: its last act is ours.

    The message depends on nothing that this thread may hold: a call of the client would wait for it for ever.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(number: int) -> None:
        if not _answers(run.coordinator):
            _end(run, "0", _CLOSED)
        if run.ending.locked():
            time.sleep(60)  # another thread is about to end this process
        if before not in (None, 0, 1):  # neither the default nor ignored: faulthandler, for instance
            ctypes.CFUNCTYPE(None, ctypes.c_int)(before)(number)

    _handlers.append(handler)
    install = ctypes.pythonapi.PyOS_setsig
    install.restype = ctypes.c_void_p
    before = install(signal.SIGABRT, handler)


def _answers(coordinator: str) -> bool:
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def _at_exceptions(run: _Run) -> None:
    """Tells the others of an exception that nobody has caught; JAX would wait for them, and they for this one."""
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        collective = bool(_STATUS.match(str(error)))
        if collective and run.ending.locked():
            time.sleep(60)  # it failed as another process is gone, which has been said: another thread ends this one
        shown(kind, error, traceback)
        if hasattr(sys, "ps1"):  # somebody types, and goes on
            return
        if collective:  # perhaps since another process is gone: that is said first
            time.sleep(run.timeout + 3 * run.every)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone: `_hold` ends this one
            run.write(f"{_GONE}{run.process}", f"it ended with {kind.__name__}: {error!s:.200}")
        _wait_for_readers(run)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130 if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = hook

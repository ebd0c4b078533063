"""Processes that end together: where one is killed or fails, the others say which, and end."""

import socket
import sys
import threading
import time
from types import SimpleNamespace

import jax
import pytest
from processes import start

import bilevax as bx
from bilevax.parallel import _initialize

CODE = 75
WITHOUT_ABORT = pytest.mark.skipif(  # which leaves nobody a last word
    jax.__version_info__ < (0, 10), reason="JAX then ended by exit(1) where process 0 was gone"
)


class Service:
    """JAX's coordination service as one process sees it; with `closed`, as if process 0 were gone."""

    def __init__(self):
        self.entries, self.closed = {}, None

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite
        self._check()
        self.entries[key] = value

    def key_value_dir_get(self, folder):
        self._check()
        return [(key, value) for key, value in self.entries.items() if key.startswith(folder)]

    def blocking_key_value_get(self, key, timeout):
        while key not in self.entries:
            self._check()
            time.sleep(0.005)
        return self.entries[key]

    def _check(self):
        if self.closed:
            raise jax.errors.JaxRuntimeError(self.closed)


@pytest.fixture
def run(monkeypatch):
    """Process 1 of 3, whose end is an exception; it is 10 looks of 10 ms until another one is gone."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(_initialize.os, "_exit", leave)
    made = _initialize._Run(Service(), "localhost:1", 1, 3, 0.1, "Type it again.", threading.Event(), threading.Lock())
    yield made
    made.over.set()


def beating(run, *processes, seconds=0.4):
    """Signs of life of some processes for a while, after which `run` is over."""

    def beat():
        for number in range(int(seconds / 0.005)):
            for process in processes:
                run.client.entries[f"bilevax/beats/{process}"] = str(number)
            time.sleep(0.005)
        run.over.set()

    thread = threading.Thread(target=beat)
    thread.start()
    return thread


def test_a_process_without_a_sign_of_life_is_gone(run, capfd):
    thread = beating(run, 0, 1)
    with pytest.raises(SystemExit, match=f"{CODE}"):
        _initialize._watch(run)
    thread.join()
    said = capfd.readouterr().err
    assert "process 2 of 3 is gone: no sign of life for 0.1 s. Process 1 ends too, with exit code 75." in said
    assert said.endswith("Type it again.\n")
    assert run.client.entries["bilevax/gone/2"] == "no sign of life for 0.1 s"  # the others read it


def test_a_process_that_has_left_is_not_gone(run, capfd):
    run.client.entries["bilevax/left/2"] = ""
    thread = beating(run, 0, 1)
    _initialize._watch(run)
    thread.join()
    assert capfd.readouterr().err == ""


def test_what_another_one_has_written_is_said(run, capfd):
    run.client.entries["bilevax/gone/1"] = "about this one"
    run.client.entries["bilevax/gone/0"] = "it ended with ValueError: no space left"
    with pytest.raises(SystemExit, match=f"{CODE}"):
        _initialize._watch(run)
    assert "process 0 of 3 is gone: it ended with ValueError: no space left. Process 1" in capfd.readouterr().err


def test_the_end_of_process_0_is_seen_at_once(run, capfd):
    run.client.closed = "UNAVAILABLE: Socket closed"
    _initialize._watch(run)  # leaves that to the next
    _initialize._beat(run)
    with pytest.raises(SystemExit, match=f"{CODE}"):
        _initialize._hold(run)
    assert "process 0 of 3 is gone: it held the coordination service, which has closed." in capfd.readouterr().err
    _initialize._hold(run)  # a second thread does not speak again
    assert capfd.readouterr().err == ""


def test_an_exception_is_told_to_the_others(run, monkeypatch, capfd):
    monkeypatch.setattr(sys, "excepthook", lambda *error: None)
    _initialize._at_exceptions(run)
    for error, code in (
        (ValueError("no space left"), 1),
        (KeyboardInterrupt(), 130),
        (jax.errors.JaxRuntimeError(), 1),
    ):
        with pytest.raises(SystemExit, match=f"^{code}$"):
            sys.excepthook(type(error), error, None)
        assert run.client.entries["bilevax/gone/1"].startswith(f"it ended with {type(error).__name__}: {error}")
    run.client.closed = "UNAVAILABLE"
    with pytest.raises(SystemExit, match=r"^1$"):
        sys.excepthook(ValueError, ValueError(), None)


def test_whether_somebody_answers():
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        assert _initialize._answers(address)
    assert not _initialize._answers(address)


def test_threads_end_with_the_run(monkeypatch):
    """And process 0, in which the others read what has happened, waits for them."""
    service, at_exit, given = Service(), [], []
    state = SimpleNamespace(client=service, coordinator_address="localhost:1", process_id=0, num_processes=2)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **options: given.append((a, options)))
    monkeypatch.setattr(_initialize.multihost_utils.distributed, "global_state", state)
    monkeypatch.setattr(_initialize.atexit, "register", lambda *call: at_exit.append(call))
    for name in ("_at_abort", "_at_exceptions"):
        monkeypatch.setattr(_initialize, name, lambda run: None)
    before = threading.active_count()
    bx.parallel.initialize("localhost:1", 2, 0, timeout=30.0)
    assert given == [(("localhost:1", 2, 0), {"heartbeat_timeout_seconds": 150})]
    assert threading.active_count() == before + 3
    ((leave, run, threads),) = at_exit
    leave(run, threads)
    assert threading.active_count() == before
    assert service.entries["bilevax/left/0"] == ""
    state.num_processes = 1
    bx.parallel.initialize()
    assert threading.active_count() == before


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), "10"])
def test_timeout_is_a_positive_number(timeout):
    with pytest.raises(ValueError, match="timeout must be"):
        bx.parallel.initialize("localhost:1", 2, 0, timeout=timeout)


def launch(mode, victim, processes):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    return [start(1, "ending.py", mode, victim, process, processes, port) for process in range(processes)]


def ended(running, seconds=90):
    """Exit code and stderr of each."""
    try:
        return [(process.communicate(timeout=seconds)[1], process.returncode)[::-1] for process in running]
    finally:
        for process in running:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "victim"),
    [(2, 1), pytest.param(2, 0, marks=WITHOUT_ABORT), (4, 2), pytest.param(4, 0, marks=WITHOUT_ABORT)],
)
def test_hosts_say_who_was_killed_and_end(processes, victim):
    running = launch("kill", victim, processes)
    for line in running[victim].stdout:
        if line.startswith("at"):
            break
    running[victim].kill()
    killed = time.perf_counter()
    found = ended([process for process in running if process is not running[victim]])
    assert time.perf_counter() - killed < 4.0 + 8.0  # a machine with much to do
    running[victim].communicate()
    for code, errors in found:
        assert code == CODE, errors
        assert f"process {victim} of {processes} is gone: " in errors
        assert errors.endswith("Type it again.\n")
        assert victim == 0 or "stack trace" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_hosts_end_where_one_raises(victim):
    found = ended(launch("raise", victim, 2))
    assert found[victim][0] == 1
    assert found[victim][1].rstrip().endswith("ValueError: no space left")
    code, errors = found[1 - victim]
    assert code == CODE
    assert f"process {victim} of 2 is gone: it ended with ValueError: no space left." in errors


@pytest.mark.slow
@WITHOUT_ABORT
def test_hosts_that_abort_by_themselves_do_so():
    found = ended(launch("abort", 0, 2))
    assert found[0][0] == -6
    assert "gone" not in found[0][1]
    assert found[1][0] == CODE


@pytest.mark.slow
def test_hosts_that_are_done_end_in_peace():
    for code, errors in ended(launch("end", 0, 2)):
        assert (code, "gone" in errors) == (0, False), errors

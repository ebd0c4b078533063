"""Runs that are killed at random moments, and resumed: not one bit differs from the run that was left alone."""

import random
import socket
import time

import pytest
from processes import findings, start

from bilevax import checkpoint

EVERY = 2
FEW, ALL = 3, 20


def launch(folder, steps, processes):
    """The processes of a run; alone, one has the devices of all of them."""
    if processes == 1:
        return [start(2, "killed.py", folder, steps, EVERY)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [start(1, "killed.py", folder, steps, EVERY, port, process, processes) for process in range(processes)]


def kill_at(moment, running):
    """Reads so many lines of the first process, waits, kills one process and then the others."""
    lines, seconds, victim = moment
    while lines >= 0:
        line = running[0].stdout.readline()
        assert line, running[0].communicate()
        lines -= line.startswith("at ")
    time.sleep(seconds)
    for process in [running[victim % len(running)], *running]:
        process.kill()
    for process in running:
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kills", [pytest.param(FEW, id="few_kills"), pytest.param(ALL, id="all_kills")])
def test_a_run_that_is_killed_is_the_run_that_is_not(tmp_path, monkeypatch, kills, processes):
    """And a run of two processes goes on on one."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))  # filled by the run that ends
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    random_, steps, folder = random.Random(processes), 10 * kills, tmp_path / "killed"
    expected = findings(*launch(tmp_path / "alone", steps, processes))[0]
    for _ in range(kills):
        moment = (random_.randrange(9), random_.uniform(0, 0.15), random_.randrange(2))
        kill_at(moment, launch(folder, steps, processes))
        assert (checkpoint.latest(folder) or 0) < steps, "it has ended before the kill"
    resumed = findings(*launch(folder, steps, processes))
    assert {found["bits"] for found in resumed} == {expected["bits"]}
    assert expected["first"] == 0 < resumed[0]["first"]
    if processes == 2:
        (read,) = findings(*launch(folder, steps, 1))
        assert (read["bits"], read["first"]) == (expected["bits"], steps)

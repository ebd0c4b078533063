"""The job that kills commands: it sees a run that did not go on as it should."""

import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks.__main__ import main
from benchmarks.harness.errors import DataError
from benchmarks.robustness import kills
from benchmarks.robustness.kills import Case, differing, killed, unkilled

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")

# Counts to 40, and goes on from where it was; or forgets a number, or leaves half a file, or begins anew, or fails.
COUNTS = """
import json, os, sys, time
from pathlib import Path

folder, fault = Path(sys.argv[1]), sys.argv[2]
kept, results = folder / "kept" / "states", folder / "results"
results.mkdir(exist_ok=True)
kept.mkdir(parents=True, exist_ok=True)
begin = max([int(one.name) for one in kept.iterdir()], default=0)
if fault == "fails" and begin:
    sys.exit(3)
if fault == "leaves" and not begin:
    (results / ".x.tmp").write_text("half")
for number in range(begin, 40):
    time.sleep(0.01)
    (kept / str(number + 1)).write_text("")
total = 780 - (fault == "forgets" and begin > 0)
record = {"run": os.getpid(), "seconds": time.time(), "curve": {"total": [total], "cpu_seconds": [time.time()]}}
(results / "x.json").write_text(json.dumps(record))
"""


@pytest.fixture
def counting(monkeypatch):
    def with_fault(fault):
        def started(case, folder):
            (folder / "output").touch()
            command = [sys.executable, "-S", "-c", COUNTS, str(folder), fault]
            return [subprocess.Popen(command) for _ in range(case.processes)]

        monkeypatch.setattr(kills, "started", started)

    return with_fault


class Draw:
    """Kills each time when some more has been counted."""

    def __init__(self, folder, kills):
        self.folder, self.kills, self.counted = folder / "kept" / "states", kills, 0

    def randint(self, low, high):
        return self.kills

    def uniform(self, low, high):
        while not self.folder.exists() or len([*self.folder.iterdir()]) < self.counted + 3:
            time.sleep(0.005)
        self.counted = len([*self.folder.iterdir()])
        return 0.0


def trial(tmp_path, processes=1, kills=2):
    case = Case(("counts",), processes=processes)
    assert unkilled(case, tmp_path / "unkilled") > 0.4
    return killed(case, tmp_path / "killed", tmp_path / "unkilled" / "results", 9.0, Draw(tmp_path / "killed", kills))


@pytest.mark.parametrize("fault", ["none", "forgets"])
def test_numbers_that_a_killed_run_got_wrong_are_told(tmp_path, counting, fault):
    counting(fault)
    found = trial(tmp_path)
    assert found.kills == found.within == 2
    assert found.differing == (["x.json: curve"] if fault == "forgets" else [])


def test_several_processes_are_killed_together(tmp_path, counting):
    counting("none")
    assert trial(tmp_path, 2).differing == []


def test_a_run_that_cannot_go_on_is_named_with_what_it_said(tmp_path, counting):
    counting("fails")
    with pytest.raises(DataError, match="counts ended with code 3"):
        trial(tmp_path, kills=1)


def test_files_that_are_in_one_folder_alone_are_told(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "job").mkdir(parents=True)
        (tmp_path / name / "job" / "x.json").write_text(json.dumps({"seconds": name, "run": name, "a": 0.1}))
    assert differing(tmp_path / "one", tmp_path / "two") == []
    (tmp_path / "one" / "job" / ".x.json.host-1.tmp").write_text("half")
    (tmp_path / "two" / "job" / "x.json").write_text(json.dumps({"a": 0.1 + 2**-56}))
    told = differing(tmp_path / "one", tmp_path / "two")
    assert told == ["job/.x.json.host-1.tmp is in one of both", "job/x.json: a"]


@pytest.mark.slow
def test_killed_commands_come_to_the_same_numbers(tmp_path):
    assert main(["kills", "--quick", "--results", str(tmp_path)]) == 0

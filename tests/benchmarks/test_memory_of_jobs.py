"""What jobs need is measured in processes of their own; one that fails is told."""

import json
import resource

import pytest

from benchmarks.__main__ import TASKS
from benchmarks.harness.errors import DataError
from benchmarks.robustness import memory


def test_every_job_is_known_but_those_about_robustness():
    others = {job for job, folder in TASKS.items() if folder == "robustness"}
    assert {*memory.known()} == {*TASKS} - others - {"decentralized-papers"}


BUSY = "import time\nwhile time.process_time() < 0.5: pass\n"


@pytest.fixture
def job(tmp_path, monkeypatch):
    """In place of the program, one of ours, which is told a job and what follows."""

    def write(text):
        (tmp_path / "benchmarks").mkdir()
        (tmp_path / "benchmarks" / "__init__.py").touch()
        (tmp_path / "benchmarks" / "__main__.py").write_text(text)
        monkeypatch.chdir(tmp_path)  # which comes first on the path of `python -m`

    return write


def test_the_peak_and_the_processor_seconds_are_those_of_the_job(job):
    job("import sys\nassert sys.argv[1:4] == ['pde', '--quick', '--results']\ndata = b'a' * (3 * 10**8)\n" + BUSY)
    row = memory.measured("pde", 60)
    assert row.failure == ""
    before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # a process begins with the peak of its parent
    assert 3 * 10**8 < row.memory < max(5 * 10**8, 1.1 * before)
    assert row.cpu_seconds > 0.5


def test_a_job_that_fails_or_takes_long_is_told(job):
    job("import sys, time\nif sys.argv[1] == 'pde': sys.exit('no space left')\ntime.sleep(60)")
    assert memory.measured("pde", 60).failure == "ended with 1: no space left"
    assert memory.measured("peers", 0.3).failure.startswith("ended with -9")


def test_the_table_is_written_and_unknown_jobs_are_refused(tmp_path, monkeypatch):
    rows = {"pde": memory.Row("pde", 2**31, 7.4), "peers": memory.Row("peers", 0, 0.0, "ended with 1: said")}
    monkeypatch.setattr(memory, "measured", lambda job, seconds: rows[job])
    page = tmp_path / "page.md"
    page.write_text("<!-- begin memory -->\n<!-- end memory -->\n")
    assert memory.Config(jobs=("pde",), results=tmp_path, page=page).run() == 0
    assert "| pde | 2,048 | 7 |" in page.read_text()
    assert memory.Config(jobs=("pde", "peers"), results=tmp_path, page=page).run() == 1
    assert "| peers | ended with 1: said | 0 |" in page.read_text()
    assert [one["job"] for one in json.loads((tmp_path / "memory" / "memory.json").read_text())] == ["pde", "peers"]
    with pytest.raises(DataError, match=r"jobs must be some of .*pde.*; got soak, none"):
        memory.Config(jobs=("soak", "none"), results=tmp_path).run()
    with pytest.raises(ValueError, match="seconds must be a number > 0; got 0"):
        memory.Config(seconds=0)

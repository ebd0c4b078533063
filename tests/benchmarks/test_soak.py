"""Loops that run for long hold no more at the end than at the start; loops that do are found."""

import json
import time

import jax
import numpy as np
import pytest

from benchmarks.robustness import soak


@pytest.fixture(autouse=True)
def single_precision():
    with jax.enable_x64(False):
        yield


def row(advance, seconds=0.3):
    return soak.soaked(soak.Loop("made", lambda: np.zeros(3), advance), seconds)


def test_a_loop_that_keeps_nothing_is_constant():
    add = jax.jit(lambda state: state + 1)
    found = row(lambda state, number: add(state))
    assert found.constant
    assert found.last.programs == found.first.programs > 0
    assert found.steps > 10 * soak.CHUNK


def keeping(keep, most=300):
    """A loop that keeps one more thing in each call, `most` at most."""
    kept = []

    def advance(state, number):
        time.sleep(2e-3)
        if number < most:
            kept.append(keep(state))
        return state

    return kept, advance


def test_memory_that_grows_is_found():
    _, advance = keeping(lambda state: np.ones(2**17))  # a megabyte
    found = row(advance)
    assert not found.constant
    assert found.last.memory > found.first.memory + soak.GROWTH
    assert found.slope > soak.GROWTH


def test_arrays_that_are_kept_are_found():
    _, advance = keeping(jax.device_put)
    found = row(advance)
    assert not found.constant
    assert found.last.arrays > found.first.arrays + 3


def test_files_that_stay_open_are_found():
    kept, advance = keeping(lambda state: open(__file__))  # noqa: SIM115
    found = row(advance)
    for file in kept:
        file.close()
    assert not found.constant
    assert found.last.files > found.first.files + 3


@pytest.mark.compiles(400)  # its subject
def test_what_is_compiled_anew_is_found():
    found = row(lambda state, number: np.asarray(jax.jit(lambda state: state + number)(state)), seconds=1)
    assert not found.constant
    assert found.last.programs > found.first.programs


def soaked(tmp_path, **options):
    page = tmp_path / "page.md"
    page.write_text("<!-- begin soak -->\n<!-- end soak -->\n")
    assert soak.Config(results=tmp_path, page=page, **options).run() == 0
    (file,) = tmp_path.glob("*/soak.json")
    rows = json.loads(file.read_text())
    assert min(one["steps"] for one in rows) > 2 * soak.CHUNK
    assert all(f"| {one['loop']} |" in page.read_text() for one in rows)
    return [one["loop"] for one in rows]


@pytest.mark.compiles(60)  # two loops
def test_the_loops_of_the_job_hold_still(tmp_path, monkeypatch):
    made = soak.loops()
    monkeypatch.setattr(soak, "loops", lambda: made[:2])
    assert soaked(tmp_path, minutes=0.02) == ["hyper-cleaning, CG", "SLDBO on a ring"]


@pytest.mark.slow
@pytest.mark.compiles(90)  # three loops
def test_all_loops_of_the_job_hold_still(tmp_path):
    assert soaked(tmp_path, quick=True) == ["hyper-cleaning, CG", "SLDBO on a ring", "hyper-cleaning, KFAC"]


def test_the_time_is_checked():
    with pytest.raises(ValueError, match="minutes must be a number > 0; got 0"):
        soak.Config(minutes=0)

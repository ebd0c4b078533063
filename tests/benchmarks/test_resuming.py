"""What a command with --checkpoint keeps, and that it goes on to the same numbers, bit for bit."""

import dataclasses
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import types
from collections import namedtuple
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import benchmarks.__main__ as command
import bilevax as bx
from benchmarks.decentralized import running, speed_up
from benchmarks.harness import resuming
from benchmarks.harness.clock import Spent
from benchmarks.harness.encoding import decoded, encoded
from benchmarks.harness.errors import DataError
from benchmarks.harness.folder import prepared
from benchmarks.harness.loop import Carry, Outcome, Program, Trace, drive
from benchmarks.harness.resuming import Kept, check_ready, identity, kept, new_identity
from benchmarks.harness.runner import Options
from benchmarks.tasks import hyper_cleaning

TIMES = {"seconds", "cpu_seconds"}


class Point(NamedTuple):
    step: int
    values: object


@dataclasses.dataclass(frozen=True)
class Found:
    name: str
    points: list


VALUES = [
    *(None, True, 3, 0.1, -0.0, math.inf, "text", [1, [2.5]], (1, (2.0, "x")), {"a": 1, "b": (3,)}, {("k", 0): [4]}),
    *(np.float32(0.1), np.int64(7), np.arange(6.0).reshape(2, 3)),
    *(np.zeros((0, 2), np.int8), np.array([math.nan, -0.0])),
    Found("run", [Point(1, {"x": np.ones(2)}), Point(2, None)]),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back_from_json_as_they_were(value):
    again = decoded(json.loads(json.dumps(encoded(value))), Point, Found)
    assert jax.tree.structure(again) == jax.tree.structure(value)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(value), strict=True):
        assert type(one) is type(other)
        if not isinstance(other, Found):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
            assert np.shape(one) == np.shape(other)
    assert repr(again) == repr(value)


def test_arrays_of_jax_come_back_as_those_of_numpy_of_the_same_type():
    for array in (jnp.ones(2, jnp.bfloat16), jnp.array([0.1], jnp.float32)):
        again = decoded(json.loads(json.dumps(encoded(array))))
        assert again.dtype == array.dtype
        np.testing.assert_array_equal(again, array)


def test_what_is_not_known_is_refused():
    with pytest.raises(TypeError, match="got object"):
        encoded([object()])
    with pytest.raises(ValueError, match="Point"):
        decoded(encoded(Point(1, 2)), namedtuple("Other", "step values"))
    for told in ({"array": "AAAA", "dtype": "float64", "shape": [1]}, {"dict": 3}, {"class": "Point", "fields": 1}, {}):
        with pytest.raises(ValueError, match="made by encoded"):
            decoded(told, Point)


class Killed(BaseException):
    """Stands for a signal that nobody heeds."""


def program(killed_at=None):
    """Counts its chunks, and dies in one of them."""
    calls = []

    @jax.jit
    def chunk(carry, keys, batch):
        x = jnp.sin(3 * carry.x) + jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys).sum(axis=0) / batch
        loss = jnp.sum(x**2)
        return Carry(x, (carry.optimizer[0] + 1, x), carry.estimator), Trace(loss, loss / 7, {"calls": jnp.sum(x)})

    def counted(carry, keys, batch):
        calls.append(1)
        if len(calls) == killed_at:
            raise Killed
        return chunk(carry, keys, batch)

    start = lambda: Carry(jnp.ones(3), (jnp.zeros((), int), jnp.ones(3)), {"key": jax.random.key(5)})  # noqa: E731
    return Program(start, counted, Spent(1.0, 2.0), 9), calls


def driven(states, killed_at=None, budget=60.0):
    made, calls = program(killed_at)
    keys = jax.random.split(jax.random.key(0), (6, 2))
    evaluate = lambda carry: {"score": float(carry.x[0]), "none": None}  # noqa: E731
    steps = []
    outcome = drive(made, made.start(), keys, 7.0, evaluate, budget, steps.append, states)
    assert sum(steps) == outcome.metrics["outer_steps"]
    return outcome, len(calls)


def untimed(outcome):
    parts = (outcome.metrics, outcome.curve)
    metrics, curve = ({name: value for name, value in part.items() if name not in TIMES} for part in parts)
    return np.asarray(outcome.x).tobytes(), metrics, curve


@pytest.fixture(scope="module")
def whole():
    return untimed(driven(Kept())[0])


@pytest.mark.parametrize("killed_at", [1, 2, 4, 6])
def test_a_drive_that_was_killed_goes_on_bit_for_bit(tmp_path, whole, killed_at):
    states = Kept(tmp_path / "run", every=0.0)
    with pytest.raises(Killed):
        driven(states, killed_at)
    with pytest.raises(Killed):  # at once again, before anything new is done
        driven(states, 1)
    outcome, calls = driven(states)
    assert untimed(outcome) == whole
    assert calls == 6 - (killed_at - 1)


def test_states_are_kept_now_and_then_only(tmp_path, whole, monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(resuming, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    with pytest.raises(Killed):
        driven(Kept(tmp_path / "run", every=3.0), 6)
    bx.checkpoint.wait()
    assert bx.checkpoint.latest(tmp_path / "run" / resuming.STATES) in (3, 4)
    monkeypatch.undo()
    assert untimed(driven(Kept(tmp_path / "run"))[0]) == whole


def test_seconds_before_the_kill_count_for_the_budget(tmp_path, monkeypatch):
    spent = iter([Spent(1.0, 1.0)] * 100)
    monkeypatch.setattr("benchmarks.harness.loop.timed", lambda work: (work(), next(spent)))
    states = Kept(tmp_path / "run", every=0.0)
    with pytest.raises(Killed):
        driven(states, 3, budget=4.0)
    outcome, calls = driven(states, budget=4.0)
    assert outcome.curve["seconds"] == [1.0, 2.0, 3.0, 4.0]
    assert calls == 2
    assert driven(states, budget=4.0)[1] == 0  # it has ended


@pytest.mark.parametrize("damage", ["notes", "state", "no notes"])
def test_a_run_with_a_damaged_state_starts_again_and_says_so(tmp_path, whole, capsys, damage):
    states = Kept(tmp_path / "run", every=0.0)
    with pytest.raises(Killed):
        driven(states, 4)
    bx.checkpoint.wait()
    notes = tmp_path / "run" / "notes-3.json"
    if damage == "no notes":
        notes.unlink()
    elif damage == "notes":
        notes.write_bytes(notes.read_bytes()[:-9])
    else:
        for file in (tmp_path / "run" / resuming.STATES / "3").rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
    outcome, calls = driven(states)
    assert (untimed(outcome), calls) == (whole, 6)
    assert "It starts again" in capsys.readouterr().err


def test_notes_of_states_that_are_gone_are_deleted(tmp_path):
    with pytest.raises(Killed):
        driven(Kept(tmp_path / "run", every=0.0), 6)
    assert sorted(path.name for path in (tmp_path / "run").glob("notes-*")) == [f"notes-{k}.json" for k in (2, 3, 4, 5)]


def test_iterations_of_agents_go_on_bit_for_bit(tmp_path):
    network = namedtuple("Network", "start batch")((jnp.ones(3), jnp.zeros(2)), 2.0)

    @jax.jit
    def advance(pick, carry, key, batch, count):
        step = lambda _, x: jnp.sin(3 * x) + jax.random.normal(key, (3,)) / batch  # noqa: E731
        x = jax.lax.fori_loop(0, count, step, carry.state)
        spent = {"derivatives": carry.spent["derivatives"] + count}
        return running.Carry(x, x, carry.y, x[0], spent), Trace(jnp.sum(x**2), x[1], {"calls": jnp.sum(x)})

    def begin(pick, x, y, batch):
        return running.Carry(x, x, y, jnp.zeros(()), {"derivatives": jnp.zeros(())})

    def follow(states, killed_at=None):
        calls = []

        def counted(*arguments):
            calls.append(1)
            if len(calls) == killed_at:
                raise Killed
            return advance(*arguments)

        made = running.Program(begin, counted, lambda tree: tree, Spent(), None)
        evaluate = running.glance
        stops = (1, 2, 4, 9)
        return running.follow(made, None, network, 2.0, jax.random.key(1), stops, evaluate, 60.0, states), len(calls)

    expected, _ = follow(Kept())
    states = Kept(tmp_path / "run", every=0.0)
    with pytest.raises(Killed):
        follow(states, 3)
    found, calls = follow(states)
    assert calls == 2
    assert found.counts == expected.counts
    assert found.curve["outer_step"] == [1, 2, 4, 9]
    for name in {*expected.curve} - TIMES:
        assert repr(found.curve[name]) == repr(expected.curve[name])
    np.testing.assert_array_equal(found.x, expected.x)


def full(*paths):
    raise OSError(28, "full")


def test_a_part_that_is_done_is_not_made_again(tmp_path, monkeypatch, capsys):
    made = []

    def make():
        made.append(1)
        return Point(len(made), np.ones(2))

    work = Kept(tmp_path)
    for _ in range(2):
        assert work.once("a/b", make, Point).step == 1
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", full)
        with pytest.raises(DataError, match="full"):
            work.once("other", make, Point)
    assert work.once("other", make, Point).step == 3
    (tmp_path / "a-b.json").write_text('{"came": {"cl')
    assert work.once("a/b", make, Point).step == 4
    (tmp_path / "a-b.json").write_text("{}")
    assert work.once("a/b", make, Point).step == 5
    assert capsys.readouterr().err.count("a-b.json is damaged") == 2


def test_states_are_deleted_when_a_part_is_done(tmp_path, whole):
    work = Kept(tmp_path, every=0.0)
    outcome = work.by_steps("run", lambda states: driven(states)[0], Outcome)
    assert untimed(outcome) == whole
    assert untimed(work.by_steps("run", lambda states: 0 / 0, Outcome)) == whole
    assert os.listdir(tmp_path) == ["run.json"]


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work = kept(hyper_cleaning.Config())
    assert [work.within("x").once("part", lambda: 3) for _ in range(2)] == [3, 3]
    assert os.listdir(tmp_path) == []


def config(tmp_path, **options):
    own = {name: options.pop(name) for name in ("corruption",) if name in options}
    common = {"methods": ("cg",), "results": tmp_path / "results", "checkpoint": tmp_path / "kept", **options}
    return hyper_cleaning.Config(**own, common=Options(**common))


def test_a_run_that_goes_on_has_the_same_id(tmp_path):
    first = identity(config(tmp_path))
    new_identity.cache_clear()
    assert identity(config(tmp_path, results=tmp_path / "others", checkpoint_every=1.0)) == first
    assert identity(config(tmp_path, checkpoint=None)) != first
    assert identity(config(tmp_path, checkpoint=tmp_path / "new")) == new_identity()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"outer_steps": 7}, "outer_steps was None, and is 7"),
        ({"seeds": 2, "budget": 1.5}, "budget was 12.0, and is 1.5; seeds was 1, and is 2"),
        ({"corruption": 0.25}, "corruption was 0.5, and is 0.25"),
        ({"methods": ("cg", "kfac")}, r"methods was \['cg'\], and is \['cg', 'kfac'\]"),
    ],
)
def test_other_options_are_refused_by_name(tmp_path, options, says):
    check_ready(config(tmp_path))
    with pytest.raises(DataError, match=f"kept is of a run with other options: {says}. Pass the same"):
        check_ready(config(tmp_path, **options))


def test_other_versions_are_refused_by_name(tmp_path, monkeypatch):
    check_ready(config(tmp_path))
    monkeypatch.setattr(jax, "__version__", "9.9")
    with pytest.raises(DataError, match=r"jax was .*, and is 9\.9"):
        check_ready(config(tmp_path))


@pytest.mark.parametrize("content", [None, "", "{}", '{"run": 3, "options": {}}', '{"run": "a", "options": []}'])
def test_a_folder_whose_run_is_not_known_is_refused(tmp_path, content):
    check_ready(config(tmp_path))
    kept(config(tmp_path)).once("part", lambda: 1)
    file = tmp_path / "kept" / resuming.RUN
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=r"run\.json (is damaged|is missing|must hold)"):
        check_ready(config(tmp_path))


@pytest.mark.skipif(os.name != "posix", reason="locks files")
def test_a_folder_that_another_command_uses_is_refused(tmp_path):
    import fcntl

    check_ready(config(tmp_path))
    holds = "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)"
    lock = str(tmp_path / "kept" / "lock")
    assert subprocess.run([sys.executable, "-c", holds, lock], check=False, stderr=subprocess.DEVNULL).returncode == 1
    os.close(resuming._lock(tmp_path / "kept"))  # as where this process ends
    resuming._lock.cache_clear()
    assert subprocess.run([sys.executable, "-c", holds, lock], check=False).returncode == 0
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="is in use by another command"):
            check_ready(config(tmp_path))


def test_states_do_not_lie_among_results(tmp_path):
    inside = config(tmp_path, checkpoint=tmp_path / "results" / "cleaning" / "kept")
    with pytest.raises(DataError, match="must not lie within"):
        prepared(inside, "cleaning", Console())
    prepared(config(tmp_path, checkpoint=tmp_path / "results" / "kept"), "cleaning", Console())


def test_bad_folders_are_refused_before_anything_is_computed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hyper_cleaning, "load", lambda *arguments, **options: 0 / 0)
    (tmp_path / "file").write_text("")
    for option in ("--results", "--checkpoint"):
        arguments = {"--results": str(tmp_path / "results"), "--checkpoint": str(tmp_path / "kept")}
        arguments[option] = str(tmp_path / "file")
        assert command.main(["--quick", *itertools.chain(*arguments.items())]) == 1
        error = capsys.readouterr().err
        assert "file cannot be written" in error
        assert f"name another folder with {option}" in error


@pytest.mark.parametrize("killed_at", [1, 3])
def test_a_job_of_short_parts_goes_on_with_those_that_are_left(tmp_path, monkeypatch, killed_at):
    monkeypatch.setattr(speed_up, "SIZES", (4,))
    monkeypatch.setattr(speed_up, "QUICK_ITERATIONS", 40)
    made = []

    def run(name, last=None):
        def timed(work):
            made.append(1)
            if len(made) == last:
                raise Killed
            return work(), Spent()

        monkeypatch.setattr(speed_up, "timed", timed)
        arguments = ["--results", str(tmp_path / name), "--checkpoint", str(tmp_path / f"{name}-kept")]
        assert command.main(["decentralized-speed-up", "--quick", "--seeds", "2", *arguments]) == 0
        records = {path.name: json.loads(path.read_text()) for path in (tmp_path / name).rglob("*.json")}
        ids = {record.pop("run") for record in records.values()}
        for record in records.values():
            record["metrics"] = {key: one for key, one in record["metrics"].items() if "seconds" not in key}
        return records, ids

    with jax.enable_x64(False):
        expected, _ = run("whole")
        with pytest.raises(Killed):
            run("other", len(made) + killed_at)
        made.clear()
        found, ids = run("other")
    assert len(made) == len(expected) - (killed_at - 1) == 5 - killed_at
    assert json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)
    assert len(ids) == 1


@pytest.mark.parametrize("task", [task for task, folder in command.TASKS.items() if folder != "robustness"])
def test_every_job_takes_a_checkpoint(task):
    config = importlib.import_module(command.module_of(task)).Config
    fields = {field.name: field for field in dataclasses.fields(config)}
    assert "checkpoint" in fields or hasattr(fields["common"].default, "checkpoint")

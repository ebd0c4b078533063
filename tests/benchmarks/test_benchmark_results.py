"""The folders of results, in which runs of different options never mix, and the marks of steps at an end of a grid."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from benchmarks.decentralized import speed_up
from benchmarks.decentralized.records import read
from benchmarks.harness import runner
from benchmarks.harness.errors import DataError
from benchmarks.harness.folder import options_of, prepared
from benchmarks.harness.grid import at_ends, choice
from benchmarks.harness.loop import Outcome
from benchmarks.harness.report import Run, grid_ends, table
from benchmarks.harness.resuming import new_identity
from benchmarks.harness.runner import Options, Task, perform, settled
from benchmarks.studies import peers, unrolling
from benchmarks.tasks import condensation, hyper_cleaning, learning_rates

RATES = (0.1, 0.2, 0.4)


def config(tmp_path, corruption=0.5, methods=("cg",), **options):
    common = Options(methods, results=tmp_path, **options)
    return hyper_cleaning.Config(corruption=corruption, common=common)


def run(method="cg", seed=0, configuration=None, metrics=None, x=()):
    return Run("task", method, seed, configuration or {}, Outcome(x, metrics or {"outer_loss": 1.0}, {}))


def found(tmp_path):
    return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json"))


@pytest.fixture
def console():
    return Console(width=200, highlight=False)


def test_options_are_read_back_as_they_were_and_say_nothing_about_which_runs_there_are(tmp_path):
    options = options_of(config(tmp_path, budget=math.inf, outer_steps=600))
    assert json.loads(json.dumps(options, allow_nan=False)) == options
    assert options["budget"] == "inf"
    assert options["outer_steps"] == 600
    assert not {"methods", "seeds", "seed", "results"} & {*options}
    assert options_of(peers.Config(problems=("digits",))) == options_of(peers.Config())


def test_methods_and_seeds_lie_side_by_side(tmp_path, console):
    for methods, seed in ((("cg",), 0), (("kfac",), 3)):
        folder = prepared(config(tmp_path, methods=methods, seed=seed, outer_steps=600), "cleaning", console)
        run(*methods, seed=seed).write(folder)
    assert found(tmp_path) == ["cleaning/cg-seed0.json", "cleaning/kfac-seed3.json"]


@pytest.mark.parametrize("other", [{"outer_steps": 600}, {"budget": 6.0}, {"corruption": 0.4}])
def test_runs_of_other_options_are_moved_away(tmp_path, console, capsys, other):
    first, second = config(tmp_path, outer_steps=192), config(tmp_path, **{"outer_steps": 192} | other)
    for one in (first, second, first):
        run().write(prepared(one, "cleaning", console).within("net"))
    moved = ["old/cleaning-1/net/cg-seed0.json", "old/cleaning-2/net/cg-seed0.json"]
    assert found(tmp_path) == ["cleaning/net/cg-seed0.json", *moved]
    kept = json.loads((tmp_path / "cleaning/net/cg-seed0.json").read_text())
    assert kept["options"] == options_of(first)
    assert "cleaning held runs of other options, which are now in" in capsys.readouterr().out


def test_files_without_options_are_moved_away(tmp_path, console):
    (tmp_path / "cleaning").mkdir()
    (tmp_path / "cleaning" / "cg-seed0.json").write_text("{}")
    assert prepared(config(tmp_path), "cleaning", console).path == tmp_path / "cleaning"
    assert found(tmp_path) == ["old/cleaning-1/cg-seed0.json"]


@pytest.mark.parametrize("content", [b"", b'{"task": "hyper_cl', b"[1]", b"null", b"\xff", b"[" * 100_000])
def test_damaged_files_are_named_and_set_aside_and_the_others_stay(tmp_path, console, capsys, content):
    run(seed=1).write(prepared(config(tmp_path), "cleaning", console))
    damaged = tmp_path / "cleaning" / "cg-seed0.json"
    damaged.write_bytes(content)
    prepared(config(tmp_path), "cleaning", console)
    assert found(tmp_path) == ["cleaning/cg-seed1.json"]
    assert f"{damaged} is damaged" in capsys.readouterr().out
    assert damaged.with_name("cg-seed0.json.damaged").read_bytes() == content


def test_a_folder_says_that_some_of_its_files_are_of_earlier_commands(tmp_path, console):
    one = prepared(config(tmp_path), "cleaning", console)
    run(seed=1).write(one)
    assert one.words == f"{tmp_path / 'cleaning'} (run {one.run})"
    new_identity.cache_clear()
    two = prepared(config(tmp_path), "cleaning", console)
    run(seed=2).write(two)
    assert two.run != one.run
    assert json.loads((two.path / "cg-seed2.json").read_text())["run"] == two.run
    assert two.words.endswith(f"(run {two.run}; 1 more there are of earlier runs, which are not shown here)")


def test_runs_of_another_default_number_of_steps_are_moved_away(tmp_path, monkeypatch):
    for default in (20, 10, 10):
        monkeypatch.setattr(runner, "QUICK_STEPS", default)
        job = config(tmp_path, quick=True)
        steps = job.common.steps(600)
        numbers = {"outer_steps": steps, "outer_loss": 1.0}
        runs = [run(configuration={"outer_steps": steps}, metrics=numbers)]
        task = Task("", "cleaning", steps, ("cg",), ("cg",), lambda advance, runs=runs: iter(runs), {}, "", None)
        assert perform(task, job.common, job) == 0
    assert found(tmp_path) == ["cleaning-quick/cg-seed0.json", "old/cleaning-quick-1/cg-seed0.json"]
    records = [json.loads((tmp_path / name).read_text()) for name in found(tmp_path)]
    assert [record["options"]["outer_steps"] for record in records] == [10, 20]


@pytest.mark.parametrize(
    ("job", "place", "default"),
    [
        (peers, "Config.unrolled", 5),
        (peers, "Config.outer_steps", 5),
        (unrolling, "QUICK_STEPS", (10, 100)),
        (speed_up, "QUICK_ITERATIONS", 5),
    ],
)
def test_studies_tell_runs_of_another_default_number_of_steps_apart(tmp_path, monkeypatch, job, place, default):
    def interrupted(*arguments, **resulted):
        run().write(prepared(*arguments, **resulted))
        raise KeyboardInterrupt

    def start():
        with pytest.raises(KeyboardInterrupt):
            job.Config(quick=True, results=tmp_path).run()
        return found(tmp_path)

    monkeypatch.setattr(job, "prepared", interrupted)
    name = f"{job.TASK}-quick"
    assert start() == start() == [f"{name}/cg-seed0.json"]
    monkeypatch.setattr(f"{job.__name__}.{place}", default)
    assert start() == sorted([f"{name}/cg-seed0.json", f"old/{name}-1/cg-seed0.json"])


def test_quick_runs_have_a_folder_of_their_own(tmp_path, console):
    run().write(prepared(config(tmp_path), "cleaning", console))
    run().write(prepared(config(tmp_path, quick=True), "cleaning", console))
    quick = peers.Config(quick=True, results=tmp_path)
    assert found(tmp_path) == ["cleaning-quick/cg-seed0.json", "cleaning/cg-seed0.json"]
    assert prepared(quick, "peers", console).path == tmp_path / "peers-quick"


def test_runs_of_several_options_are_not_read_together(tmp_path, console):
    for name, steps in (("one", 192), ("two", 192), ("three", 600)):
        run().write(prepared(config(tmp_path, outer_steps=steps), name, console))
        if steps == 192:
            assert {record.options["outer_steps"] for record in read(tmp_path)} == {192}
    with pytest.raises(DataError, match=r"must hold runs of one choice of options; got .* Run the job again."):
        read(tmp_path)


def test_steps_at_an_end_of_their_grid_are_named_and_one_value_is_no_choice():
    grid = {"x": [4.0, 1.0, 2.0, 4.0], "y": [0.5, 0.5], "v": RATES}
    assert at_ends(grid, {"x": 4.0, "y": 0.5, "v": 0.2}) == ["x"]
    assert at_ends(grid, {"x": 1.0, "v": 0.1, "other": 1.0}) == ["x", "v"]
    assert at_ends(grid, {"x": 2.0}) == []
    told = choice(grid, {"x": 1.0})
    assert json.loads(json.dumps(told)) == told
    assert (told["at_grid_end"], told["grid"]["v"]) == (["x"], [*RATES])


def test_the_table_stars_them_and_says_what_that_means(console, capsys):
    runs = [
        run("inside", configuration=choice({"x": RATES}, {"x": 0.2})),
        run("outside", configuration=choice({"x": RATES}, {"x": 0.2})),
        run("outside", 1, configuration=choice({"x": RATES, "y": RATES}, {"x": 0.4, "y": 0.1})),
    ]
    console.print(table("title", runs, {"outer_loss": ("loss", "{:.1f}".format)}, ()))
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "1.0" in line]
    assert lines == ["inside", "outside*"]
    assert grid_ends(runs).endswith("where a better one may lie outside: outside (x, y)")
    assert grid_ends(runs[:2]) == ""


@pytest.mark.parametrize("name", ["each-step", "line"])
def test_schedules_that_are_tried_by_hand_tell_their_choice(name):
    schedule = learning_rates.SCHEDULES[name]
    learnt = run("reverse", x=schedule.start)
    for kind, tried in schedule.tried.items():
        ends = {
            place: learning_rates.by_hand(schedule, [learnt, run(kind, x=jnp.asarray(tried[place]))])
            for place in (0, len(tried) // 2 + 1, len(tried) - 1)
        }
        assert all(same is learnt for same, _ in ends.values())
        assert [after.at_grid_end[:1] for _, after in ends.values()] == [["rate"], [], ["rate"]]
        last = ends[len(tried) - 1][1].configuration
        np.testing.assert_allclose(last["step_sizes"]["rate"], learning_rates.GRID[-1])
        assert len(last["grid"]["rate"]) == len(tried)


@pytest.mark.parametrize(("best", "ends"), [(0.1, ["rate"]), (0.2, []), (0.4, ["rate"])])
def test_the_best_rate_of_condensation_is_marked_and_the_others_are_not(best, ends):
    def one(rate, estimator="reverse"):
        outer = None if rate is None else {"adam": {"linear_schedule": rate}}
        configuration = {"estimator": estimator, "inner_steps": 5, "outer_optimizer": outer}
        return run(f"{estimator}-{rate}", configuration=configuration, metrics={"validation_accuracy": rate == best})

    runs = [one(None, "means"), *map(one, RATES)]
    after = condensation.with_rates(runs)
    told = [run for run in after if "step_sizes" in run.configuration]
    assert [(run.method, run.at_grid_end) for run in told] == [(f"reverse-{best}", ends)]
    assert [run.method for run in after] == [run.method for run in runs]
    assert condensation.with_rates(runs[:2]) == runs[:2]


def test_what_is_settled_at_the_end_is_in_the_files(tmp_path, console):
    folder = prepared(config(tmp_path), "cleaning", console)
    runs = [run("cg"), run("kfac")]
    for each in runs:
        each.write(folder)

    def settle(runs):
        return [runs[0], dataclasses.replace(runs[1], configuration=choice({"x": RATES}, {"x": 0.4}))]

    task = Task("", "cleaning", 1, ("cg", "kfac"), (), None, {}, "", None, settle)
    assert [run.at_grid_end for run in settled(task, runs, folder)] == [[], ["x"]]
    records = [json.loads((tmp_path / "cleaning" / f"{name}-seed0.json").read_text()) for name in ("cg", "kfac")]
    assert [record["configuration"].get("at_grid_end") for record in records] == [None, ["x"]]

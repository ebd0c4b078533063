import json
import math
import operator

import jax
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.decentralized import papers, speed_up
from benchmarks.decentralized.claims import CLAIMS, snapshots
from benchmarks.decentralized.paper_jobs import JOBS
from benchmarks.decentralized.papers import Config
from benchmarks.decentralized.records import Record, matched, read
from benchmarks.decentralized.results import render, table
from benchmarks.decentralized.speed_up import FEATURES, PROBLEM, RHO, RIDGE, ROWS, SIZES, minimum, quadratic
from benchmarks.decentralized.verdicts import (
    FAILS,
    HOLDS,
    OPEN,
    Interval,
    Spent,
    averaged,
    behind,
    cell,
    close_to_the_end,
    halfway,
    judge,
    ratio,
    spent_until,
)

VERSIONS = {"python": "3.12", "jax": "0.9"}


def record(method="sldbo", losses=(1.0, 0.5, 0.25), costs=None, seed=0, **metrics):
    costs = [*range(1, len(losses) + 1)] if costs is None else [*costs]
    curve = {"exact_loss": [*losses], "exact_gradient": [*losses]}
    curve |= dict.fromkeys(("derivatives", "megabytes", "rounds", "outer_step", "seconds"), costs)
    last = {name: values[-1] if values else None for name, values in curve.items() if name != "outer_step"}
    configuration = {"agents": 8, "topology": "ring", "partition": "dirichlet:0.1", "outer_steps": 30}
    return Record("task", method, seed, configuration, VERSIONS, "cpu", {**last, **metrics}, curve)


def known(*values):
    return [Interval(value, value) for value in values]


@pytest.mark.parametrize(
    ("losses", "target", "spent"),
    [
        ((1.0, 0.5, 0.25), 0.5**0.5, Spent(1.5, True)),
        ((1.0, 0.5, -0.5), 0.0, Spent(2.5, True)),
        ((1.0, 0.5, 0.25), 0.5, Spent(2.0, True)),
        ((1.0, 0.5, 0.25), 2.0, Spent(1.0, True)),
        ((1.0, 0.5, 0.25), 0.1, Spent(3.0, False)),
        ((1.0, 0.25, 0.8), 0.5, Spent(1.5, True)),
        ((1.0, None, 0.25), 0.5, Spent(3.0, True)),
        ((1.0, 0.5, None), 0.1, Spent(math.inf, False)),
        ((), 0.5, Spent(0.0, False)),
    ],
)
def test_what_a_target_cost(losses, target, spent):
    assert spent_until(record(losses=losses), "derivatives", "exact_loss", target) == pytest.approx(spent)


@pytest.mark.parametrize(
    ("method", "base", "interval"),
    [
        (Spent(2, True), Spent(4, True), (0.5, 0.5)),
        (Spent(3, False), Spent(4, True), (0.75, math.inf)),
        (Spent(2, True), Spent(4, False), (-math.inf, 0.5)),
        (Spent(2, False), Spent(4, False), (0, math.inf)),
        (Spent(math.inf, False), Spent(4, True), (math.inf, math.inf)),
        (Spent(2, True), Spent(math.inf, False), (-math.inf, 0)),
    ],
)
def test_ratios_of_costs_are_bounded_where_a_target_was_not_reached(method, base, interval):
    assert ratio(method, base) == interval


def test_targets_are_set_by_the_curve_and_missing_where_it_does_not_fall():
    assert close_to_the_end(record(losses=(1.1, 0.3, 0.1))) == pytest.approx(0.11)
    assert halfway(record(losses=(1.0, 0.3, 0.01)), "exact_gradient") == pytest.approx(0.1)
    for losses in ((1.0, 1.0), (1.0, 2.0), (1.0, None), ()):
        assert math.isnan(close_to_the_end(record(losses=losses)))
        assert math.isnan(halfway(record(losses=losses), "exact_gradient"))


@pytest.mark.parametrize(
    ("intervals", "bound", "words", "verdict"),
    [
        (known(0.2, 0.2, 0.2), 0.3, "0.2 ± 0", HOLDS),
        (known(0.2, 0.3, 0.4), 0.1, "0.3 ± 0.06", FAILS),
        (known(0.2, 0.3, 0.4), 0.31, "0.3 ± 0.06", f"{OPEN}: within a standard error of 0.31"),
        (known(0.3), 0.3, "0.3 (one seed)", HOLDS),
        (known(0.31), 0.3, "0.31 (one seed)", FAILS),
        ([Interval(0.4, math.inf), Interval(0.35, math.inf)], 0.3, "> 0.4, > 0.35", FAILS),
        ([Interval(0.4, math.inf), *known(0.2)], 0.3, "> 0.4, 0.2", f"{OPEN}: seeds do not agree"),
        ([Interval(0.1, math.inf), *known(0.2)], 0.3, "> 0.1, 0.2", f"{OPEN}: target not reached"),
        ([Interval(-math.inf, 0.2), *known(0.1)], 0.3, "< 0.2, 0.1", HOLDS),
        ([Interval(0.0, math.inf)] * 2, 0.3, "unknown, unknown", f"{OPEN}: target not reached"),
        ([Interval(math.inf, math.inf), *known(0.5)], 0.3, "diverged, 0.5", FAILS),
        ([Interval(-math.inf, -math.inf), *known(0.1)], 0.3, "the other diverged, 0.1", HOLDS),
        ([Interval(-math.inf, math.inf)] * 2, 0.3, "unknown, unknown", f"{OPEN}: not comparable"),
        ([], 0.3, "–", f"{OPEN}: no results"),
    ],
)
def test_verdicts(intervals, bound, words, verdict):
    assert judge(intervals, bound) == (words, verdict)


def test_a_tie_is_at_most_and_not_less():
    assert judge(known(1.0, 1.0), 1.0)[1] == HOLDS
    assert judge(known(1.0, 1.0), 1.0, operator.lt)[1] == FAILS


def test_how_far_a_method_is_behind_after_the_same_cost():
    short, long = record(losses=(1.0, 0.5), costs=(2, 4)), record(losses=(1.0, 0.6, 0.2, 0.1), costs=(1, 2, 4, 6))
    assert behind(short, long) == pytest.approx((0.375, 0.375))
    assert behind(long, short) == pytest.approx((-0.375, -0.375))
    lost = record(losses=(1.0, None))
    assert behind(lost, short) == (math.inf, math.inf)
    assert behind(short, lost) == (-math.inf, -math.inf)
    assert behind(lost, lost) == behind(short, record(losses=())) == (-math.inf, math.inf)
    risen = record(losses=(1.0, 1.5), costs=(2, 4))
    assert behind(short, risen) == (-2.0, -2.0)
    assert behind(risen, short) == (2.0, 2.0)
    assert behind(risen, risen) == (-math.inf, math.inf)


def test_costs_in_words():
    assert averaged([Spent(1.0, True), Spent(3.0, True)]) == "2 ± 1"
    assert averaged([Spent(1.0, True), Spent(3.0, False)]) == "1 (not reached: 1 of 2 seeds)"
    assert averaged([Spent(1.0, False), Spent(3.0, False)]) == "not reached (3 spent)"
    assert averaged([Spent(math.inf, False)]) == "not reached"
    assert cell([0.5, 0.7]) == "0.6 ± 0.1"
    assert cell([0.5, None]) == "0.5 (1 not finite)"
    assert cell([None]) == "not finite"
    assert table(["a"], [["|b|"]]) == "| a |\n| --- |\n| \\|b\\| |\n"


def everything(seeds=2):
    """Results where all that is claimed holds, by hand."""
    fast, slow = (1.0, 0.4, 0.2, 0.1), (1.0, 0.8, 0.7, 0.6)
    results = {job.name: [] for job in JOBS}
    for seed in range(seeds):
        for job in ("synthetic", "mnist", "cleaning", "meta"):
            results[job].append(record("sldbo", fast, (10, 20, 30, 40), seed))
            for p in (0.5, 0.2, 0.1):
                costs = (10 * p, 20 * p, 30 * p, 40 * p)
                results[f"{job}-skipping"].append(record(f"s3ldbo-{p:g}", fast, costs, seed))
            for p in (0.25, 0.125):
                results[f"{job}-skipping"].append(record(f"s3ldbo-subset-{p:g}", slow, seed=seed))
                results[f"{job}-skipping"].append(record(f"s3ldbo-adaptive-{p:g}", fast, seed=seed))
        for method in ("dsvrbgd", "sldbo-top0.3", "sldbo-top0.1"):
            results["cleaning"].append(record(method, fast, (1, 2, 3, 4), seed))
        for method in ("mdbo", "vrdbo", "ma-dsbo", "ma-dsbo-sampled", "d-soba", "d-soba-sampled"):
            results["cleaning"].append(record(method, slow, (1, 2, 3, 4), seed))
        for job in ("sparse-policy", "sparse-cleaning"):
            for method in ("sparkle-ed", "sparkle-extra", "sparkle-gt", "d-soba"):
                results[job].append(record(method, slow if method == "d-soba" else fast, seed=seed))
        for method in ("sparkle-ed", "sparkle-gt"):
            results["lower-complete"].append(record(method, fast, seed=seed))
            results["upper-complete"].append(record(method, slow, seed=seed))
        for method in ("d-soba", "dsvrbgd"):
            for n in SIZES:
                run = record(f"{method}-n{n}", seed=seed, floor=(1 + seed) / n)
                results["speed-up"].append(run._replace(configuration={**run.configuration, "agents": n}))
        for method, iterations in (("plain", None), ("kfac-v", 20), ("kfac", 10), ("ekfac", 10)):
            results["curvature"].append(record(method, seed=seed, iterations=iterations, penalty=0.1))
    return {job: runs or [record()] for job, runs in results.items()}


def verdicts(results):
    return [[finding.verdict for finding in make(results).findings] for make in CLAIMS]


def test_the_claims_find_their_numbers():
    *first, compressed, moved, curved = verdicts(everything())
    assert {verdict for claim in (*first, moved, curved) for verdict in claim} == {HOLDS}
    assert (len(moved), len(curved)) == (9, 3)
    assert compressed == [HOLDS, HOLDS, f"{OPEN}: no results of cleaning", f"{OPEN}: no results of cleaning"]
    assert "slope -1 ± 0" in CLAIMS[4](everything()).findings[0].numbers


def test_a_claim_fails_where_the_numbers_say_so_and_is_open_where_the_target_was_not_reached():
    results = everything()
    fast = (1.0, 0.4, 0.2, 0.1)
    slow = [record("s3ldbo-0.5", fast, (10, 20, 30, 40), seed) for seed in range(2)]
    short = [record("s3ldbo-0.2", (1.0, 0.5), (1, 2), seed) for seed in range(2)]
    late = [record("s3ldbo-0.1", (1.0, 0.5), (1, 80), seed) for seed in range(2)]
    results["synthetic-skipping"] = [*slow, *short, *late]
    found = snapshots(results).findings[:3]
    assert [finding.verdict for finding in found] == [FAILS, f"{OPEN}: target not reached", FAILS]
    assert found[0].numbers.startswith("ratio 1 ± 0; ")
    results["lower-complete"], results["upper-complete"] = results["upper-complete"], results["lower-complete"]
    assert verdicts(results)[3] == [FAILS, FAILS]
    results["lower-complete"] = results["upper-complete"]
    assert verdicts(results)[3] == [f"{OPEN}: no difference above 1%"] * 2


def test_without_results_nothing_is_decided():
    for claim in verdicts({}):
        assert claim
        assert all(verdict.startswith(f"{OPEN}: no results of") for verdict in claim)


def test_seeds_are_matched():
    records = [record(seed=0), record(seed=2), record("other", seed=2), record("other", seed=1)]
    assert [[run.seed for run in pair] for pair in matched(records, "sldbo", "other")] == [[2, 2]]


def written(folder, results):
    for job, records in results.items():
        for one in records:
            path = folder / job / "task" / f"{one.method}-seed{one.seed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(one._asdict()))


def test_the_page_is_made_of_the_files_alone_and_always_the_same(tmp_path, capsys):
    results = everything()
    del results["mnist"]
    results["cleaning"].append(record("c2dfb", (1.0, None), seed=0, test_accuracy=None))
    short = record("s3ldbo-unbiased-0.2", seed=1, outer_steps=4)
    grid = {"x": [1.0, 3.0, 9.0], "y": [0.5, 1.0, 2.0], "v": [0.5, 1.0, 2.0]}
    chosen = {"step_sizes": {"x": 3.0, "y": 0.5, "v": 0.5}, "grid": grid}
    steady = {"0": [True, False, False], "1": [False, True, True]}
    results["cleaning"].append(short._replace(configuration={**short.configuration, **chosen, "grid_steady": steady}))
    written(tmp_path / "decentralized_papers-quick", results)
    pages = [tmp_path / "one.md", tmp_path / "more" / "two.md"]
    for page in pages:
        arguments = ["--quick", "--report-only", "--results", str(tmp_path), "--output", str(page)]
        assert main(["decentralized-papers", *arguments]) == 0
        assert "Page: " in capsys.readouterr().out
    text = pages[0].read_text()
    assert text == pages[1].read_text()
    for part in (
        "python -m benchmarks decentralized-papers --quick --seeds 2",
        "- Seeds: 0, 1\n- Device: cpu\n- Versions: python 3.12, jax 0.9\n- Missing: no results of mnist\n",
        "penalties, MNIST, p = 0.5 (at most 0.75) | – | **not decided: no results of mnist, mnist-skipping**",
        "| 5. Linear speed-up | D-SOBA, arXiv 2402.03167; DSVRBGD, arXiv 2311.11342 | 2 | 0 | 0 |",
        "n: 8; topology: ring; partition: dirichlet:0.1; iterations: 30; seeds: 0, 1.",
        "| sldbo | 0.1 | 0.1 | 40 | 40 | 40 | 40 |",
        "| 3, 0.5* † |",
        "\ns3ldbo-unbiased-0.2, seed 1: ended after 4 of 30 iterations.\n",
        "| c2dfb | not finite |",
        "### Penalties of MNIST\n\nNo results.",
        "### Curvature as a preconditioner of y and v",
    ):
        assert part in text
    table_of_cleaning = text.partition("### Hyper-cleaning, all methods")[2].partition("###")[0]
    assert table_of_cleaning.index("| sldbo |") < table_of_cleaning.index("| mdbo |") < table_of_cleaning.index("c2dfb")


def test_a_page_without_any_files_says_so(tmp_path):
    text = render("command", False, JOBS, {}, {})
    assert "- Setting: full." in text
    assert "no results of synthetic, " in text


@pytest.fixture
def console(capsys):
    from rich.console import Console

    return Console()


def test_a_job_that_fails_leaves_the_others_running_and_is_named(tmp_path, console):
    config = Config(results=tmp_path, output=tmp_path / "page.md", seeds=1, jobs=("synthetic", "mnist"))
    commands = []

    def start(arguments):
        commands.append(arguments)
        if "mnist" in arguments:
            written(config.folder, {"mnist": [record()]})
        return 0 if "mnist" in arguments else 1

    assert config.run_all(console, start) == 1
    assert commands[0][:5] == ["decentralized-regularization", "--data", "synthetic", "--seeds", "1"]
    assert commands[0][5:] == [
        *("--outer-steps", "1000", "--methods", "sldbo", "--results", str(config.folder / "synthetic")),
    ]
    assert [run.method for run in read(config.folder / "mnist")] == ["sldbo"]
    config.write()
    assert "--outer-steps 1000 --methods sldbo`, 0 s, 0 CPU s in all, ended with code 1." in config.output.read_text()
    again = Config(results=tmp_path, seeds=1, jobs=("synthetic", "mnist"), resume=True)
    commands.clear()
    assert again.run_all(console, start) == 1
    assert [arguments[2] for arguments in commands] == ["synthetic"]


def test_an_interruption_ends_the_plan(tmp_path, console):
    def start(arguments):
        raise KeyboardInterrupt

    assert Config(results=tmp_path).run_all(console, start) == papers.INTERRUPTED
    assert Config(results=tmp_path).run_all(console, lambda arguments: papers.INTERRUPTED) == papers.INTERRUPTED
    assert len([*tmp_path.glob("*/*/job.json")]) == 1


def test_a_command_line_of_every_job_is_understood():
    import importlib

    import tyro

    from benchmarks.__main__ import TASKS, module_of

    for job in JOBS:
        for quick in (True, False):
            task, *arguments = job.command(quick, 2)
            assert task in TASKS
            module = importlib.import_module(module_of(task))
            assert tyro.cli(module.Config, args=[*arguments, "--results", "x"], config=(tyro.conf.FlagCreatePairsOff,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds 0", "seeds must be an int >= 1; got 0."),
        ("--jobs all", "got all. Pass, say, --jobs synthetic."),
    ],
)
def test_bad_values_are_refused_with_the_fix(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["decentralized-papers", *arguments.split()])
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_the_problem_of_the_speed_up_has_the_minimum_that_it_says():
    (rows, targets), (given, wanted) = (
        [np.asarray(leaf, float).reshape(ROWS, *leaf.shape[2:]) for leaf in part] for part in quadratic(4, 0).batch
    )

    def inner(x, y):
        return np.mean((given @ (y - x) - wanted) ** 2) / 2 + RIDGE / 2 * y @ y

    def outer(x):
        system = given.T @ given / ROWS + RIDGE * np.eye(FEATURES)
        y = np.linalg.solve(system, given.T @ (wanted + given @ x) / ROWS)
        assert inner(x, y) < min(inner(x, y + 1e-3), inner(x, y - 1e-3))
        return np.mean((rows @ y - targets) ** 2) / 2 + RHO / 2 * x @ x

    solution = minimum((rows, targets), (given, wanted))
    np.testing.assert_allclose(quadratic(4, 0).solution, solution, rtol=1e-4)
    for away in 1e-3 * np.random.default_rng(0).normal(size=(20, FEATURES)):
        assert outer(solution) < outer(solution + away)
    x, y = np.ones(FEATURES), np.arange(FEATURES) / FEATURES
    np.testing.assert_allclose(PROBLEM.inner_loss(x, y, (given, wanted)), inner(x, y), rtol=1e-5)


def test_where_the_base_has_no_target_its_seed_is_left_out_and_counted():
    results = everything()
    results["synthetic"] = [record("sldbo", (1.0, None)), record("sldbo", (1.0, 0.4, 0.2, 0.1), (10, 20, 30, 40), 1)]
    found = snapshots(results).findings[0]
    assert found.verdict == HOLDS
    assert found.numbers.startswith("ratio 0.5 (one seed); ")
    assert found.numbers.endswith("; no target with 1 of 2 seeds, where sldbo does not descend")
    results["synthetic"] = [record("sldbo", (1.0, 2.0))]
    assert snapshots(results).findings[0].verdict == f"{OPEN}: sldbo does not descend"


def test_the_speed_up_writes_what_its_claim_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed_up, "SIZES", (4,))
    monkeypatch.setattr(speed_up, "QUICK_ITERATIONS", 40)
    with jax.enable_x64(False):
        assert main(["decentralized-speed-up", "--quick", "--seeds", "2", "--results", str(tmp_path / "job")]) == 0
    records = read(tmp_path / "job")
    assert [(run.method, run.seed) for run in records] == [
        (f"{m}-n4", seed) for m in ("d-soba", "dsvrbgd") for seed in (0, 1)
    ]
    for run in records:
        assert run.configuration["agents"] == 4
        distances = run.along("squared_distance")
        assert len(distances) == speed_up.CHECKPOINTS
        assert run.metrics["floor"] == pytest.approx(distances[10:].mean())
    assert "d-soba, n = 4, seed 1: ‖x̄ − x*‖² = " in capsys.readouterr().out

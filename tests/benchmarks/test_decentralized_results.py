import json
import math
import operator
import pathlib
import re

import jax
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.decentralized import papers, speed_up
from benchmarks.decentralized.claims import CLAIMS, communication, corrections, frontier, snapshots, step_sizes
from benchmarks.decentralized.claims.claim import span, table
from benchmarks.decentralized.claims.communication import RIVALS, SETTINGS
from benchmarks.decentralized.claims.factors import PREDICTED, RESCALED, factors
from benchmarks.decentralized.claims.refresh import TRIED
from benchmarks.decentralized.levels import LOSSES, Spent
from benchmarks.decentralized.measured import measured
from benchmarks.decentralized.paper_jobs import JOBS
from benchmarks.decentralized.papers import Config
from benchmarks.decentralized.profiles import draw, profiles, spread
from benchmarks.decentralized.records import Record, matched, read
from benchmarks.decentralized.results import render
from benchmarks.decentralized.speed_up import FEATURES, PROBLEM, RHO, RIDGE, ROWS, SIZES, minimum, quadratic
from benchmarks.decentralized.verdicts import (
    FAILS,
    HOLDS,
    NEITHER,
    NEVER,
    OPEN,
    OTHER_NEVER,
    SHORT,
    UNKNOWN,
    Interval,
    arrivals,
    averaged,
    behind,
    cell,
    counted,
    judge,
    last_quarter,
    overall,
    ratio,
)

VERSIONS = {"python": "3.12", "jax": "0.9"}
TUNING, JUDGED = (0, 1), (2, 3, 4)
VERDICTS = [(0, 0, 1), (1, 1, 5), (2, 0, 4), (0, 1, 0), (3, 1, 0), (1, 1, 4), (1, 4, 0)]  # hold, do not, too short
FAST, SLOW, STUCK, FALLING = (1.0, 0.4, 0.2, 0.1), (1.0, 0.8, 0.4, 0.1), (1.0, 0.7, 0.7, 0.7), (1.0, 0.9, 0.8, 0.7)


def curve_of(losses, costs=None):
    costs = [*range(len(losses))] if costs is None else [*costs]
    curve = {"exact_loss": [*losses], "exact_gradient": [*losses], "outer_step": [*range(len(losses))]}
    return curve | dict.fromkeys(("derivatives", "megabytes", "rounds", "seconds"), costs)


def record(method="sldbo", losses=(1.0, 0.5, 0.25), costs=None, seed=2, **metrics):
    curve = curve_of(losses, costs)
    last = {name: values[-1] if values else None for name, values in curve.items() if name != "outer_step"}
    configuration = {"agents": 8, "topology": "ring", "partition": "dirichlet:0.1", "outer_steps": 30, "role": "judged"}
    return Record("task", method, seed, configuration, VERSIONS, "cpu", {**last, **metrics}, curve)


def runs(method, losses, costs=None, lost=(), **others):
    """Runs on all seeds with one choice, or with more of other curves; on the seeds of `lost` none arrives."""
    found = []
    for seed in (*TUNING, *JUDGED):
        curves = {1.0: (STUCK if seed in lost else losses), **{float(name[1:]): one for name, one in others.items()}}
        tries = [
            {"step_sizes": {"x": x, "y": 1.0, "v": 1.0}, "settings": {}, "curve": curve_of(one, costs)}
            for x, one in curves.items()
        ]
        one = record(method, curves[1.0], costs, seed)
        role = {**one.configuration, "role": "tuning" if seed in TUNING else "judged"}
        found.append(one._replace(configuration=role, tries=tries))
    return found


def known(*values):
    return [Interval(value, value) for value in values]


def arrived(amount):
    return Spent(amount, True, amount, amount)


@pytest.mark.parametrize(
    ("method", "other", "interval"),
    [
        (arrived(2), arrived(4), Interval(0.5, 0.5)),
        (Spent(3, False, 6), arrived(4), Interval(1.5, math.inf)),
        (Spent(3, False, math.inf), arrived(4), NEVER),
        (arrived(2), Spent(4, False, 8), Interval(-math.inf, 0.25)),
        (arrived(2), Spent(math.inf, False, math.inf), OTHER_NEVER),
        (Spent(2, False, 9), Spent(4, False, math.inf), UNKNOWN),
        (Spent(2, False, math.inf), Spent(math.inf, False, math.inf), NEITHER),
        (Spent(2, True, 1, 4), arrived(4), Interval(0.25, 1.0)),
        (arrived(4), Spent(2, True, 1, 4), Interval(1.0, 4.0)),
        (Spent(2, True, 1, 4), Spent(4, False, 8), Interval(-math.inf, 0.5)),
        (arrived(0.0), arrived(0.0), Interval(1.0, 1.0)),
        (arrived(1.0), arrived(0.0), NEVER),
        (Spent(1.0, False, 2.0), arrived(0.0), NEVER),
    ],
)
def test_ratios_of_costs_are_bounded_where_a_target_was_not_reached(method, other, interval):
    assert ratio(method, other) == interval


@pytest.mark.parametrize(
    ("intervals", "words", "verdict"),
    [
        (known(0.2, 0.2, 0.2), "0.2 ± 0", HOLDS),
        (known(0.4, 0.5, 0.6), "0.5 ± 0.06", FAILS),
        (known(0.2, 0.3, 0.37), "0.29 ± 0.05", f"{OPEN}: within a standard error of 0.3"),
        (known(0.3), "0.3 (one seed)", HOLDS),
        ([Interval(0.4, math.inf), Interval(0.35, math.inf)], "too short on 2 of 2 seeds (≥ 0.35)", FAILS),
        ([Interval(0.1, math.inf), *known(0.2)], "0.2 on 1; too short on 1 of 2 seeds (≥ 0.1)", SHORT),
        ([Interval(0.4, math.inf), *known(0.2)], None, f"{OPEN}: seeds do not agree"),
        ([Interval(-math.inf, 0.2), *known(0.1)], "0.1 on 1; the other too short on 1 of 2 seeds (≤ 0.2)", HOLDS),
        ([OTHER_NEVER, *known(0.1, 0.1, 0.35)], None, HOLDS),  # the mean of the known counts, not each of them
        ([OTHER_NEVER, *known(0.1, 0.35)], None, f"{OPEN}: within a standard error of 0.3"),
        ([OTHER_NEVER, *known(0.5)], None, f"{OPEN}: seeds do not agree"),
        ([NEITHER, *known(0.1)], None, f"{OPEN}: not comparable"),
        (
            [Interval(0.2, 0.4)] * 2,
            "before the first checkpoint on 2 of 2 seeds",
            f"{OPEN}: before the first checkpoint",
        ),
        ([Interval(0.1, 0.2), *known(0.1)], None, HOLDS),
        ([UNKNOWN] * 2, "too short on 2 of 2 seeds", SHORT),
        ([NEVER, *known(0.5)], "0.5 on 1; does not arrive on 1 of 2 seeds", FAILS),
        ([NEVER, *known(0.1)], None, f"{OPEN}: seeds do not agree"),
        ([OTHER_NEVER, *known(0.1, 0.2)], "0.15 ± 0.05 on 2; the other does not arrive on 1 of 3 seeds", HOLDS),
        ([NEVER], "does not arrive (one seed)", FAILS),
        ([NEITHER] * 2, "not comparable on 2 of 2 seeds", f"{OPEN}: not comparable"),
        ([], "–", f"{OPEN}: no results"),
    ],
)
def test_verdicts(intervals, words, verdict):
    found = judge(intervals, 0.3)
    assert found[1] == verdict
    assert words in (None, found[0])


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
    assert behind(short, risen) == (-math.inf, -math.inf)
    assert behind(risen, short) == (math.inf, math.inf)
    assert behind(risen, risen) == (-math.inf, math.inf)


def test_costs_in_words():
    assert averaged([arrived(1.0), arrived(3.0)]) == "2 ± 1"
    assert averaged([arrived(1.0), Spent(3.0, False, 4.0)]) == "1"
    assert arrivals([arrived(1.0), Spent(3.0, False, 4.0)]) == " (1 of 2 seeds, 1 too short)"
    assert (
        averaged([Spent(3.0, False, math.inf)] * 2) + arrivals([Spent(3.0, False, math.inf)] * 2) == "– (0 of 2 seeds)"
    )
    assert cell([0.5, 0.7]) == "0.6 ± 0.1"
    assert cell([100.0, 140.0]) == "120 ± 20"
    assert cell([0.5, None]) == "0.5 (1 not finite)"
    assert cell([None]) == "not finite"
    assert table(["a"], [["|b|"]]) == "| a |\n| --- |\n| \\|b\\| |\n"
    assert span([0.2, None, 0.5]) == "0.2 to 0.5 (2 of 3)"
    assert span([None]) == "unknown"
    assert counted([HOLDS, f"{OPEN}: no results", SHORT, HOLDS, FAILS]) == (2, 1, 2)
    found = [overall([HOLDS] * holds + [FAILS] * fails + [SHORT] * short) for holds, fails, short in VERDICTS]
    assert found == ["open", "open", HOLDS, FAILS, "mostly holds", "mixed", "mostly does not"]
    assert last_quarter(record(losses=(1.0, 0.9, 0.8, 0.7, 0.5))) == pytest.approx(0.4)
    assert math.isnan(last_quarter(record(losses=(1.0, 2.0))))


def test_steps_are_chosen_for_each_target_on_tuning_seeds_and_judged_on_others():
    early, late = (1.0, 0.45, 0.4, 0.4), (1.0, 0.9, 0.5, 0.0)
    found = measured({"job": [*runs("sldbo", (1.0, 0.5, 0.0)), *runs("other", early, x3=late)]}, "job")
    assert found.base.step_sizes["x"] == 1.0
    half, *_, deep = LOSSES
    assert found.chosen("other", half, "rounds")[0].step_sizes["x"] == 1.0
    assert found.chosen("other", deep, "rounds")[0].step_sizes["x"] == 3.0
    spent = found.spent("other", half, "rounds")
    assert sorted(spent) == [*JUDGED]
    assert all(one.reached and one.amount < 1 for one in spent.values())
    assert not any(one.reached for one in found.spent("other", deep, "rounds", found.base).values())
    assert found.spent("absent", deep, "rounds") == {}
    without = measured({"job": runs("other", early)}, "job")
    assert without.base is None
    assert without.spent("other", half, "rounds") == {}


def test_snapshots_hold_fail_or_were_too_short():
    base = runs("sldbo", FAST, (0, 10, 20, 30))
    lazy = {
        "s3ldbo-0.5": runs("s3ldbo-0.5", FAST, (0, 5, 10, 15)),
        "s3ldbo-0.2": runs("s3ldbo-0.2", FALLING, (0, 1, 2, 3)),
        "s3ldbo-0.1": runs("s3ldbo-0.1", STUCK, (0, 1, 2, 3), x3=(1.0, None, None, None)),
        "s3ldbo-0.05": runs("s3ldbo-0.05", FAST, (0, 1, 2, 3), lost=(0, 3, 4)),
    }
    claim = snapshots({"synthetic": [*base, *(run for each in lazy.values() for run in each)]})
    rows = [line.split(" | ") for line in claim.details.splitlines() if line.startswith("| penalties, synthetic")]
    last = [row for row in rows if row[2] == "99%"]
    assert [row[1] for row in last] == ["0.5", "0.2", "0.1", "0.05"]
    assert [row[-1].strip("| *") for row in last] == [HOLDS, SHORT, FAILS, f"{OPEN}**: seeds do not agree"]
    assert last[0][3:6] == ["0.5 ± 0"] * 3
    assert last[1][3] == "too short on 3 of 3 seeds (≥ 0.31) †"
    assert last[2][3] == "does not arrive on 3 of 3 seeds †"
    assert last[3][3] == "0.1 on 1; does not arrive on 2 of 3 seeds †"
    assert claim.verdicts.count(f"{OPEN}: no results of mnist") == 12
    assert claim.numbers == "p = 0.1, 99%: unknown of SLDBO's evaluations, unknown of its bytes"


def test_a_crossing_that_does_not_last_is_none():
    base, swings = runs("sldbo", FAST), runs("s3ldbo-0.5", (1.0, 0.1, 0.3, 0.1))
    rows = snapshots({"cleaning": [*base, *swings]}).details.splitlines()
    assert "| hyper-cleaning | 0.5 | 90% | 1.16 ± 0 | 1.16 ± 0 | 1.16 ± 0 | **does not hold** |" in rows


def test_who_arrives_alone_sends_less():
    everything = [*runs("sldbo", FAST), *runs("dsvrbgd", FAST), *runs("mdbo", STUCK), *runs("vrdbo", (1.0, None, None))]
    claim = communication({"stochastic-cleaning": everything})
    assert claim.verdicts[1:3] == [HOLDS, HOLDS]
    assert "the other does not arrive on 3 of 3 seeds: **holds**" in claim.details
    assert "| mdbo | – (0 of 3 seeds) † |" in claim.details
    assert "| dsvrbgd | 0.6525 MB; 0.6525 rounds |" in claim.details


def test_the_goal_is_met_by_one_preset_on_all_tasks_or_not_at_all():
    few = [*runs("sldbo", FAST, (0, 10, 20, 30)), *runs("s3ldbo-ed-0.1", FAST, (0, 1, 2, 3))]
    jobs = ("synthetic", "mnist", "cleaning", "meta")
    assert frontier(dict.fromkeys(jobs, few)).verdicts == [HOLDS]
    claim = frontier({**dict.fromkeys(jobs[:3], few), "meta": runs("sldbo", FAST)})
    assert claim.verdicts == [FAILS]
    assert claim.numbers == "s3ldbo-ed-0.1 meets it on 3 of 4 tasks: 0.1 of the evaluations, 0.1 times the bytes"
    assert frontier({}).verdicts == [f"{OPEN}: no results"]


def test_predictions_are_compared_with_steps_that_the_same_factors_rescale():
    base = runs("sldbo", FAST, (0, 10, 20, 30))
    own = [one for name in PREDICTED for one in runs(name, FAST, (0, 1, 2, 3))]
    other = [one for name in RESCALED for one in runs(name, FAST, (0, 2, 4, 6))]
    timed = [one._replace(metrics={**one.metrics, "cpu_seconds": 0.06, "outer_steps": 30}) for one in base]
    claim = factors({"cleaning": [*timed, *own, *other]})
    assert claim.verdicts == [HOLDS] * 12
    assert claim.numbers == "0.5 of the evaluations with rescaled steps"
    assert "| s3ldbo-predicted-0.1 / sldbo-kfac | 0.5 ± 0: **holds** |" in claim.details
    assert "| s3ldbo-predicted-0.1 / s3ldbo-cyclic-0.1 | –: **not decided**: no results of cleaning |" in claim.details
    assert "| sldbo | 1 / 1 | – | – | 2 | – | – |" in claim.details  # milliseconds
    assert "| s3ldbo-kfac-0.1 | 0.2 / 0.2 | – |" in claim.details
    faster = [one for name in RESCALED for one in runs(name, FAST, (0, 0.5, 1, 1.5))]
    assert factors({"cleaning": [*base, *own, *faster]}).verdicts == [FAILS] * 12


def test_an_order_that_a_longer_run_may_turn_was_too_short():
    late = [record("sparkle-ed", (1.0, 0.9, 0.8, 0.7, 0.4), seed=seed) for seed in JUDGED]
    better = [record("sparkle-gt", (1.0, 0.3, 0.25, 0.25, 0.25), seed=seed) for seed in JUDGED]
    idle = [record("sparkle-extra", (1.0, 0.4, 0.4, 0.4, 0.4), seed=seed) for seed in JUDGED]
    assert corrections({"sparse-policy": [*late, *better, *idle]}).verdicts[:2] == [SHORT, FAILS]


def test_a_profile_counts_what_is_within_a_factor_of_the_cheapest():
    results = {"job": [*runs("sldbo", FAST, (0, 2, 4, 6)), *runs("d-soba", FAST), *runs("mdbo", STUCK)]}
    found = profiles(results, "megabytes")
    assert found["d-soba"].at(np.array([1.0, 4.0])).tolist() == [1.0, 1.0]
    assert found["sldbo"].at(np.array([1.0, 1.9, 2.1])).tolist() == [0.0, 0.0, 1.0]
    assert found["mdbo"].at(np.array([64.0])).tolist() == [0.0]
    figure = draw(results)
    texts = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert texts == {"sldbo", "d-soba", "mdbo"}
    assert draw({"job": runs("d-soba", FAST)}) is None
    assert spread([0.5, 0.5, 0.1]) == pytest.approx([0.5, 0.555, 0.1])
    assert spread([1.0, 1.0]) == pytest.approx([0.945, 1.0])


def everything():
    """Results where all that is claimed holds, by hand."""
    results = {job.name: [] for job in JOBS}
    for job in ("synthetic", "mnist", "cleaning", "meta"):
        results[job] = runs("sldbo", FAST, (0, 20, 30, 40))
        for p in (0.5, 0.2, 0.1, 0.05):
            for name in (f"s3ldbo-{p:g}", f"s3ldbo-ed-{p:g}"):
                part = p if "ed" not in name else p / 2
                results[job] += runs(name, FAST, (0, 20 * part, 30 * part, 40 * part))
        for p in (0.25, 0.125):
            results[job] += runs(f"s3ldbo-subset-{p:g}", STUCK) + runs(f"s3ldbo-adaptive-{p:g}", FAST)
    for setting in SETTINGS:
        deep = FAST if setting.job == "stochastic-cleaning" else (1.0, 0.3, 0.03, 0.005)
        found = results[setting.job] = results[setting.job] or runs("sldbo", FAST)
        found += runs("dsvrbgd", deep, (0, 4, 6, 8))
        found += [run for name in ("dsvrbgd-ed", "dsvrbgd-top0.3", "dsvrbgd-top0.1") for run in runs(name, deep)]
        found += [run for rival in RIVALS for run in runs(rival, deep, (0, 20, 30, 40))]
    results["cleaning"] += runs("sldbo-top0.3", FAST) + runs("sldbo-top0.1", FAST)
    results["cleaning"] += [one for name in PREDICTED for one in runs(name, FAST, (0, 1, 1.5, 2))]
    results["cleaning"] += [one for name in RESCALED for one in runs(name, FAST, (0, 10, 15, 20))]
    results["synthetic"] += runs("s3ldbo-predicted-0.1", FAST, (0, 4, 6, 8))
    results["policy"] += [*runs("sldbo", FAST), *runs("s3ldbo-predicted-0.1", FAST, (0, 4, 6, 8))]
    for job in TRIED:
        results[job] += runs("s3ldbo-worst-0.1", FAST, (0, 0.5, 0.6, 0.8))
    for job in ("sparse-policy", "sparse-cleaning"):
        for method in ("sparkle-ed", "sparkle-extra", "sparkle-gt", "d-soba"):
            results[job] += runs(method, STUCK if method == "d-soba" else FAST)
    for method in ("sparkle-ed", "sparkle-gt"):
        results["lower-complete"] += runs(method, FAST)
        results["upper-complete"] += runs(method, STUCK)
    for seed in JUDGED:
        for method in ("d-soba", "dsvrbgd"):
            for n in SIZES:
                run = record(f"{method}-n{n}", seed=seed, floor=(1 + seed) / n)
                results["speed-up"].append(run._replace(configuration={**run.configuration, "agents": n}))
        for method, iterations in (("plain", None), ("kfac-v", 20), ("kfac", 10), ("ekfac", 10)):
            results["curvature"].append(record(method, seed=seed, iterations=iterations, penalty=0.1))
        for job in (job.name for job in JOBS if job.name.startswith("step-sizes-")):
            one = suggestion(seed, reached(9.0), reached(5.0), reached(15.0), reached(10.0))
            results[job].append(one._replace(method=f"{job.removeprefix('step-sizes-')}-sldbo"))
    return {job: records or [record()] for job, records in results.items()}


def reached(amount):
    return Spent(amount, True, amount, amount)._asdict()


def suggestion(seed, *spent, everywhere=True, diverged=0.0):
    """A run of the study of step sizes: what is spent with suggested and with tuned steps, for 90 % and 99 %."""
    both = [{"suggested": own, "tuned": best, "everywhere": everywhere} for own, best in (spent[:2], spent[2:]) if own]
    run = record("synthetic-sldbo", seed=seed, search=4.0, diverged=diverged)
    targets = {share: {"derivatives": one} for share, one in zip(("0.9", "0.99"), both, strict=False)}
    return run._replace(configuration={**run.configuration, "targets": targets, "warm_up": 10})


def verdicts(results):
    return [make(results).verdicts for make in CLAIMS]


def test_the_claims_find_their_numbers():
    found = verdicts(everything())
    assert {verdict for claim in found for verdict in claim} == {HOLDS}
    assert [*map(len, found)] == [48, 68, 6, 2, 2, 12, 1, 3, 33, 1, 12, 11, 9]
    assert CLAIMS[4](everything()).numbers == "slopes -1, where 1/n is −1"


def test_a_claim_fails_where_the_numbers_say_so():
    results = everything()
    results["lower-complete"], results["upper-complete"] = results["upper-complete"], results["lower-complete"]
    assert verdicts(results)[3] == [FAILS, FAILS]
    results["lower-complete"] = results["upper-complete"]
    assert verdicts(results)[3] == [f"{OPEN}: no difference above 1%"] * 2


def test_suggested_steps_that_do_not_arrive_fail():
    never, short = {"amount": 90.0, "reached": False, "least": None, "most": None}, {"least": 100.0}
    runs = [suggestion(seed, reached(9.0), reached(6.0), never, reached(9.0), everywhere=False) for seed in JUDGED]
    claim = step_sizes({"step-sizes-synthetic": runs})
    assert claim.verdicts == [HOLDS, FAILS, HOLDS]
    line = "| synthetic-sldbo | 99% | 10 | 4 | – (0 of 3 seeds) | 9 | does not arrive on 3 of 3 seeds † | **does not"
    assert line in claim.details
    runs = [suggestion(seed, never | short, reached(60.0), never | short, reached(9.0)) for seed in JUDGED]
    claim = step_sizes({"step-sizes-synthetic": runs})
    assert claim.verdicts == [SHORT, FAILS, HOLDS]  # a longer run could still hold for the first
    assert "(0 of 3 seeds, 3 too short)" in claim.details
    assert (
        not step_sizes({"step-sizes-synthetic": [suggestion(2, None, None, None, None)]}).verdicts[0].startswith(HOLDS)
    )


def test_without_results_nothing_is_decided():
    for claim in verdicts({}):
        assert all(verdict.startswith(f"{OPEN}: no results") for verdict in claim)


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
    results["cleaning"].append(record("c2dfb", (1.0, None), test_accuracy=None))
    short = record("s3ldbo-unbiased-0.2", seed=3, outer_steps=4)
    grid = {"x": [1.0, 3.0, 9.0], "y": [0.5, 1.0, 2.0], "v": [0.5, 1.0, 2.0]}
    chosen = {"step_sizes": {"x": 3.0, "y": 0.5, "v": 0.5}, "grid": grid, "settings": {"momentum": 0.1}}
    results["cleaning"].append(short._replace(configuration={**short.configuration, **chosen}))
    written(tmp_path / "decentralized_papers-quick", results)
    pages = [tmp_path / "one.md", tmp_path / "more" / "two.md"]
    for page in pages:
        arguments = ["--quick", "--report-only", "--results", str(tmp_path), "--output", str(page)]
        assert main(["decentralized-papers", *arguments]) == 0
        assert "Page: " in capsys.readouterr().out
        assert page.with_name("profiles.png").stat().st_size < 200_000
    text = pages[0].read_text()
    assert text == pages[1].read_text()
    for part in (
        "python -m benchmarks decentralized-papers --quick --seeds 3",
        "- Seeds: 2, 3, 4 judged; 0, 1 to choose steps on\n- Device: cpu\n- Versions: python 3.12, jax 0.9\n",
        "- Missing: no results of mnist\n",
        "| penalties, MNIST | 0.5 | 50% | – | – | – | **not decided**: no results of mnist |",
        "| **holds** | 2 / 0 / 0 | slopes -1, where 1/n is −1 |",
        "n: 8; topology: ring; partition: dirichlet:0.1; iterations: 30; seeds: 2, 3, 4.",
        "| sldbo | 0.1 | 0.1 | 40 | 40 | 40 | 40 |",
        "| 3, 0.5*, momentum 0.1 |",
        "\ns3ldbo-unbiased-0.2, seed 3: ended after 4 of 30 iterations.\n",
        "| c2dfb | not finite |",
        "### Penalties of MNIST\n\nNo results.",
        "### Curvature as a preconditioner of y and v",
        "![Performance profiles](profiles.png)",
    ):
        assert part in text
    table_of_cleaning = text.partition("### Hyper-cleaning\n")[2].partition("###")[0]
    assert table_of_cleaning.index("| sldbo |") < table_of_cleaning.index("c2dfb")


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
    methods = JOBS[0].methods
    assert commands[0][5:] == [
        *("--outer-steps", "1000", "--methods", *methods, "--results", str(config.folder / "synthetic")),
    ]
    assert [run.method for run in read(config.folder / "mnist")] == ["sldbo"]
    config.write()
    assert f"--methods {' '.join(methods)}`, 0 s, 0 CPU s in all, ended with code 1." in config.output.read_text()
    again = Config(results=tmp_path, seeds=1, jobs=("synthetic", "mnist"), resume=True)
    commands.clear()
    assert again.run_all(console, start) == 1
    assert [arguments[2] for arguments in commands] == ["synthetic"]


def told(**other):
    return json.dumps(record()._asdict() | other)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "Expecting value"),
        (told()[:-20], "Expecting"),
        (b"\xff\xfe", "decode"),
        ("[]", "no object"),
        ("{}", "missing 8 required"),
        (told(seed="2"), "seed must be of"),
        (told(unknown=1), "unknown"),
        (told(metrics=[1]), "metrics must be of"),
        (told(metrics={"exact_loss": "low"}), "metrics must be numbers"),
        (told(curve={"outer_step": [1, 2], "exact_loss": [1]}), "lists of one length"),
        (told(curve={"outer_step": 1}), "curve must be of lists"),
        (told(curve={"outer_step": ["1"]}), "curve must be of lists"),
        (told(tries=[{"step_sizes": {}}]), r"tries\[0\] must have step_sizes, settings, curve"),
        (told(tries=[{"step_sizes": {}, "settings": {}, "curve": {"x": [[]]}}]), r"tries\[0\] must be of lists"),
        (told(run=3), "run must be of"),
    ],
)
def test_damaged_files_are_left_out_and_named(tmp_path, content, says):
    written(tmp_path, {"mnist": [record()]})
    damaged = tmp_path / "mnist" / "task" / "damaged.json"
    damaged.write_bytes(content if isinstance(content, bytes) else content.encode())
    troubles = []
    assert [run.method for run in read(tmp_path / "mnist", troubles.append)] == ["sldbo"]
    (trouble,) = troubles
    assert re.search(rf"left out: {damaged} is damaged: .*{says}", trouble)


def test_a_page_names_files_that_were_left_out_and_runs_of_several_commands(tmp_path, capsys):
    config = Config(results=tmp_path, output=tmp_path / "page.md", report_only=True)
    written(config.folder, {"mnist": [record(seed=seed)._replace(run=f"run-{seed}") for seed in (2, 3)]})
    (config.folder / "mnist" / "task" / "half.json").write_text('{"task": ')
    (config.folder / "mnist" / "job.json").write_text('{"command": "x"}')
    assert config.run() == 0
    for place in (config.output.read_text(), capsys.readouterr().out):
        assert "mnist has runs of 2 commands: run-2, run-3" in place
        assert f"left out: {config.folder / 'mnist' / 'task' / 'half.json'} is damaged" in place
        assert f"{config.folder / 'mnist' / 'job.json'} does not say how the job went" in place


def test_a_job_that_was_killed_goes_on_in_a_folder_of_its_own(tmp_path, console):
    config = Config(results=tmp_path, seeds=1, jobs=("synthetic", "mnist"), checkpoint=tmp_path / "kept")
    commands = []
    assert Config(results=tmp_path, seeds=1, jobs=("synthetic",)).run_all(console, lambda arguments: 0) == 0

    def start(arguments):
        commands.append(arguments)
        pathlib.Path(arguments[-1]).mkdir(parents=True, exist_ok=True)
        return 143 if "mnist" in arguments and len(commands) == 2 else 0

    assert config.run_all(console, start) == 130  # synthetic too: it had ended, but not with this folder
    assert config.run_all(console, start) == 0
    kept = [arguments[arguments.index("--checkpoint") + 1] for arguments in commands]
    assert kept == [str(tmp_path / "kept" / name) for name in ("synthetic", "mnist", "mnist")]


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

"""The study of suggested step sizes, on a task of a few states: what it writes, and what it refuses."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

import bilevax as bx
from benchmarks.__main__ import main
from benchmarks.decentralized import policy_evaluation, step_sizes
from benchmarks.decentralized.claims import step_sizes as step_sizes_claim
from benchmarks.decentralized.levels import Try
from benchmarks.decentralized.records import read
from benchmarks.decentralized.rows import names, personal_rows, rows
from benchmarks.harness.loop import Outcome
from benchmarks.harness.report import Run
from bilevax.single_loop.correction import Move


@pytest.fixture
def small(monkeypatch):
    config = policy_evaluation.Config(states=12, features=2, network=policy_evaluation.Evaluators(agents=4))

    def job(quick):
        def load(seed):
            return policy_evaluation.network(config.load(seed), 4)

        return step_sizes._job("policy", load, 60, (0.3, 1.0), [3.6, 10.8]), config.network

    monkeypatch.setattr(step_sizes, "JOBS", {"policy": step_sizes.Studied(("sldbo",), job)})


@pytest.mark.compiles(60)  # a whole run of a command
def test_the_study_writes_records_that_the_page_reads(small, tmp_path, capsys):
    arguments = ["--quick", "--seeds", "1", "--jobs", "policy", "--results", str(tmp_path)]
    assert main(["decentralized-step-sizes", *arguments]) == 0
    (record,) = read(tmp_path)
    assert (record.method, record.seed, record.configuration["role"]) == ("policy-sldbo", 0, "judged")
    told, own = record.configuration, record.configuration["own"]["derivatives"]
    assert not told["breakdown"]
    # 21 of 4 for the curvatures, one for the slope, ten to warm up, five for each pilot, fifteen at least after it
    assert own >= 21 / 4 + 1 + 10 + 5 * len(told["pilots"]) + 15
    assert told["targets"]
    for share, both in told["targets"].items():
        tuned, suggested = both["derivatives"]["tuned"], both["derivatives"]["suggested"]
        assert suggested["amount"] >= own
        assert record.metrics[f"suggested_{share}"] == (suggested["amount"] if suggested["reached"] else None)
        if suggested["reached"] and tuned["reached"]:
            assert math.isclose(record.metrics[f"ratio_{share}"], suggested["amount"] / tuned["amount"])
    assert step_sizes_claim({"step-sizes-policy": [record]}).verdicts
    assert json.loads(next(tmp_path.rglob("*.json")).read_text())["task"] == step_sizes.TASK
    assert "Suggested step sizes" in capsys.readouterr().out


def test_tuned_steps_are_those_that_the_tuning_seeds_choose():
    """The first pair is the faster one on the tuning seed, the second one on the judged seed."""

    def run(seed, role, *speeds):
        outer_step, tries = [*range(8)], []
        for x, speed in zip((1.0, 2.0), speeds, strict=True):
            curve = {"exact_loss": [0.1 ** (speed * k) for k in outer_step], "outer_step": outer_step}
            curve |= {name: [*map(float, outer_step)] for name in ("derivatives", "megabytes", "rounds")}
            tries.append(Try({"x": x, "y": 1.0, "v": 1.0}, {}, curve))
        return Run(step_sizes.TASK, "sldbo", seed, {"role": role}, Outcome((), {}, {}), tries)

    found, level = step_sizes.found_by([run(1, "tuning", 1, 0.5), run(0, "judged", 0.5, 1)]), step_sizes.SHARES[-1]
    assert found.chosen("sldbo", level, "derivatives")[0].step_sizes["x"] == 1.0
    assert math.isclose(found.spent("sldbo", level, "derivatives")[0].amount, 4.0, rel_tol=0.01)  # 2 with the other


@pytest.mark.parametrize(("name", "upper"), [("sldbo", "tracking"), ("sparkle-ed", "exact_diffusion")])
def test_where_each_agent_has_a_lower_level_of_its_own_x_alone_is_corrected(name, upper):
    gossip, still = bx.gossip(bx.topology.complete(4)), Move(lambda s: (), lambda t, state, s: (t, state), linear=True)
    row = next(row for row in personal_rows(bx.coins.independent, 4) if row.name == name)

    def state(correction):
        return jax.tree.structure(correction.init(gossip, jnp.zeros(4), still))

    expected, own = state(getattr(bx.single_loop.correction, upper)()), state(bx.single_loop.correction.local())
    assert expected != own
    assert state(step_sizes.correction_of(row, personal=False)) == expected
    assert [*map(state, step_sizes.correction_of(row, personal=True))] == [expected, own, own]


def test_what_a_search_evaluates_on_all_examples():
    """Iterations of a warm-up and of runs, each on a tenth of the examples, and slopes."""
    share = bx.problem.Calls(0.1, 0.1, 0.1, 0.1)
    for slopes in (2, 5):
        calls = bx.problem.Calls(30 + slopes, 31 + slopes, 50 + slopes, 30 + slopes)
        assert math.isclose(step_sizes.evaluated(calls, share, slopes), 21 / 4 + slopes + 30 * 0.1)


@pytest.mark.parametrize("name", ["synthetic", "digits", "policy"])  # the others read files
def test_tasks_of_the_study_have_their_agents_and_methods(name):
    methods, make = step_sizes.JOBS[name]
    job, agents = make(True)
    assert job.load(0).n == agents.agents
    assert {*methods} <= {row.name for row in rows(bx.coins.independent, agents.batch_size)}
    assert min(*job.outer_grid, *job.inner_grid) > 0


def test_methods_of_the_study_suit_heads_of_each_agent_too():
    assert {*step_sizes.JOBS["meta"].methods} <= {*names(personal=True)}


def test_jobs_and_seeds_are_checked():
    with pytest.raises(ValueError, match="jobs must be some of synthetic, mnist, digits, meta, policy; got cifar"):
        step_sizes.Config(jobs=("cifar",))
    with pytest.raises(ValueError, match="seeds must be an int >= 1"):
        step_sizes.Config(seeds=0)

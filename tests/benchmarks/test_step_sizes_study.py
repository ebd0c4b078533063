"""The study of suggested step sizes, on a task of a few states: what it writes, and what it refuses."""

import json
import math

import pytest

from benchmarks.__main__ import main
from benchmarks.decentralized import policy_evaluation, step_sizes
from benchmarks.decentralized.records import read


@pytest.fixture
def small(monkeypatch):
    config = policy_evaluation.Config(states=12, features=2, network=policy_evaluation.Evaluators(agents=4))

    def jobs(quick):
        def load(seed):
            return policy_evaluation.network(config.load(seed), 4)

        return [(step_sizes._job("policy", load, 60, (0.3, 1.0), [3.6, 10.8]), config.network)]

    monkeypatch.setattr(step_sizes, "jobs", jobs)
    monkeypatch.setattr(step_sizes, "METHODS", ("sldbo",))


@pytest.mark.compiles(60)  # a whole run of a command
def test_the_study_writes_records_that_the_page_reads(small, tmp_path, capsys):
    assert main(["decentralized-step-sizes", "--quick", "--seeds", "1", "--results", str(tmp_path)]) == 0
    (record,) = read(tmp_path)
    assert (record.method, record.seed, record.configuration["role"]) == ("policy-sldbo", 0, "judged")
    told, own = record.configuration, record.configuration["own"]["derivatives"]
    assert not told["breakdown"]
    # 21 of 4 for the curvatures, one for the slope, ten to warm up, five for each pilot, fifteen at least after it
    assert own >= 21 / 4 + 1 + 10 + 5 * len(told["pilots"]) + 15
    for share, both in told["targets"].items():
        assert record.metrics[f"suggested_{share}"] == both["suggested_derivatives"]
    both = told["targets"]["0.9"]
    assert both["suggested_derivatives"] >= own
    assert math.isclose(both["ratio_derivatives"], both["suggested_derivatives"] / both["tuned_derivatives"])
    assert json.loads(next(tmp_path.rglob("*.json")).read_text())["task"] == step_sizes.TASK
    assert "Suggested step sizes" in capsys.readouterr().out


def test_jobs_and_seeds_are_checked():
    with pytest.raises(ValueError, match="jobs must be some of synthetic, digits, policy; got mnist"):
        step_sizes.Config(jobs=("mnist",))
    with pytest.raises(ValueError, match="seeds must be an int >= 1"):
        step_sizes.Config(seeds=0)

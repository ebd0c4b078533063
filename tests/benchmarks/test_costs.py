"""The table of costs on a small problem: which numbers it has, not which they are."""

import json
import os

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

pytest.importorskip("flax")
pytest.importorskip("tokenizers")

import optax

import bilevax as bx
from benchmarks.harness.folder import Folder
from benchmarks.harness.runner import Options
from benchmarks.harness.threads import TASKS, pinned
from benchmarks.tasks import text_reweighting
from benchmarks.tasks import text_reweighting_costs as costs
from benchmarks.tasks.weighting import EACH, Examples, Problem

TEXTS, WIDTH = 6, 4


def case():
    """Softmax regression on texts of one vector."""

    def logits(y, inputs):
        return inputs[0][:, 0] @ y

    def outer_loss(x, y, batch):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(y, batch[0]), batch[1]))

    loss = bx.curvature.ModelLoss(
        logits,
        bx.curvature.softmax_cross_entropy,
        lambda x, examples: (examples.inputs, examples.targets),
        weights=EACH.weights,
    )
    inputs = jax.random.normal(jax.random.key(0), (TEXTS, 1, WIDTH)), jnp.ones((TEXTS, 1))
    labels = jnp.arange(TEXTS) % 3
    sizes = dict.fromkeys(("inner", "curvature", "cross", "outer"), TEXTS)
    problem = Problem(loss, outer_loss, optax.sgd(0.1), 2, sizes, lambda examples: examples.inputs[1], 0.1)
    batch = bx.Batch((inputs, labels), Examples(jnp.arange(TEXTS), inputs, labels, jnp.zeros((TEXTS, 1))))
    return costs.Case("small", "Costs of something small", problem, jnp.zeros(TEXTS), jnp.zeros((WIDTH, 3)), batch)


@pytest.mark.compiles(60)  # several whole programs
def test_each_row_has_its_ratios_and_a_file(tmp_path, capsys):
    options = Options(("kfac",), quick=True, results=tmp_path)
    folder, console = Folder(tmp_path, {}), Console(width=120)
    with jax.enable_x64(False):
        assert costs.run([case()], "costs", options, folder, {"blocks": 1}, console) == 0
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("small/*.json")}
    assert {*found} == {"identity-seed0", "kfac-seed0"}  # in whose outer steps the others are told
    for record in found.values():
        metrics = record["metrics"]
        assert {*costs.COLUMNS} <= {*metrics}
        assert metrics.pop("one_cpu") == TASKS.exists()
        assert all(metrics[name] > 0 for name in metrics if name != "kept_ratio")
    identity, kfac = (found[f"{name}-seed0"]["metrics"] for name in ("identity", "kfac"))
    assert (identity["outer_cpu"], identity["outer_wall"], identity["kept_ratio"]) == (1, 1, 0)
    assert kfac["kept_ratio"] > 0
    output = capsys.readouterr().out
    assert "A training step takes" in output
    assert any(line.startswith("kfac") for line in output.splitlines())


def test_cases_are_those_of_the_model(monkeypatch):
    monkeypatch.setitem(text_reweighting.COSTS_OF, "encoder-small", ((2, 5), (3, 100)))
    cases = list(text_reweighting.Config(costs=True)._costs())
    assert [one.name for one in cases] == ["2x5", "3x64"]  # as many positions as there are
    for one, texts in zip(cases, (2, 3), strict=True):
        assert {*one.problem.sizes.values()} == {texts}
        assert one.batch.inner.inputs[0].shape[0] == len(one.x) == texts


@pytest.mark.skipif(not TASKS.exists(), reason="a system without lists of threads")
def test_threads_share_one_cpu_for_a_while():
    before = os.sched_getaffinity(0)
    with pinned() as one_cpu:
        assert one_cpu
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before

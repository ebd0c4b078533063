"""The study of hypergradients of models of every kind: its cosines on one of them, and that it names its blocks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

from benchmarks.networks.small import CLASSES, MODELS, SHAPES, VOCABULARY
from benchmarks.studies.curvature_models import Config


@pytest.mark.parametrize("name", MODELS)
def test_each_model_has_logits_of_its_inputs(name):
    shape = (5, *SHAPES[MODELS[name].inputs])

    def logits(key):
        model, y = MODELS[name].make(key)
        inputs = jax.random.randint(key, shape, 0, VOCABULARY) if MODELS[name].inputs == "texts" else jnp.ones(shape)
        return model(y, inputs)

    assert jax.eval_shape(logits, jax.random.key(0)).shape == (5, CLASSES)


@pytest.mark.compiles(60)  # a whole run of a command
def test_a_run_tells_blocks_and_cosines(tmp_path, capsys):
    assert Config(models=("MLP, merged LoRA",), examples=12, quick=True, results=tmp_path).run() == 0
    assert "2 diagonal, dense" in capsys.readouterr().out
    (file,) = tmp_path.glob("*/MLP*.json")
    metrics = json.loads(file.read_text())["metrics"]
    assert all(-1 <= metrics[name] <= 1 for name in ("identity", "kfac", "pcg"))
    np.testing.assert_allclose(metrics["exact"], 1, rtol=1e-12)
    assert metrics["pcg"] > metrics["identity"]

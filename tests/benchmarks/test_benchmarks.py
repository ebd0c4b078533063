import functools
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest

import bilevax as bx
from benchmarks.__main__ import main
from benchmarks.data import download
from benchmarks.data.images import IMAGES, ImageSet, load
from benchmarks.harness.clock import timed
from benchmarks.harness.report import mean_and_error
from benchmarks.tasks import hyper_cleaning

COUNTS = {"inner_gradients", "outer_gradients", "hessian_products", "cross_products", "breakdowns", "outer_steps"}
COSTS = {"compile_seconds", "compile_cpu_seconds", "temp_bytes"}
POINT = {"seconds", "cpu_seconds", "outer_loss", "gradient_norm", "test_accuracy", "auc"}


@pytest.fixture(autouse=True)
def single_precision():
    with jax.enable_x64(False):
        yield


@pytest.fixture
def run(tmp_path, capsys):
    def start(arguments):
        code = main([*arguments.split(), "--results", str(tmp_path)])
        records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("hyper_cleaning*/*.json")}
        return code, capsys.readouterr().out, records, tmp_path / "hyper_cleaning" / "hyper_cleaning.png"

    return start


@pytest.mark.compiles(60)  # a whole run of a command
def test_a_run_writes_records_of_one_schema_a_plot_and_a_table_with_standard_errors(run):
    code, output, records, plot = run("--seeds 2 --seed 3 --outer-steps 4 --methods cg")
    assert code == 0
    assert set(records) == {
        f"{method}-seed{seed}" for method in ("corrupted", "clean", "validation", "cg") for seed in (3, 4)
    }
    for record in records.values():
        assert record["task"] == "hyper_cleaning"
        assert set(record["versions"]) == {"python", "jax", "jaxlib", "optax", "bilevax", "numpy"}
        assert record["versions"]["bilevax"] == bx.__version__
        assert record["configuration"]["outer_steps"] == record["metrics"]["outer_steps"] == 4
        assert set(record["metrics"]) == COUNTS | COSTS | POINT
        assert set(record["curve"]) == POINT | {"outer_step"}
        assert record["curve"]["outer_step"] == [4]
        assert record["curve"]["outer_loss"] == [record["metrics"]["outer_loss"]]
        assert (record["metrics"]["auc"] is None) == (record["method"] != "cg")
    assert records["cg-seed3"]["configuration"]["settings"] == {"maxiter": 5, "curvature": "hessian"}
    assert records["cg-seed3"]["metrics"]["inner_gradients"] == 4 * 21
    assert records["cg-seed3"]["metrics"]["test_accuracy"] != records["cg-seed4"]["metrics"]["test_accuracy"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    mean, error = mean_and_error([records[f"cg-seed{seed}"]["metrics"]["auc"] for seed in (3, 4)])
    assert f"{mean:.3f} ± {error:.3f}" in output


def test_time_on_the_wall_and_of_the_processors_are_told_apart():
    _, asleep = timed(functools.partial(time.sleep, 0.2))
    assert asleep.seconds >= 0.2 > asleep.cpu_seconds
    total, busy = timed(lambda: sum(range(10**6)))
    assert total == 499999500000
    assert busy.cpu_seconds > 0
    both = asleep.plus(busy).named("compile_")
    assert both["compile_cpu_seconds"] == asleep.cpu_seconds + busy.cpu_seconds


def test_standard_error_is_that_of_the_mean():
    mean, error = mean_and_error([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]])
    np.testing.assert_allclose(mean, [3, 5])
    np.testing.assert_allclose(error, [2 / math.sqrt(3), 0])


def test_an_early_stop_and_a_divergence_are_said(run, monkeypatch):
    def wild(inner):
        return bx.inner.reverse(inner.loss, optax.sgd(1e30), steps=3)

    monkeypatch.setattr(hyper_cleaning, "METHODS", (hyper_cleaning.Row("wild", wild, lambda inner: {}),))
    monkeypatch.setattr(hyper_cleaning, "ANCHORS", hyper_cleaning.ANCHORS[:1])
    code, output, records, plot = run("--methods wild --quick --budget 1e-9")
    assert code == 0
    assert "corrupted, seed 0: stopped at outer step 10 of 20: budget of 1e-09 s spent" in output
    assert "wild, seed 0: diverged (numbers not finite) at outer step 10 of 20" in output
    assert "nan" in next(line for line in output.splitlines() if line.startswith("wild"))
    assert records["wild-seed0"]["metrics"]["test_accuracy"] is None
    assert records["wild-seed0"]["curve"]["outer_loss"] == [None]
    assert not plot.exists()


def test_an_interrupted_session_keeps_the_finished_runs(run, monkeypatch):
    def interrupt(inner):
        raise KeyboardInterrupt

    monkeypatch.setattr(hyper_cleaning, "METHODS", (hyper_cleaning.Row("endless", interrupt, lambda inner: {}),))
    monkeypatch.setattr(hyper_cleaning, "ANCHORS", hyper_cleaning.ANCHORS[:1])
    code, output, records, _ = run("--methods endless --outer-steps 2")
    assert code == 130
    assert set(records) == {"corrupted-seed0"}
    assert "Interrupted in endless, seed 0" in output
    assert "1 of 2 runs" in output
    assert any(line.startswith("corrupted") for line in output.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds 0", "seeds must be an int >= 1; got 0. Pass --seeds 1 or more."),
        ("--seed -1", "seed must be an int >= 0; got -1. Pass --seed 0 or more."),
        ("--outer-steps 0", "outer_steps must be an int >= 1; got 0. Pass --outer-steps 1 or more."),
        ("--budget nan", "budget must be a number of seconds > 0; got nan. Pass, say, --budget 6."),
        ("--methods cg sgd", "reverse; got cg sgd. Pass, say, --methods identity."),
        ("regularization --full", "full is about the words of news20; got it with data=ijcnn1. Drop --full."),
        ("hyper-cleaning --methods", "reverse; got none. Pass, say, --methods identity."),
    ],
)
def test_bad_values_are_refused_with_the_fix(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--help", ["hyper-cleaning", "regularization", "meta-learning", "peers", "--seeds", "BILEVAX_DATA"]),
        ("hyper-cleaning --help", ["--data", "mnist", "--model", "--methods", "cg"]),
        ("regularization --help", ["--data", "ijcnn1", "--full", "--methods", "cg"]),
    ],
)
def test_help_names_the_tasks_and_their_options(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    output = capsys.readouterr().out
    assert exit_.value.code == 0
    assert all(word in output for word in words)


def test_help_requires_nothing(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "required" not in capsys.readouterr().out


def test_an_unknown_task_is_refused_with_the_names(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["hyper-cleening"])
    assert exit_.value.code == 2
    assert "'hyper-cleaning', 'regularization'" in capsys.readouterr().err


def test_a_missing_package_is_one_line_with_the_command(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'flax'", name="flax.nnx")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert main(["meta-learning"]) == 1
    assert (
        capsys.readouterr().err == 'meta-learning needs flax, which is not installed. Run: pip install -e ".[flax]"\n'
    )


@pytest.mark.compiles(60)  # a whole run of a command
@pytest.mark.parametrize("model", [pytest.param("linear", marks=pytest.mark.slow), "mlp"])
def test_public_images_run_with_each_model(run, monkeypatch, model):
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (60, 28, 28), np.uint8), random.integers(0, 10, 60).astype(np.uint8)
    parts = {"train": (images, labels), "t10k": (images[:50], labels[:50])}
    small = {"train": 40, "validation": 20}
    monkeypatch.setitem(IMAGES, "fashion-mnist", IMAGES["fashion-mnist"]._replace(split=small))
    monkeypatch.setattr(download, "images", lambda name, part: parts[part])
    monkeypatch.setattr(hyper_cleaning, "ANCHORS", hyper_cleaning.ANCHORS[:1])
    code, output, _, _ = run(f"hyper-cleaning --data fashion-mnist --model {model} --methods cg --outer-steps 1")
    assert code == 0
    assert f"fashion-mnist, {model} model" in output


def test_a_split_is_disjoint_and_half_of_its_labels_are_redrawn(monkeypatch):
    images = np.arange(4000, dtype=np.float32)[:, None]
    pool = (images, np.arange(4000) % 10), None
    monkeypatch.setitem(IMAGES, "counted", ImageSet(lambda times: pool, (1, 1)))
    data = load("counted", seed=1, train=2000, validation=500, corruption=0.5)
    parts = [np.asarray(part[0])[:, 0] for part in (data.batch.inner, data.batch.outer, data.test)]
    assert [len(part) for part in parts] == [2000, 500, 1500]
    assert sorted(np.concatenate(parts).tolist()) == [*range(4000)]
    np.testing.assert_array_equal(data.truth, parts[0] % 10)
    assert 0.5 < np.mean(data.clean) < 0.6  # 0.5 + 0.05, with a standard error of 0.01


@pytest.mark.slow
def test_conjugate_gradients_reach_the_known_figures(run):
    code, _, records, _ = run("--methods cg --budget 60")
    metrics = records["cg-seed0"]["metrics"]
    assert code == 0
    assert metrics["test_accuracy"] >= 0.93
    assert metrics["auc"] >= 0.94
    assert metrics["breakdowns"] == 0
    assert records["corrupted-seed0"]["metrics"]["test_accuracy"] < metrics["test_accuracy"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_control_c_and_sigterm_end_the_program_with_codes_of_their_own(tmp_path, number, code):
    command = [sys.executable, "-m", "benchmarks", "--budget", "60", "--results", str(tmp_path)]
    heeded = signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a job in the background ignore it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, heeded)
    while process.poll() is None and not (tmp_path / "hyper_cleaning" / "corrupted-seed0.json").exists():
        time.sleep(0.1)
    process.send_signal(number)
    output, errors = process.communicate(timeout=90)
    assert process.returncode == code, errors
    assert "with --checkpoint FOLDER the same command would go on from here" in errors
    assert re.search(r"Interrupted in [\w-]+, seed 0", output)

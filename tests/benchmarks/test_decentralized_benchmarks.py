import functools
import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from benchmarks.__main__ import main
from benchmarks.data.images import load
from benchmarks.decentralized import hyper_cleaning
from benchmarks.decentralized.choices import PARTITIONS, TOPOLOGIES, parsed
from benchmarks.decentralized.cleaning import cleaning, cross_entropy, divide
from benchmarks.decentralized.levels import Try, best
from benchmarks.decentralized.network import by_weight
from benchmarks.studies import skipping

COUNTS = {"inner_gradients", "outer_gradients", "hessian_products", "cross_products", "breakdowns", "outer_steps"}
SPENT = {"derivatives", "megabytes", "rounds"}
JUDGED = {"exact_loss", "exact_gradient", "exact_residual", "exact_product_residual", "consensus"}
POINT = {"seconds", "cpu_seconds", "outer_loss", "gradient_norm", "test_accuracy", "auc"}
COSTS = {"compile_seconds", "compile_cpu_seconds", "temp_bytes"}
L2 = 2e-3


@pytest.fixture(autouse=True)
def single_precision():
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="module")
def digits():
    with jax.enable_x64(False):
        whole = load("digits", seed=1, train=240, validation=80, corruption=0.3)
        return divide(whole, bx.partition.dirichlet_balanced(4, alpha=0.3, seed=0, minimum=5))


@pytest.fixture
def run(tmp_path, capsys):
    def start(arguments, folder="decentralized_hyper_cleaning"):
        code = main([*arguments.split(), "--results", str(tmp_path)])
        records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob(f"{folder}/*.json")}
        return code, capsys.readouterr(), records, list(tmp_path.glob(f"{folder}/*.png"))

    return start


def test_the_mean_over_agents_is_the_loss_on_the_undivided_data(digits):
    problem, batch = cleaning(L2), digits.whole.batch
    x_key, y_key = jax.random.split(jax.random.key(0))
    x, y = jax.random.normal(x_key, (240,)), jax.random.normal(y_key, (64, 10))

    @jax.jit
    def whole(x, y):
        inner = jnp.mean(jax.nn.sigmoid(x) * cross_entropy(y, *batch.inner)) + L2 / 2 * jnp.sum(y**2)
        return inner, jnp.mean(cross_entropy(y, *batch.outer))

    loss = hyper_cleaning.network(digits).loss

    @jax.jit
    def divided(x, y):
        return loss(problem.inner_loss, x, y, digits.batch.inner), loss(problem.outer_loss, x, y, digits.batch.outer)

    np.testing.assert_allclose(divided(x, y), whole(x, y), rtol=1e-5)


def test_an_agent_reads_the_weights_of_its_own_images_alone(digits):
    _, _, ids, weights = digits.batch.inner
    gradients = jax.jit(jax.vmap(jax.grad(cleaning(L2).inner_loss), (None, None, 0)))
    reads = np.asarray(gradients(jnp.zeros(240), jnp.zeros((64, 10)), digits.batch.inner)) != 0
    assert (reads.sum(axis=0) == 1).all()
    for agent in range(4):
        assert set(np.flatnonzero(reads[agent])) == set(ids[agent][weights[agent] > 0])


def test_minibatches_keep_the_mean_weight_and_draw_no_filling(digits):
    marks = np.arange(digits.batch.inner[3].shape[1])
    for weights in digits.batch.inner[3]:
        chosen, drawn = by_weight(32)(jax.random.key(0), 0, (marks, jnp.asarray(weights)))
        assert (weights[chosen] > 0).all()
        np.testing.assert_allclose(drawn.mean(), weights.mean(), rtol=1e-5)
        assert len(drawn) == 32


def test_the_mean_over_such_a_minibatch_is_unbiased(digits):
    losses = jax.random.normal(jax.random.key(1), digits.batch.inner[3].shape) + 3
    for agent, weights in zip(losses, jnp.asarray(digits.batch.inner[3]), strict=True):
        drawn = np.prod(by_weight(10_000)(jax.random.key(0), 0, (agent, weights)), axis=0)
        assert abs(drawn.mean() - jnp.mean(weights * agent)) < 4 * drawn.std() / 100


@pytest.mark.parametrize("choice", TOPOLOGIES, ids=lambda choice: choice.example)
def test_every_topology_of_the_command_line_is_connected_and_symmetric_unless_it_is_directed(choice):
    graph = parsed("topology", choice.example, TOPOLOGIES)(16, 0)
    bx.topology.check(graph)
    directed = "exponential" in choice.example
    assert bx.topology.is_symmetric(graph) is not directed
    if not directed:
        assert bx.topology.smallest_eigenvalue(bx.topology.lazy(graph)) > -1 / 3


@pytest.mark.parametrize("choice", PARTITIONS, ids=lambda choice: choice.example)
def test_every_partition_of_the_command_line_loses_nothing(choice):
    labels = np.arange(2000) % 10
    train, validation = parsed("partition", choice.example, PARTITIONS)(8, 0)(labels, labels[:600])
    assert sorted(np.concatenate(train)) == [*range(2000)]
    assert sorted(np.concatenate(validation)) == [*range(600)]


@pytest.mark.compiles(180)  # a whole run of a command
def test_a_run_writes_records_of_one_schema_a_plot_and_what_was_spent(run, monkeypatch):
    monkeypatch.setattr(hyper_cleaning, "OUTER_GRID", hyper_cleaning.OUTER_GRID[-3:])
    monkeypatch.setattr(hyper_cleaning, "SMALL", hyper_cleaning.SMALL._replace(inner_grid=(0.3, 0.6)))
    code, printed, records, plots = run(
        "decentralized-hyper-cleaning --quick --seed 3 --outer-steps 4 --methods s3ldbo-0.5 sparkle-ed --coins subset",
        "decentralized_hyper_cleaning-coins_subset-quick",
    )
    assert code == 0
    assert set(records) == {f"{name}-seed{seed}" for name in ("s3ldbo-0.5", "sparkle-ed") for seed in (3, 4)}
    tuned = {name: [] for name in ("s3ldbo-0.5", "sparkle-ed")}
    for name, record in records.items():
        assert record["task"] == "decentralized_hyper_cleaning"
        chosen, curves = record["configuration"], {"outer_step", "exact_loss", *SPENT}
        if chosen["role"] == "tuning":
            assert set(record["curve"]) == curves
            tuned[name.rpartition("-")[0]].append([Try(**one) for one in record["tries"]])
            continue
        assert set(record["metrics"]) == COUNTS | SPENT | POINT | JUDGED | COSTS
        assert set(record["curve"]) == POINT | SPENT | JUDGED | {"outer_step"}
        assert chosen["outer_steps"] == record["metrics"]["outer_steps"]
        (one,) = record["tries"]  # without sldbo there are no targets
        assert one["step_sizes"] == chosen["step_sizes"]
        assert one["curve"] == {key: record["curve"][key] for key in (*curves, "exact_gradient")}
    for name, tries in tuned.items():
        assert records[f"{name}-seed3"]["configuration"]["step_sizes"] == tries[0][best(tries)].step_sizes
    lazy, sparkle = (records[name]["metrics"] for name in ("s3ldbo-0.5-seed3", "sparkle-ed-seed3"))
    # One evaluation at the start and half of one in each iteration; in turn, ∇_y g is needed twice.
    # Three times the iterations for those that skip.
    assert (lazy["derivatives"], sparkle["derivatives"]) == (7, 3.75)
    assert (lazy["rounds"], sparkle["rounds"]) == (12, 9)
    numbers = 960 + 2 * 640  # to two neighbours, and twice as many with the trackers
    np.testing.assert_allclose(lazy["megabytes"], 12 * 2 * 2 * numbers * 4 / 1e6, rtol=1e-5)
    np.testing.assert_allclose(sparkle["megabytes"], 3 * 2 * numbers * 4 / 1e6, rtol=1e-5)
    assert plots[0].read_bytes().startswith(b"\x89PNG")
    assert f"{sparkle['test_accuracy']:.3f}" in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--topology rings", "topology must be like one of ring, path,"),
        ("--topology regular", "got regular. Pass, say, --topology ring."),
        ("--partition dirichlet", "got dirichlet. Pass, say, --partition dirichlet:0.1."),
        ("--partition dirichlet:much", "got dirichlet:much. Pass, say, --partition dirichlet:0.1."),
        ("--agents 0", "agents must be an int >= 1; got 0."),
        ("--agents 6 --devices 4", "devices must divide the number of agents; got 4 for 6 agents."),
        ("--corruption 2", "corruption must be from 0 to 1; got 2."),
        ("--distributed --devices 2", "distributed takes all devices of all hosts"),
        ("--processes 2", "coordinator, processes and process go together, with distributed."),
        ("--methods sgd", "; got sgd. Pass, say, --methods sldbo."),
        ("--data cifar", "--data"),
    ],
)
def test_bad_values_are_refused_with_the_fix(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["decentralized-hyper-cleaning", *arguments.split()])
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--agents 64 --partition dirichlet-plain:0.01", "The partition does not suit the data of seed 0: agent"),
        ("--agents 512 --devices 512", "--devices 512 needs as many devices; JAX has"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(arguments, message, run):
    code, printed, _, _ = run(f"decentralized-hyper-cleaning {arguments}")
    assert code == 1
    assert printed.err.startswith(message)


@pytest.mark.compiles(60)  # a whole run of a command
def test_skipping_is_timed_and_memory_grows_with_the_agents(run, monkeypatch):
    monkeypatch.setattr(skipping, "FRACTIONS", (0.25,))
    code, printed, records, plots = run(
        "skipping --quick --data digits --agents 4 --examples 80 --hidden 4 --sizes 64 256", "skipping-quick"
    )
    assert code == 0
    assert {name: record["configuration"]["evaluated"] for name, record in records.items()} == {
        "sldbo-n4-seed0": 4,
        "s3ldbo-p0.25-n4-seed0": 1,
        "sldbo-n64-seed0": 64,
        "sldbo-n256-seed0": 256,
    }
    assert all(len(record["curve"]["seconds"]) == 3 for record in records.values())
    few, many = (records[f"sldbo-n{n}-seed0"]["metrics"]["memory_bytes"] for n in (64, 256))
    assert 3.5 * few < many < 4.5 * few
    assert plots[0].read_bytes().startswith(b"\x89PNG")
    assert "S3LDBO p = 0.25" in printed.out


def _figures(data, make):
    """Of 4,000 iterations over a ring; evaluations: of an agent, until the validation loss is below 0.45."""
    task = hyper_cleaning.network(data)
    method = make(task.problem, bx.gossip(bx.topology.ring(8)), bx.Levels(300.0, 0.6, 0.6))

    def step(state, key):
        state, info = method.step(key, state, data.batch)
        loss = task.loss(task.problem.outer_loss, *task.point(state.x, state.y), data.batch.outer)
        return state, (loss, jnp.mean(info.calls.hessian_products))

    keys = jax.random.split(jax.random.key(0), 4000)
    run = jax.jit(lambda x, y: jax.lax.scan(step, method.init(x, y, data.batch), keys))
    state, (losses, evaluations) = jax.device_get(run(*task.start))
    scores = task.scores(*map(np.asarray, task.point(state.x, state.y)))
    assert (losses < 0.45).any()
    return scores | {"outer_loss": losses[-1], "evaluations": evaluations[: np.argmax(losses < 0.45) + 1].sum()}


@pytest.mark.slow
def test_skipping_agents_reach_the_known_figures_of_those_that_do_not():
    """Sorted by label, 36 % of the labels redrawn: the known ends, after the known numbers of evaluations."""
    whole = load("digits", seed=0, train=960, validation=320, corruption=0.36)
    data = divide(whole, bx.partition.shards(8))
    every = _figures(data, bx.decentralized.sldbo)
    np.testing.assert_allclose(every["outer_loss"], 0.279, rtol=0, atol=0.005)
    np.testing.assert_allclose(every["test_accuracy"], 0.959, rtol=0, atol=0.01)
    assert every["auc"] >= 0.965 - 0.005
    np.testing.assert_allclose(every["evaluations"], 186, rtol=0.15)
    for p, evaluations in ((0.5, 92), (0.2, 36), (0.1, 17)):
        coins = bx.coins.independent(p)
        lazy = _figures(data, functools.partial(bx.decentralized.s3ldbo, coins=coins))
        np.testing.assert_allclose(lazy["evaluations"], evaluations, rtol=0.15)
    for name in ("outer_loss", "test_accuracy", "auc"):  # the last of them, p = 0.1
        np.testing.assert_allclose(lazy[name], every[name], rtol=0, atol=0.005)


PROGRAM = """
import sys

from benchmarks.__main__ import main
from benchmarks.decentralized import hyper_cleaning as task

task.OUTER_GRID, task.SMALL = task.OUTER_GRID[1:-1], task.SMALL._replace(inner_grid=(0.6,))
command = "decentralized-hyper-cleaning --quick --outer-steps 4 --methods s3ldbo-0.5 --results"
sys.exit(any([main([*command.split(), *options.split()]) for options in sys.argv[1:]]))
"""


def _start(*runs):
    """A process with two devices, whose grid is one pair, and which runs the command with each of some options."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *runs],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _end(*processes):
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output


def _loss(folder):
    (path,) = folder.glob("*/s3ldbo-0.5-seed0.json")
    return json.loads(path.read_text())["curve"]["outer_loss"]


@pytest.mark.slow
def test_devices_and_hosts_give_the_same_numbers(tmp_path):
    names = ("one", "shard_map", "pmap", "hosts")
    folders = {name: tmp_path / name for name in names}
    two = [f"{folders[name]} --devices 2 --placement {name}" for name in ("shard_map", "pmap")]
    _end(_start(str(folders["one"]), *two))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    cluster = f"{folders['hosts']} --distributed --coordinator {address} --processes 2 --process"
    _end(*[_start(f"{cluster} {number}") for number in range(2)])
    one, *others = (_loss(folders[name]) for name in names)
    assert len({*one}) == len(one) > 4
    for many in others:
        np.testing.assert_allclose(many, one, rtol=1e-4)

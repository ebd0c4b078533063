import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse import csr_matrix

import bilevax as bx
from benchmarks.__main__ import main
from benchmarks.data import download
from benchmarks.data.images import IMAGES
from benchmarks.decentralized import hyper_cleaning, penalties, regularization
from benchmarks.decentralized.choices import Agents
from benchmarks.decentralized.comparison import selected
from benchmarks.decentralized.exact import Effort, evaluator
from benchmarks.decentralized.levels import COSTS, Try
from benchmarks.decentralized.methods import Row, evaluations, pace, refusal, shares
from benchmarks.decentralized.network import Network, by_weight
from benchmarks.decentralized.placement import Placed
from benchmarks.decentralized.rows import personal_rows, rows
from benchmarks.decentralized.running import (
    backward,
    compiled,
    consensus,
    follow,
    glance,
    judged,
    kept,
    of_loss,
)
from benchmarks.decentralized.trying import (
    BASE,
    Base,
    Chosen,
    aimed,
    alike,
    chosen,
    highest,
    picks,
    schedule,
    tuning_seeds,
    undivided,
)
from benchmarks.harness.errors import DataError
from benchmarks.harness.runner import Options
from benchmarks.tasks import logistic

EVERY_ROW = [(row, False) for row in rows(bx.coins.independent, 8)] + [
    (row, True) for row in personal_rows(bx.coins.independent, 8)
]
ALL = bx.problem.Calls(1, 1, 1, 1)


@pytest.fixture(scope="module")
def divided():
    return penalties.synthetic(4, seed=0, features=6, train=80, heterogeneity=0.3)


@pytest.fixture(autouse=True)
def single_precision():
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="module")
def network(divided):
    with jax.enable_x64(False):
        return regularization.network(divided, -1.0)


def sparse(rows):
    return logistic.Examples(csr_matrix(rows.features.astype(float)), rows.labels.astype(float))


@pytest.mark.parametrize("problem", [penalties.logistic(), penalties.softmax()], ids=["logistic", "softmax"])
def test_the_mean_over_unequal_agents_is_the_loss_on_the_undivided_data(problem):
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(50, 6)), random.integers(0, 3, 50)
    y = random.normal(size=(6, 3))
    if problem.outer_loss.__qualname__.startswith("logistic"):
        labels, y = np.where(labels > 0, 1.0, -1.0), y[:, 0]
    (*stacked,), weights = bx.partition.stack((features, labels), [np.arange(30), np.arange(30, 43), np.arange(43, 50)])
    task = Network(problem, bx.Batch((), ()), 0, 0, None, None, 1.0, None)
    x = jnp.zeros(6)
    for loss in problem:
        whole = loss(x, y, (features, labels, np.ones(50)))
        np.testing.assert_allclose(task.loss(loss, x, y, (*stacked, weights)), whole, rtol=1e-6)


def test_what_is_known_without_data_is_the_inner_loss_but_for_its_data(network):
    x, y = jnp.linspace(-3.0, 1.0, 6), jnp.linspace(-1.0, 2.0, 6)
    known = network.loss(network.known.inner_loss, x, y, jnp.zeros(network.n))
    rest = network.loss(network.problem.outer_loss, x, y, network.batch.inner)
    whole = network.loss(network.problem.inner_loss, x, y, network.batch.inner)
    np.testing.assert_allclose(known + rest, whole, rtol=1e-6)
    assert network.known.outer_loss(x, y, None) == 0.0


@pytest.mark.parametrize(("precision", "tolerance"), [(True, 1e-8), (False, 2e-4)], ids=["double", "single"])
def test_the_accurate_solution_is_that_of_newton_in_numpy(divided, precision, tolerance):
    x = np.linspace(-6, 1, 6)
    with jax.enable_x64(precision):
        kind = np.float64 if precision else np.float32
        task = regularization.network(divided, -1.0)
        batch = jax.tree.map(lambda leaf: leaf.astype(kind), task.batch)
        found = evaluator(task, Effort())(x.astype(kind), np.zeros(6, kind), batch)
    log_penalty, slope = x - np.log1p(np.exp(x)), 1 / (1 + np.exp(x))  # of exp(x) / (1 + exp(x))
    expected = logistic.exact(sparse(divided.train), sparse(divided.validation), log_penalty, np.zeros(6))
    np.testing.assert_allclose(found.loss, expected.value, rtol=tolerance)
    np.testing.assert_allclose(found.y, expected.y, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(found.gradient, slope * expected.gradient, rtol=10 * tolerance, atol=tolerance / 10)
    assert float(found.residual) < tolerance
    assert float(found.product_residual) < tolerance


def test_the_diagonal_is_that_of_the_inner_hessian_where_all_is_undecided():
    random, (d, classes) = np.random.default_rng(0), (3, penalties.CLASSES)
    rows = penalties.Examples(random.normal(size=(40, d)), random.integers(0, classes, 40))
    (*stacked,), weights = bx.partition.stack(rows, [np.arange(30), np.arange(30, 40)])
    batch = (*stacked, weights)
    with jax.enable_x64(True):
        task = regularization.network(penalties.Divided(rows, rows, rows, bx.Batch(batch, batch)), 0.0)
        x, y = jnp.linspace(-6.0, 6.0, d), jnp.zeros((d, classes))
        hessian = jax.jit(jax.hessian(lambda y: task.loss(task.problem.inner_loss, x, y, batch)))(y)
        diagonal = np.diag(np.reshape(hessian, (y.size, -1)))
        np.testing.assert_allclose(jax.jit(task.diagonal)(x).ravel(), diagonal, rtol=1e-10)
        found = [evaluator(task._replace(diagonal=part), Effort())(x, y, task.batch) for part in (task.diagonal, None)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-9), *found)


def test_quick_runs_shrink_photographs_to_means_over_squares(monkeypatch):
    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    monkeypatch.setattr(download, "images", lambda name, part: (images, np.array([3, 4], np.uint8)))
    (whole, _), _ = IMAGES["mnist"].read(1)
    (shrunk, labels), _ = IMAGES["mnist"].read(2)
    expected = whole.reshape(2, 28, 28)[:, ::2, ::2] / 4 + whole.reshape(2, 28, 28)[:, 1::2, ::2] / 4
    expected += whole.reshape(2, 28, 28)[:, ::2, 1::2] / 4 + whole.reshape(2, 28, 28)[:, 1::2, 1::2] / 4
    np.testing.assert_allclose(shrunk, expected.reshape(2, 196), rtol=1e-5)
    assert labels.tolist() == [3, 4]
    options = dataclasses.replace(hyper_cleaning.DEFAULTS, quick=True)
    setting = hyper_cleaning.Config(data="mnist", network=Agents(agents=16), common=options).setting
    assert (setting.times, setting.train, setting.validation) == (2, 800, 400)


def test_where_the_lower_level_is_personal_each_agent_solves_its_own(divided, network):
    x, task = np.linspace(-2, 1, 6), network._replace(personal=True)
    with jax.enable_x64(True):
        batch = jax.tree.map(lambda leaf: leaf.astype(float), task.batch)
        found = evaluator(task, Effort())(x, np.zeros((4, 6)), batch)
    values = []
    for i in range(4):
        outer, inner = (penalties.Examples(part[0][i], part[1][i]) for part in network.batch)
        values.append(logistic.exact(sparse(inner), sparse(outer), x - np.log1p(np.exp(x)), np.zeros(6)))
    np.testing.assert_allclose(found.loss, np.mean([one.value for one in values]), rtol=1e-8)
    gradient = np.mean([one.gradient for one in values], axis=0) / (1 + np.exp(x))
    np.testing.assert_allclose(found.gradient, gradient, rtol=1e-6)
    np.testing.assert_allclose(found.y, [one.y for one in values], rtol=1e-6)


def test_penalties_are_exponentials_up_to_a_bound():
    x = jnp.array([-20.0, 0.0, 40.0])
    np.testing.assert_allclose(penalties.penalty(x, 8), np.exp(x) / (4 + np.exp(x)), rtol=1e-5)


def test_a_point_that_is_not_finite_is_no_trouble():
    numbers = judged(lambda *point: pytest.fail("solved"), np.full(6, np.nan), np.zeros(6))
    assert np.isnan([*numbers.values()]).all()


@pytest.mark.parametrize(("row", "personal"), EVERY_ROW, ids=lambda value: getattr(value, "name", None))
def test_no_method_evaluates_more_than_it_declares_and_none_more_than_sldbo(network, row, personal):
    task = network._replace(personal=personal)
    topologies = row.graphs(Agents(agents=4).topologies(0))
    gossip = bx.gossip(topologies.x) if row.common else bx.Levels(*map(bx.gossip, topologies))

    @jax.jit
    def calls(key, setting, x, y, batch):
        method = row.make(task, gossip, bx.Levels(0.1, 0.1, 0.1), **setting)
        _, info = method.step(key, method.init(x, y, batch), batch)
        return info.calls

    spent = calls(jax.random.key(0), row.settings[-1], *task.start, task.batch)
    for number, most in zip(spent, row.calls(task), strict=True):
        assert number.shape == (4,)
        assert (number <= most).all()
    stops = schedule(row, task, 240, 6)
    assert len(stops) == 6
    cost = evaluations(row.calls(task), shares(row, task))
    longer = 3 if row.name.startswith("s3ldbo") else 1
    if row.every is None:
        assert stops[-1] * cost <= 240 * longer
    assert stops[-1] <= 480 * max(1, longer / 2)
    assert pace(row, task) <= 2


def test_the_shares_of_minibatches_and_of_whole_iterations(network):
    by_name = {row.name: row for row, _ in EVERY_ROW}
    assert network.sizes == bx.Batch(outer=10, inner=20)
    assert shares(by_name["dsvrbgd"], network) == bx.problem.Calls(0.8, 0.4, 0.4, 0.4)
    assert pace(by_name["dsvrbgd"], network) == pytest.approx(1 / (2 * (0.8 + 3 * 0.4) / 4))
    assert pace(by_name["sparkle-ed"], network) == pytest.approx(0.8)
    assert pace(by_name["ma-dsbo"], network) == pytest.approx(4 / (1 + 6 + 5 + 1))
    sampled, whole = (2 * 0.8 + (2 + 20 + 2) * 0.4) / 4, (1 + 1 + 10 + 1) / 4
    assert pace(by_name["interact-svr"], network) == pytest.approx(10 / (9 * sampled + whole))
    assert evaluations(by_name["gbdsbo"].calls(network), ALL) == (1 + 1 + 6 + 6) / 4
    assert schedule(by_name["sldbo"], network, 4, 20) == [1, 2, 3, 4]
    assert schedule(by_name["s3ldbo-0.1"], network, 40, 5) == [30, 42, 60, 85, 120]


def test_consensus_is_the_root_mean_square_distance():
    every = {"a": jnp.array([[1.0], [3.0]]), "b": jnp.array([0.0, 2.0])}
    assert consensus(every, {"a": jnp.array([2.0]), "b": jnp.array(1.0)}) == pytest.approx(2**0.5)


def path(*losses):
    costs = np.arange(len(losses), dtype=float).tolist()
    return Try(
        {"x": 1.0, "y": 1.0, "v": 1.0},
        {},
        {"exact_loss": [*losses], **dict.fromkeys(("outer_step", "derivatives", "megabytes", "rounds"), costs)},
    )


def test_steps_are_chosen_by_what_they_cost_to_stay_below_a_target_and_not_by_their_ends():
    swinging, early, late = path(1, 0, 0.6, 0.2), path(1, 0.4, 0.1, 0.1), path(1, 0.9, 0.3, 0.0)
    grid, tries = picks((0.1, 0.2, 0.4), (1.0,), ({},)), [[swinging, early, late]] * 2
    sldbo, mdbo, lazy = (Row(name, None, at_start=name == "s3ldbo-0.2") for name in (BASE, "mdbo", "s3ldbo-0.2"))
    base = Base([path(1, 0.6, 0.5, 0.101).curve] * 2, [grid[2].steps])
    assert chosen(mdbo, grid, tries, None, aimed(False)) == Chosen([1], 1, 0)  # of the last two the higher one
    assert chosen(mdbo, grid, tries, base, aimed(False)) == Chosen([1], 1, 2)
    assert chosen(lazy, grid, tries, base, aimed(False)) == Chosen([1, 2], 1, 2)
    assert chosen(sldbo, grid, tries, base, aimed(False)) == Chosen([1], 1, 2)
    assert highest(base.curves[0]) == pytest.approx(1 - 0.899 / 2)
    assert highest(path(1, 1).curve) == -np.inf  # no target
    ends = [path(1, 0.2, 0.11, 0.1), path(1, 0.5, 0.2, 0.0)]  # the second ends lower, and comes late to 0.5
    near = chosen(mdbo, grid[:2], [ends] * 2, base._replace(curves=[path(1, 0.0).curve] * 2), aimed(False))
    assert (near.places, near.main) == ([0, 1], 1)


def test_seeds_that_choose_are_not_judged():
    judged = Options(("sldbo",), seeds=5, seed=3).all_seeds
    assert [*tuning_seeds(judged)] == [8, 9, 10]
    assert [*tuning_seeds(judged[:2])] == [5, 6]  # no more than are judged
    assert not {*tuning_seeds(judged)} & {*judged}


def test_batches_of_one_shape_and_of_one_agent_have_the_same_losses():
    features = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    rows_ = (features, np.sign(features[:, 0]))
    parts = [[np.arange(20), np.arange(20, 60)], [np.arange(30), np.arange(30, 60)]]
    (one, two) = (bx.partition.stack(rows_, part) for part in parts)
    networks = {
        seed: Network(
            penalties.logistic(), bx.Batch(*[(*rows, weights)] * 2), 0, 0, by_weight, None, lambda data: 1.0, None
        )
        for seed, (rows, weights) in enumerate((one, two))
    }
    same = alike(networks)
    assert jax.tree.map(np.shape, same[0].batch) == jax.tree.map(np.shape, same[1].batch)
    x, y = jnp.ones(3), jnp.array([1.0, -1.0, 2.0])
    for seed, network in networks.items():
        expected = [network.loss(loss, x, y, network.batch.inner) for loss in network.problem]
        for batch in (same[seed].batch, undivided(network)):
            found = [network.loss(loss, x, y, batch.inner) for loss in network.problem]
            np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert undivided(network).inner[0].shape == (1, 60, 3)


def test_what_a_try_keeps_is_what_the_method_reports_and_nan_from_where_it_diverges(network):
    row = next(row for row, _ in EVERY_ROW if row.name == "s3ldbo-0.5")
    gossip, stops, key = bx.gossip(bx.topology.ring(4)), [2, 3, 6], jax.random.key(3)
    placed = lambda pick: Placed(row.make(network, gossip, pick.steps), jax.device_put, lambda tree: tree)  # noqa: E731
    grid = picks((1.0,), (0.5, 1e30), ({},))
    program = compiled(row, placed, network, grid[0])
    loss = lambda x, y, batch: np.sum(np.square(x))  # noqa: E731

    def tried(pick):
        run = follow(program, pick, network, network.batch, key, stops, glance, 60.0)
        look = functools.partial(of_loss(loss), batch=network.batch)
        start = {"outer_step": 0, "exact_loss": 7.0, "derivatives": 1.0, "megabytes": 0.0, "rounds": 0.0}
        return kept(start, run.curve | backward(look, run.curve["point"], np.inf), stops), run

    curve, run = tried(grid[0])
    method, spent = placed(grid[0]).method, [(1.0, 0.0, 0.0)]
    state, step = jax.jit(method.init)(*network.start, network.batch), jax.jit(method.step)
    for k in range(1, 7):
        state, info = step(key, state, network.batch)
        more = (np.mean([np.mean(calls) for calls in info.calls]), np.mean(info.bytes) / 1e6, np.mean(info.rounds))
        spent.append(tuple(np.add(spent[-1], more)))
        if k in stops:
            place = 1 + stops.index(k)
            np.testing.assert_allclose([curve[name][place] for name in COSTS], spent[k], rtol=1e-5)
            np.testing.assert_allclose(curve["exact_loss"][place], np.sum(np.mean(state.x, axis=0) ** 2), rtol=1e-3)
    assert curve["outer_step"] == [0, *stops]
    assert run.counts["hessian_products"] == pytest.approx(spent[-1][0] - 1)
    diverged, _ = tried(grid[1])
    assert diverged["exact_loss"][0] == 7.0
    assert np.isnan(diverged["exact_loss"][2:]).all()
    assert {len(values) for values in diverged.values()} == {4}


def test_a_look_goes_back_to_where_the_loss_was_high():
    look = lambda x, y: {"exact_loss": x}  # noqa: E731
    points = [(loss, None) for loss in (0.9, 0.2, 0.8, 0.3, 0.1)]
    for level, expected in ((0.5, [np.nan, np.nan, 0.8, 0.3, 0.1]), (-np.inf, [np.nan] * 3 + [0.3, 0.1])):
        np.testing.assert_array_equal(backward(look, points, level)["exact_loss"], expected)


def test_rows_that_do_not_suit_a_graph_or_a_problem_are_left_out_and_named(network):
    everything = rows(bx.coins.independent, 8)
    options = Options(("sldbo", "sparkle-ed", "sldbo-top0.1", "gbdsbo"))
    for agents, left in (
        (Agents(4, "exponential"), ["sldbo", "gbdsbo", "sldbo-top0.1"]),
        (Agents(4, "one-peer-exponential"), ["sldbo", "gbdsbo"]),
        (Agents(4, "ring", "complete"), ["sldbo", "sparkle-ed", "sldbo-top0.1"]),
    ):
        chosen, line = selected(everything, options, network, agents)
        assert {row.name for row in chosen} == set(left)
        assert line.startswith("Left out: ")
    with pytest.raises(DataError, match="No method is left on 4 agents, exponential: sparkle-ed: it needs a symmetric"):
        selected(everything, Options(("sparkle-ed",)), network, Agents(4, "exponential"))
    large = network._replace(y=jnp.zeros(1000))
    gbdsbo = next(row for row in everything if row.name == "gbdsbo")
    assert refusal(gbdsbo, large, Agents(4).topologies(0)) == "it is for y of at most 130 numbers, not 1000"
    for row in everything:
        if row.name.endswith(("kfac", "kfac-0.1")):
            assert refusal(row, network, Agents(4).topologies(0)) is None
            assert "it needs the parts of g" in refusal(row, network._replace(fit=None), Agents(4).topologies(0))


def test_the_partition_of_a_data_set_loses_nothing():
    features, labels = np.random.default_rng(0).random((4000, 22)), np.tile([1.0, 1.0, -1.0, -1.0], 1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(penalties.download, "libsvm", lambda name, width: (csr_matrix(features), labels))
        found = penalties.real("ijcnn1", 0, 400, bx.partition.dirichlet_balanced(4, alpha=0.5, seed=0))
        with pytest.raises(DataError, match="ijcnn1 has 4000 rows; --rows 4000 leaves none to test on"):
            penalties.real("ijcnn1", 0, 4000, bx.partition.iid(4, seed=0))
    assert [len(rows.labels) for rows in found[:3]] == [400, 200, 3400]
    for part, rows_ in zip(found.batch, (found.validation, found.train), strict=True):
        kept = part[2] > 0
        np.testing.assert_allclose(np.sort(part[0][kept].sum(-1)), np.sort(rows_.features.sum(-1)), rtol=1e-6)


def test_a_run_writes_all_that_curves_need(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(regularization, "INNER_GRID", (1.0, 4.0))
    code = main(
        "decentralized-regularization --quick --outer-steps 12 --rows 80 --agents 4 --methods sldbo dsvrbgd "
        f"--lower-topology complete --results {tmp_path}".split()
    )
    assert code == 0
    folder = "decentralized_regularization-rows_80-agents_4-lower_topology_complete-quick"
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob(f"{folder}/*.json")}
    assert set(records) == {f"{method}-seed{seed}" for method in ("sldbo", "dsvrbgd") for seed in range(2)}
    keys = {"exact_loss", "exact_gradient", "exact_residual", "exact_product_residual", "outer_loss", "gradient_norm"}
    keys |= {"consensus", "derivatives", "megabytes", "rounds", "seconds", "cpu_seconds", "test_accuracy", "outer_step"}
    kept_names = {"outer_step", "exact_loss", "exact_gradient", "derivatives", "megabytes", "rounds"}
    for name, record in records.items():
        chosen_here, judged_here = record["configuration"], name.endswith("seed0")
        assert chosen_here["role"] == ("judged" if judged_here else "tuning")
        assert chosen_here["tuning_seeds"] == [1]
        assert record["metrics"]["derivatives"] <= 12
        assert record["metrics"]["exact_loss"] < np.log(2)
        assert (record["curve"]["outer_step"][0], record["curve"]["rounds"][0]) == (0, 0)
        assert record["curve"]["exact_loss"][0] == pytest.approx(np.log(2), rel=0.2)
        assert set(record["curve"]) == (keys if judged_here else kept_names)
        picked = {name: chosen_here[name] for name in ("step_sizes", "settings")}
        best = next(one for one in record["tries"] if {**one, "curve": None} == {**picked, "curve": None})
        assert {name: record["curve"][name] for name in kept_names} == best["curve"]
        if not judged_here:
            momenta = 3 if name.startswith("dsvrbgd") else 1
            assert len(record["tries"]) == len(chosen_here["grid"]["x"]) == 10 * momenta
    # y and v go to three neighbours, x to two; t as far as s
    assert records["sldbo-seed0"]["metrics"]["megabytes"] == pytest.approx(12 * 2 * 4 * 40 * (2 + 2 * 3) / 1e6)
    assert list(tmp_path.glob(f"{folder}/*.png"))
    assert "(y and v: complete)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--lower-topology rings", "lower_topology must be like one of ring, path,"),
        ("--lower-topology rings", "Pass, say, --lower-topology ring."),
        ("--heterogeneity 0", "heterogeneity must be a number > 0; got 0. Pass, say, --heterogeneity 0.2."),
        ("--data a9a --heterogeneity 0.5", "heterogeneity is about synthetic data; got 0.5 with data=a9a."),
        ("--partition iid", "partition is about public data sets; got iid with data=synthetic"),
        ("--rows 100", "rows must be an int >= 20 for each agent; got 100. Pass, say, --rows 160."),
        ("--methods interact", "got interact. Pass, say, --methods sldbo."),
    ],
)
def test_bad_values_are_refused_with_the_fix(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["decentralized-regularization", *arguments.split()])
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())

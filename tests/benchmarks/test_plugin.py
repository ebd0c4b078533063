"""Rows of a user's own: they run beside those of the jobs, and what is wrong with them is said in one line."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevax as bx
from benchmarks.__main__ import install, main
from benchmarks.decentralized import papers, penalties
from benchmarks.decentralized import regularization as penalties_of_agents
from benchmarks.decentralized.foreign import foreign
from benchmarks.decentralized.methods import Row, counted, pace
from benchmarks.decentralized.rows import INNER_STEPS, drawn, preset
from benchmarks.harness.errors import DataError
from benchmarks.harness.plugin import Function, load
from benchmarks.studies import hypergradients, hypergradients_methods, single_machine
from benchmarks.studies.hypergradients_points import UNROLLED, Point, feedforward, network
from benchmarks.tasks import condensation_methods, learning_rates, weighting
from benchmarks.tasks.hyper_cleaning import numbered

PAGE = pathlib.Path(__file__).parent.parent.parent / "docs" / "testing.md"
METHODS = """
import bilevax as bx


def identity(inner):
    return bx.ihvp.identity(inner.step_size)


def reverse(inner):
    return bx.inner.reverse(inner.loss, inner.optimizer, inner.steps, initial=inner.initial, sample=inner.sample)


def penalty(inner):
    return bx.penalty(inner.problem, inner.optimizer, inner.steps, multiplier=10.0)


HYPERGRADIENTS = {"my-identity": identity, "my-reverse": reverse, "my-penalty": penalty}
DECENTRALIZED = {
    "my-sldbo": lambda problem, gossip, step_sizes: bx.decentralized.sldbo(problem, gossip, step_sizes),
    "my-d-soba": bx.decentralized.dsoba,
}
"""


@pytest.fixture(autouse=True)
def single_precision():
    with jax.enable_x64(False):
        yield


@pytest.fixture
def plugin(tmp_path):
    def write(text, name="my_methods.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.fixture
def run(tmp_path, capsys):
    def start(arguments):
        code = main([*arguments.split(), "--results", str(tmp_path / "results")])
        files = (tmp_path / "results").rglob("*-seed0.json")  # steps of agents are chosen on other seeds
        return (
            code,
            capsys.readouterr(),
            {path.stem.removesuffix("-seed0"): json.loads(path.read_text()) for path in files},
        )

    return start


def same(record, other, names):
    return [record["metrics"][name] for name in names] == [other["metrics"][name] for name in names]


@pytest.mark.compiles(60)  # a whole run of a command
def test_hypergradients_run_beside_those_of_a_job_and_do_what_the_same_ones_do_there(run, plugin):
    path = plugin(METHODS)
    code, output, records = run(f"hyper-cleaning --plugin {path} --methods identity reverse --outer-steps 2")
    assert code == 0
    assert {"identity", "reverse", "my-identity", "my-reverse", "my-penalty"} < {*records}
    names = ("outer_loss", "auc", "inner_gradients", "hessian_products", "cross_products")
    assert same(records["my-identity"], records["identity"], names)
    assert same(records["my-reverse"], records["reverse"], names)
    assert records["my-penalty"]["metrics"]["hessian_products"] == 0
    assert {name: record["configuration"].get("plugin") for name, record in records.items()} == {
        name: path if name.startswith("my-") else None for name in records
    }
    assert "my-penalty" in output.out


@pytest.mark.compiles(80)  # a whole run of a command
def test_algorithms_are_tuned_and_judged_like_the_same_ones_of_a_job(run, plugin, monkeypatch):
    monkeypatch.setattr(penalties_of_agents, "INNER_GRID", penalties_of_agents.INNER_GRID[1:3])
    path = plugin(METHODS)
    arguments = f"--plugin {path} --methods sldbo my-sldbo --agents 3 --rows 60 --outer-steps 4"
    code, output, records = run(f"decentralized-regularization {arguments}")
    assert code == 0
    assert {*records} == {"sldbo", "my-sldbo"}
    own, other = records["my-sldbo"], records["sldbo"]
    assert same(own, other, ("exact_loss", "derivatives", "megabytes", "rounds", "outer_steps"))
    chosen = dict(own["configuration"])
    assert chosen.pop("plugin") == path
    assert chosen == other["configuration"]
    assert "my-sldbo" in output.out


def function(make, name="mine", kind="HYPERGRADIENTS"):
    return Function("my_methods.py", kind, name, make)


def of_batch(size):
    keys = jax.random.split(jax.random.key(size), 2)
    return jax.random.normal(keys[0], (size, 4)), jax.random.randint(keys[1], (size,), 0, 10)


def test_an_inverse_makes_no_inner_steps_in_the_study_of_hypergradients_and_a_solver_does():
    net = network(feedforward, (4, 3), (3, 10))
    y = net.init(jax.random.key(0), 4)
    path = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (20, *leaf.shape)), y)
    point = Point(1e-2, "equal", "end", jnp.zeros(20), path, *3 * (None,))
    batch = numbered(bx.Batch(of_batch(10), of_batch(20)))
    arguments = hypergradients.arguments(point, 0, batch)

    def grad(row):
        return jax.jit(hypergradients.estimates(row, net))(*arguments)[0]

    def steps(inner):
        return bx.inner.reverse(inner.loss, inner.optimizer, inner.steps, sample=inner.sample)

    mine = hypergradients.foreign(function(lambda inner: bx.ihvp.identity(inner.step_size)))
    unrolled = hypergradients.foreign(function(steps))
    rows = {row.name: row for row in hypergradients_methods.ROWS}
    assert (mine.unrolled, unrolled.unrolled) == (0, UNROLLED)
    assert (grad(mine) == grad(rows["identity"])).all()
    assert (grad(unrolled) == grad(rows["reverse-10"])).all()


def test_a_job_with_a_network_that_starts_anew_does_not_warm_start_v():
    seen = []
    training = condensation_methods.Training(lambda x, y, batch: 0.0, optax.sgd(0.3), 5, 0.3, directions=8)
    row = condensation_methods.foreign(function(lambda inner: seen.append(inner) or bx.ihvp.identity()))
    hypergradient = row.solver(training)(lambda x, y, batch: 0.0)
    assert isinstance(hypergradient, bx.problem.Hypergradient)
    assert (seen[0].steps, seen[0].step_size, seen[0].warm_start) == (5, 0.3, False)


def test_learning_rates_hand_on_an_optimizer_of_x_and_their_minibatches():
    seen = []
    row = learning_rates.foreign(function(lambda inner: seen.append(inner) or bx.ihvp.identity()))
    row.solver(learning_rates.training(learning_rates.LINE))(learning_rates.outer_loss)
    assert seen[0].problem == (learning_rates.outer_loss, seen[0].loss)
    assert callable(seen[0].optimizer)
    assert seen[0].sample is seen[0].cross_sample is learning_rates.SAMPLE


def test_tasks_on_texts_hand_on_the_minibatches_of_each_kind():
    seen = []
    sizes = {"inner": 2, "curvature": 3, "cross": 4, "outer": 5}
    posed = weighting.Problem(lambda x, y, batch: 0.0, None, optax.sgd(0.1), 6, sizes, lambda batch: None, 0.01)
    row = weighting.foreign(function(lambda inner: seen.append(inner) or bx.ihvp.identity()))
    row.solver(posed, **row.settings(posed))(lambda x, y, batch: 0.0)
    (inner,) = seen
    samples = (inner.sample, inner.ihvp_sample, inner.cross_sample)
    drawn_sizes = [jax.eval_shape(sample, jax.random.key(0), 0, jnp.zeros(9)).shape for sample in samples]
    assert drawn_sizes == [(2,), (3,), (4,)]
    assert (inner.steps, inner.step_size, inner.warm_start) == (6, 0.01, False)


def test_algorithms_of_one_machine_get_the_batches_of_the_job_if_they_ask_for_a_sampler():
    seen = {}

    def sampling(problem, step_sizes, sample):
        seen["sample"] = sample
        return bx.algorithms.soba(problem, step_sizes, sample=sample)

    for make in (sampling, bx.algorithms.soba, lambda problem, steps: bx.algorithms.soba(problem, steps)):
        row = single_machine.foreign(function(make, kind="ALGORITHMS"))
        assert isinstance(single_machine.method(row, rows=128), bx.problem.Algorithm)
    assert seen["sample"].__qualname__.startswith("blocks.")


@pytest.fixture(scope="module")
def agents():
    with jax.enable_x64(False):
        return penalties_of_agents.network(
            penalties.synthetic(4, seed=0, features=6, train=80, heterogeneity=0.3), -1.0
        )


def test_what_an_algorithm_costs_is_counted_while_it_runs(agents):
    ring = bx.topology.lazy(bx.topology.ring(4))
    loops = {"steps": INNER_STEPS, "v_steps": INNER_STEPS}
    made = functools.partial(bx.decentralized.ma_dsbo, **loops)
    own = foreign(function(made, kind="DECENTRALIZED"), agents, bx.Levels(ring, ring, ring), 8)
    row = Row(
        "ma-dsbo", drawn(bx.decentralized.ma_dsbo, 8, **loops), counted(inner=INNER_STEPS + 1, hessian=INNER_STEPS), 8
    )
    assert own.calls(agents) == row.calls(agents)
    assert pace(own, agents) == pace(row, agents)


def test_coins_cost_what_an_agent_that_draws_one_pays(agents):
    ring = bx.topology.lazy(bx.topology.ring(4))

    def costs(share):
        coins = bx.coins.independent(share)
        own = function(lambda *problem: bx.decentralized.s3ldbo(*problem, coins=coins), kind="DECENTRALIZED")
        return foreign(own, agents, bx.Levels(ring, ring, ring), 8)

    job = Row("s3ldbo-0.2", preset(bx.decentralized.s3ldbo, coins=bx.coins.independent(0.2)))
    assert costs(0.2).calls(agents) == job.calls(agents) == bx.problem.Calls(1, 1, 1, 1)
    assert pace(costs(0.2), agents) == pace(job, agents) == 1
    with pytest.raises(DataError, match=r"DECENTRALIZED\['mine'\] in my_methods.py must evaluate derivatives in one"):
        costs(1e-6)


def test_a_row_that_cannot_be_traced_is_refused_with_the_check_that_finds_out_why(agents):
    ring = bx.topology.ring(4)
    blind = bx.decentralized.dsoba(agents.problem, bx.gossip(ring), bx.Levels(0.1, 0.1, 0.1))
    blind = blind._replace(step=lambda key, state, batch: (state, None))
    with pytest.raises(DataError, match=r"DECENTRALIZED\['mine'\].* raised AttributeError: .*testing has check_algo"):
        foreign(function(lambda *problem: blind, kind="DECENTRALIZED"), agents, bx.Levels(ring, ring, ring), 8)


ROW = "HYPERGRADIENTS = {'mine': "
BROKEN = """
import bilevax as bx


def mine(inner):
    def prepare(key, state, inner_loss, point):
        return lambda b, v0=None: (b, None), state

    return bx.problem.IHVP(lambda x, y, batch=None, inner_loss=None: (), prepare)


HYPERGRADIENTS = {"mine": mine}
"""
FAULTS = {
    "raises": ("import bilevax\n1 / 0", "line 2 raised ZeroDivisionError: division by zero. Mend it: python"),
    "syntax": ("def", "raised SyntaxError: invalid syntax"),
    "empty": (
        "def cg(inner): ...",
        "plugin must define HYPERGRADIENTS or ALGORITHMS or DECENTRALIZED, dicts of names and",
    ),
    "list": ("HYPERGRADIENTS = []", "must be a dict of names and functions; got list. Write, say, HYPERGRADIENTS ="),
    "no-function": (f"{ROW}3}}", "must be a function; got int. Name the function itself, not what it returns."),
    "name": ("HYPERGRADIENTS = {'My CG': len}", "got 'My CG'. Write, say, 'my-method'."),
    "taken": ("HYPERGRADIENTS = {'cg': len}", "and this job has a row cg. Rename yours, say my-cg."),
    "kind": ("ALGORITHMS = {'mine': pow}", "plugin must define HYPERGRADIENTS for this job; got"),
}


def refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_with_a_fault_is_refused_with_the_fix(fault, plugin, capsys):
    text, message = FAULTS[fault]
    path = plugin(text)
    said = refused(["hyper-cleaning", "--plugin", path], capsys)
    assert message in said
    assert pathlib.Path(path).name in said.replace(" ", "")


def test_a_file_or_module_that_is_not_there_is_refused(capsys):
    assert "got none.py, and there is no file" in refused(["hyper-cleaning", "--plugin", "none.py"], capsys)
    assert "a module that can be imported; got no.module." in refused(["unrolling", "--plugin", "no.module"], capsys)


WITHOUT_ROWS = (
    *("skipping", "peers", "pde", "decentralized-speed-up", "decentralized-step-sizes", "decentralized-papers"),
    "decentralized-curvature",
)


@pytest.mark.parametrize("job", WITHOUT_ROWS)
def test_a_job_without_rows_says_so_and_does_not_offer_the_option(job, capsys):
    assert main([job, "--plugin=my_methods.py"]) == 1
    assert (
        capsys.readouterr().err
        == f"{job} has no rows that a plugin could add to. Drop --plugin, or name another job.\n"
    )
    with pytest.raises(SystemExit):
        main([job, "--help"])
    assert "--plugin" not in capsys.readouterr().out


def test_a_name_that_is_no_row_is_refused_with_those_of_the_plugin(plugin, capsys):
    said = refused(["hyper-cleaning", "--plugin", plugin(METHODS), "--methods", "mine"], capsys)
    assert "reverse, my-identity, my-reverse, my-penalty; got mine." in said


def test_the_name_of_an_anchor_and_a_wrong_return_are_said_before_anything_runs(run, plugin):
    text = "HYPERGRADIENTS = {'clean': len}"
    code, output, records = run(f"hyper-cleaning --plugin {plugin(text)} --methods cg")
    assert (code, records) == (1, {})
    assert output.err.endswith("has a row clean, and so has this job, as an anchor. Rename yours.\n")
    code, output, records = run(f"hyper-cleaning --plugin {plugin(ROW + 'lambda inner: {}}', 'wrong.py')} --methods cg")
    assert (code, records) == (1, {})
    assert "HYPERGRADIENTS['mine'] in" in output.err
    assert (
        "must return a bx.problem.IHVP, a bx.problem.InnerSolver or a bx.problem.Hypergradient; got dict." in output.err
    )
    code, output, records = run(f"hyper-cleaning --plugin {plugin(BROKEN, 'broken.py')} --methods cg mine")
    assert (code, records) == (1, {})
    assert "HYPERGRADIENTS['mine'] in" in output.err
    assert "broken.py raised ValueError: info of ihvp.prepare must be an IHVPInfo; got None" in output.err
    assert "bilevax.testing has check_ihvp, check_solver or check_hypergradient" in output.err


def test_a_function_that_raises_is_named_with_its_line(plugin):
    path = plugin("def oops(inner):\n    return 1 / 0\n\nHYPERGRADIENTS = {'oops': oops}\n")
    with pytest.raises(DataError) as refusal:
        load(path)["HYPERGRADIENTS"]["oops"].method(None)
    assert str(refusal.value) == (
        f"HYPERGRADIENTS['oops'] in {path}, line 2 raised ZeroDivisionError: division by zero. Mend it."
    )


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (lambda x: 1 if x > 0 else 2, r"TracerBoolConversionError: [^:]* traced array with shape bool\[\]"),
        (
            lambda x: jax.lax.scan(lambda c, _: (c > 0, None), x, length=2),
            r"TypeError: scan .*: .* float32\[\] .* bool.*",
        ),
        (lambda x: next(iter(())), "StopIteration"),
    ],
)
def test_what_jax_says_of_a_function_is_told_in_one_line(program, said):
    with pytest.raises(DataError) as refusal:
        function(len).traced(program, 1.0)
    expected = (
        rf"HYPERGRADIENTS\['mine'\] in my_methods.py raised {said}\. It was being traced; bilevax\.testing has .*"
    )
    assert re.fullmatch(expected, str(refusal.value))
    assert "https" not in str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "make", "message"),
    [
        ("HYPERGRADIENTS", "lambda: 0", "must be a function of (inner); got one that cannot be called so: too many"),
        (
            "HYPERGRADIENTS",
            "dict",
            "cannot be called so: no signature found for builtin type <class 'dict'>. Write, say",
        ),
        (
            "ALGORITHMS",
            "lambda sample, problem, steps: 0",
            "(problem, step_sizes), or (problem, step_sizes, sample); got",
        ),
        ("DECENTRALIZED", "lambda problem: 0", "Write, say, def my_own(problem, gossip, step_sizes)."),
    ],
)
def test_a_function_that_cannot_be_called_as_those_of_its_kind_is_refused(kind, make, message, plugin):
    path = plugin(f"{kind} = {{'my-own': {make}}}")
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        load(path)
    assert str(refusal.value).startswith(f"{kind}['my-own'] in {path} must be a function of (")


def test_all_rows_of_a_plugin_run_unless_some_are_named(plugin):
    path = plugin(METHODS)
    options = hypergradients.Options(("cg",), plugin=path)
    assert [own.name for own in options.chosen([], lambda own: own)] == ["my-identity", "my-reverse", "my-penalty"]
    named = hypergradients.Options(("cg", "my-reverse"), plugin=path)
    assert [own.name for own in named.chosen([], lambda own: own)] == ["my-reverse"]


def test_a_plugin_may_be_a_module_and_import_what_lies_beside_it(plugin, monkeypatch, tmp_path):
    plugin("import bilevax as bx\n\ndef own(inner):\n    return bx.ihvp.cg()\n", "beside_it.py")
    path = plugin("from beside_it import own\n\nHYPERGRADIENTS = {'mine': own}\n", "importable.py")
    assert load(path)["HYPERGRADIENTS"]["mine"].file == path
    monkeypatch.syspath_prepend(tmp_path)
    assert load("importable")["HYPERGRADIENTS"]["mine"].file == "importable"


def test_help_says_that_the_file_is_executed(capsys):
    for arguments in (["--help"], ["hyper-cleaning", "--help"], ["decentralized-regularization", "--help"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "--plugin" in printed
        assert "executed" in printed


def test_a_page_of_results_lies_beside_them_where_there_is_no_checkout(tmp_path, monkeypatch):
    of_a_checkout = pathlib.Path("benchmarks/decentralized/RESULTS.md")
    beside = pathlib.Path("results/decentralized_papers/RESULTS.md")
    monkeypatch.chdir(PAGE.parent.parent)
    assert papers.Config(quick=True).page == of_a_checkout
    assert papers.Config().page == beside  # that of the checkout is about quick runs
    monkeypatch.chdir(tmp_path)
    assert papers.Config().page == beside
    assert papers.Config(quick=True).page == beside.parent.with_name("decentralized_papers-quick") / beside.name
    assert papers.Config(output=of_a_checkout).page == of_a_checkout


def test_a_missing_package_is_named_for_a_checkout(monkeypatch):
    assert install("bench") == 'pip install -e ".[bench]"'
    monkeypatch.setattr(pathlib.Path, "exists", lambda path: False)
    assert install("bench") == 'pip install "bilevax[bench]"'


@pytest.mark.compiles(80)  # a whole run of a command
def test_the_file_of_the_page_on_testing_runs(run, plugin):
    (example,) = re.findall(r"^```python\n(# my_methods.py\n.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    path = plugin(example)
    (name, *_), algorithms, decentralized = (
        load(path)[kind] for kind in ("HYPERGRADIENTS", "ALGORITHMS", "DECENTRALIZED")
    )
    code, _, records = run(f"two-phase --plugin {path} --methods cg {name} --outer-steps 2 --quick")
    assert code == 0
    assert records[name]["configuration"]["plugin"] == path
    assert algorithms
    assert decentralized

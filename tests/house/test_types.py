"""What a type checker makes of `bx`: right calls pass, wrong ones are refused, each by what is wrong with it."""

import re
import subprocess
import sys

import pytest

RIGHT = """\
import jax
import optax

import bilevax as bx
from bilevax.typing import PyTree


def loss(x: jax.Array, y: jax.Array, batch: PyTree) -> jax.Array:
    return (y - x) ** 2


problem, batch = bx.BilevelProblem(loss, loss), bx.Batch(outer=None, inner=None)
solver = bx.inner.implicit(loss, optax.sgd(0.1), steps=3, ihvp=bx.ihvp.cg(maxiter=5))
hypergrad = bx.hypergradient(loss, solver)
state = hypergrad.init(1.0, 1.0, batch)
grad, state, info = jax.jit(hypergrad.estimate)(jax.random.key(0), state, 1.0, batch)
z, residual, solver_state = solver.forward(None, (), 1.0, solver.start(1.0, 1.0), None)
y = bx.differentiable(solver)(1.0, 1.0, None)
gossip = bx.gossip(bx.topology.ring(4))
method = bx.decentralized.s3ldbo(problem, gossip, bx.Levels(0.1, 0.2, 0.2), coins=bx.coins.subset(0.25))
new, report = method.step(None, method.init(1.0, 1.0, batch), batch)
parts = bx.single_loop.single_loop(
    problem, (gossip, gossip, gossip), 0.1, bx.single_loop.estimator.full(), bx.single_loop.correction.tracking()
)
"""
WRONG = {  # line -> what mypy says
    "solver.forward(1)": "Missing positional arguments",
    "solver.backward(residual, z)": 'Missing positional argument "z_bar"',
    "bx.hypergradient(solver, loss)": 'expected "Loss"',
    "bx.hypergradient(loss, loss)": 'expected "InnerSolver"',
    "hypergrad.estimate(state, 1.0, batch)": 'Missing positional argument "batch"',
    "hypergrad.estimate(None, state, 1.0, (None, None))": 'expected "Batch"',
    "hypergrad.init(1.0, 1.0, 3.0)": 'expected "Batch | None"',
    "bx.hypergradient(lambda x: x, solver)": "incompatible type",
    "bx.penalty(loss, optax.sgd(0.1), 3, multiplier=10.0)": 'expected "BilevelProblem"',
    "bx.inner.implicit(loss, optax.sgd(0.1), 3, bx.ihvp.cg())": "Too many positional arguments",
    "bx.inner.implicit(loss, optax.sgd(0.1), steps=3, ihvp=bx.ihvp.cg)": 'expected "IHVP',
    "bx.ihvp.cg(5)": "Too many positional arguments",
    "bx.gossip(4)": 'expected "Topology',
    "bx.decentralized.sldbo(gossip, problem, 0.1)": 'expected "BilevelProblem"',
    "bx.decentralized.s3ldbo(problem, gossip, 0.1, coins=0.25)": 'expected "Coins"',
    "method.step(new, batch)": 'Missing positional argument "batch"',
    "gossip.mix(1.0)": "Missing positional argument",
    "bx.single_loop.correction.Correction(loss, loss)": 'expected "Correction',
    "bx.hypergradientz": "has no attribute",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Line number -> what mypy says of it, of the right lines and the wrong ones below.

    By a process of its own: half a gigabyte of syntax trees would stay in this one, to be looked through at each
    collection of garbage.
    """
    folder = tmp_path_factory.mktemp("types")
    file = folder / "program.py"
    file.write_text(RIGHT + "\n".join(WRONG) + "\n")
    options = ["--cache-dir", str(folder / "cache"), "--config-file", "", "--disable-error-code", "import-untyped"]
    command = [sys.executable, "-m", "mypy", str(file), *options]
    run = subprocess.run(command, capture_output=True, text=True)
    assert not run.stderr, run.stderr
    found = {}
    for number, message in re.findall(r"program\.py:(\d+): error: (.*)", run.stdout):
        found.setdefault(int(number), []).append(message)
    return found


def test_right_calls_pass(said):
    assert {number: text for number, text in said.items() if number <= RIGHT.count("\n")} == {}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_call_is_refused(said, line):
    messages = said.get(RIGHT.count("\n") + 1 + [*WRONG].index(line), [])
    assert any(WRONG[line] in message for message in messages), messages

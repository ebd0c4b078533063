"""Agents spread over devices and hosts: the same numbers, what travels, and where the results stay.

A process has as many devices as it was started with: one of its own, with eight, runs what is asked every day.
"""

import re
import socket

import jax.numpy as jnp
import numpy as np
import pytest
from processes import findings, start

from bilevax.agents import _gossip as gossips
from bilevax.agents import topology as graphs

SMALL = 1e-12
MESSAGES = {
    "agents": "topology must have a number of agents that the devices divide; got 12 agents and 8 devices.*Take 4",
    "agents of pmap": "topology must have a number of agents.*got 12 agents and 8 devices",
    "no mesh": "mesh must be a Mesh.*of type list",
    "no devices": r"devices must be a list of devices of this host; got Mesh.*Pass jax.local_devices\(\)",
    "empty": r"devices must be a list of devices of this host; got \[\]",
    "no algorithm": r"make_algorithm\(gossip\) must be an Algorithm; got Gossip",
    "no function": r"make_algorithm must be a function \(gossip\)",
    "disconnected": "must be connected",
    "block": "block must divide the number of agents on a device; got blocks of 4 and 2 agents.*block=2",
    "rows": r"x must have leaves \[16, ...\].*got shape \(8, 2\)",
    "batch": r"batch must have leaves \[16, ...\].*at batch.outer\['Q'\]",
    "not split": r"x must have leaves \[8, 2, ...\]; got shape \(16, 2\).*bx.parallel.split\(x, 8\)",
    "place": r"tree must have leaves \[n, ...\], n a multiple of 8 devices.*\(12, 2\) at tree\['w'\]",
    "split": r"tree must have leaves \[n, ...\], n a multiple of 8 devices.*\(12,\)",
    "join": r"tree must have leaves \[devices, ...\]; got shape \(\)",
    "result": r"result must have leaves \[2, ...\] or scalars; got shape \(3,\)",
}


def received(run):
    """Bytes that all devices together receive by the permutes of one iteration, those of all branches added."""
    assert {operation for operation, _, _ in run["collectives"]} == {"collective-permute"}
    return sum(size * pairs for _, size, pairs in run["collectives"])


@pytest.fixture(scope="module")
def found():
    """What one process with eight devices finds."""
    return findings(start(8, "parallel_runs.py"))[0]


def same_everywhere(methods, by_pmap):
    """Whether methods are the same there."""
    assert {name for name, run in methods.items() if "pmap" in run} == {*by_pmap}
    for name, run in methods.items():
        assert run["moved"] > 0.1, name
        assert run["shard_map"] < SMALL, name
        assert run.get("pmap", 0.0) < SMALL, name
        assert run["kept"], name
        assert run["counters"], name


def test_methods_on_eight_devices(found):
    """Some of them by pmap too."""
    assert len(found["methods"]) == 13
    same_everywhere(found["methods"], ("one agent per device", "common, graph per level"))


def test_boundary_agents_alone_travel(found):
    runs = found["methods"]
    sldbo, lonely, torus = (runs[name] for name in ("sldbo", "one agent per device", "subset, torus"))
    assert received(sldbo) == sum(sldbo["bytes"]) / 2  # of two agents on a device each has one neighbour elsewhere
    assert received(lonely) == sum(lonely["bytes"])
    assert lonely["branches"]
    assert not sldbo["branches"]

    # Rows of the torus are pairs of devices, whose agents have three of their four neighbours elsewhere
    assert received(torus) == sum(torus["bytes"]) * 3 / 4

    # Of tracked Hessians and all else half the agents' messages leave the device, and nothing more does
    assert received(runs["matrices"]) == sum(runs["matrices"]["bytes"]) / 2


def test_what_other_graphs_send(found):
    # Hops 1, 2, 4, 8 of the one-peer graph: one row of each device, then both
    one_peer = found["methods"]["variance-reduced, one peer"]
    assert received(one_peer) == sum(one_peer["bytes"]) * (1 / 2 + 1 + 1 + 1)

    # An irregular graph gathers each leaf once: the two messages of x, y and v
    gathered = found["methods"]["independent, gathered"]["collectives"]
    assert sorted(gathered) == sorted([["all-gather", 16 * 8 * d, None] for d in (2, 3, 3)] * 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "methods"),
    [
        ("neighbours", ("sldbo", "subset, torus", "global ids")),
        ("graphs", ("independent, gathered", "variance-reduced, one peer", "mixed")),
        ("loops", ("compressed inner loops", "inner loops", "accumulated")),
        ("matrices", ("matrices", "curvature of their own")),
    ],
    ids=["neighbours", "graphs", "loops", "matrices"],
)
def test_other_methods_by_pmap(part, methods):
    (found,) = findings(start(8, "parallel_runs.py", part, *methods))
    same_everywhere(found["methods"], methods)


def test_calls_and_bad_input(found):
    calls = found["calls"]
    assert max(calls[name] for name in ("shard_map", "pmap", "vmap", "explicit")) < SMALL
    assert calls["kept"]
    assert calls["half"] == ["bf16"]
    assert calls["traces"] == 2  # for the shapes, and for the program
    for name, (off, operations) in found["rounds"].items():
        travel = "all_gather" if name in ("star", "complete") else "collective_permute"
        assert off < SMALL, name
        assert operations == sorted([travel, "all_reduce"]), name  # the reduction is that of the mean
    assert set(found["refused"]) == set(MESSAGES)
    for name, message in MESSAGES.items():
        assert re.search(message, found["refused"][name]), found["refused"][name]


@pytest.mark.parametrize("form", [gossips.dense, gossips.sparse])
def test_rows_held_here(form):
    """What each of four devices computes from the gathered rows, without the devices."""
    topology = graphs.erdos_renyi(12, probability=0.4, seed=2)
    w, s = topology.matrix.toarray(), np.random.default_rng(0).normal(size=(12, 2))
    for part in range(4):
        rows = slice(3 * part, 3 * part + 3)
        held = form(topology, gossips.HeldRows(4, lambda part=part: part, lambda leaf: jnp.asarray(s)))
        np.testing.assert_allclose(held.mix(jnp.asarray(s[rows])), w[rows] @ s, rtol=0, atol=1e-15)
        np.testing.assert_allclose(held.laplacian(jnp.asarray(s[rows])), (s - w @ s)[rows], rtol=0, atol=1e-14)


@pytest.mark.slow
def test_two_hosts_with_four_devices_each():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = findings(*(start(4, "parallel_hosts.py", index, port) for index in range(2)))
    for host in hosts:
        assert host["devices"] == [2, 4, 8]
        assert "devices must be a list of devices of this host" in host["refused"]
        for name, run in host["runs"].items():
            assert run["shard_map"] < SMALL, name
            assert run["kept"], name

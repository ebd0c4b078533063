"""docs/extending.md, run as it stands; what it prints is what the page shows, and its parts against numbers apart."""

import contextlib
import functools
import io
import pathlib
import re
import types

import jax
import networkx as nx
import numpy as np
import pytest

import bilevax as bx
from bilevax import testing
from bilevax.single_loop import engine
from bilevax.testing.placement import DIRECTED, on_one_device

pytestmark = pytest.mark.compiles(130)  # a page as it stands, whichever test comes first
PAGE = (pathlib.Path(__file__).parent.parent.parent / "docs" / "extending.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@functools.cache
def page():
    """What the page prints, and the names that it leaves behind; it runs once."""
    namespace, printed = {"__name__": "page"}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for code in blocks("python"):
            exec(compile(code, "docs/extending.md", "exec"), namespace)
    return printed.getvalue(), types.SimpleNamespace(**namespace)


def test_the_page_runs_and_prints_what_it_shows():
    assert page()[0] == "".join(blocks("text"))


def test_a_hypergradient_by_rule_and_by_differences_is_the_known_one():
    errors = page()[1].errors
    assert max(errors) < 1e-6


def test_damped_directions_end_where_the_damped_system_does():
    """∇_x f + Bᵀ (A + δ I)⁻¹ ∇_y f = 0 at the common solution of the inner problem, of the mean losses."""
    q, damping = page()[1].q, 0.5
    m = q.mean
    method = page()[1].damped_sldbo(q.problem, page()[1].ring, (0.05, 0.1, 0.1), damping=damping)
    end = testing.limits.last(method, q, 2500)
    x, y = end.x[0], np.linalg.solve(m.A, m.B @ end.x[0] + m.c)
    v = np.linalg.solve(m.A + damping * np.eye(3), m.Q @ y + m.S.T @ x - m.e)
    assert np.abs(end.y - y).max() < 1e-8
    assert np.abs(m.R @ x + m.r + m.S @ y + m.B.T @ v).max() < 1e-8
    assert np.abs(end.x - q.x_star).max() > 1e-3, "the damping must show"


@pytest.mark.parametrize("topology", [bx.topology.ring(4), DIRECTED], ids=["ring", "directed"])
def test_one_message_is_three_without_a_correction(topology):
    """The method by hand, and the engine's, whose levels are sent apart."""
    q, gossip, steps = testing.problems.four_agents(), on_one_device(topology), (0.05, 0.1, 0.1)
    full, none = bx.single_loop.estimator.full(), bx.single_loop.correction.none()
    by_engine = bx.single_loop.single_loop(q.problem, gossip, steps, full, none)

    @functools.partial(jax.jit, static_argnums=0)
    def run(method, start, batch):
        return jax.lax.scan(lambda state, _: method.step(None, state, batch), method.init(*start), length=20)

    (end, infos), (expected, _) = (
        run(method, q.start, q.batch) for method in (page()[1].in_one_message(q.problem, gossip, steps), by_engine)
    )
    for name in "xyv":
        np.testing.assert_allclose(getattr(end, name), getattr(expected, name), rtol=1e-12)
    assert infos.rounds.sum() == 20


def test_messages_of_half_the_length_agree_to_their_digits():
    q, ring, half = page()[1].q, page()[1].ring, page()[1].in_half(page()[1].ring)
    assert 4 * half.bytes((), q.start[0])[0] == ring.bytes((), q.start[0])[0]  # of double precision a quarter
    method = bx.decentralized.sldbo(q.problem, half, 0.05)
    error = np.abs(testing.limits.last(method, q, 1000).x - q.x_star).max()
    assert 1e-8 < error < 0.02


def with_one_state():
    """`tracking_atc`, whose two messages share the state of s."""
    sound = bx.single_loop.correction.tracking_atc()

    def init(gossip, s, move):
        state = sound.init(gossip, s, move)
        return state._replace(memory=state.memory._replace(gossip=()))

    def update(key, state, gossip, s, d, move, k):
        tracker, _ = state.memory
        t, once = gossip.mix(key, state.gossip, tracker.mixed + d - tracker.last)
        step, moving = move.apply(t, state.move, s)
        new, twice = gossip.mix(key, once, s + step)
        memory = state.memory._replace(tracker=type(tracker)(t, d))
        sent = bx.single_loop.correction.Sent(2 * gossip.bytes(once, s), 2)
        return new, state._replace(gossip=twice, move=moving, memory=memory), sent

    return sound._replace(init=init, update=update)


def changing():
    links = [[(0, 3), (2, 6)], [(5, 1), (0, 5)], [(7, 2)]]
    ring = [(i, (i + 1) % 8) for i in range(8)]
    return bx.agents.push_sum([bx.topology.from_graph(nx.DiGraph(ring + more)) for more in links])


def compressed():
    ring = bx.gossip(bx.topology.lazy(bx.topology.ring(8)))
    return bx.agents.compression.choco(ring, bx.agents.compression.top_k(0.5), gossip_step=0.3)


@pytest.mark.parametrize(("make", "off"), [(changing, 0.08), (compressed, 0.15)], ids=["changing", "compressed"])
def test_two_messages_of_one_state_would_end_elsewhere(make, off, monkeypatch):
    """Which is why the engine refuses them; here it does not."""
    q, gossip, full = testing.problems.quadratic(0), make(), bx.single_loop.estimator.full()
    monkeypatch.setattr(engine, "_once_each", lambda gossip: (gossip, []))
    for correction, error in ((bx.single_loop.correction.tracking_atc(), 0.0), (with_one_state(), off)):
        method = bx.single_loop.single_loop(q.problem, gossip, (0.02, 0.05, 0.05), full, correction)
        end = testing.limits.last(method, q, 4000)
        np.testing.assert_allclose(np.abs(end.x - q.x_star).max(), error, rtol=0.1, atol=1e-6)


def test_links_of_the_page_are_its_headings():
    headings = {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in re.findall(r"^#+ (.+)$", PAGE, re.M)}
    assert {*re.findall(r"\]\(#([\w-]+)\)", PAGE)} <= headings

"""What the engine hands to a correction and does for it: k, the push-sum weights, one gossip state for each message."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
from cases import BATCH, DEFINITE, LAZY_RING, STEPS, TOY_RING, TOY_STEPS, W, X, Y
from networks import close, numbers, run, simulate, stacked

import bilevax as bx
from bilevax.single_loop import correction, estimator, single_loop
from bilevax.testing.placement import DIRECTED
from bilevax.testing.problems import quadratic
from bilevax.testing.problems._quadratic import PROBLEM

EVERY = 4


class Memory(NamedTuple):
    gossip: Any
    move: Any


def local_steps():
    """Descent that meets the neighbours in one of four iterations."""

    def init(gossip, s, move):
        return Memory(gossip.init(s), move.init(s))

    def update(key, state, gossip, s, d, move, k):
        step, moved = move.apply(d, state.move, s)
        s = optax.apply_updates(s, step)
        meets = (k + 1) % EVERY == 0
        new, mixing = jax.lax.cond(meets, lambda s: gossip.mix(key, state.gossip, s), lambda s: (s, state.gossip), s)
        return new, Memory(mixing, moved), correction.Sent(meets * gossip.bytes(state.gossip, s), 1 * meets)

    return correction.Correction(init, update)


def test_local_steps_report_their_rounds_as_data():
    """A quarter of the iterations: 150 rounds in 600."""
    method = single_loop(PROBLEM, LAZY_RING, STEPS, estimator.full(), local_steps())
    _, path, info = numbers(run(method, DEFINITE.batch, 600))
    assert info.rounds.sum() == 150
    np.testing.assert_array_equal(info.rounds, np.arange(1, 601) % EVERY == 0)
    np.testing.assert_array_equal(info.bytes, info.rounds[:, None] * np.full(8, 2 * 8 * (2 + 3 + 3)))
    matrices = [np.eye(8) if (k + 1) % EVERY else W for k in range(600)]
    expected = simulate(DEFINITE, [networks.none() for _ in range(3)], STEPS, matrices, 600)
    close(path, stacked(expected), 1e-11)


def test_levels_that_send_at_once_take_the_rounds_of_the_longest():
    """In Jacobi order a level of two rounds and one of local steps take two; in turn they add up."""
    forms = bx.Levels(correction.tracking_atc(), local_steps(), correction.local())

    def rounds(order):
        method = single_loop(PROBLEM, TOY_RING, TOY_STEPS, estimator.full(), forms, order=order)
        return run(method, BATCH, 8)[2].rounds.tolist()

    assert rounds(bx.single_loop.JACOBI) == [2] * 8
    assert rounds(bx.single_loop.GAUSS_SEIDEL) == [2, 2, 2, 3] * 2


# One state for one message


def meeting_twice(states):
    """Two rounds, with a gossip state for each of them, or one for both; the second on s again, or on d."""

    def init(gossip, s, move):
        return correction.CorrectionState(gossip.init(s), move.init(s), gossip.init(s))

    def update(key, state, gossip, s, d, move, k):
        step, moved = move.apply(d, state.move, s)
        once, first = gossip.mix(key, state.gossip, optax.apply_updates(s, step))
        second = {"one": state.gossip, "two": state.memory}.get(states, first)
        twice, last = gossip.mix(key, second, d if states == "other message" else once)
        kept = {"handed on": (last, state.memory), "two": (first, last)}.get(states, (first, state.memory))
        sent = correction.Sent(2 * gossip.bytes(state.gossip, s), 2)
        return twice, correction.CorrectionState(kept[0], moved, kept[1]), sent

    return correction.Correction(init, update)


GOSSIPS = {
    "ring": TOY_RING,
    "in_turn": bx.gossip(bx.topology.one_peer_exponential(4)),
    "push_sum": bx.agents.push_sum(DIRECTED),
    "choco": bx.agents.compression.choco(TOY_RING, bx.agents.compression.sign(), gossip_step=0.1),
}


REFUSED = {
    "one": "state of a gossip must mix one message once.* Make a state for each",
    "other message": "state of a gossip must mix one message once.* Make a state for each",
    "left behind": "state.gossip after correction.update must be what gossip.mix returned.*Keep what mix returns",
}


@pytest.mark.parametrize("states", [*REFUSED, "handed on", "two"])
@pytest.mark.parametrize("name", GOSSIPS)
def test_a_gossip_state_that_is_shared_is_refused_where_there_is_one(name, states):
    method = single_loop(PROBLEM, GOSSIPS[name], TOY_STEPS, estimator.full(), meeting_twice(states))

    def step():
        return jax.eval_shape(lambda: method.step(None, method.init(X, Y), BATCH))

    if name == "ring" or states not in REFUSED:
        assert step()[1].rounds.shape == ()
    else:
        with pytest.raises(ValueError, match=REFUSED[states]):
            step()


def test_a_gossip_may_keep_a_constant():
    def mix(key, state, tree):
        return TOY_RING.mix(key, (), tree)[0], state

    gossip = TOY_RING._replace(init=lambda tree: jnp.ones(3), mix=mix)
    method = single_loop(PROBLEM, gossip, TOY_STEPS, estimator.full(), correction.tracking())
    assert jax.eval_shape(lambda: method.step(None, method.init(X, Y), BATCH))[1].rounds.shape == ()


def test_a_gossip_state_that_is_none_is_told_where_one_is_needed():
    def init(gossip, s, move):
        return correction.CorrectionState((), move.init(s), ())

    method = single_loop(
        PROBLEM, GOSSIPS["push_sum"], TOY_STEPS, estimator.full(), correction.none()._replace(init=init)
    )
    with pytest.raises(ValueError, match=r"state of a gossip must be that of gossip.init.*got \(\)"):
        jax.eval_shape(lambda: method.step(None, method.init(X, Y), BATCH))


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (
            correction.none()._replace(update=lambda key, state, gossip, s, d, move: 0),
            "correction.update must be a funct",
        ),
        (correction.none()._replace(init=lambda gossip, s: 0), r"correction.init must be a function \(gossip, s, move"),
        (
            estimator.full()._replace(update=lambda key, state: 0),
            "estimator.update must be a function .key, state, orac",
        ),
    ],
)
def test_a_function_of_other_arguments_is_told_when_it_is_passed(part, text):
    parts = (part, correction.none()) if isinstance(part, estimator.Estimator) else (estimator.full(), part)
    with pytest.raises(ValueError, match=text):
        single_loop(PROBLEM, TOY_RING, TOY_STEPS, *parts)


def test_a_state_without_a_gossip_is_refused():
    kept = correction.none()._replace(init=lambda gossip, s, move: (gossip.init(s), move.init(s)))
    method = single_loop(PROBLEM, TOY_RING, TOY_STEPS, estimator.full(), kept)
    with pytest.raises(ValueError, match=r"correction.init must .* with the field gossip.*Return, say"):
        method.init(X, Y)


# Push-sum


def test_a_transformation_over_push_sum_moves_what_the_agents_have():
    """Clipping and momentum of t / ω, the agent's own direction, beside z = ω s and sums t that a matrix C mixes."""
    q, C, iterations = quadratic(0, n=4), DIRECTED.matrix.toarray(), 40
    clipped = optax.chain(optax.clip_by_global_norm(0.1), optax.trace(0.5), optax.scale(-0.1))
    method = single_loop(q.problem, GOSSIPS["push_sum"], clipped, estimator.full(), correction.tracking())
    _, path, _ = numbers(run(method, q.batch, iterations))

    point = [np.zeros((4, 2)), np.zeros((4, 3)), np.zeros((4, 3))]
    expected, omega = [tuple(point)], np.ones((4, 1))
    mixed, last, speed = ([0.0] * 3 for _ in range(3))
    for _ in range(iterations):
        d = networks.directions(q, point)
        t = [m + new - old for m, new, old in zip(mixed, d, last, strict=True)]
        own = [one / omega for one in t]
        own = [u * np.minimum(1, 0.1 / np.linalg.norm(u, axis=1, keepdims=True).clip(1e-30)) for u in own]
        speed = [0.5 * old + u for old, u in zip(speed, own, strict=True)]
        z = [C @ (omega * (s - 0.1 * u)) for s, u in zip(point, speed, strict=True)]
        omega, mixed, last = C @ omega, [C @ one for one in t], d
        point = [one / omega for one in z]
        expected.append(tuple(point))
    assert np.ptp(omega) > 0.1
    close(path, stacked(expected), 1e-13)

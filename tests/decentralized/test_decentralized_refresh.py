"""Snapshots that follow how far an agent has moved, against a recursion in numpy, their limit, and their cost."""

import jax.numpy as jnp
import networks
import numpy as np
import pytest
from cases import DEFINITE, INDEFINITE, LAZY_RING, STEPS, W
from networks import at_solution, close, run, stacked

from benchmarks.decentralized.moved_snapshot import s3ldbo_adaptive
from bilevax import decentralized
from bilevax.testing.problems._quadratic import PROBLEM


def recursion(q, p, block, iterations):
    """The trajectory, and who evaluates at each iteration; semi-ATC tracking of stored directions."""
    n, number = len(q.A), int(np.ceil(p * block))
    point = (np.zeros((n, q.B.shape[2])), np.zeros((n, q.B.shape[1])), np.zeros((n, q.B.shape[1])))
    snapshot, stored = point, networks.directions(q, point)
    mixed, last = [0.0] * 3, [0.0] * 3
    trajectory, chosen = [point], []
    for _ in range(iterations):
        lengths = [np.linalg.norm(s - old, axis=1) for s, old in zip(point, snapshot, strict=True)]
        blocks = [r.reshape(-1, block) for r in lengths]
        share = sum(r / np.maximum(r.mean(1, keepdims=True), 1e-300) for r in blocks)
        order = np.argsort(-share, axis=1, kind="stable")[:, :number]
        mask = np.zeros((n // block, block), bool)
        np.put_along_axis(mask, order, True, axis=1)
        mask = mask.reshape(n)
        chosen.append(mask)
        fresh = networks.directions(q, point)
        stored = tuple(np.where(mask[:, None], new, old) for new, old in zip(fresh, stored, strict=True))
        snapshot = tuple(np.where(mask[:, None], new, old) for new, old in zip(point, snapshot, strict=True))
        t = [m + d - old for m, d, old in zip(mixed, stored, last, strict=True)]
        point = tuple(W @ (s - a * one) for s, a, one in zip(point, STEPS, t, strict=True))
        mixed, last = [W @ one for one in t], stored
        trajectory.append(point)
    return stacked(trajectory), np.array(chosen)


def test_the_agents_that_moved_farthest_refresh():
    method = s3ldbo_adaptive(PROBLEM, LAZY_RING, STEPS, probability=0.25)
    _, path, info = run(method, DEFINITE.batch, 40)
    expected, chosen = recursion(DEFINITE, 0.25, 8, 40)
    close(path, expected, 1e-12)
    for count in info.calls:
        np.testing.assert_array_equal(count, chosen)


@pytest.mark.parametrize("q", [DEFINITE, INDEFINITE], ids=["definite", "indefinite"])
def test_limit(q):
    _, path, info = run(s3ldbo_adaptive(PROBLEM, LAZY_RING, STEPS, probability=0.25), q.batch, 2500)
    at_solution(path, q)
    evaluations = np.asarray(info.calls.outer_gradients)
    assert (evaluations.sum(1) == 2).all()
    assert evaluations.sum(0).min() > 100  # nobody is left behind


def test_everybody_is_sldbo():
    start = jnp.ones((8, 2)), jnp.ones((8, 3))
    paths = [
        run(method, DEFINITE.batch, 40, start)[1]
        for method in (
            s3ldbo_adaptive(PROBLEM, LAZY_RING, STEPS, probability=1.0),
            decentralized.sldbo(PROBLEM, LAZY_RING, STEPS),
        )
    ]
    close(paths[0], paths[1], 1e-14)

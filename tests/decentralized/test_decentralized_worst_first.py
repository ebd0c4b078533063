"""Agents that refresh where their prediction is expected to err most, against a recursion in numpy, and their limit."""

import networks
import numpy as np
import pytest
from cases import DEFINITE, INDEFINITE, LAZY_RING, STEPS, W
from networks import at_solution, close, run, stacked

import bilevax as bx
from benchmarks.decentralized.worst_first import PATIENCE, s3ldbo_worst_first
from bilevax.single_loop import prediction
from bilevax.testing.problems._quadratic import PROBLEM

SLOPE = 0.7
MODEL = prediction.Prediction(  # a wrong one: each direction changes along its own level alone
    lambda problem, point, d, batch: (),
    lambda memory, problem, start, end, change, batch: memory,
    lambda memory, problem, start, end, batch: bx.Levels(
        *(SLOPE * (after - before) for before, after in zip(start, end, strict=True))
    ),
)


def recursion(q, p, iterations):
    """The trajectory, and who evaluates at each iteration; semi-ATC tracking of predicted directions."""
    n = len(q.A)
    point = (np.zeros((n, q.B.shape[2])), np.zeros((n, q.B.shape[1])), np.zeros((n, q.B.shape[1])))
    there, stored = point, networks.directions(q, point)
    error, age = np.ones((3, n)), np.zeros(n)
    mixed, last = [0.0] * 3, [0.0] * 3
    trajectory, chosen = [point], []
    for k in range(iterations):
        guess = [d + SLOPE * (s - old) for d, s, old in zip(stored, point, there, strict=True)]
        change = np.stack([np.linalg.norm(u - d, axis=1) for u, d in zip(guess, stored, strict=True)])
        size = np.array([np.linalg.norm(u.mean(0)) for u in guess])
        expected = (error * change / size[:, None]).sum(0)
        first = np.where(age >= 2 / p, 1e6 + age, expected)
        begin = int(np.floor(max(k - 1, 0) * p * n + 1e-9))
        count = int(np.floor((max(k - 1, 0) + 1) * p * n + 1e-9)) - begin
        mask = np.zeros(n, bool)
        mask[np.argsort(-first, kind="stable")[:count]] = True
        chosen.append(mask)
        fresh = networks.directions(q, point)
        wrong = np.stack([np.linalg.norm(d - u, axis=1) for d, u in zip(fresh, guess, strict=True)])
        error = np.where(mask & (change > 0), wrong / np.maximum(change, 1e-300), error)
        age = np.where(mask, 0, age + 1)
        u, stored, there = (
            tuple(np.where(mask[:, None], new, old) for new, old in zip(one, other, strict=True))
            for one, other in ((fresh, guess), (fresh, stored), (point, there))
        )
        t = [m + d - old for m, d, old in zip(mixed, u, last, strict=True)]
        point = tuple(W @ (s - a * one) for s, a, one in zip(point, STEPS, t, strict=True))
        mixed, last = [W @ one for one in t], u
        trajectory.append(point)
    return stacked(trajectory), np.array(chosen)


@pytest.mark.parametrize("p", [0.25, 0.2, 0.1])
def test_the_agents_that_are_predicted_worst_refresh(p):
    method = s3ldbo_worst_first(PROBLEM, LAZY_RING, STEPS, probability=p, predict=MODEL)
    _, path, info = run(method, DEFINITE.batch, 60)
    expected, chosen = recursion(DEFINITE, p, 60)
    close(path, expected, 1e-11)
    for count in info.calls:
        np.testing.assert_array_equal(count, chosen)
    turns = chosen.reshape(3, 20, -1).argmax(-1)
    assert (turns[1] != turns[2]).any()  # not in turn


@pytest.mark.parametrize("q", [DEFINITE, INDEFINITE], ids=["definite", "indefinite"])
def test_limit(q):
    method = s3ldbo_worst_first(PROBLEM, LAZY_RING, STEPS, probability=0.25, predict=MODEL)
    _, path, info = run(method, q.batch, 2500)
    at_solution(path, q)
    evaluations = np.asarray(info.calls.outer_gradients)
    assert (evaluations.sum(1) == 2).all()
    longest = max(np.diff(np.flatnonzero(one)).max() for one in evaluations.T)
    assert longest <= PATIENCE / 0.25 + len(evaluations.T) / 2  # and those who wait as long

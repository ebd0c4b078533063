"""The recursions of the methods in plain numpy, on the quadratics of `bilevax.testing.problems`.

Nothing here knows the package beyond its nouns: every number that a test expects comes from linear algebra.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse

from bilevax.agents.topology import Topology

KEY = jax.random.key(0)
TOY_STEPS = (0.05, 0.1, 0.1)


# The three local directions, leaves [n, d]


def direction_y(q, x, y):
    return np.einsum("nij,nj->ni", q.A, y) - np.einsum("nij,nj->ni", q.B, x) - q.c


def direction_v(q, x, y, v):
    gradient = np.einsum("nij,nj->ni", q.Q, y) - q.e + np.einsum("nji,nj->ni", q.S, x)
    return np.einsum("nij,nj->ni", q.A, v) - gradient


def direction_x(q, x, y, v):
    gradient = np.einsum("nij,nj->ni", q.R, x) + q.r + np.einsum("nij,nj->ni", q.S, y)
    return gradient + np.einsum("nji,nj->ni", q.B, v)


def directions(q, point):
    x, y, v = point
    return direction_x(q, x, y, v), direction_y(q, x, y), direction_v(q, x, y, v)


# Mixing matrices


def ring(n):
    eye = np.eye(n)
    return (eye + np.roll(eye, 1, 0) + np.roll(eye, -1, 0)) / 3


def lazy(W):
    return (np.eye(len(W)) + W) / 2


def complete(n):
    return np.full((n, n), 1 / n)


def doubly_stochastic(seed, n):
    """A random mixture of the identity and three permutations: neither symmetric nor sparse in the same places."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(4))
    orders = [np.arange(n), *(rng.permutation(n) for _ in range(3))]
    return sum(share * np.eye(n)[order] for share, order in zip(shares, orders, strict=True))


def topology(*matrices):
    """The package's own noun around plain matrices: one of them, or a sequence that repeats."""
    each = tuple(Topology(scipy.sparse.csr_array(W)) for W in matrices)
    return each[0] if len(each) == 1 else each


# The recursions; `move(W, s, d, a)` maps the current s and its direction to the next s


def none():
    return lambda W, s, d, a: W @ (s - a * d)


def local():
    return lambda W, s, d, a: s - a * d


def _tracked(step, matrix_on_change):
    t = previous = last = None

    def move(W, s, d, a):
        nonlocal t, previous, last
        if t is None:
            t = W @ d if matrix_on_change else d
        else:
            t = W @ (t + d - previous) if matrix_on_change else last @ t + d - previous
        previous, last = d, W
        return step(W, s, t, a)

    return move


def semi():
    return _tracked(lambda W, s, t, a: W @ (s - a * t), matrix_on_change=False)


def atc():
    return _tracked(lambda W, s, t, a: W @ (s - a * t), matrix_on_change=True)


def non_atc():
    return _tracked(lambda W, s, t, a: W @ s - a * t, matrix_on_change=False)


def exact_diffusion():
    last = None

    def move(W, s, d, a):
        nonlocal last
        new = W @ (s - a * d) if last is None else W @ (2 * s - last[0] - a * (d - last[1]))
        last = s, d
        return new

    return move


def extra():
    last = None

    def move(W, s, d, a):
        nonlocal last
        new = W @ s - a * d if last is None else W @ (2 * s - last[0]) - a * (d - last[1])
        last = s, d
        return new

    return move


def literal(A: Callable, B: Callable, C: Callable):
    """The primal-dual form s⁺ = A(C s − a d) − B q, q⁺ = q + B s⁺ with its three matrices as functions of W."""
    q = 0.0

    def move(W, s, d, a):
        nonlocal q
        new = A(W) @ (C(W) @ s - a * d) - (B(W) @ q if np.ndim(q) else 0.0)
        q = q + B(W) @ new
        return new

    return move


def root(W):
    """(I − W)^{1/2}."""
    values, vectors = scipy.linalg.eigh(np.eye(len(W)) - W)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def _eye(W):
    return np.eye(len(W))


LITERAL = {
    "exact_diffusion": lambda: literal(lambda W: W, root, _eye),
    "extra": lambda: literal(_eye, root, lambda W: W),
    "tracking_non_atc": lambda: literal(_eye, lambda W: _eye(W) - W, lambda W: W @ W),
    "tracking": lambda: literal(lambda W: W, lambda W: _eye(W) - W, lambda W: W),
    "tracking_atc": lambda: literal(lambda W: W @ W, lambda W: _eye(W) - W, _eye),
    "none": lambda: literal(lambda W: W, lambda W: 0.0 * W, _eye),
}
PRACTICAL = {
    "exact_diffusion": exact_diffusion,
    "extra": extra,
    "tracking_non_atc": non_atc,
    "tracking": semi,
    "tracking_atc": atc,
    "none": none,
}


def simulate(q, moves, steps, W, iterations, point=None, theta=1.0, gauss_seidel=False, coins=None, radius=np.inf):
    """The trajectory [(x, y, v), ...] of any single-loop method; `moves` in the order x, y, v.

    `W` is one matrix or a list of them, one per iteration. `coins[k]` are the agents that evaluate at iteration k + 1
    (all of them do at iteration 0), the others keep their last directions.
    """
    n = len(q.A)
    matrices = W if isinstance(W, list) else [W] * iterations
    x, y, v = point or (np.zeros((n, q.B.shape[2])), np.zeros((n, q.B.shape[1])), np.zeros((n, q.B.shape[1])))
    trajectory, h, stored = [(x, y, v)], None, None
    for k in range(iterations):
        mix = matrices[k]
        if gauss_seidel:
            y = moves[1](mix, y, direction_y(q, x, y), steps[1])
            v = moves[2](mix, v, direction_v(q, x, y, v), steps[2])
            dx = direction_x(q, x, y, v)
            h = dx if h is None else (1 - theta) * h + theta * dx
            x = moves[0](mix, x, h, steps[0])
        else:
            new = directions(q, (x, y, v))
            if coins is not None and k > 0:
                chosen = np.isin(np.arange(n), coins[k - 1])[:, None]
                new = tuple(np.where(chosen, fresh, old) for fresh, old in zip(new, stored, strict=True))
            stored = new
            dx, dy, dv = new
            h = dx if h is None else (1 - theta) * h + theta * dx
            x, y, v = moves[0](mix, x, h, steps[0]), moves[1](mix, y, dy, steps[1]), moves[2](mix, v, dv, steps[2])
        v = v * np.minimum(1.0, radius / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-300))
        trajectory.append((x, y, v))
    return trajectory


def storm_recursion(samples, W, steps, a, rate, alternating, moves):
    """Trajectory of the variance-reduced method; `samples[t]` are the coefficients that iteration t draws.

    u_t = (1 − a) (u_{t−1} − d(previous point; ξ_t)) + d(point; ξ_t) is what `moves`, in the order x, y, v, move along,
    damped: s ← s + rate (moved s − s); the alternating method refreshes y, v, x in turn, each with a previous
    point of its own.
    """
    n = len(samples[0].A)
    d_x, d_y = samples[0].B.shape[2], samples[0].B.shape[1]
    point = [np.zeros((n, d_x)), np.zeros((n, d_y)), np.zeros((n, d_y))]
    direction = (direction_x, lambda q, x, y, v: direction_y(q, x, y), direction_v)
    previous, u = [None] * 3, [None] * 3
    trajectory = [tuple(point)]
    for sample in samples:
        for group in ((1,), (2,), (0,)) if alternating else ((0, 1, 2),):
            here, new = tuple(point), list(point)
            for level in group:
                fresh = direction[level](sample, *here)
                if u[level] is not None:
                    fresh = (1 - a) * (u[level] - direction[level](sample, *previous[level])) + fresh
                previous[level], u[level] = here, fresh
                s = here[level]
                new[level] = s + rate * (moves[level](W, s, fresh, steps[level]) - s)
            point = new
        trajectory.append(tuple(point))
    return trajectory


def unbiased_recursion(q, W, steps, p, refreshed, iterations):
    """Trajectory of the unbiased snapshot method; `refreshed[k]` marks the agents that evaluate at iteration k ≥ 1."""
    n = len(q.A)
    point = (np.zeros((n, q.B.shape[2])), np.zeros((n, q.B.shape[1])), np.zeros((n, q.B.shape[1])))
    stored = moving = tracker = directions(q, point)
    trajectory = [point]
    for k in range(iterations):
        if k > 0:
            coin = refreshed[k][:, None]
            fresh = directions(q, point)
            moving = [W @ t + coin / p * (d - D) for t, d, D in zip(tracker, fresh, stored, strict=True)]
            tracker = [W @ t + coin * (d - D) for t, d, D in zip(tracker, fresh, stored, strict=True)]
            stored = [D + coin * (d - D) for d, D in zip(fresh, stored, strict=True)]
        point = tuple(W @ (s - a * g) for s, g, a in zip(point, moving, steps, strict=True))
        trajectory.append(point)
    return trajectory


# Running a method


def moves(constructors):
    return [make() for make in constructors]


def zeros(batch):
    n, *_, d_y, d_x = batch.inner["B"].shape
    return jnp.zeros((n, d_x)), jnp.zeros((n, d_y))


def roll(algorithm, batch, iterations, start=None):
    """(final state, trajectory with the start in front, stacked info) of a run under one scan."""
    state = algorithm.init(*(start or zeros(batch)), batch)

    def levels(state):
        return state.x, state.y, getattr(state, "v", ())  # some methods have no v

    def step(state, key):
        state, info = algorithm.step(key, state, batch)
        return state, (levels(state), info)

    first = levels(state)
    state, (path, info) = jax.lax.scan(step, state, jax.random.split(KEY, iterations))
    return state, jax.tree.map(lambda one, many: jnp.concatenate([one[None], many]), first, path), info


@functools.partial(jax.jit, static_argnums=(0, 2))
def run(algorithm, batch, iterations, start=None):
    return roll(algorithm, batch, iterations, start)


def numbers(tree):
    """Plain numpy, which broadcasts."""
    return jax.tree.map(np.asarray, tree)


def off(got, expected):
    """The largest error of any agent; infinite where it is no number."""
    return float(np.nan_to_num(np.abs(np.asarray(got) - expected), nan=np.inf).max())


def close(got, expected, atol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def stacked(trajectory):
    return tuple(np.stack(level) for level in zip(*trajectory, strict=True))


def at_solution(path, q, atol=1e-10):
    for got, expected in zip(path, q.solution, strict=True):
        np.testing.assert_allclose(got[-1], np.broadcast_to(expected, got[-1].shape), rtol=0, atol=atol)

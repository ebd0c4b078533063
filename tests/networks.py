"""Heterogeneous quadratics over a network, their closed forms, and the recursions of the methods in plain numpy.

    g_i = yᵀA_i y / 2 − yᵀ(B_i x + c_i)          f_i = yᵀQ_i y / 2 − e_iᵀy + xᵀR_i x / 2 + r_iᵀx + xᵀS_i y

Nothing here knows the package beyond its nouns: every number that a test expects comes from linear algebra.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse

import bilevax as bx
from bilevax.decentralized.topology import Topology

KEY = jax.random.key(0)
TOY_STEPS = (0.05, 0.1, 0.1)
TOY_SOLUTION = (-23 / 79, 27 / 79, -10 / 79)


class Quadratic(NamedTuple):
    """The coefficients of n agents (leaves [n, ...]), or of one of them, or their average."""

    A: np.ndarray
    B: np.ndarray
    c: np.ndarray
    Q: np.ndarray
    e: np.ndarray
    R: np.ndarray
    r: np.ndarray
    S: np.ndarray

    @property
    def batch(self):
        outer = {name: jnp.asarray(getattr(self, name)) for name in "QeRrS"}
        return bx.Batch(outer=outer, inner={name: jnp.asarray(getattr(self, name)) for name in "ABc"})

    @property
    def mean(self):
        return Quadratic(*(leaf.mean(0) for leaf in self))


def outer_loss(x, y, b):
    return 0.5 * (y @ b["Q"] @ y + x @ b["R"] @ x) - b["e"] @ y + b["r"] @ x + x @ b["S"] @ y


def inner_loss(x, y, b):
    return 0.5 * y @ b["A"] @ y - y @ (b["B"] @ x + b["c"])


PROBLEM = bx.BilevelProblem(outer_loss, inner_loss)


def agents(q):
    """One Quadratic per agent."""
    return [Quadratic(*leaves) for leaves in zip(*q, strict=True)]


def toy():
    """Four scalar agents whose iterates are known by hand."""
    scalars = {"c": (0, 1, 2, 1), "e": (1, 3, -1, 1), "r": (-1, 0, 1, 2)}
    matrices = {"A": (1, 2, 3, 4), "B": (1, -1, 2, 0), "Q": (1, 1, 2, 4), "R": (1, 2, 1, 2), "S": (0, 0, 0, 0)}
    leaves = {name: np.array(value, float).reshape(4, 1) for name, value in scalars.items()}
    return Quadratic(**leaves, **{name: np.array(value, float).reshape(4, 1, 1) for name, value in matrices.items()})


def quadratic(seed, n=8, dx=2, dy=3, heterogeneity=1.0, indefinite=0.0):
    """Random agents around common coefficients; `indefinite` spreads the local Hessians and keeps their mean."""
    rng = np.random.default_rng(seed)

    def vary(common, scale):
        return common + heterogeneity * scale * rng.normal(size=(n, *common.shape))

    def definite(d, low, high):
        basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
        common = (basis * np.linspace(low, high, d)) @ basis.T
        noise = vary(np.zeros((d, d)), 0.3)
        return common + noise @ noise.transpose(0, 2, 1)

    def symmetric(d, scale):
        noise = rng.normal(size=(n, d, d))
        noise = scale * (noise + noise.transpose(0, 2, 1))
        return noise - noise.mean(0)

    return Quadratic(
        A=definite(dy, 2.0, 3.0) + symmetric(dy, indefinite),
        B=vary(rng.normal(size=(dy, dx)), 0.5),
        c=vary(rng.normal(size=dy), 1.0),
        Q=definite(dy, 0.5, 1.5),
        e=vary(rng.normal(size=dy), 1.0),
        R=definite(dx, 1.5, 2.5) + symmetric(dx, 0.3 * indefinite),
        r=vary(rng.normal(size=dx), 1.0),
        S=vary(0.2 * rng.normal(size=(dx, dy)), 0.2),
    )


# The closed forms: which point a method goes to says which problem it solves


def solution(q):
    """(x*, y*, v*) of min_x mean f_i(x, y*(x)), y*(x) = argmin mean g_i(x, y), for n agents or a single one."""
    m = q.mean if q.A.ndim == 3 else q
    slope, offset = np.linalg.solve(m.A, m.B), np.linalg.solve(m.A, m.c)
    lift = np.linalg.solve(m.A, m.B).T
    G = m.R + m.S @ slope + lift @ (m.Q @ slope + m.S.T)
    h = m.r + m.S @ offset + lift @ (m.Q @ offset - m.e)
    x = -np.linalg.solve(G, h)
    y = slope @ x + offset
    return x, y, np.linalg.solve(m.A, m.Q @ y - m.e + m.S.T @ x)


def personal_solution(q, inverse=np.linalg.inv):
    """x_p: every agent has a lower level of its own, and `inverse(A_i)` in its hypergradient."""
    affine = []
    for a in agents(q):
        slope, offset = np.linalg.solve(a.A, a.B), np.linalg.solve(a.A, a.c)
        affine.append(_hypergradient(a, slope, offset, inverse(a.A)))
    G, h = (np.mean(part, axis=0) for part in zip(*affine, strict=True))
    return -np.linalg.solve(G, h)


def local_inverse_solution(q, inverse=np.linalg.inv):
    """x_l: one common y*(x), but `inverse(A_i)` of every agent's own Hessian."""
    m = q.mean
    slope, offset = np.linalg.solve(m.A, m.B), np.linalg.solve(m.A, m.c)
    affine = [_hypergradient(a, slope, offset, inverse(a.A)) for a in agents(q)]
    G, h = (np.mean(part, axis=0) for part in zip(*affine, strict=True))
    return -np.linalg.solve(G, h)


def _hypergradient(a, slope, offset, inverse):
    """(G, h) of the affine ∇_x f + Bᵀ inverse ∇_y f = G x + h at y = slope x + offset."""
    lift = a.B.T @ inverse
    G = a.R + a.S @ slope + lift @ (a.Q @ slope + a.S.T)
    return G, a.r + a.S @ offset + lift @ (a.Q @ offset - a.e)


def neumann(terms, c):
    """c Σ_{j ≤ terms} (I − c A)ʲ, as a function of A."""
    return lambda A: c * sum(np.linalg.matrix_power(np.eye(len(A)) - c * A, j) for j in range(terms + 1))


def penalized_solution(q, multiplier):
    """x_λ = argmin_x min_y mean f(x, y) + λ (mean g(x, y) − min_z mean g(x, z))."""
    m = q.mean
    inverse = np.linalg.inv(m.Q + multiplier * m.A)
    slope, offset = inverse @ (multiplier * m.B - m.S.T), inverse @ (m.e + multiplier * m.c)
    lower_slope, lower_offset = np.linalg.solve(m.A, m.B), np.linalg.solve(m.A, m.c)
    G = m.R + m.S @ slope - multiplier * m.B.T @ (slope - lower_slope)
    return -np.linalg.solve(G, m.r + m.S @ offset - multiplier * m.B.T @ (offset - lower_offset))


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


def storm_recursion(samples, W, steps, a, rate, alternating):
    """Trajectory of the variance-reduced method; `samples[t]` are the coefficients that iteration t draws.

    u_t = (1 − a) (u_{t−1} − d(previous point; ξ_t)) + d(point; ξ_t) is tracked and moves
    s ← s + rate (W s − a_s t − s); the alternating method refreshes y, v, x in turn, each with a previous
    point of its own.
    """
    n = len(samples[0].A)
    d_x, d_y = samples[0].B.shape[2], samples[0].B.shape[1]
    point = [np.zeros((n, d_x)), np.zeros((n, d_y)), np.zeros((n, d_y))]
    direction = (direction_x, lambda q, x, y, v: direction_y(q, x, y), direction_v)
    previous, u, t = [None] * 3, [None] * 3, [None] * 3
    trajectory = [tuple(point)]
    for sample in samples:
        for group in ((1,), (2,), (0,)) if alternating else ((0, 1, 2),):
            here, new = tuple(point), list(point)
            for level in group:
                d = direction[level](sample, *here)
                if u[level] is None:
                    t[level] = fresh = d
                else:
                    fresh = (1 - a) * (u[level] - direction[level](sample, *previous[level])) + d
                    t[level] = W @ t[level] + fresh - u[level]
                previous[level], u[level] = here, fresh
                s = here[level]
                new[level] = s + rate * (W @ s - steps[level] * t[level] - s)
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

    def step(state, key):
        state, info = algorithm.step(key, state, batch)
        return state, ((state.x, state.y, state.v), info)

    first = state.x, state.y, state.v
    state, (path, info) = jax.lax.scan(step, state, jax.random.split(KEY, iterations))
    return state, jax.tree.map(lambda one, many: jnp.concatenate([one[None], many]), first, path), info


@functools.partial(jax.jit, static_argnums=(0, 2))
def run(algorithm, batch, iterations, start=None):
    return roll(algorithm, batch, iterations, start)


def numbers(tree):
    """Plain numpy, which broadcasts."""
    return jax.tree.map(np.asarray, tree)


def close(got, expected, atol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def stacked(trajectory):
    return tuple(np.stack(level) for level in zip(*trajectory, strict=True))


def at_solution(path, q, atol=1e-10):
    for got, expected in zip(path, solution(q), strict=True):
        np.testing.assert_allclose(got[-1], np.broadcast_to(expected, got[-1].shape), rtol=0, atol=atol)

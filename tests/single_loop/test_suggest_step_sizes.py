"""Suggested step sizes: the curvature of the mean, the stable range of each correction, what is counted, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import KEY, PRACTICAL, ring

import bilevax as bx
from bilevax import coins
from bilevax.agents import compression
from bilevax.single_loop import _averaging, _pilots, suggest_step_sizes
from bilevax.single_loop import correction as corrections
from bilevax.single_loop._averaging import average
from bilevax.single_loop._curvatures import Averages, Spent, curvatures
from bilevax.single_loop._pilots import LENGTHS, search, steady

N, D = 8, 3
RING = bx.gossip(bx.topology.ring(N))
# down a path, and from its end to the start and the middle: W is far from normal
DIRECTED = bx.topology.from_matrix((np.roll(np.eye(N), -1, 0) + np.eye(N)) / 2)
DIRECTED = bx.topology.from_matrix(np.column_stack([np.eye(N)[[0, 4, 7]].mean(0), DIRECTED.matrix.toarray()[:, 1:]]))
LAZY = bx.gossip(bx.topology.lazy(bx.topology.ring(N)))
# H_i: agent 0 has ten times the curvature of agent 7; eigenvectors differ
H = np.stack([np.diag(np.roll([1.0, 0.9, 0.8], i)) * (10.0 if i == 0 else 2.0 if i % 2 else 1.0) for i in range(N)])
C = np.linspace(-1.0, 1.0, N)[:, None] + np.arange(D)
L = np.linalg.eigvalsh(H.mean(0))[-1]
PROBLEM = bx.BilevelProblem(lambda x, y, c: 0.5 * jnp.sum((y - c) ** 2), lambda x, y, h: 0.5 * (y - x) @ h @ (y - x))
BATCH = bx.Batch(outer=jnp.asarray(C, "float32"), inner=jnp.asarray(H, "float32"))
X = Y = jnp.full((N, D), 3.0, "float32")  # y solves the inner problem


def preset(gossip, correction):
    return lambda step_sizes: bx.decentralized.sldbo(PROBLEM, gossip, step_sizes, correction=correction)


def suggested(make, gossip, correction=None, problem=PROBLEM, pilots=6):
    def find(key):
        return suggest_step_sizes(make, problem, gossip, X, Y, BATCH, key, pilots=pilots, correction=correction)

    return jax.jit(find)(KEY)


@functools.cache
def with_tracking():
    make = preset(RING, None)
    return make, *suggested(make, RING)


def test_curvature_is_that_of_the_mean():
    _, steps, info = with_tracking()
    own = np.linalg.eigvalsh(H)[:, -1]
    assert own.max() >= 9.9 * own.min()
    assert abs(info.curvature - L) < 0.03 * L
    assert steps.y == steps.v
    np.testing.assert_allclose(steps.y, 2 / 4 / (own.max() / 3), rtol=0.1)  # b = 2 on this ring, max L_i > 3 L


@pytest.mark.parametrize(
    "gossip",
    [
        RING,
        bx.gossip(bx.topology.one_peer_exponential(N)),
        bx.agents.push_sum(bx.topology.exponential(N)),
    ],
    ids=["ring", "sequence", "push_sum"],
)
def test_curvatures_over_graphs(gossip):
    averages = Averages(average(gossip, 0.1), average(gossip, 1e-6))
    found, _ = jax.jit(lambda: curvatures(KEY, PROBLEM, gossip, averages, X, Y, BATCH))()
    largest = np.linalg.eigvalsh(H)[:, -1].max()
    assert abs(found.mean - L) < 0.05 * L
    assert 0.97 * largest < found.largest < 1.3 * largest


@pytest.mark.parametrize("error", [0.1, 1e-4])
def test_averages_are_as_good_as_they_say(error):
    s = jnp.asarray(np.random.default_rng(0).normal(size=(N, 5)))
    mean = s.mean(0)
    undirected = RING, bx.gossip(bx.topology.star(N)), bx.gossip(bx.topology.one_peer_exponential(N))
    for gossip in (*undirected, bx.agents.push_sum(DIRECTED)):
        each = average(gossip, error)
        found, sent = each.apply(KEY, s)
        assert jnp.linalg.norm(found - mean[None]) <= 1.01 * error * jnp.linalg.norm(s - mean[None])
        assert sent.shape == (N,)
    assert average(RING, 1e-4).rounds == 15
    assert average(bx.gossip(bx.topology.ring(20)), 0.1).rounds == 12  # plain rounds: 69


def test_a_directed_graph_that_mixes_too_slowly_is_refused(monkeypatch):
    monkeypatch.setattr(_averaging, "MOST", 3)
    with pytest.raises(ValueError, match="gossip must bring its agents within 1e-06 of their mean in 3 periods"):
        average(bx.agents.push_sum(DIRECTED), 1e-6)


@pytest.mark.parametrize(
    ("correction", "gossip"),
    [
        (corrections.tracking_non_atc(), RING),
        (corrections.exact_diffusion(), LAZY),
        pytest.param(corrections.extra(), LAZY, marks=pytest.mark.slow),
    ],
    ids=["tracking_non_atc", "exact_diffusion", "extra"],
)
def test_suggested_steps_are_stable(correction, gossip):
    make = preset(gossip, correction)
    steps, info = suggested(make, gossip, correction)
    assert not info.breakdown
    arrives(make, steps, info)


def test_steps_for_the_default_correction_are_stable():
    arrives(*with_tracking())


def arrives(make, steps, info):
    """The method goes on from the state of the chosen pilot to x*, the mean of the c_i."""
    state = jax.lax.fori_loop(0, 800, lambda k, state: make(steps).step(None, state, BATCH)[0], info.state)
    np.testing.assert_allclose(state.x, np.broadcast_to(C.mean(0), (N, D)), atol=0.3)


def test_everything_is_counted():
    _, _, info = with_tracking()
    pilots = int((~np.isnan(info.scores)).sum())
    iterations, slopes = int(info.calls.outer_gradients[0]) - 2, 2
    assert (pilots, iterations, info.warm_up, info.slopes) == (1, 30, 10, slopes)  # one warm-up, and the pilot went on
    assert info.state.k == iterations
    np.testing.assert_array_equal(info.calls.outer_gradients, iterations + slopes)
    np.testing.assert_array_equal(info.calls.inner_gradients, iterations + slopes + 1)
    np.testing.assert_array_equal(info.calls.hessian_products, iterations + slopes + 20)
    np.testing.assert_array_equal(info.calls.cross_products, iterations + slopes)
    rough, fine = average(RING, 0.1).rounds, average(RING, 1e-6).rounds
    numbers = 2 + slopes  # L, L_i's powers, the squared slopes
    read = 4 * 4 * (1 + max(LENGTHS))  # four at each reading of two halves of the warm-up, and two runs
    vectors = 2 * 3 * D * iterations + (10 + slopes) * rough * D
    wide = jnp.zeros(()).dtype.itemsize
    np.testing.assert_allclose(info.bytes, 2 * (4 * (vectors + fine * numbers) + wide * fine * read))
    assert info.rounds == iterations + (10 + slopes) * rough + fine * (1 + slopes + 4)


def test_all_steps_shrink_where_agents_skip():
    def make(step_sizes):
        return bx.decentralized.s3ldbo(PROBLEM, RING, step_sizes, coins=coins.subset(0.25))

    steps, info = suggested(make, RING)
    assert not info.breakdown
    halvings = np.log2(2 / 4 * 3 / 10 * 4 / 7 / steps.y)  # 4 / (3 + T) for T = 4
    np.testing.assert_allclose(halvings, np.round(halvings), atol=0.1)
    tried = info.steps.x[jnp.isfinite(info.scores)]
    np.testing.assert_allclose(steps.x, tried[-1] / 1.5, rtol=0.1)  # as T is known better


def test_breakdown_is_told_and_no_method_takes_the_steps():
    problem = bx.BilevelProblem(lambda x, y, c: jnp.sum(jnp.sqrt(-1 - (y - c) ** 2)), PROBLEM.inner_loss)

    def make(step_sizes):
        return bx.decentralized.sldbo(problem, RING, step_sizes)

    steps, info = suggested(make, RING, problem=problem, pilots=2)
    assert info.breakdown
    assert np.isnan(info.scores).all()  # without a finite f no pilot begins
    with pytest.raises(ValueError, match=r"step_sizes\.x must be a finite number"):
        make(steps)


RIDGE = bx.BilevelProblem(
    lambda x, y, data: jnp.mean((data @ jnp.append(y, -1.0)) ** 2),
    lambda x, y, data: jnp.mean((data @ jnp.append(y, -1.0)) ** 2) + jnp.sum(jnp.exp(x) * y**2),
)


def penalties(largest, warm_up):
    """Those of a ridge regression on features of 1 to `largest`, and mean f: y converges slowly, d_x is small before.

    Mean f: at the start, at the end of the search, and after 1,000 more iterations with the steps that it found.
    """
    draw, start = jax.random.normal(jax.random.key(20), (2, N, 40, 21)), jnp.zeros((N, 20))
    features = draw[..., :-1] * (largest ** jnp.linspace(0, 1, 20))[None, None, None]
    data = jnp.concatenate([features, (draw[..., :-1].sum(-1) + draw[..., -1])[..., None]], -1)
    batch, make = bx.Batch(*data), functools.partial(bx.decentralized.sldbo, RIDGE, RING)
    steps, info = suggest_step_sizes(make, RIDGE, RING, start, start, batch, KEY, warm_up=warm_up)
    method = make(steps)
    last = jax.lax.fori_loop(0, 1000, lambda k, state: method.step(None, state, batch)[0], info.state)
    pairs = (start, start), (info.state.x, info.state.y), (last.x, last.y)
    return info, *(jnp.mean(jax.vmap(RIDGE.outer_loss)(*pair, batch.outer)) for pair in pairs)


with_slow_y = jax.jit(penalties, static_argnums=1)


def test_steps_of_x_do_not_grow_after_a_run_that_fails(monkeypatch):
    monkeypatch.setattr(_pilots, "LONGER", 1)  # a longer warm-up finds steps that do not fail
    hasty, several = jax.jit(lambda *given: penalties(*given), static_argnums=1), 0
    for exponent in (1.0, 1.25, 1.5):
        info, before, after, _ = hasty(10.0**exponent, 10)
        tried = np.asarray(info.steps.x)[~np.isnan(info.scores)]
        several += len(tried) > 1
        assert (np.diff(tried) <= 0).all()
        assert not info.breakdown
        assert after < before
    assert several


@pytest.mark.parametrize("largest", [3.0, 10.0, 30.0])
def test_where_y_converges_slowly_the_warm_up_goes_on(largest):
    info, before, after, last = with_slow_y(largest, 10)
    assert info.warm_up in 10 * 2 ** np.arange(1, 7)
    assert not info.breakdown
    assert last < after < before
    assert info.state.k == info.warm_up + 5 + max(15, info.warm_up // 4)  # one pilot, and the run after it


def test_a_longer_warm_up_is_what_one_says():
    info, before, after, last = with_slow_y(3.0, 161)
    assert info.warm_up == 320  # 40, if nothing is said
    assert last < after < before


def with_offset(offset):
    problem = PROBLEM._replace(outer_loss=lambda x, y, c: PROBLEM.outer_loss(x, y, c) + offset)
    make = functools.partial(bx.decentralized.sldbo, problem, RING)

    @jax.jit
    def find(lowest):
        return suggest_step_sizes(make, problem, RING, X, Y, BATCH, KEY, lowest=lowest)

    return find


def test_the_lower_bound_of_f_is_what_one_says():
    (_, steps, _), find = with_tracking(), with_offset(-100.0)
    found, info = find(-100.0)
    np.testing.assert_allclose(found, steps, rtol=1e-3)
    assert not info.breakdown
    found, info = find(0.0)
    assert info.breakdown
    assert np.isnan(found.x)
    assert np.isnan(info.scores).all()


def test_what_is_printed():
    *_, info = with_tracking()
    text = repr(info)
    assert f"scores=({float(info.scores[0]):.4g},)," in text
    assert "outer_gradients=32.0" in text
    assert "state=State," in text
    assert len(text) < 500
    seen = []
    jax.eval_shape(lambda info: seen.append(repr(info)), info)
    assert "[6]" in seen[0]
    assert "[2, 6]" in repr(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), info))  # of two seeds


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def searched(most, said=lambda k: 2.0, warm_up=LENGTHS[0], a=1.0, rest=1.0):
    """A search among runs of no method: losses fall where a_x and a_y are at most what is stable in a run so long.

    `said(k)` is a_x / a_y by the slope after a warm-up of k; `rest` is what g swings by after its first run.
    """
    stable = jnp.array([[0.0, 0.5], [0.3, 0.5], [0.2, 0.5]])  # warm-up, pilot, confirmation
    k, none = jnp.arange(1.0 + max(LENGTHS)), jnp.zeros(())

    def run(steps, state, length, spent):
        phase = jnp.where(steps.x > 0, jnp.where(length == LENGTHS[1], 1, 2), 0)
        good = jnp.all(jnp.asarray(steps[:2]) <= stable[phase])
        loss = 1 + jnp.where(good, -0.01, 0.1 * (-1) ** k) * k
        inner = jnp.where((state > 0) & (rest < 1), rest * (1 + (-1) ** k), loss)
        return state + length, jnp.stack([loss, inner, none * k, none * k]), spent

    spent = Spent(bx.problem.Calls(none, none, none, none), none, none, none, none, none)
    start, steps = jnp.zeros((), int), bx.Levels(none, none + a, none + a)
    read, first = lambda seen, spent: (seen, spent), lambda state, a, f, spent: (said(state) * a, spent)
    return search(run, read, first, start, steps, most, spent, warm_up)


def test_a_search_goes_on_until_a_run_is_good():
    """y: 1 in the warm-up; 1/2 in the first pilot; 1/4 as x is too long; 1/8, and x halved, as the long run is bad."""
    end = searched(6)
    assert (bool(end.good), end.state) == (True, sum(LENGTHS))
    np.testing.assert_array_equal(end.tried.x, [1, 1, 0.25, 0.125, np.nan, np.nan])
    np.testing.assert_array_equal(end.tried.y, [0.5, 0.25, 0.25, 0.125, np.nan, np.nan])
    np.testing.assert_array_equal(np.isfinite(end.scores), [0, 0, 1, 1, 0, 0])
    assert end.steps == (0.125, 0.125, 0.125)
    assert not searched(3).good  # the long run of the last is bad


@pytest.mark.parametrize(
    ("said", "warm_up", "warmed", "part"),
    [
        (lambda k: 2.0 / k, 10, 10, 2 / 10),  # half as long is not less than half
        (lambda k: 2.0 / k**2 + 0.02, 10, 20, 0.025**2 / 0.04),
        (lambda k: 2.0 * k, 20, 20, 2 * 20.0),  # longer ones are not made longer still
        (lambda k: 2.0 / k**2, 10, 640, 2 / 640**2 / 4),
        (lambda k: 2.0 / k**2, 641, 1280, 2 / 1280**2 / 4),
    ],
)
def test_how_far_a_warm_up_goes_on(said, warm_up, warmed, part):
    end = searched(1, said, warm_up, 0.25)
    assert end.warmed == warmed
    np.testing.assert_allclose(end.tried.x, [0.25 * part], rtol=1e-5)


def test_what_rounding_leaves_is_no_swing():
    end = searched(1, lambda k: 2.0 / k**2, 10, 0.25, 1e-9)
    assert (end.warmed, bool(end.good)) == (640, True)
    assert searched(1, lambda k: 2.0 / k**2, 10, 0.25, 0.1).warmed < 640


def test_after_a_longer_warm_up_the_last_run_is_longer():
    end = searched(1, lambda k: 2.0 / k**2, 10, 0.25)
    assert end.good
    assert end.state == 640 + LENGTHS[1] + 640 // 4


def test_agents_that_come_closer_do_not_swing():
    k, late = jnp.arange(11.0), jnp.arange(5, 11)

    def still(loss):
        return steady(loss[late], loss[0])

    assert all(map(still, (1 + 0.1 * k, jnp.exp(-k), 1 - 0.1 * jnp.exp(-k))))
    assert still(1 + (k - 7) ** 2)  # down and up again is no swing
    assert not still(1 + 0.5 * (-0.9) ** k)
    for end in ((1, 1, 1, 1, 1, 3), (5, 4, 4.5, 3.5, 3, 2.5)):
        assert not still(jnp.asarray([1.0] * 5 + [*end]))
    assert not still(2.2**k)  # ever faster


@pytest.mark.parametrize("name", PRACTICAL)
@pytest.mark.parametrize("make_matrix", [ring, lambda n: (2 * np.eye(n) + ring(n)) / 3], ids=["ring", "lazy"])
def test_largest_steps_are_where_the_recursions_turn(name, make_matrix):
    W = make_matrix(6)
    values = np.linalg.eigvalsh(W)
    if name in ("exact_diffusion", "extra") and values[0] <= -1 / 3 + 1e-9:
        assert float(getattr(corrections, name)().largest_step(values)) <= 1e-9 or name == "exact_diffusion"
        return
    bound = float(getattr(corrections, name)().largest_step(values))
    ends = []
    for part in (0.95, 1.05):
        move, s = PRACTICAL[name](), np.random.default_rng(0).normal(size=(6, 2))
        for _ in range(600):
            s = move(W, s, s, part * bound)
        ends.append(np.linalg.norm(s))
    assert ends[0] < 1e-2 < 10 < ends[1]


@pytest.mark.parametrize("eigenvalue", [1.0, 0.4, -0.5])
@pytest.mark.parametrize(("name", "mixes"), [("tracking_non_atc", 0), ("tracking", 1), ("tracking_atc", 2)])
def test_largest_steps_of_damped_tracking(name, mixes, eigenvalue):
    rate = 0.5
    bound = float(getattr(corrections, name)(rate).largest_step([eigenvalue]))

    def radius(a):  # of (s, m) with m = W t, or m = t where W t is what moves s
        s, t = np.eye(2)
        if mixes == 2:
            t = eigenvalue * (t + s)  # t + d, of which d_last is subtracted below
            new = (1 - rate) * s + rate * eigenvalue * (s - a * t)
            return max(abs(np.linalg.eigvals(np.stack([new, t - s]))))
        t = t + s
        moved = eigenvalue * (s - a * t) if mixes else eigenvalue * s - a * t
        return max(abs(np.linalg.eigvals(np.stack([(1 - rate) * s + rate * moved, eigenvalue * t - s]))))

    assert radius(0.99 * bound) <= 1 + 1e-9
    assert radius(1.01 * bound) > 1


def test_refusals():
    make = preset(RING, None)
    start = (PROBLEM, RING, X, Y, BATCH)
    with pytest.raises(ValueError, match="make must be a function"):
        suggest_step_sizes(0.1, *start, KEY)
    with pytest.raises(ValueError, match="pilots must be an int >= 1; got 0"):
        suggest_step_sizes(make, *start, KEY, pilots=0)
    with pytest.raises(ValueError, match="warm_up must be an int >= 10; got 5"):
        suggest_step_sizes(make, *start, KEY, warm_up=5)
    with pytest.raises(ValueError, match="what make returns must be an Algorithm; got 1"):
        suggest_step_sizes(lambda step_sizes: 1, *start, KEY)
    with pytest.raises(ValueError, match="make must take step sizes that are traced numbers"):
        suggest_step_sizes(lambda steps: bx.decentralized.sldbo(PROBLEM, RING, float(steps.x)), *start, KEY)
    with pytest.raises(ValueError, match="lowest must be one number"):
        suggest_step_sizes(make, *start, KEY, lowest=X)
    for key in (None, 0, jax.random.split(KEY, 3)):
        with pytest.raises(ValueError, match="key"):
            suggest_step_sizes(make, *start, key)
    with pytest.raises(ValueError, match="problem must be a BilevelProblem"):
        suggest_step_sizes(make, 1, RING, X, Y, BATCH, KEY)
    with pytest.raises(ValueError, match="gossip must be a Gossip"):
        suggest_step_sizes(make, PROBLEM, 1, X, Y, BATCH, KEY)
    with pytest.raises(ValueError, match="batch must be a Batch"):
        suggest_step_sizes(make, PROBLEM, RING, X, Y, None, KEY)
    with pytest.raises(ValueError, match="correction must be a Correction"):
        suggest_step_sizes(make, *start, KEY, correction=1)
    with pytest.raises(ValueError, match=r"x must have leaves \[8, ...\]"):
        suggest_step_sizes(make, PROBLEM, RING, X[0], Y, BATCH, KEY)
    compressed = compression.choco(RING, compression.top_k(0.5), gossip_step=0.3)
    with pytest.raises(ValueError, match="gossip must send its messages as they are"):
        suggest_step_sizes(make, PROBLEM, compressed, X, Y, BATCH, KEY)

    sequence = bx.gossip(bx.topology.one_peer_exponential(N))
    copying = sequence._replace(init=lambda tree: (sequence.init(tree), tree))
    with pytest.raises(ValueError, match="gossip must send its messages as they are"):
        average(copying, 0.1)

    def without_v(step_sizes):
        steps = bx.Levels(step_sizes.x, step_sizes.y)
        return bx.decentralized.mdbo(
            PROBLEM, RING, steps, sample=bx.sampling.full, momentum=1.0, rate=1.0, terms=1, inverse_step=0.1
        )

    with pytest.raises(ValueError, match="make must return a method whose state has x, y and v"):
        suggest_step_sizes(without_v, *start, KEY)

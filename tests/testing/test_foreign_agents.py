"""A correction, an estimator, a gossip and a method of somebody else, and broken ones that fail by name.

They are written with public names alone, as a reader of the documentation would write them.
"""

import functools
from typing import Any, NamedTuple

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import testing
from bilevax.testing import estimator
from bilevax.testing._contract import name_of

SUBSET = bx.topology.lazy(bx.topology.ring(4))
DIRECTED = testing.placement.DIRECTED


# A correction: tracking whose tracker is a moving average, which keeps its mean


class Memory(NamedTuple):
    gossip: Any
    move: Any
    tracker: Any
    last: Any


def undivided(gossip, state, d):
    return d


def divided(gossip, state, d):
    """By push-sum weights, which is for the engine to do."""
    return gossip.debias(state, d)


def heavy_tracking(sign=1.0, divide=undivided, extra_bytes=0.0, rounds=1, wider=False, meet=lambda s: s):
    """t = W t_last + d − d_last, s⁺ = W (s − a t); what is passed in breaks it."""

    def init(gossip, s, move):
        zeros = optax.tree.zeros_like(s)
        return Memory(gossip.init((s, zeros)), move.init(s), zeros, zeros)

    def update(key, state, gossip, s, d, move, k):
        change = divide(gossip, state.gossip, optax.tree.sub(d, state.last))
        t = optax.tree.add_scale(state.tracker, sign, change)
        step, moved = move.apply(t, state.move, s)
        message = (meet(optax.apply_updates(s, step)), t)
        (new, tracker), mixing = gossip.mix(key, state.gossip, message)
        if wider:
            tracker = optax.tree.cast(tracker, jnp.float32)
        sent = bx.single_loop.correction.Sent(gossip.bytes(state.gossip, message) + extra_bytes, rounds)
        return new, Memory(mixing, moved, tracker, d), sent

    return bx.single_loop.correction.Correction(init, update)


def one_state_for_two_messages():
    """The same, in two messages which share the state of one gossip."""

    def init(gossip, s, move):
        zeros = optax.tree.zeros_like(s)
        return Memory(gossip.init(s), move.init(s), zeros, zeros)

    def update(key, state, gossip, s, d, move, k):
        t = optax.tree.add(state.tracker, optax.tree.sub(d, state.last))
        step, moved = move.apply(t, state.move, s)
        message = optax.apply_updates(s, step)
        new, mixing = gossip.mix(key, state.gossip, message)
        tracker, _ = gossip.mix(key, state.gossip, t)
        sent = gossip.bytes(state.gossip, message) + gossip.bytes(state.gossip, t)
        return new, Memory(mixing, moved, tracker, d), bx.single_loop.correction.Sent(sent, 2)

    return bx.single_loop.correction.Correction(init, update)


def to_their_mean(s):
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf.mean(0), leaf.shape), s)


def test_a_foreign_correction_passes():
    testing.check_correction(heavy_tracking())


@pytest.mark.parametrize(
    "make",
    [bx.single_loop.correction.extra, bx.single_loop.correction.exact_diffusion],
    ids=["extra", "exact_diffusion"],
)
def test_a_correction_that_refuses_a_graph_is_told_to_leave_it_out(make):
    fix = r"Pass topologies=\[bx.topology.lazy\(bx.topology.ring\(4\)\)\]"
    with pytest.raises(ValueError, match=rf"got Topology\(.*directed=True\), which it refuses: .*symmetric W.* {fix}"):
        testing.check_correction(make())
    testing.check_correction(make(), topologies=[SUBSET])


def test_a_correction_that_refuses_all_graphs_breaks_a_contract():
    def init(gossip, s, move):
        raise ValueError("no graph will do")

    faulty = heavy_tracking()._replace(init=init)
    with pytest.raises(
        testing.ContractError, match=r"^a Correction over Topology.*`state_keeps_its_form`.\nseen: Value"
    ):
        testing.check_correction(faulty)


def test_a_broken_correction_is_told_over_which_graph():
    with pytest.raises(testing.ContractError, match=r"^a Correction over Topology\(.*directed=True\) breaks"):
        testing.check_correction(heavy_tracking(divide=divided))


def test_a_gossip_state_for_two_messages_is_refused_where_it_is_wrong():
    """Where W is one fixed matrix there is no state to share."""
    testing.check_correction(one_state_for_two_messages(), topologies=[SUBSET])
    for topology in (DIRECTED, bx.topology.one_peer_exponential(4)):
        with pytest.raises(ValueError, match="state of a gossip must mix one message once in an update; got one that"):
            testing.check_correction(one_state_for_two_messages(), topologies=[topology])


CORRECTIONS = {
    "a sign in the tracker": ("mean_moves_along_the_mean_direction", {"sign": -1.0}, SUBSET),
    "a division by the weights": ("limit_is_that_of_the_mean_loss", {"divide": divided}, DIRECTED),
    "bytes": ("bytes_and_rounds_are_those_of_its_messages", {"extra_bytes": -8.0}, SUBSET),
    "rounds": ("bytes_and_rounds_are_those_of_its_messages", {"rounds": 2}, SUBSET),
    "another dtype": ("state_keeps_its_form", {"wider": True}, SUBSET),
    "agents that meet without gossip": ("placement_changes_nothing", {"meet": to_their_mean}, SUBSET),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_broken_correction_fails_by_name(name):
    contract, fault, topology = CORRECTIONS[name]

    def check(contracts):
        testing.check_correction(heavy_tracking(**fault), topologies=[topology], contracts=contracts)

    foreign.broken(check, testing.correction, contract, name)


# An estimator: recursive momentum with a coin of its own


def always(key):
    return True


def recursive(
    again=False, counted=2, coin=always, agents=lambda oracle: oracle.gossip.agents(), scale=1.0, rest=lambda u: u
):
    """u = (1 − 0.3) (u − d(previous; ξ)) + d(here; ξ), for all agents where a coin says so."""
    sample = bx.sampling.minibatch(2)

    def init(oracle, point, batch):
        return oracle.evaluate(point, batch)

    def update(key, state, oracle, point, batch, k):
        drawn = bx.single_loop.estimator.draw(key, sample, k, batch, agents(oracle))
        other = (
            bx.single_loop.estimator.draw(jax.random.fold_in(key, 1), sample, k, batch, agents(oracle))
            if again
            else drawn
        )
        a = jnp.where(k == 0, 1.0, 0.3)

        def fresh():
            then, now = oracle.evaluate(oracle.previous, other), oracle.evaluate(point, drawn)
            return jax.tree.map(lambda u, then, now: (1 - a) * (u - then) + scale * now, state, then, now)

        tossed = coin(jax.random.fold_in(key, 2))
        u = jax.lax.cond(tossed, fresh, lambda: rest(state))
        return u, u, jnp.full(point.x.shape[:1], counted) * tossed

    return bx.single_loop.estimator.Estimator(init, update, remembers=True)


def half_the_time(key):
    return jax.random.bernoulli(key, 0.5)


def test_a_foreign_estimator_passes():
    testing.check_estimator(recursive())


def test_a_foreign_estimator_with_a_coin_passes_all_contracts_but_one():
    kept = [one for one in estimator.CONTRACTS if one.name != "settles_where_the_point_settles"]  # STORM with a coin
    testing.check_estimator(recursive(coin=half_the_time), kept)


ESTIMATORS = {
    "a sample drawn twice": ("one_sample_at_both_points", {"again": True}),
    "one evaluation counted": ("evaluations_are_those_that_were_run", {"counted": 1}),
    "a coin that chooses nobody": ("settles_where_the_point_settles", {"coin": lambda key: False}),
    "one draw for all": ("agents_draw_apart", {"agents": lambda oracle: 0 * oracle.gossip.agents()}),
    "ids of a device": (
        "placement_changes_nothing",
        {"agents": lambda oracle: jnp.arange(oracle.gossip.agents().size)},
    ),
    "an estimate that fades": (
        "who_does_not_evaluate_keeps_its_estimate",
        {"coin": half_the_time, "rest": lambda u: optax.tree.scale(0.9, u)},
    ),
    "another dtype": ("state_keeps_its_form", {"scale": np.ones(())}),
    "sums for means": ("first_estimate_is_unbiased", {"scale": 2.0}),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_broken_estimator_fails_by_name(name):
    contract, fault = ESTIMATORS[name]
    foreign.broken(functools.partial(testing.check_estimator, recursive(**fault)), testing.estimator, contract, name)


# A gossip: two rounds in one


def twice(plain, keep=0.0):
    """W² in place of W, which takes two rounds."""

    def mix(key, state, tree):
        once, state = plain.mix(key, state, tree)
        mixed, state = plain.mix(key, state, once)
        return jax.tree.map(lambda new, old: (1 - keep) * new + keep * jnp.abs(old), mixed, tree), state

    return plain._replace(mix=mix, bytes=lambda state, tree: 2 * plain.bytes(state, tree))


def once_more(plain):
    """Plain gossip that says it sends twice."""
    return plain._replace(bytes=lambda state, tree: 2 * plain.bytes(state, tree))


def then(plain, name, change):
    """Plain gossip whose mixing or Laplacian is changed afterwards."""

    def changed(*arguments):
        tree, state = getattr(plain, name)(*arguments)
        return change(tree), state

    return plain._replace(**{name: changed})


def test_a_foreign_gossip_passes():
    testing.check_gossip(twice(bx.gossip(bx.topology.ring(5))), compressed=True)


RING, PUSHED = bx.gossip(bx.topology.ring(5)), bx.agents.push_sum(DIRECTED)
GOSSIPS = {
    "another dtype": ("state_keeps_its_form", then(RING, "mix", lambda tree: optax.tree.cast(tree, jnp.float32))),
    "a matrix of its own": ("mixing_is_the_matrix", twice(RING)),
    "a mean that is lost": ("mean_is_kept", twice(RING, keep=0.1)),
    "nothing is mixed": ("rounds_approach_the_mean", RING._replace(mix=lambda key, state, tree: (tree, state))),
    "a sign": ("laplacian_is_the_rest", then(RING, "laplacian", lambda tree: optax.tree.scale(-1, tree))),
    "a sum for a mean": ("agents_and_mean_are_all_of_them", RING._replace(mean=functools.partial(jax.tree.map, sum))),
    "bytes": ("bytes_are_those_to_all_neighbours", once_more(RING)),
    "no division by the weights": ("mixing_is_the_matrix", PUSHED._replace(weights=lambda state: None)),
    "weights of another sum": ("mean_is_kept", PUSHED._replace(weights=lambda state: 2 * state[1])),
}


@pytest.mark.parametrize("name", GOSSIPS)
def test_a_broken_gossip_fails_by_name(name):
    contract, value = GOSSIPS[name]
    foreign.broken(lambda contracts: testing.check_gossip(value, contracts=contracts), testing.gossip, contract, name)


# A method: descent along the exact directions on x and y, which keeps only what it must


class State(NamedTuple):
    k: Any
    x: Any
    y: Any
    v: Any
    gossip: Any


def plain_descent(
    problem, gossip, steps, sample, counted=1, couple=False, double=False, scale=lambda: 1.0, count=1, show=jnp.asarray
):
    """s ← W (s − a d) on a fresh sample; what is passed in breaks it."""

    def init(x, y, batch=None):
        start = jnp.zeros((), jnp.int32)
        return State(start, x, y, optax.tree.zeros_like(y), gossip.init((x, y, y)))

    def step(key, state, batch):
        point = state.x, state.y, state.v
        drawn = bx.single_loop.estimator.draw(key, sample, state.k, batch, gossip.agents())
        d = jax.vmap(lambda x, y, v, data: bx.problem.directions(problem, x, y, v, data))(*point, drawn)
        if double:
            again = bx.single_loop.estimator.draw(jax.random.fold_in(key, 1), sample, state.k, batch, gossip.agents())
            more = jax.vmap(lambda x, y, v, data: bx.problem.directions(problem, x, y, v, data))(*point, again)
            d = jax.tree.map(lambda a, b: (a + b) / 2, d, more)
        if couple:
            d = jax.tree.map(lambda leaf: leaf - leaf.mean(0)[None] / 2, d)
        rates = scale() * steps.x, steps.y, steps.v(state.k)
        moved = [
            jax.tree.map(lambda s, d, a=a: (s - a * d).astype(s.dtype), s, d)
            for s, d, a in zip(point, d, rates, strict=True)
        ]
        mixed, mixing = gossip.mix(key, state.gossip, tuple(moved))
        new = State(state.k + count, *mixed, mixing)
        lengths = bx.Levels(
            *(jax.vmap(optax.tree.norm)(optax.tree.sub(a, b)) for a, b in zip(mixed, point, strict=True))
        )
        ones = jnp.ones(gossip.agents().shape)
        calls = bx.problem.Calls(ones * counted, ones, ones, ones)
        breakdown = show(~jnp.isfinite(sum(lengths)))
        return new, bx.single_loop.Info(lengths, breakdown, calls, gossip.bytes(state.gossip, tuple(moved)), 1)

    return bx.problem.Algorithm(init, step)


def fault(**faults):
    return lambda problem, gossip, steps, sample: plain_descent(problem, gossip, steps, sample, **faults)


def test_a_foreign_method_passes():
    testing.check_algorithm(plain_descent, calls=(1, 1, 1, 1))


def keeping_a_key(problem, gossip, steps, sample):
    sound = plain_descent(problem, gossip, steps, sample)

    def init(x, y, batch=None):
        state = sound.init(x, y)
        return state._replace(gossip=(state.gossip, jax.random.key(0)))

    def step(key, state, batch):
        mixing, kept = state.gossip
        new, info = sound.step(kept, state._replace(gossip=mixing), batch)
        return new._replace(gossip=(new.gossip, kept)), info

    return bx.problem.Algorithm(init, step)


def nobody(problem, gossip, steps, sample):
    return bx.decentralized.s3ldbo(
        problem, gossip, steps, coins=lambda key, k, gossip: jnp.zeros(gossip.agents().shape, bool)
    )


def other_bits(problem, gossip, steps, sample):
    """Under `jax.vmap`, keys of this kind draw what the first of them draws."""

    def draw(key, t, data):
        return sample(jax.random.wrap_key_data(jnp.tile(jax.random.key_data(key), 2), impl="rbg"), t, data)

    return plain_descent(problem, gossip, steps, draw)


METHODS = {
    "calls counted wrongly": ("calls_are_those_declared", fault(counted=2)),
    "a sample drawn twice": ("calls_are_those_of_the_compiled_program", fault(double=True)),
    "agents that meet without gossip": ("placement_changes_nothing", fault(couple=True)),
    "a level that stays": ("every_agent_moves", fault(scale=lambda: 0.0)),
    "a breakdown that is hidden": ("nan_is_reported_by_the_agent_that_has_it", fault(show=jnp.zeros_like)),
    "a draw outside of the trace": ("scan_equals_a_loop", fault(scale=np.random.default_rng(0).uniform)),
    "one key for all": ("vmap_over_keys_equals_a_loop", other_bits),
    "another dtype": ("state_keeps_its_form", fault(count=1.0)),
    "two dtypes": ("debuggers_find_nothing", fault(scale=lambda: np.float32(1.0))),
    "a key in the state": ("state_is_made_of_arrays", keeping_a_key),
    "a counter that stands still": ("ten_steps_are_one_trace", fault(count=0)),
    "a coin that chooses nobody": ("somebody_evaluates", nobody),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_broken_method_fails_by_name(name):
    contract, make = METHODS[name]

    def check(contracts):
        testing.check_algorithm(make, calls=(1, 1, 1, 1), contracts=contracts)

    foreign.broken(check, testing.algorithm, contract, name)


TABLES = {"correction": CORRECTIONS, "estimator": ESTIMATORS, "gossip": GOSSIPS, "algorithm": METHODS}


@pytest.mark.parametrize("kind", TABLES)
def test_each_contract_has_a_broken_method(kind):
    table = TABLES[kind]
    foreign.same_names(table, (row[0] for row in table.values()), getattr(testing, kind).CONTRACTS)


def test_a_method_that_solves_another_problem_is_told_which():
    """Each agent inverts its own Hessian: it says x*, and ends at x_l."""
    q = testing.problems.quadratic(0)
    ring = bx.gossip(bx.topology.lazy(bx.topology.ring(8)))
    method = bx.decentralized.mdbo(
        q.problem, ring, (0.05, 0.1), sample=bx.sampling.full, momentum=0.5, rate=0.5, terms=50, inverse_step=0.28
    )
    with pytest.raises(testing.ContractError, match=r"`limit_is_the_declared_one`[\s\S]*e-1\d from x_l"):
        testing.check_limit(method, q, q.x_star)
    testing.check_limit(method, q, q.x_l)


def limit(agents=8, step=0.1):
    q = testing.problems.quadratic(0)
    method = bx.decentralized.sldbo(q.problem, bx.gossip(bx.topology.ring(agents)), step)
    testing.check_limit(method, q, q.x_star, iterations=500)


def test_a_method_that_diverges_is_told_to_take_smaller_steps():
    with pytest.raises(testing.ContractError, match=r"`x_is_finite`.\nseen: x is not finite\n.*: Take smaller steps"):
        limit(step=100.0)


def test_a_method_over_other_agents_is_told_how_many_are_meant():
    with pytest.raises(ValueError, match="Make the method over 8 agents"):
        limit(agents=4)


def test_a_difference_is_said_in_one_line():
    with pytest.raises(AssertionError, match=r"^v\['a'\] differs by up to 0.5 \(50 %\) at \[1, 0\]: 1.5, expected 1$"):
        testing.trees.close("v", {"a": jnp.asarray([[1.0], [1.5]])}, {"a": jnp.ones((2, 1))})
    with pytest.raises(AssertionError, match=r"^v differs by up to inf: nan, expected 0$"):
        testing.trees.close("v", jnp.nan, 0.0)
    with pytest.raises(AssertionError, match=r"^v has shape \(2,\), expected \(3,\)$"):
        testing.trees.close("v", jnp.ones(2), jnp.ones(3))
    testing.trees.close("v", (jnp.nan, jnp.inf), (jnp.nan, jnp.inf))


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (heavy_tracking(), "a Correction"),
        (functools.partial(functools.partial(plain_descent)), "plain_descent"),
        (3, "an int"),
    ],
    ids=["value", "partial", "int"],
)
def test_what_a_message_calls_a_method(value, name):
    assert name_of(value) == name


@pytest.mark.skipif(not testing.compiled.READABLE, reason=foreign.UNREADABLE)
def test_a_method_with_branches_passes_if_it_says_so():
    """Once in three iterations the full directions, else two on a sample: the program has both branches."""

    def branches(problem, gossip, steps, sample):
        return bx.single_loop.single_loop(
            problem, gossip, steps, bx.single_loop.estimator.spider(every=3, sample=sample), heavy_tracking()
        )

    compiled = [testing.algorithm.calls_are_those_of_the_compiled_program]
    calls = testing.algorithm.calls_are_those_declared
    testing.check_algorithm(branches, (1.6,) * 4, contracts=[calls, *compiled], counted=False)
    with pytest.raises(testing.ContractError, match=r"branch of a cond[\s\S]*say counted=False"):
        testing.check_algorithm(branches, (1.6,) * 4, contracts=compiled)


def by_sample(problem, gossip, step_sizes, sample):
    return bx.decentralized.sldbo(problem, gossip, step_sizes, radius=sample)


MISUSE = {  # none is a broken contract
    "a constructor of corrections": (
        testing.check_correction,
        (bx.single_loop.correction.tracking,),
        "Correction; got tracking",
    ),
    "no graph": (testing.check_correction, (heavy_tracking(), True, []), "topologies must hold at least one graph"),
    "eight agents": (testing.check_correction, (heavy_tracking(), True, [bx.topology.ring(8)]), "must have 4 agents"),
    "a constructor of estimators": (
        testing.check_estimator,
        (bx.single_loop.estimator.stochastic,),
        "Estimator; got stochastic",
    ),
    "a graph": (testing.check_gossip, (bx.topology.ring(4),), r"must be a Gossip; got Topology.*bx.gossip\(topology\)"),
    "one machine": (testing.check_algorithm, (bx.algorithms.soba,), r"function \(problem, gossip, step_sizes, sample="),
    "a preset": (
        testing.check_algorithm,
        (bx.decentralized.sldbo,),
        r"function \(problem, gossip, step_sizes, sample=",
    ),
    "no sampler": (
        testing.check_algorithm,
        (by_sample,),
        "got by_sample, which says: radius.* wrap it",
    ),
    "no method": (testing.check_algorithm, (lambda *parts, sample: None,), "must be an Algorithm; got None"),
    "one number of calls": (testing.check_algorithm, (plain_descent, 3), "calls must be four numbers"),
    "five agents": (testing.check_algorithm, (plain_descent, None, bx.topology.ring(5)), "must have 4 agents"),
    "no contracts": (testing.check_correction, (heavy_tracking(), True, [SUBSET], []), "hold at least one Contract"),
    "other contracts": (testing.check_estimator, (recursive(), testing.gossip.CONTRACTS), "about an EstimatorSubject"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_no_broken_contract(name):
    check, arguments, message = MISUSE[name]
    with pytest.raises(ValueError, match=message):
        check(*arguments)

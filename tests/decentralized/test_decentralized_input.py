"""Every bad input of a decentralized method gets a message that helps."""

import functools
import re

import jax
import jax.numpy as jnp
import networks
import optax
import pytest
from cases import (
    BATCH,
    ED,
    EXTRA,
    GT,
    KEY,
    LAZY_RING,
    LAZY_SQUARE,
    TOY_RING,
    TOY_SLDBO,
    TOY_STEPS,
    WITHOUT_V,
    X,
    Y,
    make,
    steps_of,
)
from networks import lazy, ring

import bilevax as bx
from bilevax import coins, decentralized
from bilevax.single_loop import correction, estimator, single_loop
from bilevax.testing import placement
from bilevax.testing.problems._quadratic import PROBLEM

IMAGES = bx.BilevelProblem(lambda x, y, batch: jnp.sum(x["w"] * y), lambda x, y, batch: jnp.sum((x["w"] - y) ** 2))
DIRECTED = placement.DIRECTED.matrix.toarray()


def start(x, y=Y, batch=BATCH, problem=PROBLEM):
    return lambda: decentralized.sldbo(problem, TOY_RING, TOY_STEPS).init(x, y, batch)


def steps(step_sizes):
    return lambda: decentralized.sldbo(PROBLEM, TOY_RING, step_sizes)


def corrected(*forms, gossip=TOY_RING):
    return lambda: decentralized.sparkle(
        PROBLEM, gossip, TOY_STEPS, correction=bx.Levels(*(form() for form in forms))
    ).init(X, Y)


def keyless(preset, **choices):
    method = preset(PROBLEM, TOY_RING, steps_of(preset, TOY_STEPS), **choices)

    def step():
        state = jax.eval_shape(method.init, X, Y, BATCH)
        jax.eval_shape(functools.partial(method.step, None), state, BATCH)

    return step


def stepped(method):
    method = method()
    return method.step(None, method.init(X, Y, BATCH), BATCH)


BAD = {
    "x_leading_axis": (r"\bx\b.*\(3, 1\)", start(X[:3])),
    "y_leading_axis": (r"\by\b.*\(5, 1\)", start(X, jnp.zeros((5, 1)))),
    "leaf_of_x": (r"x\['w'\]", start({"w": jnp.zeros(2)}, Y[:, 0], bx.Batch(X, X), IMAGES)),
    "scalar_leaf": (r"\bx\b.*\(\)", start(jnp.array(0.0))),
    "batch_at_init": (r"batch.inner\['A'\]", start(X, batch=BATCH._replace(inner={"A": X[:3]}))),
    "batch_is_no_batch": (r"bx\.Batch", start(X, batch=BATCH.inner)),
    "integer_x": ("int", start(X.astype(int))),
    "probability_zero": (r"^probability.*0\.0", lambda: coins.independent(0.0)),
    "probability_above_one": (r"^probability.*1\.5", lambda: coins.independent(1.5)),
    "probability_negative": (r"^probability.*-0\.1", lambda: coins.common(-0.1)),
    "probability_of_a_subset": (r"^probability.*1\.01", lambda: coins.subset(1.01)),
    "probability_of_a_turn": (r"^probability.*0", lambda: coins.cyclic(0)),
    "blocks_in_turn": ("block.*block=2", lambda: coins.cyclic(0.5, block=6)(None, 0, TOY_RING)),
    "probability_of_one_agent": (r"^probability.*\(0, 1\]", lambda: coins.independent(jnp.array([0.5, 0.0]))),
    "probability_not_a_number": (r"^probability.*nan", lambda: coins.independent(float("nan"))),
    "probability_of_other_agents": (
        r"^probability.*\(3,\)",
        lambda: coins.independent(jnp.full(3, 0.5))(KEY, 0, TOY_RING),
    ),
    "probability_common_to_nobody": (r"coins\.independent", lambda: coins.common(jnp.full(4, 0.5))),
    "probability_unbiased": (
        r"^probability",
        lambda: decentralized.s3ldbo_unbiased(PROBLEM, TOY_RING, TOY_STEPS, probability=0.0),
    ),
    "blocks": ("block.*block=2", lambda: coins.subset(0.5, block=6)(KEY, 0, TOY_RING)),
    "blocks_of_nobody": ("coins.independent", lambda: coins.subset(0.5, block=3)(KEY, 0, TOY_RING)),
    "four_step_sizes": ("step_sizes.*tuple of 4", steps((0.1, 0.2, 0.3, 0.4))),
    "no_step_size_of_v": ("step_sizes must hold.*got None for v", steps((0.1, 0.2))),
    "negative_step_size": (r"step_sizes\.y.*-0\.1", steps((0.1, -0.1, 0.1))),
    "step_size_of_a_failed_search": (r"step_sizes\.x.*suggest_step_sizes.*breakdown", steps((jnp.nan, 0.1, 0.1))),
    "step_sizes_by_name": ("step_sizes.*dict", steps({"x": 0.1, "y": 0.1, "v": 0.1})),
    "nested_step_sizes": ("step_sizes", steps((0.1, {"w": 0.1}, 0.1))),
    "radius": ("radius.*-1", lambda: decentralized.sldbo(PROBLEM, TOY_RING, TOY_STEPS, radius=-1.0)),
    "exact_diffusion_on_an_even_ring": ("lazy", corrected(ED, ED, ED)),
    "extra_on_an_even_ring": (r"-0\.333.*lazy", corrected(GT, GT, EXTRA)),
    "exact_diffusion_on_changing_graphs": (
        "tracking",
        corrected(GT, ED, GT, gossip=bx.gossip(networks.topology(*[lazy(ring(4))] * 2))),
    ),
    "extra_on_an_asymmetric_graph": (
        "symmetric.*tracking",
        corrected(GT, EXTRA, GT, gossip=bx.gossip(networks.topology(lazy(networks.doubly_stochastic(1, 4))))),
    ),
    "transformation_of_exact_diffusion": (
        "tracking",
        lambda: decentralized.sparkle(PROBLEM, LAZY_SQUARE, optax.adam(0.1), correction=ED()).init(X, Y),
    ),
    "graphs_of_different_sizes": (
        r"\[4, 8, 4\]",
        lambda: decentralized.sldbo(PROBLEM, (TOY_RING, LAZY_RING, TOY_RING), TOY_STEPS),
    ),
    "gossip_is_a_topology": ("bx.gossip", lambda: decentralized.sldbo(PROBLEM, bx.topology.ring(4), TOY_STEPS)),
    "directed_graph": ("push_sum", lambda: bx.gossip(networks.topology(DIRECTED)._replace(directed=True))),
    "no_batch_at_init": (
        r"batch.*init\(x, y, batch\)",
        lambda: decentralized.s3ldbo(PROBLEM, TOY_RING, TOY_STEPS, coins=coins.independent(0.5)).init(X, Y),
    ),
    "no_key_for_a_mask": (r"key.*jax\.random\.key", keyless(decentralized.s3ldbo, coins=coins.independent(0.5))),
    "no_key_for_one_coin": (r"key.*jax\.random\.key", keyless(decentralized.s3ldbo, coins=coins.common(0.5))),
    "no_key_for_a_subset": (r"key.*jax\.random\.key", keyless(decentralized.s3ldbo, coins=coins.subset(0.5))),
    "no_key_for_a_minibatch": (r"key.*jax\.random\.key", keyless(decentralized.dsoba, sample=bx.sampling.minibatch(1))),
    "coins_no_function": ("coins.*0.5", lambda: decentralized.s3ldbo(PROBLEM, TOY_RING, TOY_STEPS, coins=0.5)),
    "coins_of_another_length": (
        r"bool \[4\].*bool \[3\]",
        keyless(decentralized.s3ldbo, coins=lambda key, k, gossip: jnp.ones(3, bool)),
    ),
    "coins_that_are_probabilities": (
        "coins.*float",
        keyless(decentralized.s3ldbo, coins=lambda key, k, gossip: jnp.full(4, 0.5)),
    ),
    "momentum": ("momentum.*-0.1", make(decentralized.dsvrbgd, sample=bx.sampling.full, momentum=-0.1, rate=0.5)),
    "one_step_size_per_agent": (
        r"step_sizes\.x must be one number; got shape \(4,\).*vmap",
        steps((jnp.ones(4), 0.1, 0.1)),
    ),
    "a_row_of_step_sizes": (r"step_sizes\.x must be one number; got shape \(3,\)", steps(jnp.ones(3))),
    "optimizer_not_called": ("schedule must be one number; got", lambda: stepped(steps(optax.sgd))),
    "schedule_of_vectors": (
        r"schedule must be one number; got shape \(2,\)",
        lambda: stepped(steps(lambda k: jnp.ones(2))),
    ),
    "schedule_of_two_arguments": (r"step_sizes\.x must be a function \(k\)", steps(lambda k, n: 0.1)),
    "gradient_accumulation": ("gradient_transformation", steps(optax.MultiSteps(optax.sgd(0.1), 2))),
    "one_rate_per_agent": ("rate must be one number", lambda: correction.tracking(jnp.ones(4))),
    "one_radius_per_agent": (
        "radius must be one number",
        lambda: decentralized.sldbo(PROBLEM, TOY_RING, TOY_STEPS, radius=jnp.ones(4)),
    ),
    "correction_in_place_of_radius": (
        "radius must be one number; got tracking",
        lambda: decentralized.sldbo(PROBLEM, TOY_RING, TOY_STEPS, radius=GT()),
    ),
    "one_id": (
        r"coins must return.*int32 \[\]",
        keyless(decentralized.s3ldbo, coins=lambda key, k, gossip: k % 4),
    ),
    "swapped_arguments": ("state must be a State; got None", lambda: TOY_SLDBO.step(TOY_SLDBO.init(X, Y), None, BATCH)),
    "number_as_key": ("key must be one jax.random.key", lambda: TOY_SLDBO.step(0, TOY_SLDBO.init(X, Y), BATCH)),
    "no_order": (
        "order must name",
        lambda: single_loop(PROBLEM, TOY_RING, 0.1, estimator.full(), GT(), order=None),
    ),
    "an_algorithm_for_one_agent": (
        r"make_algorithm must be a function \(gossip\)",
        lambda: bx.algorithms.one_agent(bx.algorithms.soba(PROBLEM, 0.1)),
    ),
    "gossip_of_other_agents": (r"tree must have leaves \[4, ...\]", lambda: TOY_RING.mix(None, (), jnp.ones(5))),
    "gossip_of_integers": ("tree must hold floating-point", lambda: TOY_RING.mix(None, (), jnp.arange(4))),
    "rate": ("rate.*1.5", make(decentralized.dsvrbgd, sample=bx.sampling.full, momentum=0.1, rate=1.5)),
    "momentum_zero": ("momentum.*0.0", make(decentralized.dsoba, sample=bx.sampling.full, momentum=0.0)),
    "order": (
        "order",
        lambda: single_loop(PROBLEM, TOY_RING, 0.1, estimator.full(), GT(), order=(("y",), ("x",))),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    message, call = BAD[name]
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)) as error:
        call(*([PROBLEM, TOY_RING] if name in ("momentum", "rate", "momentum_zero") else []))
    assert len(str(error.value)) > 40


# The rest of the field: each row a method, what it is given, and what the message names

FULL, WHOLE, RECURSIVE = bx.sampling.full, bx.agents.compression.top_k(1.0), ("mdbo", "vrdbo")
SERIES = {"terms": 3, "inverse_step": 0.1}
RIGHT = {
    **{name: {"sample": FULL, "momentum": 0.1, "rate": 0.5, **SERIES} for name in RECURSIVE},
    "interact": SERIES,
    "interact_svr": {"every": 2, "sample": FULL, **SERIES},
    "diamond": {"sample": FULL, "momentum": 0.5, **SERIES},
    "lopa_local": {"sample": FULL},
    "lopa_tracking": {"sample": FULL},
    "dsoba_first_order": {"sample": FULL},
    "ma_dsbo": {"steps": 2, "v_steps": 2},
    "gbdsbo": {"sample": FULL},
    "c2dfb": {"steps": 2, "multiplier": 10.0, "compressor": WHOLE, "gossip_step": 0.5},
    "adasdbo": {"sample": FULL},
    "sldbo": {},
    "dsvrbgd": {"sample": FULL, "momentum": 0.1},
}
FIELD = {
    **{f"{name}_momentum": ("momentum.*-0.1", name, {"momentum": -0.1}) for name in RECURSIVE},
    **{f"{name}_rate": ("rate.*0.0", name, {"rate": 0.0}) for name in RECURSIVE},
    **{f"{name}_terms": ("terms.*-1", name, {"terms": -1}) for name in RECURSIVE},
    **{f"{name}_inverse_step": ("inverse_step.*0.0", name, {"inverse_step": 0.0}) for name in RECURSIVE},
    **{f"{name}_sample": (r"sample must be a function \(key", name, {"sample": None}) for name in RECURSIVE},
    "interact_terms": ("terms must be a static Python int.*float", "interact", {"terms": 1.5}),
    "interact_inverse_step": ("inverse_step.*-0.1", "interact", {"inverse_step": -0.1}),
    "interact_svr_every": ("every.*0", "interact_svr", {"every": 0}),
    "interact_svr_sample": (r"sample must be a function \(key", "interact_svr", {"sample": 16}),
    "diamond_momentum": ("momentum.*1.5", "diamond", {"momentum": 1.5}),
    "diamond_terms": ("terms", "diamond", {"terms": "3"}),
    "diamond_inverse_step": ("inverse_step.*nan", "diamond", {"inverse_step": float("nan")}),
    "diamond_no_correction": ("^correction.*bx.single_loop.correction", "diamond", {"correction": 0.5}),
    "lopa_local_momentum": ("momentum.*0.0", "lopa_local", {"momentum": 0.0}),
    "lopa_tracking_momentum": ("momentum.*1.1", "lopa_tracking", {"momentum": 1.1}),
    "dsoba_first_order_mu": ("^mu.*0.0", "dsoba_first_order", {"mu": 0.0}),
    "dsoba_first_order_mus": ("^mu must be one number", "dsoba_first_order", {"mu": jnp.ones(3)}),
    "dsoba_first_order_momentum": ("momentum.*-1", "dsoba_first_order", {"momentum": -1}),
    "ma_dsbo_steps": ("^steps.*0", "ma_dsbo", {"steps": 0}),
    "ma_dsbo_v_steps": ("^v_steps.*0", "ma_dsbo", {"v_steps": 0}),
    "ma_dsbo_sample": (r"sample must be a function \(key", "ma_dsbo", {"sample": 8}),
    "ma_dsbo_momentum": ("momentum.*0", "ma_dsbo", {"momentum": 0.0}),
    "gbdsbo_terms": ("^terms.*0", "gbdsbo", {"terms": 0, "inverse_step": 0.1}),
    "gbdsbo_no_inverse_step": ("inverse_step and terms go together", "gbdsbo", {"terms": 2}),
    "gbdsbo_no_terms": ("inverse_step and terms go together", "gbdsbo", {"terms": None, "inverse_step": 0.1}),
    "gbdsbo_inverse_step": ("inverse_step.*-0.1", "gbdsbo", {"terms": 2, "inverse_step": -0.1}),
    "gbdsbo_sample": (r"sample must be a function \(key", "gbdsbo", {"sample": 0.5}),
    "c2dfb_steps": ("^steps.*0", "c2dfb", {"steps": 0}),
    "c2dfb_multiplier": ("multiplier.*-1.0", "c2dfb", {"multiplier": -1.0}),
    "c2dfb_multipliers": ("multiplier must be one number", "c2dfb", {"multiplier": jnp.ones(2)}),
    "c2dfb_compressor": ("compressor must be a Compressor", "c2dfb", {"compressor": 0.2}),
    "c2dfb_gossip_step": ("^gossip_step.*-1", "c2dfb", {"gossip_step": -1}),
    "c2dfb_gossip_steps": ("^gossip_step must be one number", "c2dfb", {"gossip_step": jnp.ones(4)}),
    "c2dfb_sample": (r"sample must be a function \(key", "c2dfb", {"sample": 3}),
    **{
        f"{name}_correction": ("^correction must be a Correction", name, {"correction": "gt"})
        for name in ("interact", "interact_svr", "diamond", "sldbo", "dsvrbgd")
    },
    "adasdbo_sample": (r"sample must be a function \(key", "adasdbo", {"sample": 3}),
    "adasdbo_accumulated": ("accumulated.*0.0", "adasdbo", {"accumulated": 0.0}),
}


@pytest.mark.parametrize("name", FIELD)
def test_bad_input_of_the_field(name):
    message, method, wrong = FIELD[name]
    preset = getattr(decentralized, method)
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)) as error:
        preset(PROBLEM, TOY_RING, steps_of(preset, TOY_STEPS), **RIGHT[method] | wrong)
    assert len(str(error.value)) > 40


MINIBATCH = {"sample": bx.sampling.minibatch(1)}
DRAWING = {name: choices | MINIBATCH for name, choices in RIGHT.items() if name not in ("interact", "sldbo", "dsvrbgd")}


@pytest.mark.parametrize("name", DRAWING)
def test_a_minibatch_needs_a_key(name):
    with pytest.raises(ValueError, match=r"key.*jax\.random\.key"):
        keyless(getattr(decentralized, name), **DRAWING[name])()


INTERACTIVE = {**DRAWING, "interact": SERIES}


@pytest.mark.parametrize("name", INTERACTIVE)
def test_every_method_checks_what_all_methods_are_given(name):
    """A problem, a gossip, steps, a start, a state and a batch."""
    preset, choices = getattr(decentralized, name), INTERACTIVE[name]
    steps, wrong = steps_of(preset, TOY_STEPS), steps_of(preset, (0.1, -0.1, 0.1))
    method = preset(PROBLEM, TOY_RING, steps, **choices)
    attempts = {
        "problem must be a BilevelProblem": lambda: preset(None, TOY_RING, steps, **choices),
        "gossip must be.*Gossip": lambda: preset(PROBLEM, bx.topology.ring(4), steps, **choices),
        "step_sizes.*tuple of 4": lambda: preset(PROBLEM, TOY_RING, (0.1,) * 4, **choices),
        r"step_sizes\.y.*-0\.1": lambda: preset(PROBLEM, TOY_RING, wrong, **choices),
        r"\bx\b.*\(3, 1\)": lambda: method.init(X[:3], Y, BATCH),
        "state must be a": lambda: method.step(None, method.init(X, Y, BATCH)._asdict(), BATCH),
        r"bx\.Batch": lambda: method.step(None, method.init(X, Y, BATCH), BATCH.inner),
        r"key must be one jax\.random\.key": lambda: method.step(0, method.init(X, Y, BATCH), BATCH),
    }
    for message, attempt in attempts.items():
        with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
            attempt()


@pytest.mark.parametrize("name", WITHOUT_V)
def test_a_step_of_v_is_refused_by_a_method_without_v(name):
    """One number for all levels, a pair and `Levels` of two are not."""
    preset, (x, y, v) = getattr(decentralized, name), TOY_STEPS
    for steps in (0.1, (x, y), bx.Levels(x, y)):
        preset(PROBLEM, TOY_RING, steps, **RIGHT[name])
    for steps in ((x, y, v), bx.Levels(x, y, optax.sgd(v)), bx.Levels(x, y, lambda k: v)):
        with pytest.raises(ValueError, match=r"^step_sizes must hold no v, .*; got .*Pass, say, bx\.Levels\(x=0"):
            preset(PROBLEM, TOY_RING, steps, **RIGHT[name])


def test_compressed_inner_loops_need_one_fixed_graph():
    changing = bx.gossip(bx.topology.one_peer_exponential(4))
    with pytest.raises(ValueError, match="gossip must mix over one fixed graph"):
        decentralized.c2dfb(PROBLEM, changing, TOY_STEPS, steps=2, multiplier=10.0, compressor=WHOLE, gossip_step=0.5)
    apart = bx.Levels(changing, TOY_RING, TOY_RING)  # of x it may change
    decentralized.c2dfb(PROBLEM, apart, TOY_STEPS, steps=2, multiplier=10.0, compressor=WHOLE, gossip_step=0.5)


def test_gbdsbo_has_one_graph_for_everything():
    with pytest.raises(ValueError, match="gossip must be a Gossip"):
        decentralized.gbdsbo(PROBLEM, bx.Levels(TOY_RING, TOY_RING, TOY_RING), TOY_STEPS[:2])

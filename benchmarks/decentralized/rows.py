"""The methods that every decentralized task compares."""

import functools
from collections.abc import Callable
from typing import Any

import bilevax as bx
from benchmarks.decentralized.methods import Row, counted, size_of
from benchmarks.decentralized.moved_snapshot import s3ldbo_adaptive
from benchmarks.decentralized.network import DRAWS, Network
from benchmarks.decentralized.worst_first import s3ldbo_worst_first

REFRESH = (0.5, 0.2, 0.1, 0.05)
ADAPTIVE = (0.25, 0.125)  # whole agents of 8 and of 16
PREDICTED = (0.2, 0.1)
CYCLIC = (*ADAPTIVE, 0.1)  # 0.1: beside predictions, whose agents refresh in turn too
PAIRS = 4  # of secants
DAMPING = 0.1  # of the factors in front of steps
NEWTON = {"s3ldbo": 1 / 40, "sldbo": 1 / 15}  # such a step for one of 1 / L of the grid; 1 would be Newton's
MOMENTA = tuple({"momentum": a} for a in (0.1, 0.03, 0.3))  # weights a of the new direction that are tried
AVERAGES = tuple({"momentum": a} for a in (1.0, 0.3, 0.1))  # the same of moving averages, without variance reduction
RATE = 0.5  # η of MDBO and VRDBO, whose own momentum is α = a/η²
TERMS = 10  # of a Neumann series
INNER_STEPS = 5  # of MA-DSBO, for y and for v, and of C2DFB
PENALTY, SENT = 100.0, 0.3  # λ of C2DFB, and the share of the entries that it sends
LENGTH = 4.0  # AdaSDBO takes so many times the steps of the grid
COMPRESSION = {0.3: 0.4, 0.1: 0.2}  # share of the entries that are sent -> step of CHOCO gossip
EVERY = 10  # SVR-INTERACT reads all examples in one of so many iterations
LARGEST = 130  # numbers in y up to which GBDSBO's matrices are formed


def weights(settings: tuple[dict[str, float], ...]) -> str:
    """Of the new direction, for the caption."""
    return ", ".join(f"{setting['momentum']:g}" for setting in settings)


CAPTION = f"""\
s3ldbo-p, -ed-p: {{coins}}; -subset-p, -adaptive-p, -cyclic-p: ⌈p · n⌉ agents at a time, at random, those that moved
farthest, or in turn. -ed: exact diffusion in place of tracking. -predicted-p: in turn; between refreshes penalties are
evaluated, and the rest of the directions follows Kronecker factors of each agent's own data, inner and, as far as they
were right, outer; no change is longer than the direction was (of models that are no linear ones: {PAIRS} secants, as
far as they were right). -worst-p: the same, but not in turn: those refresh whose prediction is expected to err most.
-kfac: Kronecker factors of the agent's own g at the present point, damped by {DAMPING:g}, rescale the corrected
directions of y and v, whose steps are those of the grid times L / 40, of sldbo L / 15, where those of Newton are 1, for
the largest L of an agent; s3ldbo in turn.
dsvrbgd, gt-sgd (tracking, no variance reduction), mdbo, vrdbo, diamond, interact-svr, -sampled: minibatches of
{{batch_size}} (interact-svr: all in every {EVERY}th iteration); all others exact. Weights of new directions are tried
too: {weights(MOMENTA)} of dsvrbgd, mdbo, vrdbo and diamond, {weights(AVERAGES)} of -sampled.
ma-dsbo, c2dfb: {INNER_STEPS} inner steps; c2dfb: penalty {PENALTY:g}, {SENT:.0%} of the entries sent. mdbo, vrdbo,
interact, interact-svr, diamond: {TERMS} terms of a Neumann series of each agent's own Hessian, with steps of 1 / L: of
minibatches the largest L among {DRAWS} of each agent.
sparkle-ed, -extra, -mixed, -ed, ma-dsbo: on (I + W)/2 where needed; -topq: the share q of each change that is sent.
adasdbo: {LENGTH:g} times the steps, which it divides by the lengths of all directions so far.
"""


def preset(method: Callable, **settings: Any) -> Callable:
    """`make` of a method that takes a problem, a gossip and step sizes, these settings and those that are tried."""
    return lambda network, gossip, steps, **tried: method(network.problem, gossip, steps, **settings, **tried)


def drawn(method: Callable, size: int, **settings: Any) -> Callable:
    """The same for one that draws minibatches."""
    return lambda network, gossip, steps, **tried: method(
        network.problem, gossip, steps, sample=network.sample(size), **settings, **tried
    )


def damped(method: Callable) -> Callable:
    """A method that mixes at the rate η, and whose momentum is the weight a itself."""
    return lambda *args, momentum, **settings: method(*args, momentum=momentum / RATE**2, rate=RATE, **settings)


def without_v(make: Callable) -> Callable:
    """`make` of a method that has no v, and no step of it."""
    return lambda network, gossip, steps, **tried: make(network, gossip, bx.Levels(steps.x, steps.y), **tried)


def series(make: Callable[..., Callable], method: Callable, *size: int, **settings: Any) -> Callable:
    """`make` by `preset` or `drawn` of a method with a Neumann series in the place of v, whose steps are 1 / L.

    L is that of what the series is made of: minibatches of this size have larger ones than all data, and a series with
    steps above 2 / L grows with its terms.
    """
    return lambda network, gossip, steps, **tried: without_v(
        make(method, *size, terms=TERMS, inverse_step=1 / network.curvature(*size), **settings)
    )(network, gossip, steps, **tried)


def tracked_sgd(problem: bx.BilevelProblem, gossip: Any, steps: bx.Levels, sample: Callable) -> bx.problem.Algorithm:
    """Gradient tracking along plain minibatches: what variance reduction is to be compared with."""
    parts = bx.single_loop.estimator.stochastic(sample), bx.single_loop.correction.tracking()
    return bx.single_loop.single_loop(problem, gossip, steps, *parts)


def longer(network: Network, gossip: Any, steps: bx.Levels) -> bx.problem.Algorithm:
    """AdaSDBO, whose steps are lengths."""
    return bx.decentralized.adasdbo(network.problem, gossip, bx.Levels(*(LENGTH * step for step in steps)))


def each(function: Callable, value: Any) -> Any:
    """Of `Levels`, `function` of all three; or of the one value that holds for all."""
    return bx.Levels(*map(function, value)) if isinstance(value, bx.Levels) else function(value)


def compressed(make: Callable, fraction: float) -> Callable:
    """`make` over gossip that sends the largest entries of each change."""
    compression = bx.agents.compression

    def wrapped(network: Network, gossip: Any, steps: bx.Levels, **tried: float) -> bx.problem.Algorithm:
        def one(gossip: bx.agents.Gossip) -> bx.agents.Gossip:
            return compression.choco(gossip, compression.top_k(fraction), gossip_step=COMPRESSION[fraction])

        return make(network, each(one, gossip), steps, **tried)

    return wrapped


def lazy(levels: str) -> Callable[[bx.Levels], bx.Levels]:
    """(I + W)/2 on these levels."""
    return lambda topologies: topologies._replace(
        **{level: bx.topology.lazy(getattr(topologies, level)) for level in levels}
    )


def matrices(network: Network) -> bx.problem.Calls:
    """Whole matrices: as many products as y has numbers."""
    return bx.problem.Calls(1, 1, size_of(network.y), size_of(network.y))


def model_of(network: Network) -> bx.single_loop.prediction.Prediction:
    """How directions change between refreshes, by what is known of the losses.

    Where parts of f and g are known, by Kronecker factors, those of f as far as they were right, and by no longer
    change than the directions were; where nothing is known of what reads data, by secants, as far as they were right.
    """
    prediction = bx.single_loop.prediction
    model = prediction.kronecker(network.fit) if network.fit else prediction.trusted(prediction.secants(PAIRS))
    if network.known:
        model = prediction.chain(prediction.data_free(network.known), model)
    if network.outer_fit:
        model = prediction.chain(model, prediction.trusted(prediction.outer_kronecker(network.outer_fit)))
    return prediction.bounded(model) if network.fit else model


def predicted(method: Callable, **settings: Any) -> Callable:
    """`make` of a method whose directions are predicted between refreshes."""
    return lambda network, gossip, steps: method(network.problem, gossip, steps, predict=model_of(network), **settings)


def rescaled(method: Callable, newton: float, **settings: Any) -> Callable:
    """`make` of a method with tracking, whose y and v move along directions that each agent's own factors rescale.

    Args:
      method: of a problem, a gossip and step sizes.
      newton: share of Newton's step that one of 1 / L of the grid becomes.
      **settings: of the method.
    """
    ihvp = bx.ihvp.kfac(damping=DAMPING, fisher=bx.curvature.fisher.exact, inverse=bx.curvature.kronecker.factored)

    def make(network: Network, gossip: Any, steps: bx.Levels) -> bx.problem.Algorithm:
        def prepare(key: Any, state: Any, inner_loss: Any, point: Any) -> Any:
            assert network.fit is not None  # see `needs_fit` of a row
            return ihvp.prepare(key, state, network.fit, point)  # a penalty is far below the damping

        of_fit = ihvp._replace(prepare=prepare)
        share = newton * network.curvature()
        y, v = (bx.single_loop.preconditioned(share * step, of_fit) for step in (steps.y, steps.v))
        return method(network.problem, gossip, bx.Levels(steps.x, y, v), **settings)

    return make


def skipping(coins: Callable, corrections: Callable[[Any], Any], levels: str) -> tuple[Row, ...]:
    """S3LDBO with all coins, and with exact diffusion.

    Args:
      coins: `coins(p)` of each agent.
      corrections: `corrections(correction)`, of all levels where x has this one.
      levels: those of which exact diffusion needs a lazy graph.
    """
    correction = bx.single_loop.correction
    tracking, exact_diffusion = map(corrections, (correction.tracking(), correction.exact_diffusion()))

    s3ldbo = functools.partial(preset, bx.decentralized.s3ldbo)
    in_turn = functools.partial(predicted, bx.decentralized.s3ldbo)
    row = functools.partial(Row, at_start=1)
    dual = functools.partial(row, graphs=lazy(levels), symmetric=True, fixed=True)
    return (
        *(row(f"s3ldbo-{p:g}", s3ldbo(coins=coins(p), correction=tracking)) for p in REFRESH),
        *(dual(f"s3ldbo-ed-{p:g}", s3ldbo(coins=coins(p), correction=exact_diffusion)) for p in REFRESH),
        *(row(f"s3ldbo-predicted-{p:g}", in_turn(coins=bx.coins.cyclic(p), correction=tracking)) for p in PREDICTED),
        *(
            dual(f"s3ldbo-predicted-ed-{p:g}", in_turn(coins=bx.coins.cyclic(p), correction=exact_diffusion))
            for p in PREDICTED
        ),
        *(row(f"s3ldbo-subset-{p:g}", s3ldbo(coins=bx.coins.subset(p), correction=tracking)) for p in ADAPTIVE),
        *(row(f"s3ldbo-cyclic-{p:g}", s3ldbo(coins=bx.coins.cyclic(p), correction=tracking)) for p in CYCLIC),
        *(row(f"s3ldbo-adaptive-{p:g}", preset(s3ldbo_adaptive, probability=p, correction=tracking)) for p in ADAPTIVE),
    )


def rows(coins: Callable, size: int) -> tuple[Row, ...]:
    """The methods for a common lower level.

    Args:
      coins: `coins(p)` of S3LDBO.
      size: of a minibatch.
    """
    methods, correction = bx.decentralized, bx.single_loop.correction
    exact_diffusion, tracking = correction.exact_diffusion(), correction.tracking()
    mixed = bx.Levels(tracking, exact_diffusion, exact_diffusion)
    reduced = functools.partial(drawn, methods.dsvrbgd, size)
    in_turn_reduced = functools.partial(reduced, alternating=True)
    sparkle = functools.partial(preset, methods.sparkle)
    dual = functools.partial(Row, symmetric=True, fixed=True)
    lazy_dual = functools.partial(dual, graphs=lazy("xyv"))
    in_turn = counted(inner=2)  # y moves in between
    sampled = functools.partial(Row, batch_size=size)
    averaged = functools.partial(sampled, settings=AVERAGES)
    recursive = functools.partial(sampled, settings=MOMENTA)
    inner_loops = {"steps": INNER_STEPS, "v_steps": INNER_STEPS}
    ma_dsbo = functools.partial(preset, methods.ma_dsbo, **inner_loops)
    c2dfb = preset(
        methods.c2dfb,
        steps=INNER_STEPS,
        compressor=bx.agents.compression.top_k(SENT),
        multiplier=PENALTY,
        gossip_step=0.4,
    )
    in_turns = bx.coins.cyclic(0.1)
    loops = counted(inner=INNER_STEPS + 1, hessian=INNER_STEPS)
    twice, twice_in_turn = counted(2, 2, 2, 2), counted(2, 4, 2, 2)
    along_ed = {"settings": MOMENTA, "batch_size": size}
    return (
        Row("sldbo", preset(methods.sldbo)),
        Row("sldbo-kfac", rescaled(methods.sldbo, NEWTON["sldbo"]), needs_fit=True),
        *skipping(coins, lambda correction: correction, "xyv"),
        Row("s3ldbo-kfac-0.1", rescaled(methods.s3ldbo, NEWTON["s3ldbo"], coins=in_turns), at_start=1, needs_fit=True),
        Row("s3ldbo-worst-0.1", predicted(s3ldbo_worst_first, probability=0.1), at_start=1),
        Row("s3ldbo-unbiased-0.2", preset(methods.s3ldbo_unbiased, probability=0.2), at_start=1),
        recursive("dsvrbgd", reduced(), twice),
        recursive("dsvrbgd-alternating", in_turn_reduced(), twice_in_turn),
        lazy_dual("dsvrbgd-ed", reduced(correction=exact_diffusion), twice, **along_ed),
        lazy_dual("dsvrbgd-alternating-ed", in_turn_reduced(correction=exact_diffusion), twice_in_turn, **along_ed),
        sampled("gt-sgd", drawn(tracked_sgd, size)),
        lazy_dual("sparkle-ed", sparkle(correction=exact_diffusion), in_turn),
        lazy_dual(
            "sparkle-ed-sampled",
            drawn(methods.sparkle, size, correction=exact_diffusion),
            in_turn,
            batch_size=size,
            settings=AVERAGES,
        ),
        lazy_dual("sparkle-extra", sparkle(correction=correction.extra()), in_turn),
        Row("sparkle-gt", sparkle(correction=tracking), in_turn),
        dual("sparkle-mixed", sparkle(correction=mixed), in_turn, graphs=lazy("yv")),
        Row("d-soba", preset(methods.dsoba)),
        averaged("d-soba-sampled", drawn(methods.dsoba, size)),
        Row("d-soba-first-order", preset(methods.dsoba_first_order), counted(inner=3, hessian=0, cross=0)),
        Row("adasdbo", longer),
        Row("ma-dsbo", ma_dsbo(), loops, graphs=lazy("v")),
        Row("ma-dsbo-gt", ma_dsbo(track=True), loops, graphs=lazy("xyv")),
        Row("ma-dsbo-restart", ma_dsbo(restart=True), loops, graphs=lazy("v")),
        averaged("ma-dsbo-sampled", drawn(methods.ma_dsbo, size, **inner_loops), loops, graphs=lazy("v")),
        recursive("mdbo", series(drawn, damped(methods.mdbo), size), counted(hessian=TERMS)),
        recursive("vrdbo", series(drawn, damped(methods.vrdbo), size), counted(2, 2, 2 * TERMS, 2)),
        Row("c2dfb", c2dfb, counted(INNER_STEPS + 1, 2 * INNER_STEPS + 2, 0, 0), fixed=True),
        Row("gbdsbo", without_v(preset(methods.gbdsbo)), matrices, common=True, largest=LARGEST),
        *(Row(f"sldbo-top{q:g}", compressed(preset(methods.sldbo), q), fixed=True) for q in COMPRESSION),
        *(recursive(f"dsvrbgd-top{q:g}", compressed(reduced(), q), twice, fixed=True) for q in COMPRESSION),
    )


def personal_rows(coins: Callable, size: int) -> tuple[Row, ...]:
    """The methods for a lower level of each agent's own, which correct x alone.

    Args:
      coins: `coins(p)` of S3LDBO.
      size: of a minibatch.
    """
    methods, correction = bx.decentralized, bx.single_loop.correction

    def own(upper: Any) -> bx.Levels:
        return bx.Levels(upper, correction.local(), correction.local())

    sparkle = preset(methods.sparkle, correction=own(correction.exact_diffusion()))
    sampled, twice = functools.partial(Row, batch_size=size), counted(2, 2, 2 * TERMS, 2)
    svr = series(drawn, methods.interact_svr, size, every=EVERY)
    return (
        Row("sldbo", preset(methods.sldbo, correction=own(correction.tracking()))),
        *skipping(coins, own, "x"),
        Row("sparkle-ed", sparkle, counted(inner=2), graphs=lazy("x"), symmetric=True, fixed=True),
        Row("lopa-local", preset(methods.lopa_local)),
        Row("lopa-tracking", preset(methods.lopa_tracking)),
        Row("interact", series(preset, methods.interact), counted(hessian=TERMS)),
        sampled("interact-svr", svr, twice, every=EVERY),
        sampled("diamond", series(drawn, methods.diamond, size), twice, settings=MOMENTA),
    )


def names(personal: bool = False) -> tuple[str, ...]:
    """Of all rows, for a common lower level or for personal ones."""
    return tuple(row.name for row in (personal_rows if personal else rows)(bx.coins.independent, 1))

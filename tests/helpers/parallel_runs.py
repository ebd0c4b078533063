"""Runs methods on the devices of this process and of others, and prints what happened as JSON.

`test_parallel.py` starts it with eight virtual devices; `parallel_hosts.py` is one of two hosts with 4 each.
"""

import json
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from networks import KEY, zeros

import bilevax as bx
import bilevax.parallel
from bilevax.agents import topology as graphs
from bilevax.testing.problems import quadratic
from bilevax.testing.problems._quadratic import PROBLEM

STEPS = (0.05, 0.1, 0.1)
ITERATIONS = 8
RING, RANDOM, ONE_PEER = (
    graphs.ring(16),
    graphs.erdos_renyi(16, probability=0.3, seed=1),
    graphs.one_peer_exponential(16),
)
ONE_WAY = graphs.from_matrix(
    np.array(
        [
            [0.4 * (i == j) + 0.3 * (i == (j + 1) % 16) + 0.3 * (i == (2 * j + 1) % 16) for j in range(16)]
            for i in range(16)
        ]
    )
)


def loss_with_a_gradient(x, y, batch):
    """Differentiates at a constant: what comes back must not be summed over the devices."""
    slope = jax.grad(lambda z: z @ batch["Q"] @ z + batch["e"] @ z)(jnp.ones(y.shape))
    return PROBLEM.outer_loss(x, y, batch) + 0.1 * slope @ y


OWN_DESCENT = bx.BilevelProblem(loss_with_a_gradient, PROBLEM.inner_loss)


def preset(name, problem=PROBLEM, **options):
    steps = STEPS[:2] if name == "gbdsbo" else STEPS
    return lambda gossip: getattr(bx.decentralized, name)(problem, gossip, steps, **options)


def mixed(gossip):
    """A correction for each level: x compressed, y by exact diffusion, v over a directed graph."""
    compressed = bx.agents.compression.choco(gossip.x, bx.agents.compression.top_k(0.5), gossip_step=0.5)
    corrections = bx.Levels(
        bx.single_loop.correction.tracking(),
        bx.single_loop.correction.exact_diffusion(),
        bx.single_loop.correction.tracking(),
    )
    return bx.decentralized.sparkle(PROBLEM, gossip._replace(x=compressed), STEPS, correction=corrections)


def curved(gossip):
    """Steps of y and v along directions that a regularized Newton method has rescaled."""
    newton = bx.single_loop.preconditioned(0.1, bx.ihvp.exact(damping=20.0))
    return bx.decentralized.sldbo(PROBLEM, gossip, bx.Levels(STEPS[0], newton, newton))


def noisy(key, t, data):
    """A minibatch of a quadratic: its coefficients with noise of their own."""
    return jax.tree.map(lambda leaf: leaf + 0.01 * jax.random.normal(key, leaf.shape), data)


COMPRESSED = {"steps": 2, "multiplier": 10.0, "compressor": bx.agents.compression.top_k(0.5), "gossip_step": 0.4}
PARTS = {  # of about as many seconds
    "neighbours": {
        "sldbo": (RING, preset("sldbo", radius=5.0)),
        "subset, torus": (
            graphs.torus(16, rows=4, weights=graphs.self_weight(0.3)),
            preset("s3ldbo", coins=bx.coins.subset(0.5, block=2)),
        ),
        "global ids": (RING, preset("s3ldbo", coins=lambda key, k, gossip: jnp.array([2, 5, 9]) + k % 3)),
        "one agent per device": (
            graphs.ring(8),
            preset("s3ldbo", coins=bx.coins.independent(0.5), problem=OWN_DESCENT),
        ),
    },
    "graphs": {
        "independent, gathered": (RANDOM, preset("s3ldbo", coins=bx.coins.independent(np.linspace(0.3, 1.0, 16)))),
        "common, graph per level": (bx.Levels(RING, RANDOM, ONE_PEER), preset("s3ldbo", coins=bx.coins.common(0.5))),
        "variance-reduced, one peer": (ONE_PEER, preset("dsvrbgd", sample=noisy, momentum=0.3, rate=0.5)),
        "mixed": (bx.Levels(RING, graphs.lazy(RING), ONE_WAY), mixed),
    },
    "loops": {
        "compressed inner loops": (RING, preset("c2dfb", sample=noisy, **COMPRESSED)),
        "inner loops": (RING, preset("ma_dsbo", steps=2, v_steps=2, sample=noisy, momentum=0.5)),
        "accumulated": (RING, lambda gossip: bx.decentralized.adasdbo(PROBLEM, gossip, 0.5, sample=noisy)),
    },
    "matrices": {
        "matrices": (RING, preset("gbdsbo")),
        "curvature of their own": (RING, curved),
    },
}
METHODS = {name: method for part in PARTS.values() for name, method in part.items()}


def data(n):
    batch = quadratic(3, n).batch
    return *zeros(batch), batch


def gossip_of(topology):
    if isinstance(topology, bx.Levels):
        return bx.Levels(*map(gossip_of, topology))
    return bx.agents.push_sum(topology) if topology is ONE_WAY else bx.gossip(topology)


@partial(jax.jit, static_argnums=0)
def roll(method, x, y, batch):
    """(last state, (points, infos) of every iteration)."""

    def step(state, key):
        state, info = method.step(key, state, batch)
        return state, (state[1:4], info)  # x, y and what stands in the place of v

    return jax.lax.scan(step, method.init(x, y, batch), jax.random.split(KEY, ITERATIONS))


def difference(got, expected):
    """The largest difference at any leaf, relative to its size where that exceeds 1."""

    def one(a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape, (a.shape, b.shape)
        return float(np.max(abs(a.astype(float) - b) / np.maximum(abs(b), 1.0), initial=0.0))

    return max(jax.tree.leaves(jax.tree.map(one, got, expected)))


def kept(tree, axis):
    """Whether each leaf that has this axis is sharded along it, over all devices."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim > axis]
    return bool(leaves) and all(
        len(leaf.sharding.device_set) == jax.device_count()
        and leaf.sharding.shard_shape(leaf.shape)[axis] * jax.device_count() == leaf.shape[axis]
        for leaf in leaves
    )


def joined(rolled):
    """Undoes the layout of `pmap` behind an axis of iterations."""
    state, history = rolled
    return bx.parallel.join(state), jax.vmap(bx.parallel.join)(history)


def compare(name, by_pmap):
    """By shard_map, and by pmap, which takes a program of its own."""
    topology, make = METHODS[name]
    x, y, batch = data(8 if name == "one agent per device" else 16)
    expected = roll(make(gossip_of(topology)), x, y, batch)
    mesh = Mesh(jax.devices(), ("agents",))
    placed = bx.parallel.place((x, y, batch), mesh)
    program = roll.lower(bx.parallel.shard_agents(make, topology, mesh), *placed).compile()
    state, history = program(*placed)
    found = {}
    if by_pmap:
        mapped = roll(bx.parallel.pmap_agents(make, topology, jax.devices()), *bx.parallel.split((x, y, batch), 8))
        found["pmap"] = difference(joined(mapped), expected)
    return found | {
        "moved": difference(expected[0].x, x),
        "shard_map": difference((state, history), expected),
        "kept": kept(state, 0) and kept(history, 1),
        "counters": all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state) if leaf.ndim == 0),
        "collectives": collectives(program.as_text()),
        "branches": " conditional(" in program.as_text(),
        "bytes": np.asarray(history[1].bytes)[0].tolist(),
    }


ITEMSIZE = {"f64": 8, "f32": 4, "s32": 4, "s64": 8, "u32": 4, "pred": 1}
COLLECTIVE = r"= (\w+)\[([\d,]*)\]\S* (all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter|ragged-\S+)\(.*"


def collectives(text):
    """Each collective of a compiled program: its operation, the bytes of its result, and its pairs of devices."""
    found = []
    for match in re.finditer(COLLECTIVE, text):
        kind, shape, operation = match.groups()
        size = int(np.prod([int(size) for size in shape.split(",") if size]))
        pairs = re.search(r"source_target_pairs=\{(.*?\})\}", match.group())
        found.append((operation, ITEMSIZE[kind] * size, pairs.group(1).count("{") if pairs else None))
    return found


def call_by_call():
    """Outside of `jit`: what a call of init and of step returns stays where it is, and each is compiled once."""
    topology, make = METHODS["sldbo"]
    expected, _ = roll(make(bx.gossip(topology)), *data(16))
    mesh = Mesh(jax.devices(), ("agents",))
    traces = []

    def counted(gossip):
        method = make(gossip)
        return method._replace(step=lambda *arguments: traces.append(1) or method.step(*arguments))

    method = bx.parallel.shard_agents(counted, topology, mesh)
    x, y, batch = bx.parallel.place(data(16), mesh)
    state = first = method.init(x, y)
    for _ in range(ITERATIONS):
        state, info = method.step(jax.random.PRNGKey(0), state, batch)
    mapped = bx.parallel.pmap_agents(make, topology, jax.devices())
    parts = bx.parallel.split((x, y, batch), 8)
    there = mapped.init(*parts[:2])
    for _ in range(ITERATIONS):
        there, _ = mapped.step(None, there, parts[2])
    steps = jnp.array([0.02, 0.05])

    def of_step(step):
        return roll(
            bx.parallel.shard_agents(
                lambda gossip: bx.decentralized.sldbo(PROBLEM, gossip, (step, 0.1, 0.1), radius=5.0), topology, mesh
            ),
            x,
            y,
            batch,
        )[0]

    return {
        "shard_map": difference(state, expected),
        "pmap": difference(bx.parallel.join(there), expected),
        "kept": kept((first, state, info), 0),
        "traces": len(traces),
        "explicit": on_explicit_axes(topology, make, expected),
        "half": travelling_half(mesh),
        "vmap": difference(jax.tree.map(lambda leaf: leaf[1], jax.vmap(of_step)(steps)), expected),
    }


def on_explicit_axes(topology, make, expected):
    """Two of them, for data that was placed there and data that the method puts there by itself."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    method, (x, y, batch) = bx.parallel.shard_agents(make, topology, mesh), data(16)
    state, batch = method.init(x, y), bx.parallel.place(batch, mesh)
    for _ in range(ITERATIONS):
        state, _ = method.step(None, state, batch)
    return difference(state, expected)


def travelling_half(mesh):
    """The dtypes that the program sends for x of bfloat16, by shifts and by gathering; CPUs then send float32."""
    problem = bx.BilevelProblem(lambda x, y, c: ((y - c) ** 2).mean(), lambda x, y, c: ((y - x) ** 2).mean())
    x, types = jnp.zeros((16, 4), jnp.bfloat16), set()
    for topology in (RING, RANDOM):
        method = bx.parallel.shard_agents(preset("sldbo", problem=problem), topology, mesh)
        text = jax.jit(method.step).lower(None, method.init(x, x), bx.Batch(x, x)).as_text()
        types |= set(re.findall(r"(?:collective_permute|all_gather)\".*-> tensor<[\dx]*x(\w+)>", text))
    return sorted(types)


GRAPHS = {
    "ring": graphs.ring(8),
    "path": graphs.path(16),
    "grid": graphs.grid(16),
    "hypercube": graphs.hypercube(16),
    "exponential": graphs.exponential(24),
    "star": graphs.star(16),
    "complete": graphs.complete(8),
}


def one_round(gossip):
    """A method of the user's own: what the three operations of a gossip make of x, and their mean."""

    def init(x, y, batch):
        mixed, state = gossip.mix(None, gossip.init(x), x)
        return mixed, gossip.laplacian(None, state, x)[0], gossip.agents(), gossip.mean(x)

    return bx.problem.Algorithm(init, lambda key, state, batch: (state, ()))


def mixing(topology, mesh):
    """How far a round is from the matrix, and the kinds of collectives that it takes."""
    n, w = topology.n, topology.matrix.toarray()
    s = np.random.default_rng(0).normal(size=n)
    init = jax.jit(bx.parallel.shard_agents(one_round, topology, mesh).init)
    x = bx.parallel.place(jnp.asarray(s), mesh)
    off = difference(init(x, x), (w @ s, s - w @ s, np.arange(n), s.mean()))
    return off, sorted(
        set(re.findall(r"stablehlo\.(all_\w+|collective_\w+|reduce_scatter)", init.lower(x, x).as_text()))
    )


def held_here(names=("sldbo", "independent, gathered", "variance-reduced, one peer")):
    """On several hosts every process runs the same text; each compares the rows that it holds."""
    mesh, arguments, result = Mesh(jax.devices(), ("agents",)), data(16), {}
    placed = bx.parallel.place(arguments, mesh)
    for name in names:
        topology, make = METHODS[name]
        expected = roll(make(gossip_of(topology)), *arguments)
        state, history = roll(bx.parallel.shard_agents(make, topology, mesh), *placed)
        kept_there = kept(state, 0) and kept(history, 1)
        result[name] = {"shard_map": difference_here((state, history), expected), "kept": kept_there}
    method = bx.parallel.shard_agents(METHODS[names[-1]][1], topology, mesh)
    _, info = method.step(jax.random.split(KEY, ITERATIONS)[0], method.init(*placed), placed[2])
    first = jax.tree.map(lambda leaf: leaf[0], expected[1][1])
    return result | {"call by call": {"shard_map": difference_here(info, first), "kept": kept(info, 0)}}


def difference_here(got, expected):
    """The difference in the rows that this process holds."""
    pairs = zip(jax.tree.leaves(got), map(np.asarray, jax.tree.leaves(expected)), strict=True)
    rows = [(shard.data, whole[shard.index]) for leaf, whole in pairs for shard in leaf.addressable_shards]
    return difference(*zip(*rows, strict=True))


def refused_elsewhere():
    """The message to who asks `pmap` for the devices of other hosts."""
    try:
        return str(bx.parallel.pmap_agents(preset("sldbo"), RING, jax.devices()))
    except ValueError as error:
        return str(error)


def refused():
    """The messages of what is refused."""
    make, devices = preset("sldbo"), jax.devices()
    mesh = Mesh(devices, ("agents",))
    x, y, batch = data(16)
    spanning = bx.parallel.shard_agents(preset("s3ldbo", coins=bx.coins.subset(0.5, block=4)), RING, mesh)
    whole = bx.parallel.pmap_agents(make, RING, devices)
    method = bx.parallel.shard_agents(make, RING, mesh)
    odd = bx.problem.Algorithm(lambda x, y, batch: jnp.zeros(3), lambda key, state, batch: (state, jnp.zeros(5)))
    attempts = {
        "agents": lambda: bx.parallel.shard_agents(make, graphs.ring(12), mesh),
        "agents of pmap": lambda: bx.parallel.pmap_agents(make, graphs.ring(12), devices),
        "no mesh": lambda: bx.parallel.shard_agents(make, RING, devices),
        "no devices": lambda: bx.parallel.pmap_agents(make, RING, mesh),
        "empty": lambda: bx.parallel.pmap_agents(make, RING, []),
        "no algorithm": lambda: bx.parallel.shard_agents(lambda gossip: gossip, RING, mesh),
        "no function": lambda: bx.parallel.shard_agents(lambda: None, RING, mesh),
        "disconnected": lambda: bx.parallel.shard_agents(make, graphs.from_matrix(np.eye(16)), mesh),
        "block": lambda: spanning.step(KEY, spanning.init(x, y, batch), batch),
        "rows": lambda: method.init(x[:8], y),
        "batch": lambda: method.step(None, method.init(x, y), data(8)[2]),
        "not split": lambda: whole.init(x, y),
        "place": lambda: bx.parallel.place({"w": jnp.zeros((12, 2))}, mesh),
        "split": lambda: bx.parallel.split(jnp.zeros(12), 8),
        "join": lambda: bx.parallel.join(jnp.zeros(())),
        "result": lambda: bx.parallel.shard_agents(lambda gossip: odd, RING, mesh).init(x, y),
    }
    messages = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            messages[name] = str(error)
    return messages


def report():
    mesh = Mesh(jax.devices(), ("agents",))
    rounds = {name: mixing(topology, mesh) for name, topology in GRAPHS.items()}
    return {"calls": call_by_call(), "rounds": rounds, "refused": refused()}


BY_PMAP = ("one agent per device", "common, graph per level")  # every day


def main(part=None, *by_pmap):
    """A part, some of whose methods are run by pmap too; or every part, with those of every day, and the calls."""
    if part is not None:
        found = {"methods": {name: compare(name, name in by_pmap) for name in PARTS[part]}}
    else:
        found = report() | {"methods": {name: compare(name, name in BY_PMAP) for name in METHODS}}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

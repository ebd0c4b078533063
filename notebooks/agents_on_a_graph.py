# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Agents on a graph
#
# Eight hospitals, sixteen phones, a hundred machines: each holds data that it does not send away, and each talks to a
# few neighbours only. Together they want to solve *one* bilevel problem:
#
# $$\min_x\; \frac1n \sum_i f_i(x, y^*(x)) \qquad\text{with}\qquad
#   y^*(x) = \arg\min_y\; \frac1n \sum_i g_i(x, y).$$
#
# Agent $i$ knows $f_i$ and $g_i$, that is: its own data. Note that the average is *inside* the argmin. No agent can
# find $y^*(x)$ by itself, and the mean of what they would find alone is not $y^*(x)$ either.
#
# 1. Graphs, and how fast they mix
# 2. Consensus by gossip
# 3. Three methods on a problem with a known solution
# 4. What skipping saves
# 5. The same on data: wrong labels in images that nobody shares

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import bilevax as bx

jax.config.update("jax_enable_x64", True)  # to see convergence to rounding
plt.rcParams.update({"figure.dpi": 100, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
# The colours of Okabe and Ito, which colour-blind readers can tell apart.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#999999"

# %% [markdown]
# ## 1. Graphs, and how fast they mix
#
# In one round every agent replaces its vector by a weighted average of its own and its neighbours' vectors,
#
# $$s_i \leftarrow \sum_j w_{ij}\, s_j .$$
#
# A `Topology` is the sparse matrix $W$ of these weights. Its rows and its columns sum to 1, so that the mean of all
# agents stays what it is. How fast the agents come to agree is the **spectral gap** $1 - \sigma$: one round shrinks the
# disagreement by $\sigma$ or more.

# %%
n = 16
graphs = {
    "path": bx.topology.path(n),
    "ring": bx.topology.ring(n),
    "star": bx.topology.star(n),
    "torus": bx.topology.torus(n),
    "hypercube": bx.topology.hypercube(n),
    "complete": bx.topology.complete(n),
}
square = {i: (i % 4, i // 4) for i in range(n)}

figure, axes = plt.subplots(1, len(graphs), figsize=(13, 2.7), layout="constrained")
for panel, (name, topology) in zip(axes, graphs.items(), strict=True):
    graph = nx.from_scipy_sparse_array(topology.matrix)
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    layout = {"torus": square, "path": {i: (i, 0) for i in range(n)}}.get(name) or nx.circular_layout(graph)
    if name == "star":
        layout = nx.shell_layout(graph, [[0], range(1, n)])
    curved = {"arrows": True, "connectionstyle": "arc3,rad=0.25"} if name == "torus" else {}
    nx.draw_networkx_edges(graph, layout, ax=panel, edge_color=GREY, **curved)
    nx.draw_networkx_nodes(graph, layout, ax=panel, node_color=BLUE, node_size=40)
    panel.set_title(f"{name}\n{graph.number_of_edges()} edges, gap {bx.topology.spectral_gap(topology):.3f}")
    panel.margins(0.12)
    panel.axis("off")
plt.show()

# %% [markdown]
# Edges are messages, so they are what you pay; the gap is what you get. The path and the ring are cheap and slow, the
# complete graph is one round of everybody with everybody. Between them lie the torus and the hypercube (for 16 agents
# they are one graph in two drawings). The star has as few edges as the path and mixes faster, though all of it goes
# through one agent.

# %% [markdown]
# ## 2. Consensus by gossip
#
# `bx.gossip(topology)` is the only thing in the library that moves information between agents. Each agent starts with
# random numbers; the picture shows how far the agents are from their common mean after so many rounds.


# %%
def disagreement(topology, rounds=40):
    gossip = bx.gossip(topology)
    s = jax.random.normal(jax.random.key(0), (n, 1000))

    def one(carry, _):
        s, state = gossip.mix(None, carry[1], carry[0])
        return (s, state), jnp.linalg.norm(s - gossip.mean(s))

    _, norms = jax.lax.scan(one, (s, gossip.init(s)), None, rounds)
    return np.asarray(jnp.concatenate([jnp.linalg.norm(s - s.mean(0))[None], norms]))


mixing = {name: disagreement(topology) for name, topology in graphs.items()}
mixing["one-peer exponential"] = disagreement(bx.topology.one_peer_exponential(n))

figure, panel = plt.subplots(figsize=(7, 3.6), layout="constrained")
for (name, norms), color in zip(mixing.items(), (RED, ORANGE, PURPLE, GREEN, SKY, GREY, BLUE), strict=True):
    style = "--" if name == "hypercube" else "-"
    panel.semilogy(np.maximum(norms / norms[0], 1e-16), style, color=color, lw=2, label=name)
panel.set(xlabel="rounds", ylabel="disagreement / at the start", ylim=(1e-16, 2))
panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

assert mixing["one-peer exponential"][4] < 1e-14 * mixing["one-peer exponential"][0]
assert mixing["complete"][1] < 1e-14 * mixing["complete"][0]

# %% [markdown]
# The straight lines have the slopes of the gaps above. One curve is different: in the *one-peer exponential* graph each
# agent sends to a single other agent in each round, one hop away, then two, then four, then eight. After
# $\log_2 16 = 4$ rounds all agents hold the exact mean, for four messages each.

# %% [markdown]
# ## 3. Three methods on a problem with a known solution
#
# Agent $i$ has forty measurements $(a, b)$ and forty target points $e$. The inner loss fits $y$ to the measurements
# relative to $x$; the outer loss wants $y$ at the targets, with a small price on $x$:
#
# $$g_i(x, y) = \tfrac12\, \mathrm{mean}\, \big(a^\top (y - x) - b\big)^2, \qquad
#   f_i(x, y) = \tfrac12\, \mathrm{mean}\, \|y - e\|^2 + \tfrac{\rho}{2} \|x\|^2 .$$
#
# So $y^*(x) = x + \delta$, where $\delta$ is the least-squares solution on the measurements of *all* agents, and
# $x^* = (\bar e - \delta) / (1 + \rho)$. The agents are very different: each has its own targets, its own true offset
# and its own scaling.

# %%
D, M, RHO = 5, 40, 0.1
random = np.random.default_rng(0)
a = random.normal(size=(n, M, D)) * random.uniform(0.4, 1.6, (n, 1, D))
b = np.einsum("nmd,nd->nm", a, random.normal(size=(n, D))) + 0.3 * random.normal(size=(n, M))
e = 3 * random.normal(size=(n, 1, D)) + 0.3 * random.normal(size=(n, M, D))
delta = np.linalg.lstsq(a.reshape(-1, D), b.ravel())[0]
solution = (e.mean((0, 1)) - delta) / (1 + RHO)


def f(x, y, e):
    return 0.5 * jnp.mean(jnp.sum((y[None] - e) ** 2, axis=1)) + RHO / 2 * x @ x


def g(x, y, measurements):
    a, b = measurements
    return 0.5 * jnp.mean((a @ (y - x) - b) ** 2)


problem = bx.BilevelProblem(f, g)
batch = bx.Batch(outer=e, inner=(a, b))

# %% [markdown]
# A method is built once, from a problem, a gossip and three step sizes, and is then a pair of functions, `init` and
# `step`, on arrays with a leading axis of agents. Every iteration moves $x$, $y$ and a third variable $v$, which
# follows the solution of $\nabla^2_{yy} g\, v = \nabla_y f$, and sends them to the neighbours. Nothing is solved in
# between.
#
# - **SLDBO** tracks the mean of the agents' directions beside each variable (*gradient tracking*).
# - **S3LDBO** does the same, but in most iterations an agent skips its derivatives and keeps its last ones. A coin with
#   probability $p$ decides.
# - **DSVRBGD** reads minibatches, and corrects its last estimate by their difference at two points (*STORM*).
# - For comparison **D-SOBA**: averages the variables and tracks nothing.

# %%
gossip = bx.gossip(graphs["torus"])
steps = bx.Levels(x=0.03, y=0.15, v=0.15)

methods = {
    "SLDBO": bx.decentralized.sldbo(problem, gossip, steps),
    "S3LDBO, p = 0.2": bx.decentralized.s3ldbo(problem, gossip, steps, coins=bx.coins.independent(0.2)),
    "DSVRBGD": bx.decentralized.dsvrbgd(
        problem, gossip, steps, sample=bx.sampling.minibatch(8), momentum=0.05, rate=0.3
    ),
    "D-SOBA": bx.decentralized.dsoba(problem, gossip, steps),
}


def run(method, T=1000):
    x, y = bx.replicate((jnp.zeros(D), jnp.zeros(D)), n)

    def one(state, _):
        state, info = method.step(jax.random.key(0), state, batch)
        error = jnp.sqrt(jnp.mean(jnp.sum((state.x - solution) ** 2, axis=1)))
        return state, (error, jnp.mean(info.calls.hessian_products), jnp.mean(info.bytes))

    start = method.init(x, y, batch)
    _, history = jax.jit(lambda state: jax.lax.scan(one, state, None, T))(start)
    return jax.device_get(history)


results = {name: run(method) for name, method in methods.items()}

# %%
COLORS = {"SLDBO": BLUE, "S3LDBO, p = 0.2": GREEN, "DSVRBGD": ORANGE, "D-SOBA": GREY}
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, layout="constrained")
for name, (error, evaluations, _) in results.items():
    left.semilogy(error, color=COLORS[name], lw=2, label=name)
    right.semilogy(np.cumsum(evaluations), error, color=COLORS[name], lw=2)
left.set(xlabel="iterations, or rounds of communication", ylabel="distance of the agents to $x^*$ (rms)")
right.set(xlabel="derivative evaluations of an agent", xlim=(0, 1000))
left.legend()
plt.show()

for name, (error, evaluations, sent) in results.items():
    print(f"{name:16} distance {error[-1]:.1e}, {evaluations.sum():5.0f} evaluations, {sent.sum():9,.0f} bytes sent")
assert results["SLDBO"][0][-1] < 1e-10
assert results["S3LDBO, p = 0.2"][0][-1] < 1e-10

# %% [markdown]
# What to see:
#
# - SLDBO and S3LDBO reach the solution to rounding, on a torus and with agents that disagree about everything. (On the
#   ring they do so too, in several times as many rounds: that is the gap. Put `graphs["ring"]` above and see.)
#   Averaging alone does not: D-SOBA stops where the agents' different pulls balance, at a distance that depends on the
#   step sizes.
# - S3LDBO needs somewhat more *iterations* than SLDBO with these step sizes, and far fewer *evaluations*.
# - DSVRBGD reads 8 of 40 examples at a time (twice an iteration, hence two evaluations) and levels out at the noise
#   that its constant momentum leaves.

# %% [markdown]
# ## 4. What skipping saves
#
# A smaller $p$ is a cheaper iteration, and older directions: more iterations, though far fewer evaluations, until the
# step sizes no longer suit such old directions. (With smaller steps $p$ may be smaller, too.)

# %%
TARGET = 1e-6
print(f"{'':10}{'iterations':>12}{'evaluations':>13}    to a distance of {TARGET:g}")
for p in (1.0, 0.5, 0.2, 0.1, 0.05):
    error, evaluations, _ = run(bx.decentralized.s3ldbo(problem, gossip, steps, coins=bx.coins.independent(p)))
    reached = np.flatnonzero(error < TARGET)
    if reached.size:
        k = reached[0] + 1
        print(f"p = {p:<6}{k:12}{1 + evaluations[:k].sum():13.0f}")
    else:
        print(f"p = {p:<6}{'–':>12}{'–':>13}    (ends at {error[-1]:.1e})")

# %% [markdown]
# Communication goes on in every iteration: skipping saves computing, not bytes. It pays where a derivative costs more
# than a message. `coins.independent(probability)` lets each agent decide by itself, which is right on machines of their
# own. If all agents live on one device, take `coins.subset(probability)`: a fixed number of agents is drawn in each
# iteration, and the program gathers those and evaluates no other.

# %% [markdown]
# ## 5. The same on data: wrong labels in images that nobody shares
#
# Eight agents on a ring hold small images of digits, sorted by label: an agent sees two or three of the ten digits.
# 30 % of the training labels are drawn again at random. $x$ has one entry per training image of all agents, and
# $\sigma(x_e)$ is the weight of image $e$ in the inner loss. An agent's own loss reads its own entries of $x$ only, but
# what these should be depends on a classifier of *all* digits, which no agent could train alone.

# %%
n = 8
images, labels = load_digits(return_X_y=True)
images, random = (images / 16).astype(np.float32), np.random.default_rng(0)
train, trusted, test = np.split(random.permutation(len(labels)), [960, 1280])
given = np.where(random.random(960) < 0.3, random.integers(0, 10, 960), labels[train])
wrong = given != labels[train]

by_train, by_trusted = bx.partition.shards(n)(labels[train], labels[trusted])
inner, inner_weights = bx.partition.stack((images[train], given, np.arange(960)), by_train)
outer, outer_weights = bx.partition.stack((images[trusted], labels[trusted]), by_trusted)
batch = bx.Batch(outer=(outer, outer_weights), inner=(inner, inner_weights))
print(f"{wrong.mean():.0%} of {len(train)} labels are wrong; digits of the agents:")
print(*("".join(map(str, np.unique(labels[train][rows]))) for rows in by_train), sep=", ")


def cross_entropy(y, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(images @ y, labels)


def outer_loss(x, y, batch):
    data, weights = batch
    return jnp.mean(weights * cross_entropy(y, *data))


def inner_loss(x, y, batch):
    (images, labels, ids), weights = batch
    fit = jnp.mean(weights * jax.nn.sigmoid(x[ids]) * cross_entropy(y, images, labels))
    return fit + 1e-3 * jnp.sum(y**2)


# %%
cleaning, gossip = bx.BilevelProblem(outer_loss, inner_loss), bx.gossip(bx.topology.ring(n))
steps = bx.Levels(x=300.0, y=0.6, v=0.6)
methods = {
    "SLDBO": bx.decentralized.sldbo(cleaning, gossip, steps),
    "S3LDBO, p = 0.1": bx.decentralized.s3ldbo(cleaning, gossip, steps, coins=bx.coins.independent(0.1)),
}


def clean(method, T=1500):
    x, y = bx.replicate((jnp.zeros(960), jnp.zeros((64, 10))), n)

    def one(state, _):
        state, info = method.step(jax.random.key(0), state, batch)
        loss = jnp.mean(cross_entropy(state.y.mean(0), images[trusted], labels[trusted]))
        return state, (loss, jnp.mean(info.calls.hessian_products))

    start = method.init(x, y, batch)
    state, history = jax.jit(lambda state: jax.lax.scan(one, state, None, T))(start)
    return jax.device_get((state.x.mean(0), state.y.mean(0), *history))


results = {name: clean(method) for name, method in methods.items()}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
for (name, (x, y, loss, evaluations)), color in zip(results.items(), (BLUE, GREEN), strict=True):
    at_start = 0 if name == "SLDBO" else 1  # S3LDBO evaluates once before the first iteration
    left.loglog(at_start + np.cumsum(evaluations), loss, color=color, lw=2, label=name)
    accuracy = np.mean(np.argmax(images[test] @ y, axis=1) == labels[test])
    area = roc_auc_score(~wrong, x)
    print(f"{name:16} trusted loss {loss[-1]:.3f}, test accuracy {accuracy:.3f}, AUC of the weights {area:.3f}")
    assert accuracy > 0.93
    assert area > 0.93
left.set(xlabel="derivative evaluations of an agent", ylabel="loss on the trusted images")
left.set_yticks([0.3, 0.5, 1, 2], ["0.3", "0.5", "1", "2"])
left.set_yticks([], minor=True)
left.legend()
for part, color, label in ((~wrong, BLUE, "right labels"), (wrong, RED, "wrong labels")):
    right.hist(x[part], np.linspace(x.min(), x.max(), 40), color=color, alpha=0.7, label=label)
right.set(xlabel=f"what the agents learnt: $x$ ({name})", ylabel="training images")
right.legend()
plt.show()

# %% [markdown]
# Both end at the same place, and S3LDBO with a tenth of the evaluations. The images never left their agents; what
# travelled is $x$, $y$, $v$ and their trackers.
#
# On several devices or hosts the methods stay as they are: `bx.parallel` places the agents. Which method to take, what
# it costs and what it converges to is said in the docstring of each in `bx.decentralized`.

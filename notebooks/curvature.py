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
# # Curvature: dividing by a Hessian that you cannot form
#
# Every implicit hypergradient contains one linear system. With the inner loss $g$ and the outer loss $f$,
#
# $$\nabla F(x) = \nabla_x f - \nabla^2_{xy} g \, v, \qquad \nabla^2_{yy} g \; v = \nabla_y f ,$$
#
# and $\nabla^2_{yy} g$ has as many rows as the model has weights. This page is about what happens to $v$ when the
# system is solved by halves, and about Kronecker factors (KFAC), which look at the model instead of multiplying more
# often.
#
# 1. Why the identity and short series mislead
# 2. What the curvature of a layer looks like
# 3. Quality and cost, on a network that is small enough for the exact answer
# 4. Cleaning a data set
# 5. Which one when

# %%
import itertools
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from scipy.optimize import minimize
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import bilevax as bx

jax.config.update("jax_enable_x64", True)  # so that the exact answer is exact
plt.rcParams.update({"figure.dpi": 100, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
# The colours of Okabe and Ito, which colour-blind readers can tell apart.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#999999"

# %% [markdown]
# ## 1. Why the identity and short series mislead
#
# Two weights, and a valley: the curvature $H$ of $g$ is 1 across and 1/30 along it. The solution $v$ of $H v = b$ is
# the lowest point of $\frac12 v^\top H v - b^\top v$, whose contours are drawn below. The slope $b$ points across the
# valley, since that is where anything is steep. What is wanted lies along it.

# %%
turn = np.array([[np.cos(0.5), -np.sin(0.5)], [np.sin(0.5), np.cos(0.5)]])
H = turn @ np.diag([1 / 30, 1.0]) @ turn.T
b = H @ (turn @ np.array([4.0, 0.6]))


def valley(x, y, batch):
    return 0.5 * y @ H @ y


def solve(ihvp, b, loss=valley):
    """v and what the solver reports, at y = 0."""
    apply, _ = ihvp.prepare(None, (), loss, (0.0, jnp.zeros_like(b), None))
    return apply(b)


series = np.array([solve(bx.ihvp.neumann(terms=k, step_size=1.0), b)[0] for k in (0, 1, 2, 5, 10, 20, 50, 100)])
conjugate = np.array([np.zeros(2), *(solve(bx.ihvp.cg(maxiter=k), b)[0] for k in (1, 2))])
v = solve(bx.ihvp.exact(), b)[0]


def cosine(a, b):
    return float(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


# %% [markdown]
# On the right the same in a hundred dimensions, with eigenvalues of $H$ evenly spread on a logarithmic scale and a
# random $b$, averaged over twenty draws: how far is the direction of $v$ from the true one, as the condition number
# grows?

# %%
conditions = np.geomspace(1, 1e5, 13)
draws = jax.random.normal(jax.random.key(0), (20, 100))
solvers = {
    "identity": bx.ihvp.identity(),
    "10 Neumann products": bx.ihvp.neumann(terms=10, step_size=1.0),
    "100 Neumann products": bx.ihvp.neumann(terms=100, step_size=1.0),
    "10 CG products": bx.ihvp.cg(maxiter=10),
    "30 CG products": bx.ihvp.cg(maxiter=30, tol=0.0),
}


def mean_cosine(ihvp):
    def one(condition, b):
        eigenvalues = condition ** -jnp.linspace(0.0, 1.0, b.size)
        w = solve(ihvp, b, lambda x, y, batch: 0.5 * eigenvalues @ y**2)[0]
        exact = b / eigenvalues
        return w @ exact / (jnp.linalg.norm(w) * jnp.linalg.norm(exact))

    return jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(conditions, draws).mean(1)


figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.2), layout="constrained")
grid = np.stack(np.meshgrid(np.linspace(-0.8, 4.4, 120), np.linspace(-0.6, 3.2, 120)), axis=-1)
left.contour(
    grid[..., 0], grid[..., 1], 0.5 * np.einsum("...i,ij,...j", grid, H, grid) - grid @ b, 16, colors=GREY, alpha=0.5
)
left.plot(*conjugate.T, "-s", color=GREEN, ms=6, label="CG: 1 and 2 products")
left.plot(*series.T, "-o", color=SKY, ms=5, label="Neumann: 1, 2, 5, 10, 20, 50, 100 products")
left.plot(*series[0], "o", color=ORANGE, ms=10, label="identity: the direction of $b$")
left.plot(*v, "*", color=BLACK, ms=16, label=r"exact $v = H^{-1} b$")
left.set(aspect="equal", xlabel="$v_1$", ylabel="$v_2$", title="two weights, condition number 30")
left.legend(loc="upper left", fontsize="small")
for (name, ihvp), color in zip(solvers.items(), (ORANGE, SKY, BLUE, GREEN, PURPLE), strict=True):
    right.semilogx(conditions, mean_cosine(ihvp), color=color, lw=2, label=name)
right.set(xlabel="condition number of $H$", ylabel="cosine to the exact $v$", title="a hundred weights", ylim=(0, 1.05))
right.legend(loc="lower left")
plt.show()

print(f"cosine of the identity to v: {cosine(series[0], v):.2f}; of 10 Neumann products: {cosine(series[4], v):.2f}")
assert np.linalg.norm(conjugate[-1] - v) < 1e-8
assert cosine(series[0], v) < cosine(series[4], v) < cosine(series[-1], v)

# %% [markdown]
# A series of $k$ products has seen eigenvalues down to about $1/k$ of the largest; below, it returns the identity. CG
# needs the square root of that. The weights of a network are conditioned worse than any number of products that one
# would pay for, so the next idea is to *know* the curvature.

# %% [markdown]
# ## 2. What the curvature of a layer looks like
#
# The digits again, 500 training images of which 40 % have their label drawn anew, a network 64-10-10, and a weight
# $\sigma(x_i)$ for every training image. This time the inner loss is built from its parts. A `ModelLoss` *is* the
# function `g(x, y, batch)`, and it lets the curvature see the model inside.

# %%
digits = load_digits()
images, labels = (digits.images / 16).reshape(-1, 64), digits.target


def spoiled(seed, size, trusted, share):
    """Training images with labels of which a share is drawn again, trusted images, test images, and which are wrong."""
    random = np.random.default_rng(seed)
    train, trust, test = np.split(random.permutation(len(labels)), [size, size + trusted])
    given = np.where(random.random(size) < share, random.integers(0, 10, size), labels[train])
    batch = bx.Batch(outer=(images[trust], labels[trust]), inner=(images[train], given, np.arange(size)))
    return jax.device_put((batch, (images[test], labels[test]), given != labels[train]))


def network(key, *sizes):
    keys = jax.random.split(key, len(sizes) - 1)
    layers = zip(keys, itertools.pairwise(sizes), strict=True)
    return [{"W": jax.random.normal(key, (m, n)) / m**0.5, "b": jnp.zeros(n)} for key, (m, n) in layers]


def model(y, images):
    *hidden, last = y
    for layer in hidden:
        images = jnp.tanh(images @ layer["W"] + layer["b"])
    return images @ last["W"] + last["b"]


g = bx.curvature.ModelLoss(
    model=model,
    loss=bx.curvature.softmax_cross_entropy,
    split=lambda x, batch: batch[:2],
    weights=lambda x, batch: jax.nn.sigmoid(x[batch[2]]),
    l2=1e-3,
)


def f(x, y, batch):
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(y, images), labels).mean()


batch, _, wrong = spoiled(seed=0, size=500, trusted=500, share=0.4)
x = jnp.where(wrong, -3.0, 3.0)  # weights as they are near the end of cleaning
y0 = network(jax.random.key(0), 64, 10, 10)
print(bx.curvature.describe(g, x, y0, batch.inner))

# %% [markdown]
# Nothing in `model` was rewritten: the library reads the traced program, and finds that each `W` multiplies the data,
# and that each `b` is added to the result. For such a layer, with inputs $a$ (and a 1 for the bias) and slopes $u$ of
# the loss at its outputs, the block of the Gauss–Newton matrix is the mean of $(a a^\top) \otimes (u u^\top)$ over the
# examples. KFAC takes the product of the means instead of the mean of the products:
#
# $$G_{\text{layer}} \approx A \otimes B, \qquad A = \mathrm{mean}\, a a^\top, \quad B = \mathrm{mean}\, u u^\top .$$
#
# A is the second moment of what goes into the layer, B of what comes back to it. Two small matrices stand for a large
# one, and their eigenvectors are those of the product. So the inverse of
# $A \otimes B + \delta I$ costs two small decompositions, and no product with the Hessian at all.
#
# Here they are after training to a minimum of $g$.

# %%
flat, unravel = ravel_pytree(y0)
value_and_slope = jax.jit(lambda flat: jax.value_and_grad(lambda flat: g(x, unravel(flat), batch.inner))(flat))
found = minimize(lambda w: [np.asarray(part) for part in value_and_slope(w)], flat, jac=True, method="L-BFGS-B",
                 options={"maxiter": 20000, "maxfun": 20000, "ftol": 0, "gtol": 1e-8, "maxcor": 50})  # fmt: skip
y = unravel(jnp.asarray(found.x))
print(f"‖∇_y g‖ = {np.linalg.norm(found.jac):.1e}, {flat.size} weights")

factors = bx.curvature.kronecker.factors(None, g, x, y, batch.inner, fisher=bx.curvature.fisher.exact)
first, last = factors.values()

figure, axes = plt.subplots(1, 4, figsize=(13, 3.3), layout="constrained", width_ratios=(1, 1, 1, 1.2))
for panel, matrix, title in (
    (axes[0], first.A, "A of the first layer: 64 pixels and 1"),
    (axes[1], first.B, "B of the first layer: 10 units"),
    (axes[2], last.B, "B of the last layer: 10 classes"),
):
    largest = np.abs(matrix).max()
    panel.imshow(matrix, cmap="RdBu_r", vmin=-largest, vmax=largest)
    panel.set_title(title, fontsize="medium")
    panel.set(xticks=[], yticks=[])
for name, matrix, color in (("A, first", first.A, BLUE), ("B, first", first.B, SKY), ("A, last", last.A, RED),
                            ("B, last", last.B, ORANGE)):  # fmt: skip
    eigenvalues = np.maximum(np.linalg.eigvalsh(matrix)[::-1], 1e-17)
    axes[3].semilogy(np.arange(1, len(matrix) + 1), eigenvalues / eigenvalues[0], ".-", color=color, label=name)
axes[3].set(ylim=(1e-6, 2), xlabel="number", title="eigenvalues / the largest")
axes[3].legend()
plt.show()

# %% [markdown]
# The pattern of A is that of the images: neighbouring pixels are bright together. That alone spreads the curvature over
# several orders of magnitude, in every network that sees images. (Pixels that are never bright give zeros.) How good is
# the product? The last layer is small enough for its true block, $110 \times 110$.

# %%
product = bx.curvature.gauss_newton(g, x, y, batch.inner)
zero = optax.tree.zeros_like(y)


def block_row(v):  # v [11, 10], the bias as last row
    full = product([*zero[:-1], {"W": v[:-1], "b": v[-1]}])[-1]
    return jnp.concatenate([full["W"], full["b"][None]]) - 1e-3 * v


true_block = jax.jit(jax.vmap(block_row))(jnp.eye(110).reshape(110, 11, 10)).reshape(110, 110)
kronecker = jnp.kron(last.A, last.B)

figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
largest = np.percentile(np.abs(true_block), 99.5)
titles = ("true Gauss–Newton block of the last layer", r"$A \otimes B$", "difference")
for panel, matrix, title in zip(axes, (true_block, kronecker, kronecker - true_block), titles, strict=True):
    panel.imshow(matrix, cmap="RdBu_r", vmin=-largest, vmax=largest)
    panel.set(xticks=[], yticks=[], title=title)
plt.show()
error = np.linalg.norm(kronecker - true_block) / np.linalg.norm(true_block)
print(f"relative difference {error:.2f}, with {last.A.size + last.B.size} numbers in place of {true_block.size:,}")
assert error < 1

# %% [markdown]
# The coarse structure is right and the details are not: the slopes of an example depend on its inputs, and the product
# of two means does not know that. So KFAC is no exact answer. The question is what one gets for the money.

# %% [markdown]
# ## 3. Quality and cost
#
# At this minimum $g$ is small enough for `ihvp.exact`. Below, every estimate of the hypergradient is compared with it.
# `pcg` is CG with the inverse of the Kronecker factors as preconditioner: KFAC makes the first guess, and every product
# corrects it.


# %%
def compare(ihvp, repetitions=7):
    hypergrad = bx.hypergradient(f, bx.inner.implicit(g, ihvp=ihvp, warm_start=False))
    estimate = jax.jit(lambda x, y, batch: hypergrad.estimate(jax.random.key(0), hypergrad.init(x, y), x, batch))
    grad, _, info = jax.block_until_ready(estimate(x, y, batch))
    seconds = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        jax.block_until_ready(estimate(x, y, batch))
        seconds.append(time.perf_counter() - begin)
    return grad, int(info.inner.calls.hessian_products), min(seconds)


exact, _, exact_seconds = compare(bx.ihvp.exact(), repetitions=1)
kfac = bx.ihvp.kfac(damping=1e-3)
counts = (3, 10, 30)
families = {
    "identity": [bx.ihvp.identity(0.2)],
    "Neumann": [bx.ihvp.neumann(terms=k, step_size=0.2) for k in counts[1:]],
    "CG": [bx.ihvp.cg(maxiter=k, tol=0.0) for k in counts],
    "KFAC": [kfac],
    "EKFAC": [bx.ihvp.ekfac(damping=1e-3)],
    "PCG with KFAC": [bx.ihvp.cg(maxiter=k, tol=0.0, preconditioner=kfac) for k in counts[:2]],
}
frontier = {
    name: [(cosine(grad, exact), products, seconds) for grad, products, seconds in map(compare, members)]
    for name, members in families.items()
}

figure, panels = plt.subplots(1, 2, figsize=(12, 4), sharey=True, layout="constrained")
for (name, members), color in zip(frontier.items(), (ORANGE, SKY, GREEN, RED, PURPLE, BLUE), strict=True):
    quality, products, seconds = zip(*members, strict=True)
    marker = "D" if len(members) == 1 else "o"
    panels[0].plot(products, quality, marker + "-", color=color, label=name)
    panels[1].plot(1e3 * np.array(seconds), quality, marker + "-", color=color)
panels[0].set(xscale="symlog", xlabel="products with the Hessian", ylabel="cosine to the exact hypergradient")
panels[0].set_xticks([0, *counts], ["0", *map(str, counts)])
panels[1].set(xscale="log", xlabel="time of an estimate (ms)")
figure.legend(loc="outside right center")
plt.show()

print(f"exact: {flat.size} products and a decomposition, {exact_seconds:.2f} s")
for name, members in frontier.items():
    print(f"{name:14}", ", ".join(f"{products} products: {quality:.2f}" for quality, products, _ in members))
assert frontier["identity"][0][0] < frontier["KFAC"][0][0]
assert frontier["CG"][1][0] < frontier["PCG with KFAC"][1][0]

# %% [markdown]
# What to see:
#
# - Without a single product KFAC is ahead of the identity and of thirty terms of the series.
# - A few iterations of CG catch up with KFAC, and KFAC as preconditioner keeps PCG ahead of CG after as many products.
# - EKFAC corrects the eigenvalues, at the price of one more backward pass, and hardly moves the direction.
# - Time is another matter than products. Networks as small as this one are decomposed quickly; on a CPU the
#   decompositions of wide layers take longer than anything else. They need not be new in every outer step,
#   `kfac(inverse_every=10)`, and do not grow with the number of examples.

# %% [markdown]
# ## 4. Cleaning a data set
#
# In use nothing is solved and nothing is exact. The weights are to be learnt from 100 trusted images, with half of 800
# labels drawn again; there are ten inner steps for an outer step, and everything sees minibatches of 200. Three
# splits of the data, at once by `jax.vmap`.

# %%
INNER, OUTER_STEPS, RATE = 10, 150, 0.5
sample = bx.sampling.minibatch(200)


def implicit(ihvp):
    samples = {"sample": sample, "cross_sample": sample}
    return bx.inner.implicit(g, optax.sgd(RATE), INNER, ihvp=ihvp, warm_start=False, **samples)


gauss_newton = bx.curvature.gauss_newton
methods = {
    "identity": implicit(bx.ihvp.identity(RATE)),
    "3 CG products": implicit(bx.ihvp.cg(maxiter=3, curvature=gauss_newton, sample=sample)),
    "KFAC": implicit(bx.ihvp.kfac(damping=1e-3, inverse_every=10, sample=sample)),
    "reverse, all inner steps": bx.inner.reverse(g, optax.sgd(RATE), INNER, sample=sample),
}


def clean(solver, split, seed):
    batch, (test_images, test_labels), _ = split
    hypergrad, outer = bx.hypergradient(f, solver), optax.adam(0.1)
    x, y = jnp.zeros(800), network(jax.random.key(seed), 64, 64, 64, 10)

    def step(carry, key):
        x, state, outer_state = carry
        grad, state, _ = hypergrad.estimate(key, state, x, batch)
        updates, outer_state = outer.update(grad, outer_state)
        accuracy = jnp.mean(jnp.argmax(model(state.y, test_images), axis=1) == test_labels)
        return (optax.apply_updates(x, updates), state, outer_state), (x, accuracy)

    carry = (x, hypergrad.init(x, y, batch), outer.init(x))
    return jax.lax.scan(step, carry, jax.random.split(jax.random.key(seed), OUTER_STEPS))[1]


@jax.enable_x64(False)
def run(solver):
    parts = [spoiled(seed, size=800, trusted=100, share=0.5) for seed in range(3)]
    splits, seeds = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts), jnp.arange(3)
    program = jax.jit(jax.vmap(lambda split, seed: clean(solver, split, seed))).lower(splits, seeds).compile()
    begin = time.perf_counter()
    history, accuracy = jax.device_get(program(splits, seeds))
    return history, accuracy, splits[2], time.perf_counter() - begin


results = {name: run(solver) for name, solver in methods.items()}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
print(f"{'after ' + str(OUTER_STEPS) + ' outer steps':26}{'test accuracy':>14}{'AUC':>8}{'seconds':>9}")
for (name, (history, accuracy, wrong, seconds)), color in zip(results.items(), (ORANGE, GREEN, RED, BLUE), strict=True):
    steps = np.arange(0, OUTER_STEPS, 10)
    areas = np.array([[roc_auc_score(~bad, xs[k]) for k in steps] for bad, xs in zip(wrong, history, strict=True)])
    left.plot(accuracy.mean(0), color=color, lw=2, label=name)
    right.plot(steps, areas.mean(0), color=color, lw=2)
    print(f"{name:26}{accuracy[:, -1].mean():14.3f}{areas[:, -1].mean():8.3f}{seconds:9.1f}")
    assert areas[:, -1].mean() > 0.8
left.set(xlabel="outer steps", ylabel="test accuracy", ylim=(0.6, None))
right.set(xlabel="outer steps", ylabel="AUC of the weights: right against wrong labels", ylim=(0.7, 1))
left.legend(loc="lower right")
plt.show()

# %% [markdown]
# What to see:
#
# - The identity knows the steep directions alone: it is slow to find the wrong labels, and its model gets worse on the
#   way.
# - KFAC and three products of CG both repair that, in about the same time. Here KFAC tells wrong labels from right ones
#   better, and CG has the better model; three splits are no verdict.
# - With only ten inner steps nothing beats differentiating through all of them. That takes the longest time and the
#   memory of ten networks, so that it is no option for thousands of steps. The implicit ones are.
#
# ## 5. Which one when
#
# | if | then |
# |---|---|
# | a few inner steps fit into memory | `inner.reverse` |
# | a network follows $x$ on minibatches | `ihvp.kfac(inverse_every=10)`, or three products of `ihvp.cg` |
# | $y$ is solved well on all data, and $v$ must be accurate | `ihvp.cg(preconditioner=ihvp.kfac())` |
# | the inner problem is convex, or strongly regularized as in iMAML | `ihvp.cg` |
# | $y$ is far from a minimum, and CG reports a breakdown | `ihvp.kfac`, or `ihvp.cg(curvature=gauss_newton)` |
# | the loss has no model inside that a `ModelLoss` could name | `ihvp.cg`, `ihvp.nystrom` |
#
# `python -m benchmarks hypergradients` repeats sections 3 and 4 with more methods, networks and seeds.

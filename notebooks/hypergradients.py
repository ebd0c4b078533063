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
# # Bilevel optimization in ten minutes
#
# You know JAX and optax: you take the gradient of a loss and hand it to an optimizer. This page is about losses whose
# gradient `jax.grad` does not give you for free, because a part of the loss is *the result of another training run*.
#
# 1. The problem
# 2. A picture in one dimension
# 3. A loop of nine lines: cleaning a data set
# 4. What it learnt
# 5. What `info` tells you
# 6. Inside your own loss: meta-learning
# 7. Which estimator when

# %%
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_diabetes, load_digits
from sklearn.metrics import roc_auc_score

import bilevax as bx

plt.rcParams.update({"figure.dpi": 100, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
# The colours of Okabe and Ito, which colour-blind readers can tell apart.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#999999"

# %% [markdown]
# ## 1. The problem
#
# There are two losses and two variables. The **inner** (lower) level trains $y$ on the loss $g$. The **outer** (upper)
# level looks at the trained $y$ through another loss $f$, and moves $x$:
#
# $$\min_x\; F(x) = f(x, y^*(x)) \qquad\text{with}\qquad y^*(x) = \arg\min_y\; g(x, y).$$
#
# In practice $y$ is the weights of a model, and $x$ is whatever you would otherwise set by hand:
#
# | $x$ | $g(x, y)$ | $f(x, y)$ |
# |---|---|---|
# | hyperparameters (a ridge strength) | training loss plus penalty | validation loss |
# | a weight for each training example | weighted training loss | loss on a few examples that you trust |
# | an initialization of $y$ | loss on a task's five examples | loss on new examples of that task |
#
# The gradient of $F$ is called the **hypergradient**. At the solution, $\nabla_y g(x, y^*(x)) = 0$ for every $x$.
# Differentiating this equation says how $y^*$ moves with $x$, and the chain rule does the rest:
#
# $$\nabla F(x) = \nabla_x f - \nabla^2_{xy} g \, v \qquad\text{where}\qquad \nabla^2_{yy} g \; v = \nabla_y f.$$
#
# The first term is what `jax.grad` of $f$ sees. The second one goes through the training run. It asks for two things
# that are never exact in practice: a $y$ that solves the inner problem, and a vector $v$ that solves a linear system
# with the Hessian of $g$. The alternative is to run a fixed number of inner steps and to backpropagate through them.
# **Every estimator of the hypergradient is a choice of how to approximate these two things**, and the next picture
# shows what each choice costs.

# %% [markdown]
# ## 2. A picture in one dimension
#
# Ridge regression on the diabetes data, with few training examples: $y$ is the weights, $x = \log\lambda$ the logarithm
# of the ridge strength, and $F(x)$ the validation error of the weights that are trained with this $\lambda$. In
# bilevax every loss has the same signature, `loss(x, y, batch)`, and the two batches travel in a `bx.Batch`.

# %%
inputs, targets = load_diabetes(return_X_y=True)
inputs, targets = (inputs - inputs.mean(0)) / inputs.std(0), (targets - targets.mean()) / targets.std()
order = np.random.default_rng(1).permutation(len(targets))
train, validation = order[:30], order[30:230]
batch = bx.Batch(outer=(inputs[validation], targets[validation]), inner=(inputs[train], targets[train]))
y0 = np.zeros(inputs.shape[1])


def f(x, y, batch):
    inputs, targets = batch
    return 0.5 * jnp.mean((inputs @ y - targets) ** 2)


def g(x, y, batch):
    return f(x, y, batch) + 0.5 * jnp.exp(x) * jnp.sum(y**2)


def closed_form(x, y0, batch):
    inputs, targets = batch
    hessian = inputs.T @ inputs / len(targets) + jnp.exp(x) * jnp.eye(len(y0))
    return jnp.linalg.solve(hessian, inputs.T @ targets / len(targets))


print(f"{len(train)} training and {len(validation)} validation examples, {len(y0)} weights")

# %% [markdown]
# An **inner solver** says how $y$ is found *and* how the result is differentiated. Here are seven of them, in two
# families.
#
# *The inner problem is solved*, here by a formula, and only $v$ is approximated. `exact` divides by the dense Hessian;
# `cg` stops after three iterations; `neumann` sums ten terms of the series
# $v = \eta \sum_k (I - \eta \nabla^2_{yy} g)^k\, \nabla_y f$; `identity` keeps its first term, $v = \eta \nabla_y f$,
# which is the same as differentiating one last gradient step.
#
# *The inner problem is cut short*: $T$ steps of gradient descent from $y = 0$. `reverse` backpropagates through all of
# them; a `chain` of `no_gradient` and `reverse` through the last $K$ only; `implicit` applies the formula for $v$
# exactly, as if $y_T$ were the solution.

# %%
ETA, T, K = 0.2, 15, 5
descent = optax.sgd(ETA)

solved = {
    "exact": bx.inner.implicit(g, solve=closed_form, ihvp=bx.ihvp.exact()),
    "3 CG iterations": bx.inner.implicit(g, solve=closed_form, ihvp=bx.ihvp.cg(maxiter=3)),
    "10 Neumann terms": bx.inner.implicit(g, solve=closed_form, ihvp=bx.ihvp.neumann(terms=9, step_size=ETA)),
    "identity (one step)": bx.inner.implicit(g, solve=closed_form, ihvp=bx.ihvp.identity(ETA)),
}
cut_short = {
    f"exact $v$ at the unsolved $y_{{{T}}}$": bx.inner.implicit(g, descent, steps=T, ihvp=bx.ihvp.exact()),
    f"reverse, all {T} steps": bx.inner.reverse(g, descent, steps=T),
    f"reverse, last {K} steps": bx.inner.chain(
        bx.inner.no_gradient(g, descent, T - K), bx.inner.reverse(g, descent, K)
    ),
}

# %% [markdown]
# `bx.differentiable` turns an inner solver into an ordinary function `solve(x, y0, batch)`, whose derivative is the
# solver's own. So $F$ and its slope are one line each, and `jax.vmap` draws the whole curve. (float64, so that the
# comparison with finite differences below means something.)


# %%
def curve(solver):
    solve = bx.differentiable(solver)

    def value(x, batch):  # F(x)
        return f(x, solve(x, y0, batch.inner), batch.outer)

    return jax.jit(jax.vmap(jax.value_and_grad(value), in_axes=(0, None)))


hypergrad = bx.hypergradient(f, solved["exact"])


def slope(x, batch):  # the same number, by the interface of section 3
    return hypergrad.estimate(None, hypergrad.init(x, y0), x, batch)[0]


with jax.enable_x64(True):
    grid = jnp.linspace(-7.0, 1.0, 161)
    functions = {name: curve(solver) for name, solver in (solved | cut_short).items()}
    curves = {name: jax.device_get(function(grid, batch)) for name, function in functions.items()}

    h = 1e-5
    differences = (functions["exact"](grid + h, batch)[0] - functions["exact"](grid - h, batch)[0]) / (2 * h)
    error = jnp.abs(curves["exact"][1] - differences).max() / jnp.abs(differences).max()

    same = jnp.abs(curves["exact"][1] - jax.jit(jax.vmap(slope, (0, None)))(grid, batch)).max()
    grid, error, same = jax.device_get((grid, error, same))

print(f"exact slope against finite differences of F: largest relative error {error:.1e}")
print(f"differentiable against hypergradient: largest difference {same:.1e}")
assert error < 1e-7
assert same < 1e-12

# %%
COLORS = dict(zip(curves, (BLACK, GREEN, SKY, ORANGE, PURPLE, BLUE, RED), strict=True))
F_exact, F_T = curves["exact"][0], curves[f"reverse, all {T} steps"][0]
at = [int(np.argmin(np.abs(grid - x))) for x in (-5.0, -2.9, -1.0)]  # where the tangents are drawn


def where_zero(slopes):
    """Where gradient descent with these slopes comes to rest."""
    i = np.flatnonzero(slopes < 0)[-1]
    return np.interp(0.0, slopes[i : i + 2], grid[i : i + 2])


figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharex=True, sharey="row", layout="constrained")
for column, family in enumerate((solved, cut_short)):
    top, bottom = axes[:, column]
    top.plot(grid, F_exact, color=BLACK, lw=6, alpha=0.18, solid_capstyle="butt")
    top.text(-3.9, 0.455, "$F(x) = f(x, y^*(x))$")
    if column:
        top.plot(grid, F_T, color=BLUE, lw=6, alpha=0.18, solid_capstyle="butt")
        top.text(-6.95, F_T[0] - 0.022, f"$F_{{{T}}}(x) = f(x, y_{{{T}}}(x))$", color=BLUE)
        bottom.plot(grid, curves["exact"][1], color=BLACK, lw=2.5, label="exact")
    for name in family:
        F, slopes = curves[name]
        for i in at:
            dx = np.array([-0.75, 0.75])
            top.plot(grid[i] + dx, F[i] + slopes[i] * dx, color=COLORS[name], lw=2)
        bottom.plot(grid, slopes, color=COLORS[name], lw=2.5 if name == "exact" else 2, label=name)
    for name in ("exact", *family):
        bottom.plot(where_zero(curves[name][1]), 0, "o", color=COLORS[name], ms=7, mec="white", zorder=3)
    top.plot(grid[at], (F_T if column else F_exact)[at], "o", color=BLACK, ms=5, zorder=3)
    bottom.axhline(0, color=GREY, lw=0.8)
    bottom.set(xlabel=r"$x = \log\lambda$")
    bottom.legend(loc="upper left", title="slope by", alignment="left")
axes[0, 0].set(title="inner problem solved, $v$ approximated", ylabel="validation loss, and tangents")
axes[0, 1].set(title=f"inner problem cut short after $T = {T}$ steps")
axes[1, 0].set(ylabel=r"slope $\partial F / \partial x$; dots: where it is zero")
plt.show()

# %%
print(f"{'':32}{'slope at':>10}{'slope':>10}{'F there':>10}")
print(f"{'':32}{f'x = {grid[at[1]]:.1f}':>10}{'zero at':>10}{'− min F':>10}")
for name, (_, slopes) in curves.items():
    zero = where_zero(slopes)
    excess = np.interp(zero, grid, F_exact) - np.interp(where_zero(curves["exact"][1]), grid, F_exact)
    label = name.replace("$", "").replace("{", "").replace("}", "")
    print(f"{label:32}{slopes[at[1]]:+10.4f}{zero:10.2f}{excess:10.4f}")

# %% [markdown]
# What to see:
#
# - **Left.** The points are right and the slopes are too flat. A short series or a few CG iterations find the part of
#   $v$ along the steep directions of $g$ and miss the flat ones. For small $\lambda$ those are the directions that
#   matter, so the cheap estimators report a plateau where $F$ falls. A large $\lambda$ makes $g$ well conditioned, and
#   the estimators agree.
# - **Right.** $y_T$ has not reached $y^*$, and stopping early regularizes as well, so $F_T$ hardly depends on
#   $\lambda$ when $\lambda$ is small. `reverse` is no approximation: its tangents touch $F_T$, it is the exact slope
#   of *another function*. The truncated unroll underestimates that slope. The implicit formula at $y_T$ is the exact
#   slope of neither function: the inner loss is not at rest, and the formula assumes that it is.
# - **Bias** is what remains at a zero of the slope: the dots of the lower row are where gradient descent on $x$ would
#   come to rest. A slope that is too flat only costs time; a zero in the wrong place costs accuracy. The last column
#   above says how much.

# %% [markdown]
# ## 3. A loop of nine lines: cleaning a data set
#
# Now an $x$ with one entry per training example. We take small images of digits, and spoil the training set: for half
# of the images the label is drawn again at random. A few hundred images with labels that we trust are kept for $f$.
# The inner problem trains a softmax regression with the weight $\sigma(x_i)$ on example $i$:
#
# $$g(x, y) = \frac1N \sum_i \sigma(x_i)\, \ell_i(y) + \frac{\mu}{2} \|y\|^2, \qquad
#   f(x, y) = \text{mean loss on the trusted examples.}$$
#
# Nobody tells the program which labels are wrong. It may only ask: if this example weighed a little less, would the
# trained model do better on the trusted ones? That question is the hypergradient.

# %%
digits = load_digits()
images, labels = (digits.images / 16).reshape(-1, 64).astype(np.float32), digits.target


def spoiled(seed):
    """A split into training, trusted and test data, where half of the training labels are drawn again."""
    random = np.random.default_rng(seed)
    train, trusted, test = np.split(random.permutation(len(labels)), [1000, 1300])
    given = np.where(random.random(len(train)) < 0.5, random.integers(0, 10, len(train)), labels[train])
    batch = bx.Batch(outer=(images[trusted], labels[trusted]), inner=(images[train], given))
    return jax.device_put((batch, (images[test], labels[test]), labels[train]))


def cross_entropy(y, data):
    images, labels = data
    return optax.softmax_cross_entropy_with_integer_labels(images @ y["W"] + y["b"], labels)


def inner_loss(x, y, train):
    return jnp.mean(jax.nn.sigmoid(x) * cross_entropy(y, train)) + 5e-4 * optax.tree.norm(y, squared=True)


def outer_loss(x, y, trusted):
    return cross_entropy(y, trusted).mean()


batch, test, true_labels = spoiled(seed=0)
given_labels = batch.inner[1]
wrong = given_labels != true_labels
print(f"{len(wrong)} training images, {len(batch.outer[1])} trusted, {len(test[1])} for the test")
print(f"{wrong.mean():.1%} of the training labels are wrong (a label drawn again may be right by luck)")

# %% [markdown]
# And this is the whole program. `x` and `y` are any pytrees, the inner and the outer optimizer are any optax
# optimizers, and the loop is yours.

# %%
x, y = jnp.zeros(len(wrong)), {"W": jnp.zeros((64, 10)), "b": jnp.zeros(10)}

# %%
solver = bx.inner.implicit(inner_loss, optax.sgd(0.5, momentum=0.9), steps=20, ihvp=bx.ihvp.cg(maxiter=5))
hypergrad = bx.hypergradient(outer_loss, solver)
outer = optax.adam(0.1)
state, outer_state = hypergrad.init(x, y), outer.init(x)
estimate = jax.jit(hypergrad.estimate)
for key in jax.random.split(jax.random.key(0), 150):
    grad, state, info = estimate(key, state, x, batch)
    updates, outer_state = outer.update(grad, outer_state)
    x = optax.apply_updates(x, updates)

# %% [markdown]
# `estimate` is a gradient with a memory. Its `state` holds the trained `state.y` and the last $v$, and both are the
# starting points of the next outer step. That is why twenty inner steps and five CG iterations are enough: $x$ moves
# a little, so does $y^*(x)$, and the inner problem is followed rather than solved anew.

# %% [markdown]
# ## 4. What it learnt


# %%
def accuracy(y, data):
    images, labels = data
    return jnp.mean(jnp.argmax(images @ y["W"] + y["b"], axis=-1) == labels)


weights, order = np.asarray(jax.nn.sigmoid(x)), np.argsort(x)
train_images, given, true, wrong = (np.asarray(a) for a in (batch.inner[0], given_labels, true_labels, wrong))
rows = {
    "the lowest weights": order[:12],
    "the highest weights": order[:-13:-1],
    "the lowest among\nthe right labels": order[~wrong[order]][:12],
    "the highest among\nthe wrong labels": order[wrong[order]][:-13:-1],
}

figure, axes = plt.subplots(4, 12, figsize=(12, 5.6), layout="constrained")
for row, (title, chosen) in zip(axes, rows.items(), strict=True):
    row[0].set_ylabel(title, rotation=0, ha="right", va="center", labelpad=12)
    for panel, i in zip(row, chosen, strict=True):
        color = RED if wrong[i] else BLUE
        panel.imshow(train_images[i].reshape(8, 8), cmap="gray_r")
        panel.set(xticks=[], yticks=[], xlabel=f"{weights[i]:.3f}")
        panel.set_title(f"{given[i]} → {true[i]}", color=color, fontweight="bold" if wrong[i] else "normal")
        panel.spines[:].set(visible=True, color=color, linewidth=3 if wrong[i] else 1.5)
figure.suptitle("above: given label → true label; below: learnt weight; bold and framed: the given label is wrong")
plt.show()

# %%
figure, panel = plt.subplots(figsize=(7, 3), layout="constrained")
bins = np.linspace(0, 1, 26)
panel.hist(weights[wrong], bins, color=RED, alpha=0.85, label="wrong label")
panel.hist(weights[~wrong], bins, histtype="step", color=BLUE, lw=2.2, label="right label")
panel.axvline(0.5, color=GREY, lw=0.8, ls="--")
panel.text(0.5, panel.get_ylim()[1], " where all started", color=GREY, va="top")
panel.set(xlabel=r"learnt weight $\sigma(x_i)$", ylabel="training examples")
panel.legend(loc="upper center", bbox_to_anchor=(0.35, 1))
plt.show()

print(f"area under the ROC curve of the weight as a detector of right labels: {roc_auc_score(~wrong, weights):.3f}")
print(f"of the wrong labels, {np.mean(weights[wrong] < 0.5):.1%} have a weight below one half")
print(f"of the right labels, {np.mean(weights[~wrong] < 0.5):.1%}")
print(f"of the 100 highest weights, {wrong[order[-100:]].sum()} belong to wrong labels")

# %% [markdown]
# Nearly all the weights go to one end, and nearly always to the right one. The last two rows of images show the
# mistakes. Some are inevitable: $x$ has more entries than there are trusted images, so $f$ can be overfitted like any
# other loss, and a wrong label that happens to help on the trusted images is kept.
#
# Is the trained model any better? One split of the data proves little, so we take five. `init` and `estimate` are pure
# functions: the loop is one `jax.lax.scan`, and `jax.vmap` runs it on the five splits at once.


# %%
def run(hypergrad, x, y, batch, steps):
    """The loop of section 3 as a scan; the info of every step comes back stacked."""
    outer = optax.adam(0.1)

    def step(carry, key):
        x, state, outer_state = carry
        grad, state, info = hypergrad.estimate(key, state, x, batch)
        updates, outer_state = outer.update(grad, outer_state)
        return (optax.apply_updates(x, updates), state, outer_state), info

    carry = (x, hypergrad.init(x, y), outer.init(x))
    (x, state, _), info = jax.lax.scan(step, carry, jax.random.split(jax.random.key(0), steps))
    return x, state.y, info


def accuracies(split):
    batch, test, true_labels = split
    x, y0 = jnp.zeros(true_labels.shape), jax.tree.map(jnp.zeros_like, y)
    x, y_cleaned, _ = run(hypergrad, x, y0, batch, steps=150)

    train = bx.differentiable(bx.inner.no_gradient(inner_loss, optax.sgd(0.5, momentum=0.9), steps=500))
    on, off = jnp.full(x.shape, 20.0), -20.0  # weights of one and zero
    trusted = len(batch.outer[1])
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), batch.inner, batch.outer)
    right = jnp.where(batch.inner[1] == true_labels, on, off)
    return (
        accuracy(train(on, y0, batch.inner), test),
        accuracy(y_cleaned, test),
        accuracy(train(right, y0, batch.inner), test),
        accuracy(train(on[:trusted], y0, batch.outer), test),
        accuracy(train(jnp.append(x, on[:trusted]), y0, both), test),
    )


names = (
    "before: all training images, equal weights",
    "after: learnt weights",
    "an oracle: the right labels only",
    "the trusted images only",
    "learnt weights, and the trusted images too",
)
splits = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[spoiled(seed) for seed in range(5)])
print(f"{'test accuracy on five splits, of a model trained on':52}{'mean':>8}{'lowest':>9}{'highest':>9}")
for name, values in zip(names, jax.jit(jax.vmap(accuracies))(splits), strict=True):
    print(f"  {name:50}{values.mean():8.3f}{values.min():9.3f}{values.max():9.3f}")

# %% [markdown]
# The learnt weights recover most of what the wrong labels had cost. The fourth row is the baseline that a fair
# comparison must include: the trusted images alone already train a decent model, since digits this small are easy. The
# last row uses everything.

# %% [markdown]
# ## 5. What `info` tells you
#
# A hypergradient from a bad $y$ or a bad $v$ looks like any other array. `estimate` therefore returns a third value.
# This is that of the last step of the loop:

# %%
for path, leaf in jax.tree_util.tree_leaves_with_path(info):
    print(f"info{jax.tree_util.keystr(path):32}{leaf:12.4g}")

# %% [markdown]
# - `outer_loss` is $F(x)$ at the current $y$.
# - `inner.gradient_norm` is $\|\nabla_y g(x, y)\|$. The implicit formula assumes that it is zero.
# - `inner.detail.residual` is $\|\nabla_y f - \nabla^2_{yy} g\, v\| / \|\nabla_y f\|$. Zero is a perfect $v$, and
#   one is what $v = 0$ has. CG lowers another measure of the error, so that its residual may pass one on the way down.
# - `inner.detail.curvature` is the smallest curvature of $g$ that the solver met. Where it is negative, $y$ is not near
#   a minimum, the linear system does not stand for anything, and CG must stop: `inner.detail.breakdown`.
# - `inner.calls` counts gradients and second-order products, so that methods can be compared by cost.
#
# Two accidents, both on the data of section 3. In the first, the inner problem is not solved: one small step instead of
# twenty. In the second, the model is a small network, whose Hessian is indefinite away from a minimum; CG finds that
# out once it may iterate for long enough. The remedy shown is `damping`, which solves with
# $\nabla^2_{yy} g + \delta I$ instead. It biases $v$ towards shorter vectors, so it is never applied unasked.


# %%
def network_loss(y, data):
    images, labels = data
    return cross_entropy(y, (jnp.tanh(images @ y["V"] + y["c"]), labels))


def network_inner(x, y, train):
    return jnp.mean(jax.nn.sigmoid(x) * network_loss(y, train)) + 5e-4 * optax.tree.norm(y, squared=True)


def network_outer(x, y, trusted):
    return network_loss(y, trusted).mean()


V, W = jax.random.normal(jax.random.key(1), (64, 16)) / 8, jax.random.normal(jax.random.key(2), (16, 10)) / 4
network = {"V": V, "c": jnp.zeros(16), "W": W, "b": jnp.zeros(10)}
softmax = jax.tree.map(jnp.zeros_like, y)
momentum, small = optax.sgd(0.5, momentum=0.9), optax.sgd(0.05)


def network_solver(damping):
    # Each system is solved from v = 0, so that the curves show each outer step by itself.
    ihvp = bx.ihvp.cg(maxiter=30, damping=damping)
    return bx.inner.implicit(network_inner, momentum, steps=20, ihvp=ihvp, warm_start=False)


cases = {
    "softmax regression": (outer_loss, solver, softmax),
    "one small inner step": (outer_loss, bx.inner.implicit(inner_loss, small, 1, ihvp=bx.ihvp.cg(maxiter=5)), softmax),
    "network": (network_outer, network_solver(damping=0.0), network),
    "network, damping": (network_outer, network_solver(damping=0.1), network),
}

infos, steps = {}, 50
print(f"{f'after {steps} outer steps':24}{'AUC':>8}{'‖∇_y g‖':>12}{'residual':>12}{'breakdowns':>12}")
for name, (loss, case, y0) in cases.items():
    go = jax.jit(run, static_argnums=(0, 4))
    x_case, _, infos[name] = jax.device_get(go(bx.hypergradient(loss, case), jnp.zeros(len(wrong)), y0, batch, steps))
    inner, detail = infos[name].inner, infos[name].inner.detail
    auc = roc_auc_score(~wrong, x_case) if np.isfinite(x_case).all() else np.nan
    numbers = f"{inner.gradient_norm[-1]:12.1e}{detail.residual[-1]:12.1e}{detail.breakdown.sum():12d}"
    print(f"{name:24}{auc:8.3f}{numbers}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
draw = {"softmax regression": BLUE, "one small inner step": ORANGE, "network": RED, "network, damping": GREEN}
for name, color in draw.items():
    inner = infos[name].inner
    style = {"color": color, "lw": 2, "label": name}
    if "network" not in name:
        axes[0].semilogy(inner.gradient_norm, **style)
    else:
        axes[1].semilogy(inner.detail.residual, **style)
        axes[2].plot(inner.detail.curvature, **style)
        broken = np.flatnonzero(inner.detail.breakdown)
        for panel, values in ((axes[1], inner.detail.residual), (axes[2], inner.detail.curvature)):
            panel.plot(broken, values[broken], "x", color=color, ms=5, label="breakdown" if len(broken) else None)
axes[0].set(title=r"$\|\nabla_y g\|$: is $y$ a minimum?", xlabel="outer step")
axes[1].set(title="residual of $v$: below one?", xlabel="outer step")
axes[1].axhline(1, color=GREY, lw=0.8)
axes[2].set(title="smallest curvature: positive?", xlabel="outer step")
axes[2].axhline(0, color=GREY, lw=0.8)
axes[2].set_yscale("symlog", linthresh=1e-3)
for panel in axes:
    panel.legend()
plt.show()

# %% [markdown]
# With one small inner step the loop moves along, but $\|\nabla_y g\|$ never comes down, and the weights tell right from
# wrong less well. Its residual is small all the same: a good $v$, at the wrong $y$. The network starts where curvature
# is negative: CG stops early, and its $v$ solves nothing. After some outer steps the warm $y$ is closer to a
# minimum and CG runs to the end, but its residual and its AUC stay behind those of the damped run, whose system is
# positive definite from the start. Nothing raised an exception and nothing was repaired behind your back: plot `info`
# before you trust a run.

# %% [markdown]
# ## 6. Inside your own loss: meta-learning
#
# Sometimes the outer loss is yours to write: a mean over tasks, say, each with its own inner problem. Then
# `bx.differentiable` gives you the inner solver as a plain function, to be used with `jax.grad` and `jax.vmap`.
#
# In MAML, $x$ is the initialization of a network. A task is a sine wave of random amplitude and phase; the inner
# problem takes a few steps on its five support points, starting from $x$, and the outer loss looks at other points of
# the same wave. The inner loss does not contain $x$ at all: it enters as `y0`.


# %%
class Task(NamedTuple):
    support: tuple
    query: tuple


def draw_task(key):
    keys = jax.random.split(key, 3)
    amplitude = jax.random.uniform(keys[0], minval=0.5, maxval=2.5)
    phase = jax.random.uniform(keys[1], maxval=2 * jnp.pi)
    s = jax.random.uniform(keys[2], (25,), minval=-3.0, maxval=3.0)
    t = amplitude * jnp.sin(s + phase)
    return Task(support=(s[:5], t[:5]), query=(s[5:], t[5:]))


def predict(y, s):
    hidden = jnp.tanh(s[:, None] * y["W1"] + y["b1"])
    return jnp.tanh(hidden @ y["W2"] + y["b2"]) @ y["W3"]


def wave_loss(x, y, data):
    return jnp.mean((predict(y, data[0]) - data[1]) ** 2)


# %%
solve = bx.differentiable(bx.inner.reverse(wave_loss, optax.sgd(0.05), steps=5))


def meta_loss(x, tasks):
    after = jax.vmap(lambda task: wave_loss(x, solve(x, x, task.support), task.query))
    return after(tasks).mean()


# %% [markdown]
# That is MAML. The rest is an ordinary training loop with `jax.grad(meta_loss)`.


# %%
@jax.jit
def meta_train(x, keys):
    outer = optax.adam(3e-3)

    def step(carry, key):
        x, outer_state = carry
        tasks = jax.vmap(draw_task)(jax.random.split(key, 16))
        updates, outer_state = outer.update(jax.grad(meta_loss)(x, tasks), outer_state)
        return (optax.apply_updates(x, updates), outer_state), None

    return jax.lax.scan(step, (x, outer.init(x)), keys)[0][0]


keys = jax.random.split(jax.random.key(0), 4)
x_random = {
    "W1": jax.random.normal(keys[0], (40,)),
    "b1": jax.random.normal(keys[1], (40,)),
    "W2": jax.random.normal(keys[2], (40, 40)) / 40**0.5,
    "b2": jnp.zeros(40),
    "W3": jax.random.normal(keys[3], (40,)) / 40**0.5,
}
x_learnt = meta_train(x_random, jax.random.split(jax.random.key(1), 600))

new_tasks = jax.vmap(draw_task)(jax.random.split(jax.random.key(2), 1000))
print("squared error on the query points of 1000 new tasks, after five steps on five points:")
for name, x_start in (("random", x_random), ("learnt", x_learnt)):
    print(f"  from the {name} initialization {jax.jit(meta_loss)(x_start, new_tasks):.3f}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), sharey=True, layout="constrained")
s = jnp.linspace(-3.0, 3.0, 200)
adapted = jax.jit(lambda x, task: predict(solve(x, x, task.support), s))
for i, panel in enumerate(axes):
    task = jax.tree.map(lambda leaf, i=i: leaf[i], new_tasks)
    panel.plot(*task.query, ".", color=GREY, label="query points")
    panel.plot(s, adapted(x_random, task), ":", color=ORANGE, lw=2, label="random, 5 steps")
    panel.plot(s, predict(x_learnt, s), "--", color=SKY, lw=2, label="learnt, before the steps")
    panel.plot(s, adapted(x_learnt, task), color=BLUE, lw=2.5, label="learnt, 5 steps")
    panel.plot(*task.support, "o", color=BLACK, ms=7, label="support points")
    panel.set(title=f"new task {i + 1}", xlabel="input")
axes[0].set(ylabel="output")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
plt.show()

# %% [markdown]
# The learnt initialization itself fits no task; it is a point from which every task is five steps away.

# %% [markdown]
# ## 7. Which estimator when
#
# - **`implicit` with `ihvp.cg`**: the default when the inner problem can be nearly solved. Any number of inner steps at
#   constant memory, and $y$ and $v$ stay warm from one outer step to the next. It sees $x$ inside $g$ only, not in
#   an initialization or a step size. Watch `gradient_norm` and `breakdown`.
# - **`implicit` with `ihvp.exact`**: when $y$ has at most a few thousand entries, and to check the others.
# - **`implicit` with `ihvp.neumann`**: a fixed number of products, no inner products between vectors, linear in
#   $\nabla_y f$. Needs a step size below $2 / \lambda_{\max}$, and is slower than CG on a badly conditioned problem.
# - **`implicit` with `ihvp.identity`**: costs no product at all. Strongly biased; for very large problems where a rough
#   direction is enough.
# - **`reverse`**: when the program is what you care about: a few inner steps, a learnt initialization, a learnt step
#   size. Exact for the steps that run; memory grows with their number.
# - **`chain(no_gradient, reverse)`**: when `reverse` is too long to store. Only the last steps count, and the slope
#   comes out too small.
# - **`implicit(solve=...)`**: when you have a solver of your own. It is never differentiated.
#
# Whatever you choose: compare it once with `ihvp.exact` or with finite differences on a small problem, as in section 2,
# and plot its `info`.

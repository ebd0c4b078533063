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
# # Forward gradients: hypergradients in constant memory
#
# Let $y_T(x)$ be what $T$ steps of training make of $y$, and $F(x) = f(x, y_T(x))$. Reverse mode gives $\nabla F$
# exactly, and must remember the steps to do so. Forward mode pushes a tangent along with the training run,
#
# $$\dot z_t = \frac{\partial \Phi_t}{\partial z} \dot z_{t-1} + \frac{\partial \Phi_t}{\partial x} v,
# \qquad w = \nabla_y f \cdot \dot y_T ,$$
#
# remembers nothing, and knows one number at the end, the derivative $w = u \cdot v$ along $v$. Here $z$ is all of the
# inner state (momentum included) and $u$ the part of $\nabla F$ that passes through $y$. *Forward gradient unrolling*
# takes $b$ random directions with $\mathbb E[v v^\top] = I$:
#
# $$\hat g = \nabla_x f + \frac1b \sum_{i=1}^b w_i v_i , \qquad \mathbb E\, \hat g = \nabla F
# \quad\text{for every } T .$$
#
# It is unbiased, its memory does not grow with $T$, and it is noisy. This page measures all three.
#
# 1. Memory against $T$
# 2. Noise against $b$
# 3. A guess makes it quieter
# 4. Black boxes
# 5. A cheap estimator first
# 6. Use it when, do not use it when

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import bilevax as bx

plt.rcParams.update({"figure.dpi": 100, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
# The colours of Okabe and Ito, which colour-blind readers can tell apart.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#999999"

# Nearly all programs of this page run once, so that they may as well be compiled in a hurry.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# %% [markdown]
# The problem of this page is the cleaning of a data set: half of the labels of the training images are drawn anew,
# $x_i$ is the logit of the weight of image $i$, and $f$ is the loss on a few images with right labels. So $x$ has as
# many entries $N$ as there are training images, and $f$ does not depend on $x$ but through $y$.

# %%
digits = load_digits()
images, labels = (digits.images / 16).reshape(-1, 64).astype(np.float32), digits.target


def spoiled(seed, size, trusted, share=0.5):
    """Training images with labels of which a share is drawn again, and trusted images."""
    random = np.random.default_rng(seed)
    train, trust, _ = np.split(random.permutation(len(labels)), [size, size + trusted])
    given = np.where(random.random(size) < share, random.integers(0, 10, size), labels[train])
    return jax.device_put(bx.Batch(outer=(images[trust], labels[trust]), inner=(images[train], given)))


def network(key, *sizes):
    keys = jax.random.split(key, len(sizes) - 1)
    layers = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [{"W": jax.random.normal(key, (m, n)) / m**0.5, "b": jnp.zeros(n)} for key, m, n in layers]


def model(y, images):
    *hidden, last = y
    for layer in hidden:
        images = jnp.tanh(images @ layer["W"] + layer["b"])
    return images @ last["W"] + last["b"]


g = bx.curvature.ModelLoss(
    model=model,
    loss=bx.curvature.softmax_cross_entropy,
    split=lambda x, batch: batch,
    weights=lambda x, batch: jax.nn.sigmoid(x),
    l2=1e-3,
)


def f(x, y, batch):
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(y, images), labels).mean()


optimizer = optax.sgd(0.3, momentum=0.9)

# %% [markdown]
# ## 1. Memory against T
#
# Nothing needs to run for this: the compiler says how much temporary memory a program will take. A network
# 64-128-128-10, 256 training images.
#
# One of the rows is a trap. `jax.linearize` is the usual way to push several tangents through one function: it runs the
# function once, and then each tangent is cheap. But a linearized loop has *stored* the loop, all $T$ steps of it.
# `forward_gradient` uses `jax.jvp` under `jax.vmap` instead, which runs the steps once, with all tangents beside them.


# %%
def estimate(solver, x, y, batch, key):
    """One hypergradient from the start, and what it reports."""
    hypergrad = bx.hypergradient(f, solver)
    grad, _, info = hypergrad.estimate(key, hypergrad.init(x, y, batch), x, batch)
    return grad, info


def reverse(checkpoint):
    return lambda T: bx.inner.reverse(g, optimizer, T, checkpoint=checkpoint)


def unrolled(T):
    """The inner steps by hand, as a function (x, y0, batch) -> y_T."""

    def solve(x, y0, batch):
        def step(carry, _):
            y, state = carry
            updates, state = optimizer.update(jax.grad(g, argnums=1)(x, y, batch), state)
            return (optax.apply_updates(y, updates), state), None

        return jax.lax.scan(step, (y0, optimizer.init(y0)), length=T)[0][0]

    return solve


def linearized(T):
    def program(x, y, batch, key):
        y_T, push = jax.linearize(lambda x: unrolled(T)(x, y, batch.inner), x)
        y_bar = jax.grad(f, argnums=1)(x, y_T, batch.outer)
        V = jax.random.rademacher(key, (4, *x.shape), x.dtype)
        w = jax.vmap(lambda v: optax.tree.vdot(y_bar, push(v)))(V)
        return w @ V / 4

    return program


def estimator(make):
    return lambda T: lambda *args: estimate(make(T), *args)[0]


programs = {
    "linearize, 4 directions": linearized,
    "reverse, store all": estimator(reverse(bx.inner.store_all)),
    "reverse, two-level": estimator(reverse(bx.inner.two_level)),
    "forward, 4 directions": estimator(lambda T: bx.inner.forward_gradient(g, optimizer, T, directions=4)),
}
horizons = (64, 1024)
arguments = jnp.zeros(256), network(jax.random.key(0), 64, 128, 128, 10), spoiled(0, 256, 100), jax.random.key(0)


def mebibytes(program):
    return jit(program).lower(*arguments).compile().memory_analysis().temp_size_in_bytes / 2**20


memory = {name: [mebibytes(make(T)) for T in horizons] for name, make in programs.items()}

figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
for (name, sizes), color in zip(memory.items(), (ORANGE, BLUE, GREEN, RED), strict=True):
    axes.loglog(horizons, sizes, "o-", color=color, lw=2, label=name)
axes.set(xlabel="inner steps T", ylabel="temporary memory (MiB)", xticks=horizons, xticklabels=horizons)
axes.minorticks_off()
figure.legend(loc="outside right center")
plt.show()
print(f"{'MiB at T =':26}" + "".join(f"{T:9}" for T in horizons))
for name, sizes in memory.items():
    print(f"{name:26}" + "".join(f"{size:9.1f}" for size in sizes))
flat = memory["forward, 4 directions"]
assert flat[0] == flat[1]
assert memory["linearize, 4 directions"][1] > 10 * memory["linearize, 4 directions"][0]

# %% [markdown]
# What to see: forward gradients are flat, and the trap is as steep as plain reverse mode. But look at the line just
# above: two-level checkpointing keeps about $2\sqrt T$ states and is *exact*, for four to five times the time of the
# forward pass. Where it fits into memory and the inner steps are a loop of known length, it is the better answer.

# %% [markdown]
# ## 2. Noise against b
#
# For signs $v_i$, the expected squared error of $\hat g$ is $\frac{N-1}{b}\|u\|^2$: with fewer directions than
# hyperparameters the noise is longer than the gradient itself. Other directions do a little better or much better. Each
# sampler knows its own factor, `sampler.noise(N, b)`. Below it is drawn beside what 200 estimates with different keys
# did, for $N = 24$ training images. (Normal entries would have $N + 1$ in place of $N - 1$.)

# %%
samplers = {
    "rademacher": bx.inner.random_directions.rademacher,
    "orthogonal": bx.inner.random_directions.orthogonal,
    "hadamard": bx.inner.random_directions.hadamard,
}
numbers = (1, 8, 24)
softmax = [{"W": jnp.zeros((64, 10)), "b": jnp.zeros(10)}]  # no hidden layer, y_0 = 0


def repeated(solver, x, batch, size):
    """Many estimates with different keys at one point, and what each reports."""
    keys = jax.random.split(jax.random.key(1), size)
    run = jit(lambda x, batch: jax.lax.map(lambda key: estimate(solver, x, softmax, batch, key), keys))
    return jax.device_get(run(x, batch))


def squared_error(grads, exact):
    """The mean of ‖ĝ − g‖² / ‖g‖², and its standard error."""
    errors = ((grads - exact) ** 2).sum(-1) / (exact**2).sum()
    return float(errors.mean()), float(errors.std() / len(errors) ** 0.5)


def setting(N, T):
    """N training images and T inner steps: x, the batch, and the exact hypergradient."""
    x, batch = jnp.zeros(N), spoiled(0, N, 256)
    (exact,), _ = repeated(bx.inner.reverse(g, optimizer, T), x, batch, size=1)
    return x, batch, exact


N, T = 24, 10
x, batch, exact = setting(N, T)
every = np.arange(1, N + 1)
figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
for (name, sampler), color in zip(samplers.items(), (RED, BLUE, GREEN), strict=True):
    found = []
    for b in numbers:
        solver = bx.inner.forward_gradient(g, optimizer, T, directions=b, sampler=sampler)
        mean, error = squared_error(repeated(solver, x, batch, 200)[0], exact)
        found.append((mean, 2 * error))
        assert abs(mean - sampler.noise(N, b)) < 5 * error + 1e-5
    means, errors = np.transpose(found)
    axes.loglog(every, [sampler.noise(N, b) for b in every], color=color, lw=1)
    axes.errorbar(numbers, means, errors, fmt="o", color=color, label=name)
    print(f"{name:12}", ", ".join(f"b = {b}: {mean:.3g}" for b, mean in zip(numbers, means, strict=True)))
axes.set(xlabel="directions b", ylabel=r"$E\|\hat g - g\|^2 \;/\; \|g\|^2$", ylim=(0.02, 60))
axes.set_xticks(numbers, map(str, numbers))
axes.minorticks_off()
figure.legend(loc="outside right center")
plt.show()

# %% [markdown]
# What to see: the measured points lie on the formulas. Independent directions gain a factor of $b$ and no more.
# Orthogonal directions never repeat themselves, and at $b = N$ they leave nothing out: forward mode is exact, and with
# a handful of hyperparameters (a schedule, penalties) there is no noise to speak of. The rows of a Hadamard matrix do
# without a factorization; they are exact at the next power of two, 32 here.
#
# ## 3. A guess makes it quieter
#
# Most cheap hypergradients are wrong, but not at random. Let $c$ be any guess of $u$ that was made without a look at
# the random directions. Spend one of the $b$ directions on it and draw the others orthogonal to it, which leaves
#
# $$\mathbb E\|\hat g - g\|^2 \approx \frac{N-2}{b-1} \left(1 - \cos^2(u, c)\right) \|u\|^2 .$$
#
# The estimate stays unbiased however bad the guess is. This is a *guide*, and any inner solver can be one. The other
# classical use of a guess, as a *control variate*, leaves $\frac{N-1}{b}\|u - c\|^2$, so that the length of $c$ must be
# right as well.

# %%
N, T, b = 256, 30, 16
x, batch, exact = setting(N, T)
descent = {"inner_loss": g, "optimizer": optimizer}
truncated = bx.inner.chain(bx.inner.no_gradient(**descent, steps=T - 10), bx.inner.reverse(**descent, steps=10))
guesses = {
    "KFAC, implicit": bx.inner.guides.at_solution(bx.inner.implicit(g, ihvp=bx.ihvp.kfac(damping=1e-2))),
    "the last 10 steps": bx.inner.guides.from_start(truncated),
}
plain = squared_error(repeated(bx.inner.forward_gradient(g, optimizer, T, directions=b), x, batch, 40)[0], exact)[0]
print(f"squared error of {b} plain directions: {plain:.1f} (formula {(N - 1) / b:.1f}), the gradient being 1")
gains = {}
for name, guess in guesses.items():
    grads, info = repeated(bx.inner.forward_gradient(g, optimizer, T, directions=b, guide=guess), x, batch, 40)
    cosine, predicted = info.inner.detail.cosine.mean(), (info.inner.detail.relative_error**2).mean()
    variate, _ = repeated(bx.inner.forward_gradient(g, optimizer, T, directions=b, control_variate=guess), x, batch, 40)
    gains[name] = plain / np.array([predicted, squared_error(grads, exact)[0], squared_error(variate, exact)[0]])
    print(
        f"{name:18} cosine {cosine:.3f}; as a guide {gains[name][1]:.1f} times less "
        f"(predicted {gains[name][0]:.1f}), as a control variate {gains[name][2]:.2f} times less"
    )

figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
places = np.arange(len(gains))
bars = ("guide, predicted by `info`", "guide, measured", "control variate, measured")
for number, (label, color) in enumerate(zip(bars, (GREY, RED, SKY), strict=True)):
    axes.bar(places + 0.27 * (number - 1), [gain[number] for gain in gains.values()], 0.25, color=color, label=label)
axes.axhline(1, color=BLACK, lw=1)
axes.set(ylabel="squared error of plain directions / squared error")
axes.set_xticks(places, gains)
figure.legend(loc="outside right center")
plt.show()
assert all(gain[1] > 1 for gain in gains.values())

# %% [markdown]
# What to see: a guide pays for the direction that it takes many times over, and `info.inner.detail` says by how much,
# without knowing the exact answer: it holds `relative_error`, the `cosine` of the guess, and `step_scale`, by which a
# step size that suits the exact gradient is to be multiplied. The control variate gains less from the same guess.
#
# ## 4. Black boxes
#
# Where even forward mode cannot go (a simulator, somebody else's solver), the tangent is replaced by a difference,
#
# $$\dot y \approx \frac{S(x + \mu v) - S(x)}{\mu} \quad\text{or}\quad \frac{S(x + \mu v) - S(x - \mu v)}{2\mu},$$
#
# with errors of order $\mu$ and $\mu^2$, and rounding errors of order $1/\mu$. Below all $N$ coordinate directions are
# used, so that nothing else is wrong.


# %%
def difference_errors(difference, dtype, sizes, N=16, T=30):
    with jax.enable_x64(dtype == np.float64):
        x, y, batch = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
            (jnp.zeros(N), softmax, spoiled(0, N, 256)),
        )
        coordinates = bx.inner.random_directions.coordinate

        def one(mu):
            solver = bx.inner.zeroth_order(unrolled(T), directions=N, mu=mu, difference=difference, sampler=coordinates)
            return estimate(solver, x, y, batch, jax.random.key(0))[0]

        exact = jit(lambda x: estimate(bx.inner.reverse(g, optimizer, T), x, y, batch, None)[0])(x)
        grads = jit(lambda sizes: jax.lax.map(one, sizes))(jnp.asarray(sizes, dtype))
        return np.linalg.norm(grads - exact, axis=1) / np.linalg.norm(exact)


sizes = np.geomspace(1e-6, 1, 13)
figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
differences = {
    ("one-sided, double precision", "-", BLUE): (bx.inner.one_sided, np.float64),
    ("central, double precision", "-", RED): (bx.inner.central, np.float64),
    ("central, single precision", ":", RED): (bx.inner.central, np.float32),
}
best = {}
for (name, style, color), (difference, dtype) in differences.items():
    errors = difference_errors(difference, dtype, sizes)
    axes.loglog(sizes, errors, style, marker="o", ms=4, color=color, label=name)
    best[name] = errors.min()
    print(f"{name:30} best error {errors.min():.1e} at μ = {sizes[errors.argmin()]:.0e}")
axes.set(xlabel=r"$\mu$", ylabel="relative error")
figure.legend(loc="outside right center")
plt.show()
assert best["central, double precision"] < best["one-sided, double precision"]

# %% [markdown]
# What to see: in double precision small is good, and central differences, for nearly twice the solves, are better by
# orders of magnitude. In single precision rounding takes over early, and the best $\mu$ is some thousandths of what is
# moved. Only the solver is a black box: $\nabla_y f$ and $\nabla_x f$ are still exact. Code that is not JAX at all
# becomes such a solver by `bx.inner.black_box(function)`.
#
# ## 5. A cheap estimator first
#
# From scratch the noise decides: with $b \ll N$ most of an outer step is noise. The implicit hypergradients by KFAC are
# biased, since 30 steps do not end at the minimum which their rule assumes, but they are nearly free. So they go first,
# and unbiased ones finish: `bx.two_phase(switch_at, first, second)`. The switch may be traced, so that one compiled
# program draws three of the curves below: switched never, after two thirds of the way, and at once.

# %%
N, T, b, outer_steps = 512, 30, 16, 150
first_x, batch = jnp.zeros(N), spoiled(0, N, 256)
start = {"initial": lambda x: softmax}  # each outer step trains anew, so that F is a function of x alone
kfac = bx.ihvp.kfac(damping=1e-2)
guide = bx.inner.guides.at_solution(bx.inner.implicit(g, ihvp=kfac))
exact = bx.hypergradient(f, bx.inner.reverse(g, optimizer, T, **start))
implicit = bx.hypergradient(f, bx.inner.implicit(g, optimizer, T, ihvp=kfac, **start))
plain = bx.hypergradient(f, bx.inner.forward_gradient(g, optimizer, T, directions=b, **start))
guided = bx.hypergradient(f, bx.inner.forward_gradient(g, optimizer, T, directions=b, guide=guide, **start))


def descent(hypergrad, batch):
    """All x along the outer steps."""
    outer = optax.adam(0.1)

    def step(carry, key):
        x, state, outer_state = carry
        grad, state, _ = hypergrad.estimate(key, state, x, batch)
        updates, outer_state = outer.update(grad, outer_state)
        return (optax.apply_updates(x, updates), state, outer_state), x

    carry = first_x, hypergrad.init(first_x, softmax, batch), outer.init(first_x)
    return jax.lax.scan(step, carry, jax.random.split(jax.random.key(0), outer_steps + 1))[1]


@jax.jit
def validation_loss(xs, batch):
    return jax.lax.map(lambda x: f(x, unrolled(T)(x, softmax, batch.inner), batch.outer), xs)


switched = jax.jit(lambda switch_at, batch: descent(bx.two_phase(switch_at, implicit, guided), batch))
never, late, at_once = outer_steps + 1, 2 * outer_steps // 3, 0
curves = {
    "exact": jax.jit(lambda batch: descent(exact, batch))(batch),
    "KFAC": switched(never, batch),
    "forward": jax.jit(lambda batch: descent(plain, batch))(batch),
    "forward, guided by KFAC": switched(at_once, batch),
    "KFAC, then guided forward": switched(late, batch),
}
curves = {name: np.asarray(validation_loss(xs, batch)) for name, xs in curves.items()}

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.8), layout="constrained")
for (name, values), color in zip(curves.items(), (BLACK, BLUE, ORANGE, GREEN, RED), strict=True):
    for axes in (left, right):
        axes.plot(values, color=color, lw=2, label=name)
    print(f"{name:26} F after {outer_steps} outer steps: {values[-1]:.4f}")
for axes in (left, right):
    axes.axvline(late, color=GREY, lw=1)
    axes.set(xlabel="outer steps", ylabel="F, the validation loss")
lowest = curves["exact"][-1]
right.set(xlim=(80, outer_steps), ylim=(0.98 * lowest, 1.12 * lowest), title="the end of it")
figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
plt.show()
ends = {name: values[-1] for name, values in curves.items()}
assert ends["exact"] < ends["KFAC, then guided forward"] < ends["forward, guided by KFAC"] < ends["forward"]

# %% [markdown]
# What to see: unbiased and noisy from scratch loses to biased and smooth. KFAC alone stops short of the exact answer,
# and guided forward gradients, once they start from there, go on. The gain is small here, because the bias is. It is
# one seed, and no rate was tuned for any of them.
#
# ## 6. Use it when, do not use it when
#
# | use forward gradients when | because |
# |---|---|
# | the inner solver is a `lax.while_loop`, or has a forward rule only | reverse mode is refused |
# | not even $2\sqrt T$ states fit into memory | theirs does not grow with $T$ |
# | $N$ is a handful: step sizes, penalties, a schedule | $b = N$ orthogonal directions are exact |
# | there are many devices | each takes its share of the directions, and they exchange one vector |
# | a cheap biased estimator gets no further | `two_phase`, with that estimator as the guide |
# | the solver is a black box | `zeroth_order` is the same thing by differences |
#
# | do not use them when | take |
# |---|---|
# | the steps are a loop of known length, whose checkpoints fit | `inner.reverse(checkpoint=two_level)`: exact, faster |
# | the inner problem is solved well | `inner.implicit`, without noise, and without memory for $T$ |
# | $b \ll N$, and there is no guide | a biased estimator, first at least |
# | each solve of a black box is dear, and $N$ is large | a differentiable model of the black box |
#
# On one device and for a loop that JAX can differentiate, checkpointing wins unless $N \le 2$: $b$ directions cost
# about $1 + 1.8\,b$ forward passes and leave an error of $\sqrt{(N-1)/b}$, and two-level checkpointing costs four to
# five and leaves none. `python -m benchmarks unrolling` draws this up to $T = 10{,}000$ for every inner solver, and
# `python -m benchmarks two-phase` repeats section 5 with more methods and seeds.

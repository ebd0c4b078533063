"""What every estimator of a hypergradient keeps, whatever it computes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.hypergradients._hypergradient import HypergradientInfo
from bilevax.hypergradients._two_phase import TwoPhaseInfo
from bilevax.problem import Calls, IHVPInfo, SolverInfo
from bilevax.testing import ground, points
from bilevax.testing._contract import Contract, contract, hold_all, name_of
from bilevax.testing.compiled import READABLE
from bilevax.testing.hypergradient_subject import NEAR, RATE, HypergradientSubject, MakeHypergradient, Scanned, keys
from bilevax.testing.trees import (
    WHAT_IS_WRITTEN,
    WHAT_THEY_FIND,
    close,
    differ,
    finite,
    same_form,
    scalars,
    short,
    strictly,
    truth,
    writable,
)
from bilevax.typing import Array

__all__ = [
    "CONTRACTS",
    "check_hypergradient",
    "constant_outer_loss_has_no_gradient",
    "debuggers_find_nothing",
    "declared_calls_are_compiled_calls",
    "draws_depend_on_the_key_alone",
    "exact_at_the_solution",
    "gradient_is_like_x",
    "gradient_is_that_of_the_steps",
    "half_precision_is_near_double",
    "jit_equals_eager",
    "nan_is_reported",
    "one_program_serves_all_steps",
    "python_floats_are_numbers",
    "same_gradient_form",
    "single_precision_stays_single",
    "state_is_made_of_arrays",
    "state_is_read",
    "vmap_of_scan_equals_a_loop",
    "weak_types_are_kept",
    "y_is_that_of_a_loop_by_hand",
]


def __dir__() -> list[str]:
    return __all__


def _parts(info: Any) -> tuple[HypergradientInfo, ...]:
    """The infos of the two phases, or the one."""
    return (info.first, info.second) if isinstance(info, TwoPhaseInfo) else (info,)


def _active(info: Any) -> HypergradientInfo:
    """The info of the estimator that ran."""
    return _parts(info)[int(info.phase)] if isinstance(info, TwoPhaseInfo) else info


def same_gradient_form(subject: HypergradientSubject, point: points.Variables) -> None:
    """Compares the forms of the gradient, of the state and of info with those that are meant, by tracing alone.

    Args:
      subject: an estimator on trial.
      point: x and y, such as one of `testing.points.POINTS`.

    Raises:
      AssertionError: with what has another form.

    Cost: two traces.

    Example:
        >>> import bilevax as bx
        >>> from bilevax import testing
        >>> make = lambda loss, optimizer, sample: bx.inner.reverse(loss, optimizer, steps=4, sample=sample)
        >>> subject = testing.solver_subject(make, steps=4)
        >>> testing.hypergradient.same_gradient_form(subject, testing.points.everything())
    """
    x, y = point
    batch, hypergrad = points.make_batch(), subject.at(points.PROBLEM)
    state = jax.eval_shape(hypergrad.init, x, y, batch)
    grad, after, info = jax.eval_shape(hypergrad.estimate, jax.random.key(0), state, x, batch)
    same_form("the gradient", grad, "x", x)
    same_form("the state after an estimate", after, "the state of init", state)
    same_form("state.y", after.y, "y", y)
    for part in _parts(info):
        kinds = {"info": (part, HypergradientInfo), "info.inner": (part.inner, SolverInfo)}
        for name, (got, kind) in (kinds | {"info.inner.calls": (part.inner.calls, Calls)}).items():
            truth(isinstance(got, kind), f"{name} is a {type(got).__name__}; a {kind.__name__} is meant")
    scalars("info", info)


@contract("Cast the gradient like x and y like itself, reduce info to scalars, and return a state like init's.")
def gradient_is_like_x(subject: HypergradientSubject) -> None:
    """Structure, shapes and dtypes, at a point with everything in it."""
    same_gradient_form(subject, points.everything())


@contract("Make arrays of what init gets (jnp.asarray), and read shapes by jnp.shape: a Python float has none.")
def python_floats_are_numbers(subject: HypergradientSubject) -> None:
    """For x and for leaves of y, also where they are no arguments of a traced function."""
    x, y, batch = 0.5, {"a": jnp.linspace(0, 1, 4), "b": -1.2}, points.make_batch()
    hypergrad = subject.at(points.PROBLEM)
    state = hypergrad.init(x, y, batch)
    grad, after, _ = jax.eval_shape(lambda: hypergrad.estimate(jax.random.key(0), state, x, batch))
    same_form("the gradient", grad, "x", x)
    same_form("the state after an estimate", after, "the state of init", state)


@contract("Make no array of a dtype of its own: jnp.asarray(number) is double precision where x64 is on.")
def single_precision_stays_single(subject: HypergradientSubject) -> None:
    """By tracing alone, with x64 off."""
    with jax.enable_x64(False):
        same_gradient_form(subject, points.POINTS["dict"]())


@contract("Strip weak types in init (jnp.asarray(leaf, jnp.result_type(leaf))): they make a second program.")
def weak_types_are_kept(subject: HypergradientSubject) -> None:
    """Of scalars made of Python numbers, such as jnp.asarray(0.5)."""
    x, y, batch, hypergrad = jnp.asarray(0.5), jnp.asarray(-1.2), points.make_batch(), subject.at(points.PROBLEM)
    state = hypergrad.init(x, y, batch)
    after = jax.eval_shape(hypergrad.estimate, jax.random.key(0), state, x, batch)[1]
    same_form("the state after an estimate", after, "the state of init", state, weak=True)


@contract("Keep nothing outside the state, and give each leaf of it the same shape and dtype at each call.")
def one_program_serves_all_steps(subject: HypergradientSubject) -> None:
    """A compiled program takes the state of one step in the next, and all numbers are finite."""
    _, (grads, infos) = subject.run(*subject.trials["plain"])
    last = _active(jax.tree.map(lambda leaf: leaf[-1], infos))
    finite("the gradient", grads)
    finite("info.outer_loss", last.outer_loss)
    truth(not last.inner.breakdown, "a breakdown is reported on a convex problem")


@contract("Use jax.lax.cond and jnp.where in place of `if`, and keep nothing outside of the state.")
def vmap_of_scan_equals_a_loop(subject: HypergradientSubject) -> None:
    """And an estimator of a concrete learning rate equals one of a traced rate."""
    names, results = subject.mapped
    for name in ("plain", "another"):
        (x, state), (grads, infos) = jax.tree.map(lambda leaf, i=names[name]: leaf[i], _without_y(results))
        (loop_x, loop_state), (loop_grads, loop_infos) = subject.run(*subject.trials[name])
        close("(x, gradients, state)", (x, grads, state), (loop_x, loop_grads, loop_state), rtol=1e-8)
        close("info", infos, loop_infos, rtol=1e-8)


@contract(WHAT_THEY_FIND)
def debuggers_find_nothing(subject: HypergradientSubject) -> None:
    """One trace with strict promotion and a search for leaks; and all numbers of a healthy estimate are finite."""
    x, batch, hypergrad, state = ground.make_point()[0], ground.make_batch(), subject.at(ground.PROBLEM), subject.start
    with strictly():
        jax.eval_shape(hypergrad.estimate, keys()[0], state, x, batch)
    _, after, info = subject.estimate()
    finite("state", after)
    finite("info", info)


@contract(WHAT_IS_WRITTEN)
def state_is_made_of_arrays(subject: HypergradientSubject) -> None:
    """So that every library can write and read it, as far as it can write x and y."""
    writable("state", subject.start)
    writable("state", subject.estimate()[1])


def _without_y(results: Scanned) -> tuple[tuple[Array, Any], tuple[Array, Any]]:
    carry, (grads, _, infos) = results
    return carry, (grads, infos)


@contract("Branch by jax.lax.cond on what is traced, and make each array of the dtype that it has under jit.")
def jit_equals_eager(subject: HypergradientSubject) -> None:
    """Python floats included, which jit turns into arrays."""
    x, y, batch = 0.5, {"a": jnp.linspace(0, 1, 4), "b": -1.2}, points.make_batch()
    hypergrad = subject.at(points.PROBLEM)
    arguments = (jax.random.key(0), hypergrad.init(x, y, batch), x, batch)
    eager = hypergrad.estimate(*arguments)
    close("(grad, state, info)", eager, jax.jit(hypergrad.estimate)(*arguments), rtol=1e-12)
    same_form("the gradient", eager[0], "x", x)
    same_form("the state after an estimate", eager[1], "the state of init", arguments[1])


@contract(
    "At y = y*(x) and H = 2 I the gradient is known: look for a sign, a factor or a lost term; or say biased=True.",
    applies=lambda subject: not subject.biased,
)
def exact_at_the_solution(subject: HypergradientSubject) -> None:
    """With one gradient step to the solution, from the solution, in each outer step."""
    x, batch = ground.make_point()[0], ground.make_batch(curved=0.0)
    y = ground.solution(x, batch)
    state = subject.at(ground.PROBLEM).init(x, y, batch)
    grad, state, info = subject.estimate(state, x, batch, rate=0.5)
    close("the gradient", grad, ground.exact_gradient(x, batch))
    close("state.y", state.y, y)
    size = _active(info).inner.gradient_norm
    truth(size is None or size <= 1e-12, f"info.inner.gradient_norm is {size} at the solution")


@contract("Let NaN pass into the gradient and the losses of info, and set info.inner.breakdown.")
def nan_is_reported(subject: HypergradientSubject) -> None:
    """One NaN in the data, of f or of g."""
    for loss, batch in zip("fg", ground.spoiled(ground.make_batch()), strict=True):
        grad, state, info = subject.estimate(batch=batch)
        inner = _active(info).inner
        numbers = int(np.sum(~np.isnan(grad)))
        truth(not numbers, f"the data of {loss} hold NaN, and {numbers} of {grad.size} entries of the gradient none")
        truth(inner.breakdown, f"the data of {loss} hold NaN, and info.inner.breakdown is False")
        if loss == "f":
            truth(np.isnan(_active(info).outer_loss), f"f is NaN, and info.outer_loss {_active(info).outer_loss}")
        elif inner.inner_loss is not None and inner.gradient_norm is not None:  # which a black box may leave out
            truth(np.isnan(inner.inner_loss), f"g is NaN, and info.inner.inner_loss {inner.inner_loss}")
            truth(np.isnan(inner.gradient_norm), f"∇g is NaN, and info.inner.gradient_norm {inner.gradient_norm}")
        if loss == "g":
            truth(not subject.solves or np.isnan(state.y).all(), f"∇g is NaN, and y is {short(state.y)}")


@contract(
    "Keep in the state what the next estimate reads (a warm v that is not used, say), and no more; or say cold=True.",
    applies=lambda subject: not subject.cold,
)
def state_is_read(subject: HypergradientSubject) -> None:
    """Each array of the state, halved, makes another estimate."""
    state = subject.estimate()[1]
    expected = subject.estimate(state)
    leaves, structure = jax.tree.flatten(state)
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(state)):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            other = jax.tree.unflatten(structure, [*leaves[:i], jnp.asarray(np.asarray(leaf) / 2), *leaves[i + 1 :]])
            got = subject.estimate(other)
            differ(f"an estimate without and with half of state{jax.tree_util.keystr(path)}", got, expected, rtol=1e-13)


@contract(
    "Take the steps that you declare, step t on sample(key_t, t, data), and report g on the draw of the last step; "
    "or say steps=None.",
    applies=lambda subject: subject.steps is not None,
)
def y_is_that_of_a_loop_by_hand(subject: HypergradientSubject) -> None:
    """On a stream of batches, and with two learning rates."""
    (x, y), plain, steps = ground.make_point(), ground.make_batch(), subject.steps or 0
    for rate in (RATE, RATE / 2):
        got = subject.estimate(rate=rate)[1].y
        close(f"y with learning rate {rate}", got, ground.descend(steps, rate, x, y, plain.inner))
    batch = ground.varied(plain)
    (_, ys, infos), by_hand = subject.trial("varied"), ground.descend(steps, RATE, x, y, batch.inner)
    close("y", ys[0], by_hand)
    inner = _active(jax.tree.map(lambda leaf: leaf[0], infos)).inner
    if inner.inner_loss is not None:  # which a black box may leave out
        report = ground.losses(x, by_hand, batch.inner, max(steps - 1, 0))
        close("(info.inner.inner_loss, gradient_norm)", (inner.inner_loss, inner.gradient_norm), report)


@contract(
    "Differentiate the steps on the draws of the forward pass (one key for both), all of them; or say unrolls=False.",
    applies=lambda subject: subject.unrolls,
)
def gradient_is_that_of_the_steps(subject: HypergradientSubject) -> None:
    """Against jax.grad of the loop by hand, and on draws of one key against a finite difference of f."""
    x, y = ground.make_point()
    batch = ground.varied(ground.make_batch())
    by_hand = ground.unrolled_gradient(subject.steps, RATE, x, y, batch)
    close("the gradient", subject.trial("varied")[0][0], by_hand)
    grads, ahead, behind = (subject.trial(name) for name in ("noisy", "ahead", "behind"))
    losses = [_active(jax.tree.map(lambda leaf: leaf[0], trial[2])).outer_loss for trial in (ahead, behind)]
    slope = (losses[0] - losses[1]) / (2 * NEAR)
    close("the gradient along (1, …, 1)", np.sum(grads[0][0]), slope, rtol=1e-6)


@contract("Draw from sample(key, t, data) with keys that come from the key of the estimate alone.")
def draws_depend_on_the_key_alone(subject: HypergradientSubject) -> None:
    """Equal estimates for equal keys, and another y for another key."""
    one, again, other = (subject.trial(name) for name in ("noisy", "again", "other key"))
    close("(gradients, y, info)", one, again, rtol=0)
    if subject.steps and subject.keyed:
        differ("y with two keys", one[1], other[1])


@contract(
    "Look for a sign in what is subtracted; and draw it once: two draws of one gradient leave their noise in the "
    "difference."
)
def constant_outer_loss_has_no_gradient(subject: HypergradientSubject) -> None:
    """On draws that differ from step to step and from key to key."""
    grads, _, _ = subject.trial("constant")
    close("the gradient", grads[0], np.zeros_like(grads[0]), rtol=1e-12)


@contract(
    "Count in info.inner.calls what a compiled estimate runs; say what the count leaves out with "
    "uncounted=lambda info: Calls(...), such as each ∇_x g, which shows as a cross product: "
    "uncounted=lambda info: Calls(cross_products=1); or say counted=False.",
    applies=lambda subject: subject.counted and READABLE,
)
def declared_calls_are_compiled_calls(subject: HypergradientSubject) -> None:
    """By the matrix products of the compiled program, each of a size of its own."""
    info = _active(subject.estimate()[2])
    details = jax.tree.leaves(info.inner.detail, is_leaf=lambda part: isinstance(part, IHVPInfo))
    iterations = [int(part.iterations) for part in details if isinstance(part, IHVPInfo)]
    ran = ground.executed(subject.program, max(iterations, default=1))
    declared, more = ground.together(info.inner.calls), ground.together(subject.uncounted(info))
    names = ("gradients of f", "gradients of g and Hessian products", "", "cross products")
    for name, got, said, beside in zip(names, ran, declared, more, strict=True):
        truth(got == said + beside, f"{got} {name} are run, and {said} declared, {beside} beside them")


@contract("Solve in float32 (bilevax.problem.widen) what loses digits, or say half=False.", applies=lambda s: s.half)
def half_precision_is_near_double(subject: HypergradientSubject) -> None:
    """One estimate in bfloat16, where the Hessian is nearly 2 I."""
    x, y, batch = ground.halved((*ground.make_point(), ground.make_batch(curved=0.1)))
    hypergrad = subject.at(ground.PROBLEM)
    state = hypergrad.init(x, y, batch)
    grad, state, info = jax.jit(hypergrad.estimate)(keys()[0], state, x, batch)
    same_form("the gradient", grad, "x", x)
    same_form("state.y", state.y, "y", y)
    expected_grad, expected, _ = subject.estimate(batch=ground.make_batch(curved=0.1))
    inner = _active(info).inner
    finite("the report", (_active(info).outer_loss, inner.inner_loss, inner.gradient_norm))
    close("the gradient", grad.astype(float), expected_grad, rtol=0.05)
    close("y", state.y.astype(float), expected.y, rtol=0.05)


CONTRACTS: tuple[Contract, ...] = (
    gradient_is_like_x,
    python_floats_are_numbers,
    single_precision_stays_single,
    weak_types_are_kept,
    one_program_serves_all_steps,
    exact_at_the_solution,
    vmap_of_scan_equals_a_loop,
    debuggers_find_nothing,
    state_is_made_of_arrays,
    nan_is_reported,
    state_is_read,
    y_is_that_of_a_loop_by_hand,
    gradient_is_that_of_the_steps,
    draws_depend_on_the_key_alone,
    constant_outer_loss_has_no_gradient,
    declared_calls_are_compiled_calls,
    half_precision_is_near_double,
    jit_equals_eager,
)


def check_hypergradient(make: MakeHypergradient, contracts: Sequence[Contract] = CONTRACTS, **declared: Any) -> None:
    """Holds an estimator of hypergradients to the contracts that all of them keep.

    The contract `declared_calls_are_compiled_calls` is left out with JAX before 0.10, which prints
    its programs in another form.

    Args:
      make: `make(problem, optimizer, sample) -> Hypergradient`; it may leave optimizer and sampler aside.
      contracts: those to be checked, of `bilevax.testing.hypergradient.CONTRACTS`.
      declared: `steps`, `biased` and the other properties of a `HypergradientSubject`.

    Raises:
      ContractError: with the name of the first contract that is broken, what was seen, and what to do.
      ValueError: if make takes other arguments, or returns no Hypergradient; or contracts are none, or those of
        something else.
      TypeError: if there is no such property.

    Cost: some ten compiled programs, and about a hundred tiny ones for the comparison with an eager call.

    Example:
        >>> import bilevax as bx
        >>> from bilevax import testing
        >>> def mine(problem, optimizer, sample):
        ...     return bx.penalty(problem, optimizer, steps=4, multiplier=10.0, sample=sample)
        >>> testing.check_hypergradient(mine, steps=4)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        bilevax.testing._contract.ContractError: mine breaks the contract `exact_at_the_solution`.
    """
    subject = HypergradientSubject(make, **declared)
    hold_all(contracts, name_of(make), subject, lambda: subject.at(ground.PROBLEM))

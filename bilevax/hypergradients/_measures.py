"""The single measurements of an examination."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.carried import parameters
from bilevax.hypergradients._differences import OwnRun, Values, own_run, widened
from bilevax.hypergradients._patient import Clock, Patient, Room, double, flat
from bilevax.hypergradients._penalty import PenaltyDetail
from bilevax.hypergradients._reference import LocalModel, local_model
from bilevax.hypergradients._report import WRONG, HypergradientReport
from bilevax.hypergradients._two_phase import TwoPhaseInfo
from bilevax.problem import IHVPInfo, SolverInfo
from bilevax.typing import PyTree

NEAR = 1e-6  # how far from y* the inner steps are started, to see where they lead


def nothing(patient: Patient, gradient_norm: float) -> HypergradientReport:
    """A report in which all is still to be measured, but for ‖∇_y g‖ at y_T."""
    nan = math.nan
    reference = jax.tree.map(lambda leaf: np.full(np.shape(leaf), nan), patient.x)
    return HypergradientReport(
        *(False, WRONG, "", "", ""),
        relative_error=nan,
        cosine=nan,
        inner_error=nan,
        solver_error=nan,
        noise=nan,
        gradient_norm=gradient_norm,
        reference_gradient_norm=nan,
        smallest_curvature=nan,
        largest_curvature=nan,
        estimator_curvature=nan,
        flat_directions=0,
        finite_difference_error=nan,
        own_error=nan,
        damping=nan,
        multiplier=nan,
        grad=patient.grad,
        reference=reference,
    )


def details(info: Any) -> tuple[list[IHVPInfo], list[PenaltyDetail], list[bool]]:
    """What the IHVPs, the penalties and the solvers (a breakdown) report; of two phases those of the one that ran."""
    while isinstance(info, TwoPhaseInfo):
        info = info.second if info.phase else info.first
    leaves = jax.tree.leaves(info, is_leaf=lambda node: isinstance(node, IHVPInfo | PenaltyDetail))
    solves = [leaf for leaf in leaves if isinstance(leaf, IHVPInfo)]
    reports = jax.tree.leaves(info, is_leaf=lambda node: isinstance(node, SolverInfo))
    broken = [bool(report.breakdown) for report in reports if isinstance(report, SolverInfo)]
    return solves, [leaf for leaf in leaves if isinstance(leaf, PenaltyDetail)], broken


def lost(patient: Patient, points: list[tuple[np.ndarray, str]], evaluated: list[Any]) -> str:
    """What is not finite first: the start, then g and its gradient, then f and its gradients; "" where all are."""
    named = [(patient.x, "x"), (parameters(patient.state.y), "y, where the steps start,")]
    for (inner, _), (_, where) in zip(evaluated, points, strict=True):
        named += [(inner[0], f"g at {where}"), (inner[1], f"the gradient of g at {where}")]
    outer = evaluated[-1][1]
    named += [(outer[0], "f at the last y"), (outer[1], "the gradient of f at the last y")]
    for tree, name in named:
        if not all(np.isfinite(np.asarray(leaf, float)).all() for leaf in jax.tree.leaves(tree)):
            return name
    return ""


def deviation(estimates: list[np.ndarray]) -> float:
    """The standard deviation of estimates around their mean; NaN of a single one."""
    if len(estimates) == 1:
        return math.nan
    deviations = [float(np.linalg.norm(each - np.mean(estimates, axis=0))) for each in estimates]
    return float(np.linalg.norm(deviations)) / math.sqrt(len(estimates) - 1)


def like_x(room: Room, vector: np.ndarray) -> PyTree:
    """A flat vector as a pytree like x, of NumPy arrays."""
    return jax.tree.map(np.asarray, room.unravel_x(jnp.asarray(vector)))


def unread_leaves(room: Room, patient: Patient) -> tuple[np.ndarray, tuple[str, ...]]:
    """The leaves of x that g does not contain: a mask of x, and their names."""
    random = np.random.default_rng(1)
    center = room.last if np.isfinite(room.last).all() else room.first
    near = center + 0.1 * (1 + np.abs(center)) * random.normal(size=center.size)
    product = room.problem.cross(room.x, near, random.normal(size=center.size))
    leaves = jax.tree_util.tree_leaves_with_path(room.unravel_x(product))
    empty = [not np.any(leaf) for _, leaf in leaves]
    mask = np.concatenate([np.full(np.size(leaf), float(none)) for (_, leaf), none in zip(leaves, empty, strict=True)])
    names = [f"x{jax.tree_util.keystr(path)}" for (path, _), none in zip(leaves, empty, strict=True) if none]
    return mask, tuple(names)


def values_of_f(room: Room, at: LocalModel, solved: float) -> Values:
    """Stacked x -> F(x) = f(x, y*(x)), from y* by Newton steps; NaN where these do not lead to a solution."""

    def values(xs: np.ndarray) -> np.ndarray:
        found, norms = room.problem.values(xs, at.y, at.matrix)
        return np.where(np.asarray(norms) <= solved, np.asarray(found), math.nan)

    return values


def repeated(room: Room, patient: Patient) -> OwnRun:
    """The run of the estimator in float64, from the state that the estimate had."""
    x, y, batch, state = room.x, double(patient.state.y), room.batch, patient.state
    wide = widened(state, patient.hypergrad.init(x, y, batch))
    return own_run(patient.hypergrad, room.losses.outer_loss, patient.key, wide, x, batch)


def leads_uphill(room: Room, patient: Patient, at: LocalModel | None, clock: Clock) -> bool:
    """Whether steps that diverge may lead uphill: whether they lead away from y* along its flattest direction, too.

    Steps that are too large need not: they overshoot where g is steep. Where they overshoot in every direction, an odd
    number of them comes out on the other side, an even number like steps uphill. Where nothing is known, they may.
    """
    if at is None or not at.weakest.size or not clock.waiting("where the steps lead"):
        return True
    ends = repeated(room, patient).ends
    x, move = flat(room.x), NEAR * (1 + float(np.linalg.norm(at.y))) * at.weakest
    y, moved = ends(np.tile(x, (8, 1)), np.tile(at.y, (8, 1)) + np.arange(8)[:, None] % 2 * move)[:2]
    return not at.weakest @ (moved - y) <= np.linalg.norm(move)


def split_error(
    room: Room, figures: HypergradientReport, at: LocalModel, grad: np.ndarray, clock: Clock
) -> tuple[HypergradientReport, LocalModel]:
    """What of the error is due to y, and what to the derivative at that y; with the model there."""
    same = np.linalg.norm(room.last - at.y) <= 1e-9 * (1 + np.linalg.norm(at.y))
    if not (same or clock.waiting("curvature at the y of the estimator")):
        return figures, at
    there = at if same else local_model(room.problem, room.x, room.last)
    reference, exact = at.hypergradient(), there.hypergradient()
    scale = float(np.linalg.norm(reference) + 1e-6 * np.linalg.norm(at.direct - reference)) or 1.0
    figures = figures._replace(
        inner_error=float(np.linalg.norm(exact - reference)) / scale,
        solver_error=float(np.linalg.norm(grad - exact)) / scale,
        estimator_curvature=there.smallest,
    )
    return figures, there


def stuck_leaves(patient: Patient, room: Room, threshold: float) -> list[str]:
    """The leaves of y that no inner step moved although their gradient is not zero, where others moved."""
    gradient = room.unravel(jnp.asarray(room.problem.inner(room.x, room.last)[1]))
    before, after = (parameters(tree) for tree in (patient.state.y, patient.after.y))
    leaves = jax.tree_util.tree_leaves_with_path(after)
    pairs = zip(leaves, jax.tree.leaves(before), jax.tree.leaves(gradient), strict=True)
    still = [
        (f"y{jax.tree_util.keystr(path)}", np.array_equal(new, old), float(np.linalg.norm(np.ravel(slope))))
        for (path, new), old, slope in pairs
    ]
    if all(equal for _, equal, _ in still):
        return []
    return [name for name, equal, slope in still if equal and slope > threshold]

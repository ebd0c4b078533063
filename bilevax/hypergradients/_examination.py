"""The examination of an estimate: beside the implicit reference, beside its own run, and what else may be wrong."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.carried import parameters, with_parameters
from bilevax.hypergradients._bias import fitted_damping, fitted_multiplier
from bilevax.hypergradients._causes import Findings
from bilevax.hypergradients._differences import Directions, OwnRun, measure
from bilevax.hypergradients._measures import (
    details,
    deviation,
    leads_uphill,
    like_x,
    lost,
    nothing,
    repeated,
    split_error,
    stuck_leaves,
    unread_leaves,
    values_of_f,
)
from bilevax.hypergradients._patient import Clock, Patient, Room, flat, furnished
from bilevax.hypergradients._reference import LocalModel, inner_solution, local_model, polished, unbounded
from bilevax.hypergradients._report import HypergradientReport
from bilevax.inner._optimizer_steps import GROWTH
from bilevax.problem import BilevelProblem
from bilevax.typing import PyTree

SOLVED = 1e-8  # ‖∇_y g‖ of a solved inner problem, relative to ‖∇_y g‖ + 1 at the start
STILL = 1e-3  # of the way of the inner steps: when they are run again and move y by less, they have come to rest
WARM = 10  # further estimates at the same x, to see what a warm memory yields


def examined(problem: BilevelProblem, patient: Patient, values: list[float], tol: float, clock: Clock) -> Findings:
    """All findings; to be called where float64 is on."""
    room = furnished(problem, patient)
    flat_g, x = room.problem, room.x
    points = [(room.first, "the first y")] + ([(room.last, "y_T")] if np.isfinite(room.last).all() else [])
    evaluated = [(flat_g.inner(x, point), flat_g.outer(x, point)) for point, _ in points]
    (g0, slope0), (f0, _) = evaluated[0]
    wide = [float(f0), float(g0)]
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves((parameters(patient.after.y), patient.grad)))
    same = np.allclose(values, wide, rtol=max(1e-4, 30 * eps), atol=1e-6, equal_nan=True)
    solves, penalties, reports = details(patient.info)
    grad, first = flat(patient.grad), float(np.linalg.norm(slope0))
    (g_T, slope_T), _ = evaluated[-1]
    last = float(np.linalg.norm(slope_T)) if len(points) > 1 else math.nan
    grown = float(g_T) > float(g0) and last > GROWTH * first
    found = Findings(
        nothing(patient, last),
        tol,
        solved=SOLVED * (1 + first),
        values=values,
        wide_values=wide,
        same_values=bool(same),
        stuck=[],
        solves=solves,
        penalties=penalties,
        lost=lost(patient, points, evaluated),
        zeros=int(np.sum(np.asarray(slope_T) == 0)),
        finite=bool(np.isfinite(grad).all()),
        broken=any(reports),
        diverged=len(points) == 1 or (grown and (any(reports) or not reports)),
    )
    if found.lost:
        return found
    lower = len(points) > 1 and float(g_T) <= float(g0)
    start = room.last if lower else room.first
    solution = inner_solution(flat_g, x, start, 1e-3 * found.solved, clock.waiting)
    in_time = clock.waiting("curvature at y*")
    at = local_model(flat_g, x, solution) if in_time else None
    for _ in range(3):  # a few more Newton steps with a new Hessian, where the old one does not lead on
        if at is None or not at.matrix.size:
            break
        at = polished(flat_g, x, at)
        if np.linalg.norm(at.gradient) <= found.solved or not clock.waiting("curvature at y*"):
            break
        at = local_model(flat_g, x, at.y)
    found = found._replace(in_time=in_time, solved=found.solved)
    return _compared(room, patient, found, at, start, grad, clock)


def _compared(
    room: Room,
    patient: Patient,
    found: Findings,
    at: LocalModel | None,
    start: np.ndarray,
    grad: np.ndarray,
    clock: Clock,
) -> Findings:
    """The estimate beside the implicit reference, and both beside differences."""
    problem, x, tol, nowhere = room.problem, room.x, found.tol, np.full_like(grad, math.nan)
    reference = nowhere if at is None else at.hypergradient()
    figures = found.figures
    if at is not None:
        # Near a stationary x the two parts of the reference cancel: their rounding is no error of the estimate.
        scale = float(np.linalg.norm(reference) + 1e-6 * np.linalg.norm(at.direct - reference)) or 1.0
        product = float(np.linalg.norm(grad) * np.linalg.norm(reference)) or 1.0
        figures = figures._replace(
            relative_error=float(np.linalg.norm(grad - reference)) / scale,
            cosine=float(grad @ reference) / product,
            noise=deviation([grad, *map(flat, patient.others)]) / scale,
            reference_gradient_norm=float(np.linalg.norm(at.gradient)),
            smallest_curvature=at.smallest,
            largest_curvature=at.largest,
            flat_directions=at.flat,
            reference=like_x(room, reference),
        )
        if at.flat:
            note = (
                f"{at.flat} directions of y have no curvature, such as a bias that changes nothing or a leaf without "
                f"use. The hypergradient does not see them."
            )
            figures = figures._replace(note=note)
        bottomless = not np.linalg.norm(at.gradient) <= found.solved and unbounded(problem, x, start, at.y)
        found = found._replace(figures=figures, bottomless=bottomless)
    if not found.finite:
        return found
    mask, names = unread_leaves(room, patient)
    directions = Directions.make(flat(x), grad, reference, mask)
    if at is not None and clock.waiting("differences of F"):
        level = float(problem.outer(x, at.y)[0])
        values = values_of_f(room, at, found.solved)
        size = directions.size(reference, level)
        errors, _ = measure(values, directions, reference, size, tol)
        figures = figures._replace(finite_difference_error=float(np.max(errors)))
    found = found._replace(figures=figures)
    if found.diverged:
        return found._replace(uphill=leads_uphill(room, patient, at, clock))
    if at is not None and found.close and not names:
        return found._replace(figures=split_error(room, found.figures, at, grad, clock)[0])
    return _run_again(room, patient, found, at, directions, names, grad, clock)


def _run_again(
    room: Room,
    patient: Patient,
    found: Findings,
    at: LocalModel | None,
    directions: Directions,
    names: tuple[str, ...],
    grad: np.ndarray,
    clock: Clock,
) -> Findings:
    """The estimate beside differences of its own run; then, where it is neither derivative, what else may be wrong."""
    if not found.close:
        found = _settled(room, patient, found, at)
    # what an IHVP gives is meant for a solution: that of g, or another point at which the steps come to rest
    asked = not found.broken and (not found.solves or found.stops or not found.believed)
    if (asked or names) and clock.waiting("differences of the run itself"):
        try:
            run = repeated(room, patient)
            points = np.concatenate([directions.x + step * directions.rows for step in (0, 1e-3)])
            values, ends = run.both(points)
        except (TypeError, ValueError) as error:  # of an optimizer that insists on float32, say
            note = f"The run could not be repeated in float64: {str(error).splitlines()[0]}"
            found = found._replace(figures=found.figures._replace(note=note))
        else:
            depends = asked and bool(np.ptp(ends, axis=0).max() > 1e-12 * (1 + np.abs(ends).max()))
            found = _beside_run(room, patient, found, run, directions, names, grad, float(values[0]), depends)
    if found.own or found.unread or found.close or at is None:
        return found
    figures, there = split_error(room, found.figures, at, grad, clock)
    other = figures.solver_error > max(found.tol, figures.inner_error) and found.believed
    if other and clock.waiting("what else would give this estimate"):
        figures = _likened(room, found._replace(figures=figures), at, there, grad)
    return _later(room, patient, found._replace(figures=figures), at)


def _beside_run(
    room: Room,
    patient: Patient,
    found: Findings,
    run: OwnRun,
    at: Directions,
    names: tuple[str, ...],
    grad: np.ndarray,
    level: float,
    depends: bool,
) -> Findings:
    """The estimate beside differences of f(x, y_T(x)), whose value is the level, where y_T depends on x."""
    size = at.size(grad, level)
    errors, slopes = measure(run.values, at, grad, size, found.tol)
    apart = abs(slopes[3] - at.rows[3] @ grad)
    named = names and not found.figures.finite_difference_error > found.tol
    if named and apart > max(found.tol * abs(slopes[3]), 1e-6 * abs(level)):
        return found._replace(unread=names)
    if found.close or not depends:
        return found
    found = found._replace(figures=found.figures._replace(own_error=float(np.max(errors))))
    return found._replace(figures=_by_own_run(room, patient, found, run, at, slopes, grad, size))


def _settled(room: Room, patient: Patient, found: Findings, at: LocalModel | None) -> Findings:
    """Whether the steps have come to rest away from y*, by running them once more; and the leaves that never moved.

    A run from a y that is no number tells whether they start at the y of the state at all, or at `initial(x)`.
    """
    lost = with_parameters(patient.after.y, jax.tree.map(lambda leaf: leaf * math.nan, parameters(patient.after.y)))
    with jax.enable_x64(patient.wide), jax.debug_nans(False):
        states = patient.after, patient.after._replace(y=lost)
        again, other = (flat(patient.estimate(patient.key, start, patient.x, patient.batch)[1].y) for start in states)
    moved, way = (float(np.linalg.norm(end - room.last)) for end in (again, room.first))
    length = float(np.linalg.norm(room.last))
    rests = (moved <= STILL * way or moved <= 1e-7 * length) and not np.isfinite(other).all()
    distance = math.inf if at is None else float(np.linalg.norm(room.last - at.y)) - 1e-3 * float(np.linalg.norm(at.y))
    stops = way > 0 and rests and distance > 100 * moved and found.figures.gradient_norm > found.solved
    return found._replace(stops=stops, stuck=stuck_leaves(patient, room, found.solved))


def _likened(room: Room, found: Findings, at: LocalModel, there: LocalModel, grad: np.ndarray) -> HypergradientReport:
    """The damping, or without a linear solve the multiplier of a penalty, that would give this estimate."""
    figures, scale = found.figures, float(np.linalg.norm(at.hypergradient())) or 1.0
    if found.solves:
        damping, left = fitted_damping(there, grad)
        return figures._replace(damping=damping if left / scale < found.tol else math.nan)
    multiplier, left = fitted_multiplier(room.losses, room.unravel, room.batch, room.x, at, grad)
    return figures._replace(multiplier=multiplier if left / scale < 0.1 * found.tol else math.nan)


def _by_own_run(
    room: Room,
    patient: Patient,
    found: Findings,
    run: OwnRun,
    at: Directions,
    slopes: np.ndarray,
    grad: np.ndarray,
    size: float,
) -> HypergradientReport:
    """The figures with the run in float64 as the reference, where the estimate there is its derivative.

    Draws of random numbers, and long unrolls, are others in float64: where the estimate is not, its like in float64 is
    asked.
    """
    figures, dtypes = found.figures, {leaf.dtype for leaf in jax.tree.leaves(patient.grad)}
    single = dtypes != {np.dtype(float)}
    if not found.own and not (single and (patient.key is not None or figures.own_error < 0.5)):
        return figures
    gradient = run.gradient() if single else grad
    errors = np.abs(slopes - at.rows @ gradient) / np.maximum(size, np.abs(slopes))
    if not np.max(errors) <= found.tol:
        return figures
    length = float(np.linalg.norm(gradient)) or 1.0
    distance = float(np.linalg.norm(grad - gradient)) / length
    own = float(np.max(errors)) if patient.key is not None else max(float(np.max(errors)), distance)
    note = figures.note
    if found.stops:
        note = "The inner steps stop where ∇_y g is not 0, at a constraint or a kink: the implicit rule would be wrong."
    elif found.believed:
        note = (
            f"With the inner problem solved, the hypergradient is another one: relative distance "
            f"{figures.relative_error:.2g}, cosine {figures.cosine:.3f}. Few steps from a warm y see less of it; more "
            f"of them, or inner.implicit, see all."
        )
    product = float(np.linalg.norm(grad)) * length
    return figures._replace(
        own_error=own,
        note=note,
        relative_error=distance if patient.key is None else own,
        cosine=float(grad @ gradient) / (product or 1.0),
        reference=like_x(room, gradient),
    )


def _later(room: Room, patient: Patient, found: Findings, at: LocalModel) -> Findings:
    """What becomes of the error where the estimate starts afresh, or is repeated."""
    estimate, reference = patient.estimate, at.hypergradient()
    scale = float(np.linalg.norm(reference)) or 1.0
    if not found.believed:
        return found

    def error(tree: PyTree) -> float:
        return float(np.linalg.norm(flat(tree) - reference)) / scale

    with jax.enable_x64(patient.wide):
        if patient.given:
            afresh = patient.hypergrad.init(patient.x, patient.state.y, patient.batch)
            cold = patient.hypergrad.init(patient.x, patient.y, patient.batch)
            errors = [error(estimate(patient.key, start, patient.x, patient.batch)[0]) for start in (afresh, cold)]
            return found._replace(same_memory_error=errors[0], cold_error=errors[1])
        state = patient.after
        for _ in range(WARM):
            grad, state, _ = estimate(patient.key, state, patient.x, patient.batch)
        warm = error(grad)
    if warm < 0.5 * found.figures.relative_error:
        note = (
            f"After {WARM} more estimates at this x, the memory being warm, the relative error is {warm:.2g}. If your "
            f"loop has such a state, pass it: state=state."
        )
        found = found._replace(figures=found.figures._replace(note=note))
    return found

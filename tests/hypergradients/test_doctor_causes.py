"""The doctor's table of causes, row by row, by findings made for each; `test_doctor` has a real problem for each."""

import itertools
import math

import numpy as np
import pytest

import bilevax as bx
from bilevax.hypergradients._causes import CAUSES, Findings, diagnosed

SOLVE = bx.problem.IHVPInfo(5, products=6, setup_products=0, residual=1e-9, curvature=0.1, breakdown=False)
PENALTY = bx.hypergradients.PenaltyDetail(multiplier=20.0, gap=0.01, gradient_norm=1e-6)
FIGURES = bx.hypergradients.HypergradientReport(
    ok=False,
    grade="wrong",
    verdict="",
    remedy="",
    note="",
    relative_error=0.3,
    cosine=0.9,
    inner_error=0.1,
    solver_error=0.2,
    noise=math.nan,
    gradient_norm=1e-9,
    reference_gradient_norm=1e-12,
    smallest_curvature=0.1,
    largest_curvature=10.0,
    estimator_curvature=0.1,
    flat_directions=0,
    finite_difference_error=1e-8,
    own_error=0.5,
    damping=math.nan,
    multiplier=math.nan,
    grad=np.zeros(3),
    reference=np.ones(3),
)
LAST = Findings(
    FIGURES,
    tol=0.01,
    solved=1e-8,
    values=[1.0, 2.0],
    wide_values=[1.5, 2.5],
    same_values=True,
    stuck=[],
    solves=[SOLVE],
    penalties=[],
)
NO_MINIMUM = "the inner problem has no minimum that could be found"
ROWS = {  # in the order of the table: the verdict, and how what is found differs from the last row
    "the gradient of g at y_T is not finite": {"lost": "the gradient of g at y_T"},
    "a loss is another function in float64, so that the reference is not its own": {"same_values": False},
    "the inner steps diverge: too large, or uphill": {"diverged": True, "uphill": True},
    "the inner steps diverge: their step size is too large": {"diverged": True},
    "the estimate is not finite, though y is: v is lost first": {"finite": False, "solves": [SOLVE]},
    "the estimate is not finite, though y is: the derivative of the inner steps is lost first": {
        "finite": False,
        "solves": [],
    },
    "the derivative of x['a'] is zero, because x enters the optimizer only, not g": {"unread": ("x['a']",)},
    "the hypergradient is right to 0.01: it is the derivative of the steps that run": {"own_error": 0.01},
    "y['a'], y['b'] does not move, but g depends on it": {"stuck": ["y['a']", "y['b']"]},
    "the inner steps stop where ∇_y g is not 0: at a constraint, a kink, or for want of a step": {"stops": True},
    "g is not bounded below: it has no minimum": {"bottomless": True},
    "the budget was over before the inner problem was solved": {"reference_gradient_norm": 1.0, "in_time": False},
    NO_MINIMUM: {"reference_gradient_norm": 1.0},
    "the curvature is indefinite at a stationary point: y is at a saddle": {"smallest_curvature": -1.0},
    "the curvature is flat: y*(x) is not unique, and F has no gradient that does not depend on the start": {
        "smallest_curvature": 0.0
    },
    "the implicit hypergradient and a finite difference of F do not agree": {"finite_difference_error": 0.1},
    "the hypergradient is right to 0.01": {"relative_error": 0.01},
    "the noise of random draws is most of the error": {"noise": 0.2},
    "the warm v, or the state of the optimizer, is stale: afresh the error is smaller": {"same_memory_error": 0.15},
    "the warm start is wrong: from the y that was passed the error is smaller": {"cold_error": 0.15},
    "the hypergradient is not right, and the budget was over before the cause was found": {"inner_error": math.nan},
    "the curvature is indefinite where the estimator stands": {"estimator_curvature": -1.0, "solves": [SOLVE]},
    "the penalty is biased": {"multiplier": 20.0, "inner_error": 0.2, "solves": []},
    "the inner problem is not solved": {"inner_error": 0.25},
    "the unroll is too short": {"solves": []},
    "the linear solver broke down": {"solves": [SOLVE._replace(residual=2.0, breakdown=True)]},
    "the linear system is not solved: too few iterations": {"solves": [SOLVE._replace(residual=0.006)]},
    "the inverse Hessian is replaced by a crude approximation": {"solves": [SOLVE._replace(residual=None)]},
    "the estimate is a multiple of the hypergradient": {"cosine": -1.0},
    "another system was solved: the damping is too large": {"damping": 0.5},
    "another system was solved: the curvature is not the Hessian": {},
}
RIGHT = [verdict for verdict in ROWS if verdict.startswith("the hypergradient is right")]
PLACES = dict(zip(ROWS, range(len(ROWS)), strict=True))


def test_a_penalty_of_the_package_reports_its_multiplier():
    report = diagnosed(found({"penalties": [PENALTY], "inner_error": 0.2, "solves": []}))
    assert report.verdict == "the penalty is biased"
    assert "multiplier is 20, ‖∇_y g‖" in report.remedy


def found(changes):
    """The findings of the last row, with changes to them and to the figures."""
    figures = {name: value for name, value in changes.items() if name in FIGURES._fields}
    others = {name: value for name, value in changes.items() if name not in figures}
    return LAST._replace(figures=FIGURES._replace(**figures), **others)


def place(finding):
    """Which row is the first that applies."""
    return next(number for number, cause in enumerate(CAUSES) if cause.applies(finding))


def test_every_row_is_reached_and_no_other_one():
    assert [place(found(changes)) for changes in ROWS.values()] == list(range(len(CAUSES)))


@pytest.mark.parametrize("verdict", ROWS)
def test_a_row_has_its_verdict_and_a_remedy_in_sentences(verdict):
    report = diagnosed(found(ROWS[verdict]))
    assert report.verdict == verdict
    assert report.ok == (verdict in RIGHT)
    assert report.grade == ("exact" if report.ok else "not known" if verdict.startswith("the budget") else "wrong")
    expected = found(ROWS[verdict])
    told = ("relative_error", "cosine", "inner_error", "solver_error")
    believed = (expected.believed or expected.own) and not expected.unread
    same = {name: getattr(expected.figures, name) for name in told}
    assert all(math.isfinite(getattr(report, name)) == (believed and math.isfinite(same[name])) for name in told)
    if expected.bottomless:
        there = "reference_gradient_norm", "smallest_curvature", "largest_curvature", "finite_difference_error"
        assert all(math.isnan(getattr(report, name)) for name in there)
        same |= {name: getattr(expected.figures, name) for name in there}
    assert report._replace(ok=False, grade="wrong", verdict="", remedy="", **same) == expected.figures
    assert not verdict.endswith((".", ":", ","))
    if not report.ok:
        assert report.remedy[0].isupper() or report.remedy.startswith(("f and g", "‖∇_y g‖", "3 entries"))
        assert report.remedy.endswith(".")
    words = f"{report.verdict} {report.remedy}"
    assert "  " not in words
    assert "nan" not in words


@pytest.mark.parametrize("verdict", ROWS)
def test_of_two_causes_the_upper_one_is_told(verdict):
    lower = itertools.islice(ROWS.values(), PLACES[verdict] + 1, None)
    assert {place(found(changes | ROWS[verdict])) for changes in lower} <= {PLACES[verdict]}


def test_the_last_row_always_applies():
    assert [verdict for verdict, changes in ROWS.items() if not CAUSES[-1].applies(found(changes))] == []
    assert not any(cause.applies(LAST) for cause in CAUSES[:-1])


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"reference_gradient_norm": math.nan}, NO_MINIMUM),
        ({"same_memory_error": 0.16}, "another system was solved"),
        ({"same_memory_error": 0.15, "solves": []}, "the warm state of the optimizer is stale"),
        ({"same_memory_error": 0.01, "relative_error": 0.015}, "the warm v, or the state of the optimizer, is stale"),
        ({"own_error": 0.011}, "another system was solved"),
        ({"noise": 0.2, "smallest_curvature": 0.0}, "the curvature is flat"),
        ({"smallest_curvature": -1e-12}, "the curvature is flat"),
        ({"smallest_curvature": 1e-8}, "another system was solved"),
        ({"noise": 0.15}, "another system was solved"),
        (
            {"inner_error": math.nan, "gradient_norm": 0.06},
            "the inner problem is not solved (‖∇_y g‖ 0.06); the budget",
        ),
        ({"penalties": [PENALTY], "inner_error": 0.25}, "the inner problem is not solved"),
        ({"solves": [SOLVE._replace(residual=None, breakdown=True)]}, "the linear solver broke down"),
        ({"solves": [SOLVE._replace(residual=0.004)]}, "another system was solved"),
        (
            ROWS["the linear system is not solved: too few iterations"] | {"smallest_curvature": math.nan},
            "the linear sys",
        ),
        ({"cosine": -1.0, "reference": np.ones(2)}, "another system was solved"),  # of few numbers it says nothing
    ],
)
def test_the_edge_of_a_row(changes, verdict):
    assert diagnosed(found(changes)).verdict.startswith(verdict)


def test_of_a_loss_with_other_numbers_an_estimate_near_the_reference_is_ok():
    other, *problems = [verdict for verdict in ROWS if verdict.startswith(("a loss is", "the curv", "the impl"))]
    assert diagnosed(found({"relative_error": 0.001, **ROWS[other]})).ok
    assert not any(diagnosed(found({"relative_error": 0.001, **ROWS[problem]})).ok for problem in problems[:3])


@pytest.mark.parametrize(
    ("changes", "grade"),
    [
        ({"cosine": 0.69}, "wrong"),
        ({"cosine": 0.7}, "good enough to descend"),
        ({"cosine": 0.99, "grad": np.full(3, 4.1)}, "wrong"),
        ({"cosine": 0.99, "grad": np.full(3, 0.24)}, "wrong"),
        ({"cosine": 0.99, "diverged": True}, "wrong"),
        ({"cosine": 0.99, "finite_difference_error": 0.1}, "wrong"),
        ({"cosine": 0.99, "smallest_curvature": math.nan}, "good enough to descend"),
    ],
)
def test_an_estimate_with_an_error_may_be_good_enough(changes, grade):
    report = diagnosed(found({"grad": np.ones(3)} | changes))
    assert (report.ok, report.grade) == (False, grade)
    assert report.verdict


@pytest.mark.parametrize(
    ("verdict", "says"),
    [
        ("a loss is another function in float64, so that the reference is not its own", "1 and 2 in your numbers, 1.5"),
        ("the estimate is not finite, though y is: v is lost first", "must be below 2 / 10 = 0.2. Look"),
        ("the inner steps diverge: their step size is too large", "below 2 / 10 = 0.2, with momentum"),
        (
            "the inner steps diverge: too large, or uphill",
            "Lower the step size: gradient descent takes one below 2 / 10",
        ),
        ("the inner problem is not solved", "the bound is 2 / L = 2 / 10 = 0.2; a rate of Adam has no such bound"),
        ("the warm start is wrong: from the y that was passed the error is smaller", "is 0.15 instead of 0.3"),
        ("the curvature is indefinite where the estimator stands", "is -1, at y* 0.1: solve"),
        ("the penalty is biased", "that of a multiplier of 20,"),
        ("the linear system is not solved: too few iterations", "is 0.006 after 5. A condition number of 1e+02 takes"),
        ("another system was solved: the damping is too large", "of about 0.5, where the smallest curvature is 0.1."),
    ],
)
def test_a_remedy_has_the_numbers(verdict, says):
    assert says in diagnosed(found(ROWS[verdict])).remedy


def test_a_notebook_shows_what_print_does():
    report = diagnosed(LAST)
    assert repr(report) == str(report) == f"{report}"
    assert repr(report).startswith("WRONG: another system was solved")
    table = bx.curvature.Report((), 0, ("a note",))
    assert repr(table) == str(table)
    assert repr(table).splitlines()[-1] == "a note"

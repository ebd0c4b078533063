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
    verdict="",
    remedy="",
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
    finite_difference_error=1e-8,
    damping=math.nan,
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
ROWS = {  # in the order of the table: the verdict, and how what is found differs from the last row
    "a loss is another function in float64, so that the reference is not its own": {"same_values": False},
    "the inner problem has no minimum that could be found": {"reference_gradient_norm": 1.0},
    "the curvature is indefinite at a stationary point: y is at a saddle": {"smallest_curvature": -1.0},
    "the curvature is flat: y*(x) is not unique, and F has no gradient that does not depend on the start": {
        "smallest_curvature": 0.0
    },
    "the implicit hypergradient and a finite difference of F do not agree": {"finite_difference_error": 0.1},
    "the hypergradient is right to 0.01": {"relative_error": 0.01},
    "the estimate is not finite, though y is": {"relative_error": math.nan, "gradient_norm": 1.0},
    "the estimate is not finite": {"relative_error": math.inf, "gradient_norm": math.nan},
    "the curvature is indefinite where the estimator stands": {"estimator_curvature": -1.0, "solves": [SOLVE]},
    "the noise of random draws is most of the error": {"noise": 0.2},
    "y['a'], y['b'] does not move, but g depends on it": {"stuck": ["y['a']", "y['b']"]},
    "the penalty is biased": {"penalties": [PENALTY], "inner_error": 0.2, "solves": []},
    "the inner problem is not solved": {"inner_error": 0.25},
    "the unroll is too short": {"solves": []},
    "the linear solver broke down": {"solves": [SOLVE._replace(residual=2.0, breakdown=True)]},
    "the linear system is not solved: too few iterations": {"solves": [SOLVE._replace(residual=0.006)]},
    "the inverse Hessian is replaced by a crude approximation": {"solves": [SOLVE._replace(residual=None)]},
    "the estimate is a multiple of the hypergradient": {"cosine": -1.0},
    "another system was solved: the damping is too large": {"damping": 0.5},
    "another system was solved: the curvature is not the Hessian": {},
}
PLACES = dict(zip(ROWS, range(len(ROWS)), strict=True))


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
    assert report.ok == (verdict == "the hypergradient is right to 0.01")
    assert report._replace(ok=False, verdict="", remedy="") == found(ROWS[verdict]).figures
    assert not verdict.endswith((".", ":", ","))
    if not report.ok:
        assert report.remedy[0].isupper() or report.remedy.startswith(("f and g", "‖∇_y g‖"))
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
        ({"reference_gradient_norm": math.nan}, "the inner problem has no minimum that could be found"),
        ({"smallest_curvature": -1e-12}, "the curvature is flat"),
        ({"smallest_curvature": 1e-8}, "another system was solved"),
        ({"noise": 0.15}, "another system was solved"),
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
    verdict, *problems = list(ROWS)[:5]
    assert diagnosed(found({"relative_error": 0.001, **ROWS[verdict]})).ok
    assert not any(diagnosed(found({"relative_error": 0.001, **ROWS[verdict]})).ok for verdict in problems)


@pytest.mark.parametrize(
    ("verdict", "says"),
    [
        ("a loss is another function in float64, so that the reference is not its own", "1 and 2 in your numbers, 1.5"),
        ("the estimate is not finite, though y is", "must be below 2 / 10 = 0.2. Look"),
        ("the curvature is indefinite where the estimator stands", "is -1, at y* 0.1: solve"),
        ("the penalty is biased", "multiplier is 20,"),
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

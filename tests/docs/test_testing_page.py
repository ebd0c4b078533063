"""docs/testing.md, run as it stands; what it prints is what the page shows. And `bilevax.testing` as a whole."""

import ast
import contextlib
import inspect
import io
import pathlib
import re

import pytest

from bilevax import testing

PAGE = (pathlib.Path(__file__).parent.parent.parent / "docs" / "testing.md").read_text()
SOURCES = sorted(pathlib.Path(testing.__file__).parent.rglob("*.py"))


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.compiles(300)
def test_the_page_runs_and_prints_what_it_shows():
    namespace, printed = {"__name__": "page"}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for code in blocks("python"):
            exec(compile(code, "docs/testing.md", "exec"), namespace)
    assert printed.getvalue() == "".join(blocks("text"))
    assert namespace["error"] < 1e-6
    assert len(namespace["ASKED"]) >= 8
    namespace["test_richardson"](namespace["ASKED"][0])


def test_the_table_names_the_properties_of_subjects():
    named = set(re.findall(r"`(\w+)=", PAGE[PAGE.index("| declared") : PAGE.index("## One case")]))
    fields = {*testing.IHVPSubject.__dataclass_fields__, *testing.HypergradientSubject.__dataclass_fields__}
    checks = (testing.check_correction, testing.check_estimator, testing.check_gossip, testing.check_algorithm)
    declared = {name for check in checks for name in inspect.signature(check).parameters}
    methods = {"ihvp", "number", "make", "make_solver", "correction", "estimator", "gossip"}
    assert named == (fields | declared) - methods - {"contracts"}


def test_contracts_can_fail_under_optimized_python():
    """An `assert` statement is compiled to nothing there: truth(condition, seen) stands in its place."""
    trees = {path.name: ast.walk(ast.parse(path.read_text())) for path in SOURCES}
    found = [(name, node.lineno) for name, nodes in trees.items() for node in nodes if isinstance(node, ast.Assert)]
    assert len(trees) > 10
    assert not found

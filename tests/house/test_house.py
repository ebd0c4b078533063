"""The house of the library: floors, names that are one thing, what tab completion shows, what an import costs."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys

import pytest
from public import NAMESPACES
from rooms import ROOT, circles, edges, room, sources, upwards

import bilevax as bx

FLOORS = {  # of CONTRIBUTING; a room imports only from floors below
    **{"typing": 0, "meshes": 0, "checks": 1, "printing": 1},
    **{"problem": 2, "sampling": 2, "carried": 2},
    **{"curvature": 3, "agents": 3},
    **{"ihvp": 4},
    **{"inner": 5, "single_loop": 5},
    **{"hypergradients": 6, "decentralized": 6, "parallel": 6, "checkpoint": 6},
    **{"algorithms": 7},
    **{"testing": 8},
}
GRAPH = edges(sources("bilevax"))


def test_rooms_import_from_floors_below_only():
    assert {room(module) for module in GRAPH if "." in module} == {*FLOORS}
    assert upwards(GRAPH, FLOORS) == []


def test_no_file_imports_itself_by_way_of_others():
    packages = {module: {other for other in others if other != "bilevax"} for module, others in GRAPH.items()}
    assert circles(packages) == []


@pytest.mark.parametrize(
    ("below", "refused"),
    [("from bilevax.inner import chain", True), ("from bilevax.agents import gossip", True), ("import numpy", False)],
)
def test_an_import_upwards_or_sideways_is_seen(below, refused):
    texts = {"bilevax": "", "bilevax.curvature.x": below, "bilevax.inner": "", "bilevax.agents": ""}
    assert bool(upwards(edges(texts), FLOORS)) == refused


def modules():
    return [importlib.import_module(found.name) for found in pkgutil.walk_packages(bx.__path__, "bilevax.")]


def test_a_name_is_a_function_or_a_module():
    """No function hides a module, and a file with a public function of its own name has an underscore."""
    for module in modules():
        package, _, name = module.__name__.rpartition(".")
        assert getattr(importlib.import_module(package), name) is module
        body = ast.parse(inspect.getsource(module)).body
        defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert name.startswith("_") or name not in defined, (
            f"{module.__name__} holds a function {name}: call the file _{name}.py"
        )


@pytest.mark.parametrize("name", NAMESPACES)
def test_tab_completion_shows_what_is_meant(name):
    module = NAMESPACES[name]
    shown = [one for one in dir(module) if one != "__version__"]
    assert sorted(shown) == sorted(module.__all__)
    for one in shown:
        value = getattr(module, one)
        assert not inspect.ismodule(value) or value.__name__.startswith("bilevax.")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("hypergradientz", r"; did you mean bx\.hypergradient or "),
        ("minibatch", r"; did you mean bx\.sampling\.minibatch\?"),
        ("implicit", r"; did you mean bx\.inner\.implicit\?"),
        ("State", r"; did you mean bx\.single_loop\.State\?"),
        ("reverze", r"; did you mean bx\.inner\.reverse\?"),
        ("correction", r"; did you mean bx\.single_loop\.correction or "),
        ("zzz", r"; it has Batch, BilevelProblem, .*, typing\."),
    ],
)
def test_an_unknown_name_is_told_where_it_is(name, hint):
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'{hint}"):
        getattr(bx, name)


@pytest.mark.parametrize("name", ["__wrapped__", "printing"])
def test_what_python_asks_for_is_not_searched(name):
    """Neither its own names nor the files that it imports by `from bilevax import printing` import everything."""
    assert "bilevax.inner" not in loaded(f"import bilevax; hasattr(bilevax, {name!r})")


def loaded(code):
    """Modules that are imported after a line of code, in a process of its own."""
    program = f"import jax, optax, sys; before = {{*sys.modules}}; {code}; print(*({{*sys.modules}} - before))"
    return {*subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()}


def test_whoever_wants_one_gradient_does_not_pay_for_graphs():
    assert {one for one in loaded("import bilevax") if one.startswith("bilevax")} == {"bilevax"}
    found = loaded("import bilevax as bx; bx.hypergradient, bx.inner.implicit, bx.ihvp.cg, bx.Batch")
    assert not found & {"networkx", "scipy.optimize", "scipy.sparse", "lineax", "flax"}
    assert not {one for one in found if re.match(r"bilevax\.(decentralized|agents|algorithms)", one)}


def section():
    """Of CONTRIBUTING: which words there are, and how they are given."""
    return (ROOT / "CONTRIBUTING.md").read_text().partition("\n## Words\n")[2].partition("\n## ")[0]


def words():
    """The words of its tables; a row may have several."""
    firsts = re.findall(r"^\| (`.+?`) \| .+ \|$", section(), re.M)
    return [word for first in firsts for word in re.findall(r"`(\w+)`", first)]


def signatures():
    """Public function -> its parameters by their names."""
    return {
        f"{space}.{name}": inspect.signature(getattr(module, name)).parameters
        for space, module in NAMESPACES.items()
        for name in module.__all__
        if inspect.isfunction(getattr(module, name))
    }


def parts():
    """Public class that users make or read -> its fields; not what methods return."""
    return {
        f"{space}.{name}": list(inspect.signature(value).parameters)
        for space, module in NAMESPACES.items()
        for name, value in ((name, getattr(module, name)) for name in module.__all__)
        if inspect.isclass(value) and (hasattr(value, "_fields") or value is bx.curvature.ModelLoss)
        if not name.endswith(("State", "Info", "Report", "Detail"))
    }


def test_no_public_name_is_outside_of_the_word_list():
    used = {}
    for place, names in (signatures() | parts()).items():
        for name in names:
            used.setdefault(name, set()).add(place)
    known = words()
    assert {name: sorted(places) for name, places in used.items() if name not in known} == {}
    assert {*known} - {*used} == set(), "words that nothing uses"
    assert len({*known}) == len(known), "a word with two rows"


SIZES = ("maxiter", "tol", "terms", "rank", "steps")
FIVE = ("step_size", "damping", "curvature", "preconditioner", "sample")


def test_what_many_functions_take_stands_in_one_order(subtests):
    for place, parameters in signatures().items():
        with subtests.test(place):
            found = [name for name in parameters if name in FIVE or (name in SIZES and place.startswith("bx.ihvp."))]
            assert found == sorted(found, key=(*SIZES, *FIVE).index)


def by_position(parameters):
    return [name for name, one in parameters.items() if one.kind is not inspect.Parameter.KEYWORD_ONLY]


def test_only_some_words_are_given_by_position():
    sentence = re.search(r"By position may be given(.*?)Everything else", section(), re.S)[1]
    known, used = {*re.findall(r"`(\w+)`", sentence)}, set()
    for place, parameters in signatures().items():
        given = by_position(parameters)
        if len(given) > 1 and not place.startswith("bx.testing."):
            assert {*given} <= known, f"{place}{(*given,)}: by keyword, or into the list of CONTRIBUTING"
            used |= {*given}
    assert known == used


def test_the_version_stands_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+", bx.__version__)
    files = [ROOT / "pyproject.toml", *(ROOT / "bilevax").rglob("*.py"), ROOT / "README.md"]
    assert [path.name for path in files if f'"{bx.__version__}"' in path.read_text()] == ["__init__.py"]

"""The rooms of the benchmarks: imports run downwards and in no circle, and of bilevax only what is public is used."""

import ast
import functools
import importlib
import inspect

import pytest
from rooms import circles, edges, imported, room, sources, upwards

# From the lowest up
FOLDERS = ("harness", "data", "networks", "tasks", "studies", "decentralized", "robustness", "__main__")
FLOORS = {folder: floor for floor, folder in enumerate(FOLDERS)}


def dotted(node):
    """`a.b.c` of a chain of attributes that starts at a name, else None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (front := dotted(node.value)):
        return f"{front}.{node.attr}"
    return None


def uses(text):
    """Dotted paths of bilevax that a file imports or reads."""
    names = {name: path for name, path in imported(text).items() if path.partition(".")[0] == "bilevax"}
    chains = filter(None, (dotted(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)))
    parts = (chain.partition(".") for chain in chains)
    return {*names.values()} | {f"{names[first]}.{rest}" for first, _, rest in parts if first in names}


@functools.cache
def private(path):
    """The first step of a path that its namespace does not make public, or None."""
    here = importlib.import_module("bilevax")
    for name in path.split(".")[1:]:
        if name.startswith("_") or (inspect.ismodule(here) and name not in here.__all__):
            return name
        here = getattr(here, name, None)
    return None


def test_every_file_lies_in_a_room():
    assert {room(module) for module in sources("benchmarks") if "." in module} == {*FOLDERS}


def test_folders_import_from_those_below_only():
    assert upwards(edges(sources("benchmarks")), FLOORS) == []


def test_no_file_imports_itself_by_way_of_others():
    assert circles(edges(sources("benchmarks"))) == []


def test_of_bilevax_only_public_names_are_used():
    assert {
        module: found for module, text in sources("benchmarks").items() if (found := [*filter(private, uses(text))])
    } == {}


@pytest.mark.parametrize(
    ("below", "refused"),
    [
        ("from benchmarks.studies import peers", ["benchmarks.harness.loop imports benchmarks.studies.peers"]),
        (
            "def late():\n    from benchmarks.studies.peers import x as y",
            ["benchmarks.harness.loop imports benchmarks.studies.peers"],
        ),
        ("import benchmarks.studies.peers", ["benchmarks.harness.loop imports benchmarks.studies.peers"]),
        ("import numpy", []),
    ],
)
def test_an_import_upwards_and_a_circle_are_seen(below, refused):
    above = "from benchmarks.harness.loop import drive"
    graph = edges({"benchmarks.harness.loop": below, "benchmarks.studies.peers": above, "benchmarks.studies": ""})
    assert upwards(graph, FLOORS) == refused
    assert bool(circles(graph)) == bool(refused)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import bilevax as bx\nbx.checks.count", ["bilevax.checks", "bilevax.checks.count"]),
        ("from bilevax import ihvp\nihvp.cg._solve(1).x", ["bilevax.ihvp.cg._solve"]),
        ("from bilevax.inner._optimizer_steps import run", ["bilevax.inner._optimizer_steps.run"]),
        ("import bilevax as bx\nbx.inner.implicit(g).start", []),
    ],
)
def test_names_that_are_not_public_are_seen(text, names):
    assert sorted(filter(private, uses(text))) == names

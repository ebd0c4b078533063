"""Who imports whom among the files of a package, and whether that runs downwards and in no circle."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def sources(package):
    """Module -> text of each file of the package, packages without their `__init__`."""
    files = {path.relative_to(ROOT).with_suffix(""): path for path in (ROOT / package).rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path.read_text() for name, path in files.items()}


def imported(text):
    """Name in the file -> dotted path of all that a file imports, inside its functions too."""
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the package"
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name] = alias.name
    return found


def edges(texts):
    """Module -> the modules among them that it imports from."""
    package = min(texts, key=len).partition(".")[0]
    found = {}
    for module, text in texts.items():
        paths = [path for path in imported(text).values() if path.partition(".")[0] == package]
        owners = {path if path in texts else path.rpartition(".")[0] for path in paths}
        assert owners <= {*texts}, f"{module} imports {owners - {*texts}}, which are no files"
        found[module] = owners - {module}
    return found


def room(module):
    """The folder, or the file beside the folders, that a module lies in."""
    return module.split(".")[1]


def upwards(graph, floors):
    """Imports from another room that is no floor below, as sentences; floors: room -> number."""
    pairs = [(module, other) for module, others in graph.items() for other in others if "." in module and "." in other]
    return [
        f"{module} imports {other}"
        for module, other in pairs
        if room(module) != room(other) and floors[room(module)] <= floors[room(other)]
    ]


def circles(graph):
    """Modules that reach themselves."""

    def reached(module):
        found, left = set(), [module]
        while left:
            new = graph[left.pop()] - found
            found |= new
            left += new
        return found

    return [module for module in graph if module in reached(module)]

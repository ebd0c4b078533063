"""bilevax: hypergradients and bilevel optimization as small pure functions for JAX.

    bx.hypergradient, bx.differentiable    ∂(validation loss)/∂(hyperparameters), as an estimator or inside a loss
    bx.inner, bx.ihvp, bx.curvature        how the inner problem is solved and differentiated
    bx.algorithms, bx.decentralized        whole methods, on one machine and over a graph of agents
    bx.single_loop, bx.agents              the parts of which the single-loop and decentralized methods are made
    bx.parallel, bx.checkpoint             many devices and hosts; runs that are resumed after a kill
    bx.testing                             contracts for methods of your own

A namespace is imported when it is first read.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bilevax import (
        agents,
        algorithms,
        checkpoint,
        curvature,
        decentralized,
        hypergradients,
        ihvp,
        inner,
        parallel,
        problem,
        sampling,
        single_loop,
        testing,
        typing,
    )
    from bilevax.agents import gossip, partition, replicate, topology
    from bilevax.hypergradients import check_hypergradient, differentiable, hypergradient, penalty, two_phase
    from bilevax.problem import Batch, BilevelProblem
    from bilevax.single_loop import Levels, coins

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "BilevelProblem",
    "Levels",
    "agents",
    "algorithms",
    "check_hypergradient",
    "checkpoint",
    "coins",
    "curvature",
    "decentralized",
    "differentiable",
    "gossip",
    "hypergradient",
    "hypergradients",
    "ihvp",
    "inner",
    "parallel",
    "partition",
    "penalty",
    "problem",
    "replicate",
    "sampling",
    "single_loop",
    "testing",
    "topology",
    "two_phase",
    "typing",
]

_HOMES = {
    "agents": ("gossip", "partition", "replicate", "topology"),
    "hypergradients": ("check_hypergradient", "differentiable", "hypergradient", "penalty", "two_phase"),
    "problem": ("Batch", "BilevelProblem"),
    "single_loop": ("Levels", "coins"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # which would let any name pass

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_hint(name)}")
        if name in _HOME:
            value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        else:
            value = importlib.import_module(f"{__name__}.{name}")
        globals()[name] = value
        return value


def _hint(name: str) -> str:
    """What may have been meant; searches, and thus imports, all namespaces, unless Python asks for a file of ours."""
    import difflib
    import importlib.util
    import inspect

    if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}"):
        return ""
    places: dict[str, list[str]] = {}
    left, seen = [("bx", sys.modules[__name__])], set[int]()
    for path, module in left:  # which grows, so that the shortest paths come first
        for one in getattr(module, "__all__", ()):
            value = getattr(module, one)
            if id(value) not in seen:
                seen.add(id(value))
                places.setdefault(one, []).append(f"{path}.{one}")
                if inspect.ismodule(value):
                    left.append((f"{path}.{one}", value))
    near = [name] if name in places else difflib.get_close_matches(name, places)
    found = [place for one in near for place in places[one]][:3]
    return f"; did you mean {' or '.join(found)}?" if found else f"; it has {', '.join(__all__)}."


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

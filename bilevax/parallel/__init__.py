"""The same methods on many devices and many hosts."""

from bilevax.parallel._initialize import initialize
from bilevax.parallel.agents import join, place, pmap_agents, shard_agents, split
from bilevax.parallel.directions import pmap_directions, shard_directions

__all__ = [
    "initialize",
    "join",
    "place",
    "pmap_agents",
    "pmap_directions",
    "shard_agents",
    "shard_directions",
    "split",
]


def __dir__() -> list[str]:
    return __all__

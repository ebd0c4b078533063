"""Who talks to whom, what travels, and what it costs: graphs, gossip, compression, and how data are dealt out."""

from bilevax.agents import compression, partition, topology
from bilevax.agents._consensus_error import consensus_error
from bilevax.agents._gossip import Gossip, gossip, message_bytes, per_agent, push_sum, replicate
from bilevax.agents._mix_factors import mix_factors

__all__ = [
    "Gossip",
    "compression",
    "consensus_error",
    "gossip",
    "message_bytes",
    "mix_factors",
    "partition",
    "per_agent",
    "push_sum",
    "replicate",
    "topology",
]


def __dir__() -> list[str]:
    return __all__

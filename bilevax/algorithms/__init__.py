"""Single-machine bilevel algorithms: the engine of `bx.decentralized` with one agent."""

from bilevax.algorithms.one_agent import one_agent
from bilevax.algorithms.saba import saba
from bilevax.algorithms.soba import soba
from bilevax.algorithms.sustain import sustain

__all__ = ["one_agent", "saba", "soba", "sustain"]

"""Single-machine bilevel algorithms: the engine of `bx.decentralized` with one agent, and descent along hypergradients.

| method    | in each iteration                                             | estimate of ∇F                        |
|-----------|---------------------------------------------------------------|---------------------------------------|
| `soba`    | one step on x, y and v, on one sample                         | d_x at v                              |
| `saba`    | the same, with a table of past directions (SAGA)              | d_x at v                              |
| `sustain` | the same, with recursive momentum (STORM)                     | d_x at v                              |
| `srba`    | the same, with recursive differences (SARAH)                  | d_x at v                              |
| `fsla`    | y, then v, then x, which has momentum (STORM)                 | d_x at v                              |
| `mrbo`    | one step on x and y, with recursive momentum                  | Neumann series on one sample          |
| `vrbo`    | one step on x and several on y, with recursive differences    | Neumann series on one sample          |
| `amigo`   | several steps on y and on v, both warm, one on x              | d_x at v                              |
| `stocbio` | several steps on y, one on x                                  | Neumann series on several samples     |
| `bsa`     | more and more steps on y, one on x                            | one random term of the Neumann series |
| `ttsa`    | one step on y and on x, on two time scales                    | one random term of the Neumann series |
| `f2sa`    | several steps on y and y_λ, one on x                          | λ times a gap of first derivatives    |
| `pzobo`   | several steps on y, and again at x + μ u, one on x            | differences of solves                 |

`descent` makes such a method out of any hypergradient.
"""

from bilevax.algorithms._amigo import AMIGOState, amigo
from bilevax.algorithms._bsa import bsa, growing_steps
from bilevax.algorithms._descent import DescentInfo, DescentState, descent
from bilevax.algorithms._f2sa import f2sa
from bilevax.algorithms._fsla import fsla
from bilevax.algorithms._mrbo import mrbo
from bilevax.algorithms._one_agent import one_agent
from bilevax.algorithms._pzobo import pzobo
from bilevax.algorithms._saba import saba
from bilevax.algorithms._soba import soba
from bilevax.algorithms._srba import srba
from bilevax.algorithms._stocbio import stocbio
from bilevax.algorithms._sustain import sustain
from bilevax.algorithms._ttsa import ttsa
from bilevax.algorithms._vrbo import VRBOState, vrbo

__all__ = [
    "AMIGOState",
    "DescentInfo",
    "DescentState",
    "VRBOState",
    "amigo",
    "bsa",
    "descent",
    "f2sa",
    "fsla",
    "growing_steps",
    "mrbo",
    "one_agent",
    "pzobo",
    "saba",
    "soba",
    "srba",
    "stocbio",
    "sustain",
    "ttsa",
    "vrbo",
]


def __dir__() -> list[str]:
    return __all__

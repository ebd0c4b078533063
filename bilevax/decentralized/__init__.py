"""Decentralized bilevel optimization: agents are a leading array axis, gossip moves information between them.

Most methods are presets of the engine `bx.single_loop.single_loop`: local directions, an estimator, a correction for
each level and an order. Those with inner loops or matrices are built of the same parts.

| method                        | lower level | limit, exact derivatives   | numbers to a neighbour in an iteration |
|-------------------------------|-------------|----------------------------|----------------------------------------|
| `sldbo`, `s3ldbo`, `dsvrbgd`  | common      | x*                         | 2 (d_x + 2 d_y); half of it with ED    |
| `sparkle`                     | common      | x*                         | d_x + 2 d_y; with tracking twice that  |
| `dsoba`, `dsoba_first_order`  | common      | x* but for O(step)         | d_x + 2 d_y                            |
| `adasdbo`                     | common      | x*, slowly                 | d_x + 2 d_y + 3                        |
| `ma_dsbo`                     | common      | x* but for O(step)         | d_x + (T + 2 N) d_y                    |
| `ma_dsbo`, `track=True`       | common      | x*                         | 2 d_x + 2 (T + N) d_y                  |
| `mdbo`, `vrdbo`               | common      | x_l: own inverse Hessians  | 2 (d_x + d_y)                          |
| `gbdsbo`                      | common      | x*                         | 2 d_x + 3 d_y + d_x d_y + b d_y²       |
| `c2dfb`                       | common      | x_λ: x* but for O(1/λ)     | 2 d_x + 4 K compressed d_y             |
| `interact`, `diamond`         | personal    | x_p                        | 2 d_x                                  |
| `lopa_local`, `lopa_tracking` | personal    | x_p but for O(step); x_p   | d_x; 2 d_x                             |
ED: `bx.single_loop.correction.exact_diffusion()` or EXTRA in the place of gradient tracking, `correction=`.
"""

from bilevax.decentralized._adasdbo import AdaSDBOState, adasdbo
from bilevax.decentralized._c2dfb import C2DFBState, c2dfb
from bilevax.decentralized._diamond import diamond
from bilevax.decentralized._dsoba import dsoba
from bilevax.decentralized._dsoba_first_order import dsoba_first_order
from bilevax.decentralized._dsvrbgd import dsvrbgd
from bilevax.decentralized._gbdsbo import GBDSBOState, gbdsbo
from bilevax.decentralized._interact import interact, interact_svr
from bilevax.decentralized._lopa import lopa_local, lopa_tracking
from bilevax.decentralized._ma_dsbo import MADSBOState, ma_dsbo
from bilevax.decentralized._mdbo import mdbo
from bilevax.decentralized._s3ldbo import s3ldbo
from bilevax.decentralized._s3ldbo_unbiased import s3ldbo_unbiased
from bilevax.decentralized._sldbo import sldbo
from bilevax.decentralized._sparkle import sparkle
from bilevax.decentralized._vrdbo import vrdbo

__all__ = [
    "AdaSDBOState",
    "C2DFBState",
    "GBDSBOState",
    "MADSBOState",
    "adasdbo",
    "c2dfb",
    "diamond",
    "dsoba",
    "dsoba_first_order",
    "dsvrbgd",
    "gbdsbo",
    "interact",
    "interact_svr",
    "lopa_local",
    "lopa_tracking",
    "ma_dsbo",
    "mdbo",
    "s3ldbo",
    "s3ldbo_unbiased",
    "sldbo",
    "sparkle",
    "vrdbo",
]


def __dir__() -> list[str]:
    return __all__

"""Corrections for heterogeneity: how one level moves along local directions that differ from agent to agent.

For one variable s with local direction d, step a and mixing matrix W; the mean over the agents moves by
mean s⁺ = mean s − a · mean d in all of them.

| correction         | recursion                               | vectors | rounds | W                              |
|--------------------|-----------------------------------------|---------|--------|--------------------------------|
| `none`             | s⁺ = W (s − a d)                        | 1       | 1      | any; biased                    |
| `local`            | s⁺ = s − a d                            | 0       | 0      | not used; a level of one's own |
| `tracking`         | s⁺ = W (s − a t), t⁺ = W t + d⁺ − d     | 2       | 1      | any                            |
| `tracking_atc`     | s⁺ = W (s − a t), t⁺ = W (t + d⁺ − d)   | 2       | 2      | any                            |
| `tracking_non_atc` | s⁺ = W s − a t, t⁺ = W t + d⁺ − d       | 2       | 1      | any                            |
| `exact_diffusion`  | s⁺⁺ = W (2 s⁺ − s − a (d⁺ − d))         | 1       | 1      | symmetric, fixed, λ_min > −1/3 |
| `extra`            | s⁺⁺ = W (2 s⁺ − s) − a (d⁺ − d)         | 1       | 1      | symmetric, fixed, λ_min > −1/3 |

On a curvature L and an eigenvalue λ of W they are stable if

    none               |λ (1 − a L)| < 1
    tracking           a L λ < (1 + λ)²/2 for λ > 0,  a L < (1 − λ²)/|λ| for λ < 0
    tracking_atc       a L < (1 + λ)²/(2 λ²)
    tracking_non_atc   a L < (1 + λ)²/2
    exact_diffusion    2 a L λ < 1 + 3 λ for λ > 0,  a L < 1 + 1/|λ| for λ < 0
    extra              2 a L < 1 + 3 λ

`correction.largest_step(eigenvalues)` is the least of these bounds of a L over the eigenvalues of a W, with the damping
where there is some. They are of a symmetric fixed W, and of agents with one curvature.
"""

from bilevax.single_loop.correction._none import local, none
from bilevax.single_loop.correction._tracking import tracking, tracking_atc, tracking_non_atc
from bilevax.single_loop.correction.correction_type import Correction, CorrectionState, Move, Sent
from bilevax.single_loop.correction.primal_dual import exact_diffusion, extra

__all__ = [
    "Correction",
    "CorrectionState",
    "Move",
    "Sent",
    "exact_diffusion",
    "extra",
    "local",
    "none",
    "tracking",
    "tracking_atc",
    "tracking_non_atc",
]


def __dir__() -> list[str]:
    return __all__

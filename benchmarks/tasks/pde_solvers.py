"""Two equations on a periodic interval, solved by spectral methods in JAX, and again by SciPy.

    Burgers       u_t = ν u_xx − u u_x            u(0, s) = −sin πs            ν = 0.04 / π
    Allen–Cahn    u_t = ν u_xx + 5 (u − u³)       u(0, s) = s² cos πs          ν = 0.001

for s in [−1, 1) and t in [0, 1]. In Fourier modes û they are û_t = −ν k² û + N(û). The JAX solver takes the linear part
out by the integrating factor exp(ν k² t) and makes Runge–Kutta steps of order four; the SciPy solver is an explicit
Runge–Kutta method of order eight with step sizes of its own choice. Both drop the upper third of the modes of N, and
share the error of the grid, which is 0.002 at the front of Burgers' equation.

Reference: Trefethen, "Spectral Methods in MATLAB", SIAM 2000, program 27.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

from bilevax.typing import Array, Scalar

STEPS = 400
TOLERANCE = 1e-8  # relative error of a step of the SciPy solver; its absolute one is 1e-2 of that


class Equation(NamedTuple):
    """An equation û_t = −ν k² û + N(û) with a first field.

    Attributes:
      points: of the grid, even.
      viscosity: the ν that is looked for.
      first: `first(s) -> u(0, s)`, at the points s of the grid.
      nonlinear: `nonlinear(u, wave, numpy) -> N̂` of a field [points]; `numpy` is the module that computes.
    """

    points: int
    viscosity: float
    first: Callable[[np.ndarray], np.ndarray]
    nonlinear: Callable[[Any, np.ndarray, ModuleType], Any]

    @property
    def grid(self) -> np.ndarray:
        """The points s, [points]."""
        return np.arange(self.points) * 2 / self.points - 1

    @property
    def wave(self) -> np.ndarray:
        """The wave numbers k of the modes, [points / 2 + 1]."""
        return np.pi * np.arange(self.points // 2 + 1)


def _advection(u: Any, wave: np.ndarray, numpy: ModuleType) -> Any:
    return -0.5j * wave * numpy.fft.rfft(u**2)


def _reaction(u: Any, wave: np.ndarray, numpy: ModuleType) -> Any:
    return 5 * numpy.fft.rfft(u - u**3)


EQUATIONS = {
    "burgers": Equation(128, 0.04 / np.pi, lambda s: -np.sin(np.pi * s), _advection),
    "allen-cahn": Equation(256, 1e-3, lambda s: s**2 * np.cos(np.pi * s), _reaction),
}


def _kept(equation: Equation) -> np.ndarray:
    return np.arange(len(equation.wave)) <= equation.points // 3


def _loop(step: Callable, x: Any, modes: Array, steps: int) -> Array:
    return jax.lax.scan(lambda modes, _: (step(x, modes), None), modes, length=steps)[0]


def runge_kutta(equation: Equation, size: float, viscosity: Scalar, modes: Array) -> Array:
    """One step of this size of the modes [points / 2 + 1], with the integrating factor."""
    wave, kept = equation.wave, _kept(equation)
    half = jnp.exp(-viscosity * wave**2 * size / 2)

    def slope(modes: Array) -> Array:
        return size * kept * equation.nonlinear(jnp.fft.irfft(modes, equation.points), wave, jnp)

    first = slope(modes)
    second = slope(half * (modes + first / 2))
    third = slope(half * modes + second / 2)
    last = slope(half**2 * modes + half * third)
    return half**2 * (modes + first / 6) + half * (second + third) / 3 + last / 6


def advance(
    equation: Equation,
    viscosity: Scalar,
    field: Array,
    times: int,
    steps: int = STEPS,
    loop: Callable = _loop,
) -> Array:
    """The field [points] after a time of 1/(n + 1); arguments as `solve` has them."""
    each = -(-steps // (times + 1))

    def step(viscosity: Scalar, modes: Array) -> Array:
        return runge_kutta(equation, 1 / (times + 1) / each, viscosity, modes)

    return jnp.fft.irfft(loop(step, viscosity, jnp.fft.rfft(field), each), equation.points)


def solve(equation: Equation, viscosity: Scalar, field: Array, times: int, **options: Any) -> Array:
    """Solves in JAX, by steps of one size.

    Args:
      equation: which.
      viscosity: ν > 0.
      field: u(0, ·) on the grid, [points].
      times: n, at which the solution is kept: 1/(n + 1), ..., n/(n + 1).
      **options: `steps`, as many as lead to t = 1, rounded up to a multiple of n + 1; `loop(step, x, z, steps) -> z_T`
        for `step(x, z) -> z`, which says what a reverse pass stores.

    Returns:
      u at the times, [times, points].
    """

    def interval(field: Array, _: None) -> tuple[Array, Array]:
        field = advance(equation, viscosity, field, times, **options)
        return field, field

    return jax.lax.scan(interval, field, length=times)[1]


def solve_by_scipy(equation: Equation, viscosity: float, field: np.ndarray, times: int) -> np.ndarray:
    """Solves the same modes in SciPy, by steps of its own choice; arguments and result as `solve` has them.

    Raises:
      ArithmeticError: if SciPy gives up.
    """
    wave, kept = equation.wave, _kept(equation)
    decay = viscosity * wave**2

    def slope(time: float, field: np.ndarray) -> np.ndarray:
        modes = np.fft.rfft(field)
        return np.fft.irfft(kept * equation.nonlinear(field, wave, np) - decay * modes, equation.points)

    at = np.arange(1, times + 1) / (times + 1)
    found = solve_ivp(slope, (0, at[-1]), field, "DOP853", at, rtol=TOLERANCE, atol=TOLERANCE / 100)
    if not found.success:
        raise ArithmeticError(f"SciPy found no solution for viscosity {viscosity:g}: {found.message}")
    return found.y.T

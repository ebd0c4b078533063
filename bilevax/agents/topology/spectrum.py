"""Spectra of the mixing matrix, on demand."""

from functools import reduce

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import ArpackNoConvergence, eigs, eigsh

from bilevax.agents.topology.graph import Topologies, is_circulant, period, symmetric

DENSE = 2000  # agents up to which a spectrum is taken of a dense matrix


def eigenvalues(topology: Topologies) -> np.ndarray:
    """All eigenvalues of W (of a sequence: of the product of one period), by falling real part; the first is 1.

    Args:
      topology: a `Topology`, or a sequence of them.

    Returns:
      [n], float64 where they are real and complex128 otherwise.

    Raises:
      ValueError: if n > 2000 and some W is not circulant: see `spectral_gap` and `smallest_eigenvalue` for the ends.

    Cost: O(n log n) by FFT for circulant graphs (ring, complete, both exponential ones), O(n³) otherwise.

    Example:
        >>> import bilevax as bx
        >>> bx.topology.eigenvalues(bx.topology.ring(4)).round(3)
        array([ 1.   ,  0.333,  0.333, -0.333])
    """
    values = _fourier(topology)
    if values is None:
        product = _product(topology)
        if product.shape[0] > DENSE:
            raise ValueError(
                f"topology must be circulant or have at most {DENSE} agents for all of its eigenvalues; got "
                f"n={product.shape[0]}. Take bx.topology.spectral_gap and bx.topology.smallest_eigenvalue."
            )
        solve = np.linalg.eigvalsh if symmetric(product) else np.linalg.eigvals
        values = solve(product.toarray())
    return np.real_if_close(values[np.argsort(-values.real, kind="stable")])


def spectral_gap(topology: Topologies) -> float:
    """The spectral gap 1 − σ, where σ = ‖W − 11ᵀ/n‖₂.

    For a sequence of T graphs σ = ‖W_{T−1} ⋯ W_0 − 11ᵀ/n‖₂, that of one period. The disagreement shrinks
    by σ in each round (period), and methods slow down where the gap is small.

    Args:
      topology: a doubly stochastic `Topology`, or a sequence of them.

    Returns:
      The gap in [0, 1]; 1 means that one round (period) gives the exact mean.

    Raises:
      ValueError: if topology is directed: then the second largest modulus of its `eigenvalues` is what counts.

    Cost: O(n log n) by FFT for circulant graphs; O(n³) for n <= 2000; Lanczos steps or a sparse factorization above.

    Example:
        >>> import bilevax as bx
        >>> round(bx.topology.spectral_gap(bx.topology.ring(8)), 4)
        0.1953
    """
    if any(one.directed for one in period(topology).values()):
        raise ValueError(
            "topology must be doubly stochastic to have a spectral gap; got a directed one. Take the second largest "
            "modulus of bx.topology.eigenvalues(topology), the rate of push-sum."
        )
    values = _fourier(topology)
    if values is not None:
        return float(1 - np.abs(values[1:]).max(initial=0.0))
    product = _product(topology)
    n = product.shape[0]
    if n <= DENSE:
        return float(1 - np.linalg.norm(product.toarray() - 1 / n, 2))
    if symmetric(product):
        return float(1 - max(abs(_second(product)), abs(_smallest(product))))
    return float(1 - np.sqrt(max(0.0, _second(product.T @ product))))


def smallest_eigenvalue(topology: Topologies) -> float:
    """Returns λ_min, the smallest real part of the eigenvalues of W (of a sequence: of the product of one period).

    Exact diffusion and EXTRA need W symmetric with λ_min > −1/3; tracking without a leading W bounds its step size by
    (1 + λ_min)²/2. The remedy for both is `lazy`.

    Args:
      topology: a `Topology`, or a sequence of them.

    Returns:
      λ_min.

    Raises:
      ValueError: if topology is neither.

    Cost: as `spectral_gap`.

    Example:
        >>> import bilevax as bx
        >>> round(bx.topology.smallest_eigenvalue(bx.topology.torus(16)), 6)
        -0.6
    """
    if is_circulant(topology) or _product(topology).shape[0] <= DENSE:
        return float(eigenvalues(topology)[-1].real)
    product = _product(topology)
    if symmetric(product):
        return _smallest(product)
    return float(eigs(product, k=1, which="SR", v0=_start(product), return_eigenvectors=False)[0].real)


def _fourier(topology: Topologies) -> np.ndarray | None:
    """The eigenvalues of a circulant W (of a sequence: of the product) by frequency; None where one is not circulant.

    λ_k = Σ_h w_h exp(2πi k h / n): an inverse FFT of one row.
    """
    if not is_circulant(topology):
        return None
    rows = [one.matrix[[0]].toarray()[0] for one in period(topology).values()]
    return np.prod([np.fft.ifft(row, norm="forward") for row in rows], axis=0)


def _product(topology: Topologies) -> sparse.csr_array:
    """W_{T−1} ⋯ W_0, the last round leftmost."""
    return reduce(lambda past, matrix: matrix @ past, [one.matrix for one in period(topology).values()])


def _start(matrix: sparse.csr_array) -> np.ndarray:
    """A fixed start of the Lanczos iterations, so that results repeat."""
    return np.random.default_rng(0).standard_normal(matrix.shape[0])


def _second(matrix: sparse.csr_array) -> float:
    """The second largest eigenvalue of a symmetric matrix whose largest is 1."""
    return float(_extreme(matrix, 2, "LA", 1 + 1e-9).min())


def _smallest(matrix: sparse.csr_array) -> float:
    """The smallest eigenvalue of a symmetric stochastic matrix."""
    return float(_extreme(matrix, 1, "SA", -1 - 1e-9)[0])


def _extreme(matrix: sparse.csr_array, k: int, which: str, shift: float) -> np.ndarray:
    """The Lanczos method is fast on expanders; thin graphs, where it is not, have a thin factorization instead."""
    try:
        return eigsh(matrix, k, which=which, v0=_start(matrix), maxiter=50, tol=1e-12, return_eigenvectors=False)
    except ArpackNoConvergence:
        return eigsh(matrix.tocsc(), k, sigma=shift, v0=_start(matrix), tol=1e-9, return_eigenvectors=False)

"""What the papers claim of the decentralized methods, and how each claim is measured."""

from collections.abc import Callable

from benchmarks.decentralized.claims.claim import Claim
from benchmarks.decentralized.claims.communication import communication
from benchmarks.decentralized.claims.curvature import curvature
from benchmarks.decentralized.claims.factors import factors
from benchmarks.decentralized.claims.frontier import diffusion, frontier
from benchmarks.decentralized.claims.noise import speed_up
from benchmarks.decentralized.claims.refresh import compression, refresh, worst
from benchmarks.decentralized.claims.snapshots import snapshots
from benchmarks.decentralized.claims.sparkle import corrections, levels
from benchmarks.decentralized.claims.step_sizes import step_sizes
from benchmarks.decentralized.records import Results

CLAIMS: tuple[Callable[[Results], Claim], ...] = (
    snapshots,
    communication,
    corrections,
    levels,
    speed_up,
    compression,
    refresh,
    curvature,
    diffusion,
    frontier,
    factors,
    step_sizes,
    worst,
)  # another claim is another function

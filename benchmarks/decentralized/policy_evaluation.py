"""Policy evaluation over a graph: agents who see different rewards find one linear value function for all of them.

    min_x  mean_i f_i(x, y*(x)),            f_i(x, y) = 1/(2S) Σ_s (φ_sᵀ x − y_s)²
    y*(x) = argmin_y mean_i g_i(x, y),      g_i(x, y) = 1/(2S) Σ_s w_is (y_s − Σ_s' P_ss' (r_i(s, s') + γ φ_s'ᵀ x))²

φ_sᵀ x is the value of state s, y_s what its reward and its successors say of it, w_is how often agent i visits s. The
solution is known: y*(x) = r + γ P Φ x with r_s = Σ_s' P_ss' mean_i w_is r_i(s, s'), and x* = argmin ‖Φ x − y*(x)‖².

The experiment is one of SPARKLE (arXiv 2411.14166) in kind; losses, sizes and draws here were written down without that
paper's appendix, and no figure is to be compared with its own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import bilevax as bx
from benchmarks.decentralized.choices import Agents, changed
from benchmarks.decentralized.comparison import compare, defaults
from benchmarks.decentralized.figure import Panel
from benchmarks.decentralized.job import Job
from benchmarks.decentralized.markov import Chain, Transitions, draw, evaluation, successors
from benchmarks.decentralized.network import Network
from benchmarks.decentralized.rows import names
from benchmarks.harness.report import Columns
from benchmarks.harness.runner import Options

TASK = "decentralized_policy_evaluation"
DISCOUNT = 0.9
ITERATIONS, QUICK_ITERATIONS = 1000, 200
OUTER_GRID, INNER_GRID = (0.3, 1.0, 3.0), (0.03, 0.1, 0.3, 0.9)  # the latter times S, as ∇²_yy g is I / S
COLUMNS: Columns = {
    "distance": ("|x − x*|\n/ |x*|", "{:.1e}".format),
    "value_error": ("value\nerror", "{:.4f}".format),
}
CAPTION = """\
F(x): half the mean squared Bellman error; |x − x*|: to the known solution; value error: of Φ x against the true values,
relative to their norm, {least:.4f} at x* (seed {seed}). A minibatch is {size} of
the {states} possible successors of each state, and all of f.
"""
METHODS = (
    *("sldbo", "s3ldbo-0.5", "s3ldbo-0.2", "s3ldbo-0.1", "dsvrbgd", "sparkle-ed", "sparkle-gt", "sparkle-mixed"),
    *("d-soba", "ma-dsbo", "mdbo", "c2dfb"),
)
DEFAULTS = defaults(METHODS)
problem = functools.cache(evaluation)


def relative(error: np.ndarray, of: np.ndarray) -> float:
    """‖error‖ / ‖of‖."""
    return float(np.linalg.norm(error) / np.linalg.norm(of))


def scores(chain: Chain) -> Callable[[Any, Any], dict[str, float]]:
    """How far x is from the known solution, and Φ x from the true values."""
    solution, values = chain.solution, chain.values

    def numbers(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
        return {
            "distance": relative(x - solution, solution),
            "value_error": relative(chain.features @ x - values, values),
        }

    return numbers


def bound(data: Transitions) -> jax.Array:
    """∇²_yy g_i is diagonal, whatever successors are drawn."""
    return jnp.max(data.weights) / len(data.table)


def network(chain: Chain, size: int) -> Network:
    """All agents start at x = 0 and y = 0; a minibatch has so many successors of each state, and all of f_i."""
    states, features = chain.features.shape
    return Network(
        problem=problem(chain.discount),
        batch=chain.batch,
        x=jnp.zeros(features),
        y=jnp.zeros(states),
        sample=successors,
        sizes=bx.Batch(outer=size, inner=states),
        bound=bound,
        scores=scores(chain),
    )


@dataclasses.dataclass(frozen=True)
class Evaluators(Agents):
    """The agents of this task."""

    agents: int = 10
    """Number of agents."""
    batch_size: int = 4
    """Successors of each state in a minibatch, for the methods that draw some."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Policy evaluation over a graph of agents, by decentralized methods.

    A random Markov chain, the same for all agents; each agent sees rewards of its own.
    """

    states: int = 100
    """Number of states."""
    features: int = 10
    """Numbers in x: features of a state, the first of which is 1."""
    heterogeneity: float = 1.0
    """Standard deviation of an agent's rewards around the mean ones, which are uniform in [0, 1]."""
    uneven: float | None = None
    """Divide the visits to each state over the agents by a Dirichlet distribution with this parameter, so that their
    Hessians differ too. Without it all agents visit all states alike, and every Hessian is the identity."""
    network: tyro.conf.OmitArgPrefixes[Evaluators] = Evaluators()
    """The agents."""
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS
    """Options of every task."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        self.common.check_methods(names())
        if self.features < 1:
            raise ValueError(f"features must be an int >= 1; got {self.features}. Pass, say, --features 10.")
        if self.states <= self.features:
            raise ValueError(
                f"states must be more than features; got {self.states} states and {self.features} features. Pass, say, "
                f"--states {10 * self.features}."
            )
        if not self.heterogeneity >= 0:
            raise ValueError(
                f"heterogeneity must be a number >= 0; got {self.heterogeneity:g}. Pass, say, --heterogeneity 1."
            )
        if self.uneven is not None and not self.uneven > 0:
            raise ValueError(f"uneven must be a number > 0; got {self.uneven:g}. Pass, say, --uneven 1, or nothing.")

    @functools.cache  # noqa: B019
    def load(self, seed: int) -> Chain:
        """The chain of a seed."""
        agents = self.network.agents
        return draw(seed, agents, self.states, self.features, DISCOUNT, self.heterogeneity, self.uneven)

    def run(self) -> int:
        """Runs everything, prints the table and writes the files; returns the exit code."""
        chosen = {name: getattr(self, name) for name in ("states", "features", "heterogeneity", "uneven")}
        first = self.common.seed
        chain = self.load(first)
        least = relative(chain.features @ chain.solution - chain.values, chain.values)
        usual = QUICK_ITERATIONS if self.common.quick else ITERATIONS
        job = Job(
            name=TASK,
            title=f"Policy evaluation, {self.states} states, {self.features} features",
            folder=TASK + changed(self),
            load=functools.cache(lambda seed: network(self.load(seed), self.network.batch_size)),
            iterations=self.common.outer_steps or usual,
            outer_grid=OUTER_GRID,
            inner_grid=[self.states * step for step in INNER_GRID],
            columns=COLUMNS,
            panel=Panel("distance", "|x − x*| / |x*|", "log"),
            configuration={**chosen, "discount": DISCOUNT},
            caption=CAPTION.format(least=least, seed=first, size=self.network.batch_size, states=self.states),
        )
        return compare(job, self)

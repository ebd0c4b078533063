"""Learnt penalties over a graph: one for each feature of a logistic regression, without sharing rows.

    min_x  mean_i f_i(y*(x)),                  f_i(y) = mean_j w_ij ψ(b aᵀy) over the validation rows of agent i
    y*(x) = argmin_y mean_i g_i(x, y),      g_i(x, y) = mean_j w_ij ψ(b aᵀy) + ½ yᵀ diag(exp x) y over its training rows

with ψ(t) = log(1 + exp(−t)). mnist: softmax regression, g_i = mean_j w_ij CE_ij(y) + (1 / c p) Σ_kj exp(x_j) y_kj², for
c = 10 classes and p = 784 pixels. With w_ij = n L / N (0 for padding) the means are the losses on the undivided data.

exp(x) stands for a function that bends to a largest penalty, which adds 1 to the curvature: without a bound, penalties
of features without use grow until no step size holds.

Synthetic: agent i has features of variance (i r)², r the heterogeneity, and labels sign(aᵀy + noise) of one y.
"""

import dataclasses
import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import bilevax as bx
from benchmarks.decentralized.choices import PARTITIONS, Agents, changed, parsed
from benchmarks.decentralized.comparison import compare, defaults
from benchmarks.decentralized.figure import GRADIENT
from benchmarks.decentralized.job import Job
from benchmarks.decentralized.network import Network, by_weight, penalized, second_moment
from benchmarks.decentralized.penalties import (
    CLASSES,
    LARGEST,
    Divided,
    decay,
    logistic,
    logistic_fit,
    penalty,
    real,
    softmax,
    softmax_fit,
    synthetic,
)
from benchmarks.decentralized.rows import names
from benchmarks.harness.report import Columns
from benchmarks.harness.runner import Options

TASK = "decentralized_regularization"
INNER_GRID = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # over the curvature L of the mean g; the last diverge
QUICK_ITERATIONS = 200
COLUMNS: Columns = {"test_accuracy": ("test\nacc.", "{:.3f}".format)}
CAPTION = """\
F(x): mean loss on the validation rows, of {features} features; penalties bend to a largest one that adds 1 to the
curvature. Step sizes of y and v: {grid} over L = {curvature:.3g}.
"""
METHODS = (
    *("sldbo", "s3ldbo-0.5", "s3ldbo-0.2", "dsvrbgd", "sparkle-ed", "sparkle-gt", "sparkle-mixed", "d-soba"),
    *("adasdbo", "ma-dsbo", "mdbo", "c2dfb", "sldbo-top0.1"),
)
DEFAULTS = defaults(METHODS)
KNOWN = penalized(decay)
LOGISTIC, SOFTMAX = logistic_fit(), softmax_fit()


class PenaltySetting(NamedTuple):
    """What suits a data set.

    Attributes:
      rows: to train on, of all agents together; half as many to validate on.
      quick_rows: of each agent, in the quick setting.
      iterations: of SLDBO.
      outer_grid: step sizes of x.
      start: first x.
      partition: where none is chosen.
    """

    rows: int
    quick_rows: int
    iterations: int
    outer_grid: tuple[float, ...]
    start: float
    partition: str = "dirichlet:0.1"


BINARY_GRID = (10.0, 40.0, 160.0, 640.0, 2560.0)
SETTINGS = {
    "synthetic": PenaltySetting(1600, 125, 1000, (8.0, 32.0, 128.0, 512.0, 2048.0), -2.0),
    "mnist": PenaltySetting(2000, 50, 400, (2.5, 10.0, 40.0, 160.0), 5.0),
    "a9a": PenaltySetting(8000, 125, 600, BINARY_GRID, -2.0),
    "ijcnn1": PenaltySetting(8000, 125, 1000, BINARY_GRID, -2.0),
    "w8a": PenaltySetting(8000, 125, 600, BINARY_GRID, -2.0, partition="dirichlet:1"),  # few rows are positive
}
SYNTHETIC_FEATURES = 40


def bend(labels: np.ndarray) -> float:
    """The bound of the second derivative of a softmax, where labels are classes, or of ψ."""
    return 0.5 if np.issubdtype(labels.dtype, np.integer) else 0.25


def curvature(data: Divided) -> float:
    """L of the mean inner loss for any x."""
    features, labels = data.train
    return bend(labels) * float(second_moment(jnp.asarray(features), jnp.ones(len(labels)))) + LARGEST


def bound(data: tuple) -> jax.Array:
    """L of the inner loss on these rows for any x."""
    features, labels, weights = data
    return bend(labels) * second_moment(features, weights) + LARGEST


def network(data: Divided, start: float) -> Network:
    """All penalties are the same, and y = 0, at every agent."""
    features, labels, n = data.train.features.shape[1], data.test.labels, len(data.batch.inner[1])
    classes = np.issubdtype(labels.dtype, np.integer)

    def scores(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
        given = data.test.features @ y
        hits = (np.argmax(given, axis=1) if classes else np.sign(given)) == labels
        return {"test_accuracy": float(hits.mean()) if np.isfinite(y).all() else math.nan}

    means, y = np.mean(data.train.features**2, axis=0), jnp.zeros((features, CLASSES) if classes else features)

    def diagonal(x: jax.Array) -> jax.Array:
        parts, bend = (y.size, (1 - 1 / CLASSES) / CLASSES) if classes else (2, 0.25)  # bend: where all is undecided
        return jnp.broadcast_to((bend * means + penalty(x, parts)).reshape(features, *[1] * (y.ndim - 1)), y.shape)

    return Network(
        problem=softmax() if classes else logistic(),
        batch=data.batch,
        x=jnp.full(features, start),
        y=y,
        sample=by_weight,
        sizes=bx.Batch(outer=len(data.validation.labels) / n, inner=len(data.train.labels) / n),
        bound=bound,
        scores=scores,
        diagonal=diagonal,
        known=KNOWN,
        fit=SOFTMAX if classes else LOGISTIC,
        outer_fit=SOFTMAX if classes else LOGISTIC,  # the same on other rows
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """Regularization over a graph of agents, by decentralized methods: learn one penalty for each feature."""

    data: Literal["synthetic", "mnist", "a9a", "ijcnn1", "w8a"] = "synthetic"
    """Drawn for each agent, or a public data set; quick runs shrink the images of mnist to 14 × 14."""
    partition: str | None = None
    """How the rows of a public data set are divided, by their labels: dirichlet:ALPHA (drawn as in NIID-Bench, until
    every agent has 10 rows of each kind), dirichlet-plain:ALPHA, classes:NUMBER, shards:NUMBER, quantity:BETA, iid.
    By default dirichlet:0.1, and dirichlet:1 for w8a, few of whose rows are positive. Two kinds of
    labels among many agents need an ALPHA of 1 or so."""
    heterogeneity: float = 0.2
    """r of synthetic data: agent i = 1, 2, ... has features of variance (i · r)²."""
    rows: int | None = None
    """Rows to train on, of all agents together; half as many to validate on. By default as many as suit the data."""
    network: tyro.conf.OmitArgPrefixes[Agents] = Agents()  # noqa: RUF009
    """The agents."""
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS
    """Options of every task."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        self.common.check_methods(names())
        parsed("partition", self.division, PARTITIONS)
        drawn = self.data == "synthetic"
        if drawn and self.partition is not None:
            raise ValueError(
                f"partition is about public data sets; got {self.partition} with data=synthetic, where each agent has "
                f"rows of its own. Drop --partition, or pass, say, --data a9a."
            )
        if not drawn and self.heterogeneity != type(self).heterogeneity:
            raise ValueError(
                f"heterogeneity is about synthetic data; got {self.heterogeneity:g} with data={self.data}. Pass "
                f"--partition instead."
            )
        if not self.heterogeneity > 0:
            raise ValueError(
                f"heterogeneity must be a number > 0; got {self.heterogeneity:g}. Pass, say, --heterogeneity 0.2."
            )
        if self.rows is not None and self.rows < (least := 20 * self.network.agents):
            raise ValueError(f"rows must be an int >= 20 for each agent; got {self.rows}. Pass, say, --rows {least}.")

    @property
    def division(self) -> str:
        """The partition, chosen or not."""
        return self.partition or SETTINGS[self.data].partition

    @functools.cache  # noqa: B019
    def load(self, seed: int) -> Divided:
        """The data of a seed, divided."""
        n, setting = self.network.agents, SETTINGS[self.data]
        rows = self.rows or (min(setting.rows, setting.quick_rows * n) if self.common.quick else setting.rows)
        if self.data == "synthetic":
            return synthetic(n, seed, SYNTHETIC_FEATURES, rows, self.heterogeneity)
        partition = parsed("partition", self.division, PARTITIONS)(n, seed)
        return real(self.data, seed, rows, partition, times=2 if self.common.quick else 1)

    def run(self) -> int:
        """Runs everything, prints the table and writes the files; returns the exit code."""
        setting, data = SETTINGS[self.data], self.load(self.common.seed)
        level = curvature(data)
        how = f"r = {self.heterogeneity:g}" if self.data == "synthetic" else self.division
        job = Job(
            name=TASK,
            title=f"Penalties of {self.data}, {how}",
            folder=TASK + changed(self),
            load=functools.cache(lambda seed: network(self.load(seed), setting.start)),
            iterations=self.common.outer_steps or (QUICK_ITERATIONS if self.common.quick else setting.iterations),
            outer_grid=setting.outer_grid,
            inner_grid=[step / level for step in INNER_GRID],
            columns=COLUMNS,
            panel=GRADIENT,
            configuration={
                "data": self.data,
                "heterogeneity": self.heterogeneity if self.data == "synthetic" else None,
                "partition": None if self.data == "synthetic" else self.division,
                "features": data.train.features.shape[1],
                "train": len(data.train.labels),
                "validation": len(data.validation.labels),
                "start": setting.start,
                "curvature": level,
            },
            caption=CAPTION.format(
                features=data.train.features.shape[1],
                grid=", ".join(f"{step:g}" for step in INNER_GRID),
                curvature=level,
            ),
            gradients=self.data == "synthetic",
        )
        return compare(job, self)

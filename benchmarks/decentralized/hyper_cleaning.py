"""Data hyper-cleaning over a graph: the agents learn the weight of each training example without sharing their images.

    min_x  mean_i f_i(y*(x)),                  f_i(y) = mean_j w_ij CE_ij(y) over the validation images of agent i
    y*(x) = argmin_y mean_i g_i(x, y),      g_i(x, y) = mean_j w_ij sigmoid(x_e) CE_ij(y) + l2 / 2 · ‖y‖²,  e = id(i, j)

x has an entry for each training image of ALL agents. Every agent holds all of x; its own loss reads its own entries.
With w_ij = n L / N (0 for padding) the means are the losses on the undivided data, however it is divided.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from sklearn.metrics import roc_auc_score

import bilevax as bx
from benchmarks.data.images import IMAGES, ImageName, load
from benchmarks.decentralized.choices import PARTITIONS, Agents, changed, parsed
from benchmarks.decentralized.cleaning import Divided, cleaning, decay, divide, fit, outer_fit
from benchmarks.decentralized.comparison import compare, defaults
from benchmarks.decentralized.figure import Panel
from benchmarks.decentralized.job import Job, Place
from benchmarks.decentralized.network import Network, by_weight, penalized, second_moment
from benchmarks.decentralized.placement import join_hosts, start_devices
from benchmarks.decentralized.rows import names
from benchmarks.harness.errors import DataError
from benchmarks.harness.report import Columns, Run
from benchmarks.harness.runner import Options
from benchmarks.harness.style import histogram

TASK = "decentralized_hyper_cleaning"
L2 = 2e-3
OUTER_GRID = (0.1, 0.4, 1.6, 6.4, 25.6)  # times N, since an entry of the outer gradient is of order 1/N


class NetworkSetting(NamedTuple):
    """What suits a data set.

    Attributes:
      times: how many times the sides of the images are shortened.
      train, validation: numbers of images of all agents together.
      iterations: of SLDBO.
      inner_grid: step sizes of y and v.
      outer_grid: step sizes of x, over the number of training images.
    """

    times: int
    train: int
    validation: int
    iterations: int
    inner_grid: tuple[float, ...]
    outer_grid: tuple[float, ...] = OUTER_GRID


LARGE_GRID, SHRUNK_GRID = (0.025, 0.05, 0.1, 0.2, 0.4), (0.1, 0.2, 0.4, 0.8, 1.6)
SMALL = NetworkSetting(1, 960, 320, 1500, (0.15, 0.3, 0.6, 1.2, 2.4))
LARGE = NetworkSetting(1, 2000, 500, 600, LARGE_GRID)
QUICK_ITERATIONS, SHRUNK_ITERATIONS = 200, 140
QUICK_TRAIN, QUICK_VALIDATION = 50, 25  # images of each agent, if they are shrunk
COLUMNS: Columns = {
    "test_accuracy": ("test\nacc.", "{:.3f}".format),
    "auc": ("weight\nAUC", "{:.3f}".format),
}
CAPTION = "F(x): on the validation images; weight AUC: of true against false labels.\n"
EXECUTION = ("devices", "placement", "distributed", "coordinator", "processes", "process")
METHODS = (
    *("sldbo", "s3ldbo-0.5", "s3ldbo-0.2", "s3ldbo-0.1", "dsvrbgd", "sparkle-ed", "sparkle-gt", "sparkle-mixed"),
    *("d-soba", "ma-dsbo", "mdbo", "c2dfb", "sldbo-top0.1"),
)
DEFAULTS = defaults(METHODS)
KNOWN = penalized(functools.partial(decay, L2))
FIT, OUTER_FIT = fit(), outer_fit()


def network(data: Divided) -> Network:
    """All weights are 1/2 (x = 0), and y = 0, at every agent."""
    images, labels = (np.asarray(part) for part in data.whole.test)
    clean, (n, _) = np.asarray(data.whole.clean), data.batch.inner[1].shape

    def scores(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            return {"test_accuracy": math.nan, "auc": math.nan}
        hits = np.argmax(images @ y, axis=1) == labels
        return {"test_accuracy": float(hits.mean()), "auc": float(roc_auc_score(clean, x))}

    return Network(
        problem=cleaning(L2),
        batch=data.batch,
        x=jnp.zeros(len(clean)),
        y=jnp.zeros((images.shape[1], 10)),
        sample=by_weight,
        sizes=bx.Batch(outer=len(data.whole.batch.outer[1]) / n, inner=len(clean) / n),
        bound=bound,
        scores=scores,
        known=KNOWN,
        fit=FIT,
        outer_fit=OUTER_FIT,
    )


def bound(data: tuple) -> jax.Array:
    """λ_max of the images' second moments, times ½, the bound of a softmax, plus l2."""
    images, _, _, weights = data
    return second_moment(images, weights) / 2 + L2


def finish(clean: Callable[[int], np.ndarray], figure: Any, runs: Sequence[Run]) -> None:
    """The learnt weights of the run with the lowest loss."""
    best = min(runs, key=lambda run: (run.seed, run.outcome.metrics["exact_loss"]))
    figure.suptitle(f"Learnt weights ({best.method}, seed {best.seed})")
    histogram(figure.subplots(), np.asarray(best.outcome.x), clean(best.seed))


@dataclasses.dataclass(frozen=True)
class Config:
    """Data hyper-cleaning over a graph of agents, by decentralized methods.

    Agents learn one weight for each training example of all of them, part of whose labels are redrawn at random.
    """

    data: ImageName = "digits"
    """Images: scikit-learn's embedded digits, or a public data set, whose images quick runs shrink, to 14 × 14."""
    partition: str = "dirichlet:0.1"
    """How images are divided: dirichlet:ALPHA (drawn as in NIID-Bench, until every agent has 10 images of each kind),
    dirichlet-plain:ALPHA (one draw, where an agent may be left without), classes:NUMBER, shards:NUMBER, quantity:BETA
    or iid."""
    corruption: float = 0.3
    """Share of the training labels that are redrawn uniformly; a tenth of those are right by luck."""
    devices: int = 1
    """Devices that the agents are divided over; on a CPU, as many virtual ones are made."""
    placement: Literal["shard_map", "pmap"] = "shard_map"
    """How, if there are several."""
    distributed: bool = False
    """Take all devices of all hosts. Start the same command on each of them; the first one reports."""
    coordinator: str | None = None
    """Address host:port of the first host, with `distributed` where JAX does not find the cluster by itself (it finds
    Slurm, Open MPI, Kubernetes and Cloud TPU)."""
    processes: int | None = None
    """Number of processes of all hosts, with `coordinator`."""
    process: int | None = None
    """Number of this process, from 0, with `coordinator`."""
    network: tyro.conf.OmitArgPrefixes[Agents] = Agents()  # noqa: RUF009
    """The agents."""
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS
    """Options of every task."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        self.common.check_methods(names())
        if self.devices < 1:
            raise ValueError(f"devices must be an int >= 1; got {self.devices}. Pass, say, --devices 8.")
        agents = self.network.agents
        if agents % self.devices:
            raise ValueError(
                f"devices must divide the number of agents; got {self.devices} for {agents} agents. Pass, say, "
                f"--devices {agents}."
            )
        cluster = [value is not None for value in (self.coordinator, self.processes, self.process)]
        if any(cluster) and not (self.distributed and all(cluster)):
            raise ValueError(
                "coordinator, processes and process go together, with distributed. Pass, say, --distributed "
                "--coordinator 10.0.0.1:1234 --processes 2 --process 0."
            )
        if self.distributed and (self.devices > 1 or self.placement != "shard_map"):
            raise ValueError(
                "distributed takes all devices of all hosts by shard_map; got devices or placement with it. Drop them."
            )
        if not 0 <= self.corruption <= 1:
            raise ValueError(f"corruption must be from 0 to 1; got {self.corruption:g}. Pass, say, --corruption 0.3.")
        parsed("partition", self.partition, PARTITIONS)

    @property
    def setting(self) -> NetworkSetting:
        """Sizes, iterations and grid; quick runs shrink images."""
        images, n = IMAGES[self.data], self.network.agents
        setting = SMALL if images.small else LARGE
        if self.common.quick and not images.small:
            setting = NetworkSetting(2, QUICK_TRAIN * n, QUICK_VALIDATION * n, SHRUNK_ITERATIONS, SHRUNK_GRID)
        elif self.common.quick:
            setting = setting._replace(iterations=QUICK_ITERATIONS, outer_grid=OUTER_GRID[1:-1])
        return setting._replace(iterations=self.common.outer_steps or setting.iterations)

    @functools.cache  # noqa: B019
    def load(self, seed: int) -> Divided:
        """The data of a seed, divided."""
        setting = self.setting
        sizes = {"train": setting.train, "validation": setting.validation, "times": setting.times}
        whole = load(self.data, seed, corruption=self.corruption, **sizes)
        return divide(whole, parsed("partition", self.partition, PARTITIONS)(self.network.agents, seed))

    def run(self) -> int:
        """Runs everything, prints the table and writes the files; returns the exit code."""
        if self.distributed:
            devices = join_hosts(self.coordinator, self.processes, self.process)
        else:
            devices = start_devices(self.devices)
        if self.network.agents % devices:
            raise DataError(
                f"--agents must be a multiple of the {devices} devices of all hosts; got {self.network.agents}."
            )
        setting = self.setting
        job = Job(
            name=TASK,
            title=f"Hyper-cleaning of {self.data}, {self.partition}",
            folder=TASK + changed(self, EXECUTION),
            load=functools.cache(lambda seed: network(self.load(seed))),
            iterations=setting.iterations,
            outer_grid=[setting.train * step for step in setting.outer_grid],
            inner_grid=setting.inner_grid,
            columns=COLUMNS,
            panel=Panel("test_accuracy", "test accuracy"),
            configuration={
                **{name: getattr(self, name) for name in ("data", "partition", "corruption")},
                "train": setting.train,
                "validation": setting.validation,
                "side": IMAGES[self.data].shape[0] // setting.times,
                "l2": L2,
            },
            caption=CAPTION,
            finish=functools.partial(finish, lambda seed: np.asarray(self.load(seed).whole.clean)),
        )
        where = Place(devices, self.placement, math.inf if self.distributed else None)
        return compare(job, self, where)

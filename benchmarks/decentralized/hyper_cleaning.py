"""Data hyper-cleaning over a graph: the agents learn the weight of each training example without sharing their images.

    min_x  mean_i f_i(y*(x)),                  f_i(y) = mean_j w_ij CE_ij(y) over the validation images of agent i
    y*(x) = argmin_y mean_i g_i(x, y),      g_i(x, y) = mean_j w_ij sigmoid(x_e) CE_ij(y) + l2 / 2 · ‖y‖²,  e = id(i, j)

x has an entry for each training image of ALL agents. Every agent holds all of x; its own loss reads its own entries.
With w_ij = n L / N (0 for padding) the means are the losses on the undivided data, however it is divided.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import bilevax as bx
from benchmarks import corrupted
from benchmarks.data import DataError
from benchmarks.decentralized.data import PARTITIONS, TOPOLOGIES, Divided, cleaning, divide, parsed
from benchmarks.decentralized.figure import draw
from benchmarks.decentralized.methods import Row, compiled, evaluate, rows, start, tuned
from benchmarks.decentralized.placement import join_hosts, place, start_devices
from benchmarks.loop import drive
from benchmarks.report import COSTS, Run
from benchmarks.runner import Advance, Options, Task, perform

TASK = "decentralized_hyper_cleaning"
L2 = 2e-3
OUTER_GRID = (0.3, 1.0, 3.0)  # times N, since an entry of the outer gradient is of order 1/N
LARGEST_CHUNK = 10


class Setting(NamedTuple):
    """What suits a data set.

    Attributes:
      train, validation: numbers of images of all agents together.
      iterations: of each run.
      inner_grid: step sizes of y and v.
    """

    train: int
    validation: int
    iterations: int
    inner_grid: tuple[float, ...]


SETTINGS = {
    "digits": Setting(960, 320, 1500, (0.3, 0.6, 1.2, 2.4)),
    "mnist": Setting(2000, 500, 600, (0.05, 0.1, 0.2, 0.4)),
    "fashion-mnist": Setting(2000, 500, 600, (0.05, 0.1, 0.2, 0.4)),
}
QUICK_ITERATIONS = 300

COLUMNS = {
    "test_accuracy": ("test\nacc.", "{:.3f}".format),
    "auc": ("weight\nAUC", "{:.3f}".format),
    "outer_loss": ("outer\nloss", "{:.3f}".format),
    "derivatives": ("deriv.\nevals", "{:,.0f}".format),
    "megabytes": ("sent\n(MB)", "{:,.1f}".format),
    "rounds": ("comm.\nrounds", "{:,.0f}".format),
    **{name: COSTS[name] for name in ("seconds", "compile_seconds")},
}
CAPTION = """\
All at the mean iterate. outer loss: on the validation images; weight AUC: of true against false labels; deriv. evals:
of one agent, where one is ∇f, ∇_y g, a Hessian and a cross product on all its images (a quarter each, and a minibatch
counts as its share); sent: by one agent to all its neighbours.
s3ldbo-p: {coins}; dsvrbgd: minibatches of {batch_size} images, all others exact derivatives; sparkle-ed: on (I + W)/2.
Steps: for each method the best of the same {pairs} pairs of step sizes, by the last outer loss of seed {seed}.
"""
COINS: Mapping[str, tuple[Callable, str]] = {
    "independent": (lambda p, block: bx.coins.independent(p), "each agent refreshes with probability p"),
    "subset": (bx.coins.subset, "⌈p·m⌉ of the m agents on each device refresh in each iteration"),
}


NAMES = tuple(row.name for row in rows(bx.coins.independent, 1))


def grid(setting: Setting) -> bx.Levels:
    """Every pair of an outer step and an inner one, which serves v too; leaves [pairs]."""
    x, y = (part.ravel() for part in np.meshgrid(setting.train * np.array(OUTER_GRID), setting.inner_grid))
    return bx.Levels(x, y, y)


DEFAULTS = Options(NAMES)


@dataclasses.dataclass(frozen=True)
class Config:
    """Data hyper-cleaning over a graph of agents, by decentralized single-loop methods.

    Agents learn one weight for each training example of all of them, part of whose labels are redrawn at random.
    """

    data: Literal["digits", "mnist", "fashion-mnist"] = "digits"
    """Images: scikit-learn's embedded digits, or a public data set."""
    agents: int = 8
    """Number of agents."""
    topology: str = "ring"
    """Graph: ring, path, star, complete, torus, grid, hypercube, erdos-renyi:PROBABILITY or regular:DEGREE."""
    partition: str = "dirichlet:0.1"
    """How images are divided: dirichlet:ALPHA (drawn as in NIID-Bench, until every agent has 10 images of each kind),
    dirichlet-plain:ALPHA (one draw, where an agent may be left without), classes:NUMBER, shards:NUMBER, quantity:BETA
    or iid."""
    corruption: float = 0.3
    """Share of the training labels that are redrawn uniformly; a tenth of those are right by luck."""
    coins: Literal["independent", "subset"] = "independent"
    """Of s3ldbo: each agent by itself with probability p, or ceil(p · m) of the m agents on each device."""
    batch_size: int = 32
    """Images of each kind in a minibatch of dsvrbgd."""
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
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS
    """Options of every task."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        self.common.check_methods(NAMES)
        for name in ("agents", "batch_size", "devices"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be an int >= 1; got {value}. Pass, say, --{name.replace('_', '-')} 8.")
        if self.agents % self.devices:
            raise ValueError(
                f"devices must divide the number of agents; got {self.devices} for {self.agents} agents. Pass, say, "
                f"--devices {self.agents}."
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
        bx.topology.check(self.graph)

    @property
    def graph(self) -> Any:
        """The graph of the agents."""
        return parsed("topology", self.topology, TOPOLOGIES)(self.agents, self.common.seed)

    @property
    def budget(self) -> float:
        """Seconds for each run; no end on several hosts, which would stop at different iterations."""
        return math.inf if self.distributed else self.common.budget

    @property
    def setting(self) -> Setting:
        """Sizes, iterations and grid."""
        setting = SETTINGS[self.data]
        usual = QUICK_ITERATIONS if self.common.quick else setting.iterations
        return setting._replace(iterations=self.common.outer_steps or usual)

    @functools.cache  # noqa: B019
    def load(self, seed: int) -> Divided:
        """The data of a seed, divided."""
        sizes = {"train": self.setting.train, "validation": self.setting.validation}
        whole = corrupted.load(self.data, seed, corruption=self.corruption, **sizes)
        return divide(whole, parsed("partition", self.partition, PARTITIONS)(self.agents, seed))

    def runs(self, chosen: Sequence[Row], devices: int, advance: Advance) -> Iterator[Run]:
        """Tunes each method on the first seed, and runs it on all of them."""
        problem, setting, options = cleaning(L2), self.setting, self.common
        size = max(size for size in range(1, LARGEST_CHUNK + 1) if setting.iterations % size == 0)
        for row in chosen:
            graph = row.graph(self.graph)
            make = functools.partial(row.make, problem, bx.gossip(graph))
            choice = tuned(make, problem, self.load(options.seed), grid(setting), setting.iterations)
            steps, shapes = bx.Levels(**choice["step_sizes"]), None
            placed = place(functools.partial(row.make, problem, step_sizes=steps), graph, devices, self.placement)
            for seed in options.all_seeds:
                data = self.load(seed)
                if (found := jax.tree.map(jnp.shape, data.batch)) != shapes:
                    shapes, program = found, compiled(row, placed, problem, data, size)
                keys = jnp.broadcast_to(jax.random.key(seed), (setting.iterations // size, size))
                first, scores = program.start(*start(data)), functools.partial(evaluate, data)
                outcome = drive(program, first, keys, placed.put(data.batch), scores, self.budget, advance)
                yield Run(TASK, row.name, seed, self.configuration(row, devices) | choice, outcome)

    def configuration(self, row: Row, devices: int) -> dict[str, Any]:
        """What was chosen, for the JSON files."""
        names = ("data", "agents", "topology", "partition", "corruption", "coins")
        setting = self.setting
        return {
            **{name: getattr(self, name) for name in names},
            "batch_size": row.batch_size,
            "train": setting.train,
            "validation": setting.validation,
            "l2": L2,
            "outer_steps": setting.iterations,
            "budget": self.budget,
            "devices": devices,
            "placement": self.placement if devices > 1 else None,
        }

    def run(self) -> int:
        """Runs everything, prints the table and writes the files; returns the exit code."""
        if self.distributed:
            devices = join_hosts(self.coordinator, self.processes, self.process)
        else:
            devices = start_devices(self.devices)
        if self.agents % devices:
            raise DataError(f"--agents must be a multiple of the {devices} devices of all hosts; got {self.agents}.")
        coins, words = COINS[self.coins]
        everything = rows(functools.partial(coins, block=self.agents // devices), self.batch_size)
        chosen = [row for row in everything if row.name in self.common.methods]
        for seed in self.common.all_seeds:
            self.load(seed)
        if jax.process_index() > 0:  # the first host reports
            return 0 * sum(1 for _ in self.runs(chosen, devices, lambda number: None))
        plain = (self.data, self.agents, self.topology, self.partition) == ("digits", 8, "ring", "dirichlet:0.1")
        suffix = f"-{self.data}-{self.agents}-{self.topology}-{self.partition}".replace(":", "_")
        task = Task(
            title=f"Hyper-cleaning of {self.data} by {self.agents} agents, {self.topology}, {self.partition}",
            folder=TASK if plain else TASK + suffix,
            outer_steps=self.setting.iterations,
            methods=[row.name for row in chosen],
            anchors=(),
            runs=functools.partial(self.runs, chosen, devices),
            columns=COLUMNS,
            caption=CAPTION.format(
                coins=words,
                batch_size=self.batch_size,
                pairs=len(OUTER_GRID) * len(self.setting.inner_grid),
                seed=self.common.seed,
            ),
            draw=lambda finished: draw(finished, lambda seed: np.asarray(self.load(seed).whole.clean)),
        )
        return perform(task, self.common)

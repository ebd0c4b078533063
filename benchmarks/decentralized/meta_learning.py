"""Meta-learning over a graph: agents with few-shot tasks of their own learn the features of images that all can use.

    min_x  mean_i f_i(x, y_i*(x)),          f_i(x, y_i) = mean over the tasks t of agent i, and query, of CE(x, y_it)
    y_i*(x) = argmin g_i(x, y_i),           g_i(x, y_i) = the same over support + mean_t l2 / 2 · ‖y_it‖²

x are the weights of a small convolutional network, y_i linear heads, one for each task of agent i: a PERSONALISED lower
level, y_i is never sent. Methods for a common lower level, y*(x) = argmin_y mean_i g_i(x, y), solve another problem, in
which all agents would share one head for tasks that have nothing to do with each other: none of them is here. The rows
sldbo, s3ldbo-p and sparkle-ed, which can be asked for, are their rules for x with the y and v of each agent left alone.

Agents have different classes, as the partition says. Photographs are a third of miniImageNet, shrunk to 21 × 21:
accuracies stand beside each other here, not beside those of other papers.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import bilevax as bx
from benchmarks.data.few_shot import QUERIES, WAYS, read
from benchmarks.decentralized.choices import PARTITIONS, Agents, changed, parsed
from benchmarks.decentralized.comparison import compare, defaults
from benchmarks.decentralized.exact import Effort
from benchmarks.decentralized.figure import Panel
from benchmarks.decentralized.heads import (
    ADAPTATION,
    BACKBONE,
    Tasks,
    curvature,
    deal,
    decay,
    features,
    of_each_task,
    personal,
    scores,
)
from benchmarks.decentralized.job import Job
from benchmarks.decentralized.network import Network, penalized
from benchmarks.decentralized.rows import names
from benchmarks.harness.report import Columns
from benchmarks.harness.runner import Options
from benchmarks.tasks.meta_learning import draw_tasks

TASK = "decentralized_meta_learning"
L2 = 0.2
TEST_TASKS = 100
ITERATIONS, QUICK_ITERATIONS = 300, 24
OUTER_GRID = (0.1, 0.3, 1.0)
INNER_GRID = (0.1, 0.3, 1.0, 3.0)  # over L, a bound that is far from reached
EFFORT = Effort(newton=6, products=60)
COLUMNS: Columns = {
    "test_accuracy": ("test\nacc.", "{:.3f}".format),
    "test_loss": ("test\nloss", "{:.3f}".format),
}
CAPTION = """\
Every agent has a lower level of its own: heads for its own {tasks} tasks; methods for a common one are left out.
test: {test} tasks of classes that no agent has, whose heads take {steps} steps from zero on the mean x; with random x
accuracy {accuracy:.3f} and loss {loss:.3f} (mean over seeds). A minibatch is divided over the tasks of an agent.
"""
METHODS = ("interact", "interact-svr", "diamond", "lopa-local", "lopa-tracking")
DEFAULTS = defaults(METHODS)
KNOWN = penalized(functools.partial(decay, L2))
problem = functools.cache(personal)


def bound(data: tuple) -> float:
    """Of one head, in the mean over the tasks of an agent."""
    return curvature(L2) / len(data[1])


def network(data: Tasks, test: bx.Batch, seed: int) -> Network:
    """Random x, the same at every agent, and y = 0."""
    images, labels = data.batch.inner
    x = jax.jit(BACKBONE.init)(jax.random.fold_in(jax.random.key(seed), 2), images[0, 0, :1])["params"]
    tasks = images.shape[1]
    wide = jax.eval_shape(features, x, images[0]).shape[2]
    return Network(
        problem=problem(L2),
        batch=data.batch,
        x=x,
        y=jnp.zeros((tasks, wide, WAYS)),
        sample=of_each_task,
        sizes=bx.Batch(outer=data.batch.outer[1][0].size, inner=labels[0].size),
        bound=bound,
        scores=scores(test, L2),
        personal=True,
        known=KNOWN,
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """Meta-learning over a graph of agents, by decentralized methods for a personalised lower level.

    Agents learn one convolutional network, with a linear head for each of their own 5-way few-shot tasks.
    """

    data: Literal["mini-imagenet", "omniglot"] = "mini-imagenet"
    """Images: a third of miniImageNet, shrunk to 21 × 21, or Omniglot, shrunk to 15 × 15; see meta-learning."""
    partition: str = "dirichlet:0.1"
    """How the images of each class are divided: dirichlet:ALPHA, dirichlet-plain:ALPHA, classes:NUMBER, shards:NUMBER,
    quantity:BETA or iid. Every agent needs 5 classes with enough images for support and query."""
    tasks: int = 4
    """Tasks of each agent."""
    shots: int = 5
    """Support images of each class."""
    network: tyro.conf.OmitArgPrefixes[Agents] = Agents()  # noqa: RUF009
    """The agents."""
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS
    """Options of every task."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        self.common.check_methods(names(personal=True))
        most = 20 - QUERIES
        if not 1 <= self.shots <= most:
            raise ValueError(f"shots must lie between 1 and {most}; got {self.shots}. Pass, say, --shots 5.")
        if self.tasks < 1:
            raise ValueError(f"tasks must be an int >= 1; got {self.tasks}. Pass, say, --tasks 4.")
        if (size := self.network.batch_size) % self.tasks:
            raise ValueError(
                f"batch_size must be a multiple of the {self.tasks} tasks of an agent; got {size}. Pass, say, "
                f"--batch-size {8 * self.tasks}."
            )
        parsed("partition", self.partition, PARTITIONS)

    @functools.cache  # noqa: B019
    def load(self, seed: int) -> Network:
        """The tasks of a seed, and new ones for the test."""
        images, unseen = read(self.data)
        partition = parsed("partition", self.partition, PARTITIONS)(self.network.agents, seed)
        data = deal(np.asarray(images), partition, self.tasks, self.shots, seed)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), TEST_TASKS)
        return network(data, draw_tasks(keys, unseen, self.shots), seed)

    def run(self) -> int:
        """Runs everything, prints the table and writes the files; returns the exit code."""
        usual = QUICK_ITERATIONS if self.common.quick else ITERATIONS
        networks = [self.load(seed) for seed in self.common.all_seeds]
        random = [one.scores(one.x, one.y) for one in networks]
        job = Job(
            name=TASK,
            title=f"Meta-learning on {self.data}, {WAYS}-way {self.shots}-shot, {self.partition}",
            folder=TASK + changed(self),
            load=self.load,
            iterations=self.common.outer_steps or usual,
            outer_grid=OUTER_GRID,
            inner_grid=[step / networks[0].curvature() for step in INNER_GRID],
            columns=COLUMNS,
            panel=Panel("test_accuracy", "accuracy on new classes"),
            configuration={
                **{name: getattr(self, name) for name in ("data", "partition", "tasks", "shots")},
                **{"ways": WAYS, "queries": QUERIES, "l2": L2, "test_tasks": TEST_TASKS},
                "widths": list(BACKBONE.widths),
            },
            caption=CAPTION.format(
                tasks=self.tasks,
                test=TEST_TASKS,
                steps=ADAPTATION,
                accuracy=float(np.mean([numbers["test_accuracy"] for numbers in random])),
                loss=float(np.mean([numbers["test_loss"] for numbers in random])),
            ),
            effort=EFFORT,
        )
        return compare(job, self)

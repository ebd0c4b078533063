"""What the command line of every decentralized task calls agents, topologies and partitions."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import bilevax as bx


class Choice(NamedTuple):
    """A value of an option, such as `dirichlet:0.1`.

    Attributes:
      example: the name, and a number behind a colon for each one that it takes.
      make: `make(n, seed, *numbers)`.
    """

    example: str
    make: Callable[..., Any]


# The last two are directed: doubly stochastic, but not symmetric.
TOPOLOGIES = (
    Choice("ring", lambda n, seed: bx.topology.ring(n)),
    Choice("path", lambda n, seed: bx.topology.path(n)),
    Choice("star", lambda n, seed: bx.topology.star(n)),
    Choice("complete", lambda n, seed: bx.topology.complete(n)),
    Choice("torus", lambda n, seed: bx.topology.torus(n)),
    Choice("grid", lambda n, seed: bx.topology.grid(n)),
    Choice("hypercube", lambda n, seed: bx.topology.hypercube(n)),
    Choice(
        "erdos-renyi:0.4", lambda n, seed, probability: bx.topology.erdos_renyi(n, probability=probability, seed=seed)
    ),
    Choice("regular:3", lambda n, seed, degree: bx.topology.random_regular(n, degree=int(degree), seed=seed)),
    Choice("exponential", lambda n, seed: bx.topology.exponential(n)),
    Choice("one-peer-exponential", lambda n, seed: bx.topology.one_peer_exponential(n)),
)
PARTITIONS = (
    Choice("dirichlet:0.1", lambda n, seed, alpha: bx.partition.dirichlet_balanced(n, alpha=alpha, seed=seed)),
    Choice("dirichlet-plain:0.1", lambda n, seed, alpha: bx.partition.dirichlet(n, alpha=alpha, seed=seed)),
    Choice("classes:2", lambda n, seed, classes: bx.partition.classes_per_agent(n, classes=int(classes), seed=seed)),
    Choice("shards:1", lambda n, seed, number: bx.partition.shards(n, shards_per_agent=int(number))),
    Choice("quantity:2", lambda n, seed, beta: bx.partition.quantity_skew(n, beta=beta, seed=seed)),
    Choice("iid", lambda n, seed: bx.partition.iid(n, seed=seed)),
)
COINS: Mapping[str, tuple[Callable, str]] = {
    "independent": (lambda p, block: bx.coins.independent(p), "each agent refreshes with probability p"),
    "subset": (bx.coins.subset, "⌈p·m⌉ of the m agents on each device refresh in each iteration"),
}


def parsed(option: str, text: str, choices: Sequence[Choice]) -> Callable[[int, int], Any]:
    """Reads `name` or `name:number`.

    Args:
      option: its name, for the message.
      text: what was given.
      choices: what there is.

    Returns:
      `make(n, seed)`.

    Raises:
      ValueError: if it is none of the choices.
    """
    name, *numbers = text.split(":")
    for choice in choices:
        known, *needed = choice.example.split(":")
        if name == known and len(numbers) == len(needed):
            try:
                values = [float(number) for number in numbers]
            except ValueError:
                break
            return lambda n, seed: choice.make(n, seed, *values)
    examples = ", ".join(choice.example for choice in choices)
    flag = option.replace("_", "-")
    raise ValueError(f"{option} must be like one of {examples}; got {text}. Pass, say, --{flag} {choices[0].example}.")


@dataclasses.dataclass(frozen=True)
class Agents:
    """The agents of every decentralized task."""

    agents: int = 8
    """Number of agents."""
    topology: str = "ring"
    """Graph: ring, path, star, complete, torus, grid, hypercube, erdos-renyi:PROBABILITY, regular:DEGREE, or directed
    exponential or one-peer-exponential, without the methods that need a symmetric or a fixed graph."""
    lower_topology: str | None = None
    """Graph for y and v, where it is another one than that of x."""
    coins: Literal["independent", "subset"] = "independent"
    """Of s3ldbo: each agent by itself with probability p, or ceil(p · m) of the m agents on each device."""
    batch_size: int = 32
    """Examples of each kind in a minibatch, for the methods that draw some."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        for name in ("agents", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be an int >= 1; got {value}. Pass, say, --{name.replace('_', '-')} 8.")
        for graph in self.topologies(0):
            bx.topology.check(graph)

    def topologies(self, seed: int) -> bx.Levels:
        """The graphs of x, y and v; one object where they are the same."""
        upper = parsed("topology", self.topology, TOPOLOGIES)(self.agents, seed)
        if self.lower_topology is None:
            return bx.Levels(upper, upper, upper)
        lower = parsed("lower_topology", self.lower_topology, TOPOLOGIES)(self.agents, seed)
        return bx.Levels(upper, lower, lower)

    @property
    def words(self) -> str:
        """For a title."""
        lower = f" (y and v: {self.lower_topology})" if self.lower_topology else ""
        return f"{self.agents} agents, {self.topology}{lower}"


def changed(config: Any, but: Sequence[str] = ()) -> str:
    """What a configuration changes of its defaults, for the name of a folder: `-agents_16`.

    Args:
      config: a dataclass; fields that are dataclasses are looked into.
      but: fields that do not count, besides `common`, which every task has.
    """
    parts = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ("common", *but):
            continue
        if dataclasses.is_dataclass(value):
            parts.append(changed(value))
        elif value != field.default:
            parts.append(f"-{field.name}_{value}".replace(":", "_").replace("/", "_"))
    return "".join(parts)

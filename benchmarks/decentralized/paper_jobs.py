"""The commands whose results the claims of the papers are compared with."""

from collections.abc import Sequence
from typing import NamedTuple

PROBABILITIES = ("0.5", "0.2", "0.1", "0.05")
SKIPPING = tuple(f"s3ldbo-{p}" for p in PROBABILITIES)
DIFFUSING = tuple(f"s3ldbo-ed-{p}" for p in PROBABILITIES)
REFRESH = tuple(f"s3ldbo-{which}-{p}" for p in ("0.125", "0.25") for which in ("subset", "adaptive"))
PREDICTED = tuple(f"s3ldbo-predicted-{which}{p}" for which in ("", "ed-") for p in ("0.1", "0.2"))
WORST = "s3ldbo-worst-0.1"
RESCALED = ("s3ldbo-cyclic-0.1", "s3ldbo-kfac-0.1", "sldbo-kfac")
LAZY = ("sldbo", *SKIPPING, "s3ldbo-ed-0.1", *PREDICTED[::2], *REFRESH[:2])  # where a run costs much
SPARSE = ("--agents", "20", "--topology", "ring")
DUAL = ("sparkle-ed", "sparkle-extra", "sparkle-gt")
CLEANING, PENALTIES = "decentralized-hyper-cleaning", "decentralized-regularization"
META, POLICY = "decentralized-meta-learning", "decentralized-policy-evaluation"
SEVERE_CLEANING, SEVERE_POLICY = ("--partition", "classes:2", *SPARSE), ("--uneven", "0.3", *SPARSE)


class Job(NamedTuple):
    """One command, run as `python -m benchmarks <task> <options>`.

    Attributes:
      name: also its subfolder of the results.
      title: of its table.
      task: of the command line.
      options: the same in both settings.
      methods: rows, with --methods; none for a command without that option.
      iterations: of SLDBO in the quick setting and in the full one, with --outer-steps; None for the command's own.
      quick, full: options of one setting.
      seeds: most of them; None for as many as are asked for.
      alone: whether it is of the full setting alone, since no claim needs it.
    """

    name: str
    title: str
    task: str
    options: Sequence[str] = ()
    methods: Sequence[str] = ()
    iterations: tuple[int, int] | None = None
    quick: Sequence[str] = ()
    full: Sequence[str] = ()
    seeds: int | None = None
    alone: bool = False

    def command(self, quick: bool, seeds: int) -> list[str]:
        """The arguments of `python -m benchmarks`, but for the folder."""
        own = self.quick if quick else self.full
        number = min(seeds, self.seeds or seeds)
        arguments = [self.task, *self.options, *own, "--seeds", str(number), *(["--quick"] * quick)]
        if self.iterations is not None:
            arguments += ["--outer-steps", str(self.iterations[0 if quick else 1])]
        return [*arguments, "--methods", *self.methods] if self.methods else arguments


FASHION = ("--data", "fashion-mnist")
PARTITION = ("--partition", "dirichlet:1")
LIBSVM = ("a9a", "ijcnn1", "w8a")
FEW = ("sldbo", "s3ldbo-0.2", "dsvrbgd", "sparkle-gt", "d-soba")
OWN = ("sldbo", "interact", "interact-svr", "diamond", "lopa-local", "lopa-tracking")
REDUCED = ("dsvrbgd", "dsvrbgd-alternating", "dsvrbgd-ed", "dsvrbgd-alternating-ed")
SAMPLED = (*REDUCED, "mdbo", "vrdbo", "ma-dsbo-sampled", "d-soba-sampled", "gt-sgd", "sparkle-ed-sampled")
COMPRESSED = ("top0.3", "top0.1")
OTHERS = (
    *("sldbo", "s3ldbo-unbiased-0.2", *DUAL, "sparkle-mixed", "d-soba", "d-soba-first-order", "adasdbo"),
    *("ma-dsbo", "ma-dsbo-gt", "ma-dsbo-restart", "c2dfb"),
)
JOBS = (
    Job(
        "synthetic",
        "Penalties of synthetic data",
        PENALTIES,
        ("--data", "synthetic"),
        ("sldbo", *SKIPPING, *DIFFUSING, *PREDICTED, WORST, *REFRESH),
        (600, 1000),
    ),
    *(
        Job(
            f"stochastic-{size}",
            f"Penalties of synthetic data, minibatches of {size}",
            PENALTIES,
            ("--data", "synthetic", "--batch-size", size),
            ("sldbo", *SAMPLED),
            (600, 2000),
        )
        for size in ("4", "32")
    ),
    Job("matrices", "Penalties of synthetic data, matrices", PENALTIES, (), ("gbdsbo", "sldbo"), (600, 1000)),
    *(
        Job(name, f"Penalties of {name}", PENALTIES, ("--data", name, *PARTITION), FEW, (300, 600), alone=True)
        for name in LIBSVM
    ),
    Job("mnist", "Penalties of MNIST", PENALTIES, ("--data", "mnist"), LAZY, (150, 400)),
    Job(
        "cleaning",
        "Hyper-cleaning",
        CLEANING,
        (),
        (*LAZY, WORST, *REFRESH[2:], *RESCALED, *(f"sldbo-{which}" for which in COMPRESSED)),
        (200, 600),
        full=FASHION,
    ),
    Job(
        "stochastic-cleaning",
        "Hyper-cleaning, minibatches of 32",
        CLEANING,
        (),
        ("sldbo", *SAMPLED, *(f"dsvrbgd-{which}" for which in COMPRESSED)),
        (200, 600),
        full=FASHION,
    ),
    Job("cleaning-others", "Hyper-cleaning, other methods", CLEANING, (), OTHERS, (300, 600), full=FASHION, alone=True),
    Job("meta", "Meta-learning", META, (), LAZY, (64, 300), quick=("--tasks", "1")),
    Job("meta-all", "Meta-learning, methods with their own heads", META, (), OWN, (30, 300), alone=True),
    *(
        Job(
            f"{topology}-cleaning",
            f"Hyper-cleaning on {graph}",
            CLEANING,
            ("--agents", str(n), "--topology", topology, "--partition", partition),
            FEW,
            (300, 600),
            alone=True,
        )
        for topology, graph, n, partition in (
            ("torus", "a torus of 16 agents", 16, "dirichlet:1"),
            ("exponential", "an exponential graph of 20 agents", 20, "iid"),
        )
    ),
    Job(
        "policy",
        "Policy evaluation",
        POLICY,
        (),
        ("sldbo", "s3ldbo-0.1", "s3ldbo-ed-0.1", *PREDICTED[::2], WORST, "sparkle-ed", "sparkle-gt", "d-soba", "mdbo"),
        (2000, 5000),
    ),
    Job("sparse-policy", "Policy evaluation, sparse", POLICY, SEVERE_POLICY, (*DUAL, "d-soba"), (2000, 5000)),
    Job("sparse-cleaning", "Hyper-cleaning, sparse", CLEANING, SEVERE_CLEANING, (*DUAL, "d-soba"), (200, 1000)),
    *(
        Job(
            f"{where}-complete",
            f"Hyper-cleaning, complete graph for {levels}",
            CLEANING,
            ("--partition", "classes:2", "--agents", "20", "--topology", upper, "--lower-topology", lower),
            ("sparkle-ed", "sparkle-gt"),
            (200, 1000),
        )
        for where, levels, upper, lower in (
            ("lower", "y and v", "ring", "complete"),
            ("upper", "x", "complete", "ring"),
        )
    ),
    Job("speed-up", "Noise floors of stochastic methods", "decentralized-speed-up"),
    *(
        Job(
            f"step-sizes-{task}",
            f"Suggested step sizes beside tuned ones, {words}",
            "decentralized-step-sizes",
            ("--jobs", task),
        )
        for task, words in (
            ("synthetic", "penalties of synthetic data"),
            ("mnist", "penalties of MNIST"),
            ("digits", "hyper-cleaning"),
            ("meta", "meta-learning"),
            ("policy", "policy evaluation"),
        )
    ),
    Job(
        "curvature",
        "Curvature as a preconditioner of y and v",
        "decentralized-curvature",
        iterations=(2400, 3000),
        seeds=2,
    ),
)


def planned(quick: bool) -> tuple[Job, ...]:
    """The jobs of a setting."""
    return tuple(job for job in JOBS if not (quick and job.alone))

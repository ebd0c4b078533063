"""The commands whose results the claims of the papers are compared with."""

from collections.abc import Sequence
from typing import NamedTuple

SKIPPING = ("s3ldbo-0.5", "s3ldbo-0.2", "s3ldbo-0.1")
REFRESH = tuple(f"s3ldbo-{which}-{p}" for p in ("0.25", "0.125") for which in ("subset", "adaptive"))
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
    """

    name: str
    title: str
    task: str
    options: Sequence[str] = ()
    methods: Sequence[str] = ()
    iterations: tuple[int, int] | None = None
    quick: Sequence[str] = ()
    full: Sequence[str] = ()

    def command(self, quick: bool, seeds: int) -> list[str]:
        """The arguments of `python -m benchmarks`, but for the folder."""
        own = self.quick if quick else self.full
        arguments = [self.task, *self.options, *own, "--seeds", str(seeds), *(["--quick"] * quick)]
        if self.iterations is not None:
            arguments += ["--outer-steps", str(self.iterations[0 if quick else 1])]
        return [*arguments, "--methods", *self.methods] if self.methods else arguments


def pair(
    name: str,
    title: str,
    task: str,
    iterations: tuple[int, int],
    options: Sequence[str] = (),
    quick: Sequence[str] = (),
) -> tuple[Job, Job]:
    """SLDBO, and the methods that skip with twice its iterations, so that a late arrival is seen too."""
    few, many = iterations
    return (
        Job(name, title, task, options, ("sldbo",), iterations, quick),
        Job(f"{name}-skipping", f"{title}: skipping", task, options, SKIPPING + REFRESH, (2 * few, 2 * many), quick),
    )


FASHION = ("--data", "fashion-mnist")
LIBSVM = ("a9a", "ijcnn1", "w8a")
FEW = ("sldbo", "s3ldbo-0.2", "dsvrbgd", "sparkle-gt", "d-soba")
OWN = ("interact", "interact-svr", "diamond", "lopa-local", "lopa-tracking")
ALL_CLEANING = (
    *("sldbo", *SKIPPING, "s3ldbo-unbiased-0.2", "dsvrbgd", "dsvrbgd-alternating", *DUAL, "sparkle-mixed"),
    *("d-soba", "d-soba-sampled", "d-soba-first-order", "adasdbo", "ma-dsbo", "ma-dsbo-sampled", "ma-dsbo-gt"),
    *("ma-dsbo-restart", "mdbo", "vrdbo", "c2dfb"),
    *("sldbo-top0.3", "sldbo-top0.1", "dsvrbgd-top0.3", "dsvrbgd-top0.1"),
)
JOBS = (
    *pair("synthetic", "Penalties of synthetic data", PENALTIES, (600, 1000), ("--data", "synthetic")),
    Job("matrices", "Penalties of synthetic data, matrices", PENALTIES, (), ("gbdsbo", "sldbo"), (600, 1000)),
    *(Job(name, f"Penalties of {name}", PENALTIES, ("--data", name), FEW, (300, 600)) for name in LIBSVM),
    *pair("mnist", "Penalties of MNIST", PENALTIES, (150, 400), ("--data", "mnist")),
    Job("cleaning", "Hyper-cleaning, all methods", CLEANING, (), ALL_CLEANING, (300, 600), full=FASHION),
    Job("cleaning-skipping", "Hyper-cleaning: skipping", CLEANING, (), SKIPPING + REFRESH, (600, 1200), full=FASHION),
    *pair("meta", "Meta-learning", META, (30, 300), quick=("--tasks", "2")),
    Job("meta-all", "Meta-learning, methods with their own heads", META, (), OWN, (30, 300), quick=("--tasks", "2")),
    *(
        Job(
            f"{topology}-cleaning",
            f"Hyper-cleaning on {graph}",
            CLEANING,
            ("--agents", str(n), "--topology", topology, "--partition", partition),
            FEW,
            (300, 600),
        )
        for topology, graph, n, partition in (
            ("torus", "a torus of 16 agents", 16, "dirichlet:1"),
            ("exponential", "an exponential graph of 20 agents", 20, "iid"),
        )
    ),
    Job(
        "policy", "Policy evaluation", POLICY, (), ("sldbo", "sparkle-ed", "sparkle-gt", "d-soba", "mdbo"), (2000, 5000)
    ),
    Job("sparse-policy", "Policy evaluation, sparse", POLICY, SEVERE_POLICY, (*DUAL, "d-soba"), (2000, 5000)),
    Job("sparse-cleaning", "Hyper-cleaning, sparse", CLEANING, SEVERE_CLEANING, (*DUAL, "d-soba"), (500, 1000)),
    *(
        Job(
            f"{where}-complete",
            f"Hyper-cleaning, complete graph for {levels}",
            CLEANING,
            ("--partition", "classes:2", "--agents", "20", "--topology", upper, "--lower-topology", lower),
            ("sparkle-ed", "sparkle-gt"),
            (500, 1000),
        )
        for where, levels, upper, lower in (
            ("lower", "y and v", "ring", "complete"),
            ("upper", "x", "complete", "ring"),
        )
    ),
    Job("speed-up", "Noise floors of stochastic methods", "decentralized-speed-up"),
    Job("curvature", "Curvature as a preconditioner of y and v", "decentralized-curvature", iterations=(1500, 3000)),
)

"""The command line: one subcommand for each task, and hyper-cleaning where none is named."""

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.errors import DataError
from benchmarks.harness.stopping import INTERRUPTED, stoppable

# Modules with a class `Config`, by folder, imported when their job is named: some need packages that others do not.
FOLDERS = {
    "tasks": {
        "hyper-cleaning": "learn a weight for each training example, half of whose labels are false (the default)",
        "regularization": "learn one penalty for each feature of a logistic regression",
        "meta-learning": "learn a first point from which few steps classify new characters (needs flax)",
        "poisoning": "alter a few training images so that the validation error rises",
        "long-tail": "learn a network from losses to weights on classes of very different size",
        "text-reweighting": "learn weights for texts with weak labels (needs flax)",
        "safe-selection": "find unwanted texts in what a language model is tuned on (needs flax)",
        "condensation": "learn the few images that a new network is trained on",
        "online-adaptation": "learn which words of a document a language model adapts to (needs flax)",
        "pde": "recover a coefficient or a field of a differential equation, also through a black-box solver",
        "learning-rates": "learn the schedule of the inner step sizes",
        "layer-rates": "learn AdamW's rate and decay for each layer while the network trains (needs flax)",
    },
    "studies": {
        "single-machine": "compare single-machine methods from small batches, penalties of a logistic regression again",
        "hypergradients": "compare hypergradients with the exact one, against their cost",
        "two-phase": "a cheap estimator first, an unbiased one after it",
        "unrolling": "error, memory and time of hypergradients as the inner steps grow in number",
        "curvature-models": "blocks of curvature of models of every kind, and their hypergradients (needs flax)",
        "skipping": "time iterations whose agents skip derivatives, and iterations of many agents",
        "peers": "time the same hypergradients by several libraries (needs the extra peers)",
    },
    "decentralized": {
        "decentralized-hyper-cleaning": "hyper-cleaning by agents on a graph, who share no images",
        "decentralized-meta-learning": "learn features by agents on a graph, with heads of their own (needs flax)",
        "decentralized-policy-evaluation": "find one value function for the rewards that agents on a graph see",
        "decentralized-regularization": "one penalty for each feature, by agents on a graph, who share no rows",
        "decentralized-step-sizes": "step sizes that agents on a graph find by themselves, beside tuned ones",
        "decentralized-speed-up": "the noise that constant steps leave, against the number of agents on a graph",
        "decentralized-curvature": "y and v of agents on a graph, preconditioned with Kronecker factors",
        "decentralized-papers": "all decentralized tasks, and what was measured beside what the papers claim",
    },
    "robustness": {
        "kills": "kill commands at random moments, and compare what they come to with unkilled ones",
        "hosts": "one run on several processes, one of which is killed, and fewer of which take it up again",
        "hostile-files": "files that are cut off, have flipped bits or are hostile, against all that read them",
        "memory": "memory and processor seconds of the quick run of every job",
        "soak": "loops for ten minutes, in which memory, open files and compiled programs may not grow",
    },
}
TASKS = {task: folder for folder, tasks in FOLDERS.items() for task in tasks}
EXTRAS = {
    **dict.fromkeys(
        ("PIL", "matplotlib", "pooch", "requests", "rich", "sklearn", "threadpoolctl", "tyro", "urllib3"), "bench"
    ),
    **{"orbax": "checkpoint", "flax": "flax", "safetensors": "text", "tokenizers": "text"},
    **dict.fromkeys(("jaxopt", "lineax", "optimistix"), "peers"),
}
DESCRIPTION = """\
Compares hypergradients on bilevel problems: prints a table, writes JSON files and a plot.

{tasks}

Without a task, options belong to hyper-cleaning: `python -m benchmarks --seeds 5`.
The options of a task: `python -m benchmarks hyper-cleaning --help`.
Methods of your own: `--plugin my_methods.py`, a Python file that is executed; see docs/testing.md.
Every job takes `--checkpoint FOLDER`: started again with the same options, it goes on where it was killed. Ctrl-C and
SIGTERM end a job alike, with exit codes 130 and 143. Each JSON file has the id of the command that made it.
Public data sets are downloaded once to a cache folder; BILEVAX_DATA=<folder> names another one."""

GO_ON = "The same command goes on from here."
BEGIN_ANEW = "Finished runs are kept; with --checkpoint FOLDER the same command would go on from here."


def module_of(task: str) -> str:
    """Where a job lies: hyphens are underscores, and `decentralized-` at the front is its folder."""
    return f"benchmarks.{TASKS[task]}.{task.removeprefix('decentralized-').replace('-', '_')}"


def takes_plugin(config: type[Any]) -> bool:
    """Whether a job has the option, of its own or among the common ones."""
    return any(field.name == "plugin" or hasattr(field.default, "plugin") for field in dataclasses.fields(config))


def install(extra: str) -> str:
    """The command that brings an extra, to a checkout or to an installed package."""
    checkout = (Path(__file__).parent.parent / "pyproject.toml").exists()
    return f'pip install -e ".[{extra}]"' if checkout else f'pip install "bilevax[{extra}]"'


def main(args: Sequence[str]) -> int:
    """Runs the task that the arguments name; returns the exit code."""
    if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
        args = ["hyper-cleaning", *args]
    sections = [
        "\n".join([f"{folder}:", *(f"  {name:32}{description}" for name, description in tasks.items())])
        for folder, tasks in FOLDERS.items()
    ]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        usage="%(prog)s [task] [options]",
        description=DESCRIPTION.format(tasks="\n\n".join(sections)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=TASKS, help=argparse.SUPPRESS)
    task = parser.parse_args(args[:1]).task
    with stoppable() as code_of_signal:
        try:
            code = run(task, args[1:])
        except DataError as error:
            code = 1
            print(error, file=sys.stderr)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in EXTRAS:
                raise
            code = 1
            print(f"{task} needs {package}, which is not installed. Run: {install(EXTRAS[package])}", file=sys.stderr)
        except KeyboardInterrupt:
            code = INTERRUPTED
        if code != INTERRUPTED:
            return code
        kept = any(arg.partition("=")[0] == "--checkpoint" for arg in args)
        print(f"Interrupted. {GO_ON if kept else BEGIN_ANEW}", file=sys.stderr)
        return code_of_signal()


def run(task: str, args: Sequence[str]) -> int:
    """Runs a task with its options; returns the exit code."""
    import tyro

    config = importlib.import_module(module_of(task)).Config
    if not takes_plugin(config) and any(arg.partition("=")[0] == "--plugin" for arg in args):
        raise DataError(f"{task} has no rows that a plugin could add to. Drop --plugin, or name another job.")
    flags = (tyro.conf.FlagCreatePairsOff,)
    job = tyro.cli(config, prog=f"python -m benchmarks {task}", args=args, config=flags)
    from benchmarks.harness.resuming import check_ready, new_identity  # which import JAX, as jobs do

    new_identity.cache_clear()
    if not getattr(job, "distributed", False):  # then the first host writes, as `prepared` sees to
        check_ready(job)
    return job.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The command line: one subcommand for each task, and hyper-cleaning where none is named."""

import sys
from collections.abc import Callable, Sequence

import tyro

from benchmarks import hyper_cleaning

TASKS: dict[str, Callable[..., hyper_cleaning.HyperCleaning]] = {"hyper-cleaning": hyper_cleaning.HyperCleaning}


def main(args: Sequence[str]) -> int:
    """Runs the task that the arguments name; returns the exit code."""
    if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
        args = ["hyper-cleaning", *args]
    config = tyro.extras.subcommand_cli_from_dict(
        TASKS,
        prog="python -m benchmarks",
        description="Compares hypergradients on bilevel problems: prints a table, writes JSON files and a plot.\n\n"
        "Without a task, options belong to hyper-cleaning: `python -m benchmarks --seeds 5`. The options of a task: "
        "`python -m benchmarks hyper-cleaning --help`.",
        args=args,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return config.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

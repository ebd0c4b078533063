"""The pages of docs that show what the jobs here found: each has a place of its own, between two comments."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness.errors import DataError
from benchmarks.harness.files import write


def put(page: Path, name: str, text: str) -> None:
    """Puts a text between `<!-- begin NAME -->` and `<!-- end NAME -->` of a page, in place of what stood there."""
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    before, found, rest = page.read_text().partition(begin)
    _, also, after = rest.partition(end)
    if not (found and also):
        raise DataError(f"{page} has no place for {name}. Add the lines {begin.strip()} and {end}.")
    write(page, f"{before}{begin}{text.strip()}\n{end}{after}")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table, the first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(console: Console, name: str, text: str, rows: Sequence[Any], folder: Path, page: Path | None) -> None:
    """Prints a table, writes its rows, which are NamedTuples, to NAME.json of a folder, and puts it on a page."""
    console.print(text, markup=False, soft_wrap=True)
    write(folder / f"{name}.json", json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    if page is not None:
        put(page, name, text)

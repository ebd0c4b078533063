"""The pages of docs that show what the jobs here found: each has a place of its own, between two comments."""

from pathlib import Path

from benchmarks.harness.errors import DataError
from benchmarks.harness.files import replacing


def put(page: Path, name: str, text: str) -> None:
    """Puts a text between `<!-- begin NAME -->` and `<!-- end NAME -->` of a page, in place of what stood there."""
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    before, found, rest = page.read_text().partition(begin)
    _, also, after = rest.partition(end)
    if not (found and also):
        raise DataError(f"{page} has no place for {name}. Add the lines {begin.strip()} and {end}.")
    with replacing(page) as file:
        file.write_text(f"{before}{begin}{text.strip()}\n{end}{after}")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table, the first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

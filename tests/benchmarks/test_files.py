"""Files are written whole or not at all, also where the disk is full or the writer is killed."""

import errno
import os
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from benchmarks.harness import files
from benchmarks.harness.errors import DataError

KILLED = """
import os, signal, sys
from pathlib import Path
from benchmarks.harness.files import replacing

with replacing(Path(sys.argv[1])) as file:
    file.write_text("half of what")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def refusing(number):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    return refuse


def test_a_text_and_a_figure_take_the_place_of_what_was_there(tmp_path):
    path = tmp_path / "new" / "x.json"
    for text in ("first", "second"):
        files.write(path, text)
        assert path.read_text() == text
    files.save(Figure(), path.with_suffix(".png"))
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(path.parent)) == ["x.json", "x.png"]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
def test_a_writer_that_is_killed_leaves_the_old_file_and_the_next_one_clears_up(tmp_path):
    path = tmp_path / "x.json"
    files.write(path, "whole")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert killed.returncode == -9
    assert path.read_text() == "whole"
    (left,) = [name for name in os.listdir(tmp_path) if name != "x.json"]
    assert [*tmp_path.rglob("*.json")] == [path]  # what readers look for
    files.write(tmp_path / "y.json", "other")  # its own leftovers alone
    assert (tmp_path / left).exists()
    files.write(path, "again")
    assert sorted(os.listdir(tmp_path)) == ["x.json", "y.json"]


def test_the_temporary_file_of_a_writer_that_lives_stays(tmp_path):
    with files.replacing(tmp_path / "x.json") as outer:
        outer.write_text("slow")
        other = outer.with_name(outer.name.replace(str(os.getpid()), str(os.getppid())))
        other.write_text("its parent's")
        files.write(tmp_path / "y.json", "fast")
    assert other.exists()
    assert (tmp_path / "x.json").read_text() == "slow"


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_what_the_machine_refuses_is_said_and_the_old_file_stays(tmp_path, monkeypatch, call, number):
    path = tmp_path / "x.json"
    files.write(path, "whole")
    with monkeypatch.context() as broken:
        broken.setattr(os, call, refusing(number))
        with pytest.raises(DataError, match=rf"x\.json cannot be written: {os.strerror(number)}\. Make room"):
            files.write(path, "new")
    assert path.read_text() == "whole"
    assert os.listdir(tmp_path) == ["x.json"]


def test_other_errors_of_the_block_are_not_taken_for_those_of_the_disk(tmp_path):
    with pytest.raises(ConnectionError), files.replacing(tmp_path / "x"):
        raise ConnectionError("reset")
    assert os.listdir(tmp_path) == []


def test_a_folder_of_results_that_cannot_be_is_refused_by_its_option(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/below", "n" * 300, "null\0byte", "/proc/none"):
        with pytest.raises(DataError, match=r"cannot be written: .*with --results"):
            files.check_writable(tmp_path / folder, "--results")
    monkeypatch.setattr(os, "fsync", refusing(errno.ENOSPC))
    with pytest.raises(DataError, match="full cannot be written: No space left on device"):
        files.check_writable(tmp_path / "full", "--results")
    assert os.listdir(tmp_path / "full") == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff\xfe", b'{"a": 1} {', b"[" * 100_000])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.json is damaged: .*Make it again, or delete it"):
        files.record(tmp_path / "x.json")

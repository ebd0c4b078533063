"""Readers of files from outside refuse what they cannot read, in our words, and nothing else happens."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("safetensors")
from tokenizers import Tokenizer  # comes with the same extra

from benchmarks.data import adaptation_data, photos, text, vocabulary
from benchmarks.harness.errors import DataError
from benchmarks.networks import pretrained
from benchmarks.robustness import hostile_files
from benchmarks.robustness.hostile import photographs, texts
from benchmarks.robustness.hostile.making import KINDS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=hostile_files.CASES)
def reader(request, tmp_path_factory):
    """A reader on trial, and the path of its file."""
    case = hostile_files.CASES[request.param]
    folder = tmp_path_factory.mktemp("data")
    (folder / case.file).parent.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BILEVAX_DATA", str(folder))
        yield case, folder / case.file
    assert [path for path in folder.rglob("*") if path.is_file()] == [folder / case.file]


def test_a_good_file_is_read(reader):
    case, path = reader
    path.write_bytes(case.good)
    assert hostile_files.tried(case, path) is None


@settings(max_examples=12, deadline=None, suppress_health_check=[*HealthCheck], database=None)
@given(kind=st.sampled_from([*KINDS]), seed=st.integers(0, 2**32))
def test_a_damaged_or_hostile_file_is_read_or_refused_by_name(reader, kind, seed):
    case, path = reader
    path.write_bytes(KINDS[kind](case, np.random.default_rng(seed)))
    assert not hostile_files.tried(case, path)


@settings(max_examples=12, deadline=None, suppress_health_check=[*HealthCheck], database=None)
@given(content=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused_by_name(reader, content):
    case, path = reader
    path.write_bytes(content)
    assert not hostile_files.tried(case, path)


def test_what_is_raised_raw_is_told(tmp_path):
    def raising(error):
        def read(path):
            raise error

        return hostile_files.tried(case._replace(read=read), tmp_path / "train.json")

    case = hostile_files.CASES["WRENCH"]
    assert raising(DataError("train.json must be otherwise")) == ""
    assert "without the name" in raising(DataError("a file must be otherwise"))
    assert raising(KeyError("label")) == "KeyError: 'label'"
    assert raising(RecursionError("deep")) == "RecursionError: deep"
    assert "cannot be right" in hostile_files.tried(case._replace(read=lambda path: False), tmp_path / "train.json")


def test_a_reader_that_takes_too_much_memory_or_time_is_a_failure(tmp_path):
    """In a process with the limits of the job, of which that of time is made shorter."""
    code = """
import signal, sys, time
from pathlib import Path
import numpy as np
from benchmarks.robustness import hostile_files as job
def takes_memory(path):
    np.empty(5 * 2**29, np.uint8)
def takes_time(path):
    while True:
        pass
job.limit_memory()
for read, job.SECONDS in ((takes_memory, 60), (takes_time, 1)):
    print(job.measured(job.CASES["idx"]._replace(read=read), 1, 0, Path(sys.argv[1])).raw, flush=True)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == -signal.SIGPROF, ended.stderr
    assert "Unable to allocate 2.50 GiB" in ended.stdout or sys.platform != "linux"


def test_the_job_counts_and_fails_where_something_is_raw(tmp_path, monkeypatch, capsys):
    def apart(name, number, seed):
        none = dict.fromkeys(KINDS, 0)
        raw = ["hostile 3: KeyError: 'label'"] if name == "npz" else []
        return hostile_files.Row(name, dict.fromkeys(KINDS, number), none | {"flipped": 2}, raw, 2**20, 0.5)

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin hostile-files -->\n<!-- end hostile-files -->\nafter\n")
    monkeypatch.setattr(hostile_files, "apart", apart)
    assert hostile_files.Config(quick=True, results=tmp_path, page=page).run() == 1
    assert "KeyError" in capsys.readouterr().out
    written = page.read_text()
    assert "| npz | 0 of 25 | 2 of 25 | 0 of 25 | 72 | 1 | 0 | 1 MiB | 0.50 s |" in written
    assert "| all | 0 of 350 | 28 of 350 | 0 of 350 | 1021 | 1 | 0 | 1 MiB | 0.50 s |" in written
    assert len(json.loads((tmp_path / "hostile-files-quick" / "hostile-files.json").read_text())) == 14
    monkeypatch.setattr(hostile_files, "CASES", {"idx": None})
    assert hostile_files.Config(results=tmp_path).run() == 0
    with pytest.raises(ValueError, match=r"files must be an int >= 1; got 0\. Pass --files 250"):
        hostile_files.Config(files=0)


def test_a_reader_runs_in_a_process_of_its_own():
    row = hostile_files.apart("idx", 3, seed=0)
    assert (row.reader, row.raw, row.strays) == ("idx", [], 0)
    assert row.files == dict.fromkeys(KINDS, 3)
    assert row.refused["truncated"] == 3
    assert 2**24 < row.memory < hostile_files.MEMORY


HOSTILE_TAR = {
    "a link": (photographs._member("a.jpg", kind=b"2", linkname="/etc/passwd"), "plain file or folder"),
    "a device": (photographs._member("a.jpg", kind=b"3"), "plain file or folder"),
    "an absolute path": (photographs._member("/tmp/a.jpg"), "within the archive"),
    "a path that leads out": (photographs._member("test/../../a.jpg"), "within the archive"),
    "a large file": (photographs._member("a.jpg", photos.LARGEST + 1), "65537 bytes, more than 65536"),
}


@pytest.mark.parametrize(("member", "what"), HOSTILE_TAR.values(), ids=HOSTILE_TAR)
def test_hostile_archives_are_refused_at_the_member(tmp_path, member, what):
    (tmp_path / "photos.tar.xz").write_bytes(
        photographs.PACK[".xz"](photographs._tar([*photographs.ALBUM, (member, bytes(member.size))]))
    )
    with pytest.raises(DataError, match=rf"photos.tar.xz cannot be read .*member 4, '{member.name}'.*{what}"):
        photos.members(tmp_path / "photos.tar.xz")


def test_images_of_another_size_or_format_are_refused_before_they_are_decoded():
    for content, what in (
        (photographs._image("GIF"), "cannot identify"),
        (photographs._image("JPEG", 33), "it is 33 × 33"),
    ):
        with pytest.raises(DataError, match=f"a.jpg must be a JPEG or PNG file of 32 × 32 pixels: {what}"):
            photos.picture(content, 32, "a.jpg")
    with pytest.raises(DataError, match="it is 2000 × 2000"):
        photos.picture(photographs._image("PNG", 2000), 2000, "a.png")


WRONG_WRENCH = {
    "no object": [],
    "a label that is no int": {"0": {"label": True, "weak_labels": [], "data": {"text": ""}}},
    "a label below 0": {"0": {"label": -1, "weak_labels": [], "data": {"text": ""}}},
    "a vote beyond 32 bits": {"0": {"label": 0, "weak_labels": [2**31], "data": {"text": ""}}},
    "votes of two lengths": {str(k): {"label": 0, "weak_labels": [0] * k, "data": {"text": ""}} for k in (1, 2)},
    "half a surrogate pair": {"0": {"label": 0, "weak_labels": [], "data": {"text": "\ud800"}}},
    "an entity that is no text": {"0": {"label": 0, "weak_labels": [], "data": {"text": "", "entity1": 3}}},
}


@pytest.mark.parametrize("value", WRONG_WRENCH.values(), ids=WRONG_WRENCH)
def test_records_with_wrong_values_are_refused_at_their_place(value):
    with pytest.raises(DataError, match=r"wrench/x(, example '\d',)? must .*; got "):
        text.read(json.dumps(value).encode(), "wrench/x")


@pytest.mark.parametrize("content", [b"[" * 10**5, b'{"0": NaN}', b"9" * 5000, b"\xff\xfe", b""])
def test_what_is_no_json_is_refused(content):
    with pytest.raises(DataError, match="wrench/x must be JSON"):
        text.read(content, "wrench/x")


def test_a_long_word_takes_no_longer_than_its_length():
    assert adaptation_data.salient("a" * 10**5 + "A" + "b" * 10**5).sum() == 0  # took hours


def changed(**places):
    """The good tokenizer with other values at `a__b`."""
    root = json.loads(texts.TOKENIZER)
    for place, value in places.items():
        node, *keys = root, *place.split("__")
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value
    return json.dumps(root)


ADDED = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
WRONG_TOKENIZER = {
    "an id beyond the table": (
        changed(model__vocab={"[UNK]": 1, "[CLS]": 2, "[SEP]": 40}, post_processor__sep=["[SEP]", 40], added_tokens=[]),
        "ids below 40; got id 40",
    ),
    "an id that is none": (changed(model__vocab={"a": True}), "from text to an int >= 0"),
    "a token of the added that is not there": (changed(added_tokens=[{"content": "x"}]), "must be in model.vocab"),
    "marks that are missing": (
        changed(
            model__vocab={"[UNK]": 1},
            added_tokens=[],
            post_processor__single=vocabulary.TEMPLATE,
            post_processor__type="TemplateProcessing",
        ),
        r"no token \[CLS\], \[SEP\]",
    ),
    "another model": (changed(model__type="BPE"), "model.type must be 'WordPiece'"),
    "a chain of replacements": (changed(normalizer={"type": "Sequence"}), "normalizer.type must be 'BertNormalizer'"),
    "other marks at the ends": (changed(post_processor__cls=["[CLS]", 0]), "post_processor.cls must be"),
}


@pytest.mark.parametrize(("content", "what"), WRONG_TOKENIZER.values(), ids=WRONG_TOKENIZER)
def test_hostile_tokenizers_are_refused(tmp_path, content, what):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=what):
        text.wordpiece(tmp_path / "tokenizer.json", 8, 40)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalizer__lowercase": False},
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": vocabulary.TEMPLATE,
                "pair": [],
                "special_tokens": {
                    token: {"id": token, "ids": [number], "tokens": [token]}
                    for token, number in (("[CLS]", 2), ("[SEP]", 3))
                },
            }
        },
    ],
)
def test_tokens_are_those_of_the_file(tmp_path, options):
    path = tmp_path / "tokenizer.json"
    path.write_text(changed(**options, added_tokens=[ADDED | {"id": k, "content": texts.PIECES[k]} for k in range(5)]))
    encode, own = text.wordpiece(path, 10**4, 40), Tokenizer.from_file(str(path))
    for sentence in ("Playing now [SEP] a b", *texts.SENTENCES):
        assert encode(sentence) == own.encode(sentence).ids


def test_weights_of_another_type_and_of_no_number_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    stored = dict(texts.STORED)
    first, second, third = stored
    stored |= {
        first: stored[first].astype(int),
        second: stored[second] * np.nan,
        third: stored[third].astype(np.float16),
    }
    path.write_bytes(texts.save(stored))
    with pytest.raises(DataError, match=r"2 tensors.*numbers that are not finite; .* has type I64, expected F64"):
        pretrained.load(path, texts.WEIGHTS)


UNPICKLES = re.compile(
    r"\b(pickle|cloudpickle|dill|joblib|marshal|shelve)\.|import (pickle|marshal|shelve|dill|joblib)|allow_pickle=True"
    r"|np\.load\((?!.*allow_pickle=False)|\.extract(all)?\(|unpack_archive\(|(?<![\w.])(eval|exec)\("
)


def test_nothing_unpickles_unpacks_to_disk_or_evaluates():
    found = [
        f"{path}: {line}"
        for folder in ("bilevax", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for line in path.read_text().splitlines()
        if UNPICKLES.search(line) and "__import__" not in line
    ]
    assert found == []


@pytest.mark.parametrize("line", ["pickle.loads(content)", "np.load(file)", "archive.extractall()", "x = eval(text)"])
def test_the_search_finds_what_it_is_about(line):
    assert UNPICKLES.search(line)

"""Texts to adapt a language model to: chunks of bytes, the salient ones marked.

A salient byte lies in a word with one of `_ ( ) "`, a digit, a dot between letters, or two capitals: names, numbers and
code, which a reader would ask about. Texts that are trained on, validated on and tested on are not the same.
"""

import re
import reprlib
from collections.abc import Callable, Sequence
from pydoc_data.topics import topics
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.data.download import SOURCES, Source, fetch
from benchmarks.data.readers import FIX, is_text, records
from benchmarks.data.text import wrench
from benchmarks.harness.errors import DataError
from bilevax.typing import Array

AGNEWS = "agnews-weak/dev_data.json"
SOURCES[AGNEWS] = Source(
    "https://raw.githubusercontent.com/yueyu1030/COSINE/f24c750efb3f65e2cd234e788a7ba1f798e53aa6/data/AGNews/dev_data.json",
    2_798_258,
    "5ed424be8bb5baa32fbb46cd4265c55ecca343e0ce2c6adaacd34cca01cec3d8",
)
BYTES = 128  # of ASCII; other characters are read as question marks
WORD = re.compile(r"\S+")
SALIENT = re.compile(r'[_()"\d]|\w\.\w|[A-Z]\S*[A-Z]')  # somewhere in a word
SHARES = (9 / 64, 49 / 64)  # least and most of a chunk that may be salient


class Chunks(NamedTuple):
    """Bytes, int32 [C, length], and 1 at the salient ones, float32 [C, length]."""

    words: Array | np.ndarray
    salient: Array | np.ndarray


class Corpus(NamedTuple):
    """The texts to train on, to choose settings by, and to test on."""

    train: list[str]
    validation: list[str]
    test: list[str]


def joined(texts: list[str], size: int) -> list[str]:
    """Makes one text of so many short ones."""
    return ["\n".join(texts[k : k + size]) for k in range(0, len(texts), size)]


def news(content: bytes, size: int, name: str = AGNEWS) -> list[str]:
    """Reads a JSON list of objects with `text`, and joins so many of these, which are short, to one text."""
    examples = records(content, name)
    if not isinstance(examples, list):
        raise DataError(f"{name} must be a list of objects with text; got {reprlib.repr(examples)}. {FIX}.")
    for number, example in enumerate(examples):
        if not (isinstance(example, dict) and is_text(example.get("text"))):
            raise DataError(
                f"{name}, example {number}, must be an object with text; got {reprlib.repr(example)}. {FIX}."
            )
    return joined([example["text"] for example in examples], size)


class Collection(NamedTuple):
    """Where texts come from.

    Attributes:
      texts: all of them.
      train: how many are trained on.
      validation: how many settings are chosen by; the rest are for the test.
      chunks: the most of the former that weights are learnt on.
    """

    texts: Callable[[], list[str]]
    train: int
    validation: int
    chunks: int


# The help topics of Python itself, short news, and short questions.
COLLECTIONS = {
    "topics": Collection(lambda: [*topics.values()], 50, 12, 1200),
    "agnews": Collection(lambda: news(fetch(AGNEWS), 20), 300, 100, 2400),
    "trec": Collection(lambda: joined(wrench("trec", "train").texts, 40), 80, 20, 1200),
}


def corpus(collection: Collection, seed: int) -> Corpus:
    """Deals the texts out at random."""
    texts = collection.texts()
    order = np.random.default_rng(seed).permutation(len(texts))
    parts = np.split(order, np.cumsum([collection.train, collection.validation]))
    return Corpus(*([texts[index] for index in part] for part in parts))


def salient(text: str) -> np.ndarray:
    """1 at the characters of salient words, float32 [len(text)]."""
    marks = np.zeros(len(text), np.float32)
    for word in WORD.finditer(text):
        if SALIENT.search(word.group()):
            marks[slice(*word.span())] = 1
    return marks


def cut(texts: Sequence[str], length: int) -> Chunks:
    """Chunks of so many bytes, of one text each; what is left at the end of a text is dropped."""
    words, marks = [], []
    for text in texts:
        end = len(text) // length * length
        words.append(np.frombuffer(text.encode("ascii", "replace"), np.uint8)[:end].reshape(-1, length))
        marks.append(salient(text)[:end].reshape(-1, length))
    return Chunks(np.concatenate(words).astype(np.int32), np.concatenate(marks))


def informative(chunks: Chunks, seed: int) -> Chunks:
    """The chunks that are salient in part, in a random order."""
    least, most = SHARES
    share = chunks.salient.mean(axis=1)
    rows = np.random.default_rng(seed).permutation(np.flatnonzero((least <= share) & (share <= most)))
    return Chunks(*(jnp.asarray(part[rows]) for part in chunks))


def likelihoods(found: Array, words: Array) -> Array:
    """The negative log-likelihood of each byte but the first, [N, length − 1], from the logits."""
    return optax.softmax_cross_entropy_with_integer_labels(found, words[:, 1:])

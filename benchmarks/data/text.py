"""Texts with weak labels (WRENCH): read, voted on, and cut into tokens.

Reference: Zhang et al., "WRENCH", NeurIPS Datasets and Benchmarks 2021, arXiv 2109.11377.
"""

import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import BertWordPieceTokenizer

from benchmarks.data import vocabulary
from benchmarks.data.download import SOURCES, Source, fetch
from benchmarks.data.readers import FIX, is_int, is_text, records
from benchmarks.harness.errors import DataError

DYGEN = "https://raw.githubusercontent.com/JerrryNie/DyGen/41902c324779157a272548a008a6e487f6d81acc/datasets"
TUTORIAL = "https://raw.githubusercontent.com/nhbess/weak_supervision_tutorial"
SOURCES |= {
    "wrench/trec/train.json": Source(
        f"{DYGEN}/trec/train.json", 1_926_230, "92a1cfc914222003512efd69ee55bd89150bf42f35400c1325f861bfe2a0e350"
    ),
    "wrench/trec/valid.json": Source(
        f"{DYGEN}/trec/valid.json", 190_473, "56b27e6796ecb4fe63d60060306bdb65dec6f8e5f345cdce068eb50a5f90b5c9"
    ),
    "wrench/trec/test.json": Source(
        f"{DYGEN}/trec/test.json", 186_217, "95b1a8fbefbeda9b75b96416814dd46794872809a2295832761b2a0b7bc5de3d"
    ),
    "wrench/semeval/train.json": Source(
        f"{DYGEN}/semeval/train.json", 1_588_568, "d547783e4a592d450c22518fec5f67dccf782b21bfbceca49e0b3d85b2c1a9c5"
    ),
    "wrench/semeval/valid.json": Source(
        f"{DYGEN}/semeval/valid.json", 161_826, "ef62816a53928196cb64e109c73f998bb87aec3293a7a9a81b5358408fc09f13"
    ),
    "wrench/semeval/test.json": Source(
        f"{DYGEN}/semeval/test.json", 547_197, "5994aeb4f8ed93f0776ecf14ffd5da06f42b57c97ee544a112ed3b6dde4849f8"
    ),
    "wrench/youtube/train.json": Source(
        f"{TUTORIAL}/85fbed13d9722dba4378bcbf8d390d745aefebd7/data/youtube/train.json",
        612_314,
        "a435c4e6853c95ac8bdc6bcf9e01d4bad39aa8e5713d273ed01aa5edbfc215b8",
    ),
    "wrench/youtube/valid.json": Source(
        f"{TUTORIAL}/85fbed13d9722dba4378bcbf8d390d745aefebd7/data/youtube/valid.json",
        46_697,
        "278b947d748b4b921b2dd60918318f7ee817584d85a719d0db6f5365d6e87b01",
    ),
    "wrench/youtube/test.json": Source(
        f"{TUTORIAL}/42cf71eaf8ac5105743d5eedbc2fab317c2cb125/part_2_spam_clf/data/youtube/test.json",
        100_483,
        "abcadb6e0a81d1b1a1f19ad6acb73fd201288fae3e89d88593fae9cbca4d5a21",
    ),
}

PADDING, START, UNKNOWN = 0, 1, 2
ENTITIES = ("entity1", "entity2")  # what an example has besides its text, if it is about two words
Encode = Callable[[str], list[int]]


class Texts(NamedTuple):
    """Texts, their true labels [N], and the votes of the labelling functions [N, functions], -1 where one abstains."""

    texts: list[str]
    labels: np.ndarray
    votes: np.ndarray

    def where(self, chosen: np.ndarray) -> "Texts":
        """The chosen rows, bool [N]."""
        return Texts(
            [text for text, keep in zip(self.texts, chosen, strict=True) if keep],
            *(array[chosen] for array in (self.labels, self.votes)),
        )


def wrench(name: str, part: str) -> Texts:
    """A part ("train", "valid" or "test") of "trec", "youtube" or "semeval".

    SemEval asks for the relation of two entities; they are written before their sentence.
    """
    file = f"wrench/{name}/{part}.json"
    return read(fetch(file), file)


def read(content: bytes, name: str) -> Texts:
    """Reads a JSON object of examples with `label`, `weak_labels` and `data`; `name` is what errors call it."""
    examples = records(content, name)
    if not isinstance(examples, dict):
        raise DataError(f"{name} must be an object of examples; got {reprlib.repr(examples)}. {FIX}.")
    votes: list[list[int]] = []
    for key, example in examples.items():
        if not _is_example(example) or (votes and len(votes[0]) != len(example["weak_labels"])):
            raise DataError(
                f"{name}, example {reprlib.repr(key)}, must have a label >= 0, as many weak_labels >= -1 as others, "
                f"and data with text (and entity1, entity2); got {reprlib.repr(example)}. {FIX}."
            )
        votes.append(example["weak_labels"])
    data = [example["data"] for example in examples.values()]
    texts = [" ".join([*(one.get(key, "") for key in ENTITIES), one["text"]]).strip() for one in data]
    labels = np.array([example["label"] for example in examples.values()], np.int32)
    return Texts(texts, labels, np.array(votes, np.int32).reshape(len(votes), -1 if votes else 0))


def _is_example(example: Any) -> bool:
    if not (isinstance(example, dict) and isinstance(data := example.get("data"), dict)):
        return False
    votes = example.get("weak_labels")
    return (
        is_int(example.get("label"), 0, 2**31)
        and isinstance(votes, list)
        and all(is_int(vote, -1, 2**31) for vote in votes)
        and is_text(data.get("text"))
        and all(is_text(data.get(key, "")) for key in ENTITIES)
    )


def majority(votes: np.ndarray, classes: int, random: np.random.Generator) -> np.ndarray:
    """The class with most votes for each row, int [N]; ties are drawn, and -1 says that nobody voted."""
    counts = (votes[:, :, None] == np.arange(classes)).sum(axis=1)
    winners = np.argmax(counts + random.random(counts.shape) / 2, axis=1).astype(np.int32)
    return np.where(counts.any(axis=1), winners, -1)


def agreement(votes: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Who voted for the given label (1), who for another (-1), who abstained (0): float32 [N, functions]."""
    return np.where(votes < 0, 0, np.where(votes == given[:, None], 1, -1)).astype(np.float32)


def words(text: str) -> list[str]:
    """Words and marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def hashed(vocabulary: int) -> Encode:
    """Words to ids by a checksum, which no training text is needed for; different words may share one."""
    return lambda text: [START, *(2 + zlib.crc32(word.encode()) % (vocabulary - 2) for word in words(text))]


def frequent(texts: Sequence[str], vocabulary: int) -> Encode:
    """Words to ids, the most frequent ones in the texts each to its own."""
    counts = Counter(word for text in texts for word in words(text))
    known = {word: 3 + rank for rank, (word, _) in enumerate(counts.most_common(vocabulary - 3))}
    return lambda text: [START, *(known.get(word, UNKNOWN) for word in words(text))]


def wordpiece(path: Path, length: int, rows: int) -> Encode:
    """The tokens of a checkpoint, from its vocab.txt (of an uncased model) or its tokenizer.json.

    Args:
      path: of the file.
      length: number of tokens that a longer text is cut to, the marks at its ends included.
      rows: of the encoder's table of words.

    Raises:
      DataError: if the file cannot be read, is of another tokenizer, or has tokens that are not in the table.
    """
    found = vocabulary.read(path, rows)
    tokenizer = BertWordPieceTokenizer(found.ids, **found.normalizer)
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return lambda text: tokenizer.encode(text).ids


def tokens(texts: Sequence[str], encode: Encode, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all texts, int32 [N, length], cut or padded to one length; and real, float32, 0 at padding."""
    ids = np.full((len(texts), length), PADDING, np.int32)
    real = np.zeros((len(texts), length), np.float32)
    for row, text in enumerate(texts):
        found = encode(text)[:length]
        ids[row, : len(found)], real[row, : len(found)] = found, 1
    return ids, real

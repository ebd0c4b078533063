"""Records in JSON files, vocabularies, and weights."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from benchmarks.data import adaptation_data, text
from benchmarks.networks import pretrained
from benchmarks.robustness.hostile.making import Case, Random, pick

ROWS = 40  # of the table of words
SENTENCES = ("Playing now", "", "a" * 5000, "[MASK] \0 \x85 漢字 é", "now " * 500)
NESTED = "«nested»"  # written as brackets without end
VALUES: list[Any] = [
    None,
    True,
    -2,
    2**31,
    2**70,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "\ud800",
    "\0",
    [],
    {},
    [[]],
    {"text": 3},
    NESTED,
    "a" * 10**5,
    "9" * 5000,
]


def _places(node: Any) -> list[tuple[Any, Any]]:
    keys = [*node] if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [(node, key) for key in keys] + [place for key in keys for place in _places(node[key])]


def _hostile_json(good: bytes, random: Random) -> bytes:
    """A JSON file with some values replaced, dropped or doubled."""
    root = [json.loads(good)]
    for _ in range(random.integers(1, 4)):
        node, key = pick(random, _places(root))
        if random.random() < 0.2 and node is not root:
            del node[key]
        else:
            node[key] = copy.deepcopy(pick(random, VALUES))
    written = json.dumps(root[0], ensure_ascii=bool(random.integers(2))).encode("utf-8", "surrogatepass")
    return written.replace(json.dumps(NESTED).encode(), b"[" * 10**5).replace(NESTED.encode(), b"{" * 10**5)


WRENCH = json.dumps(
    {
        str(key): {"label": key, "weak_labels": [-1, key], "data": {"text": "what is it ?", "entity1": "what"}}
        for key in range(3)
    }
).encode()
NEWS = json.dumps([{"text": f"Number {key} ($5)", "label": 1} for key in range(3)]).encode()


def _read_wrench(path: Path) -> bool:
    found = text.read(path.read_bytes(), path.name)
    ids, _ = text.tokens(found.texts, text.hashed(ROWS), 8)
    whole = len(found.texts) == len(found.labels) == len(found.votes) and ids.max(initial=0) < ROWS
    return whole and found.labels.min(initial=0) >= 0 and found.votes.min(initial=0) >= -1


def _read_news(path: Path) -> bool:
    texts = adaptation_data.news(path.read_bytes(), 2, path.name)
    return len(adaptation_data.cut([*texts, "a" * 8], 8).words) > 0


PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "now", *"abcdefgh"]
TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": token, "special": True} for number, token in enumerate(PIECES[:5])],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {token: number for number, token in enumerate(PIECES)},
        },
    }
).encode()


def _hostile_vocabulary(random: Random) -> bytes:
    odd = ["", "##", "\0", "\x85", "a" * 10**5, "[CLS]", "\ufeff", "é", "##" * 50]
    lines = [*PIECES[: pick(random, [len(PIECES), 3, 1])], *random.choice(odd, random.integers(6))]
    random.shuffle(lines)
    made = [
        lambda: "\n".join(lines).encode(),
        lambda: "\n".join(lines).encode("utf-16"),
        lambda: b"\n".join([*"\n".join(PIECES).encode().split(b"\n"), b"\xff\xfe"]),
        lambda: "\n".join(PIECES + [f"w{number}" for number in range(pick(random, [20, 40, 10**5]))]).encode(),
        lambda: "\n".join(PIECES).encode() + b"\n" * pick(random, [1, 2, 10**5]),
    ]
    return pick(random, made)() if random.random() < 0.98 else bytes(2**25 + 1)


def _read_tokens(path: Path) -> bool:
    encode = text.wordpiece(path, 16, ROWS)
    ids, _ = text.tokens(SENTENCES, encode, 16)
    return bool(ids.min() >= 0 and ids.max() < ROWS)


WEIGHTS = {
    "embeddings": {"word": {"embedding": np.zeros((6, 4), np.float32)}},
    "block_0": {
        "attention": {"query": {"kernel": np.zeros((4, 2, 2), np.float32), "bias": np.zeros((2, 2), np.float32)}}
    },
}
STORED = {
    "embeddings.word_embeddings.weight": np.ones((6, 4), np.float32),
    "encoder.layer.0.attention.self.query.weight": np.ones((4, 4), np.float32),
    "encoder.layer.0.attention.self.query.bias": np.ones(4, np.float32),
}


def _hostile_weights(random: Random) -> bytes:
    good = save(STORED)
    size = int.from_bytes(good[:8], "little")
    if random.random() < 0.3:
        dtype = pick(random, [np.int64, np.float16, np.float64, bool, np.uint8])
        return save(
            {
                name: array.astype(dtype) * pick(random, [1, np.nan if dtype in (np.float16, np.float64) else 1])
                for name, array in STORED.items()
            }
        )
    head = _hostile_json(good[8 : 8 + size], random)
    if random.random() < 0.5:
        words = [
            (b"F32", b"BF16"),
            (b"F32", b"F8_E4M3"),
            (b"[6,4]", b"[4294967296,4294967296]"),
            (b"[4]", b"[-4]"),
            (b"[0,", b"[18446744073709551615,"),
            (b"dtype", b"type"),
            (b"[4,4]", b"[4,4,1]"),
        ]
        head = good[8 : 8 + size].replace(*pick(random, words))
    claimed = pick(random, [len(head)] * 5 + [0, 2**63, 10**8, len(head) + 5])
    return claimed.to_bytes(8, "little") + head + good[8 + size :]


def _read_weights(path: Path) -> bool:
    loaded = pretrained.load(path, WEIGHTS)
    kernel = np.asarray(loaded["block_0"]["attention"]["query"]["kernel"])
    return kernel.shape == (4, 2, 2) and kernel.dtype == np.float32 and bool(np.isfinite(kernel).all())


CASES = [
    Case("WRENCH", "fuzz/train.json", WRENCH, _read_wrench, functools.partial(_hostile_json, WRENCH)),
    Case("AG News", "fuzz/dev_data.json", NEWS, _read_news, functools.partial(_hostile_json, NEWS)),
    Case("vocab.txt", "fuzz/vocab.txt", "\n".join(PIECES).encode(), _read_tokens, _hostile_vocabulary),
    Case("tokenizer.json", "fuzz/tokenizer.json", TOKENIZER, _read_tokens, functools.partial(_hostile_json, TOKENIZER)),
    Case("safetensors", "fuzz/model.safetensors", save(STORED), _read_weights, _hostile_weights),
]

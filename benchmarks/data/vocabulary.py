"""The vocabulary of a BERT checkpoint, from its vocab.txt or tokenizer.json.

The tokenizer is built anew from what is checked here, so that its own parser, which can end the process, reads no file.
"""

import reprlib
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.data.readers import is_int, is_text, records
from benchmarks.harness.errors import DataError

LARGEST = 2**25  # bytes of a file
SPECIAL = ("[UNK]", "[CLS]", "[SEP]")
TEMPLATE = [
    {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
    {"Sequence": {"id": "A", "type_id": 0}},
    {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
]
# What a BertNormalizer may say, and what BERT's uncased models mean where there is no file that says it.
NORMALIZER = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}


class Vocabulary(NamedTuple):
    """Tokens with their ids, and how a text is normalized before it is cut into them."""

    ids: dict[str, int]
    normalizer: dict[str, bool | None]


def read(path: Path, rows: int) -> Vocabulary:
    """The vocabulary in a file.

    Args:
      path: of a vocab.txt (of an uncased model: a token in each line) or of a tokenizer.json of BERT.
      rows: of the encoder's table of words.

    Raises:
      DataError: if the file cannot be read, is of another tokenizer, or has ids outside of the table.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        if path.suffix == ".json":
            found = _of_json(records(content, str(path)))
        else:
            lines = content.decode().removesuffix("\n").split("\n")
            found = Vocabulary({line.rstrip(): number for number, line in enumerate(lines)}, NORMALIZER)
        if missing := [token for token in SPECIAL if token not in found.ids]:
            raise ValueError(f"it has no token {', '.join(missing)}")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} must be the vocab.txt or tokenizer.json of a BERT checkpoint: {error}. Name the file that belongs "
            f"to the weights."
        ) from error
    if outside := [token for token, number in found.ids.items() if number >= rows]:
        raise DataError(
            f"{path} must have at most {rows} tokens, those of the encoder, with ids below {rows}; got id "
            f"{found.ids[outside[0]]} for {reprlib.repr(outside[0])}. Name the file that belongs to the weights."
        )
    return found


def _object(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place} must be an object; got {reprlib.repr(value)}")
    return value


def _must(place: str, value: Any, *expected: Any) -> None:
    if not any(type(value) is type(one) and value == one for one in expected):
        raise ValueError(f"{place} must be {' or '.join(map(repr, expected))}; got {reprlib.repr(value)}")


def _of_json(root: Any) -> Vocabulary:
    root = _object("the file", root)
    model = _object("model", root.get("model"))
    _must("model.type", model.get("type", "WordPiece"), "WordPiece")
    _must("model.unk_token", model.get("unk_token"), "[UNK]")
    _must("model.continuing_subword_prefix", model.get("continuing_subword_prefix"), "##")
    _must("model.max_input_chars_per_word", model.get("max_input_chars_per_word", 100), 100)
    ids = _object("model.vocab", model.get("vocab"))
    for token, number in ids.items():
        if not (is_text(token) and is_int(number, 0, 2**31)):
            raise ValueError(f"model.vocab must lead from text to an int >= 0; got {reprlib.repr({token: number})}")
    normalizer = _object("normalizer", root.get("normalizer"))
    _must("normalizer.type", normalizer.get("type"), "BertNormalizer")
    chosen = {option: normalizer.get(option, default) for option, default in NORMALIZER.items()}
    for option, value in chosen.items():
        _must(f"normalizer.{option}", value, True, False, *([None] if option == "strip_accents" else []))
    _must("pre_tokenizer.type", _object("pre_tokenizer", root.get("pre_tokenizer")).get("type"), "BertPreTokenizer")
    marks = _object("post_processor", root.get("post_processor"))
    _must("post_processor.type", marks.get("type"), "TemplateProcessing", "BertProcessing")
    if marks["type"] == "TemplateProcessing":
        _must("post_processor.single", marks.get("single"), TEMPLATE)
    else:
        _must("post_processor.cls", marks.get("cls"), ["[CLS]", ids.get("[CLS]")])
        _must("post_processor.sep", marks.get("sep"), ["[SEP]", ids.get("[SEP]")])
    for added in root.get("added_tokens") or []:
        content = _object("each of added_tokens", added).get("content")
        if not isinstance(content, str) or content not in ids:
            raise ValueError(f"added_tokens must be in model.vocab; got {reprlib.repr(content)}")
    return Vocabulary(ids, chosen)

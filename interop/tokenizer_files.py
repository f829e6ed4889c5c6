"""A tokenizer that was learned here as the files that `transformers` reads."""

import json
import pathlib
from typing import Any

from batiste.data import Tokenizer
from batiste.data.huggingface_tokenizer import tokenizers_package
from batiste.data.tokenizer import PROBE, SPACE, TAB
from batiste.data.vocabulary_files import (
    BYTE, CONTROL, UNKNOWN, USER_DEFINED, merging, model_of, pieces_of,
)

SAMPLE = PROBE.replace("<s>", "").replace(SPACE, "") + "def f(self, x):\n\treturn [x] * 23  # été\n"


def write_tokenizer(
    folder: pathlib.Path, tokenizer: Tokenizer, max_length: int, source: bool = False,
) -> None:
    """Writes the .model where there is one, then tokenizer.json and tokenizer_config.json.

    source: whether texts are what an encoder reads for a decoder, before which we put nothing.
    Raises ValueError without the package `tokenizers`, and where what was written encodes text in
    another way. As `transformers` has it, U+2581 comes back as a space, and names of special tokens
    in a text are these, like names of bytes ("<0x41>") in the unigram model; and of equally likely
    pieces of that model it may take others than SentencePiece.
    """
    if tokenizer.name == "sentencepiece":
        (folder / tokenizer.file_name).write_bytes(tokenizer.model)
    described = _described(tokenizer)
    if source and tokenizer.name != "huggingface":
        described["post_processor"] = None
    text = json.dumps(described, ensure_ascii=False)
    found = tokenizers_package().Tokenizer.from_str(text).encode(SAMPLE).ids
    begin_ids = tokenizer.source_begin_ids if source else tokenizer.begin_ids
    expected = [*begin_ids, *tokenizer.encode(SAMPLE)]
    if described["model"]["type"] == "Unigram":  # Of equally likely pieces it may take others.
        found, expected = (_likelihood(described, ids) for ids in (found, expected))
    # One that was imported is written as it came, also with a space before every text.
    if tokenizer.name != "huggingface" and found != expected:
        raise ValueError(f"tokenizer.json would encode {SAMPLE!r} as {found}, and not {expected}")
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    names = {token["id"]: token["content"] for token in described["added_tokens"]}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    } | {f"{kind}_token": names[token] for kind, token in (
        ("bos", tokenizer.bos_id), ("eos", tokenizer.end_id), ("pad", tokenizer.pad_id))
        if token in names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _likelihood(described: dict[str, Any], ids: list[int]) -> float:
    return round(sum(described["model"]["vocab"][token][1] for token in ids), 2)


def _described(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a tokenizer.json holds."""
    if tokenizer.name == "huggingface":
        return json.loads(json.loads(tokenizer.model)["tokenizer"])
    if tokenizer.name == "bytes":
        pieces = [("<pad>", 0.0, CONTROL), ("<s>", 0.0, CONTROL),
                  *((f"<0x{value:02X}>", 0.0, BYTE) for value in range(256))]
        return _file(pieces, merging(pieces), tokenizer.bos_id)
    proto, pieces = pieces_of(tokenizer.model)
    return _file(pieces, model_of(proto.trainer_spec.model_type, pieces), tokenizer.bos_id)


def _file(
    pieces: list[tuple[str, float, int]], model: dict[str, Any], bos_id: int
) -> dict[str, Any]:
    spelled = [(spells, by) for spells, by in ((" ", SPACE), ("\t", TAB))
               if any(by in piece for piece, _, _ in pieces)]

    def replaced(old: str, new: str) -> dict[str, Any]:
        return {"type": "Replace", "pattern": {"String": old}, "content": new}

    added = [
        {"id": index, "content": piece, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": kind != USER_DEFINED}
        for index, (piece, _, kind) in enumerate(pieces)
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    begin = pieces[bos_id][0]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [replaced(*pair) for pair in spelled]}
        if spelled else None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": begin, "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": begin, "type_id": 0}},
                     {"Sequence": {"id": "A", "type_id": 0}},
                     {"SpecialToken": {"id": begin, "type_id": 1}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {begin: {"id": begin, "ids": [bos_id], "tokens": [begin]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "ByteFallback"}, {"type": "Fuse"},
            *(replaced(new, old) for old, new in spelled)]},
        "model": model,
    }

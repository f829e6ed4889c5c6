"""A tokenizer.json made of what older models come with: tokenizer.model, or vocab.json and merges.txt."""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from batiste.data.json_files import read_json, shown
from batiste.data.tokenizer import SPACE

MODEL, MERGES = "tokenizer.model", ("vocab.json", "merges.txt")
UNIGRAM, BPE, CHARACTERS = 1, 2, 4  # SentencePiece's numbers of kinds of models,
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # and of pieces.
NEVER = -1e6  # A score for names of bytes, "<0x41>": read as one only beside unknown characters.
QWEN_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a class of `transformers`, or else a model of this type, cuts text before it merges bytes.
BYTE_LEVEL = {
    "GPT2Tokenizer": "gpt2", "RobertaTokenizer": "roberta", "BartTokenizer": "roberta",
    "Qwen2Tokenizer": "qwen2", "gpt2": "gpt2", "roberta": "roberta", "bart": "roberta",
    "qwen2": "qwen2", "qwen3": "qwen2", "qwen3_moe": "qwen2",
}
SPECIAL = {"gpt2": ("<|endoftext|>",), "qwen2": ("<|endoftext|>",),
           "roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>")}
NAMED = (str, {"content": str}, None)
ADDED = {"content": str, "special": bool | None}
SETTINGS = {
    "tokenizer_class": str | None, "add_bos_token": bool | None, "add_eos_token": bool | None,
    "bos_token": NAMED, "eos_token": NAMED,
    "added_tokens_decoder": (dict[str, ADDED], None),
}
INSTEAD = ("save it as tokenizer.json with transformers' "
           "AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY), and import that")


def has_vocabulary(names: Iterable[str]) -> bool:
    """Whether files of these names have a tokenizer that `vocabulary_json` makes."""
    return MODEL in names or set(MERGES) <= set(names)


def vocabulary_json(folder: pathlib.Path, tokenizers: Any) -> tuple[str, dict[str, str]]:
    """The tokenizer.json of a directory without one, and the tokens that begin and end a text.

    tokenizers: the package. Raises ValueError for a SentencePiece model that normalizes text or has
    no bytes to fall back to, and for merges of which nothing says how text is cut before them.
    """
    path = folder / "tokenizer_config.json"
    settings = read_json(path, SETTINGS) if path.is_file() else {}
    if (folder / MODEL).is_file():
        return _sentencepiece_json(folder / MODEL, settings)
    return _merges_json(folder, settings, tokenizers), {}


def pieces_of(model: bytes) -> tuple[Any, list[tuple[str, float, int]]]:
    """A SentencePiece model's protocol buffer, and its pieces with their scores and kinds."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    except DecodeError as error:
        raise ValueError(f"not a SentencePiece model: {error}") from None
    return proto, [(each.piece, each.score, each.type) for each in proto.pieces]


def model_of(kind: int, pieces: list[tuple[str, float, int]]) -> dict[str, Any]:
    """The model of a tokenizer.json with these pieces."""
    if kind not in (UNIGRAM, BPE, CHARACTERS):
        raise ValueError("a SentencePiece model of whole words has no tokenizer.json")
    return likeliest(pieces) if kind == UNIGRAM else merging(pieces)


def merging(pieces: list[tuple[str, float, int]]) -> dict[str, Any]:
    """Byte-pair encoding: pieces that are text, the best first, each from any two others."""
    vocabulary = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    text = {piece: score for piece, score, kind in pieces if kind not in (CONTROL, UNKNOWN, BYTE)}
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in sorted(text, key=lambda piece: (-text[piece], vocabulary[piece]))
        for cut in range(1, len(piece)) if piece[:cut] in text and piece[cut:] in text
    ]
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": True,
            "ignore_merges": False, "vocab": vocabulary, "merges": merges}


def likeliest(pieces: list[tuple[str, float, int]]) -> dict[str, Any]:
    """The unigram model: the pieces whose scores add up to the most."""
    scored = [[piece, NEVER if kind in (CONTROL, UNKNOWN, BYTE) else score]
              for piece, score, kind in pieces]
    unknown = next(index for index, each in enumerate(pieces) if each[2] in (UNKNOWN, CONTROL))
    return {"type": "Unigram", "unk_id": unknown, "vocab": scored, "byte_fallback": True}


def _sentencepiece_json(
    path: pathlib.Path, settings: Mapping[str, Any]
) -> tuple[str, dict[str, str]]:
    try:
        proto, pieces = pieces_of(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    normalizer, names = proto.normalizer_spec, [piece for piece, _, _ in pieces]
    lossless = not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces
    if proto.trainer_spec.model_type != BPE or not lossless or sum(
            kind == BYTE for _, _, kind in pieces) != 256 or len(set(names)) != len(names):
        raise ValueError(f"{path}: is no byte-pair encoding with bytes for unknown characters that "
                         f"leaves text as it is, which alone is read here: {INSTEAD}")
    ids = {"bos": proto.trainer_spec.bos_id, "eos": proto.trainer_spec.eos_id}
    found = {f"{kind}_token": names[token] for kind, token in ids.items() if 0 <= token < len(names)}
    first = found.get("bos_token") if settings.get("add_bos_token") is not False else None
    last = found.get("eos_token") if settings.get("add_eos_token") else None
    around = [_special(first), {"Sequence": {"id": "A", "type_id": 0}}, _special(last)]
    marks = [mark for mark in (first, last) if mark is not None]
    prefix = normalizer.add_dummy_prefix
    described = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": index, "content": piece, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": kind != USER_DEFINED}
            for index, (piece, _, kind) in enumerate(pieces)
            if kind in (CONTROL, UNKNOWN, USER_DEFINED)],
        "normalizer": {"type": "Sequence", "normalizers": [
            *([{"type": "Prepend", "prepend": SPACE}] if prefix else []),
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": [each for each in around if each],
            "pair": [*(each for each in around if each), {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {mark: {"id": mark, "ids": [names.index(mark)], "tokens": [mark]}
                               for mark in marks}} if marks else None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else [])]},
        "model": model_of(BPE, pieces),
    }
    return json.dumps(described, ensure_ascii=False), found


def _special(token: str | None) -> dict[str, Any] | None:
    return None if token is None else {"SpecialToken": {"id": token, "type_id": 0}}


def _merges_json(folder: pathlib.Path, settings: Mapping[str, Any], tokenizers: Any) -> str:
    config = folder / "config.json"
    said = read_json(config, {"model_type": str | None}) if config.is_file() else {}
    name = (settings.get("tokenizer_class") or said.get("model_type") or "").removesuffix("Fast")
    kind = BYTE_LEVEL.get(name)
    if kind is None:
        raise ValueError(f"{folder}: {' and '.join(MERGES)} do not say how text is cut, and of "
                         f"{shown(name)} it is not known here: {INSTEAD}")
    vocabulary = read_json(folder / MERGES[0], dict[str, int])
    lines = _lines(folder / MERGES[1])
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if any(len(merge) != 2 for merge in merges):
        wrong = next(merge for merge in merges if len(merge) != 2)
        raise ValueError(f"{folder / MERGES[1]}: {shown(' '.join(wrong))}: expected two tokens a line")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "qwen2")
    made.pre_tokenizer, made.decoder = byte_level, tokenizers.decoders.ByteLevel()
    if kind == "qwen2":
        cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_CUT), "isolated")
        made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([cut, byte_level])
        made.normalizer = tokenizers.normalizers.NFC()
    _add_tokens(made, folder, settings, SPECIAL[kind], tokenizers)
    if kind == "roberta":
        ends = [(name, made.token_to_id(name)) for name in ("</s>", "<s>")]
        if None in (token for _, token in ends):
            raise ValueError(f"{folder / MERGES[0]}: has no <s> or no </s>, which are around a text")
        made.post_processor = tokenizers.processors.RobertaProcessing(
            *ends, trim_offsets=True, add_prefix_space=False)
    return made.to_str()


def _add_tokens(
    made: Any, folder: pathlib.Path, settings: Mapping[str, Any], special: Iterable[str],
    tokenizers: Any,
) -> None:
    """Adds the tokens that other files have, each of which must get the id that it has there."""
    known = {name: (made.token_to_id(name), True) for name in special if made.token_to_id(name)
             is not None}
    for index, token in (settings.get("added_tokens_decoder") or {}).items():
        if not index.isdecimal():
            raise ValueError(f"{folder}/tokenizer_config.json: added_tokens_decoder has "
                             f"{shown(index)}: expected a whole number")
        known[token["content"]] = int(index), token.get("special") is not False
    path = folder / "added_tokens.json"
    for name, index in (read_json(path, dict[str, int]) if path.is_file() else {}).items():
        known.setdefault(name, (index, True))
    for name, (index, is_special) in sorted(known.items(), key=lambda item: item[1][0]):
        lstrip = name == "<mask>"
        add = made.add_special_tokens if is_special else made.add_tokens
        add([tokenizers.AddedToken(name, special=is_special, normalized=False, lstrip=lstrip)])
        if made.token_to_id(name) != index:
            raise ValueError(f"{folder}: the token {shown(name)} has id {index}, but behind the "
                             f"vocabulary it gets {made.token_to_id(name)}: {INSTEAD}")


def _lines(path: pathlib.Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except UnicodeError as error:
        raise ValueError(f"{path}: is no UTF-8: {error}") from None

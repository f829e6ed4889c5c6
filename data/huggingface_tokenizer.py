"""A tokenizer.json of Hugging Face's `tokenizers`, behind the interface of all tokenizers here."""

import contextlib
import hashlib
import json
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

from batiste.data.json_files import MAX_TOKENIZER_BYTES, parse_json, read_json, shown
from batiste.data.tokenizer import PROBE, SPACE, Tokenizer
from batiste.data.vocabulary_files import has_vocabulary, vocabulary_json
from batiste.data.wordpiece import VOCABULARY, wordpiece_json

SUFFIX = ".json"
BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json",
         "generation_config.json")
# What a packed tokenizer knows of the model: a token each, then lists of them. stop_ids end a
# continuation; begin_ids and close_ids are around a text; start_ids begin what a decoder writes.
IDS = ("bos_id", "end_id", "pad_id", "stop_ids", "begin_ids", "close_ids", "start_ids")
# The decoder_start_token_id of classes of `transformers` whose config.json may leave it out; T5's
# has none, and begins with its padding.
START_IDS = {"bart": [2], "marian": [58100], "t5": [0]}


MOST_TOKENS = 2**21  # Eight times the largest published vocabulary; a table has a row for each id.
STEP = dict | None
ADDED = {"id": int, "content": str, "special": bool}
KIND = {  # Of a tokenizer.json.
    "model": {"type": str | None, "vocab": dict[str, int] | list, "merges": list | None},
    "added_tokens": (list[ADDED], None),
    "normalizer": STEP, "pre_tokenizer": STEP, "decoder": STEP, "post_processor": STEP,
}
NAMED = (str, {"content": str}, None)
PACKED = {"tokenizer": str, "bos_id": int, "end_id": int, "pad_id": int, "begin_ids": list[int]}
SETTINGS = {f"{kind}_token": NAMED for kind in ("bos", "eos", "pad")} | {
    f"{kind}_token_id": int | list[int] | None
    for kind in ("bos", "eos", "pad", "decoder_start", "forced_bos")} | {"model_type": str | None}


class HuggingFaceTokenizer(Tokenizer):
    """A byte-level BPE, or one with byte fallback that spells a space U+2581.

    model: JSON with the tokenizer.json as text ("tokenizer") and ids (IDS); `pack` makes it. Text
    that looks like a special token is text. A dummy prefix is turned off, as for SentencePiece.
    Raises ValueError for a tokenizer that could not give every text back.
    """

    file_name = "tokenizer" + SUFFIX

    def __init__(self, model: bytes):
        self.model = model
        packed = unpacked(model)
        described = described_in(packed["tokenizer"], "its tokenizer")
        if missing := [name for name in IDS if name not in packed]:
            raise ValueError(f"has no {', '.join(missing)}, so an older batiste imported it: import "
                             "the model again")
        _require_special(described, (packed["bos_id"], packed["end_id"]))
        with package_errors("its tokenizer"):
            self._tokenizer = tokenizers_package().Tokenizer.from_str(
                json.dumps(_without_dummy_prefix(described)))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._byte_ids = None if _is_byte_level(described) else _byte_ids(described)
        ids = [packed[name] for name in IDS]
        needed = {*ids[:3], *(token for several in ids[3:] for token in several)}
        token_bytes = _needed(_token_bytes(described), needed)
        for name, token in zip(IDS[:3], ids[:3], strict=True):
            if not 0 <= token < len(token_bytes):
                raise ValueError(f"{name}={token}: expected less than {len(token_bytes)}, its number "
                                 "of tokens")
        super().__init__("huggingface", token_bytes, packed["bos_id"], packed["pad_id"])
        self.special = {token["content"]: token["id"] for token in described["added_tokens"]
                        if token["special"]}
        self.end_id, self.stop_ids = packed["end_id"], tuple(packed["stop_ids"])
        self.begin_ids = self.source_begin_ids = tuple(packed["begin_ids"])
        self.source_end_ids = tuple(packed["close_ids"])
        self.start_ids = tuple(packed["start_ids"])
        self.hash = hashlib.sha256(model).hexdigest()
        if '"NFC"' in json.dumps(described["normalizer"]):
            self.normal_form = "NFC"
        probe = unicodedata.normalize(self.normal_form, PROBE) if self.normal_form else PROBE
        with package_errors("its tokenizer"):
            encoded = self.encode(probe)
        if any(token >= len(token_bytes) for token in encoded) or self.decode(encoded) != probe:
            raise ValueError("the tokenizer normalizes text, so it would not give it back; expected "
                             "a byte-level one, or one with byte fallback, and no normalization "
                             "but NFC")

    def encode_batch(self, texts):
        if self._byte_ids is not None and any(SPACE in text for text in texts):
            return [self._encode_apart(text) for text in texts]
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def _encode_apart(self, text: str) -> list[int]:
        """Encodes what would come back as a space as bytes, the rest as usual."""
        first, *others = text.split(SPACE)
        ids = list(self._tokenizer.encode(first, add_special_tokens=False).ids)
        for part in others:
            ids += [self._byte_ids[value] for value in SPACE.encode()]
            ids += self._tokenizer.encode(part, add_special_tokens=False).ids
        return ids


def pack(folder: pathlib.Path) -> bytes:
    """What `HuggingFaceTokenizer` takes, of a directory with a tokenizer.json, or what is older.

    Raises ValueError where nothing in it says which token begins or ends a document.
    """
    settings = {name: read_json(folder / name, SETTINGS)
                for name in FILES[1:] if (folder / name).is_file()}
    text, also_named = _described(folder)
    with package_errors(f"{folder}: the tokenizer"):
        tokenizer = tokenizers_package().Tokenizer.from_str(text)
        begin_ids, close_ids = _template(tokenizer)

    def ids_of(kind: str) -> list[int]:
        """The tokens of a kind, those that the tokenizer's files name before the model's."""
        named = [settings.get(name, {}).get(f"{kind}_token") for name in reversed(FILES[1:3])]
        named += [also_named.get(f"{kind}_token")]
        named = [each.get("content") if isinstance(each, dict) else each for each in named]
        found = [tokenizer.token_to_id(each) for each in named if each is not None]
        for name in reversed(FILES[3:]):
            given = settings.get(name, {}).get(f"{kind}_token_id")
            found += given if isinstance(given, list) else [given]
        for token in found:
            if token is not None and token >= MOST_TOKENS:
                raise ValueError(f"from={folder}: {kind}_token_id={token}: expected less than "
                                 f"{MOST_TOKENS}")
        # A token of -1, as the first Llama has it, is none.
        return list(dict.fromkeys(token for token in found if token is not None and token >= 0))

    ends = ids_of("eos") or list(close_ids[-1:])
    bos_id = next(iter((*begin_ids, *ids_of("bos"), *ends)), None)
    if bos_id is None:
        raise ValueError(f"from={folder}: neither tokenizer_config.json nor config.json has a "
                         "bos_token or eos_token, with which documents would begin and end")
    ends = ends or [bos_id]
    pads = [*ids_of("pad"), tokenizer.token_to_id("[PAD]")]  # The last is BERT's.
    pad_id = next((token for token in pads if token is not None), ends[0])
    start = ids_of("decoder_start") or START_IDS.get(settings.get("config.json", {}).get("model_type"))
    return json.dumps({
        "bos_id": bos_id, "end_id": ends[0], "pad_id": pad_id, "stop_ids": ends,
        "begin_ids": begin_ids, "close_ids": close_ids,
        "start_ids": [*(start or [bos_id])[:1], *ids_of("forced_bos")[:1]], "tokenizer": text,
    }).encode()


def _template(tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    start = next((start for start in range(len(whole) + 1)
                  if whole[start:start + len(plain)] == plain), None)
    if start is None:
        raise ValueError("its post_processor changes the tokens of a text: expected one that puts "
                         "special tokens around them")
    return whole[:start], whole[start + len(plain):]


def _described(folder: pathlib.Path) -> tuple[str, dict[str, str]]:
    """The tokenizer.json of a directory, and names of tokens that no other file has."""
    if not (folder / FILES[0]).is_file():
        with package_errors(f"{folder}: the tokenizer"):
            if (folder / VOCABULARY).is_file():
                return wordpiece_json(folder, tokenizers_package()), {}
            return vocabulary_json(folder, tokenizers_package())
    data = (folder / FILES[0]).open("rb").read(MAX_TOKENIZER_BYTES + 1)
    described_in(data, str(folder / FILES[0]))
    return data.decode("utf-8-sig"), {}


def described_in(data: bytes | str, where: str) -> dict[str, Any]:
    """What a tokenizer.json says; ValueError for what is none, or has numbers out of range."""
    if len(data) > MAX_TOKENIZER_BYTES:
        raise ValueError(f"{where}: has more than {MAX_TOKENIZER_BYTES:,} bytes")
    described = {"added_tokens": []} | parse_json(data, where, KIND)
    described |= {"added_tokens": described["added_tokens"] or []}
    described |= {step: described.get(step) for step in ("normalizer", "pre_tokenizer", "decoder")}
    vocab = described["model"]["vocab"]
    ids = [*(vocab.values() if isinstance(vocab, dict) else ()),
           *(token["id"] for token in described["added_tokens"])]
    if not vocab or not ids or min(ids) < 0 or max(ids) >= MOST_TOKENS:
        raise ValueError(f"{where}: model.vocab: expected tokens with ids from 0 to {MOST_TOKENS}")
    return described


def unpacked(data: bytes) -> dict[str, Any]:
    """What `pack` made; ValueError for what it did not."""
    return parse_json(data, "not a tokenizer that `batiste import` wrote", PACKED)


@contextlib.contextmanager
def package_errors(what: str) -> Iterator[None]:
    """Makes one line of what the package `tokenizers` raises, which is of no narrower type."""
    try:
        yield
    except ValueError:
        raise
    except BaseException as error:
        # A panic of its Rust code is an exception that is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what} cannot be used: {shown(str(error), 300)}") from None


def can_pack(names: Iterable[str]) -> bool:
    """Whether files of these names have a tokenizer that `pack` can read."""
    names = list(names)
    return FILES[0] in names or VOCABULARY in names or has_vocabulary(names)


def tokenizers_package():
    """Hugging Face's `tokenizers`; ValueError names the extra that brings it."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "a tokenizer.json needs the package tokenizers: pip install 'batiste[hf]'") from None
    return tokenizers


def _without_dummy_prefix(described: dict[str, Any]) -> dict[str, Any]:
    """The same without a space before the text, so that tokens stand for its bytes exactly."""
    changed = dict(described)
    for part in ("normalizer", "pre_tokenizer"):
        changed[part] = _changed(described.get(part))
    return changed


def _changed(step: dict[str, Any] | None) -> dict[str, Any] | None:
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        name = next(name for name in ("normalizers", "pretokenizers") if name in step)
        return step | {name: [each for each in map(_changed, step[name]) if each is not None]}
    if step["type"] == "Metaspace":
        return step | {"prepend_scheme": "never"}
    return step | {"add_prefix_space": False} if "add_prefix_space" in step else step


def _token_bytes(described: Mapping[str, Any]) -> list[bytes]:
    """What each token stands for; special tokens stand for no text."""
    vocab = described["model"]["vocab"]
    if not isinstance(vocab, dict):
        raise ValueError(f"its model is {described['model']['type']}: expected BPE")
    byte_level = _is_byte_level(described)
    spelled = _spelled_bytes()
    added = {token["id"]: token for token in described["added_tokens"]}
    pieces = {index: piece for piece, index in vocab.items()}
    found = []
    for index in range(max([*pieces, *added]) + 1):
        if index in added:
            found.append(b"" if added[index]["special"] else added[index]["content"].encode())
        elif index not in pieces:
            found.append(b"")
        elif byte_level:
            # A character that spells no byte is never made of text.
            found.append(bytes(spelled[character] for character in pieces[index]
                               if character in spelled))
        elif BYTE.fullmatch(pieces[index]):
            found.append(bytes([int(pieces[index][3:5], 16)]))
        else:
            found.append(pieces[index].replace(SPACE, " ").encode())
    return found


def _require_special(described: dict[str, Any], ids: tuple[int, ...]) -> None:
    """Makes tokens special, so that no text is read as one of them."""
    for token in described["added_tokens"]:
        token["special"] = token["special"] or token["id"] in ids


def _needed(token_bytes: list[bytes], ids: Set[int]) -> list[bytes]:
    """Without special tokens at the end, which a model's vocabulary need not have (Gemma 3's)."""
    last = max(index for index, piece in enumerate(token_bytes) if piece or index in ids)
    return token_bytes[: last + 1]


def _is_byte_level(described: Mapping[str, Any]) -> bool:
    return "ByteLevel" in json.dumps([described["decoder"], described["pre_tokenizer"]])


def _byte_ids(described: Mapping[str, Any]) -> list[int]:
    vocab = described["model"]["vocab"]
    names = [f"<0x{value:02X}>" for value in range(256)]
    if not all(name in vocab for name in names):
        raise ValueError("the tokenizer has neither bytes for characters nor a byte fallback, so it "
                         "would lose text")
    return [vocab[name] for name in names]


def _spelled_bytes() -> dict[str, int]:
    """The byte of each character of a byte-level vocabulary: itself where that can be printed, else
    one of the characters from U+0100 on, in order."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printed]
    return ({chr(value): value for value in printed}
            | {chr(0x100 + place): value for place, value in enumerate(others)})

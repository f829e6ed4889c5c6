"""A tokenizer.json of Hugging Face's `tokenizers`, behind the interface of all tokenizers here."""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from batiste.data.tokenizer import PROBE, SPACE, Tokenizer
from batiste.data.wordpiece import VOCABULARY, wordpiece_json

SUFFIX = ".json"
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json",
         "generation_config.json")


class HuggingFaceTokenizer(Tokenizer):
    """A byte-level BPE, or one with byte fallback that spells a space U+2581.

    model: JSON with the tokenizer.json as text ("tokenizer"), "bos_id", "end_id", "pad_id" and
    "begin_ids", what a prompt begins with; `pack` makes it. Text that looks like a special token is
    text. A dummy prefix is turned off, as for SentencePiece. Raises ValueError for a tokenizer that
    could not give every text back.
    """

    file_name = "tokenizer" + SUFFIX

    def __init__(self, model: bytes):
        self.model = model
        try:
            packed = json.loads(model)
            described = json.loads(packed["tokenizer"])
        except (ValueError, KeyError, TypeError):
            raise ValueError("not a tokenizer that `batiste import` wrote") from None
        self._tokenizer = tokenizers_package().Tokenizer.from_str(
            json.dumps(_without_dummy_prefix(described)))
        self._tokenizer.encode_special_tokens = True
        self._byte_ids = None if _is_byte_level(described) else _byte_ids(described)
        ids = (packed["bos_id"], packed["pad_id"], packed["end_id"], *packed["begin_ids"])
        super().__init__("huggingface", _needed(_token_bytes(described), ids), *ids[:2])
        self.special = {token["content"]: token["id"] for token in described["added_tokens"]
                        if token["special"]}
        self.end_id, self.begin_ids = packed["end_id"], tuple(packed["begin_ids"])
        self.hash = hashlib.sha256(model).hexdigest()
        if self.decode(self.encode(PROBE)) != PROBE:
            raise ValueError("the tokenizer normalizes text, so it would not give it back; expected "
                             "a byte-level one, or one with byte fallback and no normalization")

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
    """What `HuggingFaceTokenizer` takes, of a directory with a tokenizer.json, or BERT's vocab.txt.

    Raises ValueError where nothing in it says which token begins or ends a document.
    """
    settings = {name: json.loads((folder / name).read_text())
                for name in FILES if (folder / name).is_file()}
    text = _described(folder)
    tokenizer = tokenizers_package().Tokenizer.from_str(text)

    def of(kind: str) -> int | None:
        for name in reversed(FILES[1:3]):
            token = settings.get(name, {}).get(f"{kind}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None and tokenizer.token_to_id(token) is not None:
                return tokenizer.token_to_id(token)
        for name in reversed(FILES[3:]):
            found = settings.get(name, {}).get(f"{kind}_token_id")
            found = found[0] if isinstance(found, list) else found
            if found is not None:
                return found
        return None

    begin_ids = tokenizer.encode("").ids
    bos_id, end_id, pad_id = of("bos"), of("eos"), of("pad")
    pad_id = tokenizer.token_to_id("[PAD]") if pad_id is None else pad_id  # BERT's.
    bos_id = next((each for each in (*begin_ids, bos_id, end_id) if each is not None), None)
    if bos_id is None:
        raise ValueError(f"from={folder}: neither tokenizer_config.json nor config.json has a "
                         "bos_token or eos_token, with which documents would begin and end")
    end_id = bos_id if end_id is None else end_id
    return json.dumps({"bos_id": bos_id, "end_id": end_id, "begin_ids": begin_ids,
                       "pad_id": end_id if pad_id is None else pad_id, "tokenizer": text}).encode()


def _described(folder: pathlib.Path) -> str:
    if not (folder / FILES[0]).is_file():
        return wordpiece_json(folder, tokenizers_package())
    return (folder / FILES[0]).read_text()


def can_pack(names: Iterable[str]) -> bool:
    """Whether files of these names have a tokenizer that `pack` can read."""
    return FILES[0] in names or VOCABULARY in names


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
            found.append(bytes(spelled[character] for character in pieces[index]))
        elif pieces[index].startswith("<0x") and len(pieces[index]) == 6:
            found.append(bytes([int(pieces[index][3:5], 16)]))
        else:
            found.append(pieces[index].replace(SPACE, " ").encode())
    return found


def _needed(token_bytes: list[bytes], ids: tuple[int, ...]) -> list[bytes]:
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

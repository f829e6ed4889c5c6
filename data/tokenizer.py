"""Text to token ids and back, without losing a byte.

Every token stands for fixed bytes, so decoding is a table and a join: whatever SentencePiece does
to show its pieces (U+2581 for a space) cannot leak into the text.
"""

import abc
import codecs
import hashlib
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np

# SentencePiece spells a space U+2581, so a U+2581 of the text itself would come back as a space.
SPACE = "\u2581"
# It keeps the tab for itself in training, so a tab is learned as this private-use character.
TAB = "\ue009"
# What a tokenizer that normalizes, or spells something twice, does not give back.
PROBE = "  \uff21e\u0301\u212b \t\n\r\n  a\u00a0\u3000b  <s>\u200d\ufb01 "


class Tokenizer(abc.ABC):
    """Encodes any text that UTF-8 can hold; `decode(encode(text)) == text`.

    normal_form: None, or the form ("NFC") that text is brought into, and comes back in.

    name: "bytes", "sentencepiece" or "huggingface". hash: of everything that decides an encoding.
    bos_id begins each document and end_id ends it: one token, or two. Neither is ever made from
    text, and both stand for no text. pad_id fills rows; it may be one of them.
    begin_ids: what a decoder's prompt begins with. stop_ids: the tokens any of which ends a
    continuation, end_id among them.
    source_begin_ids, source_end_ids: what an encoder reads before and after a text, if a decoder is
    to write about it. start_ids: what that decoder begins with; it is trained to begin with the
    first alone.
    special: ids of an imported tokenizer's special tokens, by name.
    model: what is written to `file_name` beside records, None for "bytes".
    byte_lengths_V (int32) is the number of bytes each token stands for.
    """

    file_name: str | None = None
    model: bytes | None = None

    def __init__(self, name: str, token_bytes: Sequence[bytes], bos_id: int, pad_id: int):
        self.name = name
        self.vocab_size = len(token_bytes)
        self.bos_id, self.pad_id = bos_id, pad_id
        self.begin_ids, self.end_id = (bos_id,), bos_id
        self.stop_ids: tuple[int, ...] = (bos_id,)
        self.source_begin_ids: tuple[int, ...] = ()
        self.source_end_ids: tuple[int, ...] = ()
        self.start_ids: tuple[int, ...] = (bos_id,)
        self.special: dict[str, int] = {}
        self.normal_form: str | None = None
        self.byte_lengths_V = np.array([len(piece) for piece in token_bytes], np.int32)
        self.hash = hashlib.sha256(repr((name, bos_id, pad_id, token_bytes)).encode()).hexdigest()
        self._token_bytes = token_bytes

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of `text`, without BOS."""
        return self.encode_batch([text])[0]

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the tokens of each text, using every core."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self._token_bytes.__getitem__, ids)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes that a token stands for."""
        return self._token_bytes[token]

    def stream(self) -> "TextStream":
        """Returns a decoder for one token at a time."""
        return TextStream(self._token_bytes)


class TextStream:
    """Decodes tokens as they come, holding back a character until all of its bytes are here."""

    def __init__(self, token_bytes: Sequence[bytes]):
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Returns the text that `token` completes."""
        return self._decoder.decode(self._token_bytes[token])

    def finish(self) -> str:
        """Returns U+FFFD for a character left incomplete, or nothing."""
        return self._decoder.decode(b"", final=True)


class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8, after padding (0) and BOS (1)."""

    def __init__(self):
        specials = [b"", b""]
        super().__init__("bytes", specials + [bytes([value]) for value in range(256)], 1, 0)

    def encode_batch(self, texts):
        return [(np.frombuffer(text.encode(), np.uint8) + np.uint16(2)).tolist() for text in texts]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with byte fallback and no normalization.

    model: the bytes of a .model file. Raises ValueError if it could not give every text back.
    A dummy prefix is turned off, so that tokens stand for exactly the bytes of the text.
    """

    file_name = "tokenizer.model"

    def __init__(self, model: bytes):
        import sentencepiece
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(_without_dummy_prefix(model))
        pieces = [processor.IdToPiece(i) for i in range(processor.vocab_size())]
        # Kept as spelled only by our own training; another model's tab goes the way it learned.
        self._maps_tab = TAB in pieces
        tab = TAB if self._maps_tab else ""
        # One that was learned without a space would spell it as the bytes of U+2581.
        space = "" if SPACE in pieces else " "
        self._apart = re.compile(f"([{SPACE}{tab}{space}]+)")
        self._byte_ids = {processor.IdToPiece(i): i for i in range(len(pieces))
                          if processor.IsByte(i)}
        if len(self._byte_ids) != 256:
            raise ValueError("the tokenizer has no byte fallback, so it would lose text; "
                             "expected a model trained with --byte_fallback")
        if processor.bos_id() < 0:
            raise ValueError("the tokenizer has no BOS piece to begin a document with; "
                             "expected a model trained with --bos_id")
        self._processor, self.model = processor, model
        # With byte fallback the unknown piece never occurs, so it can be the padding.
        pad_id = processor.pad_id() if processor.pad_id() >= 0 else processor.unk_id()
        token_bytes = [self._bytes_of(i, piece) for i, piece in enumerate(pieces)]
        super().__init__("sentencepiece", token_bytes, processor.bos_id(), pad_id)
        if processor.eos_id() >= 0:  # Our own training makes none: BOS also ends a document.
            self.end_id, self.stop_ids = processor.eos_id(), (processor.eos_id(),)
        self.hash = hashlib.sha256(model).hexdigest()
        self._require_lossless()

    def _bytes_of(self, token: int, piece: str) -> bytes:
        processor = self._processor
        if processor.IsByte(token):
            return bytes([int(piece[1:-1], 16)])
        if processor.IsControl(token) or processor.IsUnknown(token) or processor.IsUnused(token):
            return b""
        text = piece.replace(SPACE, " ")
        return (text.replace(TAB, "\t") if self._maps_tab else text).encode()

    def _require_lossless(self) -> None:
        if self.decode(self.encode(PROBE)) != PROBE:
            raise ValueError("the tokenizer normalizes text, so it would not give it back; "
                             "expected a model trained with --normalization_rule_name=identity "
                             "--remove_extra_whitespaces=false")

    def encode_batch(self, texts):
        if any(self._apart.search(text) for text in texts):
            return [self._encode_apart(text) for text in texts]
        if self._maps_tab:
            texts = [text.replace("\t", TAB) for text in texts]
        return self._processor.EncodeAsIds(list(texts), num_threads=os.cpu_count())

    def _encode_apart(self, text: str) -> list[int]:
        """Encodes the characters that SentencePiece would confuse as bytes, the rest as usual."""
        ids: list[int] = []
        for index, part in enumerate(self._apart.split(text)):
            if index % 2:
                ids += [self._byte_ids[f"<0x{value:02X}>"] for value in part.encode()]
            else:
                ids += self._processor.EncodeAsIds(
                    part.replace("\t", TAB) if self._maps_tab else part)
        return ids


def _without_dummy_prefix(model: bytes) -> bytes:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2
    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    except DecodeError as error:
        raise ValueError(f"not a SentencePiece model: {error}") from None
    proto.normalizer_spec.add_dummy_prefix = False
    return proto.SerializeToString()


def load_tokenizer(path) -> Tokenizer:
    """Returns the tokenizer of a .model or .json file or of a prepared directory, or "bytes".

    Raises ValueError if there is none, or if it could not give every text back.
    """
    if str(path) == "bytes":
        return ByteTokenizer()
    path = pathlib.Path(path)
    if path.is_dir():
        from batiste.data.prepared import load_prepared
        return load_prepared(path).tokenizer
    if not path.is_file():
        raise ValueError(f"{path}: no such tokenizer; expected a .model file, "
                         "a .json file, a prepared directory, or bytes")
    try:
        if path.suffix == ".json":
            from batiste.data.huggingface_tokenizer import HuggingFaceTokenizer
            return HuggingFaceTokenizer(path.read_bytes())
        return SentencePieceTokenizer(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

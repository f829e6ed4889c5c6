"""One or two texts to a row of tokens, cut to a length, and where in the text each token lies.

For models that read texts and do not write them: the tokenizer may lose text, as BERT's does.
"""

import abc
import hashlib
from typing import NamedTuple

import numpy as np

from batiste.data.huggingface_tokenizer import package_errors, tokenizers_package, unpacked
from batiste.data.tokenizer import Tokenizer


class Read(NamedTuple):
    """tokens; types: 0, and 1 for the second text; sides: 1 or 2 for tokens of the first or second
    text, 0 for those between; spans: first and last + 1 character of each token in its text."""

    tokens: list[int]
    types: list[int]
    sides: list[int]
    spans: list[tuple[int, int]]


class TextReader(abc.ABC):
    """hash: of everything that decides a row. pad_id: what fills it."""

    hash: str
    pad_id: int
    vocab_size: int

    @abc.abstractmethod
    def read(self, text: str, pair: str | None, max_length: int, keep_first: bool) -> Read:
        """A row of at most `max_length` tokens, cut at the end of the longer text.

        keep_first: cuts the second text alone, if there is one. Raises ValueError where it cannot.
        """


class PackedReader(TextReader):
    """What `pack_tokenizer` made of a directory's tokenizer, read with the template in it."""

    def __init__(self, packed: bytes):
        content = unpacked(packed)
        with package_errors("its tokenizer"):
            self._tokenizer = tokenizers_package().Tokenizer.from_str(content["tokenizer"])
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # What looks like one is text.
        self._separates = self._tokenizer.num_special_tokens_to_add(True) > 0
        self.pad_id, self.hash = content["pad_id"], hashlib.sha256(packed).hexdigest()
        self.vocab_size = self._tokenizer.get_vocab_size()

    def read(self, text, pair, max_length, keep_first):
        if pair is not None and not self._separates:
            raise ValueError(f"text_pair={pair[:40]!r}: this model's tokenizer puts nothing "
                             "between two texts: write both into text")
        strategy = "only_second" if keep_first and pair is not None else "longest_first"
        self._tokenizer.enable_truncation(max_length, strategy=strategy)
        try:
            found = self._tokenizer.encode(text, pair)
        except Exception as error:
            # The package raises nothing narrower when a cut cannot be made.
            raise ValueError(f"max_length={max_length} has no room beside the first text "
                             f"{text[:40]!r}: raise it ({error})") from None
        sides = [0 if side is None else side + 1 for side in found.sequence_ids]
        return Read(found.ids, found.type_ids, sides, found.offsets)


class LosslessReader(TextReader):
    """A tokenizer of ours: BOS begins each text, and tokens stand for fixed bytes."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.pad_id, self.hash = tokenizer.pad_id, tokenizer.hash
        self.vocab_size = tokenizer.vocab_size

    def read(self, text, pair, max_length, keep_first):
        texts = [text] if pair is None else [text, pair]
        rows = self._tokenizer.encode_batch(texts)
        room = max_length - len(rows)
        if keep_first and pair is not None and len(rows[0]) >= room:
            raise ValueError(f"max_length={max_length} has no room beside the first text "
                             f"{text[:40]!r}: raise it")
        for _ in range(sum(map(len, rows)) - room):
            longer = max(rows, key=len) if not keep_first else rows[-1]
            longer.pop()
        read = Read([], [], [], [])
        for index, (ids, each) in enumerate(zip(rows, texts, strict=True)):
            size = len(ids) + 1
            read.tokens.extend([self._tokenizer.bos_id, *ids])
            read.types.extend([index] * size)
            read.sides.extend([0] + [index + 1] * len(ids))
            read.spans.extend([(0, 0), *self._spans(ids, each)])
        return read

    def _spans(self, ids: list[int], text: str) -> list[tuple[int, int]]:
        """Characters of each token, those that it has only bytes of included."""
        ends = np.cumsum(self._tokenizer.byte_lengths_V[ids])
        starts = ends - self._tokenizer.byte_lengths_V[ids]
        at = np.cumsum([0, *(len(character.encode()) for character in text)])
        return list(zip((np.searchsorted(at, starts, "right") - 1).tolist(),
                        np.searchsorted(at, ends, "left").tolist(), strict=True))


def text_reader(tokenizer: Tokenizer) -> TextReader:
    """The reader of a tokenizer that encodes text here."""
    if tokenizer.name == "huggingface":
        return PackedReader(tokenizer.model)
    return LosslessReader(tokenizer)

"""Tokens that objectives need beside those of the text, and what they ask of the tokenizer's.

An imported tokenizer has some of them by other names, and its model has learned them: these are
taken. The others have ids above the tokenizer's, so that it and the stored records stay what they
are.
"""

import itertools
import math
import re
from typing import NamedTuple

import numpy as np

from batiste.data.config import DataConfig
from batiste.data.record_objective import RecordObjective
from batiste.data.tokenizer import Tokenizer

NAMES = {
    "middle": ("<prefix>", "<suffix>", "<middle>"),
    "masked": ("<mask>",),
    "order": ("<mask>", "<separator>", "<in_order>", "<swapped>"),
    "replaced": ("<mask>",),
    "denoise": ("<mask>",),
}


# What imported tokenizers call them: BERT's and RoBERTa's, T5's, and those of models of code.
THEIRS = {
    "<mask>": ("<mask>", "[MASK]"), "<separator>": ("[SEP]",),
    "<prefix>": ("<fim_prefix>", "<|fim_prefix|>"), "<suffix>": ("<fim_suffix>", "<|fim_suffix|>"),
    "<middle>": ("<fim_middle>", "<|fim_middle|>"),
}


def special_tokens(config: DataConfig) -> tuple[str, ...]:
    """The names of the special tokens that a config's objectives need, by their ids."""
    objectives, length = config.objectives, config.sequence_length
    names = [name for objective in objectives for name in NAMES.get(objective.kind, ())]
    spans = [num_spans(length, objective) for objective in objectives if objective.kind == "spans"]
    names += [f"<span_{index}>" for index in range(max(spans, default=0))]
    names += [objective.mode for objective in objectives if objective.mode is not None]
    return tuple(dict.fromkeys(names))


def special_ids(config: DataConfig, tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of these special tokens by name: the tokenizer's own, or above its vocabulary."""
    found = {}
    for name in special_tokens(config):
        theirs = THEIRS.get(name, (name.replace("<span_", "<extra_id_"),))
        found[name] = next(
            (tokenizer.special[each] for each in theirs if each in tokenizer.special), None)
    known = [token for token in found.values() if token is not None]
    free = itertools.count(max([tokenizer.vocab_size - 1, *known]) + 1)
    return {name: next(free) if token is None else token for name, token in found.items()}


def num_spans(length: int, objective: RecordObjective) -> int:
    """How many spans of `length` tokens are hidden, on average; at least one."""
    return max(1, math.ceil(length * objective.rate / objective.mean_span))


class Vocabulary(NamedTuple):
    """What transforms of records know of tokens.

    start_id: what a decoder beside an encoder begins with. source_begin_ids, source_end_ids: what is
    around the text that the encoder reads; the decoder writes the first too, and end_id. special:
    ids by name. text_ids_V: the ids that stand for text. word_starts_V: whether a token begins a
    word, with white space or a punctuation mark. sentence_ends_V: whether it ends a sentence or a
    line.
    """

    bos_id: int
    end_id: int
    pad_id: int
    start_id: int
    source_begin_ids: tuple[int, ...]
    source_end_ids: tuple[int, ...]
    special: dict[str, int]
    text_ids_V: np.ndarray
    word_starts_V: np.ndarray
    sentence_ends_V: np.ndarray

    def is_text(self, tokens: np.ndarray) -> np.ndarray:
        """Which tokens stand for text."""
        return np.isin(tokens, self.text_ids_V)

    @property
    def sentinels_V(self) -> np.ndarray:
        """The ids of the tokens that stand for spans, int32."""
        return np.array([token for name, token in self.special.items()
                         if name.startswith("<span_")], np.int32)


def vocabulary_of(config: DataConfig, tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary of a tokenizer with the special tokens of a config's objectives."""
    pieces = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    return Vocabulary(
        tokenizer.bos_id, tokenizer.end_id, tokenizer.pad_id, tokenizer.start_ids[0],
        tokenizer.source_begin_ids, tokenizer.source_end_ids,
        special_ids(config, tokenizer),
        np.flatnonzero(tokenizer.byte_lengths_V).astype(np.int32),
        np.array([re.match(rb"[^0-9A-Za-z_\x80-\xff]", piece) is not None for piece in pieces]),
        np.array([re.search(rb"[.!?\n]$", piece) is not None for piece in pieces]),
    )


def encode_prompt(tokenizer: Tokenizer, special: dict[str, int], prompt: str) -> list[int]:
    """The tokens of a prompt, in which names of special tokens (`<middle>`) stand for these."""
    if not special:
        return tokenizer.encode(prompt)
    parts = re.split(f"({'|'.join(map(re.escape, special))})", prompt)
    return [token for part in parts if part for token in (
        [special[part]] if part in special else tokenizer.encode(part))]

"""Learning a SentencePiece vocabulary from sample documents."""

import collections
import io
import re
from collections.abc import Iterable

from batiste.data.tokenizer import SPACE, TAB

# What a learned piece may span: a line break with the indentation and the first word after it, or
# a word with the punctuation around it. Counting these once instead of reading sentences makes
# training take seconds, and pieces such as "\n        return" or "(self," save tokens on code:
# on the standard library a vocabulary of 4,096 gives 3.91 bytes per token, against 3.18 with
# the word boundaries of GPT-2.
UNIT = re.compile(r"\n+ *\w*\W?| ?\w+[^\w\n]*\w*[^\w\n ]*|[^\w\n]+")
# SentencePiece reserves these in training, or would take them for a space or a tab.
RESERVED = re.compile(f"[\0\u2585{SPACE}{TAB}]")
FIXED_TOKENS = 258  # every byte, BOS and padding
# A longer unit (a line of Chinese, a genome) is cut, for SentencePiece drops those above its limit of
# bytes. Nothing that is learned is longer than its 16 characters.
LONGEST_UNIT = 1 << 14  # characters
MODEL_TYPES = {"bpe": "bpe", "unigram": "unigram", "characters": "char"}


def train(kind: str, vocab_size: int, texts: Iterable[str]) -> bytes:
    """Returns the bytes of a .model learned from `texts`; the same texts give the same bytes.

    kind: "bpe", "unigram" or "characters", all with byte fallback and without normalization.
    Raises ValueError if the texts do not support a vocabulary of that size, naming the limit.
    """
    import sentencepiece
    if vocab_size <= FIXED_TOKENS:
        raise ValueError(_too_small(vocab_size, FIXED_TOKENS))
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        for unit in UNIT.findall(RESERVED.sub("\n", text).replace("\t", TAB)):
            if len(unit) <= LONGEST_UNIT:
                counts[unit] += 1
            else:
                counts.update(unit[start:start + LONGEST_UNIT]
                              for start in range(0, len(unit), LONGEST_UNIT))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=(f"{unit}\t{count}" for unit, count in counts.items()),
            model_writer=model,
            input_format="tsv",
            model_type=MODEL_TYPES[kind],
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0 if kind == "characters" else 0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_by_whitespace=False,
            split_by_unicode_script=False,
            split_by_number=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * LONGEST_UNIT + 1,
            hard_vocab_limit=kind != "characters",
            # Padding takes the place of the unknown piece, which byte fallback never needs.
            unk_id=0, unk_piece="<pad>", bos_id=1, eos_id=-1, pad_id=-1,
            num_threads=1,  # unigram sums floats per thread: one thread, one answer
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explain(vocab_size, str(error))) from None
    return model.getvalue()


def _explain(vocab_size: int, error: str) -> str:
    if match := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", error):
        return (f"data.vocab_size={vocab_size}: the training text supports at most "
                f"{match[1]} tokens; set data.vocab_size={match[1]} or less, or add text")
    if match := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return _too_small(vocab_size, int(match[1]))
    return f"data.vocab_size={vocab_size}: SentencePiece could not train: {error}"


def _too_small(vocab_size: int, least: int) -> str:
    return (f"data.vocab_size={vocab_size}: bytes, common characters, BOS and padding alone need "
            f"{least}; set data.vocab_size above {least}, or data.tokenizer=bytes")

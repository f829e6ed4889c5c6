"""Texts are read as the models of other libraries were trained to read them."""

import json

import pytest
import transformers

from batiste.data import PackedReader, pack_tokenizer
from batiste.data.huggingface_tokenizer import can_pack

WORDS = (
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cafe", "café", "Café", "un", "##aff",
    "##able", "run", "##ning", "##s", "中", "国", "!", "?", "'", "-", "$", "1", "##2", "naive",
    "naïve", "a", "b", "##b", "é", "É", "e", "ß", "ss", "İ", "i",
)
TEXTS = (
    "The unaffable café runs", "Café CAFÉ cafe\u0301", "中国 the中国b", "running!?'s -$12", "",
    " \t\n\r\u00a0\u3000the\u200b\u200d  a", "naïve Naive NAÏVE", "x" * 101, "abb bbb \ufffd\x00\x07a",
    "É é ß SS İ", "🙂 the", "a\u2014b", "a b" * 30,
)


@pytest.fixture(params=[{}, {"do_lower_case": False}, {"strip_accents": False},
                        {"tokenize_chinese_chars": False}], ids=str)
def folder(request, tmp_path):
    """A directory with a vocab.txt alone, and how its text is normalized."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(request.param))
    return tmp_path, request.param


def test_a_vocab_txt_reads_what_berts_own_tokenizer_reads(folder):
    path, settings = folder
    assert can_pack(["vocab.txt"]) and not can_pack(["vocab.json"])
    reader = PackedReader(pack_tokenizer(path))
    theirs = transformers.BertTokenizer(str(path / "vocab.txt"), **settings)
    assert (reader.pad_id, reader.vocab_size) == (theirs.pad_token_id, len(WORDS))
    for text in TEXTS:
        assert reader.read(text, None, 64, False).tokens == theirs(
            text, truncation=True, max_length=64)["input_ids"]
        for max_length in (64, 9) if text else ():  # To it, an empty second text is none.
            expected = theirs("the unaffable café", text, truncation="longest_first",
                              max_length=max_length)
            read = reader.read("the unaffable café", text, max_length, False)
            assert (read.tokens, read.types) == (expected["input_ids"], expected["token_type_ids"])


def test_tokens_point_back_into_the_text(folder):
    path, _ = folder
    reader = PackedReader(pack_tokenizer(path))
    read = reader.read("the café", "unaffable 中国 runs", 30, True)
    texts = "the café", "unaffable 中国 runs"
    for token, side, (start, end) in zip(read.tokens, read.sides, read.spans, strict=True):
        if side and WORDS[token] not in ("[UNK]", "cafe"):
            assert texts[side - 1][start:end] == WORDS[token].removeprefix("##")
    cut = reader.read(*texts, len([side for side in read.sides if side == 1]) + 4, True)
    assert [side for side in cut.sides if side == 1] == [side for side in read.sides if side == 1]
    assert sum(side == 2 for side in cut.sides) == 1
    with pytest.raises(ValueError, match="max_length=4 has no room beside the first text"):
        reader.read("the the the the the", "a", 4, True)


def test_what_looks_like_a_special_token_is_text(folder):
    path, _ = folder
    reader = PackedReader(pack_tokenizer(path))
    tokens = reader.read("the [SEP] a", None, 30, False).tokens
    assert tokens.count(WORDS.index("[SEP]")) == 1 and tokens[-1] == WORDS.index("[SEP]")


def test_a_vocabulary_without_what_rows_are_made_with_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\na\n")
    with pytest.raises(ValueError, match=r"vocab.txt: has no '\[SEP\]', the sep_token"):
        pack_tokenizer(tmp_path)

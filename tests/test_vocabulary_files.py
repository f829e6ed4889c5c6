"""Tokenizers of models without a tokenizer.json: the tokens are those of `transformers`."""

import io
import json
import pathlib

import pytest
import sentencepiece
import transformers
from test_data_tokenizer import TEXTS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from batiste.data import can_pack, load_tokenizer, pack_tokenizer

SAMPLES = (*TEXTS, "def f(x):\n\treturn [x] * 23  # \u00e9t\u00e9 it's 12345 \U0001f600", " a  b ", "\u0e01")


def sentencepiece_model(**options) -> bytes:
    """A SentencePiece model as Llama's is made, but for the options."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_writer=made, **{
            "vocab_size": 320, "model_type": "bpe", "byte_fallback": True,
            "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
            "hard_vocab_limit": False, "minloglevel": 2} | options)
    return made.getvalue()


def merges_of(folder: pathlib.Path, special: list[str]) -> None:
    """Writes vocab.json and merges.txt of a byte-level vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.model.save(str(folder))


def packed(folder: pathlib.Path):
    assert can_pack(path.name for path in folder.iterdir())
    (folder / "packed.json").write_bytes(pack_tokenizer(folder))
    return load_tokenizer(folder / "packed.json")


@pytest.mark.parametrize("prefix", (True, False))
def test_a_sentencepiece_model_alone_is_brought(tmp_path, prefix):
    model = sentencepiece_model(add_dummy_prefix=prefix)
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    found = packed(tmp_path)
    without = tmp_path / "same.model"
    without.write_bytes(model)
    expected = load_tokenizer(without)
    for text in SAMPLES:
        assert found.encode(text) == expected.encode(text) and found.decode(found.encode(text)) == text
    assert (found.bos_id, found.end_id, found.begin_ids) == (1, 2, (1,))


@pytest.mark.parametrize("options", (
    {"normalization_rule_name": "nmt_nfkc"}, {"byte_fallback": False}, {"model_type": "unigram"}))
def test_a_sentencepiece_model_that_loses_text_is_refused_with_a_way(tmp_path, options):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**options))
    with pytest.raises(ValueError, match="tokenizer.model: is no byte-pair.*save it as tokenizer.json"):
        pack_tokenizer(tmp_path)


@pytest.mark.parametrize("model_type,special", (
    ("gpt2", ["<|endoftext|>"]), ("qwen2", ["<|endoftext|>"]),
    ("roberta", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]),
))
def test_merges_alone_are_brought(tmp_path, model_type, special):
    merges_of(tmp_path, special)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    name = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "roberta": "RobertaTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": name[model_type], "eos_token": special[-3 if len(special) > 1 else 0]}))
    found = packed(tmp_path)
    (tmp_path / "packed.json").unlink()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in SAMPLES:
        assert found.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
        assert [*found.begin_ids, *found.encode(text), *found.source_end_ids] == theirs(
            text)["input_ids"]


def test_what_says_nothing_of_cuts_is_refused(tmp_path):
    merges_of(tmp_path, ["<s>"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="do not say how text is cut, and of 'llama'"):
        pack_tokenizer(tmp_path)

"""Tokenizers lose nothing, count bytes rightly and train the same way twice."""

import functools
import json
import pathlib
import random
import tempfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batiste.data import (
    DataConfig, RecordObjective, load_tokenizer, pack_tokenizer, special_ids,
)
from batiste.data.huggingface_tokenizer import HuggingFaceTokenizer
from batiste.data.tokenizer import ByteTokenizer, SentencePieceTokenizer
from batiste.data.tokenizer_training import LONGEST_UNIT, train

TEXTS = [f"def f{n}(self, x):\n\tif x:\n        return été[{n}] + {n * 7}\n\n\n"
         for n in range(200)]
KINDS = ("bpe", "unigram", "characters", "bytes", "byte level", "byte fallback")
SIZES = {"bpe": 330, "unigram": 310, "characters": 4096}
ANY_TEXT = st.text(st.one_of(
    st.characters(codec="utf-8"), st.sampled_from(" \t\n\r\0\u2581\u2585\ue009é\u0301😀def")))


@functools.cache
def tokenizer_of(kind):
    if kind == "bytes":
        return ByteTokenizer()
    if kind.startswith("byte "):
        return huggingface(kind == "byte level")
    return SentencePieceTokenizer(train(kind, SIZES[kind], TEXTS))


def huggingface(byte_level):
    """A tokenizer.json as published models have them: GPT-2's kind, or Llama 2's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE(byte_fallback=not byte_level, unk_token=None))
    alphabet = []
    if byte_level:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        tokenizer.decoder = decoders.ByteFallback()
    specials = ["<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials[:None if not byte_level else 2],
        initial_alphabet=alphabet, show_progress=False))
    described = json.loads(tokenizer.to_str())
    # Trained as special so that they have the first places; they are bytes.
    described["added_tokens"] = described["added_tokens"][:2]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "tokenizer.json").write_text(json.dumps(described))
        (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
        return HuggingFaceTokenizer(pack_tokenizer(folder))


def train_directly(path, **options):
    """Trains a .model as somebody else would."""
    import sentencepiece
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS), model_prefix=str(path), model_type="bpe", minloglevel=2,
        **{"byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 340,
           "remove_extra_whitespaces": False} | options)
    return f"{path}.model"


def test_objectives_take_the_special_tokens_that_an_imported_tokenizer_has():
    described = json.loads(json.loads(tokenizer_of("byte level").model)["tokenizer"])
    size = tokenizer_of("byte level").vocab_size
    described["added_tokens"] += [
        {"id": size + index, "content": name, "special": name != "[SEP]", "single_word": False,
         "lstrip": False, "rstrip": False, "normalized": False}
        for index, name in enumerate(("<fim_suffix>", "[SEP]", "<extra_id_1>", "[MASK]"))]
    packed = json.loads(tokenizer_of("byte level").model) | {"tokenizer": json.dumps(described)}
    tokenizer = HuggingFaceTokenizer(json.dumps(packed).encode())
    objectives = tuple(map(RecordObjective, ("masked", "middle", "order")))
    ids = special_ids(DataConfig(objectives=objectives), tokenizer)
    assert {name: token - size for name, token in ids.items()} == {
        "<mask>": 3, "<suffix>": 0, "<prefix>": 4, "<middle>": 5,
        "<separator>": 6, "<in_order>": 7, "<swapped>": 8}  # Its [SEP] is text.
    spans = DataConfig(sequence_length=32, objectives=(RecordObjective("spans", rate=0.2),))
    assert list(special_ids(spans, tokenizer).values()) == [size + 3, size + 2, size + 4]
    assert special_ids(spans, tokenizer_of("bytes"))["<span_1>"] == 259


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
@example("  two  spaces  ")
@example("\u2581 is not a space\u2581\u2581 ")
@example("\ue009\t\ue009")
@example("<s></s><pad><unk><0x41>")
@example("\0\r\n\t\ufeff\ufffd\U0010ffff")
@example("")
def test_encoding_loses_nothing(kind, text):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths_V[ids].sum() == len(text.encode())
    assert tokenizer.bos_id not in ids and tokenizer.pad_id not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    stream = tokenizer.stream()
    pushed = [stream.push(token) for token in ids]
    assert "".join(pushed) == text and stream.finish() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_encodes_as_its_texts_alone(kind):
    texts = [*TEXTS[:3], "tab\t", "", "a\u2581b"]
    tokenizer = tokenizer_of(kind)
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_a_stream_holds_back_incomplete_characters():
    stream = ByteTokenizer().stream()
    assert [stream.push(2 + value) for value in "a😀é".encode()] == [
        "a", "", "", "", "😀", "", "é"]
    stream.push(2 + 0xF0)
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("kind", ("bpe", "unigram", "characters"))
def test_training_is_deterministic_and_has_the_size_asked_for(kind):
    assert train(kind, SIZES[kind], TEXTS) == train(kind, SIZES[kind], list(TEXTS))
    if kind != "characters":
        assert tokenizer_of(kind).vocab_size == SIZES[kind]


@pytest.mark.parametrize("kind", ("bpe", "unigram"))
def test_learned_pieces_span_line_breaks_tabs_and_indentation(kind):
    tokenizer = tokenizer_of(kind)
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2
    if kind == "bpe":
        assert any(piece.startswith(b"\n\t") for piece in tokenizer._token_bytes)
        assert any(piece.startswith(b"\n        ") for piece in tokenizer._token_bytes)


def test_special_tokens_differ_and_stand_for_no_text():
    for kind in KINDS:
        tokenizer = tokenizer_of(kind)
        assert tokenizer.bos_id != tokenizer.pad_id
        assert tokenizer.decode([tokenizer.bos_id, tokenizer.pad_id]) == ""


@pytest.mark.parametrize("kind", ("bpe", "unigram"))
def test_too_large_a_vocabulary_names_the_largest_which_then_works(kind):
    with pytest.raises(ValueError, match="supports at most") as caught:
        train(kind, 9000, TEXTS)
    largest = int(str(caught.value).split("at most ")[1].split()[0])
    assert SentencePieceTokenizer(train(kind, largest, TEXTS)).vocab_size == largest


@pytest.mark.parametrize("kind", ("bpe", "unigram", "characters"))
def test_too_small_a_vocabulary_names_a_larger_one(kind):
    with pytest.raises(ValueError, match=r"data.vocab_size=200: .*\d{3}"):
        train(kind, 200, TEXTS)


@pytest.fixture(scope="module")
def existing(tmp_path_factory):
    """A model with a dummy prefix, EOS and an unknown piece, as SentencePiece makes by default."""
    return load_tokenizer(train_directly(tmp_path_factory.mktemp("model") / "existing"))


@settings(max_examples=100, deadline=None)
@given(text=ANY_TEXT)
@example("\u2581 is not a space\u2581\u2581 ")
@example("\ue009\t\ue009")
def test_an_existing_model_with_byte_fallback_loses_nothing(existing, text):
    tokenizer = existing
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths_V[ids].sum() == len(text.encode())


@pytest.mark.parametrize("options, message", (
    ({"normalization_rule_name": "nmt_nfkc"}, "normalizes text"),
    ({"remove_extra_whitespaces": True}, "normalizes text"),
    ({"byte_fallback": False, "vocab_size": 60}, "no byte fallback"),
    ({"bos_id": -1}, "no BOS"),
))
def test_an_existing_model_that_would_lose_text_is_refused(tmp_path, options, message):
    path = train_directly(tmp_path / "lossy", **options)
    with pytest.raises(ValueError, match=f"lossy.model: .*{message}"):
        load_tokenizer(path)


def test_no_tokenizer_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "absent.model")
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="broken.model: not a SentencePiece model"):
        load_tokenizer(tmp_path / "broken.model")


def _random_text(alphabet: str, size: int) -> str:
    return "".join(random.Random(0).choices(alphabet, k=size))


SPACELESS = {
    "dna": _random_text("ACGT", 3000), "digits": _random_text("0123456789", 3000),
    "thai": "\u0e01\u0e32\u0e23\u0e40\u0e23\u0e35\u0e22\u0e19\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22" * 40
    + _random_text("\u0e01\u0e02\u0e04\u0e07\u0e08\u0e32\u0e34\u0e35", 800),
    "chinese": _random_text("\u5929\u5730\u7384\u9ec4\u5b87\u5b99\u6d2a\u8352\u65e5\u6708", 3000),
}


@pytest.mark.parametrize("kind", ("bpe", "unigram"))
@pytest.mark.parametrize("name", SPACELESS)
def test_a_vocabulary_is_learned_from_text_without_spaces(kind, name):
    text = SPACELESS[name]
    tokenizer = SentencePieceTokenizer(train(kind, 300, [text]))
    assert len(tokenizer.encode(text)) < 0.8 * len(text), "no piece of several characters"
    for other in (text, " ", f" {text[:50]}  a\u2581 b "):
        ids = tokenizer.encode(other)
        assert tokenizer.decode(ids) == other
        assert tokenizer.byte_lengths_V[ids].sum() == len(other.encode())


def test_a_line_without_an_end_is_learned_from():
    """SentencePiece drops a sentence above its limit of bytes, which one line of CJK easily is."""
    text = SPACELESS["chinese"] * (5 * LONGEST_UNIT // 3000 + 1)
    tokenizer = SentencePieceTokenizer(train("bpe", 320, [text]))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) < 0.8 * len(text)

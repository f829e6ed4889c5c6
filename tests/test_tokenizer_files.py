"""A tokenizer that was learned here reads for `transformers` as it does here."""

import inspect
import pathlib
import sys

import pytest
import test_data_tokenizer as tokenizers
import transformers

from batiste import main
from batiste.configs.experiment import Experiment
from batiste.data import DataConfig, SourceConfig, tokenizer_training
from batiste.data.tokenizer import SentencePieceTokenizer
from batiste.interop.tokenizer_files import write_tokenizer
from batiste.models import TransformerConfig

TEXTS = [
    "", " ", "  two  spaces ", "\t\tif x:\n\n\n", "\r\n\0", "été 😀\ue123 <0x41>", *tokenizers.TEXTS[:3],
    inspect.getsource(pathlib), inspect.getsource(tokenizers),
]


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_transformers_reads_every_kind(kind, tmp_path):
    tokenizer = tokenizers.tokenizer_of(kind)
    write_tokenizer(tmp_path, tokenizer, 10**6)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.end_id)
    for text in TEXTS:
        for name in ("<s>", "</s>", "<pad>", "\u2581", "\ue009"):
            text = text.replace(name, "")
        text = text.replace("<0x41>", "") if kind == "unigram" else text
        expected = tokenizer.encode(text)
        if kind == "byte fallback":  # It was imported, and begins every text with a space.
            expected = tokenizer.encode(f" {text}") if text else []
        begin, *found = theirs(text)["input_ids"] if tokenizer.begin_ids else [
            None, *theirs(text)["input_ids"]]
        if kind == "unigram":  # The first of pieces that are equally likely is not always the same.
            scores = [tokenizer._processor.GetScore(token) for token in range(tokenizer.vocab_size)]
            found, expected = (sorted(ids, key=scores.__getitem__) for ids in (found, expected))
        assert found == expected
        if kind != "byte fallback":
            assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text


def test_what_would_be_read_otherwise_is_an_error(tmp_path):
    tokenizer = tokenizers.tokenizer_of("bpe")
    learned = SentencePieceTokenizer(tokenizer.model)
    learned.begin_ids = ()
    with pytest.raises(ValueError, match="tokenizer.json would encode .* and not"):
        write_tokenizer(tmp_path, learned, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


def test_nothing_is_before_what_an_encoder_reads(tmp_path):
    tokenizer = tokenizers.tokenizer_of("bpe")
    write_tokenizer(tmp_path, tokenizer, 64, source=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("def f")["input_ids"] == tokenizer.encode("def f")


@pytest.mark.parametrize("kind", ("bpe", "unigram"))
def test_one_that_was_learned_without_spaces_reads_them_alike(kind, tmp_path):
    text = tokenizers.SPACELESS["dna"]
    tokenizer = SentencePieceTokenizer(tokenizer_training.train(kind, 300, [text]))
    write_tokenizer(tmp_path, tokenizer, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for each in (text[:60], f" {text[:20]}  {text[20:40]}\n"):
        begin, *found = theirs(each)["input_ids"]
        assert theirs.decode(found) == each == tokenizer.decode(found)
        assert len(found) == len(tokenizer.encode(each))


def test_the_bos_of_somebody_elses_model_may_have_another_name(tmp_path):
    path = tokenizers.train_directly(tmp_path / "their", bos_piece="<begin>")
    tokenizer = SentencePieceTokenizer(pathlib.Path(path).read_bytes())
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", tokenizer, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.bos_token == "<begin>"
    assert theirs("def f")["input_ids"] == [tokenizer.bos_id, *tokenizer.encode("def f")]


@pytest.mark.slow
def test_a_run_is_exported_with_its_tokenizer(tmp_path, capfd, monkeypatch):
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text("def f(x):\n\treturn x\n" * (number + 3))
    experiment = Experiment(
        TransformerConfig(
            vocab_size=300, num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8,
            mlp_dim=24, max_length=32),
        DataConfig(
            sources=(SourceConfig(path=f"{tmp_path}/*.txt"),), tokenizer="characters",
            sequence_length=32, validation_fraction=0.2))
    experiment.train.num_steps, experiment.train.batch_size = 2, 8
    experiment.train.schedule.warmup_steps = 1
    main.train(experiment, tmp_path / "run")
    main.export_weights(tmp_path / "run", tmp_path / "out")
    capfd.readouterr()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert not capfd.readouterr().err
    manifest = next((tmp_path / "run/data").glob("*/manifest.json"))
    tokenizer = main.load_prepared(manifest.parent).tokenizer
    assert theirs("def f")["input_ids"] == [1, *tokenizer.encode("def f")]
    assert (tmp_path / "out/tokenizer.model").is_file()
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # As where it is not installed.
    main.export_weights(tmp_path / "run", tmp_path / "bare")
    assert "has no tokenizer.json: a tokenizer.json needs" in capfd.readouterr().err
    names = {path.name for path in (tmp_path / "bare").iterdir()}
    assert {"model.safetensors", "tokenizer.model"} < names and "tokenizer.json" not in names

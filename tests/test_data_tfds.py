"""TFDS data sets as sources, and our records as a TFDS data set."""

import sys

import numpy as np
import pytest

from batiste.data import DataConfig, SourceConfig, prepare
from batiste.data.sources import open_source

tfds = pytest.importorskip("tensorflow_datasets")

TEXTS = [f"example {n}: {'na ' * (n % 9)}\u00e9\n" for n in range(600)]


class SmallTexts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set with two text features and a number."""

    VERSION = tfds.core.Version("1.2.0")
    code_path = None

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=(
            tfds.features.FeaturesDict({
                "text": tfds.features.Text(), "title": tfds.features.Text(),
                "label": tfds.features.Scalar(np.int64)})))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(TEXTS),
                "test": self._generate_examples(["left alone"])}

    def _generate_examples(self, texts):
        for n, text in enumerate(texts):
            yield n, {"text": text, "title": f"title {n}", "label": n}


class RegisteredTexts(SmallTexts):
    """The same, known to TFDS by name."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    builder = SmallTexts(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


def config_for(directory, **fields):
    return DataConfig(sources=(SourceConfig(f"tfds:{directory}", **fields),), tokenizer="bytes",
                      sequence_length=29)


def test_a_directory_gives_its_train_split_in_order(directory):
    for path in (directory, str(directory).rsplit("/", 2)[0]):  # the version's, or one above
        assert list(open_source(SourceConfig(f"tfds:{path}")).documents(None)) == TEXTS
    titles = open_source(SourceConfig(f"tfds:{directory}", text_field="title")).documents(None)
    assert next(titles) == "title 0"


def test_a_directory_is_prepared_and_reused_without_tensorflow(directory, tmp_path):
    prepared = prepare(config_for(directory), tmp_path)
    counts = [prepared.manifest[split] for split in ("train", "validation")]
    assert sum(count["documents"] for count in counts) == len(TEXTS)
    assert sum(count["bytes"] for count in counts) == sum(len(text.encode()) for text in TEXTS)
    assert prepare(config_for(directory), tmp_path).directory == prepared.directory
    assert prepare(config_for(directory, text_field="title"), tmp_path).directory != (
        prepared.directory)
    assert "tensorflow" not in sys.modules


def test_a_name_is_prepared_by_tfds_and_then_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    for _ in range(2):  # the second time it is there
        assert list(open_source(SourceConfig("tfds:registered_texts")).documents(None)) == TEXTS
    assert (tmp_path / "registered_texts" / "1.2.0" / "dataset_info.json").exists()


def test_a_corpus_in_one_example_is_cut_so_that_some_can_be_held_out(tmp_path):
    text = "".join(f"{n} bottles of beer on the wall\n" for n in range(20_000))

    class OneText(SmallTexts, skip_registration=True):
        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples([text])}

    builder = OneText(data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare()
    source = open_source(SourceConfig(f"tfds:{builder.data_dir}"))
    documents = list(source.documents(None))
    assert "".join(documents) == text and len(documents) > 20
    prepared = prepare(config_for(builder.data_dir), tmp_path / "data")
    assert prepared.num_bytes("train") + prepared.num_bytes("validation") == len(text)
    assert prepared.num_bytes("validation") > 0


def test_our_records_are_a_tfds_data_set(directory, tmp_path):
    prepared = prepare(config_for(directory), tmp_path)
    ours = tfds.builder_from_directory(prepared.directory / "token_records" / "1.0.0")
    examples = ours.as_data_source("train_0")
    assert len(examples) == prepared.num_records("train")
    records = prepared.readers("train")[0].read(np.array([5, 0, 17]))
    for record, index in zip(records, (5, 0, 17)):
        assert np.array_equal(examples[index]["tokens"], record)


@pytest.mark.parametrize("path, field, message", (
    ("imdb_review", "text", "tfds:imdb_review: no such .* did you mean .*imdb_reviews"),
    ("{directory}", "label", "no text feature 'label'; it has text, title"),
    ("{directory}", "body", "no text feature 'body'; it has text, title"),
    ("{empty}", "text", "expected a directory with one prepared TFDS data set, found none"),
))
def test_what_is_not_there_is_one_clear_line(directory, tmp_path, path, field, message):
    path = path.format(directory=directory, empty=tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(SourceConfig(f"tfds:{path}", text_field=field))
    assert "\n" not in str(caught.value)

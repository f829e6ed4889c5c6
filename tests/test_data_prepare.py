"""Preparing: the same inputs are reused, a death leaves nothing, bad input is one clear line."""

import dataclasses
import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import tracemalloc
import unicodedata

import numpy as np
import pytest
import tiny_directories
from tokenizers import normalizers

from batiste.data import (
    DataConfig, Loader, SourceConfig, file_formats, load_prepared, pack_tokenizer, prepare,
)
from batiste.data.corpus import by_fraction, documents_of
from batiste.data.quarantine import Quarantine
from batiste.data.sources import DOCUMENT_BYTES, LARGE_FILE_BYTES, open_source
from batiste.data.tokenizer import load_tokenizer

PACKAGE_PARENT = str(pathlib.Path(__file__).resolve().parents[2])


def write_lines(path, texts, field="text"):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as stream:
        stream.writelines(json.dumps({field: text}).encode() + b"\n" for text in texts)
    return str(path)


def texts_of(count, start=0):
    return [f"document {n}: {n * 17} and \u00e9\t{n % 13}\n" * (1 + n % 5)
            for n in range(start, start + count)]


@pytest.fixture
def corpus(tmp_path):
    return write_lines(tmp_path / "corpus.jsonl", texts_of(120))


def config_for(path, **fields):
    return DataConfig(**{
        "sources": (SourceConfig(path),), "tokenizer": "bytes", "sequence_length": 31,
        "validation_fraction": 0.2} | fields)


def finished(directory):
    """The preparations in a directory that look finished."""
    return [path.parent for path in pathlib.Path(directory).rglob("manifest.json")]


def unfinished(directory):
    return list(pathlib.Path(directory).glob(".preparing-*"))


# Reading


def test_the_standard_library_is_always_there():
    source = open_source(SourceConfig())
    documents = list(source.documents(None))
    assert len(documents) > 500 and sum(map(len, documents)) > 8e6
    assert any(document.startswith('"""functools.py') for document in documents)
    assert not any("class TestPartial" in document for document in documents)


def test_text_and_jsonl_plain_and_compressed_read_alike(tmp_path):
    texts = texts_of(9)
    write_lines(tmp_path / "a.jsonl", texts)
    write_lines(tmp_path / "b.jsonl.gz", texts)
    for n, text in enumerate(texts):
        (tmp_path / f"c{n}.txt").write_bytes(text.encode())
        with gzip.open(tmp_path / f"d{n}.txt.gz", "wb") as stream:
            stream.write(text.encode())
    for pattern in ("a.jsonl", "b.jsonl.gz", "c*.txt", "d*.txt.gz"):
        source = open_source(SourceConfig(str(tmp_path / pattern)))
        assert list(source.documents(None)) == texts


def read(path, field="text", quarantine=None) -> list[str]:
    return list(open_source(SourceConfig(str(path), text_field=field)).documents(quarantine))


NAMES = ("c4-train.00000-of-01024.json.gz", "part-0.jsonl", "a.JSONL", "a.ndjson", "a.json",
         "books-0001.jsonl.gz", "named_by_nobody", "a.txt", "gzipped_without_saying_so.jsonl")


@pytest.mark.parametrize("bom", (b"", b"\xef\xbb\xbf"), ids=("plain", "bom"))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("style", ("lines", "array", "indented"))
def test_json_is_recognized_by_content_and_name(tmp_path, style, name, bom):
    """C4's and Dolma's names among them; a byte order mark loses no line."""
    texts = texts_of(40)
    objects = [{"url": "x", "text": text} for text in texts]
    content = {"lines": "".join(json.dumps(each) + "\n" for each in objects),
               "array": json.dumps(objects),
               "indented": json.dumps(objects, indent=2, ensure_ascii=False)}[style]
    content = bom + content.encode()
    packed = name.endswith(".gz") or name.startswith("gzipped")
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    assert read(tmp_path / name) == texts


def test_one_object_and_objects_over_lines_are_documents(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"text": "alone"}, indent=1))
    (tmp_path / "two.json").write_text("\n".join(
        json.dumps({"text": text}, indent=1) for text in ("first", "second")))
    assert read(tmp_path / "one.json") == ["alone"]
    assert read(tmp_path / "two.json") == ["first", "second"]
    assert read(tmp_path / "one.json", field=None) == ['{\n "text": "alone"\n}']
    for broken in ('[{"text": "a"}, {"text": ', '[{"text": "a"}', '{"text": "a"}\n{"te'):
        (tmp_path / "cut.json").write_text(broken if broken[0] == "[" else broken.replace(
            ": ", ":\n"))
        with pytest.raises(ValueError, match=r"cut.json: line \d+: not JSON, or not all of it"):
            read(tmp_path / "cut.json")


def test_values_are_read_across_the_ends_of_what_is_read_at_once(tmp_path, monkeypatch):
    texts = [f"{n} \u00e9\U0001f600 {'x' * (n % 23)}" for n in range(60)]
    (tmp_path / "a.json").write_text(
        json.dumps([{"text": text} for text in texts], ensure_ascii=False), encoding="utf-8")
    for size in (1, 7, 64):
        monkeypatch.setattr(file_formats, "READ_BYTES", size)
        assert read(tmp_path / "a.json") == texts


def test_a_directory_is_a_source_and_says_how_it_is_read(tmp_path, capsys):
    folder = tmp_path / "corpus"
    (folder / "deeper").mkdir(parents=True)
    (folder / ".hidden").write_text("not read")
    texts = texts_of(80)
    write_lines(folder / "a.json", texts[:50])
    (folder / "b.txt").write_text(texts[50])
    write_lines(folder / "deeper/c.jsonl.gz", texts[51:])
    assert sorted(read(folder)) == sorted(texts)
    prepare(config_for(str(folder)), tmp_path / "data")
    said = f"{folder}: 3 files are read, 2 as JSON lines (field 'text'), 1 as plain text\n"
    assert said in capsys.readouterr().err
    prepare(config_for(str(folder / "b.txt"), sources=(SourceConfig(str(folder / "*.txt")),
                                                       SourceConfig(str(folder / "a.json")))),
            tmp_path / "data")
    assert "files are read" in capsys.readouterr().err  # A .json of lines is not obvious.


@pytest.mark.parametrize("content,name", (
    (b"PAR1\0\0", "Parquet"), (b"\x28\xb5\x2f\xfd\0", "zstd"), ("{}".encode("utf-16"), "UTF-16")))
def test_what_holds_no_text_as_it_is_is_refused_by_name(tmp_path, content, name):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"data.jsonl: is {name}: expected UTF-8 text"):
        read(tmp_path / "data.jsonl")


def test_a_wrong_field_is_one_clear_line(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", texts_of(300), field="content")
    with pytest.raises(ValueError) as error:
        prepare(config_for(path), tmp_path / "data")
    assert "none of the first 100 documents could be read" in str(error.value)
    assert "no text in field 'text', but it has content: set text_field" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_line_is_bounded_before_it_is_held(tmp_path, monkeypatch):
    """A gzip file of some MB may have a line of GB: set aside in JSON, cut in plain text."""
    monkeypatch.setattr(file_formats, "LARGEST_JSON_BYTES", 1 << 20)
    texts = texts_of(20)
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", 1) as stream:
        stream.writelines(lines[:10])
        stream.write(b'{"text": "')
        for _ in range(64):
            stream.write(b"x" * (1 << 20))
        stream.write(b'"}\n')
        stream.writelines(lines[10:])
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    tracemalloc.start()
    assert read(tmp_path / "a.jsonl.gz", quarantine=quarantine) == texts
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20
    entry = json.loads(quarantine.path.read_text())
    assert entry["line"] == 11 and "a line above" in entry["reason"]
    with gzip.open(tmp_path / "b.json.gz", "wb", 1) as stream:
        stream.write(b'[{"text": "' + b"x" * (8 << 20))
    with pytest.raises(ValueError, match="b.json.gz: line 1: not JSON"):
        read(tmp_path / "b.json.gz")


def test_a_long_line_is_cut_between_characters_without_loss(tmp_path):
    text = "begin\n" + "\u5929\u5730x\U0001f600" * 60_000 + "\nend"
    (tmp_path / "line.txt").write_bytes(text.encode())
    documents = read(tmp_path / "line.txt")
    assert "".join(documents) == text
    assert len(documents) > 20
    assert max(len(each.encode()) for each in documents) <= 2 * DOCUMENT_BYTES


def test_a_large_text_file_is_cut_at_line_ends_without_loss(tmp_path):
    text = "".join(f"line {n} of many\r\n" for n in range(LARGE_FILE_BYTES // 12))
    (tmp_path / "large.txt").write_bytes(text.encode())
    (tmp_path / "small.txt").write_bytes(text[:LARGE_FILE_BYTES].encode())
    documents = list(open_source(SourceConfig(str(tmp_path / "large.txt"))).documents(None))
    assert "".join(documents) == text
    assert len(documents) > 10 and max(map(len, documents)) < 2 * DOCUMENT_BYTES
    assert all(document.endswith("\n") for document in documents)
    assert len(list(open_source(SourceConfig(str(tmp_path / "small.txt"))).documents(None))) == 1


def test_a_document_stays_in_its_split_whatever_is_around_it(tmp_path):
    few, many = texts_of(40, start=60), texts_of(200)
    splits = []
    for name, texts in (("few", few), ("many", many)):
        source = open_source(SourceConfig(write_lines(tmp_path / f"{name}.jsonl", texts)))
        splits.append(set(documents_of(source, "validation", by_fraction(0.2))))
        assert set(documents_of(source, "train", by_fraction(0.2))) == set(texts) - splits[-1]
    assert splits[0] == splits[1] & set(few)
    assert 20 < len(splits[1]) < 60


# Preparing


@pytest.mark.parametrize("packing", ("concatenate", "first_fit"))
def test_the_manifest_counts_what_there_is(tmp_path, corpus, packing):
    prepared = prepare(config_for(corpus, packing=packing), tmp_path / "data")
    texts = texts_of(120)
    manifest = json.loads((prepared.directory / "manifest.json").read_text())
    counts = [manifest[split] for split in ("train", "validation")]
    assert sum(count["documents"] for count in counts) == len(texts)
    size = sum(len(text.encode()) for text in texts)
    assert sum(count["bytes"] for count in counts) == size
    assert sum(count["tokens"] for count in counts) == size + len(texts)  # bytes and boundaries
    for split in ("train", "validation"):
        weights = np.concatenate(
            [batch.weights_BT for batch in Loader(prepared, split, 1, 0).epoch_batches()])
        assert weights.mean() == pytest.approx(manifest[split]["fill"], abs=1e-4)
        assert len(weights) == prepared.num_records(split)
    assert 0 < manifest["validation"]["xz_bits_per_byte"] < (
        manifest["validation"]["xz_bits_per_byte_per_document"])


def test_the_same_inputs_are_reused_wherever_they_lie(tmp_path, corpus):
    first = prepare(config_for(corpus), tmp_path / "data")
    moved = write_lines(tmp_path / "moved.jsonl", texts_of(120))
    stamp = (first.directory / "manifest.json").stat().st_mtime_ns
    for again in (prepare(config_for(corpus), tmp_path / "data"),
                  prepare(config_for(moved, seed=7), tmp_path / "data"),
                  prepare(config_for(corpus, vocab_size=999), tmp_path / "data")):
        assert again.directory == first.directory and again.fingerprint == first.fingerprint
    assert (first.directory / "manifest.json").stat().st_mtime_ns == stamp
    other = prepare(config_for(corpus), tmp_path / "elsewhere")
    for split in ("train", "validation"):
        assert [source["hash"] for source in other.manifest[split]["sources"]] == [
            source["hash"] for source in first.manifest[split]["sources"]]


CHANGES = {
    "sources": lambda path: (SourceConfig(path), SourceConfig(path)),
    "validation_fraction": lambda path: 0.3,
    "tokenizer": lambda path: "unigram",
    "vocab_size": lambda path: 301,
    "sequence_length": lambda path: 37,
    "packing": lambda path: "first_fit",
    "validation_sources": lambda path: (SourceConfig(
        write_lines(pathlib.Path(path).with_name("own.jsonl"), texts_of(9))),),
    "normalize": lambda path: True,
}


def test_every_field_matters(tmp_path, corpus):
    """Each changes the fingerprint, but what is handed to the loader."""
    later = {"seed", "objectives"}
    assert {field.name for field in dataclasses.fields(DataConfig)} == {*CHANGES, *later}
    base = config_for(corpus, tokenizer="bpe", vocab_size=300)
    seen = {prepare(base, tmp_path / "data").fingerprint}
    for field, change in CHANGES.items():
        changed = dataclasses.replace(base, **{field: change(corpus)})
        seen.add(prepare(changed, tmp_path / "data").fingerprint)
    assert len(seen) == len(CHANGES) + 1
    seen.add(prepare(config_for(corpus), tmp_path / "data").fingerprint)
    both = tmp_path / "both.jsonl"
    both.write_text("".join(json.dumps({"text": text, "title": f"{n} {text}"}) + "\n"
                            for n, text in enumerate(texts_of(60))))
    for source in (SourceConfig(corpus, weight=2.0), SourceConfig(str(both)),
                   SourceConfig(str(both), text_field="title")):
        seen.add(prepare(config_for(corpus, sources=(source,)), tmp_path / "data").fingerprint)
    assert len(seen) == len(CHANGES) + 5


def test_a_tokenizer_file_is_used_and_its_content_counts(tmp_path, corpus):
    trained = prepare(config_for(corpus, tokenizer="bpe", vocab_size=300), tmp_path / "data")
    model = tmp_path / "own.model"
    model.write_bytes((trained.directory / "tokenizer.model").read_bytes())
    used = prepare(config_for(corpus, tokenizer=str(model)), tmp_path / "data")
    assert used.tokenizer.hash == trained.tokenizer.hash
    assert used.manifest["train"]["sources"][0]["hash"] == (
        trained.manifest["train"]["sources"][0]["hash"])


def test_the_tokenizer_learns_from_the_train_split_only(tmp_path):
    texts = texts_of(150)
    source = open_source(SourceConfig(write_lines(tmp_path / "a.jsonl", texts)))
    held_out = set(documents_of(source, "validation", by_fraction(0.2)))
    kept = [text for text in texts if text not in held_out]
    more = [text for text in texts_of(400, start=150)]
    source = open_source(SourceConfig(write_lines(tmp_path / "more.jsonl", more)))
    extra = sorted(documents_of(source, "validation", by_fraction(0.2)))
    prepared = [prepare(config_for(write_lines(tmp_path / f"{name}.jsonl", documents),
                                   tokenizer="bpe", vocab_size=300), tmp_path / "data")
                for name, documents in (("one", kept + sorted(held_out)), ("two", kept + extra))]
    assert prepared[0].fingerprint != prepared[1].fingerprint
    assert prepared[0].tokenizer.hash == prepared[1].tokenizer.hash


# Validation text of one's own, and text in one normal form


def test_own_validation_text_is_all_of_it_and_none_of_it_is_trained_on(tmp_path, capsys):
    own, texts = texts_of(30, start=500), texts_of(120)
    corpus = write_lines(tmp_path / "corpus.jsonl", [*texts, *own[:7], *own[:2]])
    first = write_lines(tmp_path / "first.jsonl", own[:20])
    second = tmp_path / "second.txt"
    second.write_text(own[20])
    (tmp_path / "other.txt").write_text(texts[0] + "more")
    config = config_for(
        corpus, sources=(SourceConfig(corpus, weight=3.0), SourceConfig(str(tmp_path / "other.txt"))),
        validation_sources=(SourceConfig(first), SourceConfig(str(second))))
    prepared = prepare(config, tmp_path / "data")
    assert "9 of 129 documents are in data.validation_sources, too" in capsys.readouterr().err
    manifest = prepared.manifest
    assert manifest["train"]["documents"] == 121
    assert manifest["validation"]["documents"] == 21
    assert [source["also_in_validation"] for source in manifest["sources"]] == [9, 0]
    assert len(manifest["validation_sources"]) == 2
    found = {}
    for split in ("train", "validation"):
        ids = np.concatenate([batch.targets_BT[batch.weights_BT == 1]
                              for batch in Loader(prepared, split, 1, 0).epoch_batches()])
        ends = np.flatnonzero(ids == prepared.tokenizer.end_id)
        found[split] = {prepared.tokenizer.decode(document[document > 1].tolist())
                        for document in np.split(ids, ends[:-1])}
    assert found["validation"] == {*own[:21]}
    assert found["train"] == {*texts, texts[0] + "more"}
    Loader(prepared, "train", 4, 0).batch(3)
    again = dataclasses.replace(config, validation_fraction=0.4)
    assert prepare(again, tmp_path / "data").fingerprint == prepared.fingerprint  # Not read.


def test_validation_text_that_is_all_there_is_is_one_clear_line(tmp_path, corpus):
    with pytest.raises(ValueError, match="120 documents with text, all of them in data.valid"):
        prepare(config_for(corpus, validation_sources=(SourceConfig(corpus),)), tmp_path / "data")
    (tmp_path / "empty.txt").write_text("")
    empty = (SourceConfig(str(tmp_path / "empty.txt")),)
    with pytest.raises(ValueError, match="data.validation_sources .*empty.txt: no documents"):
        prepare(config_for(corpus, validation_sources=empty), tmp_path / "data")


@pytest.fixture(scope="module")
def nfc_tokenizer(tmp_path_factory) -> pathlib.Path:
    """As Qwen's and Command R's: byte-level, with a normalizer."""
    folder = tmp_path_factory.mktemp("nfc")
    made = tiny_directories.tokenizer_of(["<|endoftext|>"], normalizers.NFC())
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (folder / "packed.json").write_bytes(pack_tokenizer(folder))
    return folder / "packed.json"


def test_text_in_another_form_is_set_aside_or_normalized(tmp_path, nfc_tokenizer):
    tokenizer = load_tokenizer(nfc_tokenizer)
    text = "caf\u00e9 \u212b \ufb01"
    assert tokenizer.normal_form == "NFC"
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text) != text
    texts = [*texts_of(150), "cafe\u0301"]
    corpus = write_lines(tmp_path / "corpus.jsonl", texts)
    config = config_for(corpus, tokenizer=str(nfc_tokenizer))
    aside = prepare(config, tmp_path / "data")
    entry = json.loads((aside.directory / "quarantine.jsonl").read_text())
    assert entry["line"] == 151 and "not in Unicode's NFC" in entry["reason"]
    assert "data.normalize=True" in entry["reason"]
    changed = prepare(dataclasses.replace(config, normalize=True), tmp_path / "data")
    assert changed.manifest["quarantined"] == 0
    counts = [sum(prepared.manifest[split]["documents"] for split in ("train", "validation"))
              for prepared in (aside, changed)]
    assert counts == [150, 151]
    size = sum(changed.manifest[split]["bytes"] for split in ("train", "validation"))
    assert size == sum(len(unicodedata.normalize("NFC", text).encode()) for text in texts)


# Dying


PREPARE_STDLIB = """
import sys
from batiste.data import DataConfig, prepare
prepare(DataConfig(tokenizer="bytes", sequence_length=64), sys.argv[1])
"""


def start_preparing(directory):
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE_STDLIB, str(directory)],
        env=os.environ | {"PYTHONPATH": PACKAGE_PARENT}, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("reached", ("*", "token_records/**/*array_record*"))
def test_a_killed_preparation_leaves_nothing_that_looks_finished(tmp_path, corpus, reached):
    process = start_preparing(tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(f".preparing-*/{reached}")) and time.monotonic() < deadline:
        if reached == "*" and unfinished(tmp_path):
            break
        time.sleep(0.005)
    assert process.poll() is None, "it was over before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = unfinished(tmp_path)
    assert left and not finished(tmp_path)
    with pytest.raises(ValueError, match="no finished preparation"):
        load_prepared(left[0])
    prepared = prepare(config_for(corpus), tmp_path)
    assert not unfinished(tmp_path)
    assert finished(tmp_path) == [prepared.directory]


@pytest.mark.slow
def test_a_preparation_waits_for_the_one_under_way(tmp_path, corpus):
    """And does not take its work for something left over."""
    process = start_preparing(tmp_path)
    deadline = time.monotonic() + 60
    while not unfinished(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.005)
    prepared = prepare(config_for(corpus), tmp_path)
    assert len(finished(tmp_path)) == 2 and prepared.directory in finished(tmp_path)
    assert process.wait() == 0


@pytest.mark.parametrize("limit", (100_000, 20_000))
def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path, limit):
    """A limit on the size of a file stands for the disk; what the system answers is real."""
    corpus = write_lines(tmp_path / "corpus.jsonl", [os.urandom(500).hex() for _ in range(900)])
    code = ("import sys, resource; from batiste.data import *\n"
            "import batiste.data.record_writer\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)\n"
            "config = DataConfig((SourceConfig(sys.argv[1]),), tokenizer='bytes')\n"
            "try: prepare(config, sys.argv[2])\n"
            "except OSError as error: print('OSError', error)\n")
    done = subprocess.run(
        [sys.executable, "-c", code, corpus, str(tmp_path / "data"), str(limit)],
        env=os.environ | {"PYTHONPATH": PACKAGE_PARENT}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("OSError") and len(done.stdout.splitlines()) == 1
    assert not finished(tmp_path / "data") and not unfinished(tmp_path / "data")


def flip(path: pathlib.Path) -> None:
    """Changes one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flip": flip,
    "truncate": lambda path: os.truncate(path, path.stat().st_size // 2),
    "remove": pathlib.Path.unlink,
}


def test_damage_to_any_file_is_named_and_prepared_again_as_it_was(tmp_path, corpus):
    config = dataclasses.replace(config_for(corpus), tokenizer="characters")
    prepared = prepare(config, tmp_path)
    files = sorted(path for path in prepared.directory.rglob("*") if path.is_file())
    whole = {path: path.read_bytes() for path in files}
    assert {"manifest.json", "tokenizer.model"} < {path.name for path in files} and len(files) > 4
    for path in files:
        for damage in DAMAGES.values():
            damage(path)
            with pytest.raises(ValueError, match=path.name):
                load_prepared(prepared.directory)
            path.write_bytes(whole[path])
    for path, damage in ((files[0], flip), (prepared.directory / "manifest.json", DAMAGES["remove"])):
        damage(path)
        again = prepare(config, tmp_path)
        assert {path: path.read_bytes() for path in files if "array_record" in path.name} == {
            path: text for path, text in whole.items() if "array_record" in path.name}
        assert again.manifest == prepared.manifest


# Bad input


@pytest.mark.parametrize("fields, message", (
    ({"packing": "first-fit"}, "data.packing='first-fit': .* did you mean first_fit"),
    ({"tokenizer": "bpee"}, "data.tokenizer='bpee': .* did you mean bpe"),
    ({"tokenizer": "nowhere.model"}, "nowhere.model: no such tokenizer"),
    ({"validation_fraction": 0.0}, "data.validation_fraction=0.0: expected"),
    ({"sequence_length": 1}, "data.sequence_length=1: expected"),
    ({"vocab_size": 4096.0}, "data.vocab_size=4096.0: expected"),
    ({"seed": -1}, "data.seed=-1: expected"),
    ({"sources": ()}, "data.sources"),
    ({"sources": (SourceConfig(weight=0.0),)}, r"data.sources\[0\].weight=0.0"),
    ({"sources": (SourceConfig(path=""),)}, r"data.sources\[0\].path"),
    ({"sources": (SourceConfig(path="/nowhere/*.txt"),)}, "'/nowhere/.*no such file"),
    ({"tokenizer": "bpe", "vocab_size": 10**6}, "data.vocab_size=1000000: .* at most \\d+ tokens"),
    ({"validation_fraction": 1e-9}, "holds out none of 120 documents"),
))
def test_bad_configuration_names_the_field(tmp_path, corpus, fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        prepare(config_for(corpus, **fields), tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert not finished(tmp_path / "data") and not unfinished(tmp_path / "data")


def test_an_empty_corpus_is_one_clear_line(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="empty.txt: 0 documents with text"):
        prepare(config_for(str(tmp_path / "empty.txt")), tmp_path / "data")


BAD_LINES = (
    (b"{not json", "not JSON"), (b'{"body": "x"}', "no text in field 'text'"),
    (b'{"text": 3}', "no text in field"), (b'"text"', "no text in field"),
    (b'{"text": "\xff"}', "not UTF-8: byte 0xff"), (b'{"text": "\\ud800"}', "half a surrogate"),
)


@pytest.mark.parametrize("bad, reason", BAD_LINES)
def test_a_bad_line_is_set_aside_with_its_place_and_reason(tmp_path, bad, reason):
    path = tmp_path / "corpus.jsonl"
    good = [json.dumps({"text": text}).encode() for text in texts_of(150)]
    path.write_bytes(b"\n".join([*good[:70], bad, b"", *good[70:], b""]))
    prepared = prepare(config_for(str(path)), tmp_path / "data")
    entries = (prepared.directory / "quarantine.jsonl").read_text().splitlines()
    (entry,) = map(json.loads, entries)
    assert entry["file"] == str(path) and entry["line"] == 71 and reason in entry["reason"]
    assert prepared.manifest["quarantined"] == 1
    assert sum(prepared.manifest[split]["documents"] for split in ("train", "validation")) == 150


def test_more_than_one_percent_of_bad_lines_is_an_error_with_the_list_kept(tmp_path):
    path = tmp_path / "corpus.jsonl"
    good = [json.dumps({"text": text}).encode() for text in texts_of(150)]
    path.write_bytes(b"\n".join([*good, *(bad for bad, _ in BAD_LINES[:2])]))
    message = r"2 of 152 documents .*corpus.jsonl:151: not JSON"
    with pytest.raises(ValueError, match=message) as error:
        prepare(config_for(str(path)), tmp_path / "data")
    listed = pathlib.Path(str(error.value).split("listed in ")[1])
    assert len(listed.read_text().splitlines()) == 2
    assert not finished(tmp_path / "data") and not unfinished(tmp_path / "data")


def test_undecodable_text_is_set_aside_with_its_line(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"one\ntwo\n\xe9t\xe9\n")
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    assert not list(open_source(SourceConfig(str(tmp_path / "bad.txt"))).documents(quarantine))
    entry = json.loads(quarantine.path.read_text())
    assert entry["line"] == 3 and "0xe9" in entry["reason"]


def test_only_the_undecodable_document_of_a_large_file_is_set_aside(tmp_path):
    lines = [f"line {n} of many\n".encode() for n in range(LARGE_FILE_BYTES // 10)]
    lines[20_000] = b"caf\xe9\n"
    (tmp_path / "large.txt").write_bytes(b"".join(lines))
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    documents = open_source(SourceConfig(str(tmp_path / "large.txt"))).documents(quarantine)
    kept = sum(map(len, documents))
    assert json.loads(quarantine.path.read_text())["line"] == 20_001
    assert sum(map(len, lines)) - 2 * DOCUMENT_BYTES < kept < sum(map(len, lines))


def test_a_broken_gzip_file_is_one_clear_line(tmp_path):
    path = pathlib.Path(write_lines(tmp_path / "a.jsonl.gz", texts_of(50)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="a.jsonl.gz: broken gzip file"):
        prepare(config_for(str(path)), tmp_path / "data")


def test_importing_is_light():
    code = ("import sys, batiste.data; heavy = {'jax', 'tensorflow', 'grain', 'sentencepiece', "
            "'tensorflow_datasets'}; print(*heavy & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": PACKAGE_PARENT})
    assert done.stdout.strip() == "" and done.returncode == 0, done.stderr

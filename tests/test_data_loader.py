"""The order of examples is a pure function of (seed, mixture, step)."""

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batiste.data import DataConfig, Loader, SourceConfig, load_prepared, prepare
from batiste.data.order import Order, permute


def write_corpus(directory, name, documents, start=0):
    path = directory / f"{name}.jsonl"
    path.write_text("".join(
        f'{{"text": "{name} document {n} says {n * n} {"and so on " * (n % 7)}"}}\n'
        for n in range(start, start + documents)))
    return str(path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two sources of unequal size and weight, in bytes."""
    directory = tmp_path_factory.mktemp("loader")
    sources = tuple(
        SourceConfig(write_corpus(directory, name, documents), weight=weight)
        for name, documents, weight in (("small", 70, 3.0), ("large", 190, 5.0)))
    config = DataConfig(sources=sources, tokenizer="bytes", sequence_length=23,
                        validation_fraction=0.15)
    return prepare(config, directory / "data")


def joined(parts):
    return [np.concatenate(arrays) for arrays in zip(*(part[:5] for part in parts))]


def same(one, other):
    return all(np.array_equal(x, y) for x, y in zip(one, other))


def test_any_rows_of_any_step_are_those_of_the_global_batch(prepared):
    loader = Loader(prepared, "train", 14, seed=5)
    other = Loader(load_prepared(prepared.directory), "train", 14, seed=5)
    for step in (0, 3, 10**6, 10**12):
        whole = loader.batch(step)
        assert whole.tokens_BT.shape == (14, 23)
        for processes in (1, 2, 7):
            share = 14 // processes
            parts = [other.batch(step, slice(i * share, (i + 1) * share))
                     for i in reversed(range(processes))][::-1]
            assert same(whole, joined(parts))


def test_a_transform_is_told_record_and_epoch(prepared):
    told = []
    loader = Loader(prepared, "train", 10, 5, lambda *given: told.append(given) or "rows")
    sizes = [source["records"] for source in prepared.manifest["train"]["sources"]]
    assert all(loader.batch(step) == "rows" for step in range(3 * sum(sizes) // 10))
    seen = [(int(record), int(epoch)) for _, records, epochs in told
            for record, epoch in zip(records, epochs, strict=True)]
    assert len(seen) == len(set(seen))  # Each record once in an epoch of its source,
    for start, size in zip((0, sizes[0]), sizes):  # and all of them in each that is over.
        own = [pair for pair in seen if start <= pair[0] < start + size]
        assert {record for record, epoch in own if epoch == 0} == set(range(start, start + size))
        assert {epoch for _, epoch in own} >= {0, 1}
    before = len(told)
    for _ in range(2):
        list(itertools.islice(loader.epoch_batches(), loader.num_batches))
    passes = [records.tolist() for _, records, epochs in told[before:] if not epochs.any()]
    assert sorted(passes[: loader.num_batches]) == sorted(passes[loader.num_batches:])


def test_iterating_from_a_step_is_reading_it_by_index(prepared):
    loader = Loader(prepared, "train", 6, seed=5)
    for start, rows in ((0, None), (37, None), (37, slice(1, 4))):
        stream = loader.iterate(6 * start, rows)
        for step, batch in zip(range(start, start + 25), stream):
            assert same(batch, loader.batch(step, rows))
        stream.close()


def test_closing_stops_the_threads(prepared):
    before = set(threading.enumerate())
    stream = Loader(prepared, "train", 6, seed=5).iterate(0)
    next(stream)
    started = set(threading.enumerate()) - before
    assert started
    stream.close()
    for thread in started:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in started)


def test_a_failure_while_reading_ahead_reaches_the_reader(prepared):
    loader = Loader(prepared, "train", 6, seed=5)
    loader._readers[0]._length += 1  # no such records
    with pytest.raises(ValueError):
        list(itertools.islice(loader.iterate(0), 20))


def test_seeds_and_steps_give_different_batches(prepared):
    batches = [Loader(prepared, "train", 14, seed).batch(step)
               for seed, step in ((0, 0), (1, 0), (0, 1), (1, 1))]
    for one, other in itertools.combinations(batches, 2):
        assert not same(one, other)


@pytest.mark.parametrize("sizes", ((1,), (2,), (13,), (257,)))
def test_each_epoch_is_a_permutation_unlike_the_others(sizes):
    size = sizes[0]
    order = Order(sizes, [1.0], seed=4)
    epochs = [tuple(order.records_at(epoch * size + np.arange(size))) for epoch in range(5)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 10:
        assert len(set(epochs)) == 5
        neighbour = Order(sizes, [1.0], seed=5)
        assert epochs[1] != tuple(neighbour.records_at(np.arange(size)))


@settings(max_examples=80, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40))
def test_shuffling_is_a_bijection_for_every_size(size, seed):
    keys = np.random.SeedSequence(seed).generate_state(4, np.uint64)
    assert sorted(permute(np.arange(size), size, keys)) == list(range(size))


def test_shuffling_scatters():
    """Where neighbours land is as far apart, and as uncorrelated, as chance would have it."""
    places = permute(np.arange(5000), 5000, np.arange(4, dtype=np.uint64))
    assert abs(np.corrcoef(np.arange(5000), places)[0, 1]) < 0.05
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05
    assert abs(np.abs(np.diff(places)).mean() / (5000 / 3) - 1) < 0.05


def test_each_source_of_a_mixture_is_permuted_in_its_own_epochs():
    sizes, order = (7, 19, 11), Order((7, 19, 11), [0.2, 0.5, 0.3], seed=2)
    drawn = order.records_at(np.arange(4000))
    for start, size in zip((0, 7, 26), sizes):
        own = [record for record in drawn if start <= record < start + size]
        assert len(own) > 20 * size
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size:(epoch + 1) * size]) == list(range(start, start + size))


def test_sources_of_one_size_are_not_shuffled_alike():
    drawn = Order((50, 50), [1.0, 1.0], seed=2).records_at(np.arange(100))
    assert list(drawn[drawn < 50]) != list(drawn[drawn >= 50] - 50)


@pytest.mark.parametrize("weights", (
    (1.0,), (1.0, 1.009), (0.7, 0.3), (1, 2, 3, 5), (0.015, 0.985), (1e-2, 1.0, 1e2)))
def test_realized_proportions_are_the_weights_within_a_thousandth(weights):
    sizes = tuple(range(11, 11 + len(weights)))
    order = Order(sizes, weights, seed=0)
    source_of = np.repeat(np.arange(len(sizes)), sizes)
    expected = np.array(weights) / sum(weights)
    for start in (0, 123_457):
        drawn = source_of[order.records_at(start + np.arange(12_000))]
        share = np.bincount(drawn, minlength=len(sizes)) / len(drawn)
        assert np.abs(share - expected).max() < 0.001
        # Interleaved, too: every stretch has its share, to within a record per other source.
        for stretch in drawn.reshape(-1, 100):
            counts = np.bincount(stretch, minlength=len(sizes))
            assert np.abs(counts - 100 * expected).max() <= len(sizes)


def test_weights_reach_the_batches(prepared):
    loader = Loader(prepared, "train", 16, seed=1)
    small = prepared.manifest["train"]["sources"][0]["records"]
    drawn = loader._order.records_at(np.arange(16 * 500))
    assert abs((drawn < small).mean() - 3 / 8) < 0.001


def test_a_pass_reads_each_record_once_in_order_and_accounts_for_every_byte(prepared):
    for split, batch_size in (("validation", 7), ("train", 9), ("validation", 1000)):
        loader = Loader(prepared, split, batch_size, seed=0)
        batches = list(loader.epoch_batches())
        assert len(batches) == loader.num_batches
        assert all(batch.tokens_BT.shape == (batch_size, 23) for batch in batches)
        targets = np.concatenate([batch.targets_BT for batch in batches])
        weights = np.concatenate([batch.weights_BT for batch in batches])
        records = prepared.num_records(split)
        assert weights[:records].any(axis=1).all() and not weights[records:].any()
        lengths = prepared.tokenizer.byte_lengths_V[targets] * weights
        assert lengths.sum() == prepared.num_bytes(split)
        assert weights.sum() == prepared.manifest[split]["tokens"]
        halves = [list(loader.epoch_batches(rows)) for rows in (slice(0, 3), slice(3, None))]
        for whole, *parts in zip(batches, *halves):
            assert same(whole, joined(parts))


def test_a_pass_gives_the_documents_back(prepared):
    loader = Loader(prepared, "validation", 5, seed=0)
    bos = prepared.tokenizer.bos_id
    text = ""
    for batch in loader.epoch_batches():
        for targets, weights in zip(batch.targets_BT, batch.weights_BT):
            text += "".join("\n" if token == bos else prepared.tokenizer.decode([token])
                            for token in targets[weights == 1])
    documents = text.splitlines()
    assert len(documents) == prepared.manifest["validation"]["documents"]
    assert all(" document " in document for document in documents)


def test_fewer_records_than_one_batch_is_one_clear_line(prepared):
    records = prepared.num_records("train")
    Loader(prepared, "train", records, seed=0)
    with pytest.raises(ValueError, match=f"{records} records of 23 .* one batch of {records + 1}"):
        Loader(prepared, "train", records + 1, seed=0)
    for arguments in (("test", 4, 0), ("train", 0, 0), ("train", 4, -1)):
        with pytest.raises(ValueError, match="expected"):
            Loader(prepared, *arguments)

"""Laws of objectives: what they hide stays hidden, rates are real, documents stay apart."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batiste.configs.experiment import Experiment
from batiste.data import (
    DataConfig, RecordObjective, encode_prompt, special_ids, target_length, transform_of,
)
from batiste.data.packing import concatenate, first_fit, unpack
from batiste.data.record_objective import MODES
from batiste.data.tokenizer import ByteTokenizer

LENGTH = 48
TOKENIZER = ByteTokenizer()
BOS, PAD = TOKENIZER.bos_id, TOKENIZER.pad_id
WORDS = ("the", "quick", "fox", "ran", "over", "it.", "and", "so", "on\n")


def config(*objectives: RecordObjective, length: int = LENGTH, seed: int = 3) -> DataConfig:
    made = DataConfig(tokenizer="bytes", sequence_length=length, objectives=objectives, seed=seed)
    made.validate()
    return made


def transformed(records, data: DataConfig, form: str, epoch: int = 0):
    numbers = np.arange(len(records))
    return transform_of(data, form, TOKENIZER)(records, numbers, np.full_like(numbers, epoch))


@st.composite
def packed(draw, length: int = LENGTH):
    """Records of documents of words, packed one way or the other."""
    lengths = draw(st.lists(st.integers(0, 40), min_size=4, max_size=14))
    random = np.random.default_rng(draw(st.integers(0, 2**20)))
    texts = [" ".join(random.choice(WORDS, count)) for count in lengths]
    documents = [np.array(ids, np.int32) for ids in TOKENIZER.encode_batch(texts)]
    pack = concatenate if draw(st.booleans()) else first_fit
    return np.stack(list(pack(documents, length, TOKENIZER)))


many = settings(max_examples=25, deadline=None, derandomize=True)


def documents_of(batch, row):
    """The tokens of each segment of a row as they are numbered, by position."""
    segments, found = batch.segments_BT[row], []
    for segment in range(1, segments.max(initial=0) + 1):
        places = np.flatnonzero(segments == segment)
        found.append(places[np.argsort(batch.positions_BT[row][places])])
    return found


DECODERS = {
    "middle": RecordObjective("middle", rate=0.7, suffix_first=0.3),
    "prefix": RecordObjective("prefix"),
}
ENCODERS = {
    "masked": RecordObjective("masked", rate=0.2),
    "words": RecordObjective("masked", rate=0.2, whole_words=True),
    "order": RecordObjective("order", rate=0.1),
}
TWO_STACKS = {
    "spans": RecordObjective("spans", rate=0.3),
    "prefix": RecordObjective("prefix"),
    "denoise": RecordObjective("denoise", rate=0.3, shuffled=True),
}
REPLACED = RecordObjective("replaced", rate=0.25)
OBJECTIVES = [
    (form, each) for form, kinds in (
        ("decoder", DECODERS), ("encoder", ENCODERS), ("encoder_decoder", TWO_STACKS))
    for each in kinds.values()] + [("encoder", REPLACED)]


@pytest.mark.parametrize("form,objective", OBJECTIVES, ids=lambda value: getattr(value, "kind", ""))
@given(records=packed())
@many
def test_a_row_is_decided_by_seed_epoch_and_record_alone(form, objective, records):
    data = config(objective, dataclasses.replace(objective, weight=2.0))
    transform = transform_of(data, form, TOKENIZER)
    numbers, epochs = np.arange(len(records)) + 5, np.arange(len(records)) % 3
    whole = transform(records, numbers, epochs)
    for row in range(len(records)):
        alone = transform(records[row:row + 1], numbers[row:row + 1], epochs[row:row + 1])
        for name, value in whole._asdict().items():
            np.testing.assert_array_equal(
                None if value is None else value[row:row + 1], getattr(alone, name), name)


@pytest.mark.parametrize("form,objective", OBJECTIVES, ids=lambda value: getattr(value, "kind", ""))
def test_seeds_epochs_and_records_draw_anew(form, objective):
    text = " ".join(WORDS * 4)[: LENGTH]
    records, seen = np.tile(np.array([BOS, *TOKENIZER.encode(text)], np.int32), (8, 1)), set()
    for seed, number, epoch in ((0, 0, 0), (1, 0, 0), (0, 8, 0), (0, 0, 1)):
        batch = transform_of(config(objective, seed=seed), form, TOKENIZER)(
            records, number + np.arange(8), np.full(8, epoch))
        seen.add(repr([None if field is None else field.tolist() for field in batch]))
    assert len(seen) == 4


def undone(tokens, special):
    """The text of a document of which the middle was moved, and whether the suffix came first."""
    prefix, suffix, middle = (
        int(np.flatnonzero(tokens == special[name])[0])
        for name in ("<prefix>", "<suffix>", "<middle>"))
    assert prefix == 0 and suffix < middle
    a, c, b = tokens[1:suffix], tokens[suffix + 1:middle], tokens[middle + 1:]
    return [*a, *b, *c], suffix == 1


@given(records=packed())
@many
def test_a_moved_middle_can_be_moved_back(records):
    data = config(DECODERS["middle"])
    before, after = unpack(records, TOKENIZER), transformed(records, data, "decoder")
    special = special_ids(data, TOKENIZER)
    np.testing.assert_array_equal(before.segments_BT, after.segments_BT)
    np.testing.assert_array_equal(before.weights_BT, after.weights_BT)
    for row in range(len(records)):
        for places in documents_of(after, row):
            was = np.append(before.tokens_BT[row, places], before.targets_BT[row, places[-1]])
            now = np.append(after.tokens_BT[row, places], after.targets_BT[row, places[-1]])
            if special["<prefix>"] not in now:
                np.testing.assert_array_equal(was, now)
                continue
            begins = int(now[0] == BOS)
            assert now[-1] == BOS  # Every middle is over before its document is.
            text, _ = undone(now[begins:-1], special)
            assert text == was[begins:begins + len(text)].tolist()
            assert len(text) == len(was) - begins - 4


def test_as_many_middles_are_moved_as_asked():
    data = config(RecordObjective("middle", rate=0.6, suffix_first=0.25))
    special = special_ids(data, TOKENIZER)
    record = np.array([BOS, *TOKENIZER.encode(" ".join(WORDS * 4)[:LENGTH - 1]), BOS])
    rows = transformed(np.tile(record, (3000, 1)), data, "decoder").tokens_BT
    moved = rows[(rows == special["<prefix>"]).any(axis=1)]
    assert abs(len(moved) / 3000 - 0.6) < 0.03
    first = np.mean([undone(row[1:], special)[1] for row in moved])
    # A prefix may be empty either way: of cuts in 44 tokens, in 1 of 23 cases.
    assert abs(first - (0.25 + 0.75 / 23)) < 0.03


@given(records=packed())
@many
def test_a_prefix_is_seen_and_not_predicted(records):
    before = unpack(records, TOKENIZER)
    after = transformed(records, config(DECODERS["prefix"]), "decoder")
    for row in range(len(records)):
        for was, now in zip(documents_of(before, row), documents_of(after, row), strict=True):
            for name in ("tokens_BT", "targets_BT", "positions_BT", "segments_BT"):
                np.testing.assert_array_equal(
                    getattr(before, name)[row, was], getattr(after, name)[row, now])
            seen, weights = now < after.prefix_B[row], after.weights_BT[row, now]
            count = seen.sum()
            # A beginning, of which only the last token has something to predict; the rest in order.
            assert 1 <= count <= len(now) and seen[:count].all()
            assert weights.tolist() == [0] * (count - 1) + [1] * (len(now) - count + 1)
            assert (np.diff(now[count - 1:]) > 0).all() and (np.diff(now[:count]) > 0).all()


@pytest.mark.parametrize("name", ("masked", "words", "replaced"))
@given(records=packed())
@many
def test_hidden_tokens_are_targets_and_nothing_else_changes(name, records):
    data = config(ENCODERS.get(name, REPLACED))
    before, after = unpack(records, TOKENIZER), transformed(records, data, "encoder")
    mask = special_ids(data, TOKENIZER)["<mask>"]
    hidden = after.weights_BT == 1
    np.testing.assert_array_equal(before.segments_BT, after.segments_BT)
    np.testing.assert_array_equal(before.tokens_BT, after.targets_BT)
    np.testing.assert_array_equal(before.tokens_BT[~hidden], after.tokens_BT[~hidden])
    assert not (hidden & (before.segments_BT == 0)).any()
    assert TOKENIZER.byte_lengths_V[after.targets_BT[hidden]].all()
    assert not (after.tokens_BT[~hidden] == mask).any()
    if name == "replaced":
        assert (after.tokens_BT[hidden] == mask).all()
    if name == "words":
        for row, places in ((row, places) for row in range(len(records))
                            for places in documents_of(after, row)):
            text = before.tokens_BT[row, places]
            word_of = np.cumsum([not chr(byte).isalnum() for byte in np.maximum(text - 2, 0)])
            for word in np.unique(word_of):
                inside = places[(word_of == word) & (text != BOS)]
                assert len(set(hidden[row, inside])) <= 1, "a word is hidden whole or not at all"


@pytest.mark.parametrize("whole_words", (False, True))
def test_hidden_tokens_are_as_many_as_asked_and_replaced_as_bert_does(whole_words):
    data = config(RecordObjective("masked", rate=0.15, whole_words=whole_words))
    mask = special_ids(data, TOKENIZER)["<mask>"]
    record = np.array([BOS, *TOKENIZER.encode(" ".join(WORDS * 4)[:LENGTH])])
    rows = transformed(np.tile(record, (4000, 1)), data, "encoder")
    hidden = rows.weights_BT == 1
    assert abs(hidden.sum() / (4000 * (LENGTH - 1)) - 0.15) < 0.004
    masked = (rows.tokens_BT == mask)[hidden].mean()
    kept = (rows.tokens_BT == rows.targets_BT)[hidden].mean()
    assert abs(masked - 0.8) < 0.01 and abs(kept - 0.1) < 0.01
    # Random tokens are of the text, not always the same, and sometimes the token itself.
    others = rows.tokens_BT[hidden & (rows.tokens_BT != mask) & (rows.tokens_BT != rows.targets_BT)]
    assert TOKENIZER.byte_lengths_V[others].all() and len(set(others.tolist())) > 200


@given(records=packed())
@many
def test_halves_are_swapped_and_the_label_says_so(records):
    data = config(RecordObjective("order", rate=0.2))
    before, after = unpack(records, TOKENIZER), transformed(records, data, "encoder")
    special = special_ids(data, TOKENIZER)
    for row in range(len(records)):
        for was, now in zip(documents_of(before, row), documents_of(after, row), strict=True):
            text, tokens = before.tokens_BT[row, was], after.targets_BT[row, now]
            cut = np.flatnonzero(after.tokens_BT[row, now] == special["<separator>"])
            if len(cut) == 0:
                assert tokens[0] not in special.values() and not after.types_BT[row, now].any()
                continue
            assert after.tokens_BT[row, now[0]] == BOS
            first, second = tokens[1:cut[0]], tokens[cut[0] + 1:]
            swapped = tokens[0] == special["<swapped>"]
            assert swapped or tokens[0] == special["<in_order>"]
            whole = np.concatenate([second, first] if swapped else [first, second])
            begins = int(text[0] == BOS)
            np.testing.assert_array_equal(whole, text[begins:begins + len(whole)])
            assert len(whole) >= len(text) - 2
            types = after.types_BT[row, now]
            assert types.tolist() == [0] * (cut[0] + 1) + [1] * len(second)
            weights = after.weights_BT[row, now]
            assert weights[0] == weights[1:].sum() and weights[cut[0]] == 0


def test_half_of_the_documents_are_swapped():
    data = config(RecordObjective("order"))
    record = np.array([BOS, *TOKENIZER.encode(" ".join(WORDS * 4)[:LENGTH])])
    labels = transformed(np.tile(record, (2000, 1)), data, "encoder").targets_BT[:, 0]
    assert abs((labels == special_ids(data, TOKENIZER)["<swapped>"]).mean() - 0.5) < 0.04


def of_segment(tokens_BT, segments_BT, row, segment):
    return tokens_BT[row][segments_BT[row] == segment]


@pytest.mark.parametrize("name", TWO_STACKS)
@given(records=packed())
@many
def test_what_is_read_and_what_is_written_make_the_document(name, records):
    data = config(TWO_STACKS[name])
    before, after = unpack(records, TOKENIZER), transformed(records, data, "encoder_decoder")
    special = special_ids(data, TOKENIZER)
    assert after.tokens_BT.shape[1] == target_length(data)
    for row in range(len(records)):
        texts = [before.tokens_BT[row, places] for places in documents_of(before, row)]
        texts = iter([text[text != BOS] for text in texts])
        for segment in range(1, after.segments_BT[row].max(initial=0) + 1):
            inputs = of_segment(after.tokens_BT, after.segments_BT, row, segment)
            targets = of_segment(after.targets_BT, after.segments_BT, row, segment)
            read = of_segment(after.source_tokens_BS, after.source_segments_BS, row, segment)
            assert inputs[0] == BOS and targets[-1] == BOS and len(read)
            np.testing.assert_array_equal(inputs[1:], targets[:-1])
            whole = made_whole(name, read, targets[:-1], special)
            # The documents in their order; one whose part does not fit is left out.
            assert any(whole.tolist() == text[:len(whole)].tolist()
                       and len(text) - len(whole) <= 1 for text in texts)
        weights = after.weights_BT[row]
        open_ends = np.count_nonzero((after.segments_BT[row] > 0) & (weights == 0))
        assert open_ends <= (name == "prefix") and not weights[after.segments_BT[row] == 0].any()


@pytest.mark.parametrize("name", TWO_STACKS)
@given(records=packed(), mode=st.sampled_from(MODES))
@many
def test_a_mode_is_read_first_and_changes_nothing_else(name, records, mode):
    plain = config(TWO_STACKS[name])
    moded = config(dataclasses.replace(TWO_STACKS[name], mode=mode))
    before, after = (transformed(records, each, "encoder_decoder") for each in (plain, moded))
    ids, token = special_ids(plain, TOKENIZER), special_ids(moded, TOKENIZER)[mode]
    assert ids.items() < special_ids(moded, TOKENIZER).items() and token not in ids.values()
    for field in ("tokens_BT", "targets_BT", "weights_BT", "segments_BT", "positions_BT"):
        np.testing.assert_array_equal(getattr(before, field), getattr(after, field), field)
    for row in range(len(records)):
        segments = before.source_segments_BS[row]
        assert set(segments) - {0} == set(after.source_segments_BS[row]) - {0}
        for segment in range(1, segments.max(initial=0) + 1):
            was, now = (of_segment(each.source_tokens_BS, each.source_segments_BS, row, segment)
                        for each in (before, after))
            assert now.tolist() == [token, *was]
            places = of_segment(after.source_positions_BS, after.source_segments_BS, row, segment)
            assert places.tolist() == list(range(len(now)))
    # In a prompt its name stands for it.
    prompt = encode_prompt(TOKENIZER, special_ids(moded, TOKENIZER), f"{mode} a")
    assert prompt == [token, *TOKENIZER.encode(" a")]


def test_a_mode_is_refused_where_nothing_reads_it():
    with pytest.raises(ValueError, match=r"objectives\[0\].mode='\[Q\]': expected one of"):
        config(RecordObjective("spans", mode="[Q]"))
    with pytest.raises(ValueError, match="mode=.* has no effect on kind='masked'"):
        config(RecordObjective("masked", mode="[R]"))
    decoder = Experiment(data=config(RecordObjective("prefix", mode="[S]")))
    with pytest.raises(ValueError, match="mode='\\[S\\]' is read by an encoder"):
        decoder.validate()


def made_whole(name, read, written, special):
    """The text that a pair was made of, by the definition of its objective."""
    if name == "prefix":
        return np.concatenate([read, written])
    if name == "denoise":
        kept = np.setdiff1d(read, list(special.values()))
        assert np.isin(kept, written).all() and len(read) <= len(written)
        return written
    marks = [token for token in written if token in special.values()]
    assert len(set(marks)) == len(marks) and [t for t in read if t in marks] == marks
    assert read[0] not in marks and written[0] == marks[0]
    spans = dict(zip(marks, np.split(written, np.flatnonzero(np.isin(written, marks)))[1:]))
    return np.concatenate([spans[t][1:] if t in spans else [t] for t in read.tolist()])


@pytest.mark.parametrize("rate,mean_span", ((0.15, 3.0), (0.5, 8.0)))
def test_spans_are_as_many_and_as_long_as_asked(rate, mean_span):
    data = config(RecordObjective("spans", rate=rate, mean_span=mean_span), length=400)
    record = np.array([BOS, *TOKENIZER.encode(" ".join(WORDS * 20)[:400])])
    rows = transformed(np.tile(record, (300, 1)), data, "encoder_decoder")
    first = special_ids(data, TOKENIZER)["<span_0>"]
    marks = (rows.targets_BT >= first).sum(axis=1)
    hidden = rows.weights_BT.sum(axis=1) - 1 - marks
    assert abs(hidden.mean() / 399 - rate) < 0.01
    assert abs((hidden / marks).mean() / mean_span - 1) < 0.05


def test_a_damaged_copy_lacks_as_much_as_asked_in_spans_of_poisson_length():
    data = config(RecordObjective("denoise", rate=0.3, mean_span=3.0), length=400)
    record = np.array([BOS, *TOKENIZER.encode(" ".join(WORDS * 20)[:400])])
    rows = transformed(np.tile(record, (300, 1)), data, "encoder_decoder")
    mask = special_ids(data, TOKENIZER)["<mask>"]
    kept = ((rows.source_segments_BS > 0) & (rows.source_tokens_BS != mask)).sum(axis=1)
    masks = (rows.source_tokens_BS == mask).sum(axis=1)
    assert abs((1 - kept / 399).mean() - 0.3) < 0.005
    assert abs(((399 - kept) / masks).mean() / 3 - 1) < 0.1
    # Without `shuffled`, what is kept is kept in order.
    text, at = record[1:], 0
    for token in rows.source_tokens_BS[0]:
        if token not in (mask, PAD):
            at += int(np.flatnonzero(text[at:] == token)[0]) + 1


def test_sentences_are_shuffled_whole():
    data = config(RecordObjective("denoise", rate=1e-9, shuffled=True), length=24)
    text = np.array(TOKENIZER.encode("One is. Two was! Third\n"))
    rows = transformed(np.tile([BOS, *text, BOS], (200, 1)), data, "encoder_decoder")
    seen = {TOKENIZER.decode(row[row != PAD].tolist()) for row in rows.source_tokens_BS}
    parts = ("One is.", " Two was!", " Third\n")
    assert seen == {"".join(order) for order in itertools.permutations(parts)}


def test_a_mixture_draws_by_weight():
    r, s, x = (RecordObjective("spans", weight=5.0), RecordObjective("prefix", weight=2.0),
               RecordObjective("spans", weight=1.0, rate=0.5, mean_span=8.0))  # UL2's R, S and X.
    record = np.array([BOS, *TOKENIZER.encode(" ".join(WORDS * 4)[:LENGTH])])
    data = config(r, s, x)
    rows = transformed(np.tile(record, (1600, 1)), data, "encoder_decoder")
    spans = (rows.targets_BT >= 258).sum(axis=1)
    hidden = rows.weights_BT.sum(axis=1) - spans
    found = [(spans == 0).mean(), ((spans > 0) & (hidden > 15)).mean()]
    np.testing.assert_allclose(found, [2 / 8, 1 / 8], atol=0.03)

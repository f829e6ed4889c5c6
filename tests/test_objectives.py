"""Laws of objectives: what they hide stays hidden, rates are real, documents stay apart."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_checks
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from batiste.data import DataConfig, RecordObjective, special_ids, transform_of
from batiste.data.packing import concatenate, first_fit, unpack
from batiste.data.tokenizer import ByteTokenizer
from batiste.models import Beside, Transformer, TransformerConfig
from batiste.sharding import MeshConfig
from batiste.train import batch_loss

LENGTH = 48
ROWS, STEPS = 32, 120
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
    return np.stack(list(pack(documents, length, BOS, PAD)))


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
OBJECTIVES = [(form, each) for form, kinds in (("decoder", DECODERS), ("encoder", ENCODERS))
              for each in kinds.values()]


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
    record = np.array([[BOS, *TOKENIZER.encode(text)]], np.int32)
    seen = set()
    for seed, number, epoch in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        batch = transform_of(config(objective, seed=seed), form, TOKENIZER)(
            record, np.array([number]), np.array([epoch]))
        seen.add(repr([None if field is None else field.tolist() for field in batch]))
    assert len(seen) > 2


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
    before, after = unpack(records, BOS, PAD), transformed(records, data, "decoder")
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
    before = unpack(records, BOS, PAD)
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


@pytest.mark.parametrize("name", ("masked", "words"))
@given(records=packed())
@many
def test_hidden_tokens_are_targets_and_nothing_else_changes(name, records):
    data = config(ENCODERS[name])
    before, after = unpack(records, BOS, PAD), transformed(records, data, "encoder")
    mask = special_ids(data, TOKENIZER)["<mask>"]
    hidden = after.weights_BT == 1
    np.testing.assert_array_equal(before.segments_BT, after.segments_BT)
    np.testing.assert_array_equal(before.tokens_BT, after.targets_BT)
    np.testing.assert_array_equal(before.tokens_BT[~hidden], after.tokens_BT[~hidden])
    assert not (hidden & (before.segments_BT == 0)).any()
    assert TOKENIZER.byte_lengths_V[after.targets_BT[hidden]].all()
    assert not (after.tokens_BT[~hidden] == mask).any()
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
    before, after = unpack(records, BOS, PAD), transformed(records, data, "encoder")
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


def model_of(form: str, **change) -> TransformerConfig:
    """A model whose dims all differ and that tensor 2 and data 4 divide."""
    return TransformerConfig(**dict(
        form=form, vocab_size=272, num_layers=2, model_dim=24, num_heads=4, num_kv_heads=2,
        head_dim=6, mlp_dim=40, max_length=LENGTH) | change)


def expected_sight(form: str, batch) -> np.ndarray:
    """Which places of its row each place may look at, by the definition of the objective."""
    B, T = batch.tokens_BT.shape
    seen_BTT = np.tile(np.eye(T, dtype=bool), (B, 1, 1))  # Itself, by the residual stream.
    for row in range(B):
        prefix = 0 if batch.prefix_B is None else batch.prefix_B[row]
        for places in documents_of(batch, row):
            for index, place in enumerate(places):
                seen_BTT[row, place, places if form == "encoder" else places[:index + 1]] = True
                seen_BTT[row, place, places[places < prefix]] = True
    return seen_BTT


def sight(model_config: TransformerConfig, batch) -> np.ndarray:
    """Which places of its row the features at each place depend on, by gradient."""
    model = Transformer(model_config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(params)
    T = batch.tokens_BT.shape[1]
    own_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], batch.tokens_BT.shape)
    beside = Beside(*(getattr(batch, name) for name in Beside._fields))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def gradient(weights_T, row):
        def total(table_VD):
            used = nnx.merge(graphdef, params | {"embedding_VD": table_VD})
            one = jax.tree.map(lambda x: x[row][None], (own_BT, batch.positions_BT,
                                                        batch.segments_BT, beside))
            x_BTD = used.features(*one[:3], beside=one[3])[0]
            return (jnp.square(x_BTD).sum(axis=-1) * weights_T[None]).sum()
        return jnp.abs(jax.grad(total)(params["embedding_VD"])[:T]).sum(axis=-1) > 0

    return np.stack([gradient(np.eye(T, dtype=np.float32), row)
                     for row in range(len(batch.tokens_BT))])


def sample_records(length: int) -> np.ndarray:
    """Two records of unequal documents; the second begins in the middle of one and is padded."""
    text = TOKENIZER.encode(" ".join(WORDS * 9))
    rows = [[BOS, *text[:length // 3], BOS, *text[3:length]],
            [*text[:length // 2], BOS, *text[7:7 + length // 4], BOS]]
    return np.stack([np.pad(row[:length + 1], (0, max(0, length + 1 - len(row)))) for row in rows])


def test_a_decoder_sees_what_prefixes_let_it_see():
    batch = transformed(sample_records(14), config(DECODERS["prefix"], length=14), "decoder")
    batch = jax.tree.map(jnp.asarray, batch)
    expected = expected_sight("decoder", jax.device_get(batch))
    np.testing.assert_array_equal(sight(model_of("decoder"), batch), expected)
    # What is predicted is not among what is seen.
    for row, place in zip(*np.nonzero(batch.weights_BT)):
        later = [other for other in range(14) if batch.segments_BT[row, other]
                 == batch.segments_BT[row, place]
                 and batch.positions_BT[row, other] > batch.positions_BT[row, place]]
        assert not expected[row, place, later].any()


def test_an_encoder_sees_all_of_a_document_and_no_other():
    data = config(ENCODERS["order"], length=14)
    batch = transformed(sample_records(14), data, "encoder")
    model = model_of("encoder", token_types=2, head_transform=True)
    seen = sight(model, jax.tree.map(jnp.asarray, batch))
    np.testing.assert_array_equal(seen, expected_sight("encoder", batch))


MIXTURES = {
    "decoder": (tuple(DECODERS.values()), {}),
    "encoder": (tuple(ENCODERS.values()), {
        "token_types": 2, "head_transform": True, "layer_pattern": ("local", "global"),
        "window": 4}),
}


@pytest.fixture(scope="module")
def records():
    """Modules of the standard library, as bytes."""
    folder = pathlib.Path(json.__file__).parent
    texts = [path.read_text() for path in sorted(folder.glob("*.py"))]
    documents = [np.array(ids, np.int32) for ids in TOKENIZER.encode_batch(texts)]
    return np.stack(list(concatenate(documents, LENGTH, BOS, PAD)))


@pytest.mark.parametrize("form", MIXTURES)
def test_each_objective_is_learned_beyond_its_unigram_loss(form, records):
    """One run learns all objectives of a form; each then beats the best guess without a context."""
    objectives, change = MIXTURES[form]
    train = step_checks.train_config("adamw")
    train.schedule.learning_rate, train.num_steps, train.batch_size = 0.01, STEPS, ROWS
    mesh, program, step = step_checks.start(
        train, MeshConfig(data=1), jax.devices()[:1], model_of(form, **change))
    transform = transform_of(config(*objectives), form, TOKENIZER)
    state, random = program.initialize(), np.random.default_rng(0)
    for epoch in range(STEPS):
        drawn = random.integers(0, len(records), ROWS)
        batch = transform(records[drawn], drawn, np.full(ROWS, epoch))
        state, _ = step(state, step_checks.place_batch(mesh, batch))

    @jax.jit
    def loss_of(params, batch):
        terms = batch_loss(nnx.merge(program.graphdef, params), batch, None, train.objective, None)
        return terms.loss, terms.tokens_B.sum()

    for number, objective in enumerate(objectives):
        # Alone, but in the form of the mixture, so that one program measures all.
        alone = tuple(dataclasses.replace(each, weight=1.0 if each is objective else 1e-9)
                      for each in objectives)
        drawn = np.arange(256) % len(records)
        batch = transform_of(config(*alone), form, TOKENIZER)(records[drawn], drawn, drawn * 0)
        counts = np.bincount(batch.targets_BT.reshape(-1), batch.weights_BT.reshape(-1))
        shares = counts[counts > 0] / counts.sum()
        unigram = -(shares * np.log(shares)).sum()
        total, tokens = loss_of(state.params, batch)
        print(objective.kind, float(total / tokens), unigram)
        assert total / tokens < unigram - 0.1, (number, objective)


@pytest.mark.parametrize("form", MIXTURES)
def test_a_mesh_has_the_numbers_of_one_device(form, records):
    objectives, change = MIXTURES[form]
    model, train = model_of(form, **change), step_checks.train_config("sgd")
    transform = transform_of(config(*objectives), form, TOKENIZER)
    batch = transform(records[:8], np.arange(8), np.zeros(8, int))
    step_checks.check_equal(
        step_checks.three_steps(train, MeshConfig(data=4, tensor=2, zero=3), model, batch),
        step_checks.alone(train, model, batch))

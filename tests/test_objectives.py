"""Laws of objectives: what they hide stays hidden, rates are real, documents stay apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from batiste.data import DataConfig, RecordObjective, special_ids, transform_of
from batiste.data.packing import concatenate, first_fit, unpack
from batiste.data.tokenizer import ByteTokenizer
from batiste.models import Beside, Transformer, TransformerConfig

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
OBJECTIVES = [("decoder", each) for each in DECODERS.values()]


@pytest.mark.parametrize("form,objective", OBJECTIVES, ids=lambda value: getattr(value, "kind", ""))
@given(records=packed())
@many
def test_a_row_is_decided_by_seed_epoch_and_record_alone(form, objective, records):
    data = config(objective, RecordObjective(objective.kind, weight=2.0))
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


def model_of(form: str, **change) -> TransformerConfig:
    """A model whose dims all differ and that tensor 2 and data 4 divide."""
    return TransformerConfig(**dict(
        form=form, vocab_size=272, num_layers=2, model_dim=24, num_heads=4, num_kv_heads=2,
        head_dim=6, mlp_dim=40, max_length=LENGTH) | change)


def expected_sight(batch) -> np.ndarray:
    """Which places of its row each place may look at, by the definition of the objective."""
    B, T = batch.tokens_BT.shape
    seen_BTT = np.tile(np.eye(T, dtype=bool), (B, 1, 1))  # Itself, by the residual stream.
    for row in range(B):
        prefix = 0 if batch.prefix_B is None else batch.prefix_B[row]
        for places in documents_of(batch, row):
            for index, place in enumerate(places):
                seen_BTT[row, place, places[:index + 1]] = True
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
    expected = expected_sight(jax.device_get(batch))
    np.testing.assert_array_equal(sight(model_of("decoder"), batch), expected)
    # What is predicted is not among what is seen.
    for row, place in zip(*np.nonzero(batch.weights_BT)):
        later = [other for other in range(14) if batch.segments_BT[row, other]
                 == batch.segments_BT[row, place]
                 and batch.positions_BT[row, other] > batch.positions_BT[row, place]]
        assert not expected[row, place, later].any()

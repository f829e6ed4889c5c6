"""The forms of the model: who sees what, what they learn, cached = full, meshes = one device."""

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
from test_objectives import (
    BOS, DECODERS, ENCODERS, LENGTH, TOKENIZER, TWO_STACKS, WORDS, config, documents_of,
    transformed,
)

from batiste.data import transform_of
from batiste.data.packing import PADDING, concatenate
from batiste.inference import SamplingConfig, generate
from batiste.models import Beside, Transformer, TransformerConfig
from batiste.models.positions import relative_bias
from batiste.sharding import MeshConfig
from batiste.train import batch_loss

# Steps of so many rows, that all objectives of a form need.
BUDGET = {"decoder": (60, 16), "encoder": (120, 32), "encoder_decoder": (110, 16)}


def model_of(form: str, **change) -> TransformerConfig:
    """A model whose dims all differ and that tensor 2 and data 4 divide."""
    return TransformerConfig(**dict(
        form=form, vocab_size=272, num_layers=2,
        encoder_layers=3 if form == "encoder_decoder" else None, model_dim=24, num_heads=4,
        num_kv_heads=2,
        head_dim=6, mlp_dim=40, max_length=LENGTH) | change)


def expected_sight(form: str, batch) -> np.ndarray:
    """Which places of its row, and of its source, each place may look at, by definition."""
    B, T = batch.tokens_BT.shape
    seen_BTT = np.tile(np.eye(T, dtype=bool), (B, 1, 1))  # Itself, by the residual stream.
    for row in range(B):
        prefix = 0 if batch.prefix_B is None else batch.prefix_B[row]
        for places in documents_of(batch, row):
            for index, place in enumerate(places):
                seen_BTT[row, place, places if form == "encoder" else places[:index + 1]] = True
                seen_BTT[row, place, places[places < prefix]] = True
    if batch.source_segments_BS is None:
        return seen_BTT
    segments_BT, source_BS = batch.segments_BT, batch.source_segments_BS
    own_BTS = (segments_BT[:, :, None] == source_BS[:, None]) & (segments_BT[:, :, None] > 0)
    return np.concatenate([seen_BTT, own_BTS], axis=2)


def sight(model_config: TransformerConfig, batch) -> np.ndarray:
    """Which places of its row and of its source the features at each place depend on, by gradient.

    Every input is a token of its own, so its gradient is a row of the embedding's.
    """
    model = Transformer(model_config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    params, name = nnx.to_pure_dict(params), f"embedding_V{model.width}"
    T = batch.tokens_BT.shape[1]
    source = batch.source_tokens_BS
    total = T if source is None else T + source.shape[1]
    one = batch._replace(
        tokens_BT=jnp.zeros_like(batch.tokens_BT) + jnp.arange(T, dtype=jnp.int32)[None],
        source_tokens_BS=None if source is None
        else jnp.zeros_like(source) + jnp.arange(T, total, dtype=jnp.int32)[None])

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def gradient(weights_T, one):
        def size(table_VD):
            used = nnx.merge(graphdef, params | {name: table_VD})
            beside = Beside(*(getattr(one, name) for name in Beside._fields))
            x_BTD = used.features(
                one.tokens_BT, one.positions_BT, one.segments_BT, beside=beside)[0]
            return (jnp.square(x_BTD).sum(axis=-1) * weights_T[None]).sum()
        return jnp.abs(jax.grad(size)(params[name])[:total]).sum(axis=-1) > 0

    rows = [jax.tree.map(lambda x, row=row: x[row][None], one) for row in range(len(one.tokens_BT))]
    return np.stack([gradient(np.eye(T, dtype=np.float32), row) for row in rows])


def sample_records(length: int) -> np.ndarray:
    """Two records of unequal documents; the second begins in the middle of one and is padded."""
    text = TOKENIZER.encode(" ".join(WORDS * 9))
    rows = [[BOS, *text[:length // 3], BOS, *text[3:length]],
            [*text[:length // 2], BOS, *text[7:7 + length // 4], BOS]]
    return np.stack([
        np.pad(row[:length + 1], (0, max(0, length + 1 - len(row))), constant_values=PADDING)
        for row in rows])


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
    model = model_of("encoder", token_types=2, head_transform=True, embedding_dim=10)
    seen = sight(model, jax.tree.map(jnp.asarray, batch))
    np.testing.assert_array_equal(seen, expected_sight("encoder", batch))


@pytest.mark.parametrize("positions", ("relative", "learned"))
def test_a_decoder_sees_its_documents_source_and_no_other(positions):
    batch = transformed(
        sample_records(14), config(TWO_STACKS["prefix"], length=14), "encoder_decoder")
    model = model_of("encoder_decoder", positions=positions, num_layers=1, encoder_layers=1)
    assert batch.segments_BT.max() == 2
    seen = sight(model, jax.tree.map(jnp.asarray, batch))
    np.testing.assert_array_equal(seen, expected_sight("encoder_decoder", batch))


@pytest.mark.parametrize("change", (
    {"positions": "relative"},
    {"positions": "sinusoidal", "norm_placement": "post", "activation": "relu"},
    {"qk_norm": True, "attention_sinks": True, "tied_embeddings": False},
), ids=lambda change: next(iter(change.values())))
def test_cached_decoding_of_a_source_equals_the_full_forward(change):
    model = Transformer(model_of("encoder_decoder", **change), rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    tokens_BT, source_BS = (random.integers(0, 258, (3, size)).astype(np.int32) for size in (9, 13))
    real_BS = (np.arange(13)[None] < np.array([[13], [4], [7]])).astype(np.int32)
    beside = Beside(source_tokens_BS=source_BS, source_segments_BS=real_BS)
    full = jax.jit(model.__call__)(tokens_BT, None, np.ones_like(tokens_BT), None, beside)
    cache = jax.jit(model.read, static_argnums=2)(source_BS, real_BS, 16)
    pieces = []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        x_BTD, cache = jax.jit(model.extend)(tokens_BT[:, start:end], cache)
        pieces.append(x_BTD)
    cached = model.logits(jnp.concatenate(pieces, axis=1))
    np.testing.assert_allclose(cached, full, atol=2e-5 * float(jnp.abs(full).max()))
    # What is generated from a padded source is what is generated from it alone.
    greedy = SamplingConfig(temperature=0.0, top_p=None, max_tokens=5)
    prompts = [row[:count].tolist() for row, count in zip(source_BS, (13, 4, 0))]
    together = list(generate(model, prompts, (BOS,), greedy, start_ids=(BOS,)))
    for index, prompt in enumerate(prompts):
        alone = list(generate(model, [prompt], (BOS,), greedy, start_ids=(BOS,)))
        assert [row[0] for row in alone] == [row[index] for row in together][:len(alone)]


def test_shared_layers_are_a_stack_of_equal_ones():
    """Value, gradient (the sum of all layers') and cached decoding."""
    model = Transformer(model_of("decoder", shared_layers=True), rngs=nnx.Rngs(0))
    stack = Transformer(model_of("decoder"), rngs=nnx.Rngs(0))
    tokens_BT = np.random.default_rng(0).integers(0, 258, (2, 9)).astype(np.int32)
    (graphdef, params), stacked = (nnx.split(each, nnx.Param) for each in (model, stack))
    params = nnx.to_pure_dict(params)
    equal = params | {"layers": jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), params["layers"])}

    def loss(graphdef, params):
        x_BTD, _ = nnx.merge(graphdef, params).features(tokens_BT)
        return jnp.square(x_BTD[:, :, :5]).mean()

    value, gradient = jax.jit(jax.value_and_grad(functools.partial(loss, graphdef)))(params)
    other, expected = jax.jit(jax.value_and_grad(functools.partial(loss, stacked[0])))(equal)
    np.testing.assert_allclose(value, other, rtol=1e-6)
    expected["layers"] = jax.tree.map(lambda x: x.sum(axis=0)[None], expected["layers"])
    assert step_checks.largest_error(gradient, expected) < 1e-5
    cache, pieces = model.empty_cache(2, 16), []
    for part in (tokens_BT[:, :5], tokens_BT[:, 5:]):
        x_BTD, cache = jax.jit(model.extend)(part, cache)
        pieces.append(x_BTD)
    full = jax.jit(lambda: model.features(tokens_BT)[0])()
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), full, atol=2e-5)


def test_relative_buckets_are_those_of_t5():
    """Distances from -200 to 200, by T5's published formula in plain Python."""
    def bucket(behind: int, bidirectional: bool) -> int:
        buckets, start = (16, 16 * (behind < 0)) if bidirectional else (32, 0)
        distance = abs(behind) if bidirectional else max(behind, 0)
        exact = buckets // 2
        if distance < exact:
            return start + distance
        grown = np.log(distance / exact) / np.log(128 / exact) * (buckets - exact)
        return start + min(exact + int(grown), buckets - 1)

    table_PN = jnp.arange(64, dtype=jnp.float32).reshape(32, 2)
    distances = np.arange(-200, 201, dtype=np.int32)[None, :, None]
    for form in ("encoder", "decoder"):
        small = model_of(form, positions="relative")
        bias_BNTS = relative_bias(small, table_PN, jnp.asarray(distances))
        for head in range(2):
            expected = [2 * bucket(behind, form == "encoder") + head for behind in distances[0, :, 0]]
            np.testing.assert_array_equal(bias_BNTS[0, head, :, 0], expected)


def test_an_encoder_generates_nothing():
    model = Transformer(model_of("encoder", num_layers=1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="model.form='encoder'"):
        next(generate(model, [[1, 2]], (BOS,), SamplingConfig()))


MIXTURES = {
    "decoder": (tuple(DECODERS.values()), {}),
    "encoder_decoder": (tuple(TWO_STACKS.values()), {
        "positions": "relative"}),
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
    return np.stack(list(concatenate(documents, LENGTH, TOKENIZER)))


@pytest.mark.slow
@pytest.mark.parametrize("form", MIXTURES)
def test_each_objective_is_learned_beyond_its_unigram_loss(form, records):
    """One run learns all objectives of a form; each then beats the best guess without a context."""
    (objectives, change), (steps, rows) = MIXTURES[form], BUDGET[form]
    train = step_checks.train_config("adamw")
    train.schedule.learning_rate, train.num_steps, train.batch_size = 0.01, steps, rows
    mesh, program, step = step_checks.start(
        train, MeshConfig(data=1), jax.devices()[:1], model_of(form, **change))
    transform = transform_of(config(*objectives), form, TOKENIZER)
    state, random = program.initialize(), np.random.default_rng(0)
    for epoch in range(steps):
        drawn = random.integers(0, len(records), rows)
        batch = transform(records[drawn], drawn, np.full(rows, epoch))
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


@pytest.mark.parametrize("form,zero,accumulation,more", (
    ("decoder", 1, 2, {}), ("decoder", 2, 1, {"future_heads": 2}),
    ("encoder", 3, 1, {"shared_layers": True, "embedding_dim": 10}),
    pytest.param("encoder_decoder", 3, 2, {}, marks=pytest.mark.slow),
))
def test_a_mesh_has_the_numbers_of_one_device(form, zero, accumulation, more, records):
    objectives, change = MIXTURES[form]
    if "future_heads" in more:
        objectives = objectives[:1]  # They refuse a prefix.
    model, train = model_of(form, **change | more), step_checks.train_config("sgd")
    micro = step_checks.train_config("sgd", accumulation)
    transform = transform_of(config(*objectives), form, TOKENIZER)
    batch = transform(records[:8], np.arange(8), np.zeros(8, int))
    step_checks.check_equal(
        step_checks.three_steps(micro, MeshConfig(data=4, tensor=2, zero=zero), model, batch),
        step_checks.alone(train, model, batch))


@pytest.mark.slow
def test_future_heads_learn_what_comes_later_in_the_same_document(records):
    """Their loss is their formula; what they predict is so many tokens on; each beats unigrams."""
    model = model_of("decoder", future_heads=2, num_layers=1)
    train = step_checks.train_config("adamw")
    train.schedule.learning_rate, train.num_steps, train.batch_size = 0.01, 150, 16
    mesh, program, step = step_checks.start(
        train, MeshConfig(data=1), jax.devices()[:1], model)
    transform = transform_of(config(), "decoder", TOKENIZER)
    state, random = program.initialize(), np.random.default_rng(0)
    for _ in range(150):
        drawn = random.integers(0, 64, 16)
        batch = transform(records[drawn], drawn, drawn)
        state, _ = step(state, step_checks.place_batch(mesh, batch))
    batch = transform(records[:64], np.arange(64), np.arange(64))

    @jax.jit
    def losses(params, batch):
        model = nnx.merge(program.graphdef, params)
        x_BTD, _ = model.features(batch.tokens_BT, batch.positions_BT, batch.segments_BT)
        of_heads = []
        for index in range(2):
            ahead_BTD = model.ahead(x_BTD, (batch.positions_BT, batch.segments_BT), index, None)
            of_heads.append(jax.nn.log_softmax(model.logits(ahead_BTD)))
        return batch_loss(model, batch, None, train.objective, None), of_heads

    terms, of_heads = losses(state.params, batch)
    total = float(terms.cross_entropy_B.sum())
    for index, log_p_BTV in enumerate(of_heads):
        nats, targets = 0.0, []
        for row, place in zip(*np.nonzero(batch.weights_BT)):
            target = place + index + 1
            if target < LENGTH and batch.segments_BT[row, target] == batch.segments_BT[row, place]:
                targets.append(batch.targets_BT[row, target])
                nats -= float(log_p_BTV[row, place, targets[-1]])
        shares = np.bincount(targets) / len(targets)
        unigram = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
        print(nats / len(targets), unigram)
        assert nats / len(targets) < unigram - 0.1, index
        total += nats
    np.testing.assert_allclose(terms.loss, total, rtol=1e-5)

"""Laws of generation and of perplexity."""

import collections
import dataclasses
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_batch
from flax import nnx

from batiste.evaluation import make_row_losses, perplexity
from batiste.inference import SamplingConfig, generate
from batiste.inference.sampling import sample
from batiste.models import Transformer
from batiste.sharding import MeshConfig, make_mesh
from batiste.train import ObjectiveConfig, TrainConfig, make_program

PROMPTS = [[1, 5, 9], [1], [1, 7, 3, 3, 8, 2], [1, 30]]
GREEDY = SamplingConfig(temperature=0.0, top_p=None, max_tokens=7)


@pytest.fixture
def model(model_config) -> Transformer:
    """A model whose output is far from uniform."""
    config = dataclasses.replace(
        model_config, init_stddev=0.4, layer_pattern=("local", "global"), window=3)
    graphdef = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(3))))[0]
    params = jax.jit(lambda: nnx.split(Transformer(config, rngs=nnx.Rngs(3)))[1])()
    return nnx.merge(graphdef, params)


def rows_of(model, prompts, config, stop_ids=()) -> list[list[int]]:
    """Everything that each prompt is continued with."""
    steps = list(generate(model, prompts, stop_ids, config))
    return [[token for token in row if token is not None] for row in zip(*steps)]


def test_greedy_equals_the_full_forward_token_by_token(model):
    full = jax.jit(model.__call__)
    for prompt, row in zip(PROMPTS, rows_of(model, PROMPTS, GREEDY)):
        text = np.zeros((1, 16), np.int32)
        text[0, : len(prompt)] = prompt
        for count, token in enumerate(row):
            place = len(prompt) + count
            assert int(full(text)[0, place - 1].argmax()) == token
            text[0, place] = token


@pytest.mark.parametrize("config", [GREEDY, SamplingConfig(temperature=1.3, top_k=9, seed=4)])
def test_a_batch_of_unequal_prompts_equals_the_first_row_alone(model, config):
    config = dataclasses.replace(config, max_tokens=7)
    together = rows_of(model, PROMPTS, config)
    assert together[0] == rows_of(model, PROMPTS[:1], config)[0]
    assert together[:2] == rows_of(model, PROMPTS[:2], config)
    assert len({tuple(row) for row in together}) > 1


def test_rows_end_at_the_stop_token_and_at_the_end_of_the_model(model):
    rows = rows_of(model, PROMPTS, GREEDY)
    stop = rows[0][2]
    stopped = rows_of(model, PROMPTS, GREEDY, stop_ids=(stop,))
    for row, short in zip(rows, stopped):
        assert short == (row[: row.index(stop)] if stop in row else row)
    endless = rows_of(model, PROMPTS, dataclasses.replace(GREEDY, max_tokens=None))
    assert [len(prompt) + len(row) for prompt, row in zip(PROMPTS, endless)] == [16] * 4


GROWING = {
    "window": {},
    "latent": {"layer_pattern": ("global",), "window": None, "num_kv_heads": 4, "latent_rank": 9,
               "rope_dim": 2, "value_dim": 5},
    "prefix": {"layer_pattern": ("global",), "window": None, "positions": "learned"},
    "two stacks": {"form": "encoder_decoder", "encoder_layers": 2, "positions": "relative",
                   "layer_pattern": ("global",), "window": None},
}


@pytest.mark.parametrize("kind", GROWING)
def test_a_cache_that_grows_decodes_what_one_of_full_length_does(model, kind, monkeypatch):
    changed = dataclasses.replace(model.config, **GROWING[kind])
    graphdef = nnx.split(nnx.eval_shape(lambda: Transformer(changed, rngs=nnx.Rngs(3))))[0]
    params = jax.jit(lambda: nnx.split(Transformer(changed, rngs=nnx.Rngs(3)))[1])()
    module = sys.modules["batiste.inference.generate"]
    endless = dataclasses.replace(GREEDY, max_tokens=None)
    rows, decoders, make = {}, [], module._compiled
    monkeypatch.setattr(module, "_RECENT", collections.deque(maxlen=0))
    monkeypatch.setattr(module, "_compiled", lambda *given: decoders.append(make(*given)) or decoders[-1])
    for room in (1, 16):
        monkeypatch.setattr(module, "FIRST_ROOM", room)
        steps = generate(nnx.merge(graphdef, params), PROMPTS, (0,), endless, kind == "prefix",
                         start_ids=(2,) if changed.form == "encoder_decoder" else ())
        rows[room] = list(steps)
    assert rows[1] == rows[16] and len(rows[1]) > 3
    # From 8 to 16 tokens, from 2 for what is written from nothing; and at once 16.
    grown, whole = (decode._cache_size() for _, _, decode in decoders)
    assert whole == 1 < grown <= (4 if kind == "two stacks" else 2)


def test_a_cache_has_room_for_what_is_asked_and_is_given_up_to_the_next_step(model, monkeypatch):
    long = dataclasses.replace(model.config, max_length=2048)
    model = Transformer(long, rngs=nnx.Rngs(0))
    module, caches, make = sys.modules["batiste.inference.generate"], [], None
    make = module._compiled

    def watched(*given):
        prefill, grow, decode = make(*given)

        def watch(params, token_B, cache, keys_B):
            caches.append(cache)
            return decode(params, token_B, cache, keys_B)

        return prefill, grow, watch

    monkeypatch.setattr(module, "_RECENT", collections.deque(maxlen=0))
    monkeypatch.setattr(module, "_compiled", watched)
    for tokens, room in ((3, 16), (1000, 256), (None, 256)):
        caches.clear()
        steps = generate(model, PROMPTS, (-1,), dataclasses.replace(GREEDY, max_tokens=tokens))
        next(steps), next(steps)
        assert caches[0].k_LBSKH.shape[2] == room
        assert caches[0].k_LBSKH.is_deleted()


def test_a_second_call_compiles_nothing_unless_something_has_changed(model, monkeypatch):
    module, made = sys.modules["batiste.inference.generate"], []
    make = module._compiled
    monkeypatch.setattr(module, "_RECENT", collections.deque(maxlen=4))
    monkeypatch.setattr(module, "_compiled", lambda *given: made.append(make(*given)) or made[-1])
    first = rows_of(model, PROMPTS, GREEDY)
    assert rows_of(model, PROMPTS, dataclasses.replace(GREEDY)) == first
    assert [part._cache_size() for part in made[0]] == [1, 0, 1] and len(made) == 1
    capped = dataclasses.replace(model.config, logit_soft_cap=1e-3)
    graphdef, params = nnx.split(model)
    del graphdef
    other = nnx.merge(
        nnx.split(nnx.eval_shape(lambda: Transformer(capped, rngs=nnx.Rngs(3))))[0], params)
    warm = dataclasses.replace(GREEDY, temperature=1.0, seed=1)
    assert rows_of(other, PROMPTS, warm) != rows_of(model, PROMPTS, warm)
    assert len(made) == 3
    warm.temperature = 0.0  # In place: what was compiled for another temperature is not taken.
    assert rows_of(model, PROMPTS, warm) == first


def test_prompts_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match="expected 1 to 15.*model.max_length=16"):
        next(generate(model, [[1] * 16], (0,), GREEDY))
    with pytest.raises(ValueError, match="expected 1 to 15"):
        next(generate(model, [[]], (0,), GREEDY))


def draws(config, logits, count=4000):
    """How often each token is drawn."""
    keys = jax.random.split(jax.random.key(0), count)
    tokens = sample(jnp.tile(jnp.asarray(logits, jnp.float32), (count, 1)), keys, config)
    return np.bincount(tokens, minlength=len(logits)) / count


def test_sampling_distributions():
    probabilities = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    logits = np.log(probabilities)
    plain = SamplingConfig(temperature=1.0, top_p=None)
    np.testing.assert_allclose(draws(plain, logits), probabilities, atol=0.03)
    hot = probabilities**0.5 / (probabilities**0.5).sum()
    np.testing.assert_allclose(
        draws(dataclasses.replace(plain, temperature=2.0), logits), hot, atol=0.03)
    top_2 = np.array([2, 1, 0, 0, 0]) / 3
    np.testing.assert_allclose(draws(dataclasses.replace(plain, top_k=2), logits), top_2, atol=0.03)
    top_p = np.array([0.5, 0.25, 0.15, 0, 0]) / 0.9  # 0.75 < 0.8 <= 0.9: the third one crosses.
    np.testing.assert_allclose(draws(dataclasses.replace(plain, top_p=0.8), logits), top_p, atol=0.03)
    assert draws(GREEDY, logits)[0] == 1
    other_seed = jax.random.split(jax.random.key(1), 4000)
    tokens = sample(jnp.tile(jnp.asarray(logits, jnp.float32), (4000, 1)), other_seed, plain)
    assert (np.bincount(tokens, minlength=5) / 4000 != draws(plain, logits)).any()


@pytest.mark.parametrize("field,value", [
    ("temperature", -1.0), ("top_k", 0), ("top_p", 0.0), ("max_tokens", 0)])
def test_meaningless_sampling_is_refused(field, value):
    with pytest.raises(ValueError, match=f"sample.{field}="):
        dataclasses.replace(SamplingConfig(), **{field: value}).validate()


def test_perplexity_is_the_formula_with_a_standard_error(model):
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    layout = MeshConfig(data=1)
    mesh = make_mesh(layout, jax.devices()[:1])
    program = make_program(model.config, TrainConfig(), mesh, layout)
    losses = make_row_losses(program, mesh, ObjectiveConfig(loss_chunk=4))
    batches = [make_batch(8, 11, 37, seed) for seed in (0, 1)]
    byte_lengths_V = np.arange(37) % 5 + 1
    got = perplexity(
        lambda batch: losses(params, batch, byte_lengths_V.astype(np.float32)), batches)

    nats_R, bytes_R, tokens = [], [], 0
    for batch in batches:
        logits = np.asarray(
            jax.jit(model.__call__)(batch.tokens_BT, batch.positions_BT, batch.segments_BT), np.float64)
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        hit_BT = np.take_along_axis(log_probabilities, batch.targets_BT[..., None], -1)[..., 0]
        nats_R += list(-(hit_BT * batch.weights_BT).sum(axis=1))
        bytes_R += list((byte_lengths_V[batch.targets_BT] * batch.weights_BT).sum(axis=1))
        tokens += batch.weights_BT.sum()
    nats_R, bytes_R = np.array(nats_R), np.array(bytes_R)
    assert got.tokens == tokens and got.bytes == bytes_R.sum()
    assert got.loss == pytest.approx(nats_R.sum() / tokens, rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(nats_R.sum() / tokens), rel=1e-4)
    bits_per_byte = nats_R.sum() / math.log(2) / bytes_R.sum()
    assert got.bits_per_byte == pytest.approx(bits_per_byte, rel=1e-5)
    # The bootstrap is another road to the standard error of a ratio.
    random = np.random.default_rng(0)
    resampled = random.integers(0, len(nats_R), (4000, len(nats_R)))
    ratios = nats_R[resampled].sum(1) / bytes_R[resampled].sum(1) / math.log(2)
    assert got.standard_error == pytest.approx(ratios.std(), rel=0.15)


def test_perplexity_of_nothing_is_refused():
    with pytest.raises(ValueError, match="the validation split holds no text"):
        perplexity(None, [])

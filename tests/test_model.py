"""Laws of the network: causality, segments, cached = full, positions and attention as formulas."""

import dataclasses
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from batiste.configs.experiment import Experiment
from batiste.configs.own_parts import load_own_parts
from batiste.models import Transformer, TransformerConfig
from batiste.models.positions import alibi_slopes, rope_frequencies, rotate, rotation, sinusoids

OWN = pathlib.Path(__file__).parents[1] / "docs/extend"
VARIANTS = {
    "plain": {},
    "mha, gelu, layer norm, biases, learned positions": dict(
        num_kv_heads=4, activation="gelu", norm="layer", bias="all", positions="learned"),
    "mqa, relu2, post norm, alibi": dict(
        num_kv_heads=1, activation="relu2", norm_placement="post", positions="alibi"),
    "sandwich, geglu, soft caps, local and global layers": dict(
        norm_placement="sandwich", activation="geglu", attention_soft_cap=1.5, logit_soft_cap=2.0,
        layer_pattern=("local", "global"), window=3, scale_embeddings=True),
    "sinks, qk norm, untied, sinusoidal": dict(
        attention_sinks=True, qk_norm=True, tied_embeddings=False, positions="sinusoidal"),
    "llama3 rope, unrolled": dict(rope_scaling="llama3", rope_original_length=8, scan_unroll=3),
    "linear rope, relu": dict(rope_scaling="linear", activation="relu", init_stddev=0.3),
    "no positions, remat": dict(positions="none", remat="full"),
    "parallel, one norm less, a scale, norms stored less one": dict(
        norm_placement="parallel", norm="rms_plus_one", attention_scale=0.7, bias="qkv"),
    "latents, low rank queries": dict(
        num_kv_heads=4, head_dim=10, latent_rank=9, query_rank=11, rope_dim=4, value_dim=7),
    "latents, remat, dense layers first": dict(
        dense_layers=1, dense_mlp_dim=24, num_experts=4, num_kv_heads=4, latent_rank=9, rope_dim=2, value_dim=6, remat="dots"),
    "local rope, embedding norm": dict(
        local_rope_base=50.0, embedding_norm=True, rope_scaling="linear",
        layer_pattern=("local", "global"), window=5),
    "a recurrence of one's own": dict(mixer=f"{OWN}/recurrent.py:GatedRecurrence", mlp_dim=20),
    "an LSTM, remat": dict(mixer=f"{OWN}/recurrent.py:LSTM", positions="none", remat="full"),
    "half of each head rotated, a norm and an activation of one's own": dict(
        positions=f"{OWN}/half_rope.py:HALF", norm=f"{OWN}/mean_size.py:mean_size", head_dim=8,
        activation=f"{OWN}/snake.py:SNAKE"),
}
for change in VARIANTS.values():
    load_own_parts(Experiment(dataclasses.replace(Experiment().model, **change)))


def build(config: TransformerConfig, **change) -> Transformer:
    """A model with every parameter random, so that biases, scales and sinks take part."""
    config = dataclasses.replace(config, **change)
    graphdef = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[0]

    @jax.jit
    def params():
        leaves, structure = jax.tree.flatten(nnx.split(Transformer(config, rngs=nnx.Rngs(0)))[1])
        keys = jax.random.split(jax.random.key(1), len(leaves))
        return structure.unflatten(
            leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys))

    return nnx.merge(graphdef, params())


def run(method):
    """A method of a model, compiled as one; the model's parameters are constants of it."""
    return jax.jit(method)


@pytest.fixture
def tokens_BT():
    return jax.random.randint(jax.random.key(2), (5, 11), 0, 37)


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_decoding_equals_full_forward(model_config, tokens_BT, name):
    model = build(model_config, **VARIANTS[name])
    full = run(model.__call__)(tokens_BT)
    cache, pieces = model.empty_cache(5, 16), []
    for start, end in itertools.pairwise([0, 4, 5, 6, 11]):
        x_BTD, cache = run(model.extend)(tokens_BT[:, start:end], cache)
        pieces.append(x_BTD)
    cached = run(model.logits)(jnp.concatenate(pieces, axis=1))
    np.testing.assert_allclose(cached, full, atol=2e-5 * float(jnp.abs(full).max()))
    assert cache.length_B.tolist() == [11] * 5


def test_cached_rows_of_unequal_length_equal_each_alone(model_config, tokens_BT):
    model = build(model_config)
    lengths_B = jnp.array([3, 7, 4, 1, 6])
    _, cache = model.extend(tokens_BT[:, :7], model.empty_cache(5, 16))
    x_BTD, _ = model.extend(tokens_BT[:, 7:8], cache._replace(length_B=lengths_B))
    for row, length in enumerate(lengths_B.tolist()):
        alone = jnp.concatenate([tokens_BT[row, :length], tokens_BT[row, 7:8]])[None]
        expected_D = model.features(alone)[0][0, -1]
        size = float(jnp.abs(expected_D).max())  # 7: rounding alone is above 1e-5.
        np.testing.assert_allclose(x_BTD[row, 0], expected_D, atol=2e-6 * size)


def seen_inputs(model, segments_BT, positions):
    """Which inputs the hidden state at each position depends on, by gradient, as booleans BT.

    Every input is a token of its own, so its gradient is a row of the embedding's.
    """
    tokens_BT = jnp.arange(55).reshape(5, 11)
    graphdef, params = nnx.split(model, nnx.Param)

    @jax.jit
    @jax.grad
    def gradient(params, position):
        x_BTD = nnx.merge(graphdef, params).features(tokens_BT, None, segments_BT)[0]
        return jnp.square(jnp.take(x_BTD, position, axis=1)).sum()

    for position in positions:
        gradient_VD = nnx.to_pure_dict(gradient(params, position))["embedding_VD"]
        yield np.abs(gradient_VD[:55]).sum(axis=-1).reshape(5, 11) > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_causality_and_segments_by_gradient(model_config, name):
    model = build(model_config, vocab_size=60, **VARIANTS[name])
    segments_BT = jnp.tile(jnp.array([1] * 4 + [2] * 7, jnp.int32), (5, 1))
    place = np.arange(11)
    first_half, second_half = seen_inputs(model, segments_BT, (3, 8))
    np.testing.assert_array_equal(first_half, np.tile(place <= 3, (5, 1)))
    np.testing.assert_array_equal(second_half, np.tile((place <= 8) & (place >= 4), (5, 1)))


def test_a_window_hides_what_is_further_back(model_config):
    model = build(model_config, vocab_size=60, num_layers=2, layer_pattern=("local",), window=3)
    reach = 2 * (3 - 1)  # Each of two layers looks back at most window - 1 places.
    place = np.arange(11)
    (seen_BT,) = seen_inputs(model, None, (9,))
    np.testing.assert_array_equal(seen_BT[0], (place <= 9) & (place >= 9 - reach))


def test_packed_documents_equal_each_alone(model_config, tokens_BT):
    for name in ("plain", "mqa, relu2, post norm, alibi",
                 "mha, gelu, layer norm, biases, learned positions"):
        model = build(model_config, **VARIANTS[name])
        positions_BT = jnp.tile(jnp.array([*range(4), *range(7)], jnp.int32), (5, 1))
        segments_BT = jnp.tile(jnp.array([1] * 4 + [2] * 7, jnp.int32), (5, 1))
        forward = run(model.__call__)
        packed = forward(tokens_BT, positions_BT, segments_BT)
        np.testing.assert_allclose(packed[:, :4], forward(tokens_BT[:, :4]), atol=2e-5)
        np.testing.assert_allclose(packed[:, 4:], forward(tokens_BT[:, 4:]), atol=2e-5)


def test_rope_turns_scores_into_a_function_of_distance():
    config = TransformerConfig(head_dim=8)
    q, k = jax.random.normal(jax.random.key(5), (2, 1, 1, 1, 8))
    def score(query_place, key_place):
        turned = [rotate(x, rotation(config, jnp.array([[place]])))
                  for x, place in ((q, query_place), (k, key_place))]
        return float((turned[0] * turned[1]).sum())
    np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_rope_scalings_are_the_published_ones():
    plain = np.asarray(rope_frequencies(TransformerConfig(head_dim=128, rope_base=500_000.0)))
    linear = rope_frequencies(TransformerConfig(
        head_dim=128, rope_base=500_000.0, rope_scaling="linear", rope_factor=4.0))
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)
    llama3 = np.asarray(rope_frequencies(TransformerConfig(
        head_dim=128, rope_base=500_000.0, rope_scaling="llama3", rope_factor=8.0)))
    wavelength = 2 * np.pi / plain
    # Meta's rule: wavelengths under 8192 / 4 stay, over 8192 / 1 are divided, others are blended.
    np.testing.assert_allclose(llama3[wavelength < 2048], plain[wavelength < 2048], rtol=1e-6)
    np.testing.assert_allclose(llama3[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6)
    between = (wavelength >= 2048) & (wavelength <= 8192)
    assert between.any()
    smooth = (8192 / wavelength[between] - 1) / 3
    np.testing.assert_allclose(
        llama3[between], (1 - smooth) * plain[between] / 8 + smooth * plain[between], rtol=1e-5)
    yarn = np.asarray(rope_frequencies(TransformerConfig(
        head_dim=128, rope_base=500_000.0, rope_scaling="yarn", rope_factor=4.0)))
    # Peng's rule: 32 turns within 8192 tokens and more stay, one and less are divided.
    turns = 8192 / wavelength
    np.testing.assert_allclose(yarn[turns > 33], plain[turns > 33], rtol=0.03)
    np.testing.assert_allclose(yarn[turns > 50], plain[turns > 50], rtol=1e-6)
    np.testing.assert_allclose(yarn[turns < 0.8], plain[turns < 0.8] / 4, rtol=1e-6)
    assert (np.diff(yarn / plain) <= 1e-6).all() and (turns < 0.8).any() and (turns > 50).any()


def test_alibi_slopes_and_sinusoids_are_the_published_ones():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(  # The paper's rule for 12 heads: 8 of its own, 4 of 16's.
        alibi_slopes(12), [2.0**-i for i in range(1, 9)] + [2.0**-(i + 0.5) for i in range(4)])
    table = sinusoids(jnp.array([[0, 5]]), 6)[0]
    angles = 5 / 10_000 ** (np.array([0, 2, 4]) / 6)
    np.testing.assert_allclose(table[1], [*np.sin(angles), *np.cos(angles)], atol=1e-6)


@pytest.mark.parametrize("policy", ["dots", "full"])
def test_rematerialization_changes_memory_and_nothing_else(model_config, tokens_BT, policy):
    def gradient_and_memory(remat):
        model = build(model_config, num_layers=6, remat=remat)
        graphdef, params = nnx.split(model)
        gradient = jax.jit(jax.grad(lambda p: jnp.square(nnx.merge(graphdef, p)(tokens_BT)).sum()))
        memory = gradient.lower(params).compile().memory_analysis().temp_size_in_bytes
        return gradient(params), memory

    (want, most), (got, less) = gradient_and_memory("none"), gradient_and_memory(policy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
    assert less < most


def test_dropout_drops_at_its_rate_and_only_with_a_key(model_config, tokens_BT):
    model = build(model_config, dropout=0.3)
    calm = model(tokens_BT)
    np.testing.assert_array_equal(calm, build(model_config)(tokens_BT))
    one, same, other = (model(tokens_BT, dropout_key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any() and (one != calm).any()
    from batiste.models.layers import dropout
    x = dropout(jnp.ones((300, 300)), 0.3, jax.random.key(0))
    assert abs(float((x == 0).mean()) - 0.3) < 0.01 and abs(float(x.mean()) - 1) < 0.01


def test_depth_scaled_initialization_keeps_the_stream_bounded(model_config, tokens_BT):
    def spread(**change):
        model = Transformer(
            dataclasses.replace(model_config, num_layers=48, **change), rngs=nnx.Rngs(0))
        return float(model.features(tokens_BT)[0].std() / model._embed(
            tokens_BT, jnp.zeros_like(tokens_BT)).std())

    assert spread(depth_scaled_init=True) < 0.5 * spread(depth_scaled_init=False)

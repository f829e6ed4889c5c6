"""A model with kernels is the model with the reference; the choice is settled once and said."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from batiste.configs import quickstart
from batiste.configs.experiment import Experiment
from batiste.inference import SamplingConfig, generate
from batiste.models import Transformer, attention_choice, resolve_attention
from batiste.pallas_kernels import AttentionMask, flash_attention, reference_attention
from batiste.pallas_kernels.attention import chip_named
from batiste.sharding import MeshConfig, make_mesh
from batiste.train import ObjectiveConfig
from batiste.train.objectives import batch_loss

NO_AXES = {"context": 1}


@pytest.fixture
def interpreted():
    """TPU kernels run on the CPU by Pallas' TPU interpreter."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        yield


@pytest.fixture
def models(model_config):
    """The same weights with the reference and with a TPU's kernels; local and global layers."""
    config = dataclasses.replace(
        model_config, vocab_size=38, num_layers=2, layer_pattern=("local", "global"), window=5, head_dim=64,
        attention_soft_cap=2.0, attention_sinks=True,
    )
    reference = Transformer(config, rngs=nnx.Rngs(3))
    kernels = Transformer(dataclasses.replace(config, attention="v6e"), rngs=nnx.Rngs(3))
    return reference, kernels


def loss_and_gradients(model, batch):
    def loss(params):
        x_BTD = nnx.merge(graphdef, params).features(
            batch.tokens_BT, batch.positions_BT, batch.segments_BT
        )[0]
        return jnp.square(x_BTD).mean()

    graphdef, params = nnx.split(model)
    return jax.jit(jax.value_and_grad(loss))(params)


def assert_near(actual, expected, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-3)


def test_a_model_with_kernels_has_the_references_loss_and_gradients(models, batch, interpreted):
    expected, actual = (loss_and_gradients(model, batch) for model in models)
    assert_near(actual, expected)


def test_kernels_on_a_mesh_equal_the_reference_on_one_device(models, batch, interpreted):
    expected = loss_and_gradients(models[0], batch)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])):
        actual = loss_and_gradients(models[1], batch)
    assert_near(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("devices", [1, 2])
def test_the_fused_loss_is_the_loss_of_the_logits(model_config, batch, interpreted, tied, devices):
    config = dataclasses.replace(
        model_config, num_layers=1, tied_embeddings=tied, logit_soft_cap=3.0, attention="v6e"
    )
    model = Transformer(config, rngs=nnx.Rngs(3))
    graphdef, params = nnx.split(model)

    def loss(params, fused):
        objective = ObjectiveConfig(label_smoothing=0.1, z_loss=1e-3, fused=fused)
        terms = batch_loss(nnx.merge(graphdef, params), batch, None, objective, None)
        return terms.loss, terms

    def run(fused):
        return jax.jit(jax.value_and_grad(lambda x: loss(x, fused), has_aux=True))(params)

    expected = run(False)
    with jax.set_mesh(make_mesh(MeshConfig(data=devices), jax.devices()[:devices])):
        actual = run(True)
    assert_near(actual, expected)


def test_the_fused_loss_needs_kernels_and_an_unsplit_vocabulary(model_config, batch):
    model = Transformer(model_config, rngs=nnx.Rngs(3))
    with pytest.raises(ValueError, match="needs a chip's kernels, but model.attention='reference'"):
        batch_loss(model, batch, None, ObjectiveConfig(fused=True), None)
    experiment = Experiment(mesh=MeshConfig(tensor=2))
    experiment.train.objective.fused = True
    with pytest.raises(ValueError, match="vocabulary split over mesh.tensor=2"):
        experiment.validate()


@pytest.mark.parametrize("head_dim", [64, 24])
def test_decoding_with_kernels_gives_the_references_tokens(models, interpreted, head_dim):
    """Head dim 24 is not one that `flash_decode` knows: `flash_attention` takes the one query."""
    config = SamplingConfig(max_tokens=4, temperature=0.0)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9, 8]]
    if head_dim != 64:
        configs = [dataclasses.replace(model.config, head_dim=head_dim) for model in models]
        models = [Transformer(each, rngs=nnx.Rngs(3)) for each in configs]
    expected, actual = (list(generate(model, prompts, (0,), config)) for model in models)
    assert actual == expected


def test_auto_settles_on_the_device_and_says_so(model_config):
    config = dataclasses.replace(model_config, attention="auto", head_dim=128)
    for kind, chip in (("TPU v6 lite", "v6e"), ("TPU v5 lite", "v5e"), ("TPU v5p", "v5p"),
                       ("TPU7x", "tpu7x"), ("NVIDIA H200", "hopper"), ("NVIDIA A100-SXM4", "ampere")):
        settled, line = resolve_attention(config, kind, NO_AXES)
        assert settled.attention == chip and chip in line
    for kind in ("cpu", "NVIDIA T4"):
        settled, line = resolve_attention(config, kind, NO_AXES)
        assert settled.attention == "reference" and kind in line
    wide = dataclasses.replace(config, head_dim=320)
    settled, line = resolve_attention(wide, "TPU v6 lite", NO_AXES)
    assert settled.attention == "reference" and "head dim 320" in line and "256" in line
    settled, line = resolve_attention(config, "TPU v6 lite", {"context": 2})
    assert settled.attention == "v6e"


def test_a_kernel_asked_for_by_name_is_that_kernel_or_an_error(model_config):
    config = dataclasses.replace(model_config, attention="v6e")
    assert resolve_attention(config, "TPU v6 lite", NO_AXES)[0].attention == "v6e"
    with pytest.raises(ValueError, match="another device's kernel"):
        resolve_attention(config, "cpu", NO_AXES)
    with pytest.raises(ValueError, match="head dim 320: the nearest certified one is 256"):
        wide = dataclasses.replace(config, head_dim=320)
        resolve_attention(wide, "TPU v6 lite", NO_AXES)


def test_a_model_alone_with_a_presets_config_runs_and_says_once_how(capsys):
    attention_choice._say_once.cache_clear()
    config = dataclasses.replace(quickstart.get_config().model, num_layers=2, vocab_size=40)
    assert config.attention == "auto"
    tokens_BT = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    found = Transformer(config, rngs=nnx.Rngs(0))(tokens_BT)
    explicit = dataclasses.replace(config, attention="reference")
    assert (found == Transformer(explicit, rngs=nnx.Rngs(0))(tokens_BT)).all()
    nnx.jit(lambda model: model(tokens_BT[:1]))(Transformer(config, rngs=nnx.Rngs(0)))
    said = capsys.readouterr().err
    assert said == "attention: reference (no kernel is certified for cpu)\n"


def test_flash_attention_needs_four_arguments_and_knows_the_names_of_devices():
    q_BTNH = jax.random.normal(jax.random.key(0), (1, 20, 2, 64))
    k_BSKH, v_BSKH = jax.random.normal(jax.random.key(1), (2, 1, 20, 1, 64))
    mask = AttentionMask(causal=True)
    out_BTNH, lse_BTN = flash_attention(q_BTNH, k_BSKH, v_BSKH, mask, chip="h100", interpret=True)
    expected_BTNH, expected_BTN = reference_attention(
        q_BTNH, k_BSKH, v_BSKH, mask, scale=64**-0.5, soft_cap=None, sinks_N=None,
        alibi_slopes_N=None, dropout_rate=0.0, dropout_seeds_BN=None)
    np.testing.assert_allclose(out_BTNH, expected_BTNH, atol=2e-5)
    np.testing.assert_allclose(lse_BTN, expected_BTN, atol=2e-5)
    for name, chip in (("h100", "hopper"), ("H200", "hopper"), ("a100", "ampere"), ("v6e", "v6e"),
                       ("TPU v5 lite", "v5e"), ("hopper", "hopper"), ("tpu7x", "tpu7x")):
        assert chip_named(name) == chip
    with pytest.raises(ValueError, match="chip='auto': no kernel is certified for cpu; expected"):
        flash_attention(q_BTNH, k_BSKH, v_BSKH, mask)
    with pytest.raises(ValueError, match="chip='t4': no kernel"):
        flash_attention(q_BTNH, k_BSKH, v_BSKH, mask, chip="t4")

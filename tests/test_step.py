"""Laws of the step: objectives as formulas, k micro-batches = one, one trace, overflows, golden losses."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_batch
from flax import nnx

from batiste.data import Batch
from batiste.models import LossRules, Transformer, token_losses, vocabulary_sums
from batiste.sharding import MeshConfig, make_mesh, place
from batiste.train import ObjectiveConfig, batch_loss, make_program, make_train_step
from batiste.train.health import HealthConfig
from batiste.train.optimizer import OptimizerConfig

GOLDEN_LOSSES = pathlib.Path(__file__).parent / "golden" / "losses.txt"


def start(model_config, train_config):
    """A fresh state and the step, on one device."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    program = make_program(model_config, train_config, mesh, MeshConfig(data=1))
    put = functools.partial(place, mesh, letters_tree=Batch(*("BT",) * 5))
    return program, make_train_step(program, train_config, mesh), put


def test_token_losses_are_the_formulas():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32) * 3
    targets = np.array([[0, 4, 2], [1, 1, 3]])
    as64 = logits.astype(np.float64)
    log_z = np.log(np.exp(as64).sum(axis=-1))
    log_probabilities = as64 - log_z[..., None]
    hit = np.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0]
    smooth, z_loss = 0.1, 0.01
    want = -(1 - smooth) * hit - smooth * log_probabilities.mean(-1) + z_loss * log_z**2
    sums = vocabulary_sums(jnp.asarray(logits), jnp.asarray(targets))
    loss, cross_entropy = token_losses(sums, LossRules(smooth, z_loss))
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(cross_entropy, -hit, rtol=1e-5)


@pytest.mark.parametrize("chunk", [4, 11])
def test_chunked_loss_equals_the_whole_and_never_holds_all_logits(model_config, batch, chunk):
    model_config = dataclasses.replace(model_config, vocab_size=1009, tied_embeddings=False)
    graphdef, params = nnx.split(Transformer(model_config, rngs=nnx.Rngs(0)), nnx.Param)

    def loss_and_memory(loss_chunk):
        config = ObjectiveConfig(label_smoothing=0.1, z_loss=0.01, loss_chunk=loss_chunk)

        def loss(params):
            return batch_loss(nnx.merge(graphdef, params), batch, None, config, None).loss

        compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        return compiled(params), compiled.as_text()

    (whole, whole_text), (chunked, text) = loss_and_memory(None), loss_and_memory(chunk)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), chunked, whole)
    assert "f32[8,11,1009]" in whole_text
    assert chunk == 11 or "f32[8,11,1009]" not in text


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_equal_one_batch(model_config, train_config, batch, micro_batches):
    counts = batch.weights_BT.sum(axis=1)
    assert len(set(counts.reshape(-1, micro_batches).sum(axis=0))) > 1  # Unequal token counts.
    train_config.optimizer.kind = "sgd"
    results = []
    for accumulation in (1, micro_batches):
        config = dataclasses.replace(train_config, accumulation=accumulation)
        program, step, put = start(model_config, config)
        state, metrics = step(program.initialize(), put(batch))
        results.append((jax.device_get(state.params), jax.device_get(metrics)))
    (params, metrics), (params_micro, metrics_micro) = results
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params_micro, params)
    for name in metrics:
        np.testing.assert_allclose(metrics_micro[name], metrics[name], rtol=1e-5)


def test_a_step_is_the_gradient_of_the_mean_loss(model_config, train_config, batch):
    train_config.optimizer = dataclasses.replace(
        train_config.optimizer, kind="sgd", momentum=0.0, weight_decay=0.0, clip_norm=None)
    program, step, put = start(model_config, train_config)
    before = jax.device_get(program.initialize().params)
    state, metrics = step(program.initialize(), put(batch))

    def mean_loss(params):
        model = nnx.merge(program.graphdef, params)
        terms = batch_loss(model, batch, None, ObjectiveConfig(), None)
        return terms.loss / batch.weights_BT.sum()

    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(before)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    rate = float(metrics["learning_rate"])
    jax.tree.map(
        lambda new, old, slope: np.testing.assert_allclose(new, old - rate * slope, atol=1e-7),
        jax.device_get(state.params), before, gradient)


def test_the_step_compiles_once_and_moves_nothing_implicitly(model_config, train_config, batch):
    program, step, put = start(model_config, train_config)
    state = program.initialize()
    with jax.transfer_guard("disallow"):
        for seed in range(3):
            state, _ = step(state, put(make_batch(8, 11, 37, seed)))
    assert step.jitted._cache_size() == 1


def test_state_is_donated(model_config, train_config, batch):
    program, step, put = start(model_config, train_config)
    state = program.initialize()
    step(state, put(batch))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("dtype,tolerance", [("bfloat16", 0.02), ("float16", 0.005)])
def test_half_precision_trains_like_fp32(model_config, train_config, batch, dtype, tolerance):
    losses = {}
    for kind in ("float32", dtype):
        config = dataclasses.replace(train_config, num_steps=30)
        program, step, put = start(dataclasses.replace(model_config, dtype=kind), config)
        state, batch_on_device = program.initialize(), put(batch)
        for _ in range(30):
            state, metrics = step(state, batch_on_device)
        losses[kind] = float(metrics["loss"])
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    assert losses["float32"] < 3.0  # From ln 37 = 3.6: it does learn the batch by heart.
    assert abs(losses[dtype] - losses["float32"]) < tolerance * losses["float32"]


def test_float16_survives_injected_overflows(model_config, train_config, batch):
    train_config = dataclasses.replace(train_config, num_steps=12)
    train_config.loss_scale.growth_interval = 3
    program, step, put = start(dataclasses.replace(model_config, dtype="float16"), train_config)
    state, on_device = program.initialize(), put(batch)
    skipped, scales = [], []
    for number in range(12):
        if number == 4:  # A scale so high that every gradient of this step overflows.
            huge = state.loss_scale._replace(scale=jnp.float32(2.0**60))
            state = state._replace(loss_scale=huge)
        before = jax.device_get((state.params, state.optimizer_state))
        state, metrics = step(state, on_device)
        skipped.append(float(metrics["skipped"]))
        scales.append(float(state.loss_scale.scale))
        if skipped[-1]:
            after = jax.device_get((state.params, state.optimizer_state))
            jax.tree.map(np.testing.assert_array_equal, after, before)
        assert np.isfinite(float(metrics["loss"]))
    assert skipped[4] == 1 and sum(skipped[:4]) == 0
    assert int(state.step) == 12
    assert scales[2] == 2 * scales[0]  # Three good steps double it.
    assert scales[4] <= train_config.loss_scale.maximum


def golden_losses(model_config, train_config) -> list[str]:
    """Losses of 20 steps on 20 batches, as text, in all digits that float32 has."""
    config = dataclasses.replace(train_config, num_steps=20, batch_size=8)
    model_config = dataclasses.replace(model_config, qk_norm=True, dropout=0.1)
    program, step, put = start(model_config, config)
    state, lines = program.initialize(), []
    for number in range(20):
        state, metrics = step(state, put(make_batch(8, 11, 37, number)))
        lines.append(f"{number} {float(metrics['loss']):.6f}")
    return lines


def test_golden_losses(model_config, train_config, update_golden):
    """A change of these is a change of what training computes: say why in the commit.

    Update: python -m pytest tests/test_step.py -k golden --update-golden
    """
    if update_golden:
        GOLDEN_LOSSES.parent.mkdir(exist_ok=True)
        GOLDEN_LOSSES.write_text("\n".join(golden_losses(model_config, train_config)) + "\n")
    want = [line.split() for line in GOLDEN_LOSSES.read_text().splitlines()]
    got = [line.split() for line in golden_losses(model_config, train_config)]
    assert [step for step, _ in got] == [step for step, _ in want]
    # Processors differ in the order of a vector sum: equal to 1e-5 on all, to the digit on one.
    np.testing.assert_allclose(
        [float(loss) for _, loss in got], [float(loss) for _, loss in want], rtol=1e-5)


@pytest.mark.parametrize("skips", ["an overflow", "a policy"])
def test_after_skipped_updates_the_applied_rate_is_the_logged_one_to_the_end(
        model_config, train_config, batch, skips):
    """Lion moves every entry by exactly the learning rate, so that the rate can be read off."""
    config = dataclasses.replace(train_config, num_steps=6)
    config.optimizer = OptimizerConfig(kind="lion", weight_decay=0.0)
    config.schedule.final_fraction = 0.1
    if skips == "a policy":
        config.health = HealthConfig(every=1, policies="not_finite=skip")
        config.faults = "nan_gradient:layer=0:step=2:steps=2"
    else:
        model_config = dataclasses.replace(model_config, dtype="float16")
    program, step, put = start(model_config, config)
    state, on_device = program.initialize(), put(batch)
    applied, logged, skipped = [], [], []
    for number in range(6):
        if state.loss_scale is not None:  # The gradients of steps 2 and 3 overflow.
            scale = 2.0**60 if number in (1, 2) else 2.0**10
            state = state._replace(loss_scale=state.loss_scale._replace(scale=jnp.float32(scale)))
        before = jax.device_get(state.params)
        state, metrics = step(state, on_device)
        moved = jax.tree.map(lambda new, old: np.abs(new - old).max(),
                             jax.device_get(state.params), before)
        applied.append(max(jax.tree.leaves(moved)))
        logged.append(float(metrics["learning_rate"]))
        skipped.append(float(metrics["skipped"]))
    assert skipped == [0, 1, 1, 0, 0, 0]
    expected = [rate * (1 - skip) for rate, skip in zip(logged, skipped, strict=True)]
    np.testing.assert_allclose(applied, expected, rtol=1e-3, atol=1e-9)
    assert logged[-1] == pytest.approx(0.1 * config.schedule.learning_rate)


def test_padding_is_no_token(model_config, train_config, batch):
    program, step, put = start(model_config, train_config)
    _, metrics = step(program.initialize(), put(batch))
    assert float(metrics["real_tokens"]) == (batch.segments_BT != 0).sum() < batch.tokens_BT.size

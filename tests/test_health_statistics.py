"""What a step measures of itself: the formulas, and the same on every mesh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from conftest import make_batch
from flax import nnx

from batiste.data import Batch
from batiste.models import TransformerConfig
from batiste.sharding import MeshConfig, make_mesh, place
from batiste.train import TrainConfig, make_program, make_train_step
from batiste.train.health_statistics import _spread

DENSE = TransformerConfig(
    vocab_size=48, num_layers=4, model_dim=24, num_heads=4, num_kv_heads=2, head_dim=6,
    mlp_dim=40, max_length=16, activation="relu2",
)
SPARSE = dataclasses.replace(DENSE, num_experts=4, num_layers=2, shared_experts=1)
BATCH = make_batch(rows=8, length=16, vocab_size=48, seed=0)


def statistics(model: TransformerConfig, mesh_config: MeshConfig, accumulation: int = 1):
    """Metrics of the second step on a mesh, and the program."""
    config = TrainConfig(num_steps=3, batch_size=8, accumulation=accumulation)
    config.schedule.warmup_steps = 1
    devices = jax.devices()[:1] if mesh_config.data == 1 else None
    mesh = make_mesh(mesh_config, devices)
    program = make_program(model, config, mesh, mesh_config)
    step = make_train_step(program, config, mesh)
    batch = place(mesh, BATCH, Batch(*("BS",) * 5))
    start, _ = step(program.initialize(), batch)
    params = jax.device_get(start.params)
    _, metrics = step(start, batch)
    return program, params, jax.device_get(metrics)


@functools.cache
def alone(sparse: bool):
    """The same, on one device."""
    return statistics(SPARSE if sparse else DENSE, MeshConfig(data=1))


def flat(tree) -> dict[str, np.ndarray]:
    """Leaves by their path."""
    return {jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


MESHES = {
    "data_tensor_zero": (False, MeshConfig(data=4, tensor=2, zero=3), 2),
    "interleaved_stages": (False, MeshConfig(
        data=2, stage=2, tensor=2, zero=1, micro_batches=2, interleave=2), 1),
    "slices_and_context": (False, MeshConfig(slice=2, data=2, context=2), 2),
    "experts": (True, MeshConfig(data=2, expert=4), 1),
}


@pytest.mark.parametrize("name", MESHES)
def test_on_a_mesh_as_on_one_device(name):
    sparse, mesh, accumulation = MESHES[name]
    found = flat(statistics(SPARSE if sparse else DENSE, mesh, accumulation)[2]["health"])
    expected = flat(alone(sparse)[2]["health"])
    absent = {path for path in expected if path not in found}
    # Its keys are elsewhere: attention is left out where time is split, and nothing else ever is.
    assert absent == ({".entropy_L", ".logit_L"} if mesh.context > 1 else set())
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[path], rtol=2e-5, atol=1e-9, err_msg=path)


def test_norms_are_norms_and_rows_are_rows():
    program, params, metrics = alone(False)
    health = metrics["health"]
    squares = sum(np.square(leaf).sum() for leaf in health.gradient.values())
    np.testing.assert_allclose(np.sqrt(squares), metrics["gradient_norm"], rtol=1e-5)
    up_LDF = params["layers"]["feed_forward"]["up_DF"]
    np.testing.assert_allclose(
        health.parameter["layers.feed_forward.up_DF"], np.sqrt((up_LDF**2).sum(axis=(1, 2))),
        rtol=1e-5)
    assert health.parameter.keys() == health.update.keys() == health.gradient.keys()
    assert health.update["layers.attention.query_DNH"].shape == (4,)
    tokens_B = BATCH.weights_BT.sum(axis=1)
    np.testing.assert_allclose(
        (health.loss_B * tokens_B).sum() / tokens_B.sum(), metrics["cross_entropy"], rtol=1e-5)
    assert len(set(health.checksum_B.tolist())) == 8


def test_activations_attention_and_units_are_what_they_say():
    program, params, metrics = alone(False)
    health, real_BT = metrics["health"], BATCH.segments_BT != 0
    model = nnx.merge(program.graphdef, params)
    x_BTD = np.asarray(model.features(BATCH.tokens_BT, BATCH.positions_BT, BATCH.segments_BT)[0])
    np.testing.assert_allclose(
        health.rms_L[-1], np.sqrt(np.square(x_BTD[real_BT]).mean()), rtol=1e-5)
    np.testing.assert_allclose(health.largest_L[-1], np.abs(x_BTD[real_BT]).max(), rtol=1e-5)
    assert ((0 < health.entropy_L) & (health.entropy_L < 1)).all()

    layers = jax.tree.map(np.array, params["layers"])
    layers["attention"]["query_DNH"][1] = 0
    layers["feed_forward"]["up_DF"][2, :, :10] = 0
    _, output = nnx.merge(program.graphdef, params | {"layers": layers}).features(
        BATCH.tokens_BT, BATCH.positions_BT, BATCH.segments_BT, None, measured=True)
    attention = output.sums.attention
    entropy_L = attention.entropy_B.sum(axis=1) / attention.queries_B.sum(axis=1)
    assert np.isclose(entropy_L[1], 1) and not np.isclose(entropy_L[0], 1)
    np.testing.assert_array_equal(attention.logit_B[1], 0)
    assert (np.asarray(output.sums.alive_F == 0).sum(axis=1) >= [0, 0, 10, 0]).all()


def test_experts_say_how_they_are_loaded():
    _, _, metrics = alone(True)
    health = metrics["health"]
    np.testing.assert_allclose(health.router_load_L.max(), metrics["router_load"], rtol=1e-6)
    assert ((0 <= health.router_idle_L) & (health.router_idle_L < 1)).all()
    # One expert with all of its mean times router_load, and the others even, is the least uneven.
    assert ((0.25 < health.router_spread_L) & (health.router_spread_L < 1)).all()
    load_LE = np.array([[1.0, 1, 1, 1], [4, 4, 0, 0], [8, 0, 0, 0]])
    np.testing.assert_allclose(_spread(load_LE), [1, 0.5, 0.25], rtol=1e-6)
    assert alone(False)[2]["health"].router_load_L is None

"""Axes in products: one model with experts, windows and packed rows on every kind of mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import make_batch
from test_pipeline import by_depth, largest_error
from test_sharding import WIDE, start, train_config

from batiste.data import Batch
from batiste.sharding import MeshConfig, place
from batiste.train import ObjectiveConfig

MODEL = dataclasses.replace(
    WIDE, num_layers=4, max_length=48, mlp_dim=24, bias=False, layer_pattern=("local", "global"), window=5,
    num_experts=4, experts_per_token=2, shared_experts=1, router_bias=True,
)
BATCH = make_batch(8, 32, 40, 0)
MESHES = {
    "slice data tensor": MeshConfig(slice=2, data=2, tensor=2, zero=2),
    "slice stage context": MeshConfig(slice=2, stage=2, context=2, micro_batches=4),
    "slice expert tensor": MeshConfig(slice=2, expert=2, tensor=2),
    "slice data context, zero 3": MeshConfig(slice=2, data=2, context=2, zero=3),
    "stage data tensor": MeshConfig(stage=2, data=2, tensor=2, micro_batches=2, zero=1),
    "stage context tensor": MeshConfig(
        stage=2, context=2, tensor=2, micro_batches=4, interleave=2, zero=3),
    "stage context by heads": MeshConfig(
        stage=2, context=4, context_exchange="all_to_all", micro_batches=2),
    "stage expert data": MeshConfig(stage=2, expert=2, data=2, micro_batches=2, zero=3),
    "context expert tensor": MeshConfig(context=2, expert=2, tensor=2),
    "context expert data": MeshConfig(context=2, expert=2, data=2, zero=2),
}


def three_steps(layout: MeshConfig, devices=None, loss_chunk: int | None = 12, **changes):
    """Losses, gradient norms and the router's metrics of three steps of SGD; parameters after.

    The loss in chunks, of which the last is shorter: 32 positions are no multiple of 12.
    """
    config = train_config("sgd")
    config.objective = ObjectiveConfig(loss_chunk=loss_chunk)
    for field, value in changes.items():
        setattr(config, field, value)
    config.objective.balance_loss = 0.1
    mesh, program, step = start(config, layout, devices, MODEL)
    state, history = program.initialize(), []
    batch = place(mesh, BATCH, Batch(*("BS",) * 5))
    for _ in range(3):
        state, metrics = step(state, batch)
        names = ("loss", "gradient_norm", "router_balance", "router_load")
        history.append([float(metrics[name]) for name in names])
    params = jax.device_get(state.params)
    return np.array(history), by_depth(params, layout, MODEL.num_layers)


@pytest.fixture(scope="module")
def alone():
    """The same on the first device, of all logits at once."""
    return three_steps(MeshConfig(data=1), jax.devices()[:1], loss_chunk=None)


@pytest.mark.parametrize("name", MESHES)
def test_a_product_of_axes_equals_one_device(name, alone):
    history, params = three_steps(MESHES[name])
    np.testing.assert_allclose(history, alone[0], rtol=1e-6)
    assert largest_error(params, alone[1]) <= 1e-6


def test_micro_batches_on_a_product_equal_one_device(alone):
    layout = MeshConfig(slice=2, context=2, tensor=2, zero=1)
    history, params = three_steps(layout, accumulation=2)
    np.testing.assert_allclose(history, alone[0], rtol=1e-6)
    assert largest_error(params, alone[1]) <= 1e-6

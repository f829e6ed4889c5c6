"""Rows that devices share: the same losses, gradients and steps; what travels; what is refused."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from conftest import make_batch
from test_sharding import WIDE, collectives, root_mean_square, start, train_config

from batiste.configs.experiment import Experiment
from batiste.data import Batch
from batiste.evaluation import make_row_losses
from batiste.models import Transformer
from batiste.sharding import MeshConfig, in_time_order, laid_out, make_mesh, place
from batiste.train import ObjectiveConfig

BATCH = make_batch(8, 32, 40, 0)
LONG = dataclasses.replace(WIDE, max_length=48)
MODELS = {
    "plain": LONG,
    # Windows that end inside a chunk, a sink, a soft cap, and two periods and a half of layers.
    "gemma": dataclasses.replace(
        LONG, layer_pattern=("local", "global"), window=5, attention_soft_cap=2.0,
        attention_sinks=True),
    "alibi": dataclasses.replace(LONG, positions="alibi", qk_norm=False),
    "learned": dataclasses.replace(LONG, positions="learned", num_kv_heads=8),
}


def context_mesh(exchange="ring", **sizes) -> MeshConfig:
    return MeshConfig(**(dict(data=1, context_exchange=exchange) | sizes))


def three_steps(config, mesh_config, model, devices=None):
    """Losses and gradient norms of three steps, parameters after, and losses of rows before."""
    mesh, program, step = start(config, mesh_config, devices, model)
    state, history = program.initialize(), []
    batch = place(mesh, BATCH, Batch(*("BS",) * 5))
    rows_B = jax.device_get(make_row_losses(program, mesh, config.objective)(state.params, batch))
    for _ in range(3):
        state, metrics = step(state, batch)
        history.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
    return np.array(history), jax.device_get(state.params), rows_B


@functools.cache
def on_one_device(name: str, kind: str = "sgd"):
    """The same, on the first device alone."""
    return three_steps(train_config(kind), MeshConfig(data=1), MODELS[name], jax.devices()[:1])


def check(name, mesh_config, config=None):
    """With SGD a step is the gradient, so all gradients are compared."""
    history, params, rows_B = three_steps(config or train_config("sgd"), mesh_config, MODELS[name])
    history_alone, params_alone, rows_alone_B = on_one_device(name)
    np.testing.assert_allclose(history, history_alone, rtol=1e-6)
    np.testing.assert_allclose(rows_B, rows_alone_B, rtol=1e-6)
    errors = jax.tree.map(
        # What begins at 0 moves by sums that cancel: below 0.01 the absolute error counts.
        lambda a, b: root_mean_square(a - b) / max(root_mean_square(b), 0.01), params, params_alone)
    worst = max(jax.tree_util.tree_leaves_with_path(errors), key=lambda leaf: leaf[1])
    assert worst[1] <= 1e-6, worst


@pytest.mark.parametrize("name,mesh", [
    ("plain", dict(context=8)), ("gemma", dict(context=4, tensor=2)),
    ("alibi", dict(data=2, context=2, tensor=2)), ("learned", dict(data=2, context=4, zero=3)),
    ("gemma", dict(data=2, context=2, tensor=2, zero=3)),
    ("plain", dict(exchange="all_to_all", context=8)),
    ("gemma", dict(exchange="all_to_all", context=4, tensor=2)),
    ("alibi", dict(exchange="all_to_all", data=2, context=2, tensor=2)),
    ("learned", dict(exchange="all_to_all", data=2, context=4, zero=3)),
], ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())))
def test_shared_rows_equal_whole_rows(name, mesh):
    check(name, context_mesh(**mesh))

"""Sharded = unsharded: loss, gradients and steps; the collectives; the bytes per device."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste.data import Batch
from batiste.models import TransformerConfig
from batiste.sharding import AXES, MeshConfig, make_mesh, place, spec
from batiste.train import TrainConfig, make_program, make_train_step

MESHES = [(8, 1), (2, 4), (4, 2)]


def start(model_config, train_config, mesh_config, devices=None):
    mesh = make_mesh(mesh_config, devices)
    program = make_program(model_config, train_config, mesh, mesh_config.zero)
    return mesh, program, make_train_step(program, train_config, mesh)


def run_three_steps(model_config, train_config, mesh_config, batch, devices=None):
    """Losses of three steps, the gradient norm of each, and the parameters after."""
    mesh, program, step = start(model_config, train_config, mesh_config, devices)
    state, history = program.initialize(), []
    batch = place(mesh, batch, Batch(*("BT",) * 5))
    for _ in range(3):
        state, metrics = step(state, batch)
        history.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
    return np.array(history), jax.device_get(state.params), state


@pytest.fixture
def wide(model_config) -> TransformerConfig:
    """Dims that tensor 4 and data 8 divide, all different: D 32, N 8, K 4, F 64, V 40."""
    return TransformerConfig(
        vocab_size=40, num_layers=3, model_dim=32, num_heads=8, num_kv_heads=4, head_dim=6,
        mlp_dim=64, max_length=16, bias=True, qk_norm=True, scan_unroll=3, norm="layer",
    )


@pytest.fixture
def sgd(train_config) -> TrainConfig:
    """Plain SGD: a step is the gradient itself, so every gradient is compared, not its sign."""
    train_config.optimizer.kind = "sgd"
    train_config.optimizer.momentum = 0.9
    train_config.schedule.learning_rate = 0.5
    return train_config


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("data,tensor", MESHES)
def test_sharded_equals_unsharded(wide, sgd, batch, data, tensor, zero):
    alone, params_alone, _ = run_three_steps(
        wide, sgd, MeshConfig(data=1), batch, jax.devices()[:1])
    history, params, _ = run_three_steps(
        wide, sgd, MeshConfig(data=data, tensor=tensor, zero=zero), batch)
    np.testing.assert_allclose(history, alone, rtol=1e-6)
    for path, mine in jax.tree_util.tree_leaves_with_path(params):
        theirs = params_alone
        for key in path:
            theirs = theirs[key.key]
        scale = np.abs(theirs).max()
        assert np.abs(mine - theirs).max() <= 1e-6 * max(scale, 1e-2), path


@pytest.mark.parametrize("kind", ["adamw", "muon", "adafactor", "lion"])
def test_every_optimizer_shards(wide, train_config, batch, kind):
    train_config.optimizer.kind = kind
    alone, _, _ = run_three_steps(wide, train_config, MeshConfig(data=1), batch, jax.devices()[:1])
    history, _, _ = run_three_steps(
        wide, train_config, MeshConfig(data=4, tensor=2, zero=3), batch)
    np.testing.assert_allclose(history, alone, rtol=2e-5)


def collectives(model_config, train_config, mesh_config, batch):
    mesh, program, step = start(model_config, train_config, mesh_config)
    batch = place(mesh, batch, Batch(*("BT",) * 5))
    with jax.set_mesh(mesh):
        text = step.jitted.lower(program.abstract_state, batch).compile().as_text()
    kinds = re.findall(
        r"= .*? (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", text)
    return {kind: kinds.count(kind) for kind in kinds}

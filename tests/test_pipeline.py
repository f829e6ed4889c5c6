"""A pipeline = one device: losses, every gradient, checkpoints; its schedule; what it sends."""

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_batch
from step_checks import (
    BATCH, WIDE, alone, check_bytes_per_device, check_equal, collectives, compiled, largest_error,
    three_steps, train_config,
)

from batiste.models import TransformerConfig
from batiste.models.pipeline import Layers, Schedule, pipelined
from batiste.sharding import MeshConfig, laid_out, layer_order, make_mesh

DEEP = dataclasses.replace(WIDE, num_layers=12)
LOCAL = dict(window=3)


def model(**changes) -> TransformerConfig:
    """DEEP with some fields changed."""
    return dataclasses.replace(DEEP, **changes)


def slower(accumulation: int = 1):
    """Three steps of SGD, at a rate at which twelve layers learn."""
    config = train_config("sgd", accumulation)
    config.schedule.learning_rate = 0.1
    return config


def check(mesh_config, accumulation: int = 1, **changes):
    """A pipeline's three steps, which equal those of one device."""
    run = three_steps(slower(accumulation), mesh_config, model(**changes))
    # The norm falls steeply, so in those of later steps the rounding of the parameters shows, as on
    # a mesh of `data` alone (6e-5 with sandwich norms and a learning rate of 0.3).
    check_equal(run, alone(slower(), model(**changes)), later_norms=1e-5)
    return run


CASES = {
    "as many micro-batches as stages, post-norm": (
        dict(stage=4, micro_batches=4), dict(norm_placement="post")),
    "more than stages": (dict(stage=2, data=1, tensor=4, micro_batches=8, zero=2), {}),
    "fewer, and not a divisor": (dict(stage=4, tensor=2, micro_batches=2), {}),
    "interleave 3": (dict(stage=2, tensor=2, micro_batches=4, interleave=3, zero=1), {}),
    "interleave 2, zero 3, remat": (
        dict(stage=2, tensor=2, micro_batches=2, interleave=2, zero=3), dict(remat="full")),
    "the same pattern in every chunk": (
        dict(stage=4, tensor=2, micro_batches=4),
        dict(layer_pattern=("local", "global", "global"), **LOCAL)),
    "a pattern across chunks": (
        dict(stage=4, tensor=2, micro_batches=4), dict(layer_pattern=("local", "global"), **LOCAL)),
    "a longer pattern across chunks of two rounds": (
        dict(stage=2, micro_batches=2, interleave=2),
        dict(layer_pattern=("global", "local", "local", "global"), **LOCAL)),
    "sandwich": (
        dict(stage=2, micro_batches=2),
        dict(norm_placement="sandwich", scale_embeddings=True)),
}


SLOW = ("the same pattern in every chunk", "a longer pattern across chunks of two rounds")


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES])
def test_a_pipeline_equals_one_device_and_takes_the_bytes_of_the_arithmetic(case):
    mesh, changes = CASES[case]
    run = check(MeshConfig(**mesh), **changes)
    check_bytes_per_device(run.mesh, run.program, run.state, moments=1)


def test_micro_batches_within_accumulation_equal_one_device():
    check(MeshConfig(stage=2, data=2, tensor=2, micro_batches=2, zero=2), accumulation=2)


def test_dropout_of_one_micro_batch_equals_one_device():
    check(MeshConfig(stage=4), dropout=0.2)


class Statistics(NamedTuple):
    """What a layer may return beside x: of rows, of nothing, of a row and something else."""

    mean_B: jax.Array
    load_E: jax.Array
    draw_BE: jax.Array


def run(pattern, rows, x_BTD, layers):
    """Layers small enough to be their own reference."""
    assert pattern == ("global",)

    def apply(x_BTD, layer):
        mean_B = x_BTD.mean(axis=(1, 2)) * rows.mean(axis=1).astype(jnp.float32)
        draw_BE = jnp.broadcast_to(jax.random.uniform(layer.keys, (3,))[None], (x_BTD.shape[0], 3))
        load_E = jnp.stack([mean_B.sum(), jnp.float32(x_BTD.shape[0])])
        return jnp.tanh(x_BTD * layer.weights[None, None]), Statistics(mean_B, load_E, draw_BE)

    return jax.lax.scan(apply, x_BTD, layers)


@pytest.mark.parametrize(
    "stage,micro_batches,interleave", [(2, 3, 1), (2, 4, 3), (4, 4, 2), (4, 8, 1)])
def test_what_layers_return_comes_back_for_all_rows(stage, micro_batches, interleave):
    B, L = 24, 24
    random = np.random.default_rng(0)
    x_BTD, w_LD = random.normal(size=(B, 5, 6)), random.normal(size=(L, 6))
    x_BTD, w_LD = jnp.asarray(x_BTD, jnp.float32), jnp.asarray(w_LD, jnp.float32)
    rows_BT = jnp.arange(B * 5).reshape(B, 5)
    keys = jax.random.split(jax.random.key(0), L)
    config = MeshConfig(stage=stage, micro_batches=micro_batches, interleave=interleave)
    order = layer_order(L, stage, interleave)

    def objective(x_BTD, w_LD, stack):
        y_BTD, results = stack(x_BTD, w_LD)
        loss = (y_BTD * jnp.cos(y_BTD)).sum() + (results.mean_B**2).sum()
        return loss + results.load_E[:, 0].sum(), (y_BTD, results)

    def alone(x_BTD, w_LD):
        return run(("global",), rows_BT, x_BTD, Layers(w_LD, keys))

    def piped(x_BTD, w_LD):
        layers = Layers(w_LD[order], keys)
        y_BTD, results = pipelined(run, ("global",) * L, None, x_BTD, rows_BT, layers)
        return y_BTD, jax.tree.map(lambda leaf: leaf[np.argsort(order)], results)

    differentiate = jax.jit(jax.grad(objective, (0, 1), has_aux=True), static_argnums=2)
    with jax.set_mesh(make_mesh(config)), laid_out(config):
        gradients, (y_BTD, results) = differentiate(x_BTD, w_LD, piped)
    expected_gradients, (expected_BTD, expected) = differentiate(x_BTD, w_LD, alone)
    np.testing.assert_allclose(y_BTD, expected_BTD, rtol=1e-6)
    assert largest_error(gradients, expected_gradients) <= 1e-6
    np.testing.assert_allclose(results.mean_B, expected.mean_B, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(results.load_E, expected.load_E, rtol=1e-5, atol=1e-5)
    drawn = [[jax.random.uniform(jax.random.fold_in(key, row % micro_batches), (3,))
              for row in range(micro_batches)] for key in keys]
    drawn = np.tile(np.array(drawn), (1, B // micro_batches, 1))
    np.testing.assert_array_equal(results.draw_BE, drawn)


@pytest.mark.parametrize(
    "stages,rounds,micro_batches", [(4, 1, 3), (2, 3, 8), (4, 2, 4), (3, 5, 6)])
def test_the_schedule_does_all_work_once_and_in_order(stages, rounds, micro_batches):
    schedule = Schedule(stages, rounds, micro_batches)
    done = {}
    for time in range(schedule.ticks):
        for stage in range(stages):
            if 0 <= time - stage < schedule.items:
                turn, micro = (int(x) for x in schedule.place(jnp.int32(time - stage)))
                assert (stage, turn, micro) not in done
                done[stage, turn, micro] = time
    assert len(done) == stages * rounds * micro_batches
    for (stage, turn, micro), time in done.items():
        before = (stage - 1, turn, micro) if stage else (stages - 1, turn - 1, micro)
        assert done.get(before, time - 1) == time - 1  # It has just arrived: nothing is stored.
    assert schedule.ticks == rounds * micro_batches + stages - 1  # The wait is stages - 1 ticks.


@pytest.mark.parametrize("micro_batches,interleave", [(8, 1), (4, 3)])
def test_stages_send_a_micro_batch_a_tick_and_no_weights(micro_batches, interleave):
    config = MeshConfig(stage=4, data=1, micro_batches=micro_batches, interleave=interleave)
    _, step = compiled(train_config("adamw"), config, DEEP, devices=jax.devices()[:4])
    text = step.as_text()
    moved = collectives(text)
    rows, length = BATCH.tokens_BT.shape
    activation = 4 * rows * length * DEEP.model_dim
    # Once forward and once backward in the text of the two loops, which run once a tick.
    assert moved.pop("collective-permute") == 2 * activation // micro_batches
    ticks = micro_batches * interleave + 3
    assert len(re.findall(rf'known_trip_count":{{"n":"{ticks}"', text)) == 2
    # What the shares of the vocabulary sum: embeddings, what the head sends back, and the same
    # for what the last stage hands to all and all to the first; some numbers of each token.
    assert 4 * activation <= moved.pop("all-reduce") <= 4 * activation + 8 * 4 * rows * length + 512
    assert moved == {}


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_rounds_keep_no_copies_of_their_weights(remat):
    """Memory of twice the ticks grows by less than the weights of one chunk."""
    heavy = model(num_layers=4, model_dim=256, mlp_dim=512, remat=remat)
    taken = {}
    for micro_batches in (2, 8):
        config = MeshConfig(stage=2, data=4, micro_batches=micro_batches, interleave=2)
        batch = make_batch(32, 12, 40, 0)
        program, step = compiled(train_config("adamw"), config, heavy, batch)
        taken[micro_batches] = step.memory_analysis().temp_size_in_bytes
    chunk = sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state.params["layers"])) // 4
    assert taken[8] - taken[2] < 4 * chunk, (taken, chunk)

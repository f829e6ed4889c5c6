"""Rows that devices share: the same losses, gradients and steps; what travels; what is refused."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from conftest import make_batch
from crossings import without_groups_of_one
from flax import nnx
from kernel_cases import make_options
from step_checks import (
    WIDE, alone, check_equal, collectives, compiled, place_batch, three_steps, train_config,
)

from batiste.configs.experiment import Experiment
from batiste.evaluation import make_row_losses
from batiste.models import Transformer
from batiste.models.attention_choice import attention
from batiste.pallas_kernels import AttentionMask
from batiste.sharding import MeshConfig, laid_out, make_mesh
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
QKV = tuple(np.zeros((2, 32, heads, 6), np.float32) for heads in (4, 2, 2))


def context_mesh(exchange="ring", **sizes) -> MeshConfig:
    return MeshConfig(**(dict(data=1, context_exchange=exchange) | sizes))


def row_losses(run, objective: ObjectiveConfig):
    """Losses of rows after the three steps."""
    on_rows = make_row_losses(run.program, run.mesh, objective)
    batch = place_batch(run.mesh, BATCH)
    return jax.device_get(on_rows(run.state.params, batch, np.ones(40, np.float32)).nats_B)


@functools.cache
def whole_rows(name: str) -> tuple:
    """The same on the first device alone, and the losses of its rows."""
    run = alone(train_config("sgd"), MODELS[name], BATCH)
    return run, row_losses(run, ObjectiveConfig())


def check(name, mesh_config, config=None):
    """With SGD a step is the gradient, so all gradients are compared."""
    config = config or train_config("sgd")
    run = three_steps(config, mesh_config, MODELS[name], BATCH)
    whole, rows_B = whole_rows(name)
    check_equal(run, whole)
    np.testing.assert_allclose(row_losses(run, config.objective), rows_B, rtol=1e-6)


@pytest.mark.parametrize("name,mesh", [
    pytest.param("plain", dict(context=8), marks=pytest.mark.slow),
    pytest.param("gemma", dict(context=4, tensor=2), marks=pytest.mark.slow),
    ("alibi", dict(data=2, context=2, tensor=2)), ("learned", dict(data=2, context=4, zero=3)),
    ("gemma", dict(exchange="all_to_all", context=4, tensor=2)),
    ("learned", dict(exchange="all_to_all", data=2, context=4, zero=3)),
], ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())))
def test_shared_rows_equal_whole_rows(name, mesh):
    check(name, context_mesh(**mesh))


@pytest.mark.slow
def test_micro_batches_and_chunks_of_the_loss():
    config = train_config("sgd", accumulation=2)
    config.objective = ObjectiveConfig(loss_chunk=12)
    check("gemma", context_mesh(data=2, context=4, zero=2), config)


def compiled_text(mesh_config: MeshConfig, name="plain") -> tuple:
    """The step's program and its compiled text, unrolled, without collectives of one device."""
    model = dataclasses.replace(MODELS[name], scan_unroll=LONG.num_layers)
    program, step = compiled(train_config("sgd"), mesh_config, model, BATCH)
    return program, without_groups_of_one(step.as_text())


def reduced_gradients(program) -> tuple[int, int]:
    """Bytes of all gradients, the tied table's in two parts; and with the scalars that join them.

    Twice: XLA adds them up over `context` and then over `data`; only what looking words up sends
    back, which is said device by device, is one sum over both.
    """
    leaves = jax.tree.leaves(program.abstract_state.params)
    exact = 4 * (2 * sum(leaf.size for leaf in leaves) + LONG.vocab_size * LONG.model_dim)
    return exact, exact + 64 * len(leaves)


def test_a_ring_sends_keys_and_their_gradients_and_nothing_else():
    """Keys and values go 3 hops forward, 3 backward, and with the latter their gradients."""
    program, text = compiled_text(context_mesh(data=2, context=4))
    moved = collectives(text)
    share = 4 * (8 // 2) * (32 // 4) * LONG.num_kv_heads * LONG.head_dim
    assert moved.pop("collective-permute") == LONG.num_layers * (2 + 2 + 2) * 3 * share
    exact, most = reduced_gradients(program)
    assert exact <= moved.pop("all-reduce") <= most
    assert moved == {}
    # No device has the keys of whole rows (local rows, whole time), nor all scores of its queries.
    assert not re.search(r"f32\[4,32,(4|8),6\]|f32\[4,4,8,2,32\]", text)


def test_heads_for_time_sends_heads_there_and_back_and_nothing_else():
    """Queries, keys, values and the output, once each in both directions of the pass."""
    program, text = compiled_text(context_mesh("all_to_all", data=2, context=4))
    moved = collectives(text)
    share = 4 * (8 // 2) * (32 // 4) * LONG.head_dim
    heads = 2 * LONG.num_heads + 2 * LONG.num_kv_heads
    assert moved.pop("all-to-all") == LONG.num_layers * 2 * heads * share
    exact, most = reduced_gradients(program)
    assert exact <= moved.pop("all-reduce") <= most
    assert moved == {}


@pytest.mark.slow
def test_local_layers_send_keys_to_neighbours_alone():
    """A window of 5 reaches two chunks of 2: four of seven steps, whose keys come by themselves."""
    _, text = compiled_text(context_mesh(data=1, context=8), "gemma")
    share = 4 * 8 * (32 // 8) * LONG.num_kv_heads * LONG.head_dim
    hops = 4 + 7 + 4  # local, global, local
    assert collectives(text)["collective-permute"] == hops * 6 * share


@pytest.mark.parametrize("exchange", ["ring", "all_to_all"])
def test_logits_come_in_the_order_of_the_row_and_positions_are_asked_for(exchange):
    model = Transformer(dataclasses.replace(LONG, num_layers=1), rngs=nnx.Rngs(0))
    tokens_BT = BATCH.tokens_BT
    graphdef, params = nnx.split(model)
    logits = jax.jit(lambda params, x_BT: nnx.merge(graphdef, params)(x_BT))
    expected = logits(params, tokens_BT)
    mesh_config = context_mesh(exchange, data=2, context=4)
    with jax.set_mesh(make_mesh(mesh_config)), laid_out(mesh_config):
        np.testing.assert_allclose(logits(params, tokens_BT), expected, atol=1e-5)
        if exchange == "ring":
            with pytest.raises(ValueError, match="positions_BT=None counts along rows"):
                model.features(tokens_BT)
            with pytest.raises(ValueError, match="does not know decoding"):
                model.extend(tokens_BT, model.empty_cache(8, 32))
            with pytest.raises(ValueError, match="does not know dropout.*'all_to_all'"):
                options = make_options(("dropout",), 4)
                attention("reference", *QKV, AttentionMask(causal=True), **options)


@pytest.mark.parametrize("change,message", [
    ({"mesh.context": 3, "data.sequence_length": 255, "model.num_heads": 6},
     r"data.sequence_length=255 is not divisible by 2 \* mesh.context=6.*multiple of 6"),
    ({"mesh.context": 2, "model.dropout": 0.1}, "model.dropout=0.1 goes by places.*to 0, or"),
    ({"mesh.context": 4, "mesh.context_exchange": "all_to_all"},
     "model.num_heads=6 is not divisible by mesh.context=4"),
    ({"mesh.context": 2, "mesh.tensor": 2, "mesh.context_exchange": "all_to_all"},
     r"model.num_heads=6 is not divisible by mesh.tensor=2 \* mesh.context=2"),
    ({"mesh.context": 2, "mesh.context_exchange": "ulysses"}, "expected one of ring, all_to_all"),
])
def test_what_a_context_cannot_do_is_refused_in_a_line(change, message):
    experiment = Experiment()
    for name, value in change.items():
        room, field = name.split(".")
        setattr(getattr(experiment, room), field, value)
    with pytest.raises(ValueError, match=message) as error:
        experiment.validate()
    assert "\n" not in str(error.value)

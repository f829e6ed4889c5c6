"""Sharded = unsharded: loss, gradients and steps; the collectives; the bytes per device."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from step_checks import (
    BATCH, WIDE, alone, bytes_with_letter, check_bytes_per_device, check_equal, collectives,
    compiled, parameters, start, three_steps, train_config,
)

from batiste.sharding import MeshConfig, check_divisible, make_mesh, spec

# Each axis alone with every ZeRO level of it, and both ways to share eight devices.
MESHES = [
    *(MeshConfig(data=8, zero=zero) for zero in range(4)), MeshConfig(data=1, tensor=4),
    *(MeshConfig(data=2, tensor=4, zero=zero) for zero in (0, 3)),
    *(MeshConfig(data=4, tensor=2, zero=zero) for zero in (1, 2)),
]


def name_of(layout: MeshConfig) -> str:
    """For the test's id."""
    return f"data {layout.data}, tensor {layout.tensor}, zero {layout.zero}"


@pytest.mark.parametrize("layout", MESHES, ids=name_of)
def test_sharded_equals_unsharded_and_takes_the_bytes_of_the_arithmetic(layout):
    devices = jax.devices()[:layout.data * layout.tensor]
    run = three_steps(train_config("sgd"), layout, devices=devices)
    check_equal(run, alone(train_config("sgd")))
    check_bytes_per_device(run.mesh, run.program, run.state, moments=1)


@pytest.mark.parametrize("kind", ["adamw", "muon", "adafactor", "lion"])
def test_every_optimizer_shards(kind):
    run = three_steps(train_config(kind), MeshConfig(data=4, tensor=2, zero=3))
    for name, expected in alone(train_config(kind)).history.items():
        np.testing.assert_allclose(run.history[name], expected, rtol=1e-5)
    if kind == "adamw":
        check_bytes_per_device(run.mesh, run.program, run.state, moments=2)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_micro_batches_shard(zero):
    config = train_config("sgd", accumulation=2)
    run = three_steps(config, MeshConfig(data=4, tensor=2, zero=zero))
    check_equal(run, alone(train_config("sgd")))


def compiled_step(layout: MeshConfig):
    """The program and its compiled text, unrolled so that every collective is in it."""
    model = dataclasses.replace(WIDE, scan_unroll=WIDE.num_layers)
    program, step = compiled(train_config("adamw"), layout, model)
    return program, step.as_text()


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_collectives_over_data_are_the_expected_ones(zero):
    """Gradients are reduced once; what ZeRO splits is gathered once per use, and nothing else.

    On a CPU a reduce-scatter is an all-reduce and a slice; see test_tpu.py for the real one.
    """
    program, text = compiled_step(MeshConfig(data=8, zero=zero))
    moved = collectives(text)
    everything, split = bytes_with_letter(program, ""), bytes_with_letter(program, "D")
    embedding = 4 * WIDE.vocab_size * WIDE.model_dim
    # Scalars (the loss, the norm over shards, ...) come on top of the gradients.
    slack = 64 * len(parameters(program))
    # The tied table is used twice, so its gradient is reduced in two parts.
    reduced = everything + embedding
    assert reduced <= moved.pop("all-reduce") <= reduced + slack
    if zero in (1, 2):  # The updated parameters, made whole again.
        assert moved.pop("all-gather") == split
    if zero == 3:  # Forward and backward pass; XLA may share the two.
        assert split <= moved.pop("all-gather") <= 2 * split + 2 * embedding
    assert moved == {}


@pytest.mark.parametrize("zero", [0, 3])
def test_collectives_over_tensor_move_activations(zero):
    """A block's sum over heads (over the feed-forward) is scattered in time, its input gathered."""
    program, text = compiled_step(MeshConfig(data=2, tensor=4, zero=zero))
    moved = collectives(text)
    rows = BATCH.tokens_BT.shape[0] // 2
    activation = 4 * rows * BATCH.tokens_BT.shape[1] * WIDE.model_dim
    # Twice a layer in each direction, and once for the embedding and the head (Korthikanti et al.
    # 2022). On a CPU a reduce-scatter is an all-reduce and a slice, and the gradients that q, k, v
    # (gate, up) send to their input are reduced one by one; test_tpu.py has the real ones.
    times = 4 * WIDE.num_layers + 2
    gradients = sum(
        leaf.size * 4 // (4 if set(letters) & set("NKFV") else 1)
        for letters, leaf in parameters(program)
    ) + WIDE.vocab_size * WIDE.model_dim
    slack = 128 * len(parameters(program)) + 20 * 4 * rows * BATCH.tokens_BT.shape[1]
    reduced = (times + 3 * WIDE.num_layers) * activation + gradients
    assert reduced <= moved.pop("all-reduce") <= reduced + slack
    if zero == 0:
        assert moved == {"all-gather": times * activation}
    else:
        split = bytes_with_letter(program, "D") // 4
        assert moved.pop("all-gather") >= times * activation + split
        assert moved == {}


def test_rules_name_what_they_refuse():
    assert spec("LDNH") == PartitionSpec("stage", None, "tensor", None)
    assert spec("LDNH", zero=True) == PartitionSpec("stage", "data", "tensor", None)
    rows = ("slice", "data", "expert")
    assert spec("BTD") == PartitionSpec(rows, "context", None)
    assert spec("BTD", between_blocks=True) == PartitionSpec(rows, ("context", "tensor"), None)
    with pytest.raises(ValueError, match="same mesh axis"):
        spec("NK")
    with pytest.raises(ValueError, match="not in the alphabet"):
        spec("BX")
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    with pytest.raises(ValueError, match="dim N of size 6.*mesh.tensor=4"):
        check_divisible(mesh, "DNH", (8, 6, 3), zero=False)


@pytest.mark.parametrize("change,message", [
    (dict(tensor=3), "does not fit the 8 devices"),
    (dict(data=2, tensor=2), "does not fit the 8 devices"),
    (dict(context=3), "does not fit the 8 devices"),
    (dict(context_exchange="rings"), "mesh.context_exchange='rings': expected one of ring, all_to_all"),
    (dict(zero=4), "mesh.zero=4"),
    (dict(tensor=0), "mesh.tensor=0"),
])
def test_a_mesh_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(**change))


def test_heads_that_do_not_divide_are_refused():
    model = dataclasses.replace(WIDE, num_kv_heads=2)
    with pytest.raises(ValueError, match="dim K of size 2"):
        start(train_config("sgd"), MeshConfig(data=2, tensor=4), model=model)

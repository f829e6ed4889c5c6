"""Sharded = unsharded: loss, gradients and steps; the collectives; the bytes per device."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest
from conftest import make_batch
from jax.sharding import PartitionSpec

from batiste.data import Batch
from batiste.models import TransformerConfig
from batiste.sharding import MeshConfig, check_divisible, make_mesh, place, spec
from batiste.train import TrainConfig, make_program, make_train_step

# Dims that tensor 4 and data 8 divide, all different: D 32, N 8, K 4, F 64, V 40.
WIDE = TransformerConfig(
    vocab_size=40, num_layers=3, model_dim=32, num_heads=8, num_kv_heads=4, head_dim=6, mlp_dim=64,
    max_length=16, bias=True, qk_norm=True, norm="layer",
)
BATCH = make_batch(8, 12, 40, 0)
MESHES = [(8, 1), (2, 4), (4, 2)]


def train_config(kind: str, accumulation: int = 1) -> TrainConfig:
    """Three steps; with SGD a step is the gradient itself, so all gradients are compared."""
    config = TrainConfig(num_steps=3, batch_size=8, accumulation=accumulation)
    config.schedule.warmup_steps = 1
    config.health.every = None
    config.optimizer.kind = kind
    config.schedule.learning_rate = 0.3 if kind == "sgd" else 1e-3
    return config


def start(config: TrainConfig, mesh_config: MeshConfig, devices=None, model: TransformerConfig = WIDE):
    """The mesh, the program and the step."""
    mesh = make_mesh(mesh_config, devices)
    program = make_program(model, config, mesh, mesh_config)
    return mesh, program, make_train_step(program, config, mesh)


def three_steps(config: TrainConfig, mesh_config: MeshConfig, devices=None):
    """Losses and gradient norms of three steps, and the parameters after."""
    mesh, program, step = start(config, mesh_config, devices)
    state, history = program.initialize(), []
    batch = place(mesh, BATCH, Batch(*("BT",) * 5))
    for _ in range(3):
        state, metrics = step(state, batch)
        history.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
    return np.array(history), jax.device_get(state.params)


def root_mean_square(x: np.ndarray) -> float:
    """The size of an array's typical element, in float64."""
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@functools.cache
def on_one_device(kind: str):
    """The same, on the first device alone."""
    return three_steps(train_config(kind), MeshConfig(data=1), jax.devices()[:1])


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("data,tensor", MESHES)
def test_sharded_equals_unsharded(data, tensor, zero):
    history, params = three_steps(
        train_config("sgd"), MeshConfig(data=data, tensor=tensor, zero=zero))
    history_alone, params_alone = on_one_device("sgd")
    np.testing.assert_allclose(history, history_alone, rtol=1e-6)

    def compare(path, mine, theirs):
        # Biases begin at 0 and move by sums that cancel: below 0.01 the absolute error counts.
        error = root_mean_square(mine - theirs) / max(root_mean_square(theirs), 0.01)
        errors[jax.tree_util.keystr(path)] = error

    errors: dict[str, float] = {}
    jax.tree_util.tree_map_with_path(compare, params, params_alone)
    assert all(error <= 1e-6 for error in errors.values()), errors


@pytest.mark.parametrize("kind", ["adamw", "muon", "adafactor", "lion"])
def test_every_optimizer_shards(kind):
    history, _ = three_steps(train_config(kind), MeshConfig(data=4, tensor=2, zero=3))
    np.testing.assert_allclose(history, on_one_device(kind)[0], rtol=1e-5)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_micro_batches_shard(zero):
    history, _ = three_steps(
        train_config("sgd", accumulation=2), MeshConfig(data=4, tensor=2, zero=zero))
    np.testing.assert_allclose(history, on_one_device("sgd")[0], rtol=1e-6)


def compiled_step(mesh_config: MeshConfig):
    """The compiled step for abstract arguments, unrolled so that every collective is in the text."""
    model = dataclasses.replace(WIDE, scan_unroll=WIDE.num_layers)
    mesh, program, step = start(train_config("adamw"), mesh_config, model=model)
    batch = place(mesh, BATCH, Batch(*("BT",) * 5))
    with jax.set_mesh(mesh):
        return program, step.jitted.lower(program.abstract_state, batch).compile()


def collectives(text: str) -> dict[str, int]:
    """Bytes that each kind of collective yields on a device, from a compiled program's text."""
    total: dict[str, int] = {}
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        for dtype, dims in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", shapes):
            size = math.prod(int(dim) for dim in dims.split(",") if dim)
            total[kind] = total.get(kind, 0) + size * int(re.sub(r"\D", "", dtype)) // 8
    return total


def bytes_with_letter(program, letter: str) -> int:
    """Bytes of the parameters that have a letter, whole."""
    return sum(
        4 * math.prod(leaf.shape)
        for letters, leaf in zip(jax.tree.leaves(program.letters),
                                 jax.tree.leaves(program.abstract_state.params))
        if letter in letters
    )


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_collectives_over_data_are_the_expected_ones(zero):
    """Gradients are reduced once; what ZeRO splits is gathered once per use, and nothing else.

    On a CPU a reduce-scatter is an all-reduce and a slice; see test_tpu.py for the real one.
    """
    program, compiled = compiled_step(MeshConfig(data=8, zero=zero))
    moved = collectives(compiled.as_text())
    everything, split = bytes_with_letter(program, ""), bytes_with_letter(program, "D")
    embedding = 4 * WIDE.vocab_size * WIDE.model_dim
    # Scalars (the loss, the norm over shards, ...) come on top of the gradients.
    slack = 64 * len(jax.tree.leaves(program.letters))
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
    program, compiled = compiled_step(MeshConfig(data=2, tensor=4, zero=zero))
    moved = collectives(compiled.as_text())
    rows = BATCH.tokens_BT.shape[0] // 2
    activation = 4 * rows * BATCH.tokens_BT.shape[1] * WIDE.model_dim
    # Twice a layer in each direction, and once for the embedding and the head (Korthikanti et al.
    # 2022). On a CPU a reduce-scatter is an all-reduce and a slice, and the gradients that q, k, v
    # (gate, up) send to their input are reduced one by one; test_tpu.py has the real ones.
    times = 4 * WIDE.num_layers + 2
    names, leaves = jax.tree.leaves(program.letters), jax.tree.leaves(program.abstract_state.params)
    gradients = sum(
        leaf.size * 4 // (4 if set(name) & set("NKFV") else 1) for name, leaf in zip(names, leaves)
    ) + WIDE.vocab_size * WIDE.model_dim
    slack = 128 * len(names) + 20 * 4 * rows * BATCH.tokens_BT.shape[1]
    reduced = (times + 3 * WIDE.num_layers) * activation + gradients
    assert reduced <= moved.pop("all-reduce") <= reduced + slack
    if zero == 0:
        assert moved == {"all-gather": times * activation}
    else:
        split = bytes_with_letter(program, "D") // 4
        assert moved.pop("all-gather") >= times * activation + split
        assert moved == {}


@pytest.mark.parametrize("data,tensor", MESHES)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bytes_per_device_are_the_arithmetic(data, tensor, zero):
    mesh, program, _ = start(train_config("adamw"), MeshConfig(data=data, tensor=tensor, zero=zero))
    state = program.initialize()

    def on_device(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    def expected(split_over_data):
        total = 0
        for letters, leaf in zip(jax.tree.leaves(program.letters), jax.tree.leaves(state.params)):
            parts = tensor if set(letters) & set("NKFV") else 1
            parts *= data if split_over_data and "D" in letters else 1
            total += leaf.nbytes // parts
        return total

    assert on_device(state.params) == expected(zero >= 3)
    moments = state.optimizer_state
    counts = sum(leaf.nbytes for leaf in jax.tree.leaves(moments) if leaf.ndim == 0)
    assert on_device(moments) - counts == 2 * expected(zero >= 1)


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

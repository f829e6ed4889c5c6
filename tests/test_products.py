"""Axes in products: one model with experts, windows and packed rows on every kind of mesh.

Of three axes; slice x data x tensor is in test_slices.py, stage x data x tensor in test_pipeline.py.
"""

import dataclasses

import pytest
from conftest import make_batch
from step_checks import WIDE, alone, check_equal, three_steps, train_config

from batiste.sharding import MeshConfig

MODEL = dataclasses.replace(
    WIDE, num_layers=4, max_length=48, mlp_dim=24, bias="none", layer_pattern=("local", "global"), window=5,
    num_experts=4, experts_per_token=2, shared_experts=1, router_bias=True,
)
BATCH = make_batch(8, 32, 40, 0)
MESHES = {
    "slice stage context": MeshConfig(slice=2, stage=2, context=2, micro_batches=4),
    "slice expert tensor": MeshConfig(slice=2, expert=2, tensor=2),
    "slice data context, zero 3": MeshConfig(slice=2, data=2, context=2, zero=3),
    "stage context tensor": MeshConfig(
        stage=2, context=2, tensor=2, micro_batches=4, interleave=2, zero=3),
    "stage context by heads": MeshConfig(
        stage=2, context=4, context_exchange="all_to_all", micro_batches=2),
    "stage expert data": MeshConfig(stage=2, expert=2, data=2, micro_batches=2, zero=3),
    "context expert tensor": MeshConfig(context=2, expert=2, tensor=2),
}


def with_balance(accumulation: int = 1, loss_chunk: int | None = 12):
    """Three steps of SGD, with the router's loss.

    The loss in chunks, of which the last is shorter: 32 positions are no multiple of 12.
    """
    config = train_config("sgd", accumulation)
    config.objective.balance_loss, config.objective.loss_chunk = 0.1, loss_chunk
    return config


SLOW = ("slice stage context", "stage context by heads", "stage expert data",
        "context expert tensor")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MESHES])
def test_a_product_of_axes_equals_one_device(name):
    run = three_steps(with_balance(), MESHES[name], MODEL, BATCH)
    check_equal(run, alone(with_balance(loss_chunk=None), MODEL, BATCH))


@pytest.mark.slow
def test_micro_batches_on_a_product_equal_one_device():
    layout = MeshConfig(slice=2, context=2, tensor=2, zero=1)
    run = three_steps(with_balance(accumulation=2), layout, MODEL, BATCH)
    check_equal(run, alone(with_balance(loss_chunk=None), MODEL, BATCH))


PLAIN = dataclasses.replace(MODEL, num_experts=None, shared_experts=0, router_bias=False)
LATENT = dataclasses.replace(
    PLAIN, layer_pattern=("global",), window=None, qk_norm=False, num_kv_heads=8, head_dim=10,
    latent_rank=12, rope_dim=4, value_dim=6, query_rank=16)
PARALLEL = dataclasses.replace(
    PLAIN, norm="rms_plus_one", norm_placement="parallel", embedding_norm=True,
    local_rope_base=50.0)


@pytest.mark.slow
@pytest.mark.parametrize("model,layout", [
    (LATENT, MeshConfig(context=2, tensor=2, zero=3)),
    (LATENT, MeshConfig(stage=2, tensor=4, micro_batches=2)),
    (PARALLEL, MeshConfig(stage=2, tensor=2, micro_batches=2, zero=3)),
], ids=["latents, context tensor data", "latents, stage tensor", "parallel, stage tensor data"])
def test_other_kinds_of_layers_on_a_product_equal_one_device(model, layout):
    run = three_steps(train_config("sgd"), layout, model, BATCH)
    check_equal(run, alone(train_config("sgd"), model, BATCH))

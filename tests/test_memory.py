"""What is recomputed, saved and offloaded changes memory and nothing else."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from step_checks import WIDE, place_batch, start, train_config
from test_tpu import MODEL as TPU_MODEL
from test_tpu import compile_step, lower_step

from batiste.models import Transformer, TransformerConfig
from batiste.sharding import HOST_MEMORY, MeshConfig, check_host_memory, make_mesh

POLICIES = {
    "dots": {"remat": "dots"},
    "full": {"remat": "full"},
    "names": {"remat": "names", "saved": ("query", "up"), "offloaded": ("attended",)},
}


def one_step(layout: MeshConfig, model: TransformerConfig = WIDE, kind: str = "sgd"):
    """The state and the metrics after one step."""
    mesh, program, step = start(train_config(kind), layout, model=model)
    return step(program.initialize(), place_batch(mesh))


@pytest.mark.parametrize("policy", POLICIES)
def test_rematerialization_changes_no_number(policy):
    layout = MeshConfig(data=2, tensor=4, zero=3)
    want, want_metrics = one_step(layout)
    model = dataclasses.replace(WIDE, **POLICIES[policy])
    got, metrics = one_step(layout, model)
    np.testing.assert_allclose(metrics["loss"], want_metrics["loss"], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got.params, want.params
    )


def count_products(remat: str, **change) -> int:
    """Products in the jaxpr of a gradient, grouped ones included."""
    model = dataclasses.replace(WIDE, remat=remat, **change)
    tokens_BT = jnp.zeros((2, 6), jnp.int32)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0))))

    def total(params):
        return nnx.merge(graphdef, params).features(tokens_BT, tokens_BT, tokens_BT)[0].sum()

    return len(re.findall(r"dot_general\w*\[", str(jax.make_jaxpr(jax.grad(total))(params))))


@pytest.mark.parametrize("change,weights", [
    # Query, key, value, out, up, gate. No gradient needs what leaves down.
    ({}, 6),
    # Instead of up and gate: the router, and all three of the experts, whose weighted sum follows.
    ({"num_experts": 4, "bias": "none"}, 8),
], ids=["dense", "experts"])
def test_dots_computes_no_product_with_weights_again(change, weights):
    none, dots, full = (count_products(remat, **change) for remat in ("none", "dots", "full"))
    attention = 2  # Scores, and values mixed by them.
    assert dots == none + attention and full == none + attention + weights


@pytest.mark.slow
def test_an_offloaded_optimizer_is_on_the_host_and_changes_no_bit():
    for zero in (0, 3):
        layout = MeshConfig(data=4, tensor=2, zero=zero)
        want, _ = one_step(layout, kind="adamw")
        got, _ = one_step(dataclasses.replace(layout, offload_optimizer=True), kind="adamw")
        jax.tree.map(np.testing.assert_array_equal, got, want)
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(got.optimizer_state) if leaf.ndim}
        assert kinds == {HOST_MEMORY}
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(got.params)} == {"device"}


TPU = dataclasses.replace(TPU_MODEL, num_layers=32, mlp_dim=1024, attention="v5e")
SAVED = dataclasses.replace(TPU, remat="names", saved=("up", "gate"))


@pytest.fixture(scope="module")
def memory():
    """What the step takes on each of eight v5e chips, by what is saved and what offloaded."""
    steps = {
        "saved": (SAVED, False), "optimizer": (SAVED, True),
        "offloaded": (dataclasses.replace(SAVED, saved=(), offloaded=("up", "gate")), False),
    }
    found = {}
    for name, (model, moments) in steps.items():
        layout = MeshConfig(data=8, offload_optimizer=moments)
        _, step = compile_step("v5e:2x4", layout, model, optimized=False)
        found[name] = step.memory_analysis()
    return found


def test_a_saved_attention_is_not_computed_again_on_a_tpu():
    kernels = {}
    for saved in ((), ("attended",)):
        model = dataclasses.replace(TPU, remat="names" if saved else "full", saved=saved)
        text = lower_step("v5e:2x4", MeshConfig(data=8), model)[1].as_text()
        kernels[saved] = text.count("@tpu_custom_call")
    # Forward, forward again and backward, in one scanned layer each.
    assert kernels == {(): 3, ("attended",): 2}


@pytest.mark.slow
def test_offloaded_activations_leave_the_chip(memory):
    rows, length, num_layers = 2, TPU_MODEL.max_length, 32
    named = 2 * 2 * rows * length * 1024 * num_layers
    assert memory["saved"].host_temp_size_in_bytes == 0
    assert memory["offloaded"].host_temp_size_in_bytes >= named
    less = memory["saved"].temp_size_in_bytes - memory["offloaded"].temp_size_in_bytes
    assert less >= 0.5 * named


@pytest.mark.slow
def test_an_offloaded_optimizer_leaves_the_chip(memory):
    whole, optimizer = memory["saved"], memory["optimizer"]
    moments = optimizer.host_argument_size_in_bytes
    assert whole.host_argument_size_in_bytes == 0
    assert whole.argument_size_in_bytes - optimizer.argument_size_in_bytes == pytest.approx(
        moments, rel=0.01)
    assert moments == pytest.approx(whole.argument_size_in_bytes * 2 / 3, rel=0.05)


@pytest.mark.parametrize("change,message", [
    (dict(saved=("up",)), "model.saved=.* has no effect with model.remat='none'"),
    (dict(remat="names", saved=("upp",)), "did you mean 'up'"),
    (dict(remat="names", saved=("up",), offloaded=("up",)), "both name up"),
])
def test_names_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(WIDE, **change).validate()


def test_a_device_without_host_memory_refuses_by_name(monkeypatch):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    check_host_memory(mesh, "mesh.offload_optimizer")
    kind = type(jax.devices()[0])
    monkeypatch.setattr(kind, "addressable_memories", lambda _: [], raising=False)
    with pytest.raises(ValueError, match="mesh.offload_optimizer needs pinned_host memory"):
        check_host_memory(mesh, "mesh.offload_optimizer")

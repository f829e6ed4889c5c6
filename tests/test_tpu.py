"""The real training step compiles ahead of time for real TPU topologies, without a TPU."""

import dataclasses
import itertools
import os
import re

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding

from batiste.data import Batch
from batiste.models import TransformerConfig
from batiste.sharding import MeshConfig, make_mesh, spec
from batiste.train import TrainConfig, make_program, make_train_step

pytest.importorskip("libtpu", reason="libtpu exists for Linux on x86-64 only")
MODEL = TransformerConfig(
    vocab_size=1024, num_layers=2, model_dim=256, num_heads=4, num_kv_heads=4, head_dim=64,
    mlp_dim=512, max_length=256, dtype="bfloat16", remat="full",
)


def tpu_devices(topology: str, slices: int = 1):
    """The devices of so many slices of a TPU topology, to compile for."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # There is no metadata server to ask.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    several = {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(
        platform="tpu", topology_name=topology, **several).devices


def compile_step(*arguments, optimized: bool = True, **options):
    """The program and the step of `lower_step`, compiled by the TPU's own compiler.

    optimized: with False it takes a fifth of the time. What is sent and where it lies are decided
    before; fusions, the order of work and how much memory is reused are not.
    """
    program, lowered = lower_step(*arguments, **options)
    before = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", before if optimized else "O0")
    try:
        return program, lowered.compile()
    finally:
        jax.config.update("jax_optimization_level", before)


def lower_step(
    topology: str, mesh_config: MeshConfig, model: TransformerConfig = MODEL, slices: int = 1,
    config: TrainConfig | None = None,
):
    """The program and the step of `model` lowered for a TPU topology."""
    mesh = make_mesh(mesh_config, tpu_devices(topology, slices))
    config = TrainConfig(batch_size=16) if config is None else config
    config.health.every = None
    program = make_program(model, config, mesh, mesh_config)
    step = make_train_step(program, config, mesh)
    batch = Batch(*(
        jax.ShapeDtypeStruct((16, 256), np.float32 if name == "weights_BT" else np.int32,
                             sharding=NamedSharding(mesh, spec("BS")))
        for name in Batch._fields[:5]
    ))
    with jax.set_mesh(mesh):
        return program, step.jitted.lower(program.abstract_state, batch)


@pytest.fixture(scope="module")
def by_zero() -> dict:
    """The step on eight chips, compiled, by its ZeRO level."""
    return {zero: compile_step("v5e:2x4", MeshConfig(data=8, zero=zero))[1] for zero in (0, 2, 3)}


@pytest.mark.slow
def test_zero_2_reduces_by_scattering_on_a_tpu(by_zero):
    texts = {zero: by_zero[zero].as_text() for zero in (0, 2)}
    # The TPU compiler's name for a fused all-reduce and slice, which is a reduce-scatter; it fuses
    # the large gradients and leaves the small ones.
    scatters = {zero: len(re.findall(r"%all-reduce-scatter[.\d]* ", texts[zero])) for zero in texts}
    assert scatters[0] == 0 and scatters[2] >= 1
    assert "all-gather" in texts[2] and "all-to-all" not in texts[2]


def test_tensor_parallel_sums_travel_once_and_in_bfloat16():
    """Two sums a layer in each direction, also of what q, k and v (gate and up) send back."""
    text = compile_step("v5e:2x4", MeshConfig(data=2, tensor=4))[1].as_text()
    sums = re.findall(r"%all-reduce[.\d]* = ([a-z]+\d+)\[8,256,256\].* all-reduce\(", text)
    assert len(sums) >= 4 and set(sums) == {"bf16"}
    assert len(sums) <= 7  # The layers' four, the embedding's, the head's and its gradient's.
    assert "all-to-all" not in text


@pytest.mark.slow
def test_zero_3_takes_less_memory_per_chip_than_zero_0(by_zero):
    arguments = {
        zero: step.memory_analysis().argument_size_in_bytes for zero, step in by_zero.items()}
    # A third of the state is parameters; norms and the batch stay whole.
    assert arguments[2] < 0.45 * arguments[0] and arguments[3] < 0.2 * arguments[0]


def test_float16_compiles_too():
    model = dataclasses.replace(MODEL, dtype="float16")
    compile_step("v5p:2x2x1", MeshConfig(data=2, tensor=2), model, optimized=False)


def test_experts_exchange_only_what_there_is_and_multiply_nothing_twice():
    """On v6e, where XLA left to itself multiplies each row by every expert's matrix."""
    model = dataclasses.replace(
        MODEL, num_layers=1, num_experts=8, remat="none", attention="v6e", tied_embeddings=False)
    _, lowered = lower_step("v6e:2x2", MeshConfig(data=2, expert=2, zero=3), model)
    text = lowered.as_text()
    # There and back, forward and backward; nothing is padded to a dense all-to-all.
    assert text.count('custom_call @ragged_all_to_all') == 4 and "stablehlo.all_to_all" not in text
    assert text.count('"chlo.ragged_dot"(') == 3 * 3 and "tpu_custom_call" in text
    # 16 rows of 256 tokens over 4 chips: at worst both chips' copies all come to one, and the
    # compiler counts the whole buffer. A weight costs 2 forward and 4 backward.
    rows = 2 * (16 // 4 * 256) * 2
    experts = 6 * rows * 3 * 256 * 512
    others = 6 * (16 // 4 * 256) * (4 * 256 * 256 + 256 * 1024)
    assert experts + others < lowered.compile().cost_analysis()["flops"] < 1.2 * (experts + others)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["ring", "all_to_all"])
def test_rows_that_devices_share_compile_with_kernels(exchange):
    """A ring's keys leave before a kernel starts and are needed after it ends."""
    model = dataclasses.replace(MODEL, attention="v6e", remat="none", num_kv_heads=2)
    mesh = MeshConfig(data=2, context=2, context_exchange=exchange)
    text = compile_step("v6e:2x2", mesh, model)[1].as_text()
    kinds = "collective-permute-start|collective-permute-done|flash_forward|flash_backward"
    order = re.findall(rf"^  (?:ROOT )?%({kinds})[.\d]* = ", text, re.M)
    if exchange == "all_to_all":
        assert " all-to-all(" in text and order == ["flash_forward", "flash_backward"]
        return
    forward = order[:order.index("flash_backward")]
    start, done = "collective-permute-start", "collective-permute-done"
    # Keys and values leave, the device attends to its own, those of the other have come.
    assert [*itertools.takewhile(lambda kind: kind == start, forward)] == [start] * 2, order
    assert order.count("flash_forward") == order.count("flash_backward") == 2, order
    assert forward.index("flash_forward") < forward.index(done), order

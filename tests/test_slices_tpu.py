"""The step compiles ahead of time for two real TPU slices; what leaves one goes by the hosts."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

pytest.importorskip("libtpu", reason="libtpu exists for Linux on x86-64 only")

from crossings import computations, computations_in_a_condition
from test_tpu import MODEL, compile_step, tpu_devices

from batiste.sharding import MeshConfig, make_mesh
from batiste.train import TrainConfig
from batiste.train.local_steps import LocalStepsConfig

SIZES = dict(slice=2, data=4, tensor=2)
# A head dim of 128 lanes: what is sent has no padding.
KERNELS = dataclasses.replace(MODEL, attention="v5e", head_dim=128)


def test_slice_is_the_slowest_axis_and_counts_the_slices_there_are():
    devices = tpu_devices("v5e:2x4", slices=2)
    mesh = make_mesh(MeshConfig(**SIZES), devices[::-1])  # In whatever order they come.
    assert mesh.devices.shape == (2, 4, 1, 1, 1, 2)
    alone = make_mesh(MeshConfig(data=4, tensor=2), tpu_devices("v5e:2x4"))
    for number, each in enumerate(mesh.devices):
        assert {device.slice_index for device in each.flat} == {number}
        # Laid out by its wiring as a slice alone is; those that share `tensor` are neighbours.
        places = np.array([[device.coords for device in row.flat] for row in each])
        np.testing.assert_array_equal(
            places, [[device.coords for device in row.flat] for row in alone.devices[0]])
        assert (np.abs(np.diff(places, axis=1)).sum(axis=-1) == 1).all()
    for wrong in (1, 4):
        with pytest.raises(ValueError, match=f"mesh.slice={wrong}, .*16 devices.*2 TPU slices"):
            make_mesh(MeshConfig(slice=wrong, tensor=2), devices)


def floats_sent(text: str, dtype: str) -> int:
    """How many entries of a dtype a chip hands to its host for other slices."""
    shapes = re.findall(rf"= \({dtype}\[([\d,]*)\].* send\(", text)
    return sum(math.prod(int(dim) for dim in dims.split(",") if dim) for dims in shapes)


def share_of_a_device(program) -> int:
    """Entries of the parameters that a device has when they are also split over data."""
    total = 0
    for name, leaf in zip(jax.tree.leaves(program.letters),
                          jax.tree.leaves(program.abstract_state.params)):
        parts = SIZES["tensor"] if set(name) & set("NKFV") else 1
        total += leaf.size // (parts * (SIZES["data"] if "D" in name else 1))
    return total


def test_shares_of_gradients_go_between_two_slices():
    program, compiled = compile_step(
        "v5e:2x4", MeshConfig(**SIZES), KERNELS, slices=2, config=TrainConfig(batch_size=16),
        optimized=False)
    text = compiled.as_text()
    share = share_of_a_device(program)
    # A sum over two slices sends each its half and gets it back: as much as a share has.
    assert share <= floats_sent(text, "f32") <= 1.02 * share
    assert "tpu_custom_call" in text


@pytest.mark.slow
def test_local_steps_send_bytes_and_only_in_exchanges():
    config = TrainConfig(batch_size=16, local=LocalStepsConfig(steps=8, compression="int8"))
    program, compiled = compile_step(
        "v5e:2x4", MeshConfig(**SIZES), KERNELS, slices=2, config=config, optimized=False)
    text = compiled.as_text()
    share = share_of_a_device(program)
    assert share <= floats_sent(text, "s8") <= 1.02 * share
    assert 0 < floats_sent(text, "f32") < 0.05 * share
    sending = {name for name, lines in computations(text).items() if " send(" in "".join(lines)}
    assert sending and sending <= computations_in_a_condition(text)
    assert "tpu_custom_call" in text


def test_pretended_slices_of_one_topology():
    sizes = MeshConfig(slice=2, data=2, tensor=2, zero=3)
    text = compile_step("v5e:2x4", sizes, KERNELS, optimized=False)[1].as_text()
    assert "tpu_custom_call" in text and " send(" not in text

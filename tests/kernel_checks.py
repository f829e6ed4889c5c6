"""How kernels are tested without their chips: interpreted on the CPU, compiled for the chip."""

import functools
import os
import re
import warnings

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

TPU = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
GPU = {"hopper": "NVIDIA H100 80GB HBM3", "ampere": "NVIDIA A100-SXM4-80GB"}


def interpreter(chip: str):
    """What `interpret` is for a kernel of this chip: TPU memory is simulated, with NaN in it."""
    if chip in GPU:
        return True
    return pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


class Races:
    """The race detectors of all kernels run: the interpreter makes a new one for each."""

    def __init__(self, monkeypatch):
        self.detectors = []
        original = interpret_pallas_call.RaceDetectionState

        def recorded(*args, **kwargs):
            self.detectors.append(original(*args, **kwargs))
            return self.detectors[-1]

        monkeypatch.setattr(interpret_pallas_call, "RaceDetectionState", recorded)

    def check(self, chip: str) -> None:
        """On a TPU kernels were watched, and none raced."""
        assert bool(self.detectors) == (chip in TPU)
        assert not any(detector.races_found for detector in self.detectors), "RACE DETECTED"


@pytest.fixture
def races(monkeypatch) -> Races:
    """Watches the kernels that the test runs."""
    interpret_pallas_call.reset_tpu_interpret_mode_state()  # What a failed test left.
    return Races(monkeypatch)


@functools.cache
def tpu_device(chip: str):
    """A device to compile for; skips where there is no libtpu."""
    pytest.importorskip("libtpu", reason="libtpu exists for Linux on x86-64 only")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # There is no metadata server to ask.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    return topologies.get_topology_desc(platform="tpu", topology_name=TPU[chip]).devices[0]


def lower_for_gpu(chip: str, function, *shapes):
    """The function lowered for the GPU on any machine: newer JAX demands that one be named."""
    device = AbstractDevice(device_kind=GPU[chip], num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))


def compile_for(chip: str, function, *shapes):
    """The function compiled for a TPU, or lowered for a GPU; shapes are (shape, dtype)."""
    placed = SingleDeviceSharding(tpu_device(chip)) if chip in TPU else None
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=placed) for shape, dtype in shapes]
    if chip in GPU:
        lowered = lower_for_gpu(chip, function, *arguments)
        assert "__gpu$xla.gpu.triton" in lowered.as_text()
        return lowered
    with warnings.catch_warnings():
        # JAX's cache keeps what was compiled for a TPU, and cannot load it where there is none.
        warnings.filterwarnings("ignore", message="Error reading persistent compilation cache")
        return jax.jit(function).lower(*arguments).compile()


def copies(compiled, elements: int) -> list[str]:
    """Instructions that move at least so many elements of HBM about."""
    pattern = re.compile(r"%(\S+) = \S*?\[([\d,]+)\]\S* (copy|transpose|fusion|reshape)\(")
    return [
        name for name, shape, _ in pattern.findall(compiled.as_text())
        if np.prod([int(size) for size in shape.split(",")]) >= elements
    ]


def assert_close(actual, expected, tolerance: float) -> None:
    """Every leaf agrees, relative to the largest element; infinities are in their places."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert a.shape == b.shape
        finite = np.isfinite(b)
        np.testing.assert_array_equal(a[~finite], b[~finite])
        scale = np.abs(b[finite]).max(initial=1e-6)
        np.testing.assert_allclose(a[finite] / scale, b[finite] / scale, rtol=0, atol=tolerance)

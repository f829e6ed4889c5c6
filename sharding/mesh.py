"""The device mesh, and arrays placed on it."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh

from batiste.sharding.config import AXES, MeshConfig
from batiste.sharding.rules import HOST_MEMORY, shardings


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all), axes in the order of AXES, `slice` the slowest.

    Where the devices are of several TPU slices, those are what `slice` counts, and each is laid out
    by its own wiring. Anywhere else a slice is devices in a row: some hosts of GPUs, or pretended.
    Raises ValueError when the config does not fit the number of devices, or of TPU slices.
    """
    config.validate()
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    axis_types = (AxisType.Auto,) * len(AXES)
    there = _num_tpu_slices(devices)
    # Where no dims of the torus multiply to an axis (2 or 8 in 4x4x4), a dim is split between axes.
    if there == 1:
        arranged = create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(arranged, AXES, axis_types=axis_types)
    if there != config.slice:
        raise ValueError(
            f"mesh.slice={config.slice}, but the {len(devices)} devices are of {there} TPU slices: "
            f"set mesh.slice={there}"
        )
    others = (1,) * (len(AXES) - 1)
    arranged = create_hybrid_device_mesh(
        (1, *shape[1:]), (there, *others), devices, allow_split_physical_axes=True
    )
    return Mesh(arranged, AXES, axis_types=axis_types)


def _num_tpu_slices(devices: Sequence[jax.Device]) -> int:
    if devices[0].platform != "tpu":
        return 1
    # Devices to compile for ahead of time, of one slice, do not have the attribute.
    return len({getattr(device, "slice_index", 0) for device in devices})


def make_mesh_like(mesh: Mesh, config: MeshConfig) -> Mesh:
    """Another mesh over the devices of `mesh`, in the same order: arrays move without the host."""
    shape = config.shape(mesh.size)
    return Mesh(mesh.devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_host_memory(mesh: Mesh, field: str) -> None:
    """Raises ValueError, naming the field that wants it, where devices have no pinned host memory."""
    device = mesh.local_devices[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY not in kinds:
        raise ValueError(
            f"{field} needs {HOST_MEMORY} memory, but {device.device_kind} has {', '.join(kinds)}: "
            f"unset {field}"
        )


def place(mesh: Mesh, tree: Any, letters_tree: Any) -> Any:
    """Puts host arrays on the mesh by their letters; an explicit transfer, so no guard objects."""
    return jax.device_put(tree, shardings(mesh, letters_tree))


def compiler_options(device: jax.Device, letters_tree: Any) -> dict[str, bool] | None:
    """What jax.jit must tell the compiler of a device about a model with these parameters.

    With experts: XLA:TPU multiplies groups of rows by groups of matrices in a kernel, but unasked
    only on v5p (libtpu 0.0.52). On v4, v5e, v6e and tpu7x it multiplied every row by every expert's
    matrix: 275 GFLOP instead of 34 for 8,192 rows and 8 experts.
    """
    experts = any("E" in letters for letters in jax.tree.leaves(letters_tree))
    if not experts or device.platform != "tpu":
        return None
    return {"xla_tpu_enable_ragged_dot_kernel": True}

"""The device mesh, and arrays placed on it."""

from typing import Any, Sequence

import jax
from jax.sharding import AxisType, Mesh

from batiste.sharding.config import AXES, MeshConfig
from batiste.sharding.rules import HOST_MEMORY, shardings


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all), axes in the order of AXES.

    Raises ValueError when the config does not fit the number of devices.
    """
    config.validate()
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def check_host_memory(mesh: Mesh, field: str) -> None:
    """Raises ValueError, naming the field that wants it, where devices have no pinned host memory."""
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY not in kinds:
        raise ValueError(
            f"{field} needs {HOST_MEMORY} memory, but {device.device_kind} has {', '.join(kinds)}: "
            f"unset {field}"
        )


def place(mesh: Mesh, tree: Any, letters_tree: Any) -> Any:
    """Puts host arrays on the mesh by their letters; an explicit transfer, so no guard objects."""
    return jax.device_put(tree, shardings(mesh, letters_tree))

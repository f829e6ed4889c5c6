"""The device mesh, and arrays placed on it."""

from typing import Any, Sequence

import jax
from jax.sharding import AxisType, Mesh

from batiste.sharding.config import AXES, MeshConfig
from batiste.sharding.rules import shardings


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all), axes in the order of AXES.

    Raises ValueError when the config does not fit the number of devices.
    """
    config.validate()
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def make_mesh_like(mesh: Mesh, config: MeshConfig) -> Mesh:
    """Another mesh over the devices of `mesh`, in the same order: arrays move without the host."""
    shape = config.shape(mesh.size)
    return Mesh(mesh.devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def place(mesh: Mesh, tree: Any, letters_tree: Any) -> Any:
    """Puts host arrays on the mesh by their letters; an explicit transfer, so no guard objects."""
    return jax.device_put(tree, shardings(mesh, letters_tree))

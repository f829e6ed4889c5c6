"""Meshes, the alphabet, and the one table that turns letters into shardings."""

from batiste.sharding.alphabet import ALPHABET, check_letters
from batiste.sharding.config import AXES, MeshConfig
from batiste.sharding.layout import laid_out, layout
from batiste.sharding.mesh import check_host_memory, make_mesh, place
from batiste.sharding.rules import (
    HOST_MEMORY, check_divisible, constrain, gather, per_device, shardings, spec,
)

__all__ = [
    "ALPHABET", "AXES", "HOST_MEMORY", "MeshConfig", "check_divisible", "check_host_memory",
    "check_letters", "constrain", "gather",
    "laid_out", "layout", "make_mesh", "per_device", "place", "shardings", "spec",
]

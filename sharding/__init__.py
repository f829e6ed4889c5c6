"""Meshes, the alphabet, and the one table that turns letters into shardings."""

from batiste.sharding.alphabet import ALPHABET, check_letters
from batiste.sharding.config import AXES, MeshConfig
from batiste.sharding.layout import laid_out, layout
from batiste.sharding.mesh import make_mesh, place
from batiste.sharding.rules import (
    check_divisible, constrain, gather, per_device, shardings, spec,
)
from batiste.sharding.stages import layer_order, reorder

__all__ = [
    "ALPHABET", "AXES", "MeshConfig", "check_divisible", "check_letters", "constrain", "gather",
    "laid_out", "layer_order", "layout", "make_mesh", "per_device", "place", "reorder", "shardings",
    "spec",
]

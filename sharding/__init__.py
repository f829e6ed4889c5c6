"""Meshes, the alphabet, and the one table that turns letters into shardings."""

from batiste.sharding.alphabet import ALPHABET, check_letters
from batiste.sharding.config import AXES, MeshConfig
from batiste.sharding.layout import laid_out, layout
from batiste.sharding.mesh import make_mesh, make_mesh_like, place
from batiste.sharding.rules import (
    RULES, check_divisible, constrain, gather, per_device, shardings, spec,
)
from batiste.sharding.stages import layer_order, restack, restacked

__all__ = [
    "ALPHABET", "AXES", "RULES", "MeshConfig", "check_divisible", "check_letters", "constrain",
    "gather", "laid_out", "layer_order", "layout", "make_mesh", "make_mesh_like", "per_device",
    "place", "restack", "restacked", "shardings", "spec",
]

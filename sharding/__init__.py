"""Meshes, the alphabet, and the one table that turns letters into shardings."""

from batiste.sharding.alphabet import ALPHABET, check_letters
from batiste.sharding.config import AXES, MeshConfig
from batiste.sharding.context_order import (
    chunk_place, context_size, in_row_order, in_time_order, time_order,
)
from batiste.sharding.layout import laid_out, layout
from batiste.sharding.mesh import make_mesh, place
from batiste.sharding.rules import (
    check_divisible, constrain, gather, per_device, shardings, spec,
)

__all__ = [
    "ALPHABET", "AXES", "MeshConfig", "check_divisible", "check_letters", "chunk_place",
    "constrain", "context_size", "gather", "in_row_order", "in_time_order", "laid_out", "layout",
    "make_mesh", "per_device", "place", "shardings", "spec", "time_order",
]

"""Meshes, the alphabet, and the one table that turns letters into shardings."""

from batiste.sharding.alphabet import ALPHABET, check_letters
from batiste.sharding.config import AXES, MeshConfig
from batiste.sharding.layout import laid_out, layout
from batiste.sharding.mesh import make_mesh, place
from batiste.sharding.rules import (
    axes_of, check_divisible, constrain, gather, per_device, shardings, spec,
)

__all__ = [
    "ALPHABET", "AXES", "MeshConfig", "axes_of", "check_divisible", "check_letters", "constrain",
    "gather", "laid_out", "layout", "make_mesh", "per_device", "place", "shardings", "spec",
]

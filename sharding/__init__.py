"""Meshes, the alphabet, and the one table that turns letters into shardings."""

from batiste.sharding.alphabet import ALPHABET, check_letters
from batiste.sharding.config import AXES, MeshConfig
from batiste.sharding.connect import connect
from batiste.sharding.mesh import make_mesh, place
from batiste.sharding.processes import agree, check_connected, check_shared, is_first, together
from batiste.sharding.rules import check_divisible, constrain, gather, shardings, spec, zero_level
from batiste.sharding.share import Share, replicate

__all__ = [
    "ALPHABET", "AXES", "MeshConfig", "Share", "agree", "check_connected", "check_divisible",
    "check_letters", "check_shared", "connect", "constrain", "gather", "is_first", "make_mesh",
    "place", "replicate", "shardings", "spec", "together", "zero_level",
]

"""Meshes, the alphabet, and the one table that turns letters into shardings."""

from batiste.sharding.agreed import Agreed, AskedElsewhere
from batiste.sharding.alphabet import ALPHABET, check_letters
from batiste.sharding.config import AXES, CONTEXT_EXCHANGES, MeshConfig
from batiste.sharding.connect import connect, leave
from batiste.sharding.context_order import (
    chunk_place, context_size, in_row_order, in_time_order, time_order,
)
from batiste.sharding.layout import laid_out, layout
from batiste.sharding.meet import connect_groups
from batiste.sharding.mesh import (
    check_host_memory, compiler_options, make_mesh, make_mesh_like, place,
)
from batiste.sharding.processes import agree, check_connected, check_shared, is_first, together
from batiste.sharding.rules import (
    HOST_MEMORY, RULES, axes_of, check_divisible, constrain, gather, per_device, shardings, spec,
)
from batiste.sharding.share import Share, replicate
from batiste.sharding.stages import layer_order, restack, restacked

__all__ = [
    "ALPHABET", "AXES", "CONTEXT_EXCHANGES", "HOST_MEMORY", "RULES", "Agreed", "AskedElsewhere",
    "MeshConfig", "Share", "agree", "axes_of", "check_connected", "check_divisible",
    "check_host_memory", "check_letters", "check_shared", "chunk_place", "compiler_options",
    "connect", "connect_groups", "constrain", "context_size", "gather", "in_row_order", "in_time_order", "is_first",
    "laid_out", "layer_order", "layout", "leave", "make_mesh", "make_mesh_like", "per_device",
    "place", "replicate", "restack", "restacked", "shardings", "spec", "time_order", "together",
]

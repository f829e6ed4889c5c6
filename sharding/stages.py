"""Which layers a pipeline stage holds, and where they are stored."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from batiste.sharding.config import MeshConfig
from batiste.sharding.rules import HOST_MEMORY, RULES


def layer_order(num_layers: int, stages: int, interleave: int) -> np.ndarray:
    """The layer at each place of a stacked parameter, int array L.

    A mesh splits a stack into contiguous parts. With interleaving, a stage's layers are not
    contiguous in depth (of 8 layers on 2 stages, 2 rounds: 0 1 4 5 and 2 3 6 7), so the stack is
    stored stage by stage, round by round. Raises ValueError if the layers do not divide.
    """
    chunks = stages * interleave
    if num_layers % chunks:
        raise ValueError(
            f"model.num_layers={num_layers} is not divisible by mesh.stage={stages} * "
            f"mesh.interleave={interleave}: choose a multiple of {chunks} layers, or fewer stages"
        )
    layers = np.arange(num_layers).reshape(interleave, stages, num_layers // chunks)
    return layers.swapaxes(0, 1).reshape(-1)


def restacked(leaf: jax.Array, dim: int | None, old: MeshConfig, new: MeshConfig) -> jax.Array:
    """An array whose layers, along `dim`, are stored as `old` wants it, stored as `new` does."""
    if dim is None or (old.interleave, new.interleave) == (1, 1):
        return leaf
    num_layers = leaf.shape[dim]
    place = np.argsort(layer_order(num_layers, old.stage, old.interleave))
    return jnp.take(leaf, place[layer_order(num_layers, new.stage, new.interleave)], axis=dim)


def restack(tree: Any, old: MeshConfig, new: MeshConfig, targets: Any) -> Any:
    """`restacked` for a tree of arrays on the devices, each to its sharding in `targets`.

    One array at a time, so that there is room for it.
    """

    def move(leaf: jax.Array, target: NamedSharding) -> jax.Array:
        same = (old.stage, old.interleave) == (new.stage, new.interleave)
        if same and leaf.sharding == target:
            return leaf
        if target.memory_kind == HOST_MEMORY:  # Where nothing is computed.
            leaf = jax.device_put(leaf, target.with_memory_kind("device"))
        # Only layers are split over stages alone, wherever they are among an array's dims.
        axes = tuple(target.spec)
        dim = axes.index(RULES["L"]) if RULES["L"] in axes else None
        reorder = functools.partial(restacked, dim=dim, old=old, new=new)
        return jax.jit(reorder, out_shardings=target)(leaf)

    return jax.tree.map(move, tree, targets)

"""Bytes of the training state on each device of a mesh, by what the real program lays out."""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from batiste.models import TransformerConfig
from batiste.sharding import AXES, HOST_MEMORY, MeshConfig, spec
from batiste.train import Program, TrainConfig, make_program


class StateBytes(NamedTuple):
    """Bytes per device of what the step updates, and of one weight-shaped tree whole over `data`.

    offloaded: what of the optimizer's state the host keeps between updates.
    layer: the weights of one repetition of the layer pattern, the larger where layers have two
    sizes; whole over `data`, as are embedding and head (both 0 and the same array when they are
    tied).
    """

    parameters: float
    optimizer: float
    offloaded: float
    gradients: float
    layer: float
    embedding: float
    head: float
    largest: float


def program_of(
    model: TransformerConfig, train: TrainConfig, zero: int, offloads: bool
) -> Program:
    """The program on a mesh of one: shapes, and specs that hold for every mesh."""
    mesh = AbstractMesh((1,) * len(AXES), AXES)
    layout = MeshConfig(data=1, zero=zero, offload_optimizer=offloads)
    return make_program(model, train, mesh, layout)


def state_bytes(
    program: Program, pattern: int, zero: int, shape: tuple[int, ...]
) -> StateBytes:
    """What the state of `program` takes on a device of a mesh with sizes `shape` of AXES.

    pattern: layers of one repetition. Raises ValueError where an axis does not divide its dim.
    """
    mesh, state = AbstractMesh(shape, AXES), program.abstract_state
    gradients = []
    whole = {"layer": 0.0, "dense": 0.0, "VD": 0.0, "DV": 0.0}
    leaves = jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(program.letters)
    for (path, leaf), name in zip(*leaves, strict=True):
        gradients.append(_leaf_bytes(mesh, leaf, spec(name, zero=zero >= 2)))
        size = _leaf_bytes(mesh, leaf, spec(name))
        if name.startswith("L"):
            periods = leaf.shape[0] / pattern / dict(zip(AXES, shape))["stage"]
            stack = "dense" if path[0].key == "dense_layers" else "layer"
            whole[stack] += size / periods
        elif name.replace("R", "D") in whole:
            whole[name.replace("R", "D")] += size
    return StateBytes(
        parameters=_tree_bytes(mesh, state.params),
        optimizer=_kept_bytes(mesh, state.optimizer_state, on_host=False),
        offloaded=_kept_bytes(mesh, state.optimizer_state, on_host=True),
        gradients=sum(gradients), layer=max(whole["layer"], whole["dense"]), embedding=whole["VD"],
        head=whole["DV"], largest=max(gradients),
    )


def _tree_bytes(mesh: AbstractMesh, tree: Any) -> float:
    """Bytes per device of a tree placed by its own specs."""
    return sum(_leaf_bytes(mesh, leaf, leaf.sharding.spec) for leaf in jax.tree.leaves(tree))


def _kept_bytes(mesh: AbstractMesh, tree: Any, on_host: bool) -> float:
    """Bytes per device of the leaves that live on the host, or of those that do not."""
    leaves = jax.tree.leaves(tree)
    kept = [leaf for leaf in leaves if (leaf.sharding.memory_kind == HOST_MEMORY) == on_host]
    return _tree_bytes(mesh, kept)


def _leaf_bytes(mesh: AbstractMesh, leaf: Any, partition: PartitionSpec) -> float:
    size = float(math.prod(leaf.shape) * leaf.dtype.itemsize)
    for dim, axes in zip(leaf.shape, partition):
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        parts = math.prod(mesh.shape[name] for name in names)
        if dim % parts:
            given = " * ".join(f"mesh.{name}={mesh.shape[name]}" for name in names)
            raise ValueError(f"a weight of shape {leaf.shape}: {dim} is not divisible by {given}")
        size /= parts
    return size

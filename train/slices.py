"""Several slices, one step: gradients are summed inside a slice, then between slices in shares.

Inside a slice the sum leaves each device of `data` with a share (D is split, as ZeRO splits it),
only that share travels over the slow network, and the slice gathers again what its ZeRO level wants
whole.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from batiste.sharding import constrain, spec


def in_each_slice(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`function` called once by each slice; on the other axes its arrays stay as they are.

    The specs name "slice" alone: PartitionSpec("slice") for what slices have their own part of.
    """
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names={"slice"}, check_vma=False
    )


def sum_over_slices(gradients_of: Callable, letters: Any) -> Callable:
    """`gradients_of` (params, batch, step, scale) of all rows; each slice computes with its own.

    The gradients come back split over `data`.
    """
    def of_this_slice(params, batch, step, scale):
        gradients, terms = gradients_of(params, batch, step, scale)
        return jax.lax.psum((split_over_data(gradients, letters), terms), "slice")

    own, shared = PartitionSpec("slice"), PartitionSpec()
    return in_each_slice(of_this_slice, (shared, own, shared, shared), shared)


def split_over_data(tree: Any, letters: Any) -> Any:
    """Parameters or gradients, each device of `data` with a share."""
    return jax.tree.map(lambda leaf, letters: constrain(leaf, letters, zero=True), tree, letters)


def share(mesh: Mesh, letters: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what a device has of a parameter that is also split over `data`."""
    return NamedSharding(mesh, spec(letters, zero=True)).shard_shape(shape)


def summed_bytes(mesh: Mesh, letters: Any, params: Any) -> float:
    """Bytes that a device sends to sum what has the shapes of the parameters, fp32, over slices."""
    sizes = jax.tree.map(
        lambda letters, leaf: math.prod(share(mesh, letters, leaf.shape)), letters, params
    )
    return all_reduce_bytes(mesh.shape["slice"], 4 * sum(jax.tree.leaves(sizes)))


def all_reduce_bytes(slices: int, size: int) -> float:
    """Bytes that a device sends so that `slices` devices sum arrays of `size` bytes.

    Each part travels S - 1 times to be summed and S - 1 times when it is: Patarasuk and Yuan 2009,
    Bandwidth optimal all-reduce algorithms for clusters of workstations.
    """
    return 2 * (slices - 1) / slices * size


def all_gather_bytes(slices: int, size: int) -> float:
    """Bytes that a device sends so that each of `slices` devices has the `size` bytes of all."""
    return (slices - 1) * size

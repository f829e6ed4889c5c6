"""When gradients are summed over devices: once a step, in shares, inside a slice before between slices.

The sum over `data` leaves each device with a share (D is split, as ZeRO splits it), only that share
travels over the slow network between slices, and the slice gathers again what its ZeRO level wants
whole.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from batiste.sharding import constrain, per_device, spec
from batiste.train.health_terms import across


def in_each_slice(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`function` called once by each slice; on the other axes its arrays stay as they are.

    The specs name "slice" alone: PartitionSpec("slice") for what slices have their own part of.
    """
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names={"slice"}, check_vma=False
    )


def summed_once(gradients_of: Callable, letters: Any, axes: tuple[str, ...]) -> Callable:
    """`gradients_of` (params, batch, step, scale) of all rows, summed over `axes` at the end.

    axes: among "slice" and "data", in this order. Each part of them computes with its own rows, so
    that micro-batches add up where they are. Left to the compiler, every micro-batch of every
    accumulation step, and every tick of a pipeline, sums its gradients over `data` again.
    """
    def of_this_part(params, batch, step, scale):
        gradients, terms = gradients_of(params, batch, step, scale)
        if "data" not in axes:
            gradients = split_over_data(gradients, letters)
        split = jax.tree.map(functools.partial(spec, zero="data" not in axes), letters)
        # Device by device: XLA would make gradients whole over `tensor` before it scatters them.
        add = per_device(lambda tree: jax.tree.map(functools.partial(_summed, axes), tree, letters),
                         (split,), split)
        rows, health, terms = None, terms.health, terms._replace(health=None)
        if health is not None:
            health = across(health, axes)
            rows, health = health.rows, health._replace(rows=None)
        return add(gradients), jax.lax.psum(terms, axes)._replace(health=health), rows

    rows, shared = PartitionSpec(axes), PartitionSpec()
    left = jax.tree.map(functools.partial(_left_split, axes), letters)
    call = jax.shard_map(
        of_this_part, in_specs=(shared, rows, shared, shared),
        out_specs=(left, shared, rows),
        axis_names=set(axes), check_vma=False,
    )

    def gradients_of_all(params, batch, step, scale):
        gradients, terms, rows = call(params, batch, step, scale)
        if rows is None:
            return gradients, terms
        return gradients, terms._replace(health=terms.health._replace(rows=rows))

    return gradients_of_all


def _left_split(axes: tuple[str, ...], letters: str) -> PartitionSpec:
    """How `_summed` leaves a gradient over those axes."""
    scattered = "data" in axes and "D" in letters
    return PartitionSpec(*("data" if letter == "D" else None for letter in letters) if scattered else ())


def _summed(axes: tuple[str, ...], gradient: jax.Array, letters: str) -> jax.Array:
    if "data" in axes and "D" in letters:
        gradient = jax.lax.psum_scatter(
            gradient, "data", scatter_dimension=letters.index("D"), tiled=True)
    elif "data" in axes:
        gradient = jax.lax.psum(gradient, "data")
    return jax.lax.psum(gradient, "slice") if "slice" in axes else gradient


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

"""What a step measures about its own health.

Everything is float32, the same on every device, and on every mesh what it is on one device. Local
steps measure nothing of this: between two exchanges nothing may travel between slices.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from batiste.sharding import MeshConfig, constrain, per_device, restacked, spec
from batiste.train.objectives import Terms
from batiste.train.state import Program

class HealthStatistics(NamedTuple):
    """Statistics of a step, L in the order of depth; None for what a model or mesh does not have.

    gradient (of the mean loss, before clipping), parameter (before the update), update: norms by
    the dotted name of the parameter, of each layer where it is stacked. rms, largest: of the
    residual stream after each block. entropy: of attention, over its maximum; logit: its largest
    (models.AttentionSums). dead: fraction of the feed-forward's units that are silent at every
    token. router_load: of the busiest expert, over the mean; router_idle: fraction of the experts
    that nobody chose; router_spread: over how many experts the load spreads (exp of its entropy),
    as a fraction of all. loss_B: cross-entropy of each row in nats per token; checksum_B: equal for
    equal rows.
    """

    gradient: dict[str, jax.Array]
    parameter: dict[str, jax.Array]
    update: dict[str, jax.Array]
    rms_L: jax.Array
    largest_L: jax.Array
    entropy_L: jax.Array | None
    logit_L: jax.Array | None
    dead_L: jax.Array | None
    router_load_L: jax.Array | None
    router_idle_L: jax.Array | None
    router_spread_L: jax.Array | None
    loss_B: jax.Array
    checksum_B: jax.Array


def health_statistics(
    program: Program, terms: Terms, trees: tuple[Any, Any, Any]
) -> HealthStatistics:
    """The statistics of a step, from its summed Terms; `trees`: gradients, parameters, updates."""
    added, largest, rows = terms.health
    load_LE = None if terms.router is None else terms.router.load_BLE  # Of all rows together.
    gradient, parameter, update = _norms(program, trees)
    queries = added.queries_L

    def by_depth(leaf: jax.Array) -> jax.Array:
        return restacked(leaf, 0 if leaf.ndim else None, program.layout, MeshConfig())

    layers = jax.tree.map(by_depth, dict(
        rms_L=jnp.sqrt(added.square_L / jnp.maximum(added.tokens, 1)),
        largest_L=largest.activation_L,
        entropy_L=None if queries is None else added.entropy_L / jnp.maximum(queries, 1),
        logit_L=largest.logit_L,
        dead_L=None if added.alive_LF is None
        else (added.alive_LF == 0).astype(jnp.float32).mean(axis=1),
        router_load_L=None if load_LE is None
        else load_LE.max(axis=1) / jnp.maximum(load_LE.mean(axis=1), 1),
        router_idle_L=None if load_LE is None
        else (load_LE == 0).astype(jnp.float32).mean(axis=1),
        router_spread_L=None if load_LE is None else _spread(load_LE),
    ))
    norms = [jax.tree.map(by_depth, tree) for tree in (gradient, parameter, update)]
    statistics = HealthStatistics(
        *norms, **layers, loss_B=rows.cross_entropy_B / jnp.maximum(rows.tokens_B, 1),
        checksum_B=rows.checksum_B,
    )
    return jax.tree.map(lambda leaf: constrain(leaf, ""), statistics)


def _spread(load_LE: jax.Array) -> jax.Array:
    """exp of the entropy of each row, over its length: 1 where it is even, 1 / E for one alone."""
    share_LE = load_LE / jnp.maximum(load_LE.sum(axis=1, keepdims=True), 1)
    entropy_L = -jax.scipy.special.xlogy(share_LE, share_LE).sum(axis=1)
    return jnp.exp(entropy_L) / load_LE.shape[1]


def _norms(program: Program, trees: tuple[Any, Any, Any]) -> list[dict[str, jax.Array]]:
    """Norms by name, of each layer; all of them are summed over devices at once."""
    paths = jax.tree_util.tree_leaves_with_path(program.letters)
    names = [".".join(key.key for key in path) for path, _ in paths]
    letters = [leaf for _, leaf in paths]
    shapes = [leaf.shape for leaf in jax.tree.leaves(program.abstract_state.params)]
    split = tuple(
        [spec(leaf, zero=program.layout.zero >= level) for leaf in letters] for level in (1, 3, 1))

    # Nothing has to be summed over what splits no parameter; slices never do.
    axes = tuple(sorted({axis for specs in split for partition in specs for axis in _axes(partition)}))

    def of_this_device(trees):
        parts = [
            _squares(leaf, name, _replicas(partition, axes), shape[:1])
            for leaves, partitions in zip(trees, split, strict=True)
            for leaf, name, partition, shape in zip(
                leaves, letters, partitions, shapes, strict=True)
        ]
        total = jnp.concatenate(parts)
        return jnp.sqrt(jax.lax.psum(total, axes) if axes else total)

    leaves = tuple(jax.tree.leaves(tree) for tree in trees)
    norms = per_device(of_this_device, (split,), PartitionSpec())(leaves)
    sizes = [
        shape[0] if leaf[:1] == "L" else 1 for leaf, shape in zip(letters, shapes, strict=True)]
    places = [sum(sizes[:index]) for index in range(len(sizes))]
    return [
        {
            name: tree[place : place + size] if leaf[:1] == "L" else tree[place]
            for name, leaf, place, size in zip(names, letters, places, sizes, strict=True)
        }
        for tree in norms.reshape(3, -1)
    ]


def _axes(partition: PartitionSpec) -> list[str]:
    """The mesh axes that it names."""
    return [axis for axes in partition if axes
            for axis in ((axes,) if isinstance(axes, str) else axes)]


def _replicas(partition: PartitionSpec, axes: tuple[str, ...]) -> int:
    """Devices along `axes` that have the same part of an array."""
    return math.prod(jax.lax.axis_size(axis) for axis in axes if axis not in _axes(partition))


def _squares(leaf: jax.Array, letters: str, replicas: int, layers: tuple[int, ...]) -> jax.Array:
    """This device's part of the sum of squares, of each of so many layers; replicas share it."""
    square = jnp.square(leaf.astype(jnp.float32))
    if letters[:1] != "L":
        return square.sum()[None] / replicas
    square_L = square.sum(axis=tuple(range(1, leaf.ndim))) / replicas
    start = 0 if square_L.shape == layers else jax.lax.axis_index("stage") * len(square_L)
    return jax.lax.dynamic_update_slice(jnp.zeros(layers), square_L, (start,))

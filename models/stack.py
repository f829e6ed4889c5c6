"""Blocks stacked to be applied by a scan: how they are built, what of them is saved, what repeats."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from batiste.models.block import Block
from batiste.models.config import TransformerConfig
from batiste.models.layers import PRODUCT
from batiste.models.parts import TURNS
from batiste.models.positions import rotation
from batiste.sharding import HOST_MEMORY


def remat_policy(config: TransformerConfig) -> Callable:
    """Which tensors of a layer are saved for the backward pass, as `jax.checkpoint` wants it said."""
    policies = jax.checkpoint_policies
    if config.remat == "names":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=config.saved, names_which_can_be_offloaded=config.offloaded,
            offload_src="device", offload_dst=HOST_MEMORY,
        )
    if config.remat == "dots":
        named = policies.save_only_these_names(PRODUCT)
        return policies.save_from_both_policies(policies.dots_saveable, named)
    return policies.nothing_saveable


def stacked(config: TransformerConfig, depth: int, rngs: nnx.Rngs) -> Block:
    """So many blocks as one, their parameters with a leading L, of 1 where they are shared."""
    build = nnx.vmap(lambda rngs: Block(config, rngs=rngs), in_axes=0, out_axes=0)
    return nnx.split_rngs(splits=1 if config.shared_layers else depth)(build)(rngs)


def one_of(turns: tuple, index: jax.Array) -> tuple | None:
    """The rotation at an index that is known when the program runs."""
    if all(turn is turns[0] for turn in turns):
        return turns[0]
    return jax.tree.map(lambda *each: jnp.stack(each)[index], *turns)


def rotations(config: TransformerConfig, positions_BT: jax.Array) -> dict[str, tuple | None]:
    """How each kind of layer rotates; kinds that rotate alike share the arrays."""
    kinds = dict.fromkeys(config.layer_pattern)
    if config.positions in TURNS:
        return dict.fromkeys(kinds, TURNS[config.positions].of_places(config, positions_BT))
    if config.positions != "rope":
        return kinds
    if config.local_rope_base is None:
        return dict.fromkeys(kinds, rotation(config, positions_BT))
    return {kind: rotation(config, positions_BT, kind) for kind in kinds}


def scan_pattern(config, pattern, apply, x_BTD, layers):
    """Scans over whole periods of the layer pattern; what is left of the depth follows unrolled.

    `layers` is a tree with leading L; returns x_BTD and the stacked second results of `apply`.
    """
    num_layers = jax.tree.leaves(layers)[0].shape[0]
    if config.remat != "none":
        apply = jax.checkpoint(apply, policy=remat_policy(config), static_argnums=(0,))
    periods = num_layers // len(pattern)
    whole = periods * len(pattern)

    def period(x_BTD, layers):
        results = []
        for index, kind in enumerate(pattern):
            x_BTD, result = apply(kind, x_BTD, jax.tree.map(lambda leaf: leaf[index], layers))
            results.append(result)
        return x_BTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    grouped = jax.tree.map(
        lambda leaf: leaf[:whole].reshape(periods, len(pattern), *leaf.shape[1:]), layers
    )
    x_BTD, results = jax.lax.scan(period, x_BTD, grouped, unroll=min(config.scan_unroll, periods))
    results = jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), results)
    for index in range(whole, num_layers):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], layers)
        x_BTD, result = apply(pattern[index - whole], x_BTD, layer)
        results = jax.tree.map(
            lambda done, last: jnp.concatenate([done, last[None]]), results, result
        )
    return x_BTD, results

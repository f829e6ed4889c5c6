"""One Transformer: embed, a scanned stack of blocks, norm, logits."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from batiste.models.attention import LayerCache
from batiste.models.attention_choice import OneOf, fused_losses
from batiste.models.block import Block, LayerOutput, split_time
from batiste.models.chunked_loss import Head, Rows, chunked_loss
from batiste.models.config import TransformerConfig
from batiste.models.layers import PRODUCT, Norm, dropout, lookup, project
from batiste.models.parameter import gathered, matrix
from batiste.models.pipeline import LAYER_INPUT, Layers, pipelined
from batiste.models.positions import rotation, sinusoids
from batiste.models.token_loss import LossRules
from batiste.pallas_kernels import AttentionMask
from batiste.sharding import (
    HOST_MEMORY, constrain, gather, in_row_order, in_time_order, layout, time_order,
)


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


class Cache(NamedTuple):
    """What decoding remembers: keys and values of all layers, and how many tokens each row has."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    length_B: jax.Array


class Transformer(nnx.Module):
    """A decoder; `config` decides everything, and is validated here."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        config.validate()
        self.config = config
        sizes, stddev = config.sizes, config.init_stddev
        self.embedding_VD = matrix(rngs, "VD", sizes, inputs="D", stddev=stddev)
        learned = config.positions == "learned"
        self.position_TD = (
            matrix(rngs, "TD", sizes, inputs="D", stddev=stddev) if learned else None
        )
        self.embedding_norm = Norm(config) if config.embedding_norm else None
        dense = dataclasses.replace(config, num_experts=None, mlp_dim=config.dense_mlp_dim)
        first = config.dense_layers
        self.dense_layers = _stacked(dense, first, rngs) if first else None
        self.layers = _stacked(config, config.num_layers - first, rngs)
        self.norm = Norm(config) if config.norm_placement != "post" else None
        tied = config.tied_embeddings
        self.head_DV = None if tied else matrix(rngs, "DV", sizes, inputs="D", stddev=stddev)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits in float32, logits_BTV; arguments as in `features`, but rows as they come."""
        if positions_BT is None:
            positions_BT = _places(tokens_BT)
        arrays = map(in_time_order, (tokens_BT, positions_BT, segments_BT))
        return in_row_order(self.logits(self.features(*arrays, dropout_key)[0]))

    def features(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        measured: bool = False,
    ) -> tuple[jax.Array, LayerOutput]:
        """The last hidden states, x_BTD in the compute dtype, and what the layers did, by layer.

        What is measured of them is of those after the first `dense_layers`.

        positions_BT: place of each token in its document, int32; None counts along the row.
        segments_BT: document of each token, int32, 0 for padding; None is one document a row.
        dropout_key: None turns dropout off. measured: whether layers sum up what they do.
        Rows are in the order of `time_order`; where that is not their own, positions_BT is needed,
        or ValueError.
        """
        if positions_BT is None:
            if time_order(tokens_BT.shape[1]) is not None:
                raise ValueError(
                    "positions_BT=None counts along rows, but mesh.context_exchange='ring' has them "
                    "in another order: put all arrays through in_time_order and give positions_BT"
                )
            positions_BT = _places(tokens_BT)
        segments = (segments_BT, segments_BT)
        return self._stack(tokens_BT, positions_BT, segments, None, dropout_key, measured)

    def extend(self, tokens_BT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """The hidden states of tokens that continue each row of the cache, and the cache after.

        A row may hold padding at its end: the caller sets `length_B` to what is real, and the
        next call overwrites the rest.
        """
        positions_BT = cache.length_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        x_BTD, output = self._stack(tokens_BT, positions_BT, (None, None), cache, None)
        return x_BTD, Cache(*output.cache, cache.length_B + tokens_BT.shape[1])

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """The head, in float32 from the product on; soft-capped if the config says so."""
        x_BTD, head = constrain(self._normed(x_BTD), "BTD"), self._head()
        table, summed = gather(head.weight, head.letters), head.letters.index("D")
        logits_BTV = constrain(project(x_BTD, table, (summed,), jnp.float32), "BTV")
        cap = head.soft_cap
        return logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap)

    def chunked_loss(
        self, rows: Rows, scale: jax.Array | None, rules: LossRules, chunk: int
    ) -> tuple[jax.Array, jax.Array]:
        """The loss of features and each row's cross-entropy, without all logits: `chunked_loss`."""
        # As much memory as the features: what the norm computes in fp32 is not kept.
        x_BTD = jax.checkpoint(self._normed)(rows.x_BTD)
        return chunked_loss(rows._replace(x_BTD=x_BTD), self._head(), scale, rules, chunk)

    def fused_losses(
        self, x_BTD: jax.Array, targets_BT: jax.Array, rules: LossRules
    ) -> tuple[jax.Array, jax.Array]:
        """Loss and cross-entropy of each token by the chip's kernel, float32 BT, without logits.

        Raises ValueError for a model that is not set to a chip's kernels.
        """
        head = self._head()
        whole = gather(head.weight, head.letters)
        options = dict(layout=head.letters, soft_cap=head.soft_cap, **rules._asdict())
        return fused_losses(
            self.config.attention, self._normed(x_BTD), whole, targets_BT, options)

    def _normed(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def _head(self) -> Head:
        tied = self.head_DV is None
        weight = (self.embedding_VD if tied else self.head_DV)[...]
        return Head(weight, "VD" if tied else "DV", self.config.logit_soft_cap)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Room for `length` tokens in each of `batch` rows, in the compute dtype.

        Of latent attention, k holds latents and rotated keys, and v nothing.
        """
        config = self.config
        heads, sizes = config.num_kv_heads, (config.head_dim, config.head_dim)
        if config.latent_rank is not None:
            heads, sizes = 1, (config.latent_rank + config.rope_dim, 0)
        k, v = (
            jnp.zeros((config.num_layers, batch, length, heads, size), config.dtype)
            for size in sizes
        )
        return Cache(k, v, jnp.zeros((batch,), jnp.int32))

    def _stack(self, tokens_BT, positions_BT, segments, cache, dropout_key, measured=False):
        config = self.config
        embed_key = layers_key = None
        if dropout_key is not None and config.dropout > 0:
            embed_key, layers_key = jax.random.split(dropout_key)
        x_BTD = split_time(self._embed(tokens_BT, positions_BT), cache)
        x_BTD = dropout(x_BTD, config.dropout, embed_key)
        keys = None if layers_key is None else jax.random.split(layers_key, config.num_layers)
        layer_cache = None if cache is None else LayerCache(cache.k_LBSKH, cache.v_LBSKH)
        rows, given, before = (positions_BT, segments), Layers(None, keys, layer_cache), None
        if self.dense_layers is not None:
            run, weights = self._runner(self.dense_layers, cache, measured)
            first = jax.tree.map(lambda leaf: leaf[: config.dense_layers], given)
            given = jax.tree.map(lambda leaf: leaf[config.dense_layers:], given)
            first = first._replace(weights=weights)
            x_BTD, before = run(config.layer_pattern, rows, x_BTD, first)
        run, weights = self._runner(self.layers, cache, measured)
        layers = given._replace(weights=weights)
        if cache is None and layout().stage > 1:
            policy = None if config.remat == "none" else remat_policy(config)
            return pipelined(run, config.layer_kinds, policy, x_BTD, rows, layers)
        x_BTD, output = run(config.layer_pattern, rows, x_BTD, layers)
        return x_BTD, output if before is None else output._replace(cache=jax.tree.map(
            lambda *parts: jnp.concatenate(parts), before.cache, output.cache))

    def _runner(self, stack, cache, measured):
        """What runs some layers of a stack, as `pipelined` wants it, and the stack's weights."""
        config = self.config
        graphdef, weights = nnx.split(stack)

        def run(pattern, rows, x_BTD, layers):
            positions_BT, segments = rows
            turns = self._rotations(positions_BT)
            masks = self._masks(segments, cache)

            def apply(kind, x_BTD, layer):
                if kind is None:
                    mask = OneOf(tuple(masks.values()), layer.kinds)
                    turn = _one_of(tuple(turns.values()), layer.kinds)
                else:
                    mask, turn = masks[kind], turns[kind]
                x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
                block = nnx.merge(graphdef, gathered(layer.weights))
                return block(x_BTD, mask, turn, layer.cache, layer.keys, measured)

            return _scan_pattern(config, pattern, apply, x_BTD, layers)

        return run, weights

    def _masks(self, segments, cache: Cache | None) -> dict[str, AttentionMask]:
        """The mask of each kind of layer."""
        return {
            kind: AttentionMask(
                causal=True,
                window=self.config.window if kind == "local" else None,
                query_segments_BT=segments[0],
                key_segments_BS=segments[1],
                query_offset_B=None if cache is None else cache.length_B,
            )
            for kind in self.config.layer_pattern
        }

    def _rotations(self, positions_BT: jax.Array) -> dict[str, tuple | None]:
        """How each kind of layer rotates; kinds that rotate alike share the arrays."""
        config, kinds = self.config, dict.fromkeys(self.config.layer_pattern)
        if config.positions != "rope":
            return kinds
        if config.local_rope_base is None:
            return dict.fromkeys(kinds, rotation(config, positions_BT))
        return {kind: rotation(config, positions_BT, kind) for kind in kinds}

    def _embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        config = self.config
        x_BTD = lookup(gather(self.embedding_VD[...], "VD"), tokens_BT, "VD")
        if config.scale_embeddings:
            # In the compute dtype, as Gemma was trained: 55.5 and not 55.43 in bf16.
            x_BTD *= jnp.sqrt(float(config.model_dim)).astype(config.dtype).astype(jnp.float32)
        if config.positions == "learned":
            x_BTD += lookup(gather(self.position_TD[...], "TD"), positions_BT, "TD")
        elif config.positions == "sinusoidal":
            x_BTD += sinusoids(positions_BT, config.model_dim)
        if self.embedding_norm is not None:
            x_BTD = self.embedding_norm(x_BTD)
        return x_BTD.astype(config.dtype)


def _stacked(config: TransformerConfig, depth: int, rngs: nnx.Rngs) -> Block:
    """So many blocks as one, their parameters with a leading L."""
    build = nnx.vmap(lambda rngs: Block(config, rngs=rngs), in_axes=0, out_axes=0)
    return nnx.split_rngs(splits=depth)(build)(rngs)


def _one_of(turns: tuple, index: jax.Array) -> tuple | None:
    """The rotation at an index that is known when the program runs."""
    if all(turn is turns[0] for turn in turns):
        return turns[0]
    return jax.tree.map(lambda *each: jnp.stack(each)[index], *turns)


def _places(tokens_BT: jax.Array) -> jax.Array:
    """Counts along each row, int32 BT."""
    return jnp.broadcast_to(
        jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape
    )


def _scan_pattern(config, pattern, apply, x_BTD, layers):
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

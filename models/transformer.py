"""One Transformer: embed, a scanned stack of blocks, norm, logits."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from batiste.models.attention import Given, LayerCache
from batiste.models.attention_choice import OneOf, fused_losses
from batiste.models.block import LayerOutput, mixer_of, split_time, whole_time
from batiste.models.chunked_loss import Head, Rows, chunked_loss
from batiste.models.config import TransformerConfig
from batiste.models.generator import Generator
from batiste.models.layers import (
    HeadTransform, Norm, ReplacedHead, add_bias, dropout, lookup, project,
)
from batiste.models.parameter import gathered, matrix, vector
from batiste.models.parts import LAYER_KINDS
from batiste.models.pipeline import LAYER_INPUT, Layers, pipelined
from batiste.models.positions import RELATIVE_BUCKETS, relative_bias, sinusoids
from batiste.models.stack import (
    one_of, remat_policy, rotations, scan_pattern, stacked,
)
from batiste.models.token_loss import LossRules
from batiste.pallas_kernels import AttentionMask
from batiste.sharding import (
    constrain, gather, in_row_order, in_time_order, layout, time_order,
)


class Beside(NamedTuple):
    """What an objective may give beside tokens; None for what it does not.

    prefix_B: the first tokens of each row that causality does not hide, int32. types_BT: the type
    of each token, int32; None is type 0. source: what the encoder reads, as the decoder's arrays of
    these names; int32.
    """

    prefix_B: jax.Array | None = None
    types_BT: jax.Array | None = None
    source_tokens_BS: jax.Array | None = None
    source_positions_BS: jax.Array | None = None
    source_segments_BS: jax.Array | None = None


class Cache(NamedTuple):
    """What decoding remembers: keys and values of all layers, and how many tokens each row has.

    source: keys and values that all layers make of what the encoder read, and its segments.
    """

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    length_B: jax.Array
    source_k_LBSKH: jax.Array | None = None
    source_v_LBSKH: jax.Array | None = None
    source_segments_BS: jax.Array | None = None


class Transformer(nnx.Module):
    """`config` decides everything, and is validated here."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        config.validate()
        self.config = config
        sizes, stddev = config.sizes, config.init_stddev
        self.width = "D" if config.embedding_dim is None else "R"
        two, learned = config.form == "encoder_decoder", config.positions == "learned"
        for name, rows, wanted in (
            ("embedding", "V", True), ("position", "T", learned),
            ("encoder_position", "T", two and learned),
            ("type", "P", config.token_types is not None),
        ):
            table = functools.partial(matrix, inputs=self.width, stddev=stddev)
            letters = rows + self.width
            setattr(self, f"{name}_{letters}", table(rngs, letters, sizes) if wanted else None)
        normed = config.embedding_norm
        self.embedding_norm = Norm(config, self.width) if normed else None
        self.encoder_embedding_norm = Norm(config, self.width) if normed and two else None
        factored = self.width == "R"
        self.widening_RD = (
            matrix(rngs, "RD", sizes, inputs="R", stddev=stddev) if factored else None)
        has_bias = factored and config.bias == "all"
        self.widening_bias_D = vector("D", sizes, 0.0) if has_bias else None
        relative = config.positions == "relative"
        buckets = sizes | {"P": RELATIVE_BUCKETS}
        bias = functools.partial(matrix, rngs, "PN", buckets, inputs="P", stddev=stddev)
        self.relative_PN = bias() if relative else None
        dense = dataclasses.replace(config, num_experts=None, mlp_dim=config.dense_mlp_dim)
        first = config.dense_layers
        self.dense_layers = stacked(dense, first, rngs) if first else None
        self.layers = stacked(config, config.num_layers - first, rngs)
        self.norm = Norm(config) if config.norm_placement != "post" else None
        heads = dataclasses.replace(config, num_layers=config.future_heads, shared_layers=False)
        self.future_heads = stacked(heads, config.future_heads, rngs) if config.future_heads else None
        self.encoder_layers = stacked(config.encoder, config.encoder_layers, rngs) if two else None
        self.encoder_norm = Norm(config) if two and config.norm_placement != "post" else None
        self.encoder_relative_PN = bias() if two and relative else None
        self.head_transform = HeadTransform(config, rngs=rngs) if config.head_transform else None
        self.replaced_head = ReplacedHead(config, rngs=rngs) if config.discriminator else None
        generates = config.generator_heads is not None
        self.generator = Generator(config.generator, rngs=rngs) if generates else None
        tied = config.tied_embeddings
        self.head_DV = None if tied else matrix(rngs, "DV", sizes, inputs="D", stddev=stddev)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        beside: Beside = Beside(),
    ) -> jax.Array:
        """Logits in float32, logits_BTV; arguments as in `features`, but rows as they come."""
        if positions_BT is None:
            positions_BT = _places(tokens_BT)
        arrays = map(in_time_order, (tokens_BT, positions_BT, segments_BT))
        return in_row_order(self.logits(self.features(*arrays, dropout_key, False, beside)[0]))

    def features(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        measured: bool = False,
        beside: Beside = Beside(),
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
        memory = None
        if self.encoder_layers is not None:
            if (segments_BT is None) != (beside.source_segments_BS is None):
                raise ValueError("segments_BT and beside.source_segments_BS: give both or none")
            encoder_key = None
            if dropout_key is not None:
                dropout_key, encoder_key = jax.random.split(dropout_key)
            memory = self.encode(beside, encoder_key)
        rows = positions_BT, (segments_BT, segments_BT), beside
        return self._stack(tokens_BT, rows, (None, memory), dropout_key, measured)

    def encode(self, beside: Beside, dropout_key: jax.Array | None = None) -> jax.Array:
        """What the encoder makes of its source, source_BSD; ValueError without one."""
        if beside.source_tokens_BS is None:
            raise ValueError(
                "model.form='encoder_decoder' reads a source: give beside.source_tokens_BS")
        tokens_BS, positions_BS, segments_BS = beside[2:]
        embed_key = layers_key = None
        if dropout_key is not None and self.config.dropout > 0:
            embed_key, layers_key = jax.random.split(dropout_key)
        positions_BS = _places(tokens_BS) if positions_BS is None else positions_BS
        x_BSD = self._embed(tokens_BS, positions_BS, side="encoder_")
        x_BSD = dropout(x_BSD, self.config.dropout, embed_key)
        config, (graphdef, weights) = self.config.encoder, nnx.split(self.encoder_layers)
        mask = AttentionMask(
            causal=False, query_segments_BT=segments_BS, key_segments_BS=segments_BS)
        given = Given(rotations(config, positions_BS)["global"],
                      self._bias(config, self.encoder_relative_PN, mask, tokens_BS.shape[1:] * 2))

        def apply(_, x_BSD, layer):
            block = nnx.merge(graphdef, gathered(layer.weights))
            return block(x_BSD, mask, given, None, layer.keys, False)

        keys = None if layers_key is None else jax.random.split(layers_key, config.num_layers)
        x_BSD, _ = scan_pattern(
            config, ("global",), apply, split_time(x_BSD, None), Layers(weights, keys))
        x_BSD = x_BSD if self.encoder_norm is None else self.encoder_norm(x_BSD)
        return whole_time(x_BSD, None)

    def read(self, tokens_BS: jax.Array, segments_BS: jax.Array, length: int) -> Cache:
        """An empty cache for `length` tokens in each row that continue these sources."""
        source_BSD = self.encode(Beside(source_tokens_BS=tokens_BS, source_segments_BS=segments_BS))
        graphdef, weights = nnx.split(self.layers)

        def keys_values(weights):
            return nnx.merge(graphdef, gathered(weights)).cross_attention.read(source_BSD)

        k_LBSKH, v_LBSKH = jax.lax.map(keys_values, weights)
        return self.empty_cache(tokens_BS.shape[0], length)._replace(
            source_k_LBSKH=k_LBSKH, source_v_LBSKH=v_LBSKH, source_segments_BS=segments_BS)

    def ahead(
        self, x_BTD: jax.Array, rows: tuple, index: int, dropout_key: jax.Array | None
    ) -> jax.Array:
        """What future head `index` makes of the features, x_BTD; it predicts index + 2 tokens on.

        rows: positions_BT and segments_BT, as `features` was given them.
        """
        config, (positions_BT, segments_BT) = self.config, rows
        mask = self._masks((segments_BT, segments_BT), None)[config.layer_kinds[-1]]
        given = Given(rotations(config, positions_BT)[config.layer_kinds[-1]],
                      self._bias(config, self.relative_PN, mask, x_BTD.shape[1:2] * 2))
        graphdef, weights = nnx.split(self.future_heads)
        key = None
        if dropout_key is not None and config.dropout > 0:
            key = jax.random.fold_in(dropout_key, index + 1)

        def apply(x_BTD, weights):
            block = nnx.merge(graphdef, gathered(weights))
            return block(x_BTD, mask, given, None, key, False)[0]

        if config.remat != "none":
            apply = jax.checkpoint(apply, policy=remat_policy(config))
        return apply(x_BTD, jax.tree.map(lambda leaf: leaf[index], weights))

    def extend(
        self, tokens_BT: jax.Array, cache: Cache, prefix_B: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """The hidden states of tokens that continue each row of the cache, and the cache after.

        A row may hold padding at its end: the caller sets `length_B` to what is real, and the
        next call overwrites the rest. prefix_B: the first tokens of each row that all of it sees;
        None is causal.
        """
        positions_BT = cache.length_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        rows = positions_BT, (None, None), Beside(prefix_B)
        x_BTD, output = self._stack(tokens_BT, rows, (cache, None), None)
        return x_BTD, cache._replace(
            k_LBSKH=output.cache.k_BSKH, v_LBSKH=output.cache.v_BSKH,
            length_B=cache.length_B + tokens_BT.shape[1])

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """The head, in float32 from the product on; soft-capped if the config says so.

        Raises ValueError for a discriminator, which has none.
        """
        if self.replaced_head is not None:
            raise ValueError(
                "model.discriminator=True has no logits of tokens, but says which were replaced: "
                "leave it False to predict tokens")
        return self._products(self._normed(x_BTD), self.head_transform)

    def guesses(
        self, tokens_BT: jax.Array, rows: tuple, dropout_key: jax.Array | None
    ) -> jax.Array:
        """The generator's logits at each token of what was there, float32 logits_BTV.

        rows: positions_BT, segments_BT and the types, as `features` is given them.
        """
        positions_BT, segments_BT, types_BT = rows
        x_BTR = self._looked_up(tokens_BT, positions_BT, types_BT)
        x_BTR = self.generator(x_BTR, positions_BT, segments_BT, dropout_key)
        return self._products(x_BTR, self.generator.head_transform)

    def replaced_odds(self, x_BTD: jax.Array) -> jax.Array:
        """A discriminator's logarithm of the odds that a token was replaced, float32 BT."""
        x_BTD = constrain(x_BTD if self.norm is None else self.norm(x_BTD), "BTD")
        return constrain(self.replaced_head(x_BTD), "BT")

    def _products(self, x_BTD: jax.Array, transform: HeadTransform | None) -> jax.Array:
        """What a head makes of normed features, and of the transform's bias if it has one."""
        x_BTD, head = constrain(x_BTD, "BTD"), self._head()
        table, summed = gather(head.weight, head.letters), 1 - head.letters.index("V")
        logits_BTV = constrain(project(x_BTD, table, (summed,), jnp.float32), "BTV")
        if transform is not None:
            logits_BTV += transform.bias_V[...][None, None]
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
        x_BTD = x_BTD if self.norm is None else self.norm(x_BTD)
        if self.config.scale_logits:
            scaled_BTD = x_BTD.astype(jnp.float32) * self.config.model_dim**-0.5
            x_BTD = scaled_BTD.astype(x_BTD.dtype)
        return x_BTD if self.head_transform is None else self.head_transform(x_BTD)

    def _head(self) -> Head:
        if self.head_DV is not None:
            return Head(self.head_DV[...], "DV", self.config.logit_soft_cap)
        letters = "V" + self.width
        table = getattr(self, f"embedding_{letters}")
        return Head(table[...], letters, self.config.logit_soft_cap)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Room for `length` tokens in each of `batch` rows, in the compute dtype."""
        config = self.config
        heads, *sizes = mixer_of(config).cache_sizes(config)
        k, v = (
            jnp.zeros((config.num_layers, batch, length, heads, size), config.dtype)
            for size in sizes
        )
        return Cache(k, v, jnp.zeros((batch,), jnp.int32))

    def _stack(self, tokens_BT, rows, memory, dropout_key, measured=False):
        """rows: positions_BT, the segments of queries and of keys, and what is beside.
        memory: the cache, and what the encoder made; each may be None."""
        config, cache = self.config, memory[0]
        embed_key = layers_key = None
        if dropout_key is not None and config.dropout > 0:
            embed_key, layers_key = jax.random.split(dropout_key)
        x_BTD = split_time(self._embed(tokens_BT, rows[0], rows[2].types_BT), cache)
        x_BTD = dropout(x_BTD, config.dropout, embed_key)
        keys = None if layers_key is None else jax.random.split(layers_key, config.num_layers)
        layer_cache = None if cache is None else LayerCache(
            cache.k_LBSKH, cache.v_LBSKH, cache.source_k_LBSKH, cache.source_v_LBSKH)
        given, before = Layers(None, keys, layer_cache), None
        if self.dense_layers is not None:
            run, weights = self._runner(self.dense_layers, memory, measured)
            first = jax.tree.map(lambda leaf: leaf[: config.dense_layers], given)
            given = jax.tree.map(lambda leaf: leaf[config.dense_layers:], given)
            first = first._replace(weights=weights)
            x_BTD, before = run(config.layer_pattern, rows, x_BTD, first)
        run, weights = self._runner(self.layers, memory, measured)
        layers = given._replace(weights=weights)
        if config.shared_layers:  # With nothing of its own, a layer still has to be counted.
            layers = layers._replace(kinds=jnp.zeros(config.num_layers, jnp.int32))
        if cache is None and layout().stage > 1:
            policy = None if config.remat == "none" else remat_policy(config)
            return pipelined(run, config.layer_kinds, policy, x_BTD, rows, layers)
        x_BTD, output = run(config.layer_pattern, rows, x_BTD, layers)
        return x_BTD, output if before is None else output._replace(cache=jax.tree.map(
            lambda *parts: jnp.concatenate(parts), before.cache, output.cache))

    def _runner(self, stack, memory, measured):
        """What runs some layers of a stack, as `pipelined` wants it, and the weights of each."""
        config, (cache, source_BSD) = self.config, memory
        graphdef, weights = nnx.split(stack)
        shared = None
        if config.shared_layers:
            shared, weights = jax.tree.map(lambda leaf: leaf[0], weights), None

        def run(pattern, rows, x_BTD, layers):
            positions_BT, segments, beside = rows
            turns = rotations(config, positions_BT)
            masks = self._masks(segments, cache, beside.prefix_B)
            keys = x_BTD.shape[1] if cache is None else cache.k_LBSKH.shape[2]
            sizes = x_BTD.shape[1], keys
            bias_BNTS = self._bias(config, self.relative_PN, next(iter(masks.values())), sizes)
            source_mask = self._source_mask(segments[0], beside, cache, positions_BT)
            given = Given(None, bias_BNTS, source_BSD, source_mask)

            def apply(kind, x_BTD, layer):
                if kind is None:
                    mask = OneOf(tuple(masks.values()), layer.kinds)
                    turn = one_of(tuple(turns.values()), layer.kinds)
                else:
                    mask, turn = masks[kind], turns[kind]
                x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
                own = layer.weights if shared is None else shared
                block, turned = nnx.merge(graphdef, gathered(own)), given._replace(rotation=turn)
                return block(x_BTD, mask, turned, layer.cache, layer.keys, measured)

            return scan_pattern(config, pattern, apply, x_BTD, layers)

        return run, weights

    def _bias(self, config, table_PN, mask: AttentionMask, sizes: tuple) -> jax.Array | None:
        """The relative bias of a stack, for all of its layers; None for other positions."""
        if table_PN is None:
            return None
        return relative_bias(config, gather(table_PN[...], "PN"), mask.distance_BTS(*sizes))

    def _source_mask(self, segments_BT, beside, cache, tokens_BT) -> AttentionMask | None:
        """Who may look at the source: its own document; when decoding, all but padding."""
        if self.encoder_layers is None:
            return None
        if cache is None:
            keys_BS = beside.source_segments_BS
        else:
            segments_BT, keys_BS = jnp.ones_like(tokens_BT), cache.source_segments_BS
        return AttentionMask(
            causal=False, query_segments_BT=segments_BT, key_segments_BS=keys_BS)

    def _masks(self, segments, cache: Cache | None, prefix_B=None) -> dict[str, AttentionMask]:
        """The mask of each kind of layer."""
        mask = AttentionMask(
            causal=self.config.form != "encoder", prefix_B=prefix_B,
            query_segments_BT=segments[0], key_segments_BS=segments[1],
            query_offset_B=None if cache is None else cache.length_B,
        )
        return {kind: LAYER_KINDS[kind](mask, self.config) for kind in self.config.layer_pattern}

    def _embed(self, tokens_BT: jax.Array, positions_BT: jax.Array, types_BT=None, side: str = ""):
        """What enters a stack, x_BTD; side: "encoder_" for the one that reads the source."""
        x_BTD = self._looked_up(tokens_BT, positions_BT, types_BT, side)
        if self.widening_RD is None:
            return x_BTD
        x_BTD = project(x_BTD, gather(self.widening_RD[...], "RD"))
        return add_bias(x_BTD, self.widening_bias_D)

    def _looked_up(self, tokens_BT, positions_BT, types_BT=None, side: str = ""):
        """The same as wide as the tables, in the compute dtype."""
        config = self.config
        x_BTD = self._rows_of("embedding", "V", tokens_BT)
        if config.scale_embeddings:
            # In the compute dtype, as Gemma was trained: 55.5 and not 55.43 in bf16.
            x_BTD *= jnp.sqrt(float(config.model_dim)).astype(config.dtype).astype(jnp.float32)
        if config.positions == "learned":
            x_BTD += self._rows_of(f"{side}position", "T", positions_BT)
        elif config.positions == "sinusoidal":
            x_BTD += sinusoids(positions_BT, config.sizes[self.width])
        if config.token_types is not None:
            types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
            x_BTD += self._rows_of("type", "P", types_BT)
        if config.embedding_norm:
            x_BTD = getattr(self, f"{side}embedding_norm")(x_BTD)
        return x_BTD.astype(config.dtype)

    def _rows_of(self, name: str, rows: str, places_BT: jax.Array) -> jax.Array:
        """The rows of a table at these places, as wide as what is embedded."""
        letters = rows + self.width
        return lookup(gather(getattr(self, f"{name}_{letters}")[...], letters), places_BT, letters)


def _places(tokens_BT: jax.Array) -> jax.Array:
    """Counts along each row, int32 BT."""
    return jnp.broadcast_to(
        jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape
    )

"""One layer of the stack: attention and feed-forward or experts, and how activations lie around it."""

import dataclasses
from typing import NamedTuple

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from batiste.models.attention import Attention, LayerCache
from batiste.models.config import TransformerConfig
from batiste.models.latent_attention import LatentAttention
from batiste.models.layer_sums import LayerSums, layer_sums
from batiste.models.layers import FeedForward, Norm, dropout
from batiste.models.mixture import Mixture
from batiste.models.parts import MIXERS
from batiste.models.router import RouterSums
from batiste.sharding import constrain


class LayerOutput(NamedTuple):
    """What a layer returns beside x_BTD: None for what it was not given or does not have."""

    cache: LayerCache | None
    router: RouterSums | None
    sums: LayerSums | None


def mixer_of(config: TransformerConfig) -> type[nnx.Module]:
    """What mixes the tokens of a row."""
    if config.mixer != "attention":
        return MIXERS[config.mixer]
    return Attention if config.latent_rank is None else LatentAttention


class Block(nnx.Module):
    """Attention and feed-forward or experts, each added to the residual stream."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.attention = mixer_of(config)(config, rngs=rngs)
        self.mixture = None if config.num_experts is None else Mixture(config, rngs=rngs)
        # Shared experts, which every token takes, are together one wider feed-forward.
        dense = config if self.mixture is None else dataclasses.replace(
            config, mlp_dim=config.shared_experts * config.mlp_dim
        )
        self.feed_forward = FeedForward(dense, rngs=rngs) if dense.mlp_dim else None
        placement = config.norm_placement
        before, after = placement != "post", placement in ("post", "sandwich")
        self.parallel = placement == "parallel"
        self.attention_norm = Norm(config) if before else None
        self.feed_forward_norm = Norm(config) if before and not self.parallel else None
        self.attention_post_norm = Norm(config) if after else None
        self.feed_forward_post_norm = Norm(config) if after else None
        crosses = config.form == "encoder_decoder"
        self.cross_attention = Attention(config, rngs=rngs) if crosses else None
        self.cross_norm = Norm(config) if crosses and before else None
        self.cross_post_norm = Norm(config) if crosses and after else None
        self.norms_the_sum = config.norm_placement == "post"
        self.dropout_rate = config.dropout

    def __call__(self, x_BTD, mask, given, cache, dropout_key, measured):
        """Returns x_BTD after the block, and the LayerOutput."""
        seen = cache
        keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
        h_BTD = x_BTD if self.attention_norm is None else self.attention_norm(x_BTD)
        normed_BTD = h_BTD
        h_BTD, cache, attention = self.attention(
            whole_time(h_BTD, cache), mask, given, cache, keys[0], measured)
        h_BTD = checkpoint_name(split_time(h_BTD, cache), "attention")
        h_BTD = dropout(h_BTD, self.dropout_rate, keys[1])
        x_BTD = self._add(x_BTD, h_BTD, self.attention_post_norm)
        if self.cross_attention is not None:
            x_BTD = self._across(x_BTD, given, seen, dropout_key)
        h_BTD = normed_BTD if self.parallel else (
            x_BTD if self.feed_forward_norm is None else self.feed_forward_norm(x_BTD))
        h_BTD, router, units_BTF = self._feed(h_BTD, mask, cache)
        h_BTD = checkpoint_name(h_BTD, "feed_forward")
        h_BTD = dropout(h_BTD, self.dropout_rate, keys[2])
        x_BTD = self._add(x_BTD, h_BTD, self.feed_forward_post_norm)
        sums = layer_sums(x_BTD, mask, units_BTF, attention) if measured else None
        return x_BTD, LayerOutput(cache, router, sums)

    def _across(self, x_BTD, given, cache, dropout_key):
        """Adds what attention to the source says."""
        keys = (None,) * 2
        if dropout_key is not None:
            keys = jax.random.split(jax.random.fold_in(dropout_key, 1))
        h_BTD = x_BTD if self.cross_norm is None else self.cross_norm(x_BTD)
        h_BTD = self.cross_attention.across(whole_time(h_BTD, cache), given, cache, keys[0])
        h_BTD = dropout(split_time(h_BTD, cache), self.dropout_rate, keys[1])
        return self._add(x_BTD, h_BTD, self.cross_post_norm)

    def _feed(self, x_BTD, mask, cache):
        """The feed-forward, the experts, or both and their sum; what the router and the units did."""
        out_BTD = routed_BTD = router = units_BTF = None
        if self.feed_forward is not None:
            units_BTF = self.feed_forward.hidden(whole_time(x_BTD, cache))
            out_BTD = split_time(self.feed_forward.output(units_BTF), cache)
        if self.mixture is not None:
            routed_BTD, router = self.mixture(
                x_BTD, mask.query_segments_BT, between_blocks=cache is None
            )
        parts = [part for part in (out_BTD, routed_BTD) if part is not None]
        return sum(parts[1:], start=parts[0]), router, units_BTF

    def _add(self, x_BTD: jax.Array, h_BTD: jax.Array, norm: Norm | None) -> jax.Array:
        """pre, parallel: x + h. sandwich: x + norm(h). post: norm(x + h)."""
        if norm is None:
            return x_BTD + h_BTD
        return norm(x_BTD + h_BTD) if self.norms_the_sum else x_BTD + norm(h_BTD)


# Each of the two says both layouts. Left to the compiler, the sum over `tensor` that ends a block
# became a gather of all heads.


def split_time(x_BTD: jax.Array, cache: LayerCache | None) -> jax.Array:
    """The residual stream as it lies between blocks; time is whole while decoding, often a token."""
    x_BTD = constrain(x_BTD, "BTD")
    return x_BTD if cache is not None else constrain(x_BTD, "BTD", between_blocks=True)


def whole_time(x_BTD: jax.Array, cache: LayerCache | None) -> jax.Array:
    """What enters a block's products: the same, whole over `tensor`."""
    x_BTD = x_BTD if cache is not None else constrain(x_BTD, "BTD", between_blocks=True)
    return constrain(x_BTD, "BTD")

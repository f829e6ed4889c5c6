"""Multi-head attention with grouped queries, with or without a cache."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from batiste.models.attention_choice import OneOf, attention
from batiste.models.config import TransformerConfig
from batiste.models.layer_sums import AttentionSums, attention_sums
from batiste.models.layers import Norm, add_bias, project, residual_gain
from batiste.models.parameter import matrix, vector
from batiste.models.positions import alibi_slopes, rotate
from batiste.pallas_kernels import AttentionMask
from batiste.sharding import constrain


class LayerCache(NamedTuple):
    """Keys and values that one layer has seen."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


class Attend:
    """How queries look at keys, whatever made them: scale, cap, distances, dropout, kernels."""

    def __init__(self, config: TransformerConfig):
        given = config.attention_scale
        self.scale = config.head_dim**-0.5 if given is None else given
        self.soft_cap = config.attention_soft_cap
        self.alibi = config.positions == "alibi"
        self.dropout_rate = config.dropout
        self.implementation = config.attention

    def logits(self, q_BTNH: jax.Array) -> dict[str, Any]:
        """What decides the logits, as `reference_logits` takes it."""
        slopes_N = alibi_slopes(q_BTNH.shape[2]) if self.alibi else None
        return dict(scale=self.scale, soft_cap=self.soft_cap, alibi_slopes_N=slopes_N)

    def __call__(
        self, q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask | OneOf, dropout_key: jax.Array | None,
        keys: str | None = "BTKH", sinks_N: jax.Array | None = None,
    ) -> jax.Array:
        """out_BTNH; `keys` say how k and v lie on the mesh, None that they are where they should."""
        dropout_seeds_BN = None
        if dropout_key is not None:
            shape = (q_BTNH.shape[0], q_BTNH.shape[2])
            dropout_seeds_BN = jax.random.bits(dropout_key, shape).astype(jnp.int32)
        if keys is not None:
            k_BSKH, v_BSKH = constrain(k_BSKH, keys), constrain(v_BSKH, keys)
        out_BTNH, _ = attention(
            self.implementation, constrain(q_BTNH, "BTNH"), k_BSKH, v_BSKH, mask,
            **self.logits(q_BTNH), sinks_N=sinks_N, dropout_rate=self.dropout_rate,
            dropout_seeds_BN=dropout_seeds_BN,
        )
        return out_BTNH


class Attention(nnx.Module):
    """Projects to heads, attends, projects back."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        sizes, stddev = config.sizes, config.init_stddev
        self.attend = Attend(config)
        self.query_DNH = matrix(rngs, "DNH", sizes, inputs="D", stddev=stddev)
        self.key_DKH = matrix(rngs, "DKH", sizes, inputs="D", stddev=stddev)
        self.value_DKH = matrix(rngs, "DKH", sizes, inputs="D", stddev=stddev)
        self.out_NHD = matrix(
            rngs, "NHD", sizes, inputs="NH", stddev=stddev, gain=residual_gain(config)
        )
        has_bias = config.bias != "none"
        self.query_bias_NH = vector("NH", sizes, 0.0) if has_bias else None
        self.key_bias_KH = vector("KH", sizes, 0.0) if has_bias else None
        self.value_bias_KH = vector("KH", sizes, 0.0) if has_bias else None
        self.out_bias_D = vector("D", sizes, 0.0) if config.bias == "all" else None
        self.query_norm = Norm(config, "H") if config.qk_norm else None
        self.key_norm = Norm(config, "H") if config.qk_norm else None
        self.sinks_N = vector("N", sizes, 0.0) if config.attention_sinks else None

    def __call__(
        self,
        x_BTD: jax.Array,
        mask: AttentionMask | OneOf,
        rotation: tuple[jax.Array, jax.Array] | None,
        cache: LayerCache | None,
        dropout_key: jax.Array | None,
        measured: bool,
    ) -> tuple[jax.Array, LayerCache | None, AttentionSums | None]:
        """Returns out_BTD, the cache with this call's keys and values written into it, and, if
        `measured`, what the attention looks like."""
        q_BTNH = add_bias(project(x_BTD, self.query_DNH[...]), self.query_bias_NH)
        k_BTKH = add_bias(project(x_BTD, self.key_DKH[...]), self.key_bias_KH)
        v_BTKH = add_bias(project(x_BTD, self.value_DKH[...]), self.value_bias_KH)
        if self.query_norm is not None:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        if rotation is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, rotation), rotate(k_BTKH, rotation)
        q_BTNH = checkpoint_name(q_BTNH, "query")
        k_BTKH, v_BTKH = checkpoint_name(k_BTKH, "key"), checkpoint_name(v_BTKH, "value")
        k_BSKH, v_BSKH = k_BTKH, v_BTKH
        if cache is not None:
            cache = LayerCache(
                write(cache.k_BSKH, k_BTKH, mask), write(cache.v_BSKH, v_BTKH, mask)
            )
            k_BSKH, v_BSKH = cache
        logits = self.attend.logits(q_BTNH)
        sums = attention_sums(q_BTNH, k_BSKH, mask, logits) if measured else None
        sinks_N = None if self.sinks_N is None else self.sinks_N[...]
        keys = "BTKH" if cache is None else "BSKH"
        out_BTNH = self.attend(q_BTNH, k_BSKH, v_BSKH, mask, dropout_key, keys, sinks_N)
        out_BTNH = checkpoint_name(out_BTNH, "attended")
        out_BTD = add_bias(project(out_BTNH, self.out_NHD[...], (0, 1)), self.out_bias_D)
        return out_BTD, cache, sums


def write(cache_BSKH: jax.Array, new_BTKH: jax.Array, mask: AttentionMask) -> jax.Array:
    """Writes each row's new keys (or values) at that row's own place."""

    def write_row(row_SKH: jax.Array, new_TKH: jax.Array, place: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(row_SKH, new_TKH, place, axis=0)

    return jax.vmap(write_row)(cache_BSKH, new_BTKH, mask.query_offset_B)

"""Multi-head attention with grouped queries, with or without a cache."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from batiste.models.attention_choice import OneOf, attention, settled_here
from batiste.models.config import TransformerConfig
from batiste.models.layer_sums import AttentionSums, attention_sums
from batiste.models.layers import Norm, add_bias, project, residual_gain
from batiste.models.parameter import matrix, vector
from batiste.models.parts import TURNS
from batiste.models.positions import alibi_slopes, rotate
from batiste.pallas_kernels import AttentionMask
from batiste.sharding import constrain


class LayerCache(NamedTuple):
    """Keys and values that one layer has seen, and those of the source where there is one."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    source_k_BSKH: jax.Array | None = None
    source_v_BSKH: jax.Array | None = None


class Given(NamedTuple):
    """What all layers of a stack are given alike; None for what the model does not have.

    rotation: cosine and sine of each place. bias_BNTS: added to the logits of self-attention.
    source_BSD: what the encoder made, whole in time; None where its keys are cached. source_mask:
    who may look at it.
    """

    rotation: tuple[jax.Array, jax.Array] | None = None
    bias_BNTS: jax.Array | None = None
    source_BSD: jax.Array | None = None
    source_mask: AttentionMask | None = None


class Attend:
    """How queries look at keys, whatever made them: scale, cap, distances, dropout, kernels."""

    def __init__(self, config: TransformerConfig):
        given = config.attention_scale
        self.scale = config.head_dim**-0.5 if given is None else given
        self.soft_cap = config.attention_soft_cap
        self.alibi = config.positions == "alibi"
        self.dropout_rate = config.dropout
        self.implementation = config.attention
        self.unsettled = config if config.attention == "auto" else None

    def logits(self, q_BTNH: jax.Array) -> dict[str, Any]:
        """What decides the logits, as `reference_logits` takes it."""
        slopes_N = alibi_slopes(q_BTNH.shape[2]) if self.alibi else None
        return dict(
            scale=self.scale, soft_cap=self.soft_cap, alibi_slopes_N=slopes_N, bias_BNTS=None)

    def __call__(
        self, q_BTNH: jax.Array, keys_values: tuple[jax.Array, jax.Array],
        mask: AttentionMask | OneOf, logits: dict[str, Any],
        rest: tuple[str | None, jax.Array | None],
    ) -> jax.Array:
        """out_BTNH; `logits`: what decides them, perhaps with sinks_N. `rest`: how k and v lie on the
        mesh (None: where they should), and the key of dropout."""
        keys, dropout_key = rest
        dropout_seeds_BN = None
        if dropout_key is not None:
            shape = (q_BTNH.shape[0], q_BTNH.shape[2])
            dropout_seeds_BN = jax.random.bits(dropout_key, shape).astype(jnp.int32)
        if keys is not None:
            keys_values = (constrain(x, keys) for x in keys_values)
        # A run settles "auto" before it builds its model; a model that is used alone does it here.
        auto = self.unsettled is not None
        implementation = settled_here(self.unsettled) if auto else self.implementation
        out_BTNH, _ = attention(
            implementation, constrain(q_BTNH, "BTNH"), *keys_values, mask,
            **({"sinks_N": None} | logits), dropout_rate=self.dropout_rate,
            dropout_seeds_BN=dropout_seeds_BN,
        )
        return out_BTNH


class Attention(nnx.Module):
    """Projects to heads, attends, projects back."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        sizes, stddev = config.sizes, config.init_stddev
        self.attend = Attend(config)
        own = config.positions in TURNS
        self.turn = TURNS[config.positions].apply if own else rotate
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

    @staticmethod
    def cache_sizes(config: TransformerConfig) -> tuple[int, int, int]:
        """Heads, and sizes of a key and of a value, of what is cached of each token."""
        return config.num_kv_heads, config.head_dim, config.head_dim

    def __call__(
        self,
        x_BTD: jax.Array,
        mask: AttentionMask | OneOf,
        given: Given,
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
        if given.rotation is not None:
            q_BTNH, k_BTKH = (self.turn(x, given.rotation) for x in (q_BTNH, k_BTKH))
        q_BTNH = checkpoint_name(q_BTNH, "query")
        k_BTKH, v_BTKH = checkpoint_name(k_BTKH, "key"), checkpoint_name(v_BTKH, "value")
        k_BSKH, v_BSKH = k_BTKH, v_BTKH
        if cache is not None:
            cache = LayerCache(
                write(cache.k_BSKH, k_BTKH, mask), write(cache.v_BSKH, v_BTKH, mask)
            )
            k_BSKH, v_BSKH = cache[:2]
        logits = self.attend.logits(q_BTNH) | {"bias_BNTS": given.bias_BNTS}
        sums = attention_sums(q_BTNH, k_BSKH, mask, logits) if measured else None
        keys = "BTKH" if cache is None else "BSKH"
        return self._out(q_BTNH, (k_BSKH, v_BSKH), mask, logits, (keys, dropout_key)), cache, sums

    def across(
        self, x_BTD: jax.Array, given: Given, cache: LayerCache | None,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        """out_BTD of attention to the source, which has no places."""
        q_BTNH = add_bias(project(x_BTD, self.query_DNH[...]), self.query_bias_NH)
        if self.query_norm is not None:
            q_BTNH = self.query_norm(q_BTNH)
        if cache is None:
            source = self.read(given.source_BSD)
        else:
            source = cache.source_k_BSKH, cache.source_v_BSKH
        logits = self.attend.logits(q_BTNH) | {"alibi_slopes_N": None}
        return self._out(q_BTNH, source, given.source_mask, logits, ("BSKH", dropout_key))

    def read(self, source_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the source, k_BSKH and v_BSKH."""
        k_BSKH = add_bias(project(source_BSD, self.key_DKH[...]), self.key_bias_KH)
        v_BSKH = add_bias(project(source_BSD, self.value_DKH[...]), self.value_bias_KH)
        return k_BSKH if self.key_norm is None else self.key_norm(k_BSKH), v_BSKH

    def _out(self, q_BTNH, keys_values, mask, logits: dict, rest: tuple) -> jax.Array:
        """Attends and projects back; `rest`: the letters of the keys, and the dropout key."""
        sinks_N = None if self.sinks_N is None else self.sinks_N[...]
        out_BTNH = self.attend(q_BTNH, keys_values, mask, logits | {"sinks_N": sinks_N}, rest)
        out_BTNH = checkpoint_name(out_BTNH, "attended")
        return add_bias(project(out_BTNH, self.out_NHD[...], (0, 1)), self.out_bias_D)


def write(cache_BSKH: jax.Array, new_BTKH: jax.Array, mask: AttentionMask) -> jax.Array:
    """Writes each row's new keys (or values) at that row's own place."""

    def write_row(row_SKH: jax.Array, new_TKH: jax.Array, place: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(row_SKH, new_TKH, place, axis=0)

    return jax.vmap(write_row)(cache_BSKH, new_BTKH, mask.query_offset_B)

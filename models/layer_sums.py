"""What a layer did in each row of a batch, for whoever watches over training; no gradient passes."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from batiste.models.attention_choice import OneOf
from batiste.pallas_kernels import AttentionMask, reference_logits
from batiste.sharding import constrain, context_size

# Kernels never hold the probabilities, so attention is looked at for a few queries of each row.
SAMPLED_QUERIES = 8
# A unit that says less than this at a token says nothing: where a GELU or SiLU is dead it is
# below 1e-7, and a bfloat16 unit that is alive is above 1e-4.
SILENT = 1e-6


class AttentionSums(NamedTuple):
    """Attention of SAMPLED_QUERIES queries a row, evenly spread, to all keys they see; float32.

    entropy_B: sum over real queries and heads of the entropy over its maximum, the logarithm of the
    number of keys seen: 1 is even, 0 is one key alone. Queries that see one key do not count.
    queries_B: how many times heads do. logit_B: the largest logit. Sinks and dropout are left out.
    """

    entropy_B: jax.Array
    queries_B: jax.Array
    logit_B: jax.Array


class LayerSums(NamedTuple):
    """Sums and maxima over the real tokens (segment not 0) of each row, float32.

    square_B: of the mean square over D of the residual stream after the block. largest_B: its
    largest absolute value. attention: None where `context` splits time, for its keys are elsewhere.
    alive_F: tokens of all rows at which each unit of the feed-forward says something; None where
    there are experts alone.
    """

    square_B: jax.Array
    largest_B: jax.Array
    attention: AttentionSums | None
    alive_F: jax.Array | None


def layer_sums(
    x_BTD: jax.Array, mask: AttentionMask | OneOf, units_BTF: jax.Array | None,
    attention: AttentionSums | None,
) -> LayerSums:
    """Sums up a block that yields x_BTD and whose feed-forward units say units_BTF."""
    x_BTD = jax.lax.stop_gradient(x_BTD)
    segments_BT = mask.query_segments_BT
    real_BT1 = jnp.ones((1, 1, 1), bool) if segments_BT is None else segments_BT[..., None] != 0
    size_BTD = jnp.where(real_BT1, jnp.abs(x_BTD), 0).astype(jnp.float32)
    alive_F = None
    if units_BTF is not None:
        spoken_BTF = real_BT1 & (jnp.abs(jax.lax.stop_gradient(units_BTF)) > SILENT)
        alive_F = constrain(spoken_BTF.astype(jnp.float32).sum(axis=(0, 1)), "F")
    return LayerSums(
        constrain(jnp.square(size_BTD).mean(axis=2).sum(axis=1), "B"),
        constrain(size_BTD.max(axis=(1, 2)), "B"),
        attention,
        alive_F,
    )


def attention_sums(
    q_BTNH: jax.Array, k_BSKH: jax.Array, mask: AttentionMask | OneOf, options: dict
) -> AttentionSums | None:
    """Looks at some queries; `options` as in `reference_logits`."""
    if context_size() > 1:
        return None
    stride = max(1, q_BTNH.shape[1] // SAMPLED_QUERIES)
    q_BTNH = jax.lax.stop_gradient(q_BTNH[:, stride - 1 :: stride])
    k_BSKH = jax.lax.stop_gradient(k_BSKH)
    if options["bias_BNTS"] is not None:
        bias_BNTS = jax.lax.stop_gradient(options["bias_BNTS"][:, :, stride - 1 :: stride])
        options = options | {"bias_BNTS": bias_BNTS}
    masks = mask.masks if isinstance(mask, OneOf) else (mask,)
    looks = [functools.partial(reference_logits, mask=each.every(stride), **options)
             for each in masks]
    index = mask.index if isinstance(mask, OneOf) else 0
    logits_BKTGS = jax.lax.switch(index, looks, q_BTNH, k_BSKH)
    seen_BKTGS = logits_BKTGS != -jnp.inf
    keys_BKTG1 = seen_BKTGS.sum(axis=-1, keepdims=True)
    lse_BKTG1 = jax.nn.logsumexp(logits_BKTGS, axis=-1, keepdims=True, where=seen_BKTGS)
    logits_BKTGS = jnp.where(seen_BKTGS, logits_BKTGS, 0)
    p_BKTGS = jnp.where(seen_BKTGS, jnp.exp(logits_BKTGS - lse_BKTG1), 0)
    entropy_BKTG1 = lse_BKTG1 - (p_BKTGS * logits_BKTGS).sum(axis=-1, keepdims=True)
    counts_BKTG1 = keys_BKTG1 >= 2
    share_BKTG1 = entropy_BKTG1 / jnp.log(jnp.maximum(keys_BKTG1, 2).astype(jnp.float32))
    heads = tuple(range(1, 5))
    return AttentionSums(
        constrain(jnp.where(counts_BKTG1, share_BKTG1, 0).sum(axis=heads), "B"),
        constrain(counts_BKTG1.astype(jnp.float32).sum(axis=heads), "B"),
        constrain(jnp.where(seen_BKTGS, logits_BKTGS, -jnp.inf).max(axis=heads), "B"),
    )

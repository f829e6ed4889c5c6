"""Attention as the formula says: the reference that every kernel is held to."""

import jax
import jax.numpy as jnp

from batiste.pallas_kernels.mask import AttentionMask


def reference_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    *,
    scale: float,
    soft_cap: float | None,
    sinks_N: jax.Array | None,
    alibi_slopes_N: jax.Array | None,
    dropout_rate: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """Scaled dot-product attention with grouped queries; returns out_BTNH in q's dtype.

    soft_cap: logits become soft_cap * tanh(logits / soft_cap) (Gemma 2, arXiv:2408.00118).
    sinks_N: a logit per head that takes probability and gives no value (arXiv:2309.17453).
    alibi_slopes_N: subtracts slope * distance from the logits (arXiv:2108.12409).
    dropout_key: None turns dropout off. Rows that see no key give zeros.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    logits_BKGTS = scale * jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    if soft_cap is not None:
        logits_BKGTS = soft_cap * jnp.tanh(logits_BKGTS / soft_cap)
    if alibi_slopes_N is not None:
        distance_BTS = jnp.abs(mask.distance_BTS(T, S)).astype(jnp.float32)
        slopes_KG = alibi_slopes_N.reshape(K, N // K)
        logits_BKGTS -= slopes_KG[None, :, :, None, None] * distance_BTS[:, None, None]
    probabilities_BKGTS = _softmax(logits_BKGTS, mask.visible_BTS(T, S), sinks_N)
    if dropout_key is not None:
        keep = jax.random.bernoulli(dropout_key, 1 - dropout_rate, probabilities_BKGTS.shape)
        probabilities_BKGTS = jnp.where(keep, probabilities_BKGTS / (1 - dropout_rate), 0)
    out_BTKGH = jnp.einsum(
        "BKGTS,BSKH->BTKGH",
        probabilities_BKGTS.astype(v_BSKH.dtype),
        v_BSKH,
        preferred_element_type=jnp.float32,
    )
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)


def _softmax(
    logits_BKGTS: jax.Array, visible_BTS: jax.Array | None, sinks_N: jax.Array | None
) -> jax.Array:
    """Softmax in fp32 over visible keys and the sink; all zeros where nothing is visible."""
    if visible_BTS is not None:
        logits_BKGTS = jnp.where(visible_BTS[:, None, None], logits_BKGTS, -jnp.inf)
    peak_BKGT1 = logits_BKGTS.max(axis=-1, keepdims=True)
    if sinks_N is not None:
        sinks_BKGT1 = sinks_N.reshape(1, *logits_BKGTS.shape[1:3], 1, 1).astype(jnp.float32)
        peak_BKGT1 = jnp.maximum(peak_BKGT1, sinks_BKGT1)
    peak_BKGT1 = jax.lax.stop_gradient(jnp.where(jnp.isfinite(peak_BKGT1), peak_BKGT1, 0))
    weights_BKGTS = jnp.exp(logits_BKGTS - peak_BKGT1)
    total_BKGT1 = weights_BKGTS.sum(axis=-1, keepdims=True)
    if sinks_N is not None:
        total_BKGT1 = total_BKGT1 + jnp.exp(sinks_BKGT1 - peak_BKGT1)
    return weights_BKGTS / jnp.where(total_BKGT1 == 0, 1, total_BKGT1)

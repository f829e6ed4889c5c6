"""Attention as the formula says: the reference that every kernel is held to."""

import jax
import jax.numpy as jnp

from batiste.pallas_kernels.dropout import kept
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
    dropout_seeds_BN: jax.Array | None,
    bias_BNTS: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention with grouped queries.

    Returns out_BTNH in q's dtype and lse_BTN in fp32, the log of what the softmax divides by (the
    sink included); a row that sees no key gives zeros and -inf.

    soft_cap: logits become soft_cap * tanh(logits / soft_cap) (Gemma 2, arXiv:2408.00118).
    sinks_N: a logit per head that takes probability and gives no value (arXiv:2309.17453).
    alibi_slopes_N: subtracts slope * distance from the logits (arXiv:2108.12409); constants.
    dropout_seeds_BN: int32 (see `dropout.kept`); None turns dropout off.
    bias_BNTS: added to the logits; B may be 1. No kernel knows it.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    logits_BKTGS = reference_logits(
        q_BTNH, k_BSKH, mask, scale=scale, soft_cap=soft_cap, alibi_slopes_N=alibi_slopes_N,
        bias_BNTS=bias_BNTS)
    sinks_KG = None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(K, G)
    probabilities_BKTGS, lse_BKTG = _softmax(logits_BKTGS, sinks_KG)
    if dropout_seeds_BN is not None:
        keep_BKTGS = kept(
            dropout_seeds_BN.reshape(B, K, 1, G, 1),
            mask.place_BT(T)[:, None, :, None, None],
            jnp.arange(S, dtype=jnp.int32)[None, None, None, None],
            dropout_rate,
        )
        probabilities_BKTGS = jnp.where(keep_BKTGS, probabilities_BKTGS / (1 - dropout_rate), 0)
    out_BTKGH = _mix(probabilities_BKTGS, v_BSKH)
    lse_BTN = lse_BKTG.swapaxes(1, 2).reshape(B, T, N)
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype), lse_BTN


def reference_logits(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    mask: AttentionMask,
    *,
    scale: float,
    soft_cap: float | None,
    alibi_slopes_N: jax.Array | None,
    bias_BNTS: jax.Array | None = None,
) -> jax.Array:
    """What the softmax over the keys is taken of, logits_BKTGS in fp32; -inf is hidden."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    scores_BKTGS = _scores(q_BTNH.reshape(B, T, K, N // K, H), k_BSKH)
    logits_BKTGS = _logits(scores_BKTGS, mask, scale, soft_cap, alibi_slopes_N)
    if bias_BNTS is None:
        return logits_BKTGS
    by_group = bias_BNTS.reshape(bias_BNTS.shape[0], K, N // K, *bias_BNTS.shape[2:])
    return logits_BKTGS + by_group.swapaxes(2, 3)  # What is hidden stays so.


def reference_gradients(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    from_loss: tuple[jax.Array, jax.Array, jax.Array],
    *,
    scale: float,
    soft_cap: float | None,
    alibi_slopes_N: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys, perhaps some of all, give to the gradients of q, k and v; fp32.

    from_loss: g_BTNH, lse_BTN and delta_BTN as the kernels' backward passes take them: the output's
    gradient, the log-sum-exp over all keys (inf where nothing is seen), and what is subtracted from
    the probabilities' gradient.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]

    def by_group(x):
        return x.reshape(B, T, K, N // K, *x.shape[3:])

    g_BTKGH, lse_BTKG, delta_BTKG = (by_group(x) for x in from_loss)
    q_BTKGH, g_BTKGH = by_group(q_BTNH), g_BTKGH.astype(v_BSKH.dtype)
    logits_BKTGS, of_scores = jax.vjp(
        lambda scores: _logits(scores, mask, scale, soft_cap, alibi_slopes_N),
        _scores(q_BTKGH, k_BSKH),
    )
    p_BKTGS = jnp.exp(logits_BKTGS - lse_BTKG.swapaxes(1, 2)[..., None])
    dp_BKTGS = _scores(g_BTKGH, v_BSKH)
    (ds_BKTGS,) = of_scores(p_BKTGS * (dp_BKTGS - delta_BTKG.swapaxes(1, 2)[..., None]))
    dq_BTKGH = _mix(ds_BKTGS, k_BSKH)
    dk_BSKH, dv_BSKH = _mix_back(ds_BKTGS, q_BTKGH), _mix_back(p_BKTGS, g_BTKGH)
    return dq_BTKGH.reshape(B, T, N, H), dk_BSKH, dv_BSKH


def _logits(scores_BKTGS, mask, scale, soft_cap, alibi_slopes_N) -> jax.Array:
    """What the softmax is taken of; -inf is hidden."""
    K, T, G, S = scores_BKTGS.shape[1:]
    logits_BKTGS = scale * scores_BKTGS
    if soft_cap is not None:
        logits_BKTGS = soft_cap * jnp.tanh(logits_BKTGS / soft_cap)
    if alibi_slopes_N is not None:
        distance_BTS = jnp.abs(mask.distance_BTS(T, S)).astype(jnp.float32)
        slopes_KG = jax.lax.stop_gradient(alibi_slopes_N).reshape(K, G)
        logits_BKTGS -= slopes_KG[None, :, None, :, None] * distance_BTS[:, None, :, None]
    visible_BTS = mask.visible_BTS(T, S)
    if visible_BTS is None:
        return logits_BKTGS
    return jnp.where(visible_BTS[:, None, :, None], logits_BKTGS, -jnp.inf)


# The two products below are each other's gradients. They multiply in the dtype of the small operand
# and accumulate in fp32, backward too, and the T x S matrix is never the operand that has to be
# transposed: forward and backward together, bf16 on a CPU, 70 ms became 47.


@jax.custom_vjp
def _scores(q_BTKGH: jax.Array, k_BSKH: jax.Array) -> jax.Array:
    return _dot(q_BTKGH, k_BSKH, ((4,), (3,)), ((0, 2), (0, 2)))


@jax.custom_vjp
def _mix(p_BKTGS: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    out_BKTGH = _dot(p_BKTGS.astype(v_BSKH.dtype), v_BSKH, ((4,), (1,)), ((0, 1), (0, 2)))
    return out_BKTGH.swapaxes(1, 2)


def _mix_back(p_BKTGS: jax.Array, x_BTKGH: jax.Array) -> jax.Array:
    p_BKTGS = p_BKTGS.astype(x_BTKGH.dtype)
    out_BKHS = _dot(x_BTKGH, p_BKTGS, ((1, 3), (2, 3)), ((0, 2), (0, 1)))
    return out_BKHS.transpose(0, 3, 1, 2)


def _dot(a: jax.Array, b: jax.Array, contract: tuple, batch: tuple) -> jax.Array:
    return jax.lax.dot_general(a, b, (contract, batch), preferred_element_type=jnp.float32)


def _scores_backward(saved, gradient_BKTGS):
    q_BTKGH, k_BSKH = saved
    gradient_q = _mix(gradient_BKTGS, k_BSKH).astype(q_BTKGH.dtype)
    return gradient_q, _mix_back(gradient_BKTGS, q_BTKGH).astype(k_BSKH.dtype)


def _mix_backward(saved, gradient_BTKGH):
    p_BKTGS, v_BSKH = saved
    gradient_BTKGH = gradient_BTKGH.astype(v_BSKH.dtype)
    gradient_v = _mix_back(p_BKTGS, gradient_BTKGH).astype(v_BSKH.dtype)
    return _scores(gradient_BTKGH, v_BSKH), gradient_v


_scores.defvjp(lambda q, k: (_scores(q, k), (q, k)), _scores_backward)
_mix.defvjp(lambda p, v: (_mix(p, v), (p, v)), _mix_backward)


@jax.custom_vjp
def _softmax(
    logits_BKTGS: jax.Array, sinks_KG: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Softmax in fp32 over visible keys and the sink, and the log of its denominator."""
    return _softmax_forward(logits_BKTGS, sinks_KG)[0]


def _softmax_forward(logits_BKTGS, sinks_KG):
    peak_BKTG1 = logits_BKTGS.max(axis=-1, keepdims=True)
    if sinks_KG is not None:
        sinks_BKTG1 = sinks_KG[None, :, None, :, None]
        peak_BKTG1 = jnp.maximum(peak_BKTG1, sinks_BKTG1)
    peak_BKTG1 = jnp.where(jnp.isfinite(peak_BKTG1), peak_BKTG1, 0)
    weights_BKTGS = jnp.exp(logits_BKTGS - peak_BKTG1)
    total_BKTG1 = weights_BKTGS.sum(axis=-1, keepdims=True)
    sink_share_BKTG1 = None
    if sinks_KG is not None:
        sink_weight_BKTG1 = jnp.exp(sinks_BKTG1 - peak_BKTG1)
        total_BKTG1 = total_BKTG1 + sink_weight_BKTG1
        sink_share_BKTG1 = sink_weight_BKTG1 / total_BKTG1
    probabilities_BKTGS = weights_BKTGS / jnp.where(total_BKTG1 == 0, 1, total_BKTG1)
    lse_BKTG = (peak_BKTG1 + jnp.log(total_BKTG1))[..., 0]
    return (probabilities_BKTGS, lse_BKTG), (probabilities_BKTGS, sink_share_BKTG1)


def _softmax_backward(saved, gradients):
    # Written out because XLA's CPU backend spent 29 % of a training step in one reduction of what
    # autodiff made of the division.
    probabilities_BKTGS, sink_share_BKTG1 = saved
    gradient_BKTGS, gradient_lse_BKTG = gradients
    inner_BKTG1 = (probabilities_BKTGS * gradient_BKTGS).sum(axis=-1, keepdims=True)
    inner_BKTG1 -= gradient_lse_BKTG[..., None]
    gradient_sinks_KG = None
    if sink_share_BKTG1 is not None:
        gradient_sinks_KG = -(sink_share_BKTG1 * inner_BKTG1).sum(axis=(0, 2, 4))
    return probabilities_BKTGS * (gradient_BKTGS - inner_BKTG1), gradient_sinks_KG


_softmax.defvjp(_softmax_forward, _softmax_backward)

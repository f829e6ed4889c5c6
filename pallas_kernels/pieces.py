"""Attention over a piece of the keys: for a ring of devices, where the others hold the rest.

The softmax of all keys follows from those of the pieces and their log-sum-exps; the gradients of a
piece follow from the log-sum-exp of all keys. Sinks and dropout are not a piece's: a sink enters
once, and dropout goes by places among all keys.
"""

import jax
import jax.numpy as jnp

from batiste.pallas_kernels import certified
from batiste.pallas_kernels.attention import attend, even_heads, kernels_of
from batiste.pallas_kernels.operands import Operands, Options
from batiste.pallas_kernels.reference import reference_attention, reference_gradients


def attend_piece(options: Options, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """out_BTNH in q's dtype and lse_BTN in fp32 over these keys; zeros and -inf where none is seen.

    options.chip: a chip whose kernel to use, or "reference". Operands without sinks and dropout.
    Raises ValueError for what `certified.check` does not list.
    """
    if options.chip == "reference":
        return reference_attention(
            *operands[:4], scale=options.scale, soft_cap=options.soft_cap, sinks_N=None,
            alibi_slopes_N=operands.alibi_slopes_N, dropout_rate=0.0, dropout_seeds_BN=None,
        )
    H = operands.q_BTNH.shape[-1]
    out_BTNH, lse_BTN = attend(options, _certified(options, operands))
    return out_BTNH[..., :H], lse_BTN


def attend_piece_gradients(
    options: Options, operands: Operands, g_BTNH: jax.Array, lse_BTN: jax.Array,
    delta_BTN: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys give to the gradients of q, k and v; fp32, to be summed over the pieces.

    g_BTNH: the gradient of the output over all keys. lse_BTN: the log-sum-exp of all keys, +inf
    where none is seen. delta_BTN: with it, from `of_loss`.
    """
    if options.chip == "reference":
        return reference_gradients(
            *operands[:4], (g_BTNH, lse_BTN, delta_BTN), scale=options.scale,
            soft_cap=options.soft_cap, alibi_slopes_N=operands.alibi_slopes_N,
        )
    H = operands.q_BTNH.shape[-1]
    gradients = kernels_of(options).backward(
        options, _certified(options, operands), even_heads(g_BTNH), lse_BTN, delta_BTN
    )
    return tuple(gradient[..., :H].astype(jnp.float32) for gradient in gradients)


def _certified(options: Options, operands: Operands) -> Operands:
    """The operands as the kernels take them."""
    q_BTNH, k_BSKH, v_BSKH, mask = operands[:4]
    certified.check(options.chip, certified.conditions(mask), q_BTNH.dtype.name, q_BTNH.shape[-1])
    return operands._replace(
        q_BTNH=even_heads(q_BTNH), k_BSKH=even_heads(k_BSKH), v_BSKH=even_heads(v_BSKH)
    )


def merge(
    one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """out_BTNH and lse_BTN over the keys of both, fp32; neither need see anything."""
    (out_BTNH, lse_BTN), (other_BTNH, other_lse_BTN) = one, other
    total_BTN = jnp.logaddexp(lse_BTN, other_lse_BTN)
    finite_BTN = jnp.where(total_BTN == -jnp.inf, 0, total_BTN)
    share_BTN1 = jnp.exp(lse_BTN - finite_BTN)[..., None]
    other_BTN1 = jnp.exp(other_lse_BTN - finite_BTN)[..., None]
    out_BTNH, other_BTNH = out_BTNH.astype(jnp.float32), other_BTNH.astype(jnp.float32)
    return share_BTN1 * out_BTNH + other_BTN1 * other_BTNH, total_BTN

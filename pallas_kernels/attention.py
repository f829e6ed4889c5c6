"""Flash attention: the reference's function, computed tile by tile; T x S never leaves the chip."""

import functools

import jax
import jax.numpy as jnp

from batiste.pallas_kernels.mask import AttentionMask
from batiste.pallas_kernels.operands import Operands, Options


def flash_attention(
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
    chip: str,
    interpret: object = False,
) -> tuple[jax.Array, jax.Array]:
    """`reference_attention` as a kernel for `chip`: same arguments, same results, same gradients.

    interpret: passed to `pallas_call`; for tests on a CPU.
    Raises ValueError for what `certified.check` does not list. FlashAttention-2, arXiv:2307.08691.
    """
    operands = Operands(
        q_BTNH, k_BSKH, v_BSKH, mask, sinks_N, alibi_slopes_N, dropout_seeds_BN
    )
    return _attend(Options(scale, soft_cap, dropout_rate, chip, interpret), operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, operands: Operands) -> tuple[jax.Array, jax.Array]:
    return _kernels(options).forward(options, operands)


def _forward(options, operands):
    out_BTNH, lse_BTN = _attend(options, operands)
    return (out_BTNH, lse_BTN), (operands, out_BTNH, lse_BTN)


def _backward(options, saved, gradients):
    operands, out_BTNH, lse_BTN = saved
    g_BTNH, g_lse_BTN = gradients
    # d logits = p * (dp - delta): both the softmax's own sum and the log-sum-exp's gradient.
    products_BTNH = out_BTNH.astype(jnp.float32) * g_BTNH.astype(jnp.float32)
    delta_BTN = products_BTNH.sum(axis=-1) - g_lse_BTN
    # exp(logit - inf) is 0: rows that see nothing get no gradient, without a test in the kernel.
    lse_BTN = jnp.where(lse_BTN == -jnp.inf, jnp.inf, lse_BTN)
    g_q, g_k, g_v = _kernels(options).backward(options, operands, g_BTNH, lse_BTN, delta_BTN)
    g_sinks_N = None
    if operands.sinks_N is not None:
        share_BTN = jnp.exp(operands.sinks_N.astype(jnp.float32)[None, None] - lse_BTN)
        g_sinks_N = -(share_BTN * delta_BTN).sum(axis=(0, 1)).astype(operands.sinks_N.dtype)
    slopes = operands.alibi_slopes_N
    g_slopes = None if slopes is None else jnp.zeros_like(slopes)
    return (Operands(g_q, g_k, g_v, None, g_sinks_N, g_slopes, None),)


_attend.defvjp(_forward, _backward)


def _kernels(options: Options):
    """The module with `forward` and `backward` for the chip."""
    # Imported here so that no chip needs what only the other one's compiler needs.
    if options.chip in ("hopper", "ampere"):
        from batiste.pallas_kernels import gpu_attention as kernels
    else:
        from batiste.pallas_kernels import tpu_attention as kernels
    return kernels

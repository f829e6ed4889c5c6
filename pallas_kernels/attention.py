"""Flash attention: the reference's function, computed tile by tile; T x S never leaves the chip."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from batiste.pallas_kernels import certified, gpu_attention, tpu_attention
from batiste.pallas_kernels.mask import AttentionMask
from batiste.pallas_kernels.operands import Operands, Options


def flash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    alibi_slopes_N: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_seeds_BN: jax.Array | None = None,
    chip: str = "auto",
    interpret: object = False,
) -> tuple[jax.Array, jax.Array]:
    """`reference_attention` as a kernel for `chip`: same results, same gradients.

    FlashAttention-2, arXiv:2307.08691.

    Args:
        q_BTNH: Queries.
        k_BSKH: Keys, in the dtype of the queries; K divides N.
        v_BSKH: Values, in the same dtype.
        mask: Which keys a query sees, such as `AttentionMask(causal=True)`.
        scale: Multiplies the logits; None is 1 / sqrt(H).
        soft_cap: c makes c tanh(logits / c) of the logits; None does not.
        sinks_N: A logit of each head that takes probability and gives no value, float32.
        alibi_slopes_N: Slope times distance is subtracted from the logits, float32.
        dropout_rate: The share of probabilities that are set to 0 where there are seeds.
        dropout_seeds_BN: A seed of each row and head, int32; None turns dropout off.
        chip: Whose kernels: one of `certified.CHIPS`, the name of a device that has them ("h100",
            "TPU v6 lite"), or "auto", the default device's.
        interpret: Passed to `pallas_call`; True runs a GPU's kernels on a CPU,
            `pltpu.InterpretParams()` a TPU's.

    Returns:
        out_BTNH in the dtype of the queries, and the log-sum-exp of the logits, lse_BTN in float32.

    Raises:
        ValueError: For what `certified.check` does not list, and for a device without kernels.
    """
    H = q_BTNH.shape[-1]
    scale, chip = H**-0.5 if scale is None else scale, chip_named(chip)
    certified.check(chip, certified.conditions(mask), q_BTNH.dtype.name, H)
    certified.check_sparsity(chip, mask)
    q_BTNH, k_BSKH, v_BSKH = (even_heads(x) for x in (q_BTNH, k_BSKH, v_BSKH))
    operands = Operands(
        q_BTNH, k_BSKH, v_BSKH, mask, sinks_N, alibi_slopes_N, dropout_seeds_BN
    )
    out_BTNH, lse_BTN = attend(Options(scale, soft_cap, dropout_rate, chip, interpret), operands)
    return out_BTNH[..., :H], lse_BTN


def chip_named(name: str) -> str:
    """The chip, one of `certified.CHIPS`, that a name or "auto" means; ValueError for none."""
    device = jax.devices()[0].device_kind if name == "auto" else name
    chip = device if device in certified.CHIPS else certified.chip_of(device)
    if chip is None:
        raise ValueError(
            f"chip={name!r}: no kernel is certified for {device}; expected one of "
            f"{', '.join(certified.CHIPS)}, or reference_attention, which runs anywhere"
        )
    return chip


def even_heads(x: jax.Array) -> jax.Array:
    """Zeros after the last head dim, to a multiple of 16: a tile of half precision has 16 rows."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[-1] % 16)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(options: Options, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """`flash_attention` of operands that were checked, for callers that set the blocks."""
    return kernels_of(options).forward(options, operands)


def _forward(options, operands):
    # Named where they are residuals: a rematerialization policy that saves "attended" by name then
    # never runs the forward kernel again.
    out_BTNH, lse_BTN = (checkpoint_name(x, "attended") for x in attend(options, operands))
    return (out_BTNH, lse_BTN), (operands, out_BTNH, lse_BTN)


def _backward(options, saved, gradients):
    operands, *results = saved
    lse_BTN, delta_BTN = of_loss(*results, gradients)
    gradients = kernels_of(options).backward(options, operands, gradients[0], lse_BTN, delta_BTN)
    g_q, g_k, g_v = (gradient.astype(operands.q_BTNH.dtype) for gradient in gradients)
    slopes = operands.alibi_slopes_N
    g_slopes = None if slopes is None else jnp.zeros_like(slopes)
    g_sinks_N = sinks_gradient(operands.sinks_N, lse_BTN, delta_BTN)
    return (Operands(g_q, g_k, g_v, None, g_sinks_N, g_slopes, None),)


attend.defvjp(_forward, _backward)


def of_loss(
    out_BTNH: jax.Array, lse_BTN: jax.Array, gradients: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """lse_BTN and delta_BTN as backward passes take them, from the gradients of out and lse."""
    g_BTNH, g_lse_BTN = gradients
    # d logits = p * (dp - delta): both the softmax's own sum and the log-sum-exp's gradient.
    products_BTNH = out_BTNH.astype(jnp.float32) * g_BTNH.astype(jnp.float32)
    delta_BTN = products_BTNH.sum(axis=-1) - g_lse_BTN
    # exp(logit - inf) is 0: rows that see nothing get no gradient, without a test in the kernel.
    # Whatever the gradient of their log-sum-exp is (often NaN), it leads nowhere.
    blind_BTN = lse_BTN == -jnp.inf
    return jnp.where(blind_BTN, jnp.inf, lse_BTN), jnp.where(blind_BTN, 0, delta_BTN)


def sinks_gradient(
    sinks_N: jax.Array | None, lse_BTN: jax.Array, delta_BTN: jax.Array
) -> jax.Array | None:
    """What the sinks get of it, in their dtype; the log-sum-exp includes them."""
    if sinks_N is None:
        return None
    share_BTN = jnp.exp(sinks_N.astype(jnp.float32)[None, None] - lse_BTN)
    return -(share_BTN * delta_BTN).sum(axis=(0, 1)).astype(sinks_N.dtype)


def kernels_of(options: Options):
    """The module with `forward` and `backward` for the chip."""
    return gpu_attention if options.chip in certified.GPU_CHIPS else tpu_attention

"""Flash attention for NVIDIA GPUs: the two functions that every chip's module has."""

import jax
import jax.numpy as jnp

from batiste.pallas_kernels import gpu_backward, gpu_forward, gpu_tile
from batiste.pallas_kernels.gpu_blocks import choose
from batiste.pallas_kernels.operands import Operands, Options


def forward(options: Options, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """out_BTNH in q's dtype and lse_BTN in fp32; zeros and -inf for rows that see nothing.

    Raises ValueError for shapes and masks that the kernels do not take. FlashAttention-2,
    arXiv:2307.08691.
    """
    _check(operands)
    out_BTNH, lse_BNT = gpu_forward.forward(options, operands, choose(options, operands).forward)
    return out_BTNH, lse_BNT.swapaxes(1, 2)


def backward(
    options: Options, operands: Operands, g_BTNH: jax.Array, lse_BTN: jax.Array,
    delta_BTN: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v in their dtypes.

    lse_BTN: inf for rows that see nothing. delta_BTN: what is subtracted from the probabilities'
    gradient. Raises ValueError as `forward` does.
    """
    _check(operands)
    plan = choose(options, operands)
    # Whatever the gradient of a log-sum-exp of -inf is (NaN, often), the row has no gradient.
    delta_BTN = jnp.where(lse_BTN == jnp.inf, 0.0, delta_BTN)
    gradients = gpu_backward.Gradients(
        g_BTNH, (lse_BTN * gpu_tile.LOG2_E).swapaxes(1, 2), delta_BTN.swapaxes(1, 2))
    g_q = gpu_backward.query_gradient(options, operands, gradients, plan.query_gradient)
    g_k, g_v = gpu_backward.key_gradients(options, operands, gradients, plan.key_gradients)
    return g_q, g_k, g_v


def _check(operands: Operands) -> None:
    q, k, v = operands.q_BTNH, operands.k_BSKH, operands.v_BSKH
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}.")
    if k.shape != v.shape or q.shape[2] % k.shape[2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit together.")
    if q.shape[3] % 16:
        raise ValueError(f"The GPU kernels need a head dim that 16 divides, got {q.shape[3]}.")

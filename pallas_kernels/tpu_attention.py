"""Flash attention for TPU from the outside: layouts, padding, scales."""

import jax
import jax.numpy as jnp

from batiste.pallas_kernels.operands import Operands, Options
from batiste.pallas_kernels.tpu_backward import backward_call
from batiste.pallas_kernels.tpu_forward import forward_call
from batiste.pallas_kernels.tpu_logits import LOG2_E
from batiste.pallas_kernels.tpu_plan import (
    Plan, make_plan, pad_to, scalar_operands, vector_operands,
)


def forward(options: Options, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """out_BTNH in q's dtype and lse_BTN in fp32."""
    plan, lists = make_plan(options, operands, backward=False)
    q_BTNH, k_BSKH, v_BSKH = _padded(plan, operands)
    q_BNHT = _scaled(options, plan, q_BTNH).transpose(0, 2, 3, 1)
    out_BNHT, lse_BN1T = forward_call(
        plan, lists | scalar_operands(operands), q_BNHT, k_BSKH.transpose(0, 2, 1, 3),
        v_BSKH.transpose(0, 2, 3, 1), vector_operands(plan, operands.mask),
    )
    T = operands.q_BTNH.shape[1]
    out_BTNH = out_BNHT.transpose(0, 3, 1, 2)[:, :T]
    return out_BTNH.astype(operands.q_BTNH.dtype), lse_BN1T[:, :, 0, :T].swapaxes(1, 2)


def backward(
    options: Options, operands: Operands, g_BTNH: jax.Array, lse_BTN: jax.Array,
    delta_BTN: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, fp32; see `attention._backward` for lse and delta."""
    plan, lists = make_plan(options, operands, backward=True)
    scalars = lists | scalar_operands(operands)
    scalars.pop("sinks", None)  # They are in the log-sum-exp already.
    q_BTNH, k_BSKH, v_BSKH = _padded(plan, operands)
    g_BTNH = pad_to(_working(g_BTNH.astype(operands.q_BTNH.dtype)), 1, plan.lengths.queries)
    q_BTNH = _scaled(options, plan, q_BTNH)
    heads = {
        "q_BNHT": q_BTNH.transpose(0, 2, 3, 1), "q_BNTH": q_BTNH.swapaxes(1, 2),
        "do_BNHT": g_BTNH.transpose(0, 2, 3, 1), "do_BNTH": g_BTNH.swapaxes(1, 2),
        "lse_BN1T": _row(plan, lse_BTN * LOG2_E, jnp.inf), "delta_BN1T": _row(plan, delta_BTN, 0),
    }
    keys = {
        "k_BKSH": k_BSKH.swapaxes(1, 2), "v_BKSH": v_BSKH.swapaxes(1, 2),
        "k_BKHS": k_BSKH.transpose(0, 2, 3, 1),
    }
    dq_CBNHT, dk_BKSH, dv_BKSH = backward_call(
        plan, scalars, heads, keys, vector_operands(plan, operands.mask)
    )
    T, S = operands.q_BTNH.shape[1], operands.k_BSKH.shape[1]
    dq_BTNH = (dq_CBNHT.sum(axis=0) * options.scale).transpose(0, 3, 1, 2)
    # dk was multiplied with queries that carry scale and more.
    dk_BSKH = (dk_BKSH / plan.rules.scale).swapaxes(1, 2)
    return dq_BTNH[:, :T], dk_BSKH[:, :S], dv_BKSH.swapaxes(1, 2)[:, :S]


def _padded(plan: Plan, operands: Operands) -> tuple[jax.Array, jax.Array, jax.Array]:
    return (
        pad_to(_working(operands.q_BTNH), 1, plan.lengths.queries),
        pad_to(_working(operands.k_BSKH), 1, plan.lengths.keys),
        pad_to(_working(operands.v_BSKH), 1, plan.lengths.keys),
    )


def _working(array: jax.Array) -> jax.Array:
    """The matrix units know bf16 and fp32; fp16 fits into the latter only."""
    return array.astype(jnp.float32) if array.dtype == jnp.float16 else array


def _scaled(options: Options, plan: Plan, q_BTNH: jax.Array) -> jax.Array:
    """Queries that carry the scale, and what makes exp exp2 or what the soft cap divides by."""
    return (q_BTNH.astype(jnp.float32) * (options.scale * plan.rules.scale)).astype(q_BTNH.dtype)


def _row(plan: Plan, statistic_BTN: jax.Array, filler: float) -> jax.Array:
    missing = plan.lengths.queries - statistic_BTN.shape[1]
    row_BNT = jnp.pad(
        statistic_BTN, ((0, 0), (0, missing), (0, 0)), constant_values=filler
    ).swapaxes(1, 2)
    return row_BNT[:, :, None]

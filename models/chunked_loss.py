"""The loss in chunks of time: never all logits, the head gathered once, its gradient summed once.

Each device goes through its own rows with its own part of the vocabulary, and makes a chunk's
gradients while its logits are there, so that no product is computed twice. Left to the compiler,
ZeRO-3 gathered the head for every chunk, forward and backward, and reduced a gradient of each.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from batiste.models.layers import dot, sum_dtype, weight_gradient
from batiste.models.token_loss import LossRules, logit_slopes, token_losses, vocabulary_sums
from batiste.sharding import axes_of, layout, per_device, spec

# Between blocks this axis splits time, here the vocabulary: each chunk is made whole over it.
SHARED = "tensor"


class Head(NamedTuple):
    """The weight that makes logits, its letters ("VD" or "DV"), the logits' soft cap or None."""

    weight: jax.Array
    letters: str
    soft_cap: float | None


class Rows(NamedTuple):
    """A batch, or what a device has of it: of x_BTD a `tensor`-th of the others' time."""

    x_BTD: jax.Array
    targets_BT: jax.Array
    weights_BT: jax.Array


class Plan(NamedTuple):
    """What is known before the program runs: the loss, a device's part of a chunk, how the head
    lies, and which axes split the vocabulary, the rows (batch and time) and time alone."""

    rules: LossRules
    share: int
    letters: str
    soft_cap: float | None
    zero: int
    vocabulary_axes: tuple[str, ...]
    row_axes: tuple[str, ...]
    time_axes: tuple[str, ...]


def chunked_loss(
    rows: Rows, head: Head, scale: jax.Array | None, rules: LossRules, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """The sum of all tokens' weighted losses, and each row's sum of weighted cross-entropies.

    x_BTD: after the last norm, in the compute dtype. scale: what the loss will be multiplied by
    before it is differentiated (float16's loss scale), so that no gradient vanishes; None is 1.
    chunk: positions of each row at a time. Both are float32; only the loss has a gradient.
    """
    parts = math.prod(
        jax.sharding.get_abstract_mesh().shape.get(axis, 1) for axis in ("context", SHARED))
    axes = axes_of("V"), axes_of("BT"), axes_of("T")
    share = max(1, chunk // parts)
    plan = Plan(rules, share, head.letters, head.soft_cap, layout().zero, *axes)
    scale = jnp.ones((), jnp.float32) if scale is None else scale
    loss, cross_entropy_B = _loss(plan, rows, head.weight, scale)
    return loss, jax.lax.stop_gradient(cross_entropy_B)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(plan: Plan, rows: Rows, w: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    loss_B, cross_entropy_B = _by_each_device(plan, _losses, ())(rows, w, scale)
    return loss_B.sum(axis=0), cross_entropy_B


def _loss_forward(plan: Plan, rows: Rows, w: jax.Array, scale: jax.Array) -> tuple:
    specs = spec("BTD", between_blocks=True), spec(plan.letters, zero=plan.zero >= 2)
    loss_B, cross_entropy_B, *gradients = _by_each_device(plan, _losses_and_gradients, specs)(
        rows, w, scale)
    return (loss_B.sum(axis=0), cross_entropy_B), (*gradients, scale)


def _loss_backward(plan: Plan, saved: tuple, cotangents: tuple) -> tuple:
    x_BTD, w, scale = saved
    factor = cotangents[0] / scale  # 1 where the loss is multiplied by what was said.
    x_BTD = (x_BTD.astype(jnp.float32) * factor).astype(x_BTD.dtype)
    return Rows(x_BTD, None, None), w * factor, None


_loss.defvjp(_loss_forward, _loss_backward)


def _by_each_device(plan: Plan, function: Callable, gradient_specs: tuple) -> Callable:
    rows = Rows(spec("BTD", between_blocks=True), spec("BT"), spec("BT"))
    in_specs = rows, spec(plan.letters, zero=plan.zero >= 3), PartitionSpec()
    out_specs = spec("B"), spec("B"), *gradient_specs
    return per_device(functools.partial(function, plan), in_specs, out_specs)


def _losses(plan: Plan, rows: Rows, w: jax.Array, _) -> tuple[jax.Array, jax.Array]:
    """Each row's sums of losses and cross-entropies."""
    w_DV = _whole_head(plan, w, rows.x_BTD.dtype)

    def add(sums, start, size):
        chunk = _chunk(rows, (start, size), plan.vocabulary_axes)
        logits_BTV = _logits(plan, chunk.x_BTD, w_DV)
        total = vocabulary_sums(logits_BTV, chunk.targets_BT, plan.vocabulary_axes)
        return _added(sums, token_losses(total, plan.rules), chunk.weights_BT)

    return jax.lax.psum(_over_chunks(plan, add, _zeros(rows), rows), plan.time_axes)


def _losses_and_gradients(plan: Plan, rows: Rows, w: jax.Array, scale: jax.Array) -> tuple:
    """The same, and the gradients by x_BTD and w of all losses' sum times `scale`."""
    w_DV = _whole_head(plan, w, rows.x_BTD.dtype)

    def add(carry, start, size):
        sums, dx_BTD, dw_DV = carry
        chunk = _chunk(rows, (start, size), plan.vocabulary_axes)
        logits_BTV = _logits(plan, chunk.x_BTD, w_DV)
        total = vocabulary_sums(logits_BTV, chunk.targets_BT, plan.vocabulary_axes)
        losses, differentiate = jax.vjp(lambda total: token_losses(total, plan.rules), total)
        (slopes,) = differentiate((chunk.weights_BT * scale, jnp.zeros_like(losses[1])))
        slope_BTV = logit_slopes(
            logits_BTV, chunk.targets_BT, (total, slopes), plan.vocabulary_axes)
        slope_BTV = _before_the_cap(plan, slope_BTV, logits_BTV).astype(w_DV.dtype)
        part_BTD = dot(slope_BTV, w_DV, (2,), (1,), sum_dtype(w_DV))
        part_BTD = _summed_over_vocabulary(plan, part_BTD).astype(dx_BTD.dtype)
        dx_BTD = jax.lax.dynamic_update_slice_in_dim(dx_BTD, part_BTD, start, axis=1)
        dw_DV += weight_gradient(chunk.x_BTD, slope_BTV, (0, 1), (0,))
        return _added(sums, losses, chunk.weights_BT), dx_BTD, dw_DV

    carry = _zeros(rows), jnp.zeros_like(rows.x_BTD), jnp.zeros(w_DV.shape, jnp.float32)
    sums, dx_BTD, dw_DV = _over_chunks(plan, add, carry, rows)
    dw = _summed_over_rows(plan, dw_DV)
    if plan.zero >= 2:
        # A share is left before any layer is differentiated: XLA would keep the whole till the end.
        dx_BTD, dw = jax.lax.optimization_barrier((dx_BTD, dw))
    return *jax.lax.psum(sums, plan.time_axes), dx_BTD, dw


def _over_chunks(plan: Plan, add: Callable, total, rows: Rows):
    """add(total, start, size) for each chunk; the last may be shorter."""
    length = rows.x_BTD.shape[1]
    share = min(plan.share, length)
    whole = length // share
    total, _ = jax.lax.scan(
        lambda total, index: (add(total, index * share, share), None), total, jnp.arange(whole))
    return total if length % share == 0 else add(total, whole * share, length % share)


def _chunk(rows: Rows, where: tuple, vocabulary_axes: tuple[str, ...]) -> Rows:
    """A chunk of a device's rows, with the time of all devices that have the others' vocabulary."""
    length = rows.x_BTD.shape[1]
    x_BTD = jax.lax.dynamic_slice_in_dim(rows.x_BTD, *where, axis=1)
    if SHARED in vocabulary_axes:
        x_BTD = jax.lax.all_gather(x_BTD, SHARED, axis=1, tiled=True)

    def of_all(array_BT):
        parts = array_BT.reshape(array_BT.shape[0], -1, length)
        parts = jax.lax.dynamic_slice_in_dim(parts, *where, axis=2)
        return parts.reshape(array_BT.shape[0], -1)

    return Rows(x_BTD, of_all(rows.targets_BT), of_all(rows.weights_BT))


def _logits(plan: Plan, x_BTD: jax.Array, w_DV: jax.Array) -> jax.Array:
    logits_BTV = dot(x_BTD, w_DV, (2,), (0,))
    cap = plan.soft_cap
    return logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap)


def _before_the_cap(plan: Plan, slope_BTV: jax.Array, logits_BTV: jax.Array) -> jax.Array:
    """The derivative by the logits as they were before they were capped to `logits_BTV`."""
    cap = plan.soft_cap
    return slope_BTV if cap is None else slope_BTV * (1 - jnp.square(logits_BTV / cap))


def _zeros(rows: Rows) -> tuple[jax.Array, jax.Array]:
    return (jnp.zeros(rows.x_BTD.shape[:1], jnp.float32),) * 2


def _added(sums: tuple, losses: tuple, weights_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    return tuple(
        sum_B + (loss_BT * weights_BT).sum(axis=1) for sum_B, loss_BT in zip(sums, losses))


def _whole_head(plan: Plan, w: jax.Array, dtype) -> jax.Array:
    """The head in the compute dtype, in which it is half the bytes, whole over `data`."""
    w_DV = w.astype(dtype) if plan.letters == "DV" else w.astype(dtype).T
    if plan.zero < 3 or "data" not in plan.row_axes:
        return w_DV
    return jax.lax.all_gather(w_DV, "data", axis=0, tiled=True)


def _summed_over_vocabulary(plan: Plan, part_BTD: jax.Array) -> jax.Array:
    """The parts of a chunk's gradient, summed; each device keeps its own time."""
    if SHARED in plan.vocabulary_axes:
        part_BTD = jax.lax.psum_scatter(part_BTD, SHARED, scatter_dimension=1, tiled=True)
    return jax.lax.psum(part_BTD, tuple(set(plan.vocabulary_axes) - {SHARED}))


def _summed_over_rows(plan: Plan, dw_DV: jax.Array) -> jax.Array:
    """The head's gradient of all rows, as the head lies; under ZeRO-2 and 3 a share over `data`.

    Scattered in its first dim: of the second, the TPU's compiler held one more copy at its peak
    (llama3_1b on v5e:4x4, 4.03 GiB instead of 3.53).
    """
    axes = plan.row_axes
    if plan.zero >= 2 and "data" in axes:
        dw_DV = jax.lax.psum_scatter(dw_DV, "data", scatter_dimension=0, tiled=True)
        axes = tuple(axis for axis in axes if axis != "data")
    dw_DV = jax.lax.psum(dw_DV, axes)
    return dw_DV if plan.letters == "DV" else dw_DV.T

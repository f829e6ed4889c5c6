"""Ring attention: queries stay where they are, keys and values go round (arXiv:2310.01889).

Each device holds two chunks of every row, 0 an early and 1 a late one (sharding/context_order.py).
The keys of an earlier device are seen by both chunks of queries, but only its chunk 0; those of a
later device by chunk 1 alone, both of them. So under a causal mask every device has two pairs of
chunks to work off at each step, whole ones, and all have the same work:

    queries of device 1 of 3     keys of device 0    1      2         . hidden   # a pair to work off
                                      0 5     1 4    2 3              \\ the diagonal
                       chunk 1        # .     \\ .    . .
                       chunk 4        # .     # \\    # #

The pairs of a step are stacked as rows of one call of the kernel. Where the mask asks for places
(window, prefix, ALiBi) each row says by how much its queries are ahead of its keys, and the kernel
itself skips what is hidden.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from batiste.pallas_kernels import (
    AttentionMask, Operands, Options, attend_piece, attend_piece_gradients, merge, of_loss,
    sinks_gradient,
)
from batiste.sharding import chunk_place, context_size


class Meeting(NamedTuple):
    """Which chunks of queries and of keys meet in a step, pair by pair, and the mask of the rows.

    size: tokens of a chunk; all that a device has where it need not be cut. A chunk may be traced.
    """

    size: int
    queries: tuple
    keys: tuple
    mask: AttentionMask


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_attention(options: Options, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """`reference_attention` over whole rows, called by each device with its share.

    Returns the share's out_BTNH in q's dtype and lse_BTN in fp32.

    operands: queries, keys and values of the device's two chunks; key segments of whole rows, in
    the order of `time_order`. Without dropout and block sparsity.
    """
    return _forward(options, operands)[0]


def _forward(options, operands):
    B, T, N = operands.q_BTNH.shape[:3]
    sinks_N = jnp.full((N,), -jnp.inf) if operands.sinks_N is None else operands.sinks_N
    no_keys_BTN = jnp.broadcast_to(sinks_N.astype(jnp.float32)[None, None], (B, T, N))
    total = jnp.zeros(operands.q_BTNH.shape, jnp.float32), no_keys_BTN
    keys, steps = (operands.k_BSKH, operands.v_BSKH), _steps(operands.mask, T)
    for step, following in zip(steps, [*steps[1:], None]):
        keys_after = None if following is None else _pass_on(keys, following - step)
        meeting = _meeting(operands, step)
        piece = attend_piece(options, _rows_of(operands, keys, meeting))
        piece, keys_after = _meanwhile(piece, keys_after)
        total = _into_chunks(merge, total, piece, meeting.queries)
        keys = keys_after
    out_BTNH, lse_BTN = total[0].astype(operands.q_BTNH.dtype), total[1]
    return (out_BTNH, lse_BTN), (operands, out_BTNH, lse_BTN)


def _backward(options, saved, gradients):
    """Keys go round again, and with them their gradients, which are home after the last step.

    They go the other way, or the compiler, where layers are not scanned, keeps those that came by
    in the forward pass: the whole row. A device's own keys are last: they need not wait for anyone,
    and meanwhile the gradients that the others made for them arrive.
    """
    operands, *results = saved
    lse_BTN, delta_BTN = of_loss(*results, gradients)
    own = keys = operands.k_BSKH, operands.v_BSKH
    dq = jnp.zeros(operands.q_BTNH.shape, jnp.float32)
    dkv = tuple(jnp.zeros(x.shape, jnp.float32) for x in own)
    home, at = context_size(), 0
    steps = [*_steps(operands.mask, dq.shape[1])[1:], home]
    if len(steps) > 1:
        keys = _pass_on(own, -steps[0])
    for step, following in zip(steps, [*steps[1:], home]):
        keys_after = own if following == home else _pass_on(keys, step - following)
        passed = dkv if at == 0 else _pass_on(dkv, at - step)
        meeting = _meeting(operands, -step)
        from_loss = (
            _rows(x, meeting.queries, meeting.size) for x in (gradients[0], lse_BTN, delta_BTN)
        )
        piece = attend_piece_gradients(options, _rows_of(operands, keys, meeting), *from_loss)
        (dq_piece, *dkv_piece), (keys, passed) = _meanwhile(piece, (keys_after, passed))
        dq = _into_chunks(jnp.add, dq, dq_piece, meeting.queries)
        dkv = tuple(
            _into_chunks(jnp.add, total, piece, meeting.keys)
            for total, piece in zip(passed, dkv_piece)
        )
        at = step
    dq, dk, dv = (x.astype(operands.q_BTNH.dtype) for x in (dq, *dkv))
    slopes = operands.alibi_slopes_N
    g_slopes = None if slopes is None else jnp.zeros_like(slopes)
    g_sinks_N = sinks_gradient(operands.sinks_N, lse_BTN, delta_BTN)
    return (Operands(dq, dk, dv, None, g_sinks_N, g_slopes, None),)


ring_attention.defvjp(_forward, _backward)


def _pass_on(tree, hops: int):
    """What the device `hops` before this one (after it, if negative) has."""
    size = context_size()
    ring = [(device, (device + hops) % size) for device in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, "context", ring), tree)


def _meanwhile(worked_off, sent):
    """Both, neither to be used before the other is there.

    So that the TPU compiler starts to send before a kernel and ends after it. It hid the way of the
    keys behind the merging of results instead, as far as that lasted, and no kernel.
    """
    return jax.lax.optimization_barrier((worked_off, sent))


def _steps(mask: AttentionMask, num_queries: int) -> list[int]:
    """How far keys are from home when they are looked at: not where a window hides all of them."""
    size = context_size()
    if mask.window is None:
        return list(range(size))
    devices = np.arange(size)
    chunks = np.stack([devices, 2 * size - 1 - devices], axis=1)

    def nearest(step: int) -> int:
        apart = np.abs(chunks[:, :, None] - np.roll(chunks, step, axis=0)[:, None]).min()
        return max(0, (apart - 1) * (num_queries // 2) + 1)

    return [0, *(step for step in range(1, size) if nearest(step) < mask.window)]


def _meeting(operands: Operands, step: int) -> Meeting:
    """What there is to do with the keys of the device `step` before this one (negative: after)."""
    mask, (B, T) = operands.mask, operands.q_BTNH.shape[:2]
    device = jax.lax.axis_index("context")
    source = (device - step) % context_size()
    by_place = (
        mask.window is not None or mask.prefix_B is not None or operands.alibi_slopes_N is not None
    )
    at_home = step % context_size() == 0
    if not by_place and (at_home or not mask.causal):
        size, pairs = T, ((0, 0),)
    else:
        size, pairs = T // 2, _pairs(mask, at_home, jnp.where(source > device, 1, 0))
    queries, keys = zip(*pairs)
    rows = AttentionMask(causal=mask.causal and (at_home or by_place), window=mask.window)
    changes = {}
    if mask.query_segments_BT is not None:
        key_segments_BS = jax.lax.dynamic_slice_in_dim(mask.key_segments_BS, source * T, T, axis=1)
        changes["query_segments_BT"] = _rows(mask.query_segments_BT, queries, size)
        changes["key_segments_BS"] = _rows(key_segments_BS, keys, size)
    if by_place:
        first_keys = [chunk_place(source, chunk, size) for chunk in keys]
        first_queries = [chunk_place(device, chunk, size) for chunk in queries]
        ahead = jnp.stack(first_queries) - jnp.stack(first_keys)
        changes["query_offset_B"] = jnp.repeat(ahead, B)
    if mask.prefix_B is not None:
        changes["prefix_B"] = jnp.concatenate([mask.prefix_B - first for first in first_keys])
    return Meeting(size, queries, keys, dataclasses.replace(rows, **changes))


def _pairs(mask: AttentionMask, at_home: bool, both: jax.Array) -> tuple:
    """Chunks of queries and of keys that may see each other.

    both: 0 where chunks 0 see each other, 1 where chunks 1 do (keys of an earlier, a later device).
    """
    if not mask.causal or mask.prefix_B is not None:
        return (0, 0), (0, 1), (1, 0), (1, 1)
    return ((0, 0), (1, 0), (1, 1)) if at_home else ((1, 0), (both, both))


def _rows_of(operands: Operands, keys: tuple, meeting: Meeting) -> Operands:
    """The operands of a step's pairs, stacked as rows."""
    k_BSKH, v_BSKH = (_rows(x, meeting.keys, meeting.size) for x in keys)
    q_BTNH = _rows(operands.q_BTNH, meeting.queries, meeting.size)
    return Operands(q_BTNH, k_BSKH, v_BSKH, meeting.mask, None, operands.alibi_slopes_N, None)


def _rows(x: jax.Array, chunks: tuple, size: int) -> jax.Array:
    """Chunks of time, stacked along the batch."""
    return jnp.concatenate([_chunk(x, chunk, size) for chunk in chunks])


def _chunk(x: jax.Array, chunk, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, chunk * size, size, axis=1)


def _into_chunks(combine, total, piece, chunks: tuple):
    """`total` with the rows of `piece` combined into their chunks, one after the other."""
    rows, size = jax.tree.leaves(piece)[0].shape[:2]
    for index, chunk in enumerate(chunks):
        each = rows // len(chunks)
        part = jax.tree.map(lambda x: x[index * each:(index + 1) * each], piece)
        so_far = jax.tree.map(lambda x: _chunk(x, chunk, size), total)
        total = jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, chunk * size, axis=1),
            total, combine(so_far, part),
        )
    return total

"""The decoding kernel for TPUs.

The grid is (B, K/h, tiles of keys): a step is a tile of s keys of h key heads, for the h G query
heads that belong to them (G = N/K). Key i of head k is column i h + k, as the cache has it:

                       key 0       key 1       key 2        s h columns
                     k0  k1      k0  k1      k0  k1
                   +---+---+   +---+---+   +---+---+
    g = 0  head k0 | x |   |   | x |   |   | x |   |     x: what the softmax keeps; the rest are
           head k1 |   | x |   |   | x |   |   | x |     other heads' products, which cost nothing
    g = 1  head k0 | x |   |   | x |   |   | x |   |     while h G rows are fewer than the 128 that
           head k1 |   | x |   |   | x |   |   | x |     the MXU takes for one load of keys
                   +---+---+   +---+---+   +---+---+

Which tiles a row sees is known before its steps (scalar prefetch): step j reads tile first + j, and
after the last one the same again, which is neither fetched nor computed.

No cache is copied or transposed in HBM as long as XLA keeps it in the layout that it gives to a
program's arguments. That depends on the sizes, and the view (a bitcast) follows it:
    H = 128, K in (1, 2, 4):          (B, S K, H), tile (s K, H), h = K
    H = 256, K in (1, 2, 4):          (B, S, K, H), tile (s, K, H), h = K; bf16 with K = 1 as above
    H % 128 == 0, K a multiple of 8:  (B, S, K, H), tile (s, 8, H), h = 8
    H % 128 == 0, any other K:        (B, K, S, H), tile (s, H), h = 1
    any other H:                      (B, K, H, S), tile (H, s), h = 1: keys in lanes
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from batiste.pallas_kernels.decode_operands import DecodeOperands, DecodeOptions

HIDDEN = -1e30  # Finite: before the first key, -inf - -inf would be NaN.
# MiB of keys in a tile; as much of values, and two buffers for each. A tile should take much longer
# to read than the 0.35 us that a step costs: 1.3 us of 0.8 TB/s on v5e, and so on.
TILES = {"v5e": 1, "v5p": 2, "v6e": 2, "tpu7x": 4}
MOST_KEYS = 2048  # In a tile, because half a tile per row is read in vain.


class Plan(NamedTuple):
    """heads: h. keys: s. lanes: whether keys are in lanes. steps: tiles that a row can see."""

    heads: int
    keys: int
    lanes: bool
    steps: int
    options: DecodeOptions

    def tile(self, key: jax.Array) -> jax.Array:
        """Which tile a key is in; not //, whose care for signs Mosaic lowers on a TPU host only."""
        return jax.lax.div(key, jnp.int32(self.keys))


def parts(options: DecodeOptions, operands: DecodeOperands) -> tuple[jax.Array, jax.Array]:
    """out_PBNH and lse_PBN, both float32, of one split: a TPU core takes the tiles in turn."""
    plan = _plan(options, operands)
    B, N, H = operands.q_BNH.shape
    groups = operands.k_BSKH.shape[2] // plan.heads
    rows = N // groups
    q_BJRH = _rows(plan, operands.q_BNH.reshape(B, groups, rows, H))
    inputs, specs = [q_BJRH], [pl.BlockSpec((1, 1, rows, H), lambda b, j, t, *_: (b, j, 0, 0))]
    if operands.alibi_slopes_N is not None:
        inputs.append(_rows(plan, operands.alibi_slopes_N.reshape(1, groups, rows, 1))[0])
        specs.append(pl.BlockSpec((1, rows, 1), lambda b, j, t, *_: (j, 0, 0)))
    for cache in (operands.k_BSKH, operands.v_BSKH):
        view, spec = _view(plan, cache)
        inputs.append(view)
        specs.append(spec)
    sizes = (H, 1)
    out_BJRH, lse_BJR1 = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, groups, plan.steps),
            in_specs=specs,
            out_specs=[
                pl.BlockSpec((1, 1, rows, size), lambda b, j, t, *_: (b, j, 0, 0)) for size in sizes
            ],
            scratch_shapes=[pltpu.VMEM((rows, size), jnp.float32) for size in (H, 1, 1)],
        ),
        out_shape=[jax.ShapeDtypeStruct((B, groups, rows, size), jnp.float32) for size in sizes],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=60 * 2**20,
        ),
        interpret=options.interpret,
        name="flash_decode",
    )(operands.first_B, operands.end_B, *inputs)
    out_BNH = _rows(plan, out_BJRH, back=True).reshape(1, B, N, H)
    return out_BNH, _rows(plan, lse_BJR1, back=True).reshape(1, B, N)


def _plan(options: DecodeOptions, operands: DecodeOperands) -> Plan:
    S, K, H = operands.k_BSKH.shape[1:]
    lanes = H % 128 != 0
    heads = 1 if lanes else 8 if K % 8 == 0 else K if K in (1, 2, 4) else 1
    key_bytes = heads * H * operands.k_BSKH.dtype.itemsize
    keys = min(TILES[options.chip] * 2**20 // key_bytes, MOST_KEYS, S) // 128 * 128
    keys = keys or pl.cdiv(S, 128) * 128
    tiles = pl.cdiv(S, keys)
    window = options.window
    steps = tiles if window is None else min(tiles, pl.cdiv(window - 1, keys) + 1)
    return Plan(heads, keys, lanes, steps, options)


def _rows(plan: Plan, array_BJRX: jax.Array, back: bool = False) -> jax.Array:
    """Query heads from the order (key head, g) to (g, key head), or back."""
    B, J, R, X = array_BJRX.shape
    order = (R // plan.heads, plan.heads) if back else (plan.heads, R // plan.heads)
    return array_BJRX.reshape(B, J, *order, X).swapaxes(2, 3).reshape(B, J, R, X)


def _view(plan: Plan, cache_BSKH: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
    """The cache as the kernel reads it, and its tiles."""
    B, S, K, H = cache_BSKH.shape

    def tile(b, t, first_ref, end_ref):
        first, after = plan.tile(first_ref[b]), plan.tile(end_ref[b] + plan.keys - 1)
        last = jnp.maximum(after - 1, first)
        return jnp.minimum(first + t, last)

    if plan.lanes:
        block = (1, 1, H, plan.keys)
        spec = pl.BlockSpec(block, lambda b, j, t, *refs: (b, j, 0, tile(b, t, *refs)))
        return cache_BSKH.transpose(0, 2, 3, 1), spec
    alone = K == 1 and cache_BSKH.dtype.itemsize == 2  # XLA lays these out as if K were not there.
    if plan.heads == 8 or plan.heads == K and H > 128 and not alone:
        block = (1, plan.keys, plan.heads, H)
        return cache_BSKH, pl.BlockSpec(block, lambda b, j, t, *refs: (b, tile(b, t, *refs), j, 0))
    if plan.heads == K:
        block = (1, plan.keys * K, H)
        spec = pl.BlockSpec(block, lambda b, j, t, *refs: (b, tile(b, t, *refs), 0))
        return cache_BSKH.reshape(B, S * K, H), spec
    spec = pl.BlockSpec((1, 1, plan.keys, H), lambda b, j, t, *refs: (b, j, tile(b, t, *refs), 0))
    return cache_BSKH.transpose(0, 2, 1, 3), spec


def _kernel(first_ref, end_ref, q_ref, *refs, plan):
    *slopes, k_ref, v_ref, out_ref, lse_ref, sum_ref, peak_ref, weight_ref = refs
    row, step = pl.program_id(0), pl.program_id(2)
    first, end = first_ref[row], end_ref[row]
    start = (plan.tile(first) + step) * plan.keys

    @pl.when(step == 0)
    def _():
        peak_ref[...] = jnp.full_like(peak_ref, HIDDEN)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        weight_ref[...] = jnp.zeros_like(weight_ref)

    @pl.when(start < end)
    def _():
        logits_RC = _logits(q_ref, k_ref, slopes, end - 1 - start, plan)
        column = jax.lax.broadcasted_iota(jnp.int32, logits_RC.shape, 1)
        head = jax.lax.broadcasted_iota(jnp.int32, logits_RC.shape, 0) & (plan.heads - 1)
        seen = (column >= (first - start) * plan.heads) & (column < (end - start) * plan.heads)
        seen &= (column & (plan.heads - 1)) == head
        logits_RC = jnp.where(seen, logits_RC, HIDDEN)
        before = peak_ref[...]
        peak_ref[...] = jnp.maximum(before, logits_RC.max(axis=1, keepdims=True))
        weights_RC = jnp.exp(logits_RC - peak_ref[...])
        fade = jnp.exp(before - peak_ref[...])
        weight_ref[...] = weight_ref[...] * fade + weights_RC.sum(axis=1, keepdims=True)
        sum_ref[...] *= fade

        def add(v):
            sum_ref[...] += _dot(weights_RC.astype(v.dtype), v, 1, 1 if plan.lanes else 0)

        # 0 times what lies beyond the real keys may be NaN.
        whole = start + plan.keys <= end
        pl.when(whole)(lambda: add(_columns(v_ref, plan)))
        pl.when(jnp.logical_not(whole))(lambda: add(_real(v_ref, end - start, plan)))

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        weight = weight_ref[...]
        out_ref[0, 0] = sum_ref[...] / jnp.where(weight == 0, 1, weight)
        lse_ref[0, 0] = jnp.where(weight == 0, -jnp.inf, peak_ref[...] + jnp.log(weight))


def _logits(q_ref, k_ref, slopes, query, plan):
    """Logits before the mask; `query` is the place of the query in the tile."""
    logits_RC = plan.options.scale * _dot(
        q_ref[0, 0], _columns(k_ref, plan), 1, 0 if plan.lanes else 1
    )
    soft_cap = plan.options.soft_cap
    if soft_cap is not None:
        logits_RC = soft_cap * jnp.tanh(logits_RC / soft_cap)
    if slopes:
        column = jax.lax.broadcasted_iota(jnp.int32, logits_RC.shape, 1)
        distance = query - (column >> (plan.heads.bit_length() - 1))
        logits_RC -= slopes[0][0] * distance.astype(jnp.float32)
    return logits_RC


def _columns(cache_ref, plan):
    """A tile of keys or values: (s h, H), or (H, s) with keys in lanes."""
    H = cache_ref.shape[-2 if plan.lanes else -1]
    return cache_ref[...].reshape((H, -1) if plan.lanes else (-1, H))


def _real(v_ref, keys, plan):
    v = _columns(v_ref, plan)
    column = jax.lax.broadcasted_iota(jnp.int32, v.shape, 1 if plan.lanes else 0)
    return jnp.where(column < keys * plan.heads, v, 0)


def _dot(a, b, summed_of_a, summed_of_b):
    # The default precision of fp32 is one pass of bf16; whoever asks for fp32 wants fp32.
    return jax.lax.dot_general(
        a, b, (((summed_of_a,), (summed_of_b,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )

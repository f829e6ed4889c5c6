"""The decoding kernel for GPUs, in Pallas' Triton dialect.

The grid is (B, K, splits): a program is one key head of one row in one split of the keys; its rows
are the G query heads of that key head, padded to the 16 that tensor cores want.

            split 0         split 1         split 2
          +---+---+---+   +---+---+---+   +---+---+---+
     G    | s | s | s |   | s | s | s |   | s |   :   :    :   : hidden, not read
          +---+---+---+   +---+---+---+   +---+---+---+

XLA puts the splits together by their log-sum-exps. Keys and values are read where the cache has
them: rows of H elements, K H apart.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from batiste.pallas_kernels.decode_operands import DecodeOperands, DecodeOptions


class Tile(NamedTuple):
    """Bytes of keys in a tile, as much of values; programs that fill the GPU twice."""

    key_bytes: int
    programs: int
    stages: int


# 132 multiprocessors with 227 KiB of shared memory; 108 with 163. A stage takes two tiles, and the
# queries up to 64 KiB.
TILES = {
    "hopper": Tile(key_bytes=2**15, programs=264, stages=2),
    "ampere": Tile(key_bytes=2**14, programs=216, stages=2),
}


class Plan(NamedTuple):
    """Powers of two: rows of queries, keys in a tile, head dim; then tiles in a split."""

    rows: int
    keys: int
    H: int
    split: int
    options: DecodeOptions


def parts(options: DecodeOptions, operands: DecodeOperands) -> tuple[jax.Array, jax.Array]:
    """out_PBNH and lse_PBN, both float32, of P splits."""
    (B, N, H), (S, K) = operands.q_BNH.shape, operands.k_BSKH.shape[1:3]
    tile = TILES[options.chip]
    padded_H = pl.next_power_of_2(H)
    keys = max(16, min(128, tile.key_bytes // (padded_H * operands.k_BSKH.dtype.itemsize)))
    tiles = pl.cdiv(S, keys)
    split = pl.cdiv(tiles, min(tiles, pl.cdiv(tile.programs, B * K)))
    plan = Plan(max(16, pl.next_power_of_2(N // K)), keys, padded_H, split, options)
    splits = pl.cdiv(tiles, split)
    inputs = [array for array in operands if array is not None]
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid=(B, K, splits),
        out_shape=[
            jax.ShapeDtypeStruct((splits, B, N, H), jnp.float32),
            jax.ShapeDtypeStruct((splits, B, N), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(
            # At most 64 fp32 registers a thread for the sums.
            num_warps=8 if plan.rows * plan.H > 8192 else 4, num_stages=tile.stages
        ),
        interpret=options.interpret,
        name="flash_decode",
    )(*inputs)


def _kernel(q_ref, k_ref, v_ref, *refs, plan):
    first_ref, end_ref, *slopes, out_ref, lse_ref = refs
    row, head, split = (pl.program_id(axis) for axis in range(3))
    first, end = first_ref[row], end_ref[row]
    G, H = q_ref.shape[1] // k_ref.shape[2], q_ref.shape[2]
    # A start that is traced: JAX 0.12 refuses a static slice that ends beyond the array, though
    # the mask keeps what is there from being read.
    heads, depth = pl.ds(head * G, plan.rows), pl.ds(head * 0, plan.H)
    mine_R = jnp.arange(plan.rows, dtype=jnp.int32) < G
    real_H = jnp.arange(plan.H, dtype=jnp.int32) < H
    mine_RH = mine_R[:, None] & real_H[None]
    q_RH = plgpu.load(q_ref.at[row, heads, depth], mask=mine_RH, other=0.0)
    slopes_R = plgpu.load(slopes[0].at[heads], mask=mine_R, other=0.0) if slopes else None

    def step(index, sums):
        sum_RH, peak_R, weight_R = sums
        place_C = index * plan.keys + jnp.arange(plan.keys, dtype=jnp.int32)
        seen_C = (place_C >= first) & (place_C < end)
        seen_CH = seen_C[:, None] & real_H[None]
        keys = pl.ds(index * plan.keys, plan.keys)
        k_CH = plgpu.load(k_ref.at[row, keys, head, depth], mask=seen_CH, other=0.0)
        v_CH = plgpu.load(v_ref.at[row, keys, head, depth], mask=seen_CH, other=0.0)
        logits_RC = _logits(q_RH, k_CH, slopes_R, end - 1 - place_C, plan.options)
        logits_RC = jnp.where(seen_C[None], logits_RC, -jnp.inf)
        before_R, peak_R = peak_R, jnp.maximum(peak_R, logits_RC.max(axis=1))
        weights_RC = jnp.exp(logits_RC - peak_R[:, None])
        fade_R = jnp.exp(before_R - peak_R)
        sum_RH = sum_RH * fade_R[:, None] + _dot(weights_RC.astype(v_CH.dtype), v_CH, 0)
        return sum_RH, peak_R, weight_R * fade_R + weights_RC.sum(axis=1)

    # Every tile of the loop has a key that is seen, so a peak is finite after the first.
    begin = jnp.maximum(split * plan.split, first // plan.keys)
    stop = jnp.minimum((split + 1) * plan.split, pl.cdiv(end, plan.keys))
    zero_R = jnp.zeros((plan.rows,), jnp.float32)
    zero_RH = jnp.zeros((plan.rows, plan.H), jnp.float32)
    sum_RH, peak_R, weight_R = jax.lax.fori_loop(
        begin, stop, step, (zero_RH, jnp.full_like(zero_R, -jnp.inf), zero_R)
    )
    empty_R = weight_R == 0
    out_RH = sum_RH / jnp.where(empty_R, 1, weight_R)[:, None]
    plgpu.store(out_ref.at[split, row, heads, depth], out_RH, mask=mine_RH)
    lse_R = jnp.where(empty_R, -jnp.inf, peak_R + jnp.log(jnp.where(empty_R, 1, weight_R)))
    plgpu.store(lse_ref.at[split, row, heads], lse_R, mask=mine_R)


def _logits(q_RH, k_CH, slopes_R, distance_C, options):
    """Logits before the mask."""
    logits_RC = options.scale * _dot(q_RH, k_CH, 1)
    if options.soft_cap is not None:
        logits_RC = options.soft_cap * jnp.tanh(logits_RC / options.soft_cap)
    if slopes_R is not None:
        logits_RC -= slopes_R[:, None] * distance_C.astype(jnp.float32)[None]
    return logits_RC


def _dot(a, b, summed_of_b):
    # The default precision of fp32 is tf32; whoever asks for fp32 wants fp32.
    return jax.lax.dot_general(
        a, b, (((1,), (summed_of_b,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )

"""The cross-entropy kernels for GPUs, in Pallas' Triton dialect.

Tokens are the rows M, in tiles of m; the vocabulary is V, in tiles of v; D goes by, d at a time.

    forward: a program is a row of               gradient of x: a program is a row of tiles;
    tiles in one split of the vocabulary         of the head: a column of tiles

            v   v | v   v | v                            v   v   v              v   v   v
          +-------+-------+---                         +-----------           +---+---+---
        m |  0    |  1    |  2                       m |  0 ->              m | 0 | 1 | 2
          +-------+-------+---                         +-----------           | | | | | |
        m |  3    |  4    |  5                       m |  1 ->              m | v | v | v
          +-------+-------+---                         +-----------           +---+---+---

A tile of logits, m x v in fp32, is made in registers from D/d products; x and head come by L2.
The splits' sums are put together by XLA. What a program accumulates backward, m (or v) x D in
fp32, is too large for registers: it lies in HBM, is small enough for L2 and belongs to that program
alone, so no atomics are needed and the result is the same in every run.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from batiste.pallas_kernels.cross_entropy_operands import Operands, Options, Sums


class Tile(NamedTuple):
    """Powers of two: `tokens` x `words` logits, `depth` of D at a time; `split` tiles a program."""

    tokens: int
    words: int
    depth: int
    split: int
    warps: int
    stages: int


# Operands of a stage: (m + v) d elements, 24 KiB in bf16 on hopper, of 227 KiB of shared memory;
# 16 KiB of 163 on ampere. Logits and their gradient: 64 (32) fp32 registers a thread each.
TILES = {
    "hopper": Tile(tokens=64, words=128, depth=64, split=16, warps=4, stages=3),
    "ampere": Tile(tokens=64, words=64, depth=64, split=32, warps=4, stages=3),
}


class Plan(NamedTuple):
    """What all kernels of one call know."""

    tile: Tile
    vocabulary: int
    D: int
    options: Options


def forward(options: Options, operands: Operands) -> Sums:
    """The sums over the vocabulary, float32."""
    plan, arrays = _prepare(options, operands)
    tokens, tiles = arrays[0].shape[0], pl.cdiv(plan.vocabulary, plan.tile.words)
    splits = pl.cdiv(tiles, plan.tile.split)
    parts = jax.ShapeDtypeStruct((splits, tokens), jnp.float32)
    grid = (tokens // plan.tile.tokens, splits)
    log_z_PM, hit_PM, total_PM = _call(_forward_kernel, plan, grid, arrays, [parts] * 3)
    size = operands.x_MD.shape[0]
    sums = jax.nn.logsumexp(log_z_PM, axis=0), hit_PM.sum(axis=0), total_PM.sum(axis=0)
    return Sums(*(array_M[:size] for array_M in sums))


def backward(
    options: Options, operands: Operands, log_z_M: jax.Array, gradients: Sums, head_dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Gradients of x and, in `head_dtype`, of the head; the tiles of logits are made again."""
    plan, arrays = _prepare(options, operands)
    tokens = arrays[0].shape[0]
    for array_M in (log_z_M, *gradients):
        arrays.append(jnp.pad(array_M, (0, tokens - array_M.size)))
    sum_of_x, sum_of_head = (jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in arrays[:2])
    (g_x_MD,) = _call(_x_kernel, plan, (tokens // plan.tile.tokens,), arrays, [sum_of_x])
    columns = (pl.cdiv(plan.vocabulary, plan.tile.words),)
    (g_head,) = _call(_head_kernel, plan, columns, arrays, [sum_of_head])
    size = operands.x_MD.shape[0]
    return g_x_MD[:size].astype(operands.x_MD.dtype), g_head.astype(head_dtype)


def _prepare(options: Options, operands: Operands) -> tuple[Plan, list]:
    """The plan; x, head and targets, with tokens padded to whole tiles."""
    x_MD, head, targets_M = operands
    tile = TILES[options.chip]
    padding = -x_MD.shape[0] % tile.tokens
    x_MD = jnp.pad(x_MD, ((0, padding), (0, 0)))
    targets_M = jnp.pad(targets_M.astype(jnp.int32), (0, padding))
    plan = Plan(tile, operands.vocabulary(options), x_MD.shape[1], options)
    return plan, [x_MD, head, targets_M]


def _call(kernel: Any, plan: Plan, grid: tuple, arrays: list, outputs: list) -> list:
    """pallas_call; every program sees whole arrays and slices them itself."""
    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid=grid,
        out_shape=outputs,
        compiler_params=plgpu.CompilerParams(
            num_warps=plan.tile.warps, num_stages=plan.tile.stages
        ),
        interpret=plan.options.interpret,
        name="cross_entropy" + kernel.__name__.removesuffix("_kernel"),
    )(*arrays)


def _forward_kernel(x_ref, head_ref, targets_ref, *sums, plan):
    log_z_ref, hit_ref, total_ref = sums
    tile, split = plan.tile, pl.program_id(1)
    rows = pl.ds(pl.program_id(0) * tile.tokens, tile.tokens)
    targets_m = plgpu.load(targets_ref.at[rows])

    def step(index, sums):
        peak_m, weight_m, hit_m, total_m = sums
        word_v, logits = _logits(x_ref, head_ref, rows, index * tile.words, plan)
        hit_m += jnp.where(word_v[None] == targets_m[:, None], logits, 0).sum(axis=1)
        real = word_v[None] < plan.vocabulary
        total_m += jnp.where(real, logits, 0).sum(axis=1)
        logits = jnp.where(real, logits, -jnp.inf)
        before_m, peak_m = peak_m, jnp.maximum(peak_m, logits.max(axis=1))
        weight_m = weight_m * jnp.exp(before_m - peak_m)
        weight_m += jnp.exp(logits - peak_m[:, None]).sum(axis=1)
        return peak_m, weight_m, hit_m, total_m

    zero_m = jnp.zeros((tile.tokens,), jnp.float32)
    first = split * tile.split
    last = jnp.minimum(first + tile.split, pl.cdiv(plan.vocabulary, tile.words))
    peak_m, weight_m, hit_m, total_m = jax.lax.fori_loop(
        first, last, step, (jnp.full_like(zero_m, -jnp.inf), zero_m, zero_m, zero_m)
    )
    plgpu.store(log_z_ref.at[split, rows], peak_m + jnp.log(weight_m))
    plgpu.store(hit_ref.at[split, rows], hit_m)
    plgpu.store(total_ref.at[split, rows], total_m)


def _x_kernel(x_ref, head_ref, targets_ref, *refs, plan):
    *per_token, out_ref = refs
    tile = plan.tile
    rows = pl.ds(pl.program_id(0) * tile.tokens, tile.tokens)

    def step(index, _):
        first = index * tile.words
        gradient = _gradient((x_ref, head_ref, targets_ref, *per_token), rows, first, plan)

        def add(chunk, _):
            head = _head_tile(head_ref, first, chunk, plan)
            product = _dot(gradient, head, 1, plan.options.layout.index("V"))
            _accumulate(out_ref.at[rows, chunk], product, index, None)

        _over_chunks(plan, add, None)
        _synchronize(plan)

    jax.lax.fori_loop(0, pl.cdiv(plan.vocabulary, tile.words), step, None)


def _head_kernel(x_ref, head_ref, targets_ref, *refs, plan):
    *per_token, out_ref = refs
    tile, first = plan.tile, pl.program_id(0) * plan.tile.words

    def step(index, _):
        rows = pl.ds(index * tile.tokens, tile.tokens)
        gradient = _gradient((x_ref, head_ref, targets_ref, *per_token), rows, first, plan)

        def add(chunk, _):
            x = plgpu.load(x_ref.at[rows, chunk])
            place, real = _head_place(first, chunk, plan)
            vd = plan.options.layout == "VD"
            product = _dot(gradient, x, 0, 0) if vd else _dot(x, gradient, 0, 0)
            _accumulate(out_ref.at[place], product, index, real)

        _over_chunks(plan, add, None)
        _synchronize(plan)

    jax.lax.fori_loop(0, x_ref.shape[0] // tile.tokens, step, None)


def _accumulate(ref, product, index, real):
    """Adds to what the program itself has stored in earlier steps; nothing, in the first."""
    stored = jnp.broadcast_to(index > 0, product.shape)
    stored = stored if real is None else stored & real
    plgpu.store(ref, plgpu.load(ref, mask=stored, other=0.0) + product, mask=real)


def _synchronize(plan):
    # A step's sums must be in place when the next step's loads begin, in whichever thread.
    if not plan.options.interpret:
        plgpu.debug_barrier()


def _gradient(refs, rows, first, plan):
    """Gradient of a tile of logits before the soft cap, in x's dtype."""
    x_ref, head_ref, *per_token = refs
    word_v, logits = _logits(x_ref, head_ref, rows, first, plan)
    columns = (plgpu.load(ref.at[rows])[:, None] for ref in per_token)
    targets, log_z, g_log_z, g_hit, g_total = columns
    gradient = g_log_z * jnp.exp(logits - log_z)
    gradient += jnp.where(word_v[None] == targets, jnp.broadcast_to(g_hit, logits.shape), 0)
    if plan.options.smoothed:
        gradient += g_total
    if plan.options.soft_cap is not None:
        gradient *= 1 - jnp.square(logits / plan.options.soft_cap)
    return jnp.where(word_v[None] < plan.vocabulary, gradient, 0).astype(x_ref.dtype)


def _logits(x_ref, head_ref, rows, first, plan):
    """The words of the tile's columns, and its soft-capped logits in fp32."""

    def add(chunk, logits):
        x = plgpu.load(x_ref.at[rows, chunk])
        head = _head_tile(head_ref, first, chunk, plan)
        return logits + _dot(x, head, 1, plan.options.layout.index("D"))

    zero = jnp.zeros((plan.tile.tokens, plan.tile.words), jnp.float32)
    logits = _over_chunks(plan, add, zero)
    soft_cap = plan.options.soft_cap
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return first + jnp.arange(plan.tile.words, dtype=jnp.int32), logits


def _head_tile(head_ref, first, chunk, plan):
    """Words from `first` on by a chunk of D, in the head's layout; 0 beyond the vocabulary."""
    place, real = _head_place(first, chunk, plan)
    return plgpu.load(head_ref.at[place], mask=real, other=0.0)


def _head_place(first, chunk, plan):
    """Index of a tile of the head, and which of it is real."""
    words, depth = plan.tile.words, plan.tile.depth
    real_v = first + jnp.arange(words, dtype=jnp.int32) < plan.vocabulary
    if plan.options.layout == "VD":
        return (pl.ds(first, words), chunk), jnp.broadcast_to(real_v[:, None], (words, depth))
    return (chunk, pl.ds(first, words)), jnp.broadcast_to(real_v[None], (depth, words))


def _over_chunks(plan: Plan, body: Any, carry: Any) -> Any:
    """carry = body(chunk, carry) for each chunk of D, an index; D is a multiple of 128."""
    depth = plan.tile.depth

    def step(index, carry):
        return body(pl.ds(index * depth, depth), carry)

    return jax.lax.fori_loop(0, plan.D // depth, step, carry)


def _dot(a, b, summed_of_a, summed_of_b):
    # The default precision of fp32 is tf32; whoever asks for fp32 wants fp32.
    return jax.lax.dot_general(
        a, b, (((summed_of_a,), (summed_of_b,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )

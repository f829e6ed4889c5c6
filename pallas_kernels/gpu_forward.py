"""Flash attention forward for NVIDIA GPUs, in Triton through Pallas."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from batiste.pallas_kernels import gpu_tile
from batiste.pallas_kernels.gpu_blocks import Blocks
from batiste.pallas_kernels.gpu_tile import Inputs, Kept, Row, Setting, Tile
from batiste.pallas_kernels.operands import Operands, Options

# One program keeps a tile of queries of one head and walks along the visited tiles of keys:
#
#                   keys of the query head's group, from HBM one tile after the other
#                   +-------+-------+-------+-------+
#                   | k, v  | k, v  | k, v  |       |  no tile is loaded that nobody sees
#                   +-------+-------+-------+-------+
#     +---------+   +-------+-------+-------+-------+     peak   (queries)      running maximum
#     |    q    |   |   #   |   #   |   o   |   .   | ->  total  (queries)      sum of exp2
#     | (stays) |   +-------+-------+-------+-------+     output (queries, H)   sum of exp2 * v
#     +---------+     unmasked first, masked then
#
# Grid: tiles of queries (last first: under a causal mask they have the most to do), heads, rows.


def forward(options: Options, operands: Operands, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """Output (B, T, N, H) in q's dtype and log-sum-exp (B, N, T) in fp32."""
    setting, inputs = gpu_tile.prepare(options, operands, blocks, by_keys=False)
    B, T, N, H = operands.q_BTNH.shape
    num_tiles = pl.cdiv(T, blocks.queries)
    return pl.pallas_call(
        functools.partial(_kernel, setting=setting),
        grid=(num_tiles, N, B),
        in_specs=(query_specs(inputs, setting),),
        out_specs=(
            pl.BlockSpec((None, blocks.queries, None, H),
                         lambda i, n, b: (b, num_tiles - 1 - i, n, 0)),
            pl.BlockSpec((None, None, blocks.queries), lambda i, n, b: (b, n, num_tiles - 1 - i)),
        ),
        out_shape=(
            jax.ShapeDtypeStruct((B, T, N, H), operands.q_BTNH.dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=options.interpret,
        name="flash_attention_forward",
    )(inputs)


def query_specs(inputs: Inputs, setting: Setting) -> Inputs:
    """Specs for a program that keeps a tile of queries, here and for the queries' gradient."""
    queries, H = setting.blocks.queries, setting.head_dim
    last = pl.cdiv(setting.num_queries, queries) - 1
    group = setting.num_heads // setting.num_kv_heads
    all_keys = pl.cdiv(setting.num_keys, setting.blocks.keys) * setting.blocks.keys
    spec = gpu_tile.optional_spec
    rows = pl.BlockSpec((None, queries, None, H), lambda i, n, b: (b, last - i, n, 0))
    keys = pl.BlockSpec((None, all_keys, None, H), lambda i, n, b: (b, 0, n // group, 0))
    scalars = (None, None, queries), lambda i, n, b: (b, n, last - i)
    return Inputs(
        rows, keys, keys,
        gpu_tile.schedule_spec(inputs, lambda i, n, b: (b, last - i)),
        spec(inputs.prefix_B, (None,), lambda i, n, b: (b,)),
        spec(inputs.offset_B, (None,), lambda i, n, b: (b,)),
        spec(inputs.query_segments_BT, (None, queries), lambda i, n, b: (b, last - i)),
        spec(inputs.key_segments_BS, (None, all_keys), lambda i, n, b: (b, 0)),
        spec(inputs.sinks_N, (None,), lambda i, n, b: (n,)),
        spec(inputs.slopes_N, (None,), lambda i, n, b: (n,)),
        spec(inputs.seeds_BN, (None, None), lambda i, n, b: (b, n)),
        None if inputs.g_BTNH is None else rows,
        spec(inputs.lse_BNT, *scalars),
        spec(inputs.delta_BNT, *scalars),
    )


def kept_queries(inputs: Inputs, setting: Setting) -> Kept:
    """The program's queries."""
    tile = pl.cdiv(setting.num_queries, setting.blocks.queries) - 1 - pl.program_id(0)
    return gpu_tile.kept_side(
        tile, setting.num_queries, setting.blocks.queries, inputs.query_segments_BT)


def row_of(inputs: Inputs) -> Row:
    """The row's and head's scalars."""
    refs = (inputs.prefix_B, inputs.offset_B, inputs.slopes_N, inputs.seeds_BN)
    return Row(*(None if ref is None else ref[()] for ref in refs))


def walked_keys(
    inputs: Inputs, kept: Kept, tile: jax.Array, setting: Setting, masked: bool
) -> tuple[list[jax.Array], list[jax.Array], Tile]:
    """A tile of keys and values, and where its elements are; queries are rows."""
    start = tile * setting.blocks.keys
    key = start + jnp.arange(setting.blocks.keys, dtype=jnp.int32)
    # Only a masked tile can be cut by the end of the array.
    valid = gpu_tile.below(key, setting.num_keys, setting.blocks.keys) if masked else None
    rows = pl.ds(start, setting.blocks.keys)
    k, v = (gpu_tile.load(x, (rows,), valid, setting) for x in (inputs.k_BSKH, inputs.v_BSKH))
    query_segments = key_segments = None
    if masked and kept.segments is not None:
        query_segments = kept.segments[:, None]
        key_segments = gpu_tile.load_vector(inputs.key_segments_BS, (rows,), valid, 0)[None]
    return k, v, Tile(kept.place[:, None], key[None], query_segments, key_segments)


def _kernel(inputs: Inputs, out_ref, lse_ref, *, setting: Setting) -> None:
    kept, row = kept_queries(inputs, setting), row_of(inputs)
    q = gpu_tile.load(inputs.q_BTNH, (slice(None),), kept.exists, setting)

    def step(masked, tile, carry):
        output, peak, total = carry
        k, v, tile = walked_keys(inputs, kept, tile, setting, masked)
        scores, factor, _ = gpu_tile.logits(
            gpu_tile.products(q, k), tile, row, setting, masked)
        new_peak = jnp.maximum(peak, scores.max(axis=1) * factor)
        # A row that has seen nothing yet: exp2(-inf - 0) is 0, exp2(-inf + inf) would be NaN.
        base = jnp.where(new_peak == -jnp.inf, 0.0, new_peak) if masked else new_peak
        shrink = jnp.exp2(peak - base)
        weights = jnp.exp2(scores * factor - base[:, None])
        total = total * shrink + weights.sum(axis=1)
        if row.seed is not None:
            weights = jnp.where(gpu_tile.keep(tile, row, setting), weights, 0.0)
        output = tuple(
            x * shrink[:, None] + gpu_tile.dot(weights.astype(y.dtype), y)
            for x, y in zip(output, v)
        )
        return output, new_peak, total

    size = setting.blocks.queries
    # The sink is a logit that is there before the first key, with a value of zero.
    sink = None if inputs.sinks_N is None else inputs.sinks_N[()]
    carry = (
        tuple(jnp.zeros(x.shape, jnp.float32) for x in q),
        jnp.full((size,), -jnp.inf if sink is None else sink, jnp.float32),
        jnp.full((size,), 0.0 if sink is None else 1.0, jnp.float32),
    )
    may_mask = gpu_tile.can_mask(inputs, setting, by_keys=False)
    output, peak, total = gpu_tile.walk(inputs, step, carry, may_mask)
    total = jnp.where(total == 0, 1.0, total)
    share = 1 / (total * (1 - setting.options.dropout_rate))
    gpu_tile.store(out_ref, [x * share[:, None] for x in output], kept.exists)
    lse = peak * math.log(2) + jnp.log(total)
    plgpu.store(lse_ref.at[:], lse, mask=kept.exists)

"""Flash attention backward for NVIDIA GPUs, in Triton through Pallas."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from batiste.pallas_kernels import gpu_tile
from batiste.pallas_kernels.gpu_blocks import Blocks
from batiste.pallas_kernels.gpu_forward import kept_queries, query_specs, row_of, walked_keys
from batiste.pallas_kernels.gpu_tile import Inputs, Row, Setting, Tile
from batiste.pallas_kernels.operands import Operands, Options

# Two kernels, so that each sum stays in registers: no atomics, and the same bits in every run. The
# price is that the scores and their gradient are multiplied out twice (7 products, not 5).
#
#   dq: a program keeps queries,                  dk, dv: a program keeps keys, walks down
#   walks along keys, as forward                  queries, for each head of the group
#
#   +---------+   +------+------+------+                    +------------+
#   | q, g,   |   |      |      |      |                    |  k, v      |   (stay)
#   | lse,    |   |  #   |  #   |  o   | -> dq              +------------+
#   | delta   |   |      |      |      |          q, g,     |     o      |
#   +---------+   +------+------+------+          lse,      +------------+ -> dk, dv
#                   k, v   k, v   k, v            delta     |     #      |
#                                                           +------------+
#
# The second computes its tiles with keys as rows: then probabilities and their gradient enter the
# next product as they are, without a transposition between registers.


class Gradients(NamedTuple):
    """What comes from the loss: the output's gradient, and per query base-2 lse and delta."""

    g_BTNH: jax.Array
    lse_BNT: jax.Array
    delta_BNT: jax.Array


def query_gradient(
    options: Options, operands: Operands, gradients: Gradients, blocks: Blocks
) -> jax.Array:
    """Gradient of the queries, in their dtype."""
    setting, inputs = gpu_tile.prepare(options, operands, blocks, by_keys=False)
    inputs = inputs._replace(sinks_N=None, **gradients._asdict())
    B, T, N, H = operands.q_BTNH.shape
    num_tiles = pl.cdiv(T, blocks.queries)
    return pl.pallas_call(
        functools.partial(_query_kernel, setting=setting),
        grid=(num_tiles, N, B),
        in_specs=(query_specs(inputs, setting),),
        out_specs=pl.BlockSpec(
            (None, blocks.queries, None, H), lambda i, n, b: (b, num_tiles - 1 - i, n, 0)),
        out_shape=jax.ShapeDtypeStruct((B, T, N, H), operands.q_BTNH.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=options.interpret,
        name="flash_attention_query_gradient",
    )(inputs)


def _query_kernel(inputs: Inputs, g_q_ref, *, setting: Setting) -> None:
    kept, row, rows = kept_queries(inputs, setting), row_of(inputs), (slice(None),)
    q, g = (gpu_tile.load(x, rows, kept.exists, setting) for x in (inputs.q_BTNH, inputs.g_BTNH))
    lse = gpu_tile.load_vector(inputs.lse_BNT, rows, kept.exists, jnp.inf)[:, None]
    delta = gpu_tile.load_vector(inputs.delta_BNT, rows, kept.exists, 0.0)[:, None]

    def step(masked, tile, g_q):
        k, v, tile = walked_keys(inputs, kept, tile, setting, masked)
        _, g_scores = gpu_tile.score_gradients(
            gpu_tile.products(q, k), gpu_tile.products(g, v), (tile, row, lse, delta), setting,
            masked)
        return tuple(
            x + gpu_tile.dot(g_scores.astype(y.dtype), y) for x, y in zip(g_q, k))

    g_q = tuple(jnp.zeros(x.shape, jnp.float32) for x in q)
    g_q = gpu_tile.walk(inputs, step, g_q, gpu_tile.can_mask(inputs, setting, by_keys=False))
    gpu_tile.store(g_q_ref, [x * setting.options.scale for x in g_q], kept.exists)


def key_gradients(
    options: Options, operands: Operands, gradients: Gradients, blocks: Blocks
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the keys and the values, in their dtype, summed over each group of heads."""
    setting, inputs = gpu_tile.prepare(options, operands, blocks, by_keys=True)
    inputs = inputs._replace(sinks_N=None, **gradients._asdict())
    B, S, K, H = operands.k_BSKH.shape
    spec = pl.BlockSpec((None, blocks.keys, None, H), lambda j, k, b: (b, j, k, 0))
    shape = jax.ShapeDtypeStruct((B, S, K, H), operands.k_BSKH.dtype)
    return pl.pallas_call(
        functools.partial(_key_kernel, setting=setting),
        grid=(pl.cdiv(S, blocks.keys), K, B),
        in_specs=(_key_specs(inputs, setting),),
        out_specs=(spec, spec),
        out_shape=(shape, shape),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=options.interpret,
        name="flash_attention_key_gradients",
    )(inputs)


def _key_specs(inputs: Inputs, setting: Setting) -> Inputs:
    """Specs for a program that keeps a tile of keys."""
    keys, H = setting.blocks.keys, setting.head_dim
    group = setting.num_heads // setting.num_kv_heads
    all_queries = pl.cdiv(setting.num_queries, setting.blocks.queries) * setting.blocks.queries
    spec = gpu_tile.optional_spec
    rows = pl.BlockSpec((None, all_queries, group, H), lambda j, k, b: (b, 0, k, 0))
    kept = pl.BlockSpec((None, keys, None, H), lambda j, k, b: (b, j, k, 0))
    scalars = (None, group, all_queries), lambda j, k, b: (b, k, 0)
    return Inputs(
        rows, kept, kept,
        gpu_tile.schedule_spec(inputs, lambda j, k, b: (b, j)),
        spec(inputs.prefix_B, (None,), lambda j, k, b: (b,)),
        spec(inputs.offset_B, (None,), lambda j, k, b: (b,)),
        spec(inputs.query_segments_BT, (None, all_queries), lambda j, k, b: (b, 0)),
        spec(inputs.key_segments_BS, (None, keys), lambda j, k, b: (b, j)),
        None,
        spec(inputs.slopes_N, (group,), lambda j, k, b: (k,)),
        spec(inputs.seeds_BN, (None, group), lambda j, k, b: (b, k)),
        rows,
        spec(inputs.lse_BNT, *scalars),
        spec(inputs.delta_BNT, *scalars),
    )


def _key_kernel(inputs: Inputs, g_k_ref, g_v_ref, *, setting: Setting) -> None:
    kept = gpu_tile.kept_side(
        pl.program_id(0), setting.num_keys, setting.blocks.keys, inputs.key_segments_BS)
    rows = (slice(None),)
    k, v = (gpu_tile.load(x, rows, kept.exists, setting) for x in (inputs.k_BSKH, inputs.v_BSKH))
    may_mask = gpu_tile.can_mask(inputs, setting, by_keys=True)

    def head(group_member, carry):
        row = _row_of_member(inputs, group_member)

        def step(masked, tile, carry):
            g_k, g_v = carry
            q, g, around = _walked_queries(
                inputs, (kept, group_member), tile, setting, masked)
            tile, lse, delta = around
            dropped, g_scores = gpu_tile.score_gradients(
                gpu_tile.products(k, q), gpu_tile.products(v, g), (tile, row, lse, delta),
                setting, masked)
            g_v = tuple(x + gpu_tile.dot(dropped.astype(y.dtype), y) for x, y in zip(g_v, g))
            g_k = tuple(x + gpu_tile.dot(g_scores.astype(y.dtype), y) for x, y in zip(g_k, q))
            return g_k, g_v

        return gpu_tile.walk(inputs, step, carry, may_mask)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in k)
    group = setting.num_heads // setting.num_kv_heads
    g_k, g_v = jax.lax.fori_loop(0, group, head, (zeros, zeros))
    gpu_tile.store(g_k_ref, [x * setting.options.scale for x in g_k], kept.exists)
    share = 1 / (1 - setting.options.dropout_rate)
    gpu_tile.store(g_v_ref, [x * share for x in g_v], kept.exists)


def _row_of_member(inputs: Inputs, group_member: jax.Array) -> Row:
    """The scalars of one head of the group."""
    prefix, offset = (
        None if ref is None else ref[()] for ref in (inputs.prefix_B, inputs.offset_B))
    slope, seed = (
        None if ref is None else ref[group_member] for ref in (inputs.slopes_N, inputs.seeds_BN))
    return Row(prefix, offset, slope, seed)


def _walked_queries(
    inputs: Inputs, where: tuple, tile: jax.Array, setting: Setting, masked: bool
) -> tuple[list[jax.Array], list[jax.Array], tuple]:
    """A tile of queries and output gradients; its coordinates, lse and delta; keys are rows.

    where: the kept keys, and the head of the group.
    """
    kept, group_member = where
    start = tile * setting.blocks.queries
    query = start + jnp.arange(setting.blocks.queries, dtype=jnp.int32)
    # Queries that do not exist have a log-sum-exp of inf and thereby probabilities of 0.
    valid = gpu_tile.below(query, setting.num_queries, setting.blocks.queries) if masked else None
    rows = pl.ds(start, setting.blocks.queries)
    q, g = (
        gpu_tile.load(x, (rows, group_member), valid, setting)
        for x in (inputs.q_BTNH, inputs.g_BTNH)
    )
    lse = gpu_tile.load_vector(inputs.lse_BNT, (group_member, rows), valid, jnp.inf)[None]
    delta = gpu_tile.load_vector(inputs.delta_BNT, (group_member, rows), valid, 0.0)[None]
    query_segments = key_segments = None
    if masked and kept.segments is not None:
        query_segments = gpu_tile.load_vector(inputs.query_segments_BT, (rows,), valid, 0)[None]
        key_segments = kept.segments[:, None]
    tile = Tile(query[None], kept.place[:, None], query_segments, key_segments)
    return q, g, (tile, lse, delta)

"""What a TPU attention kernel is built from: padding, tiles, lists of tiles, scalars and vectors."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from batiste.pallas_kernels.mask import AttentionMask
from batiste.pallas_kernels.operands import Operands, Options
from batiste.pallas_kernels.tiles import (
    DIAGONAL, FULL, PARTIAL, Lengths, has_diagonal, tile_kinds, visits,
)
from batiste.pallas_kernels.tpu_blocks import CHIPS, Blocks, blocks_for, fit
from batiste.pallas_kernels.tpu_logits import LOG2_E, Piece, Rules
from batiste.pallas_kernels.tpu_pipeline import Unit, looped, straight


class Plan(NamedTuple):
    """All that is static about a call.

    real, lengths: before and after padding.
    chunk, chunks: how much of what a grid step walks is in VMEM at once (keys forward, queries
        backward), and how often.
    key_chunk: keys whose gradients are in VMEM at once (backward).
    heads, key_heads: query heads and key heads that one grid step works off side by side.
    varies_by_row: whether rows of the batch have lists of tiles of their own.
    """

    blocks: Blocks
    rules: Rules
    real: Lengths
    lengths: Lengths
    chunk: int
    chunks: int
    key_chunk: int
    heads: int
    key_heads: int
    varies_by_row: bool
    kinds: frozenset[int]
    vmem_bytes: int
    interpret: object

    @property
    def units(self) -> list[Unit]:
        """The units of a tile, in the order in which they are worked off."""
        return [
            Unit(query, key, head)
            for key in range(0, self.blocks.key_tile, self.blocks.key_unit)
            for query in range(0, self.blocks.query_tile, self.blocks.query_unit)
            for head in range(self.heads)
        ]

    @property
    def reshapes(self) -> bool:
        """Whether logits differ from scores where nothing is hidden."""
        return self.rules.alibi or self.rules.soft_cap is not None

    def on_diagonal(self) -> tuple["Plan", list[Unit]]:
        """The plan for a tile that causality cuts from corner to corner, and its visible units.

        Square units of 256 leave little to compute that is hidden: 10 of 16 in a tile of 1024.
        """
        side = min(256, self.blocks.query_unit, self.blocks.key_unit)
        blocks = self.blocks._replace(
            query_unit=side, key_unit=side, key_piece=min(side, self.blocks.key_piece)
        )
        plan = self._replace(blocks=blocks)
        return plan, [unit for unit in plan.units if unit.key <= unit.query]

    def kind_of(self, kind: int, unit: Unit, piece: slice) -> int:
        """The kind of a piece: below the diagonal a tile on the diagonal is full."""
        below = unit.key + piece.stop - 1 <= unit.query
        return FULL if kind == DIAGONAL and below and not self.rules.segments else kind


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product in the operands' precision, accumulated in fp32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(
        a, b, numbers, precision=precision, preferred_element_type=jnp.float32
    )


def make_plan(options: Options, operands: Operands, backward: bool) -> tuple[Plan, dict]:
    """The plan of a call, and its lists of tiles as scalars for the kernel."""
    T, S, H = operands.q_BTNH.shape[1], *operands.k_BSKH.shape[1::2]
    mask, chip = operands.mask, CHIPS[options.chip]
    blocks = fit(options.blocks or blocks_for(options.chip, H, backward), T, S)
    heads, key_heads = (1, 1) if backward else _side_by_side(operands)
    # fp16 is worked off in fp32 (tpu_attention._working).
    itemsize = 2 if operands.q_BTNH.dtype == jnp.bfloat16 else 4
    limit = _longest(chip.vmem_bytes // key_heads, H, itemsize, backward)
    query_chunk, query_chunks = _chunks(T, blocks.query_tile, limit)
    key_chunk, key_chunks = _chunks(S, blocks.key_tile, limit)
    chunk, chunks = (query_chunk, query_chunks) if backward else (key_chunk, key_chunks)
    if not backward:
        query_chunk, query_chunks = blocks.query_tile, -(-T // blocks.query_tile)
    real = Lengths(T, S, blocks.query_tile, blocks.key_tile)
    padded = real._replace(queries=query_chunk * query_chunks, keys=key_chunk * key_chunks)
    kinds = _pad(tile_kinds(mask, real), padded.grid)
    if backward:
        kinds = kinds.swapaxes(1, 2)
    opposite = blocks.query_tile if backward else blocks.key_tile
    lists = visits(kinds, chunk // opposite, has_diagonal(mask, real))
    plan = Plan(
        blocks, _rules(options, operands, S if padded.keys > S else None), real, padded, chunk,
        chunks, key_chunk, heads, key_heads, kinds.shape[0] > 1, lists.kinds, chip.vmem_bytes,
        options.interpret,
    )
    return plan, {"order": lists.order.reshape(-1), "counts": lists.counts.reshape(-1)}


def scalar_operands(operands: Operands) -> dict[str, jax.Array]:
    """What a kernel reads as scalars, by name; absent ones are left out."""
    mask = operands.mask
    slopes, sinks = operands.alibi_slopes_N, operands.sinks_N
    seeds = operands.dropout_seeds_BN
    scalars = {
        "offset": mask.query_offset_B,
        "prefix": mask.prefix_B,
        "slopes": None if slopes is None else slopes.astype(jnp.float32) * LOG2_E,
        "sinks": None if sinks is None else sinks.astype(jnp.float32),
        "seeds": None if seeds is None else seeds.reshape(-1),
    }
    return {name: array for name, array in scalars.items() if array is not None}


def vector_operands(plan: Plan, mask: AttentionMask) -> dict[str, jax.Array]:
    """Segments and block sparsity as the kernel reads them, padded; absent ones are left out."""
    lengths, vectors = plan.lengths, {}
    if mask.query_segments_BT is not None:
        vectors["query_segments"] = pad_to(mask.query_segments_BT, 1, lengths.queries)[:, None]
        vectors["key_segments"] = pad_to(mask.key_segments_BS, 1, lengths.keys)[:, :, None]
    if mask.sparsity is not None:
        vectors["sparsity_bits"] = _sparsity_bits(mask, plan)
    return vectors


def visit(plan: Plan, stages: Callable, tile_at: Callable, counts: list[jax.Array]) -> None:
    """Works off the tiles of a row's list: `counts` full ones, diagonal ones and partial ones.

    stages(plan, kind): the pipeline for tiles of a kind. tile_at(index): the list.
    """
    full, diagonal, partial = counts
    if FULL in plan.kinds:
        pl.when(full > 0)(lambda: looped(stages(plan, FULL), tile_at, full, plan.units))
    if DIAGONAL in plan.kinds:
        cut, units = plan.on_diagonal()
        pl.when(diagonal > 0)(lambda: straight(stages(cut, DIAGONAL), tile_at(full), units))
    if PARTIAL in plan.kinds:
        first = full + diagonal

        def body(index, _):
            straight(stages(plan, PARTIAL), tile_at(index), plan.units)

        jax.lax.fori_loop(first, first + partial, body, None)


def piece_at(plan: Plan, r, at: tuple, within: tuple) -> Piece:
    """What is known about a piece: `at` is (key tile, unit, keys of the unit), `within` the slices
    of the query vectors and of the key vectors that hold it."""
    (tile, unit, piece), (queries, keys) = at, within
    rules, b, n = plan.rules, pl.program_id(0), r.head + unit.head
    tile_start = r.first_key + tile * plan.blocks.key_tile
    first_block = bits = None
    if rules.sparsity_shift is not None:
        first_block = jax.lax.shift_right_logical(tile_start, rules.sparsity_shift)
        bits = r.sparsity_bits[r.sparsity_row(tile), :, queries]
    return Piece(
        (piece.stop - piece.start, plan.blocks.query_unit),
        r.first_query + unit.query,
        tile_start + unit.key + piece.start,
        r.query_segments[0, :, queries] if rules.segments else None,
        r.key_segments[0, keys, :] if rules.segments else None,
        bits,
        first_block,
        r.prefix[b] if rules.prefix else None,
        r.slopes[n] if rules.alibi else None,
        r.seeds[b * r.num_heads + n] if rules.dropout_rate is not None else None,
    )


def pad_to(array: jax.Array, dim: int, length: int) -> jax.Array:
    """The array with zeros at the end of `dim`."""
    if array.shape[dim] == length:
        return array
    widths = [(0, 0)] * array.ndim
    widths[dim] = (0, length - array.shape[dim])
    return jnp.pad(array, widths)


def _side_by_side(operands: Operands) -> tuple[int, int]:
    """Two query heads where they can be paired, and their key heads: two, or the one they share.

    What of one head waits for the matrix units' latency is filled by the other: most of a short
    sequence's tiles are on the diagonal and have little work of their own.
    """
    N, K = operands.q_BTNH.shape[2], operands.k_BSKH.shape[2]
    if N % 2 or (N > K and N // K % 2):
        return 1, 1
    return 2, (2 if N == K else 1)


def _rules(options: Options, operands: Operands, num_keys: int | None) -> Rules:
    mask = operands.mask
    return Rules(
        causal=mask.causal,
        two_sided=not mask.causal or mask.prefix_B is not None,
        window=mask.window,
        num_keys=num_keys,
        prefix=mask.prefix_B is not None,
        segments=mask.query_segments_BT is not None,
        sparsity_shift=None if mask.sparsity is None else int(math.log2(mask.sparsity.block)),
        soft_cap=options.soft_cap,
        alibi=operands.alibi_slopes_N is not None,
        dropout_rate=None if operands.dropout_seeds_BN is None else options.dropout_rate,
    )


def _longest(vmem_bytes: int, H: int, itemsize: int, backward: bool) -> int:
    """The most keys (or queries) to hold: two thirds of VMEM, a power of two.

    Forward, k and v, each twice because the next are fetched meanwhile. Backward, q and its
    gradient in two layouts twice, dq in fp32 twice; and for as many keys dk and dv in fp32 twice.
    """
    lanes = -(-H // 128) * 128
    per_place = lanes * (4 * itemsize if not backward else 8 * itemsize + 3 * 2 * 4)
    return 2 ** int(math.log2(vmem_bytes * 2 / 3 / per_place))


def _chunks(length: int, tile: int, limit: int) -> tuple[int, int]:
    """Chunks of whole tiles, alike in length, none longer than the limit."""
    tiles = -(-length // tile)
    chunks = -(-tiles // max(1, limit // tile))
    return -(-tiles // chunks) * tile, chunks


def _pad(kinds, grid: tuple[int, int]):
    """Empty tiles where only padding is."""
    widths = [(0, 0), *((0, size - now) for size, now in zip(grid, kinds.shape[1:]))]
    return (np if isinstance(kinds, np.ndarray) else jnp).pad(kinds, widths)


def _sparsity_bits(mask: AttentionMask, plan: Plan) -> jax.Array:
    """For each key tile and query, one bit for each block of keys that the tile touches."""
    block, lengths = mask.sparsity.block, plan.lengths
    num_blocks = -(-max(plan.real.queries, plan.real.keys) // block)
    layout = mask.sparsity.layout(num_blocks, mask.causal)
    rows = layout[np.minimum(np.arange(lengths.queries) // block, num_blocks - 1)]
    per_tile = max(1, lengths.key_tile // block)
    first = np.arange(lengths.grid[1]) * lengths.key_tile // block
    columns = np.minimum(first[:, None] + np.arange(per_tile), num_blocks - 1)
    bits = (rows[:, columns].astype(np.int64) << np.arange(per_tile)).sum(-1)
    return jnp.asarray(bits.astype(np.uint32).view(np.int32).T[:, None])

"""Which tiles of the T x S matrix a GPU kernel visits, found before it starts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from batiste.pallas_kernels.gpu_blocks import Blocks
from batiste.pallas_kernels.mask import AttentionMask

# For each tile of queries (rows below), the tiles of keys (columns) fall into three kinds:
#
#     causal        window        segments             . not visited
#     o . . .       o . . .       o . . .              o visited, masked element by element
#     # o . .       o o . .       o o . .              # visited, all of it visible: no mask
#     # # o .       . o o .       . o # o
#     # # # o       . . o o       . o o o
#
# The visited ones are taken as one run and in it one run without a mask, so four numbers describe a
# row. Block sparsity has no runs; it gets the list of visited tiles, those without a mask first.
# dk and dv walk the same picture by columns.


class Schedule(NamedTuple):
    """The visits of each tile that a program keeps; R is 1 when all rows of the batch agree.

    bounds_RX4: start of the visited, start and stop of the unmasked, stop of the visited.
    order_RXY: the tile at each of those positions; None when the position is the tile.
    """

    bounds_RX4: jax.Array | np.ndarray
    order_RXY: jax.Array | np.ndarray | None


class _Tiles(NamedTuple):
    """First and last member of each tile, and whether it is cut off by the end of the array."""

    first: np.ndarray
    last: np.ndarray
    cut: np.ndarray


def schedule(
    mask: AttentionMask, lengths: tuple[int, int], blocks: Blocks, by_keys: bool
) -> Schedule:
    """The tiles of keys for each tile of queries, or with `by_keys` the reverse.

    lengths: T and S. Raises ValueError for sparsity together with query offsets.
    """
    # NumPy where it can: the schedule is then a constant and not another kernel to launch.
    dynamic = (mask.prefix_B, mask.query_segments_BT, mask.query_offset_B)
    xp = np if all(x is None for x in dynamic) else jnp
    queries, keys = _tiles(lengths[0], blocks.queries), _tiles(lengths[1], blocks.keys)
    seen_RQK, whole_RQK = _kinds(mask, queries, keys, xp)
    # The end of the array has to be masked on the side that the loop walks along.
    cut_QK = queries.cut[:, None] if by_keys else keys.cut[None]
    whole_RQK = whole_RQK & ~cut_QK[None]
    if mask.query_segments_BT is not None:
        seen, whole = _segment_kinds(mask, blocks)
        seen_RQK, whole_RQK = seen_RQK & seen, whole_RQK & whole
    if mask.sparsity is not None:
        layout_QK = _layout(mask, lengths, blocks)
        seen_RQK, whole_RQK = seen_RQK & layout_QK[None], whole_RQK & layout_QK[None]
    if by_keys:
        seen_RQK, whole_RQK = seen_RQK.swapaxes(1, 2), whole_RQK.swapaxes(1, 2)
    if mask.sparsity is None:
        return Schedule(_runs(seen_RQK, whole_RQK, xp), None)
    return _lists(seen_RQK, whole_RQK, xp)


def _tiles(length: int, block: int) -> _Tiles:
    first = np.arange(-(-length // block), dtype=np.int32) * block
    return _Tiles(first, np.minimum(first + block, length) - 1, first + block > length)


def _kinds(mask: AttentionMask, queries: _Tiles, keys: _Tiles, xp) -> tuple:
    """Visited and unmasked tiles as far as places decide: causal, prefix, window."""
    shape_QK = (queries.first.size, keys.first.size)
    seen_RQK = whole_RQK = np.ones((1, *shape_QK), bool)
    offset_R11 = np.zeros((1, 1, 1), np.int32)
    if mask.query_offset_B is not None:
        offset_R11 = mask.query_offset_B.astype(jnp.int32)[:, None, None]
    first_RQ1, last_RQ1 = (x[None, :, None] + offset_R11 for x in (queries.first, queries.last))
    first_11K, last_11K = keys.first[None, None], keys.last[None, None]
    if mask.causal:
        seen_RQK, whole_RQK = first_11K <= last_RQ1, last_11K <= first_RQ1
        if mask.prefix_B is not None:
            prefix_R11 = mask.prefix_B.astype(jnp.int32)[:, None, None]
            seen_RQK = seen_RQK | (first_11K < prefix_R11)
            whole_RQK = whole_RQK | (last_11K < prefix_R11)
    if mask.window is not None:
        least_RQK, most_RQK = first_RQ1 - last_11K, last_RQ1 - first_11K
        seen_RQK = seen_RQK & (least_RQK < mask.window) & (most_RQK > -mask.window)
        whole_RQK = whole_RQK & (most_RQK < mask.window) & (least_RQK > -mask.window)
    return seen_RQK, whole_RQK


def _segment_kinds(mask: AttentionMask, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """Visited and unmasked tiles as far as the least and greatest segment in a tile can tell."""
    queries = _segment_range(mask.query_segments_BT, blocks.queries)
    keys = _segment_range(mask.key_segments_BS, blocks.keys)
    least_BQ1, most_BQ1, single_BQ1 = (x[:, :, None] for x in queries)
    least_B1K, most_B1K, single_B1K = (x[:, None] for x in keys)
    seen_BQK = (least_BQ1 <= most_B1K) & (least_B1K <= most_BQ1)
    return seen_BQK, seen_BQK & single_BQ1 & single_B1K


def _segment_range(segments_BT: jax.Array, block: int) -> tuple[jax.Array, ...]:
    """Least and greatest segment of each tile, padding apart, and whether there is only one."""
    B, T = segments_BT.shape
    segments_BT = segments_BT.astype(jnp.int32)
    padded_BT = jnp.pad(segments_BT, ((0, 0), (0, -T % block)), mode="edge")
    tiles_BQb = padded_BT.reshape(B, -1, block)
    limits = jnp.iinfo(jnp.int32)
    least_BQ = jnp.where(tiles_BQb == 0, limits.max, tiles_BQb).min(axis=-1)
    most_BQ = jnp.where(tiles_BQb == 0, limits.min, tiles_BQb).max(axis=-1)
    return least_BQ, most_BQ, (least_BQ == most_BQ) & (tiles_BQb != 0).all(axis=-1)


def _layout(mask: AttentionMask, lengths: tuple[int, int], blocks: Blocks) -> np.ndarray:
    """The sparsity's layout with a row for each tile of queries and a column for each of keys."""
    if mask.query_offset_B is not None:
        raise ValueError("The GPU kernels do not combine block sparsity with query offsets.")
    block = mask.sparsity.block
    layout = mask.sparsity.layout(-(-max(lengths) // block), mask.causal)
    query, key = (
        np.arange(-(-length // size)) * size // block
        for length, size in zip(lengths, (blocks.queries, blocks.keys))
    )
    return layout[query][:, key]


def _runs(seen_RXY, whole_RXY, xp):
    """The first and last visited tile, and the first run of unmasked ones between them."""
    size = seen_RXY.shape[-1]
    index_11Y = np.arange(size, dtype=np.int32)[None, None]
    stop_RX = xp.where(seen_RXY, index_11Y + 1, 0).max(axis=-1)
    start_RX = xp.minimum(xp.where(seen_RXY, index_11Y, size).min(axis=-1), stop_RX)
    first_RX = xp.minimum(xp.where(whole_RXY, index_11Y, size).min(axis=-1), stop_RX)
    after_RXY = ~whole_RXY & (index_11Y > first_RX[:, :, None])
    last_RX = xp.minimum(xp.where(after_RXY, index_11Y, size).min(axis=-1), stop_RX)
    bounds = (start_RX, first_RX, xp.maximum(last_RX, first_RX), stop_RX)
    return xp.stack(bounds, axis=-1).astype(np.int32)


def _lists(seen_RXY, whole_RXY, xp) -> Schedule:
    """Unmasked tiles, then the other visited ones, then the rest."""
    kind_RXY = xp.where(whole_RXY, 0, xp.where(seen_RXY, 1, 2))
    order_RXY = xp.argsort(kind_RXY, axis=-1, stable=True).astype(np.int32)
    whole_RX = (kind_RXY == 0).sum(axis=-1)
    seen_RX = (kind_RXY < 2).sum(axis=-1)
    zeros_RX = xp.zeros_like(whole_RX)
    bounds = (zeros_RX, zeros_RX, whole_RX, seen_RX)
    return Schedule(xp.stack(bounds, axis=-1).astype(np.int32), order_RXY)

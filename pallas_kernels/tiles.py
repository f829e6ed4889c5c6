"""Which tiles of queries and keys a mask fills, cuts or empties: what a kernel visits, and how.

A kernel walks, for each tile of queries (or of keys, backward), a list of the tiles opposite that
are not empty: first those in which all sees all, which need no mask; then the one on the diagonal
of a causal mask, whose shape is known when the kernel is built; then the rest, masked element by
element. The order inside a row is free, because the softmax is online and gradients are sums.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from batiste.pallas_kernels.mask import AttentionMask

EMPTY, PARTIAL, DIAGONAL, FULL = range(4)


class Lengths(NamedTuple):
    """Real and padded lengths of queries and keys, and the tile of each."""

    queries: int
    keys: int
    query_tile: int
    key_tile: int

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of queries, tiles of keys."""
        return -(-self.queries // self.query_tile), -(-self.keys // self.key_tile)


class Visits(NamedTuple):
    """For each row: the tiles to visit, and how many are full, diagonal and partial, in this order.

    Both are int32 and end in one dim (tiles opposite; 3); arrays of NumPy where the mask is static.
    """

    order: np.ndarray | jax.Array
    counts: np.ndarray | jax.Array
    kinds: frozenset[int]


def is_static(mask: AttentionMask) -> bool:
    """Whether the mask is known when the kernel is built: no array decides."""
    arrays = (mask.prefix_B, mask.query_segments_BT, mask.query_offset_B)
    return all(array is None for array in arrays)


def tile_kinds(mask: AttentionMask, lengths: Lengths):
    """The kind of each tile, int32 (B or 1, tiles of queries, tiles of keys)."""
    num_query, num_key = lengths.grid
    xp = np if is_static(mask) else jnp
    query = xp.arange(num_query, dtype=np.int32)[None, :, None] * lengths.query_tile
    key = xp.arange(num_key, dtype=np.int32)[None, None] * lengths.key_tile
    if mask.query_offset_B is not None:
        query = query + mask.query_offset_B[:, None, None]
    last_query, last_key = query + (lengths.query_tile - 1), key + (lengths.key_tile - 1)
    some = (query >= query) & (key >= key)
    every = some & (last_key < lengths.keys)
    if mask.causal:
        some_past, every_past = key <= last_query, last_key <= query
        if mask.prefix_B is not None:
            prefix = mask.prefix_B[:, None, None]
            some_past, every_past = some_past | (key < prefix), every_past | (last_key < prefix)
        some, every = some & some_past, every & every_past
    if mask.window is not None:
        some = some & (query - last_key < mask.window) & (key - last_query < mask.window)
        every = every & (last_query - key < mask.window) & (last_key - query < mask.window)
    if mask.query_segments_BT is not None:
        near, same = _segments(mask, lengths)
        some, every = some & near, every & same
    if mask.sparsity is not None:
        near, same = _sparsity(mask, lengths)
        some, every = some & near, every & same
    kinds = xp.where(every, FULL, xp.where(some, PARTIAL, EMPTY))
    if has_diagonal(mask, lengths):
        on_diagonal = (np.arange(num_query)[:, None] == np.arange(num_key)[None])[None]
        kinds = xp.where(on_diagonal & (kinds == PARTIAL), DIAGONAL, kinds)
    return kinds.astype(np.int32)


def has_diagonal(mask: AttentionMask, lengths: Lengths) -> bool:
    """Whether tiles on the diagonal are cut by causality alone (and perhaps by segments)."""
    square = lengths.query_tile == lengths.key_tile
    reaches = mask.window is None or mask.window >= lengths.query_tile
    plain = mask.prefix_B is None and mask.sparsity is None and mask.query_offset_B is None
    # Queries past the last key would see keys that are padding.
    return mask.causal and square and reaches and plain and lengths.queries <= lengths.keys


def visits(kinds, chunk: int, diagonal: bool) -> Visits:
    """The lists for kinds (..., tiles opposite), which are held `chunk` at a time.

    diagonal: whether there may be diagonal tiles, for kinds that are known on the device alone.
    The last dim becomes (chunks, chunk), and an entry counts from the start of its chunk.
    """
    xp = np if isinstance(kinds, np.ndarray) else jnp
    possible = {PARTIAL, FULL} | ({DIAGONAL} if diagonal else set())
    present = set(np.unique(kinds)) if xp is np else possible
    kinds = kinds.reshape(*kinds.shape[:-1], -1, chunk)
    order = xp.argsort(-kinds, axis=-1, stable=True).astype(np.int32)
    counts = xp.stack([(kinds == kind).sum(-1) for kind in (FULL, DIAGONAL, PARTIAL)], axis=-1)
    return Visits(order, counts.astype(np.int32), frozenset(int(kind) for kind in present))


def _segments(mask: AttentionMask, lengths: Lengths):
    """Tiles whose ranges of segments overlap, and tiles within one segment."""

    def ranges(segments, length, tile):
        padded = jnp.pad(segments, ((0, 0), (0, -length % tile)))
        tiled = padded.reshape(segments.shape[0], -1, tile)
        # Padding is no segment: counted as one below the first, it would reach from there.
        first = jnp.where(tiled == 0, jnp.iinfo(jnp.int32).max, tiled).min(axis=-1)
        return first, tiled.max(axis=-1), (tiled > 0).all(axis=-1)

    T, S, *tiles = lengths
    low_query, high_query, real_query = ranges(mask.query_segments_BT, T, tiles[0])
    low_key, high_key, real_key = ranges(mask.key_segments_BS, S, tiles[1])
    low_query, high_query = low_query[:, :, None], high_query[:, :, None]
    low_key, high_key = low_key[:, None], high_key[:, None]
    some = (low_query <= high_key) & (low_key <= high_query)
    same = (low_query == high_query) & (low_key == high_key) & (low_query == low_key)
    return some, same & real_query[:, :, None] & real_key[:, None]


def _sparsity(mask: AttentionMask, lengths: Lengths):
    block = mask.sparsity.block
    layout = mask.sparsity.layout(-(-max(lengths.queries, lengths.keys) // block), mask.causal)
    places = [np.minimum(np.arange(count * tile), len(layout) * block - 1) // block
              for count, tile in zip(lengths.grid, lengths[2:])]
    rows = layout[places[0]].reshape(lengths.grid[0], lengths.query_tile, -1)
    some, every = (reduce(rows, axis=1)[:, places[1]] for reduce in (np.any, np.all))
    columns = (*lengths.grid, lengths.key_tile)
    return some.reshape(columns).any(-1)[None], every.reshape(columns).all(-1)[None]

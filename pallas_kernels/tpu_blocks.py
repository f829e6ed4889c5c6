"""How attention is cut up on each generation of TPU: one table, filled by the static tool.

To extend it, run `python benchmarks/tpu_static.py --sweep --chip=NAME`, which compiles candidates
and prints their cycles, and write the best row here (benchmarks/README.md, NOTES.md).
"""

from typing import NamedTuple


class Blocks(NamedTuple):
    """Queries and keys of a tile, of a unit of the pipeline inside it, and keys of one product.

    A tile is what a loop iteration handles; it is worked off in units so that the matrix units and
    the vector units have something to do at the same time.
    """

    query_tile: int
    key_tile: int
    query_unit: int
    key_unit: int
    key_piece: int


class Passes(NamedTuple):
    """Blocks forward and backward."""

    forward: Blocks
    backward: Blocks


class Chip(NamedTuple):
    """Bytes of VMEM that a kernel may use, and blocks for head dims up to 128 and up to 256."""

    vmem_bytes: int
    narrow: Passes
    wide: Passes


MIB = 2**20
V5 = Passes(Blocks(1024, 1024, 512, 1024, 64), Blocks(1024, 1024, 128, 512, 128))
V6 = Passes(Blocks(1024, 1024, 256, 512, 128), Blocks(1024, 1024, 256, 512, 128))
V6_WIDE = Passes(Blocks(1024, 1024, 256, 512, 256), Blocks(1024, 1024, 256, 256, 256))
CHIPS = {
    "v5e": Chip(100 * MIB, V5, V5),
    "v5p": Chip(56 * MIB, V5, V5),
    "v6e": Chip(100 * MIB, V6, V6_WIDE),
    "tpu7x": Chip(56 * MIB, V6._replace(forward=V6_WIDE.forward), V6_WIDE),
}


def blocks_for(chip: str, head_dim: int, backward: bool) -> Blocks:
    """The table's blocks."""
    passes = CHIPS[chip].narrow if head_dim <= 128 else CHIPS[chip].wide
    return passes.backward if backward else passes.forward


def fit(blocks: Blocks, num_queries: int, num_keys: int) -> Blocks:
    """Blocks for these lengths: tiles shrink (to 128 at the least) until little is padding."""
    query_tile = _shrink(blocks.query_tile, num_queries)
    key_tile = _shrink(blocks.key_tile, num_keys)
    if blocks.query_tile == blocks.key_tile and num_queries == num_keys:
        query_tile = key_tile = min(query_tile, key_tile)
    key_unit = min(blocks.key_unit, key_tile)
    return Blocks(
        query_tile, key_tile, min(blocks.query_unit, query_tile), key_unit,
        min(blocks.key_piece, key_unit),
    )


def _shrink(tile: int, length: int) -> int:
    """The largest halving of the tile that pads less than an eighth of the length."""
    while tile > 128 and -length % tile > length // 8:
        tile //= 2
    return tile

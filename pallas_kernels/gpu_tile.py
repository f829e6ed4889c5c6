"""What the GPU kernels share: their inputs, how they load, and the arithmetic of one tile."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from batiste.pallas_kernels.dropout import kept
from batiste.pallas_kernels.gpu_blocks import Blocks
from batiste.pallas_kernels.gpu_schedule import Schedule, schedule
from batiste.pallas_kernels.operands import Operands, Options

# Exponentials are base 2, which is what the hardware has; logits carry this factor.
LOG2_E = math.log2(math.e)


class Inputs(NamedTuple):
    """Arrays outside a kernel, references inside; None is absent."""

    q_BTNH: jax.Array
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    schedule: Schedule
    prefix_B: jax.Array | None
    offset_B: jax.Array | None
    query_segments_BT: jax.Array | None
    key_segments_BS: jax.Array | None
    sinks_N: jax.Array | None
    slopes_N: jax.Array | None
    seeds_BN: jax.Array | None
    g_BTNH: jax.Array | None = None
    lse_BNT: jax.Array | None = None
    delta_BNT: jax.Array | None = None


class Setting(NamedTuple):
    """What a kernel is built for."""

    options: Options
    blocks: Blocks
    causal: bool
    window: int | None
    batch: int
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int


class Row(NamedTuple):
    """Scalars of one row of the batch and one head."""

    prefix: jax.Array | None
    offset: jax.Array | None
    slope: jax.Array | None
    seed: jax.Array | None


class Kept(NamedTuple):
    """The side of the tile that a program keeps: places, which of them exist, their segments.

    exists: None when no tile is cut. segments: None without segments.
    """

    place: jax.Array
    exists: jax.Array | None
    segments: jax.Array | None


class Tile(NamedTuple):
    """Coordinates of a tile's elements; queries and keys lie along different axes of two.

    query, key: places in their own arrays. *_segments: None in a tile without a mask.
    """

    query: jax.Array
    key: jax.Array
    query_segments: jax.Array | None
    key_segments: jax.Array | None


def prepare(
    options: Options, operands: Operands, blocks: Blocks, by_keys: bool
) -> tuple[Setting, Inputs]:
    """A kernel's setting, and its inputs without those of the backward pass."""
    (B, T, N, H), (S, K) = operands.q_BTNH.shape, operands.k_BSKH.shape[1:3]
    mask = operands.mask
    setting = Setting(options, blocks, mask.causal, mask.window, B, T, S, N, K, H,
                      operands.q_BTNH.dtype.itemsize)
    plan = schedule(mask, (T, S), blocks, by_keys)
    inputs = Inputs(
        operands.q_BTNH, operands.k_BSKH, operands.v_BSKH,
        Schedule(*(None if x is None else jnp.asarray(x) for x in plan)),
        *(None if x is None else x.astype(jnp.int32) for x in (
            mask.prefix_B, mask.query_offset_B, mask.query_segments_BT, mask.key_segments_BS)),
        *(None if x is None else x.astype(jnp.float32) * LOG2_E for x in (
            operands.sinks_N, operands.alibi_slopes_N)),
        operands.dropout_seeds_BN,
    )
    return setting, inputs


def optional_spec(array: jax.Array | None, block: tuple, index: object) -> pl.BlockSpec | None:
    """A block spec, or None for an absent array."""
    return None if array is None else pl.BlockSpec(block, index)


def schedule_spec(inputs: Inputs, where: object) -> Schedule:
    """Specs of the schedule; `where` maps the grid to the batch's row and the kept tile."""

    def spec(array_RXY):
        if array_RXY is None:
            return None
        shared = array_RXY.shape[0] == 1

        def index(*grid):
            row, tile = where(*grid)
            return (0 if shared else row, tile, 0)

        return pl.BlockSpec((None, None, array_RXY.shape[2]), index)

    return Schedule(*map(spec, inputs.schedule))


def pieces(setting: Setting) -> list[slice]:
    """The head dim cut into powers of two, which is all that Triton has: 80 is 64 and 16.

    Padding 80 to 128 would multiply 60 % more and need a mask in every load. In fp32 a piece is at
    most 32: without tensor cores a product's operands lie in registers, and 256 of them spill.
    """
    H = setting.head_dim
    bits = [1 << i for i in reversed(range(H.bit_length())) if H >> i & 1]
    if setting.itemsize == 4:
        bits = [min(size, 32) for size in bits for _ in range(max(1, size // 32))]
    return [pl.ds(sum(bits[:i]), size) for i, size in enumerate(bits)]


def load(ref: object, index: tuple, valid: jax.Array | None, setting: Setting) -> list[jax.Array]:
    """Rows of q, k, v or the gradient, a piece of the head dim each; zeros where not valid."""
    options = {} if valid is None else dict(mask=valid[:, None], other=0.0)
    return [
        plgpu.load(ref.at[(*index, piece)], **options) for piece in pieces(setting)
    ]


def load_vector(ref: object, index: tuple, valid: jax.Array | None, other: object) -> jax.Array:
    """A vector, with `other` where not valid."""
    options = {} if valid is None else dict(mask=valid, other=other)
    return plgpu.load(ref.at[index], **options)


def store(ref: object, values: list[jax.Array], valid: jax.Array | None) -> None:
    """Writes the pieces of a tile of rows."""
    options = {} if valid is None else dict(mask=valid[:, None])
    start = 0
    for value in values:
        place = (slice(None), pl.ds(start, value.shape[1]))
        plgpu.store(ref.at[place], value.astype(ref.dtype), **options)
        start += value.shape[1]


def kept_side(tile: jax.Array, length: int, block: int, segments_ref: object) -> Kept:
    """Tile number `tile` of the side that a program keeps; the reference holds its segments."""
    place = tile * block + jnp.arange(block, dtype=jnp.int32)
    exists = below(place, length, block)
    if segments_ref is None:
        return Kept(place, exists, None)
    return Kept(place, exists, load_vector(segments_ref, (slice(None),), exists, 0))


def below(index: jax.Array, length: int, block: int) -> jax.Array | None:
    """Which of a tile's rows exist; None when no tile is cut."""
    return index < length if length % block else None


def dot(a: jax.Array, b: jax.Array, trans_b: bool = False) -> jax.Array:
    """A product in fp32; fp32 inputs are not rounded to tf32, which is Triton's default."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plgpu.dot(a, b, trans_b=trans_b, precision=precision)


def products(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    """Rows of a times rows of b, summed over the pieces of the head dim."""
    total, *rest = (dot(x, y, trans_b=True) for x, y in zip(a, b))
    return functools.reduce(lambda x, y: x + y, rest, total)


def walk(inputs: Inputs, step: object, carry: object, can_mask: bool) -> object:
    """Runs `step(masked, tile, carry)` over the schedule: tiles without a mask, then the others.

    The order does not matter to a sum nor to a softmax that keeps its peak.
    """
    bounds_ref, order_ref = inputs.schedule
    seen_start, whole_start, whole_stop, seen_stop = (bounds_ref[i] for i in range(4))

    def visit(masked, position, carry):
        tile = position if order_ref is None else order_ref[position]
        return step(masked, tile, carry)

    carry = jax.lax.fori_loop(whole_start, whole_stop, functools.partial(visit, False), carry)
    if not can_mask:
        return carry
    before = whole_start - seen_start

    def visit_masked(i, carry):
        skipped = jnp.where(i < before, 0, whole_stop - whole_start)
        return visit(True, seen_start + i + skipped, carry)

    return jax.lax.fori_loop(0, before + seen_stop - whole_stop, visit_masked, carry)


def can_mask(inputs: Inputs, setting: Setting, by_keys: bool) -> bool:
    """Whether the schedule can hold tiles with a mask."""
    length = setting.num_queries if by_keys else setting.num_keys
    block = setting.blocks.queries if by_keys else setting.blocks.keys
    some = setting.causal or setting.window is not None or inputs.query_segments_BT is not None
    return some or length % block != 0


class Logits(NamedTuple):
    """Logits times log2(e) are `scores * factor`, -inf where hidden; `factor` is above 0.

    Apart because the maximum can be taken before the factor, and then scaling and subtracting the
    maximum are one instruction. tanh: the soft cap's, None without one.
    """

    scores: jax.Array
    factor: float
    tanh: jax.Array | None


def logits(
    products: jax.Array, tile: Tile, row: Row, setting: Setting, masked: bool
) -> Logits:
    """From products of queries and keys to logits: scale, soft cap, ALiBi, mask."""
    options, tanh = setting.options, None
    scores, factor = products, options.scale * LOG2_E
    if options.soft_cap is not None:
        # tanh(x) = 1 - 2 / (1 + e^2x): one exponential, no branches, off by an fp32 step of 1.
        power = jnp.exp2(products * (2 * LOG2_E * options.scale / options.soft_cap))
        tanh = 1 - 2 / (1 + power)
        scores, factor = tanh, options.soft_cap * LOG2_E
    if row.slope is not None or factor <= 0:
        scores, factor = scores * factor, 1.0
    place = tile.query if row.offset is None else tile.query + row.offset
    if row.slope is not None:
        scores -= row.slope * jnp.abs(place - tile.key).astype(jnp.float32)
    visible = _visible(tile, place, row, setting) if masked else None
    if visible is not None:
        scores = jnp.where(visible, scores, -jnp.inf)
    return Logits(scores, factor, tanh)


def keep(tile: Tile, row: Row, setting: Setting) -> jax.Array:
    """What dropout leaves of a tile."""
    place = tile.query if row.offset is None else tile.query + row.offset
    return kept(row.seed, place, tile.key, setting.options.dropout_rate)


def score_gradients(
    scores: jax.Array, g_values: jax.Array, around: tuple, setting: Setting, masked: bool
) -> tuple[jax.Array, jax.Array]:
    """Probabilities after dropout, and the gradient of the products; both without constant factors.

    scores: queries times keys. g_values: output gradients times values.
    around: Tile, Row, the rows' log-sum-exp in base 2 and their delta.
    """
    tile, row, lse, delta = around
    scores, factor, tanh = logits(scores, tile, row, setting, masked)
    probabilities = dropped = jnp.exp2(scores * factor - lse)
    if row.seed is not None:
        stays = keep(tile, row, setting)
        dropped = jnp.where(stays, probabilities, 0.0)
        g_values = jnp.where(stays, g_values * (1 / (1 - setting.options.dropout_rate)), 0.0)
    gradient = probabilities * (g_values - delta)
    return dropped, gradient if tanh is None else gradient * (1 - tanh * tanh)


def _visible(tile: Tile, place: jax.Array, row: Row, setting: Setting) -> jax.Array | None:
    """The mask on one tile. Block sparsity is not in it: it shows or hides whole tiles."""
    conditions = []
    if setting.num_keys % setting.blocks.keys:
        conditions.append(tile.key < setting.num_keys)
    if setting.causal:
        past = tile.key <= place
        conditions.append(past if row.prefix is None else past | (tile.key < row.prefix))
    if setting.window is not None:
        conditions.append(jnp.abs(place - tile.key) < setting.window)
    if tile.query_segments is not None:
        same = tile.query_segments == tile.key_segments
        conditions.append(same & (tile.query_segments != 0))
    return functools.reduce(lambda x, y: x & y, conditions) if conditions else None

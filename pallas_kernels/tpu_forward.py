"""Flash attention forward for TPU.

             queries of the tile, on lanes               One grid step holds a tile of queries and
           +--------+--------+--------+--------+          a chunk of keys and values (most often all
    keys   | unit 0 | unit 1 | unit 2 | unit 3 |          of them) in VMEM, and walks the list of key
    on     +--------+--------+--------+--------+          tiles that its queries see.
    sub-   | unit 4 | unit 5 | unit 6 | unit 7 |
    lanes  +--------+--------+--------+--------+          scores  s(S,T)  = k(S,H) q(H,T)
                                                          output  o(H,T) += v(H,S) p(S,T)

Keys lie on sublanes and queries on lanes, so that the softmax reduces over registers and sublanes
(no cross-lane units), its statistics are rows that broadcast for nothing, and p is the stationary
operand of the second product in the shape in which it leaves the first: on a 256-wide matrix unit
and H = 128 that product costs half of what p(T,S) v(S,H) does. The accumulator is o transposed.
"""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from batiste.pallas_kernels import tpu_logits
from batiste.pallas_kernels.tiles import FULL
from batiste.pallas_kernels.tpu_logits import LOG2_E, LOWEST
from batiste.pallas_kernels.tpu_pipeline import Stages, Unit
from batiste.pallas_kernels.tpu_plan import Plan, dot, piece_at, visit

LN_2 = math.log(2)


def forward_call(plan: Plan, scalars: dict, q_BNHT, k_BKSH, v_BKHS, vectors: dict):
    """The kernel on padded operands; returns out_BNHT and lse_BN1T (natural logarithm)."""
    B, N, H, T = q_BNHT.shape
    G, heads, tile = N // k_BKSH.shape[1], plan.heads, plan.blocks.query_tile
    unit = (plan.blocks.key_unit, plan.blocks.query_unit)
    specs = _specs(plan, H, G)
    inputs = {"q": q_BNHT, "k": k_BKSH, "v": v_BKHS} | vectors
    outputs = {
        "out": jax.ShapeDtypeStruct((B, N, H, T), q_BNHT.dtype),
        "lse": jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
    }
    scratch = {
        "acc": ((heads, H, tile), jnp.float32), "top": ((heads, 1, tile), jnp.float32),
        "sum": ((heads, 1, tile), jnp.float32), "scores": ((2, *unit), jnp.float32),
        "weights": ((2, *unit), q_BNHT.dtype), "unit_top": ((2, 8, unit[1]), jnp.float32),
        "decay": ((2, 1, unit[1]), jnp.float32),
    }
    call = pl.pallas_call(
        functools.partial(_kernel, plan, (*scalars, *inputs, *outputs, *scratch)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, N // heads, T // tile, plan.chunks),
            in_specs=[specs[name] for name in inputs],
            out_specs=[specs[name] for name in outputs],
            scratch_shapes=[pltpu.VMEM(*shape) for shape in scratch.values()],
        ),
        out_shape=list(outputs.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=plan.vmem_bytes,
        ),
        interpret=plan.interpret,
        name="flash_forward",
    )
    return call(*scalars.values(), *inputs.values())


def _specs(plan: Plan, H: int, G: int) -> dict[str, pl.BlockSpec]:
    """The block of each input and output, by name; a grid step is b, n, i, c: row, heads side by
    side, tile of queries, chunk of keys."""
    tile, chunk, heads, key_heads = plan.blocks.query_tile, plan.chunk, plan.heads, plan.key_heads

    def spec(block, index):
        def at(b, n, i, c, *_):
            # `//` would ask the machine which chip it has.
            return index(b, n, jax.lax.div(n * np.int32(heads), np.int32(G * key_heads)), i, c)

        return pl.BlockSpec(block, at)

    queries = spec((1, heads, H, tile), lambda b, n, k, i, c: (b, n, 0, i))
    return {
        "q": queries, "out": queries,
        "k": spec((1, key_heads, chunk, H), lambda b, n, k, i, c: (b, k, c, 0)),
        "v": spec((1, key_heads, H, chunk), lambda b, n, k, i, c: (b, k, 0, c)),
        "lse": spec((1, heads, 1, tile), lambda b, n, k, i, c: (b, n, 0, i)),
        "query_segments": spec((1, 1, tile), lambda b, n, k, i, c: (b, 0, i)),
        "key_segments": spec((1, chunk, 1), lambda b, n, k, i, c: (b, c, 0)),
        "sparsity_bits": spec(
            (chunk // plan.blocks.key_tile, 1, tile), lambda b, n, k, i, c: (c, 0, i)
        ),
    }


def _kernel(plan: Plan, names: tuple[str, ...], *refs) -> None:
    r = SimpleNamespace(**dict(zip(names, refs)))
    b, n, i, c = (pl.program_id(axis) for axis in range(4))
    row = ((b if plan.varies_by_row else 0) * pl.num_programs(2) + i) * plan.chunks + c
    counts = [r.counts[3 * row + index] for index in range(3)]
    r.head, r.num_heads = n * plan.heads, pl.num_programs(1) * plan.heads
    r.first_query = i * plan.blocks.query_tile + (r.offset[b] if hasattr(r, "offset") else 0)
    r.first_key = c * plan.chunk
    r.sparsity_row = lambda tile: tile

    def tile_at(index):
        return r.order[row * (plan.chunk // plan.blocks.key_tile) + index]

    pl.when(c == 0)(lambda: _begin(r, plan.heads))
    visit(plan, functools.partial(_stages, r), tile_at, counts)
    pl.when(c == plan.chunks - 1)(lambda: _finish(r))


def _begin(r, heads: int) -> None:
    r.acc[...] = jnp.zeros_like(r.acc)
    has_sinks = hasattr(r, "sinks")
    r.sum[...] = jnp.full_like(r.sum, 1.0 if has_sinks else 0.0)
    for head in range(heads):
        lowest = r.sinks[r.head + head] * LOG2_E if has_sinks else LOWEST
        r.top[head] = jnp.full_like(r.top[head], lowest)


def _finish(r) -> None:
    total = r.sum[...]
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    r.out[0] = (r.acc[...] / total).astype(r.out.dtype)
    r.lse[0] = jnp.where(seen, r.top[...] * LN_2 + jnp.log(total), -jnp.inf)


def _stages(r, plan: Plan, kind: int) -> Stages:
    """The pipeline for tiles of one kind; a tile is its index inside the chunk."""
    blocks, wide = plan.blocks, slice(0, plan.blocks.query_unit)
    pieces = [slice(p, p + blocks.key_piece) for p in range(0, blocks.key_unit, blocks.key_piece)]

    def strip(unit: Unit) -> slice:
        return slice(unit.query, unit.query + blocks.query_unit)

    def keys_of(unit: Unit) -> int:
        return unit.head if plan.key_heads > 1 else 0

    def keys(tile, unit: Unit, piece: slice) -> pl.Slice:
        start = tile * blocks.key_tile + unit.key + piece.start
        size = piece.stop - piece.start
        return pl.ds(pl.multiple_of(start, size), size)

    def first(tile, unit, slot):
        tops = []
        for piece in pieces:
            rows = keys(tile, unit, piece)
            scores = dot(r.k[0, keys_of(unit), rows, :], r.q[0, unit.head, :, strip(unit)])
            part = plan.kind_of(kind, unit, piece)
            if plan.reshapes or part != FULL:
                where = piece_at(plan, r, (tile, unit, piece), (strip(unit), rows))
                scores, _ = tpu_logits.logits(plan.rules, where, scores, part)
            r.scores[slot, piece, wide] = scores
            tops.append(scores.reshape(-1, 8, scores.shape[1]).max(axis=0))
        r.unit_top[slot, :, wide] = functools.reduce(jnp.maximum, tops)

    def middle(tile, unit, slot):
        before = r.top[unit.head, :, strip(unit)]
        top = jnp.maximum(before, r.unit_top[slot, :, wide].max(axis=0, keepdims=True))
        decay = jnp.exp2(before - top)
        r.top[unit.head, :, strip(unit)], r.decay[slot, :, wide] = top, decay
        sums = []
        for piece in pieces:
            weights = jnp.exp2(r.scores[slot, piece, wide] - top)
            sums.append(weights.reshape(-1, 8, weights.shape[1]).sum(axis=0))
            if plan.rules.dropout_rate is not None:
                rows = keys(tile, unit, piece)
                where = piece_at(plan, r, (tile, unit, piece), (strip(unit), rows))
                weights = tpu_logits.dropped(plan.rules, where, weights)
            r.weights[slot, piece, wide] = weights.astype(r.weights.dtype)
        total = functools.reduce(jnp.add, sums).sum(axis=0, keepdims=True)
        r.sum[unit.head, :, strip(unit)] = r.sum[unit.head, :, strip(unit)] * decay + total

    def last(tile, unit, slot):
        mine = slice(0, blocks.key_unit)
        added = dot(r.v[0, keys_of(unit), :, keys(tile, unit, mine)], r.weights[slot, mine, wide])
        rows = (unit.head, slice(None), strip(unit))
        r.acc[rows] = r.acc[rows] * r.decay[slot, :, wide] + added

    def idle():
        r.weights[1] = jnp.zeros_like(r.weights[1])
        r.decay[1] = jnp.ones_like(r.decay[1])

    return Stages(first, middle, last, idle)

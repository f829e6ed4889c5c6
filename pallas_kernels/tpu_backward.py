"""Flash attention backward for TPU: all three gradients in one kernel, five products a tile.

              queries of the chunk, on lanes        One grid step holds a tile of keys and values
            +------+------+------+------+           and a chunk of queries (most often all of
   tile of  | tile | tile | tile | tile |           them), and walks the list of query tiles that
   keys     +------+------+------+------+           see its keys.

      s(S,T)  = k(S,H) q(H,T)        dp(S,T) = v(S,H) do(H,T)         p = exp2(s - lse)
      dv(S,H) += p(S,T) do(T,H)      dk(S,H) += ds(S,T) q(T,H)        ds = p (dp - delta)
      dq(H,T) += k(H,S) ds(S,T)

Every product finds its operands in the shape in which they are, because q, do and k come in two
layouts. The gradients are fp32 output blocks that stay in VMEM: dq for the chunk of queries while
the tiles of keys pass, dk and dv for a chunk of keys while the heads of a group pass, so nothing is
computed twice and K and V are never repeated.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from batiste.pallas_kernels import tpu_logits
from batiste.pallas_kernels.tiles import FULL
from batiste.pallas_kernels.tpu_pipeline import Stages, Unit
from batiste.pallas_kernels.tpu_plan import Plan, dot, piece_at, visit


def backward_call(plan: Plan, scalars: dict, heads: dict, keys: dict, vectors: dict):
    """The kernel on padded operands; returns dq_CBNHT (summed over C by the caller), dk, dv_BKSH.

    heads: q_BNHT, q_BNTH, do_BNHT, do_BNTH, lse_BN1T (base 2), delta_BN1T. keys: k_BKSH, v_BKSH,
    k_BKHS. C counts chunks of keys. Gradients are fp32.
    """
    B, N, H, T = heads["q_BNHT"].shape
    K, S = keys["k_BKSH"].shape[1:3]
    G, C, tiles = N // K, S // plan.key_chunk, plan.key_chunk // plan.blocks.key_tile
    in_specs, out_specs = _specs(plan, H, G, tiles)
    inputs = {name: (array, in_specs[name]) for name, array in (heads | keys | vectors).items()}
    outputs = {"dq": (C, B, N, H, T), "dk": (B, K, S, H), "dv": (B, K, S, H)}
    unit, dtype = (plan.blocks.key_unit, plan.blocks.query_unit), keys["k_BKSH"].dtype
    scratch = {
        "scores": ((2, *unit), jnp.float32), "dp": ((2, *unit), jnp.float32),
        "p": ((2, *unit), dtype), "ds": ((2, *unit), dtype),
    }
    call = pl.pallas_call(
        functools.partial(_kernel, plan, (*scalars, *inputs, *outputs, *scratch)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, K, C, G, plan.chunks, tiles),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[out_specs[name] for name in outputs],
            scratch_shapes=[pltpu.VMEM(*shape) for shape in scratch.values()],
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", *("arbitrary",) * 3),
            vmem_limit_bytes=plan.vmem_bytes,
        ),
        interpret=plan.interpret,
        name="flash_backward",
    )
    return call(*scalars.values(), *(array for array, _ in inputs.values()))


def _specs(plan: Plan, H: int, G: int, tiles: int) -> tuple[dict, dict]:
    """The block of each input and output, by name; a grid step is b, k, c, g, r, j: row, key head,
    chunk of keys, head in the group, chunk of queries, tile of keys."""
    chunk, tile = plan.chunk, plan.blocks.key_tile

    def spec(block, index):
        def at(b, k, c, g, r, j, *_):
            return index(b, k, c, k * G + g, r, c * tiles + j)

        return pl.BlockSpec(block, at)

    on_lanes = spec((1, 1, H, chunk), lambda b, k, c, n, r, j: (b, n, 0, r))
    on_sublanes = spec((1, 1, chunk, H), lambda b, k, c, n, r, j: (b, n, r, 0))
    row = spec((1, 1, 1, chunk), lambda b, k, c, n, r, j: (b, n, 0, r))
    keys = spec((1, 1, tile, H), lambda b, k, c, n, r, j: (b, k, j, 0))
    key_gradient = spec((1, 1, plan.key_chunk, H), lambda b, k, c, n, r, j: (b, k, c, 0))
    inputs = {
        "q_BNHT": on_lanes, "q_BNTH": on_sublanes, "do_BNHT": on_lanes, "do_BNTH": on_sublanes,
        "lse_BN1T": row, "delta_BN1T": row, "k_BKSH": keys, "v_BKSH": keys,
        "k_BKHS": spec((1, 1, H, tile), lambda b, k, c, n, r, j: (b, k, 0, j)),
        "query_segments": spec((1, 1, chunk), lambda b, k, c, n, r, j: (b, 0, r)),
        "key_segments": spec((1, tile, 1), lambda b, k, c, n, r, j: (b, j, 0)),
        "sparsity_bits": spec((1, 1, chunk), lambda b, k, c, n, r, j: (j, 0, r)),
    }
    dq = spec((1, 1, 1, H, chunk), lambda b, k, c, n, r, j: (c, b, n, 0, r))
    return inputs, {"dq": dq, "dk": key_gradient, "dv": key_gradient}


def _kernel(plan: Plan, names: tuple[str, ...], *refs) -> None:
    x = SimpleNamespace(**dict(zip(names, refs)))
    b, k, c, g, r, j = (pl.program_id(axis) for axis in range(6))
    tiles = pl.num_programs(5)
    row = (b if plan.varies_by_row else 0) * pl.num_programs(2) * tiles + c * tiles + j
    row = row * plan.chunks + r
    counts = [x.counts[3 * row + index] for index in range(3)]
    x.head, x.num_heads = k * pl.num_programs(3) + g, pl.num_programs(1) * pl.num_programs(3)
    x.first_query = r * plan.chunk + (x.offset[b] if hasattr(x, "offset") else 0)
    x.first_key = c * plan.key_chunk
    x.key_tile = j
    x.sparsity_row = lambda tile: 0

    def tile_at(index):
        return x.order[row * (plan.chunk // plan.blocks.query_tile) + index]

    pl.when(j == 0)(lambda: _zero(x.dq))
    pl.when((g == 0) & (r == 0) & (j == 0))(lambda: _zero(x.dk, x.dv))
    visit(plan, functools.partial(_stages, x), tile_at, counts)


def _zero(*refs) -> None:
    for ref in refs:
        ref[...] = jnp.zeros_like(ref)


def _stages(x, plan: Plan, kind: int) -> Stages:
    """The pipeline for tiles of one kind; a tile is the index of its queries inside the chunk."""
    blocks, rules = plan.blocks, plan.rules
    wide, tall = slice(0, blocks.query_unit), slice(0, blocks.key_unit)
    pieces = [slice(p, p + blocks.key_piece) for p in range(0, blocks.key_unit, blocks.key_piece)]

    def queries(tile, unit: Unit):
        start = tile * blocks.query_tile + unit.query
        return pl.ds(pl.multiple_of(start, blocks.query_unit), blocks.query_unit)

    def first(tile, unit, slot):
        columns = queries(tile, unit)
        for piece in pieces:
            rows = slice(unit.key + piece.start, unit.key + piece.stop)
            x.scores[slot, piece, wide] = dot(x.k_BKSH[0, 0, rows], x.q_BNHT[0, 0, :, columns])
            x.dp[slot, piece, wide] = dot(x.v_BKSH[0, 0, rows], x.do_BNHT[0, 0, :, columns])

    def middle(tile, unit, slot):
        columns = queries(tile, unit)
        lse, delta = x.lse_BN1T[0, 0, :, columns], x.delta_BN1T[0, 0, :, columns]
        for piece in pieces:
            scores, dp = x.scores[slot, piece, wide], x.dp[slot, piece, wide]
            bent = where = None
            part = plan.kind_of(kind, unit, piece)
            if plan.reshapes or part != FULL or rules.dropout_rate is not None:
                rows = slice(unit.key + piece.start, unit.key + piece.stop)
                moved = Unit(tile * blocks.query_tile + unit.query, unit.key)
                where = piece_at(plan, x, (x.key_tile, moved, piece), (columns, rows))
                scores, bent = tpu_logits.logits(rules, where, scores, part)
            p = jnp.exp2(scores - lse)
            ds = p * (tpu_logits.dropped(rules, where, dp) - delta)
            if bent is not None:
                ds = ds * (1.0 - bent * bent)
            x.p[slot, piece, wide] = tpu_logits.dropped(rules, where, p).astype(x.p.dtype)
            x.ds[slot, piece, wide] = ds.astype(x.ds.dtype)

    def last(tile, unit, slot):
        columns = queries(tile, unit)
        mine = slice(unit.key, unit.key + blocks.key_unit)
        start = x.key_tile * blocks.key_tile + unit.key
        rows = pl.ds(pl.multiple_of(start, blocks.key_unit), blocks.key_unit)
        x.dv[0, 0, rows, :] += dot(x.p[slot, tall, wide], x.do_BNTH[0, 0, columns, :])
        x.dk[0, 0, rows, :] += dot(x.ds[slot, tall, wide], x.q_BNTH[0, 0, columns, :])
        x.dq[0, 0, 0, :, columns] += dot(x.k_BKHS[0, 0, :, mine], x.ds[slot, tall, wide])

    def idle():
        x.p[1] = jnp.zeros_like(x.p[1])
        x.ds[1] = jnp.zeros_like(x.ds[1])

    return Stages(first, middle, last, idle)

"""Block sizes of the GPU kernels: one table, and how it is read for shapes it does not list."""

from typing import NamedTuple

from batiste.pallas_kernels.operands import Operands, Options


class Blocks(NamedTuple):
    """One kernel's tile of the T x S matrix, and how Triton compiles it."""

    queries: int
    keys: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """The block sizes of the three kernels."""

    forward: Blocks
    query_gradient: Blocks
    key_gradients: Blocks


# What decides a row (D is the head dim, b the bytes of an element; a thread block has 227 KiB of
# shared memory on H100 and H200, 163 KiB on A100; a thread has 255 registers):
# - The side that a program keeps (queries forward and for dq, keys for dk and dv) is 128 where it
#   fits: what stays is read once, and each of Hopper's warp groups gets 64 rows, its unit.
# - The walked side is as wide as registers allow. A Hopper product of the kept tile reads both
#   factors from shared memory and is bound by that: 64 columns run at half the tensor core's rate,
#   128 at two thirds. At D = 64 exponentials are the bound, so two small programs share a core.
# - Shared memory: forward, queries * D * b + stages * 2 * keys * D * b; both backward kernels keep
#   two tiles and stream two, 2 * kept * D * b + stages * 2 * walked * D * b.
# - Registers: accumulators (forward and dq kept * D, dk and dv twice that) and the tile of scores
#   (twice backward) in fp32 over 32 * warps threads. Compiled by Triton 3.9 and assembled for sm_90
#   and sm_80, a causal mask and nothing else: at most 32 bytes a thread spill at D = 64, 80, 128,
#   56 at 96, 264 at 192 and 256, 40 in fp32; with soft cap, ALiBi and dropout 128 at 64 and 128.
# - fp32 multiplies without tensor cores (they would round to tf32), so small tiles and no pipeline.
# No row was timed yet. `python benchmarks/attention_gpu.py --tune` measures candidates and prints
# rows for this table; a row may be added for any largest head dim, chip and element size.
_FP32 = {
    64: Plan(Blocks(64, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)),
    128: Plan(Blocks(32, 32, 4, 1), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1)),
    256: Plan(Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1), Blocks(16, 16, 4, 1)),
}
_TABLE = {
    # (chip, bytes): largest head dim: forward, dq, dk and dv
    ("hopper", 2): {
        64: Plan(Blocks(128, 64, 8, 3), Blocks(128, 128, 8, 2), Blocks(64, 128, 8, 3)),
        128: Plan(Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 3), Blocks(32, 128, 8, 2)),
        256: Plan(Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(32, 64, 8, 2)),
    },
    ("ampere", 2): {
        64: Plan(Blocks(128, 64, 4, 3), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
        128: Plan(Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
        256: Plan(Blocks(64, 64, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 2)),
    },
    ("hopper", 4): _FP32,
    ("ampere", 4): _FP32,
}
# The least that a tensor core's product takes.
_SMALLEST = 16


def choose(options: Options, operands: Operands) -> Plan:
    """The plan of `options.blocks` or of the table, no larger than the shapes need.

    Raises ValueError for head dims that no row holds, and for a sparsity whose blocks cannot be
    cut into tiles.
    """
    T, H = operands.q_BTNH.shape[1], operands.q_BTNH.shape[3]
    S = operands.k_BSKH.shape[1]
    sparsity = operands.mask.sparsity
    plan = options.blocks or _row(options.chip, operands.q_BTNH.dtype.itemsize, H)
    return Plan(*(
        blocks._replace(
            queries=_fit(blocks.queries, T, sparsity), keys=_fit(blocks.keys, S, sparsity))
        for blocks in plan
    ))


def _row(chip: str, itemsize: int, head_dim: int) -> Plan:
    rows = _TABLE.get((chip, itemsize), {})
    fitting = [h for h in rows if h >= head_dim]
    if not fitting:
        raise ValueError(
            f"No GPU block sizes for {chip}, {itemsize} bytes an element, head dim {head_dim}.")
    return rows[min(fitting)]


def _fit(size: int, length: int, sparsity: object) -> int:
    """At most the power of two that holds `length`; a divisor of the sparsity's block."""
    size = max(_SMALLEST, min(size, 1 << max(length - 1, 1).bit_length()))
    if sparsity is None:
        return size
    # A power of two that divides the block: then the layout shows or hides whole tiles.
    size = min(size, sparsity.block & -sparsity.block)
    if size < _SMALLEST:
        raise ValueError(
            f"The GPU kernels need a sparsity block that {_SMALLEST} divides, "
            f"not {sparsity.block}.")
    return size

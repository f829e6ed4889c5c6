"""The cross-entropy kernels for TPUs.

Tokens are the rows M, in tiles of m; the vocabulary is V, in tiles of v; D is never split.

    forward and gradient of x: grid (M/m, V/v)    gradient of the head: grid (V/v, M/m)

            v   v   v   v                                 v   v   v   v
          +---+---+---+---+                             +---+---+---+---+
        m | 0 | 1 | 2 | 3 |  the tokens' tile stays   m | 0 | 2 | 4 | 6 |  the head's tile stays
          +---+---+---+---+  in VMEM for a row of       +---+---+---+---+  in VMEM for a column of
        m | 4 | 5 | 6 | 7 |  steps, the head streams  m | 1 | 3 | 5 | 7 |  steps, tokens stream
          +---+---+---+---+                             +---+---+---+---+

A cell is one step: a tile of logits, m x v in fp32, that never leaves VMEM. What streams is used
for 2 m (or 2 v) FLOPs per element, twice that backward, so m = 512 hides the reading of bf16 where
the chip makes fewer than 512 FLOPs per byte: v5e 240, v5p 187, tpu7x 312; v6e, with 561, has 1024.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from batiste.pallas_kernels.cross_entropy_operands import Operands, Options, Sums
from batiste.pallas_kernels.tpu_cross_entropy_plan import GENERATIONS, LANES, Plan, plan_tiles

# Bytes of D at a time, in a loop: with D = 8192 unrolled, fp32 products spilled 32 MiB.
CHUNK = 2048
COLUMNS = 8  # Numbers per token that one array carries between kernel and XLA.
HIDDEN = -1e30  # Finite: in a lane that has seen no logit yet, -inf - -inf would be NaN.


def forward(options: Options, operands: Operands) -> Sums:
    """The sums over the vocabulary, float32."""
    size = operands.x_MD.shape[0]
    options, operands = _as_stored(options, _supported(operands))
    plan = plan_tiles(options, operands, tokens_stay=True, output_bytes=0)
    x_MD, head, targets_M1 = _whole_tiles(plan, operands)
    out = jax.ShapeDtypeStruct((x_MD.shape[0], COLUMNS), jnp.float32)
    inputs = [("token", x_MD), ("head", head), ("token", targets_M1)]
    scratch = [(plan.tokens, LANES)] * 4
    sums_M8 = _call(_forward_kernel, plan, inputs, ("token", out), scratch)[:size]
    return Sums(*(sums_M8[:, column] for column in range(3)))


def backward(
    options: Options, operands: Operands, log_z_M: jax.Array, gradients: Sums, head_dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Gradients of x and, in `head_dtype`, of the head; the tiles of logits are made again."""
    (size, D), x_dtype = operands.x_MD.shape, operands.x_MD.dtype
    given = options.layout
    options, operands = _as_stored(options, _supported(operands))
    columns = [log_z_M, *gradients] + [jnp.zeros_like(log_z_M)] * (COLUMNS - 4)
    rows_M8 = jnp.stack(columns, axis=1)

    def call(kernel, plan, kind, dtype):
        x_MD, head, targets_M1 = _whole_tiles(plan, operands)
        inputs = [("token", x_MD), ("head", head), ("token", targets_M1)]
        inputs.append(("token", _pad_rows(rows_M8, x_MD.shape[0])))
        shape = x_MD.shape if kind == "token" else head.shape
        rows = plan.tokens if kind == "token" else plan.words
        dtype = jnp.float32 if dtype == jnp.float16 else dtype
        return _call(kernel, plan, inputs, (kind, jax.ShapeDtypeStruct(shape, dtype)), [(rows, D)])

    plan = plan_tiles(options, operands, tokens_stay=True, output_bytes=x_dtype.itemsize)
    g_x_MD = call(_x_kernel, plan, "token", x_dtype)[:size].astype(x_dtype)
    plan = plan_tiles(options, operands, tokens_stay=False, output_bytes=head_dtype.itemsize)
    g_head = call(_head_kernel, plan, "head", head_dtype).astype(head_dtype)
    return g_x_MD, g_head if options.layout == given else g_head.T


def _supported(operands: Operands) -> Operands:
    """fp16 as fp32, which holds it exactly: Mosaic cannot load fp16."""
    if operands.x_MD.dtype != jnp.float16:
        return operands
    x_MD, head, targets_M = operands
    return Operands(x_MD.astype(jnp.float32), head.astype(jnp.float32), targets_M)


def _as_stored(options: Options, operands: Operands) -> tuple[Options, Operands]:
    """A head DV whose V fills no vectors as VD, for so XLA stores it: .T moves nothing.

    By the layouts XLA gives to a program's arguments: the order of dims that needs less padding.
    """
    V = operands.vocabulary(options)
    if options.layout == "VD" or pl.cdiv(V, 8) * 8 == pl.cdiv(V, LANES) * LANES:
        return options, operands
    return options._replace(layout="VD"), operands._replace(head=operands.head.T)


def _whole_tiles(plan: Plan, operands: Operands) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x and targets padded to whole tiles of tokens; the head, which is large, stays as it is."""
    rows = pl.cdiv(operands.x_MD.shape[0], plan.tokens) * plan.tokens
    targets_M1 = operands.targets_M.astype(jnp.int32)[:, None]
    return _pad_rows(operands.x_MD, rows), operands.head, _pad_rows(targets_M1, rows)


def _pad_rows(array: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(array, ((0, rows - array.shape[0]), (0, 0)))


def _call(kernel: Callable, plan: Plan, inputs: list, output: tuple, scratch: list) -> jax.Array:
    """pallas_call over the plan's grid; "token" arrays go by tiles of rows, the head by words."""

    def spec(kind, shape):
        if kind == "head":
            block = tuple(plan.words if letter == "V" else shape[plan.axis("D")]
                          for letter in plan.options.layout)
        else:
            block = (plan.tokens, shape[1])
        staying = (kind == "token") == plan.tokens_stay
        along = plan.axis("V") if kind == "head" else 0

        def index(outer, inner):
            place = outer if staying else inner
            return (place, 0) if along == 0 else (0, place)

        return pl.BlockSpec(block, index)

    tokens, words = inputs[0][1].shape[0] // plan.tokens, pl.cdiv(plan.vocabulary, plan.words)
    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid=(tokens, words) if plan.tokens_stay else (words, tokens),
        in_specs=[spec(kind, array.shape) for kind, array in inputs],
        out_specs=spec(output[0], output[1].shape),
        out_shape=output[1],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            # A quarter above the plan, for what the compiler adds: 60 of 64 MiB, 120 of 128.
            vmem_limit_bytes=GENERATIONS[plan.options.chip].vmem * 5 // 4 * 2**20,
        ),
        interpret=plan.options.interpret,
        name="cross_entropy" + kernel.__name__.removesuffix("_kernel"),
    )(*(array for _, array in inputs))


def _forward_kernel(x_ref, head_ref, targets_ref, sums_ref, *scratch, plan):
    peak_ref, weight_ref, hit_ref, total_ref = scratch
    # Each lane keeps its own maximum and sums, so that lanes are only added up at the end.
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        peak_ref[...] = jnp.full_like(peak_ref, HIDDEN)
        for ref in (weight_ref, hit_ref, total_ref):
            ref[...] = jnp.zeros_like(ref)

    logits, word = _logits(x_ref, head_ref, step, plan)
    hit_ref[...] += sum(_lanes(jnp.where(word == targets_ref[...], logits, 0)))
    if plan.options.smoothed:
        total_ref[...] += sum(_lanes(_real(logits, word, plan, 0)))
    lanes = _lanes(_real(logits, word, plan, HIDDEN))
    before = peak_ref[...]
    peak_ref[...] = functools.reduce(jnp.maximum, lanes, before)
    weight_ref[...] *= jnp.exp(before - peak_ref[...])
    weight_ref[...] += sum(jnp.exp(lane - peak_ref[...]) for lane in lanes)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        peak_M1 = peak_ref[...].max(axis=1, keepdims=True)
        weight_ML = weight_ref[...] * jnp.exp(peak_ref[...] - peak_M1)
        log_z_M1 = peak_M1 + jnp.log(weight_ML.sum(axis=1, keepdims=True))
        hit_M1, total_M1 = (ref[...].sum(axis=1, keepdims=True) for ref in (hit_ref, total_ref))
        column = jax.lax.broadcasted_iota(jnp.int32, sums_ref.shape, 1)
        sums_ref[...] = jnp.where(
            column == 0, log_z_M1, jnp.where(column == 1, hit_M1, total_M1)
        )


def _x_kernel(x_ref, head_ref, targets_ref, rows_ref, *outputs, plan):
    out_ref, sum_ref = outputs
    step, last = pl.program_id(1), pl.num_programs(1) - 1

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    gradient = _gradient(x_ref, head_ref, targets_ref, rows_ref, step, plan)

    def add(ends, chunk):
        head = head_ref[plan.words_by(chunk)]
        if ends:  # 0 times what lies beyond the vocabulary may be NaN.
            word = jax.lax.broadcasted_iota(jnp.int32, head.shape, plan.axis("V"))
            head = jnp.where(word < plan.vocabulary - step * plan.words, head, 0)
        sum_ref[:, chunk] += _dot(gradient, head, 1, plan.axis("V"))

    def add_all(ends):
        _over_chunks(x_ref, lambda chunk, _: add(ends, chunk), None)

    if plan.ragged:
        pl.when(step == last)(lambda: add_all(True))
        pl.when(step < last)(lambda: add_all(False))
    else:
        add_all(False)

    @pl.when(step == last)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _head_kernel(x_ref, head_ref, targets_ref, rows_ref, *outputs, plan):
    out_ref, sum_ref = outputs
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    gradient = _gradient(x_ref, head_ref, targets_ref, rows_ref, pl.program_id(0), plan)
    turned = gradient.T  # The sum is VD in either layout: turning x's tile would cost more.

    def add(chunk, _):
        sum_ref[:, chunk] += _dot(turned, x_ref[:, chunk], 1, 0)

    _over_chunks(x_ref, add, None)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        total = sum_ref[...] if plan.options.layout == "VD" else sum_ref[...].T
        out_ref[...] = total.astype(out_ref.dtype)


def _gradient(x_ref, head_ref, targets_ref, rows_ref, words_step, plan):
    """Gradient of a tile of logits before the soft cap, in x's dtype."""
    logits, word = _logits(x_ref, head_ref, words_step, plan)
    log_z_M1, g_log_z_M1, g_hit_M1, g_total_M1 = (rows_ref[:, i : i + 1] for i in range(4))
    gradient = g_log_z_M1 * jnp.exp(logits - log_z_M1)
    gradient += jnp.where(word == targets_ref[...], g_hit_M1, 0)
    if plan.options.smoothed:
        gradient += g_total_M1
    if plan.options.soft_cap is not None:
        gradient *= 1 - jnp.square(logits / plan.options.soft_cap)
    return _real(gradient, word, plan, 0).astype(x_ref.dtype)


def _logits(x_ref, head_ref, words_step, plan):
    """A tile of soft-capped logits in fp32, and the word that each column is."""
    def add(chunk, logits):
        return logits + _dot(x_ref[:, chunk], head_ref[plan.words_by(chunk)], 1, plan.axis("D"))

    zero = jnp.zeros((plan.tokens, plan.words), jnp.float32)
    logits = _over_chunks(x_ref, add, zero)
    soft_cap = plan.options.soft_cap
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    word = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) + words_step * plan.words
    return logits, word


def _over_chunks(x_ref: Any, body: Callable, carry: Any) -> Any:
    """carry = body(chunk, carry) for each chunk of D, an index; what is left of D comes last."""
    D, size = x_ref.shape[1], CHUNK // x_ref.dtype.itemsize

    def step(index, carry):
        return body(pl.ds(pl.multiple_of(index * size, size), size), carry)

    carry = jax.lax.fori_loop(0, D // size, step, carry)
    return body(pl.ds(D - D % size, D % size), carry) if D % size else carry


def _real(tile, word, plan, otherwise):
    return jnp.where(word < plan.vocabulary, tile, otherwise) if plan.ragged else tile


def _lanes(tile):
    return [tile[:, start : start + LANES] for start in range(0, tile.shape[1], LANES)]


def _dot(a, b, summed_of_a, summed_of_b):
    # The default precision of fp32 is one pass of bf16; whoever asks for fp32 wants fp32.
    return jax.lax.dot_general(
        a, b, (((summed_of_a,), (summed_of_b,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )

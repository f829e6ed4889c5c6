"""Flash decoding equals the reference attention of the last query, on every certified chip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from kernel_checks import GPU, TPU, assert_close, compile_for, copies, interpreter

from batiste.pallas_kernels import AttentionMask, gpu_decode, reference_attention, tpu_decode
from batiste.pallas_kernels.decode import CERTIFIED, flash_decode
from batiste.pallas_kernels.decode_operands import DecodeOperands, DecodeOptions

NONE = {"window": None, "soft_cap": None, "sinks": False, "alibi": False}
VALUES = {"window": 300, "soft_cap": 2.0, "sinks": True, "alibi": True}
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.5e-2}
# (N, K, H), each read through another view of the cache on a TPU; S is never a whole tile.
HEADS = [(6, 2, 128), (4, 2, 256), (32, 16, 128), (6, 3, 128), (6, 2, 64), (4, 4, 80), (5, 1, 256)]


def features(*names):
    return NONE | {name: VALUES[name] for name in names}


def operands(sizes, dtype):
    """Rows with no key, one, some, all but some and all; keys that are not real are NaN."""
    S, N, K, H = sizes
    random = np.random.default_rng(0)
    length_B = np.array([0, 1, S // 3, S - 3, S], np.int32)
    q_BNH = random.normal(size=(5, N, H))
    k_BSKH, v_BSKH = random.normal(size=(2, 5, S, K, H))
    real_BS11 = (np.arange(S) < length_B[:, None])[:, :, None, None]
    arrays = (q_BNH, np.where(real_BS11, k_BSKH, np.nan), np.where(real_BS11, v_BSKH, np.nan))
    return *(jnp.asarray(array, dtype) for array in arrays), jnp.asarray(length_B)


def options(given, N, H):
    random = np.random.default_rng(1)
    sinks_N = jnp.asarray(random.normal(size=N), jnp.float32) if given["sinks"] else None
    slopes_N = jnp.asarray(random.uniform(0, 0.1, size=N), jnp.float32) if given["alibi"] else None
    return {"scale": H**-0.5, "soft_cap": given["soft_cap"], "sinks_N": sinks_N,
            "alibi_slopes_N": slopes_N}


def check(chip, sizes, dtype, given):
    q_BNH, k_BSKH, v_BSKH, length_B = arrays = operands(sizes, dtype)
    others = options(given, q_BNH.shape[1], q_BNH.shape[2])

    @jax.jit
    def run(*arrays):
        where = {"chip": chip, "interpret": interpreter(chip)}
        return flash_decode(*arrays, window=given["window"], **where, **others)

    mask = AttentionMask(causal=True, window=given["window"], query_offset_B=length_B - 1)
    rounded = (q_BNH[:, None], k_BSKH, v_BSKH)
    exact = (jnp.nan_to_num(array.astype(jnp.float32)) for array in rounded)
    out_BTNH, lse_BTN = reference_attention(
        *exact, mask, dropout_rate=0.0, dropout_seeds_BN=None, **others
    )
    actual = run(*arrays)
    assert actual[0].dtype == q_BNH.dtype
    assert_close(actual, (out_BTNH[:, 0], lse_BTN[:, 0]), TOLERANCE[dtype])
    assert not actual[0][0].any()
    assert given["sinks"] or (actual[1][0] == -jnp.inf).all()


def keys(chip):
    """Several tiles: of 512 to 2048 keys on a TPU, of at most 128 on a GPU."""
    return 2500 if chip in TPU else 300


@pytest.mark.parametrize("names", [(), *((name,) for name in VALUES), tuple(VALUES)])
@pytest.mark.parametrize("chip", ["v5e", "hopper"])
def test_every_feature(chip, names, races, monkeypatch):
    # Two splits of three tiles; as many programs as fill a GPU would have one tile each.
    few = {name: tile._replace(programs=20) for name, tile in gpu_decode.TILES.items()}
    monkeypatch.setattr(gpu_decode, "TILES", few)
    check(chip, (keys(chip), 6, 2, 128), "float32", features(*names))
    races.check(chip)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("chip", ["v5e", "ampere"])
def test_every_view_of_the_cache(chip, heads, races):
    check(chip, (keys(chip), *heads), "float32", features(*VALUES))
    races.check(chip)


@pytest.mark.parametrize("entry", CERTIFIED, ids=lambda entry: entry.chip)
def test_every_dtype_on_every_chip(entry, races):
    # v5p, v6e and tpu7x run v5e's kernel with tiles of their own: there one dtype is enough.
    for dtype in entry.dtypes if entry.chip in ("v5e", *GPU) else entry.dtypes[:1]:
        check(entry.chip, (keys(entry.chip), 4, 2, 64), dtype, features(*entry.features))
        check(entry.chip, (keys(entry.chip), 4, 2, 128), dtype, features("window"))
    races.check(entry.chip)


@pytest.mark.parametrize("window", [1, 2, 128, 4000])
@pytest.mark.parametrize("chip", ["v5e", "hopper"])
def test_windows_that_end_within_a_tile_or_beyond_the_cache(chip, window, races):
    check(chip, (keys(chip), 4, 2, 64), "float32", NONE | {"window": window})
    races.check(chip)


@pytest.mark.parametrize("chip", ["v5e", "hopper"])
def test_a_cache_below_a_tile(chip, races):
    check(chip, (5, 4, 2, 128), "float32", NONE)
    check(chip, (5, 4, 2, 64), "float32", NONE)
    races.check(chip)


def compiled(chip, sizes, dtype, given):
    B, S, N, K, H = sizes

    def decode(q_BNH, k_BSKH, v_BSKH, length_B):
        return flash_decode(
            q_BNH, k_BSKH, v_BSKH, length_B, window=given["window"], chip=chip,
            **options(given, N, H),
        )

    cache = ((B, S, K, H), dtype)
    return compile_for(chip, decode, ((B, N, H), dtype), cache, cache, ((B,), "int32"))


@pytest.mark.parametrize("entry", CERTIFIED, ids=lambda entry: entry.chip)
def test_every_feature_and_dtype_compiles(entry):
    for names in ((), *((name,) for name in entry.features)):
        compiled(entry.chip, (2, 1000, 8, 2, 128), "bfloat16", features(*names))
    for dtype in entry.dtypes:
        compiled(entry.chip, (2, 1000, 8, 2, 128), dtype, features(*entry.features))


@pytest.mark.slow
@pytest.mark.parametrize("entry", CERTIFIED, ids=lambda entry: entry.chip)
def test_every_view_compiles_without_a_copy_of_the_cache(entry):
    others = [(8, 1, 128), (1, 1, 64), (8, 4, 192), (entry.queries_per_head, 1, 64)]
    for N, K, H in HEADS + others:
        # What XLA's layouts depend on, K and H and the dtype, is the same on all TPUs.
        for dtype in entry.dtypes if entry.chip == "v5e" else ("bfloat16",):
            # Large enough that XLA does not move it to VMEM beforehand, which is a copy too.
            sizes = (4, 32768, N, K, H)
            program = compiled(entry.chip, sizes, dtype, features("window", "alibi"))
            if entry.chip in TPU:
                assert not copies(program, sizes[0] * sizes[1] * K * H), (N, K, H, dtype)
                assert program.memory_analysis().temp_size_in_bytes < 2**21


def test_hidden_tiles_are_not_fetched():
    """Over the steps of a row, the index map names the tiles it sees and no others."""
    end_B = jnp.array([0, 1, 2048, 2049, 9000], jnp.int32)
    first_B = jnp.maximum(end_B - 700, 0)
    cache = jnp.zeros((5, 16384, 2, 128), jnp.bfloat16)
    given = DecodeOperands(jnp.zeros((5, 4, 128), jnp.bfloat16), cache, cache, first_B, end_B, None)
    for window, steps in ((700, 2), (None, 8)):
        plan = tpu_decode._plan(DecodeOptions(window, 1.0, None, "v5p", False), given)
        assert (plan.keys, plan.steps) == (2048, steps)
        _, spec = tpu_decode._view(plan, cache)
        start_B = jnp.zeros_like(end_B) if window is None else first_B
        tiles = [
            sorted({int(spec.index_map(b, 0, t, start_B, end_B)[1]) for t in range(plan.steps)})
            for b in range(5)
        ]
        assert tiles == [[0], [0], [0], [0, 1], [4] if window else [0, 1, 2, 3, 4]]


def test_a_race_would_be_seen(races):
    def hasty(x_ref, out_ref, buffer_ref, arrived):
        copy = pltpu.make_async_copy(x_ref, buffer_ref, arrived)
        copy.start()
        out_ref[...] = buffer_ref[...]
        copy.wait()

    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    kernel = pl.pallas_call(
        hasty,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=shape,
        scratch_shapes=[pltpu.VMEM(shape.shape, shape.dtype), pltpu.SemaphoreType.DMA],
        interpret=interpreter("v5e"),
    )
    # Older interpreters record a race and go on, newer ones raise at once, in these words.
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match="RACE DETECTED"):
        kernel(jnp.ones(shape.shape)).block_until_ready()
        races.check("v5e")


def test_it_has_no_gradient():
    q_BNH, k_BSKH, v_BSKH, length_B = operands((40, 4, 2, 64), "float32")
    others = options(NONE, 4, 64)
    with pytest.raises(ValueError, match="no gradient"):
        jax.grad(lambda q: flash_decode(
            q, k_BSKH, v_BSKH, length_B, window=None, chip="hopper", interpret=True, **others
        )[0].sum())(q_BNH)


@pytest.mark.parametrize("chip,q,cache,dtype,message", [
    ("v4", (2, 4, 64), (2, 9, 2, 64), "float32", "certified are v5e, v5p, v6e, tpu7x"),
    ("v5e", (2, 4, 64), (2, 9, 2, 64), "float16", "certified is one of bfloat16, float32"),
    ("v5e", (2, 4, 72), (2, 9, 2, 72), "float32", "nearest certified is 80"),
    ("hopper", (2, 4, 32), (2, 9, 2, 32), "float32", "nearest certified is 64"),
    ("hopper", (2, 4, 512), (2, 9, 2, 512), "float32", "nearest certified is 256"),
    ("hopper", (2, 256, 64), (2, 9, 2, 64), "float32", "128 query heads per key head"),
    ("v5e", (2, 3, 64), (2, 9, 2, 64), "float32", "do not fit"),
])
def test_what_is_not_certified_is_refused(chip, q, cache, dtype, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda *arrays: flash_decode(
                *arrays, window=None, chip=chip, **options(NONE, q[1], q[2])
            ),
            *(jax.ShapeDtypeStruct(shape, dtype) for shape in (q, cache, cache)),
            jax.ShapeDtypeStruct(q[:1], jnp.int32),
        )

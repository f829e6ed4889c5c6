"""The GPU attention kernels, interpreted, against the reference; and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import lower_for_gpu

from batiste.models.positions import alibi_slopes
from batiste.pallas_kernels import AttentionMask, BlockSparsity, reference_attention
from batiste.pallas_kernels.attention import attend
from batiste.pallas_kernels.dropout import kept
from batiste.pallas_kernels.gpu_blocks import Blocks, Plan, choose
from batiste.pallas_kernels.gpu_schedule import schedule
from batiste.pallas_kernels.operands import Operands, Options

B, T, S, N, K, H = 2, 70, 85, 6, 2, 32
# No two kernels alike, so that none relies on another's tiles.
PLAN = Plan(Blocks(16, 32, 4, 2), Blocks(32, 16, 4, 2), Blocks(16, 16, 4, 2))
OTHER_PLAN = Plan(Blocks(64, 16, 4, 2), Blocks(16, 64, 4, 2), Blocks(32, 64, 4, 2))


def segments(length, boundaries, padding):
    """Rows of segments 1, 2, ... that change at the boundaries, the end padded with 0."""
    place = np.arange(length)[None]
    ids = 1 + (place[:, :, None] >= np.array(boundaries)[:, None]).sum(axis=-1)
    return jnp.asarray(np.where(place < length - np.array(padding)[:, None], ids, 0), jnp.int32)


QUERY_SEGMENTS = segments(T, [(3, 40), (33, 35)], (20, 0))
KEY_SEGMENTS = segments(S, [(20, 70), (1, 36)], (0, 30))
RETURNING_SEGMENTS = jnp.where(jnp.arange(T)[None] % 48 < 32, 1, jnp.array([[2], [0]]))
OFFSET = jnp.array([15, 3])
MASKS = {
    "full": AttentionMask(causal=False),
    "causal": AttentionMask(causal=True),
    "window": AttentionMask(causal=True, window=19),
    "two-sided window": AttentionMask(causal=False, window=37),
    "prefix": AttentionMask(causal=True, prefix_B=jnp.array([0, 50])),
    "prefix in a window": AttentionMask(causal=True, window=40, prefix_B=jnp.array([7, 64])),
    "segments": AttentionMask(
        causal=False, query_segments_BT=QUERY_SEGMENTS, key_segments_BS=KEY_SEGMENTS),
    "causal, segments that return": AttentionMask(
        causal=True, query_segments_BT=RETURNING_SEGMENTS,
        key_segments_BS=jnp.pad(RETURNING_SEGMENTS, ((0, 0), (0, S - T)))),
    "offset": AttentionMask(causal=True, query_offset_B=OFFSET),
    "offset, some rows before all keys": AttentionMask(
        causal=True, window=30, query_offset_B=jnp.array([-40, 60])),
    "sparse": AttentionMask(
        causal=False, sparsity=BlockSparsity(16, 1, global_blocks=1, random_blocks=1, seed=3)),
    "causal, sparse, segments": AttentionMask(
        causal=True, sparsity=BlockSparsity(32, 1, random_blocks=1),
        query_segments_BT=QUERY_SEGMENTS, key_segments_BS=KEY_SEGMENTS),
    "all but sparse": AttentionMask(
        causal=True, window=45, prefix_B=jnp.array([20, 3]), query_segments_BT=QUERY_SEGMENTS,
        key_segments_BS=KEY_SEGMENTS, query_offset_B=OFFSET),
}
NO_FEATURES = dict(scale=0.2, soft_cap=None, sinks_N=None, alibi_slopes_N=None, dropout_rate=0.0,
                   dropout_seeds_BN=None)
FEATURES = {
    "soft cap": dict(soft_cap=1.3),
    "sinks": dict(sinks_N=jax.random.normal(jax.random.key(5), (N,))),
    "ALiBi": dict(alibi_slopes_N=alibi_slopes(N)),
    "dropout": dict(
        dropout_rate=0.3,
        dropout_seeds_BN=jax.random.bits(jax.random.key(6), (B, N)).astype(jnp.int32)),
}
ALL_FEATURES = {key: value for options in FEATURES.values() for key, value in options.items()}


def random_arrays(head_dim=H, dtype="float32", lengths=(T, S)):
    """q, k, v, and gradients of the output and of the log-sum-exp."""
    keys = jax.random.split(jax.random.key(3), 5)
    shape_q, shape_k = (B, lengths[0], N, head_dim), (B, lengths[1], K, head_dim)
    q, g = (jax.random.normal(key, shape_q, dtype) for key in keys[:2])
    k, v = (jax.random.normal(key, shape_k, dtype) for key in keys[2:4])
    return q, k, v, g, jax.random.normal(keys[4], shape_q[:3])


def kernel(plan, chip="hopper", interpret=True):
    """The kernels with given tiles, to be called like the reference."""
    def attention(q, k, v, mask, **options):
        arrays = (options[x] for x in ("sinks_N", "alibi_slopes_N", "dropout_seeds_BN"))
        numbers = (options[x] for x in ("scale", "soft_cap", "dropout_rate"))
        return attend(Options(*numbers, chip, interpret, plan), Operands(q, k, v, mask, *arrays))
    return attention


def results(attention, arrays, mask, options, empty=0.0):
    """Output, log-sum-exp and the gradients of q, k, v (and the sinks).

    empty: the gradient of the log-sum-exp of rows that see nothing.
    """
    q, k, v, g, g_lse = arrays
    sinks = options["sinks_N"]

    def value(q, k, v, sinks):
        return attention(q, k, v, mask, **options | dict(sinks_N=sinks))

    @jax.jit
    def all_of_it(q, k, v, sinks):
        (out, lse), backward = jax.vjp(value, q, k, v, sinks)
        gradients = backward((g, jnp.where(lse == -jnp.inf, empty, g_lse)))
        return out, lse, *gradients

    return [x for x in all_of_it(q, k, v, sinks) if x is not None]


def check(arrays, mask, options, plan=PLAN):
    got = results(kernel(plan), arrays, mask, options, empty=jnp.nan)
    want = results(reference_attention, [x.astype(jnp.float32) for x in arrays], mask, options)
    assert len(got) == len(want)
    bound = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}[arrays[0].dtype.name]
    for mine, theirs in zip(got, want):
        mine, theirs = np.asarray(mine, np.float32), np.asarray(theirs)
        size = np.abs(theirs, where=np.isfinite(theirs), out=np.zeros_like(theirs)).max()
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=bound * max(1, size))
    for mine, array in zip((got[0], *got[2:5]), (arrays[0], *arrays[:3])):
        assert mine.dtype == array.dtype
    assert got[1].dtype == jnp.float32


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_equals_the_reference(name):
    check(random_arrays(), MASKS[name], NO_FEATURES)


# With all features test_attention_gpu_certified.py has the others.
@pytest.mark.parametrize("name", [
    "causal, segments that return", "offset, some rows before all keys", "all but sparse"])
def test_unusual_masks_with_all_features_equal_the_reference(name):
    check(random_arrays(), MASKS[name], NO_FEATURES | ALL_FEATURES)


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_equals_the_reference(name):
    check(random_arrays(), MASKS["causal"], NO_FEATURES | FEATURES[name], OTHER_PLAN)


def test_lengths_that_are_multiples_of_the_tiles():
    arrays = random_arrays(lengths=(64, 64))
    check(arrays, AttentionMask(causal=True), NO_FEATURES)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_turn_the_maximum_around(scale):
    check(random_arrays(), MASKS["causal"], NO_FEATURES | dict(scale=scale))


def test_a_single_query_with_the_tables_tiles():
    arrays = random_arrays(lengths=(1, S))
    mask = AttentionMask(causal=True, query_offset_B=jnp.array([84, 40]))
    check(arrays, mask, NO_FEATURES, plan=None)


@pytest.mark.parametrize("name", ["segments", "offset, some rows before all keys"])
def test_rows_that_see_nothing_give_zeros(name):
    mask, arrays = MASKS[name], random_arrays()
    out, lse, g_q, _, _ = results(kernel(PLAN), arrays, mask, NO_FEATURES, empty=jnp.nan)
    empty_BT = ~np.asarray(mask.visible_BTS(T, S)).any(axis=-1)
    assert 0 < empty_BT.sum() < empty_BT.size
    assert (np.asarray(lse)[empty_BT] == -np.inf).all()
    assert not np.asarray(out)[empty_BT].any() and not np.asarray(g_q)[empty_BT].any()


@pytest.mark.parametrize("plan", [PLAN, OTHER_PLAN])
def test_dropout_drops_the_same_places_whatever_the_tiles(plan):
    # With a one-hot value for each key the output is the row of probabilities.
    length = 64
    q, k, *_ = random_arrays(64, lengths=(length, length))
    v_BSKH = jnp.broadcast_to(jnp.eye(length)[None, :, None], (B, length, K, length))
    options = NO_FEATURES | FEATURES["dropout"]
    out_BTNH, _ = kernel(plan)(q, k, v_BSKH, AttentionMask(causal=False), **options)
    place = jnp.arange(length, dtype=jnp.int32)
    keep = kept(options["dropout_seeds_BN"][:, None, :, None], place[None, :, None, None],
                place[None, None, None], 0.3)
    np.testing.assert_array_equal(out_BTNH != 0, keep)


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_the_schedule_visits_what_is_visible_and_masks_what_is_not(name, by_keys):
    mask, blocks = MASKS[name], Blocks(16, 16, 4, 2)
    plan = schedule(mask, (T, S), blocks, by_keys)
    visible_BTS = mask.visible_BTS(T, S)
    visible_BTS = np.ones((1, T, S), bool) if visible_BTS is None else np.asarray(visible_BTS)
    # Tiles at the end are as visible as what they hold, but the walked side's end is masked.
    padded = np.pad(visible_BTS, ((0, 0), (0, -T % 16), (0, -S % 16)), mode="edge")
    tiles = padded.reshape(len(padded), padded.shape[1] // 16, 16, padded.shape[2] // 16, 16)
    some, every = tiles.any(axis=(2, 4)), tiles.all(axis=(2, 4))
    if by_keys:
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    every[:, :, -1] &= (T if by_keys else S) % 16 == 0
    order = None if plan.order_RXY is None else np.asarray(plan.order_RXY)
    bounds = np.asarray(plan.bounds_RX4)
    unmasked_count = 0
    for row, tile in np.ndindex(*some.shape[:2]):
        shared = row % len(bounds)
        start, whole_start, whole_stop, stop = bounds[shared, tile]
        visited, unmasked = np.arange(start, stop), np.arange(whole_start, whole_stop)
        if order is not None:
            visited, unmasked = (order[shared, tile][x] for x in (visited, unmasked))
        assert set(np.flatnonzero(some[row, tile])) <= set(visited)
        assert set(unmasked) <= set(np.flatnonzero(every[row, tile]))
        unmasked_count += len(unmasked)
        if "segments" not in name and name != "all but sparse":
            assert set(visited) == set(np.flatnonzero(some[row, tile]))
            assert set(unmasked) == set(np.flatnonzero(every[row, tile]))
    assert unmasked_count or name not in ("full", "causal", "prefix", "segments", "sparse")


def lower(mask, options, arrays, chip):
    """Forward and backward, lowered for CUDA on whatever machine this is."""
    def loss(q, k, v):
        out, lse = kernel(None, chip, interpret=False)(q, k, v, mask, **options)
        return out.astype(jnp.float32).sum() + lse.sum()

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[:3]]
    return lower_for_gpu(chip, jax.grad(loss, argnums=(0, 1, 2)), *shapes).as_text()


def test_fp32_products_are_not_rounded_to_tf32():
    # Triton's default is tf32; the highest precision is what its lowering calls IEEE.
    arrays = random_arrays(80)
    text = str(jax.make_jaxpr(lambda *x: results(kernel(PLAN), x, MASKS["causal"], NO_FEATURES))(
        *arrays))
    assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST") > 6


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_with_all_features_lowers_for_cuda(name):
    arrays = random_arrays(64, "bfloat16")
    text = lower(MASKS[name], NO_FEATURES | ALL_FEATURES, arrays, "hopper")
    assert text.count("__gpu$xla.gpu.triton") == 3


@pytest.mark.parametrize("change, message", [
    (dict(head_dim=72), "head dim that 16 divides"),
    (dict(head_dim=512), "No GPU block sizes"),
    (dict(mask=AttentionMask(causal=True, sparsity=BlockSparsity(24, 1))), "sparsity block"),
    (dict(mask=AttentionMask(causal=True, sparsity=BlockSparsity(16, 1), query_offset_B=OFFSET)),
     "do not combine"),
    (dict(v_dtype="bfloat16"), "one dtype"),
])
def test_what_the_kernels_do_not_take_is_refused_in_one_line(change, message):
    q, k, v, *_ = random_arrays(change.get("head_dim", 64))
    mask = change.get("mask", AttentionMask(causal=True))
    with pytest.raises(ValueError, match=message) as error:
        kernel(None)(q, k, v.astype(change.get("v_dtype", "float32")), mask, **NO_FEATURES)
    assert "\n" not in str(error.value)


def test_every_plan_fits_into_shared_memory():
    limit = {"hopper": 227, "ampere": 163}
    for chip, kib in limit.items():
        for dtype in ("float32", "bfloat16"):
            for head_dim in (64, 80, 96, 128, 192, 256):
                shape = jax.ShapeDtypeStruct((1, 8192, 4, head_dim), dtype)
                operands = Operands(shape, shape, shape, AttentionMask(causal=True), *[None] * 3)
                plan = choose(Options(1.0, None, 0.0, chip, False), operands)
                width = head_dim * shape.dtype.itemsize
                forward, dq, dkv = plan
                for kept_rows, streamed, stages in (
                    (forward.queries, forward.keys, forward.stages),
                    (2 * dq.queries, dq.keys, dq.stages),
                    (2 * dkv.keys, dkv.queries, dkv.stages),
                ):
                    assert width * (kept_rows + stages * 2 * streamed) <= kib * 1024

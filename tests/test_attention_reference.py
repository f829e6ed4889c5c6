"""The reference attention against the definition, one query at a time in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste.models.positions import alibi_slopes
from batiste.pallas_kernels import AttentionMask, BlockSparsity, reference_attention
from batiste.pallas_kernels.dropout import kept


def is_visible(mask, b, t, s, layout):
    """Whether query t of row b sees key s, from the words of AttentionMask's docstring."""
    place = t + (0 if mask.query_offset_B is None else int(mask.query_offset_B[b]))
    in_prefix = mask.prefix_B is not None and s < mask.prefix_B[b]
    if mask.causal and s > place and not in_prefix:
        return False
    if mask.window is not None and abs(place - s) >= mask.window:
        return False
    if layout is not None and not layout[place // mask.sparsity.block][s // mask.sparsity.block]:
        return False
    if mask.query_segments_BT is None:
        return True
    segment = mask.query_segments_BT[b, t]
    return segment == mask.key_segments_BS[b, s] and segment != 0


def naive_attention(q, k, v, mask, options):
    """Attention and log-sum-exp one query at a time in float64."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    out, lse = np.zeros(q.shape), np.full((B, T, N), -np.inf)
    layout = None if mask.sparsity is None else mask.sparsity.layout(
        -(-S // mask.sparsity.block), mask.causal)
    soft_cap = options["soft_cap"]
    sinks, slopes = (
        None if options[x] is None else np.asarray(options[x], np.float64)
        for x in ("sinks_N", "alibi_slopes_N"))
    for b, t, n in itertools.product(range(B), range(T), range(N)):
        weights = {}
        place = t + (0 if mask.query_offset_B is None else int(mask.query_offset_B[b]))
        for s in range(S):
            if is_visible(mask, b, t, s, layout):
                logit = options["scale"] * np.dot(q[b, t, n], k[b, s, n // (N // K)])
                logit = logit if soft_cap is None else soft_cap * np.tanh(logit / soft_cap)
                weights[s] = np.exp(logit - (0 if slopes is None else slopes[n] * abs(place - s)))
        total = sum(weights.values()) + (0 if sinks is None else np.exp(sinks[n]))
        lse[b, t, n] = np.log(total) if total else -np.inf
        for s, weight in weights.items():
            if options["dropout_seeds_BN"] is not None:
                keep = kept(options["dropout_seeds_BN"][b, n], jnp.int32(place), jnp.int32(s), 0.3)
                weight *= bool(keep) / 0.7
            out[b, t, n] += weight / total * v[b, s, n // (N // K)]
    return out, lse


MASKS = {
    "full": lambda: AttentionMask(causal=False),
    "causal": lambda: AttentionMask(causal=True),
    "window": lambda: AttentionMask(causal=True, window=2),
    "two-sided window": lambda: AttentionMask(causal=False, window=3),
    "prefix": lambda: AttentionMask(causal=True, prefix_B=jnp.array([0, 4])),
    "sparse": lambda: AttentionMask(
        causal=False, sparsity=BlockSparsity(2, 1, global_blocks=1, random_blocks=1, seed=3)),
    "segments with padding": lambda: AttentionMask(
        causal=True, query_segments_BT=jnp.array([[1, 1, 2, 2, 0], [1, 2, 2, 0, 0]]),
        key_segments_BS=jnp.array([[1, 1, 2, 2, 2, 0, 0], [1, 1, 2, 2, 0, 0, 0]])),
    "offset": lambda: AttentionMask(causal=True, query_offset_B=jnp.array([0, 2])),
    "causal, sparse, offset": lambda: AttentionMask(
        causal=True, sparsity=BlockSparsity(2, 1, random_blocks=1),
        query_offset_B=jnp.array([1, 2])),
}


@pytest.mark.parametrize("features", ["none", "all"])
@pytest.mark.parametrize("name", MASKS)
def test_reference_attention_equals_the_definition(name, features):
    mask = MASKS[name]()
    keys = jax.random.split(jax.random.key(3), 5)
    q = jax.random.normal(keys[0], (2, 5, 6, 4))
    k, v = (jax.random.normal(key, (2, 7, 3, 4)) for key in keys[1:3])
    options = dict(scale=0.7, soft_cap=None, sinks_N=None, alibi_slopes_N=None, dropout_rate=0.0,
                   dropout_seeds_BN=None)
    if features == "all":
        options |= dict(
            soft_cap=1.3, sinks_N=jax.random.normal(keys[3], (6,)), alibi_slopes_N=alibi_slopes(6),
            dropout_rate=0.3, dropout_seeds_BN=jax.random.bits(keys[4], (2, 6)).astype(jnp.int32))

    def loss(q, k, v):
        out, lse = reference_attention(q, k, v, mask, **options)
        return jnp.sum(out * jnp.cos(q)) + jnp.sum(jnp.where(lse > -1e9, jnp.sin(lse), 0))

    got, got_lse = jax.jit(lambda *x: reference_attention(*x, mask, **options))(q, k, v)
    as64 = [np.asarray(x, np.float64) for x in (q, k, v)]
    want, want_lse = naive_attention(*as64, mask, options)
    np.testing.assert_allclose(got, want, atol=2e-6)
    np.testing.assert_allclose(got_lse, want_lse, atol=2e-6)
    # Gradients of all inputs against central differences of the float64 definition.
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    random = np.random.default_rng(0)
    for which, gradient in enumerate(gradients):
        assert np.isfinite(gradient).all()
        direction = random.normal(size=gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = list(as64)
            moved[which] = moved[which] + sign * 1e-4 * direction
            out, lse = naive_attention(*moved, mask, options)
            ends.append((out * np.cos(moved[0])).sum() + np.where(lse > -1e9, np.sin(lse), 0).sum())
        slope = (ends[0] - ends[1]) / 2e-4
        np.testing.assert_allclose((np.asarray(gradient) * direction).sum(), slope, rtol=1e-3, atol=1e-4)


def test_dropout_keeps_the_right_share_in_every_row_and_column():
    seeds = jnp.array([0, 1, -7], jnp.int32)[:, None, None]
    places = jnp.arange(512, dtype=jnp.int32)
    keep = np.asarray(kept(seeds, places[None, :, None], places[None, None], 0.3), np.float64)
    # Six standard deviations of a binomial: 0.0005 a matrix would be one in 1e9.
    for axes, count in (((1, 2), 512**2), ((1,), 512), ((2,), 512)):
        assert np.abs(keep.mean(axis=axes) - 0.7).max() < 6 * np.sqrt(0.21 / count)
    flat = keep.reshape(3, -1) - 0.7
    correlation = flat @ flat.T / 0.21 / flat.shape[1]
    assert np.abs(correlation - np.eye(3)).max() < 6 / 512
    shifted = (keep[0, 1:, 1:] - 0.7) * (keep[0, :-1, :-1] - 0.7) / 0.21
    assert abs(shifted.mean()) < 6 / 511


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_attention_is_near_fp32_in_value_and_gradient(dtype):
    mask = AttentionMask(causal=True)
    keys = jax.random.split(jax.random.key(4), 3)
    q = jax.random.normal(keys[0], (3, 33, 6, 16))
    k, v = (jax.random.normal(key, (3, 33, 2, 16)) for key in keys[1:])
    options = dict(scale=0.25, soft_cap=None, sinks_N=None, alibi_slopes_N=None, dropout_rate=0.0,
                   dropout_seeds_BN=None)

    def loss(q, k, v):
        out_BTNH, _ = reference_attention(q, k, v, mask, **options)
        return jnp.square(out_BTNH.astype(jnp.float32)).sum()

    want = jax.grad(loss, argnums=(0, 1, 2))(q, k, v)
    got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*(x.astype(dtype) for x in (q, k, v)))
    for mine, theirs in zip(got, want):
        assert mine.dtype == dtype
        error = jnp.abs(mine.astype(jnp.float32) - theirs).max() / jnp.abs(theirs).max()
        assert error < 0.03

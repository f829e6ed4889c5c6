"""Masks, features and the comparison with the reference that the kernels' tests share."""

import jax
import jax.numpy as jnp
import numpy as np

from batiste.pallas_kernels import AttentionMask, BlockSparsity, reference_attention
from batiste.pallas_kernels.attention import attend
from batiste.pallas_kernels.operands import Operands, Options

B, N, K = 2, 4, 2
FEATURES = ("soft_cap", "sinks", "alibi", "dropout")


def segments_of(rows: int, length: int, seed: int) -> jax.Array:
    """Three documents of random length a row, then padding of unequal length."""
    random = np.random.default_rng(seed)
    segments = np.zeros((rows, length), np.int32)
    for row in range(rows):
        real = length - row * (length // 2) - 3  # Row 1 has tiles of padding alone.
        cuts = np.sort(random.choice(np.arange(1, real), 2, replace=False))
        segments[row, :real] = 1 + np.searchsorted(cuts, np.arange(real), side="right")
    return jnp.asarray(segments)


def make_mask(conditions: tuple[str, ...], num_queries: int, num_keys: int) -> AttentionMask:
    """A mask with these conditions and nothing round in its numbers."""
    segments = {}
    if "segments" in conditions:
        segments = dict(
            query_segments_BT=segments_of(B, num_queries, 0),
            key_segments_BS=segments_of(B, num_keys, 0 if num_keys == num_queries else 1),
        )
    return AttentionMask(
        causal="causal" in conditions,
        window=num_keys // 3 if "window" in conditions else None,
        sparsity=BlockSparsity(32, 1, 1, 1, seed=2) if "sparse" in conditions else None,
        prefix_B=jnp.array([0, num_keys // 2], jnp.int32) if "prefix" in conditions else None,
        query_offset_B=jnp.array([num_keys - num_queries, 7]) if "offset" in conditions else None,
        **segments,
    )


def make_options(features: tuple[str, ...], N: int) -> dict:
    """The keyword arguments of the reference with these features."""
    key = jax.random.key(5)
    return dict(
        scale=0.3,
        soft_cap=1.7 if "soft_cap" in features else None,
        sinks_N=jax.random.normal(key, (N,)) if "sinks" in features else None,
        alibi_slopes_N=jnp.asarray(2.0 ** -np.arange(1.0, N + 1), jnp.float32) if "alibi" in features else None,
        dropout_rate=0.2 if "dropout" in features else 0.0,
        dropout_seeds_BN=jax.random.bits(key, (B, N)).astype(jnp.int32)
        if "dropout" in features else None,
    )


def errors(mask, features, shape, dtype: str, kernel: Options, heads=(N, K)) -> dict[str, float]:
    """Largest error of each result against the reference in fp32, relative to its largest entry.

    shape: T, S, H. heads: of queries, of keys. The log-sum-exp's gradient is not zero; where a row sees nothing both results
    must be exactly zeros and -inf, which is asserted.
    """
    (T, S, H), (N, K) = shape, heads
    keys = jax.random.split(jax.random.key(0), 5)
    options = make_options(features, N)
    q = jax.random.normal(keys[0], (B, T, N, H)).astype(dtype)
    k, v = (jax.random.normal(key, (B, S, K, H)).astype(dtype) for key in keys[1:3])
    g, g_lse = jax.random.normal(keys[3], (B, T, N, H)), jax.random.normal(keys[4], (B, T, N))
    sinks = options.pop("sinks_N")

    def flash(q, k, v, sinks):
        operands = Operands(
            q, k, v, mask, sinks, options["alibi_slopes_N"], options["dropout_seeds_BN"]
        )
        static = kernel._replace(**{name: options[name] for name in kernel._fields[:3]})
        return attend(static, operands)

    def reference(q, k, v, sinks):
        return reference_attention(q, k, v, mask, sinks_N=sinks, **options)

    def everything(attention, q, k, v):
        (out, lse), back = jax.vjp(attention, q, k, v, sinks)
        blind = lse == -jnp.inf
        gradients = back((g.astype(out.dtype), jnp.where(blind, 0, g_lse)))
        return dict(zip(("out", "lse", "dq", "dk", "dv", "dsinks"), (out, lse, *gradients)))

    got = jax.jit(lambda *x: everything(flash, *x))(q, k, v)
    want = jax.jit(lambda *x: everything(reference, *x))(*(x.astype(jnp.float32) for x in (q, k, v)))
    found = {}
    for name in [name for name in want if want[name] is not None]:
        mine, theirs = (np.asarray(x[name].astype(jnp.float32)) for x in (got, want))
        finite = np.isfinite(theirs)
        np.testing.assert_array_equal(mine[~finite], theirs[~finite])
        scale = max(np.abs(theirs[finite]).max(), 1e-3)
        found[name] = float(np.abs(mine[finite] - theirs[finite]).max() / scale)
        if name == "dq" and not finite.all():
            assert False, "the reference itself is not finite"
    blind = np.asarray(want["lse"]) == -np.inf
    assert not np.asarray(got["out"])[blind].any() and not np.asarray(got["dq"])[blind].any()
    return found

"""What `attention_gpu.py` holds against the reference before it times anything."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from batiste.models.positions import alibi_slopes
from batiste.pallas_kernels import AttentionMask, BlockSparsity, reference_attention
from batiste.pallas_kernels.attention import flash_attention

B, N, K = 2, 6, 2
# Relative to a result's largest number. Inputs are rounded to the dtype for both sides; what is
# left are roundings of probabilities, of their gradients and of the results.
BOUNDS = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 2e-2}


class Check(NamedTuple):
    """One comparison: results are output, log-sum-exp and the gradients of q, k, v (and sinks)."""

    name: str
    kernel: Callable
    want: Callable
    arrays: list[jax.Array]
    bound: float

    def error(self, got: tuple, want: tuple) -> tuple[float, bool]:
        """The largest error of any result, and whether the kernel is finite where it should be."""
        worst, right = 0.0, len(got) == len(want)
        for mine, theirs in zip(got, want):
            mine, theirs = np.asarray(mine, np.float32), np.asarray(theirs, np.float32)
            finite = np.isfinite(theirs)
            right &= bool((mine[~finite] == theirs[~finite]).all())
            mine, theirs = mine[finite], theirs[finite]
            right &= bool(np.isfinite(mine).all())
            size = max(1.0, np.abs(theirs).max(initial=0))
            worst = max(worst, float(np.abs(mine - theirs).max(initial=0)) / size)
        return worst, right


def make_masks(T: int, S: int) -> dict[str, AttentionMask]:
    """One mask of each kind for B = 2."""
    query_segments, key_segments = (
        jnp.asarray(1 + (np.arange(n)[None] >= np.array([[n // 3], [n // 2]])), jnp.int32)
        .at[0, -n // 8:].set(0) for n in (T, S))
    offset = jnp.array([S - T, 3], jnp.int32)
    return {
        "full": AttentionMask(causal=False),
        "causal": AttentionMask(causal=True),
        "window": AttentionMask(causal=True, window=T // 3),
        "two-sided window": AttentionMask(causal=False, window=T // 4),
        "prefix": AttentionMask(causal=True, prefix_B=jnp.array([0, S // 2])),
        "segments": AttentionMask(
            causal=True, query_segments_BT=query_segments, key_segments_BS=key_segments),
        "offset": AttentionMask(causal=True, query_offset_B=offset),
        "sparse": AttentionMask(
            causal=True, sparsity=BlockSparsity(32, 1, global_blocks=1, random_blocks=1)),
        "all but sparse": AttentionMask(
            causal=True, window=T // 2, prefix_B=jnp.array([T // 4, 3]), query_offset_B=offset,
            query_segments_BT=query_segments, key_segments_BS=key_segments),
    }


def make_check(name: str, mask: AttentionMask, options: dict, arrays: list, chip: str) -> Check:
    """`arrays`: q, k, v, the output's and the log-sum-exp's gradients, sinks (or none)."""
    def results(attention, q, k, v, g, g_lse, *sinks):
        def value(q, k, v, *sinks):
            return attention(q, k, v, mask, **options, sinks_N=sinks[0] if sinks else None)
        (out, lse), backward = jax.vjp(value, q, k, v, *sinks)
        return out, lse, *backward((g, jnp.where(lse == -jnp.inf, 0, g_lse)))

    def kernel(*arrays):
        def attention(*operands, **options):
            return flash_attention(*operands, **options, chip=chip.removeprefix("rehearse "),
                                   interpret=chip.startswith("rehearse "))
        return results(attention, *arrays)

    def want(*arrays):
        with jax.default_matmul_precision("highest"):
            return results(reference_attention, *(x.astype(jnp.float32) for x in arrays))

    return Check(name, kernel, want, arrays, BOUNDS[arrays[0].dtype.name])


def make_checks(chip: str, rehearse: bool) -> list[Check]:
    """Every mask with no and with all features in bf16, and every head dim in every dtype."""
    T, S = (33, 50) if rehearse else (333, 450)
    masks = make_masks(T, S)
    chip = f"rehearse {chip}" if rehearse else chip
    plain = dict(soft_cap=None, alibi_slopes_N=None, dropout_rate=0.0, dropout_seeds_BN=None)
    seeds_BN = jax.random.bits(jax.random.key(1), (B, N)).astype(jnp.int32)
    features = dict(soft_cap=2.0, alibi_slopes_N=alibi_slopes(N), dropout_rate=0.2,
                    dropout_seeds_BN=seeds_BN)
    checks = []

    def add(name, mask, options, head_dim, dtype):
        keys = jax.random.split(jax.random.key(0), 6)
        shapes = [(B, T, N, head_dim), (B, S, K, head_dim), (B, S, K, head_dim),
                  (B, T, N, head_dim)]
        arrays = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]
        arrays.append(jax.random.normal(keys[4], (B, T, N)))
        if options is features:
            arrays.append(jax.random.normal(keys[5], (N,)))
        options = options | dict(scale=head_dim**-0.5)
        checks.append(make_check(f"{name}, D {head_dim}, {dtype}", mask, options, arrays, chip))

    for name, mask in masks.items():
        add(name, mask, plain, 128, "bfloat16")
        add(f"{name}, all features", mask, features, 64, "bfloat16")
    for head_dim in (64, 80, 96, 128, 192, 256):
        for dtype in BOUNDS:
            add("causal, all features", masks["causal"], features, head_dim, dtype)
    return checks[::6] if rehearse else checks

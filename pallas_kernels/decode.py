"""Attention of one query per sequence over a long cache: decoding, split over the keys."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from batiste.pallas_kernels import gpu_decode, tpu_decode
from batiste.pallas_kernels.decode_operands import DecodeOperands, DecodeOptions


class CertifiedDecode(NamedTuple):
    """What the tests hold to the reference and compile; head dims are multiples of `head_step`."""

    chip: str
    dtypes: tuple[str, ...]
    features: tuple[str, ...]
    head_dims: tuple[int, int]
    head_step: int
    queries_per_head: int


FEATURES = ("window", "soft_cap", "sinks", "alibi")
CERTIFIED = tuple(
    # Mosaic cannot load fp16. On GPUs the sums of all queries of a key head lie in registers.
    CertifiedDecode(chip, dtypes, FEATURES, (64, 256), 16, queries)
    for chips, dtypes, queries in (
        (("v5e", "v5p", "v6e", "tpu7x"), ("bfloat16", "float32"), 128),
        (("hopper", "ampere"), ("bfloat16", "float16", "float32"), 64),
    )
    for chip in chips
)


def flash_decode(
    q_BNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    length_B: jax.Array,
    *,
    window: int | None,
    scale: float,
    soft_cap: float | None,
    sinks_N: jax.Array | None,
    alibi_slopes_N: jax.Array | None,
    chip: str,
    interpret: object = False,
) -> tuple[jax.Array, jax.Array]:
    """`reference_attention` of one query per row, in tiles of keys; those it hides are not read.

    Returns out_BNH in q's dtype and lse_BN in fp32; a row that sees no key gives zeros, and -inf or
    its sink. Has no gradient: ValueError for who asks (`flash_attention` has one).

    length_B: int32, how many keys of each row are real; the query is at the place of the last.
    window: the query sees so many latest keys, its own included. Others as in the reference.
    interpret: passed to `pallas_call`; for tests on a CPU.
    Raises ValueError for what `CERTIFIED` does not list. Flash-decoding,
    https://crfm.stanford.edu/2023/10/12/flashdecoding.html; FlashAttention-2, arXiv:2307.08691.
    """
    _check(q_BNH, k_BSKH, v_BSKH, chip)
    end_B = jnp.clip(length_B.astype(jnp.int32), 0, k_BSKH.shape[1])
    first_B = jnp.zeros_like(end_B) if window is None else jnp.maximum(end_B - window, 0)
    slopes_N = None if alibi_slopes_N is None else alibi_slopes_N.astype(jnp.float32)
    options = DecodeOptions(window, scale, soft_cap, chip, interpret)
    operands = DecodeOperands(q_BNH, k_BSKH, v_BSKH, first_B, end_B, slopes_N)
    return _decode(options, operands, sinks_N)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _decode(options: DecodeOptions, operands: DecodeOperands, sinks_N: jax.Array | None):
    kernels = gpu_decode if options.chip in ("hopper", "ampere") else tpu_decode
    out_PBNH, lse_PBN = kernels.parts(options, operands)
    terms = lse_PBN
    if sinks_N is not None:
        sinks_PBN = sinks_N.astype(jnp.float32)[None, None]
        terms = jnp.concatenate([lse_PBN, jnp.broadcast_to(sinks_PBN, (1, *lse_PBN.shape[1:]))])
    lse_BN = jax.nn.logsumexp(terms, axis=0)
    share_PBN = jnp.exp(lse_PBN - jnp.where(lse_BN == -jnp.inf, 0, lse_BN)[None])
    out_BNH = (share_PBN[..., None] * out_PBNH).sum(axis=0)
    return out_BNH.astype(operands.q_BNH.dtype), lse_BN


@_decode.defjvp
def _no_gradient(options, primals, tangents):
    raise ValueError("flash_decode has no gradient; flash_attention has")


def decode_is_certified(chip: str, dtype: str, head_dim: int, queries_per_head: int) -> bool:
    """Whether `flash_decode` takes such operands on the chip."""
    entry = {entry.chip: entry for entry in CERTIFIED}[chip]
    least, most = entry.head_dims
    fits = least <= head_dim <= most and head_dim % entry.head_step == 0
    return fits and dtype in entry.dtypes and queries_per_head <= entry.queries_per_head


def _check(q_BNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, chip: str) -> None:
    chips = {entry.chip: entry for entry in CERTIFIED}
    if chip not in chips:
        raise ValueError(f"flash_decode on {chip!r}: certified are {', '.join(chips)}")
    entry, dtypes = chips[chip], {array.dtype.name for array in (q_BNH, k_BSKH, v_BSKH)}
    if len(dtypes) > 1 or not dtypes <= set(entry.dtypes):
        raise ValueError(
            f"q, k and v in {', '.join(sorted(dtypes))} on {chip}: certified is one of "
            f"{', '.join(entry.dtypes)} for all three"
        )
    (B, N, H), K = q_BNH.shape, k_BSKH.shape[2]
    if k_BSKH.shape != v_BSKH.shape or k_BSKH.shape[::3] != (B, H) or N % K:
        shapes = ", ".join(str(array.shape) for array in (q_BNH, k_BSKH, v_BSKH))
        raise ValueError(f"shapes of q, k and v do not fit: {shapes}; expected BNH and twice BSKH")
    least, most = entry.head_dims
    nearest = min(max(-(-H // entry.head_step) * entry.head_step, least), most)
    if nearest != H:
        raise ValueError(f"head dim {H} on {chip}: the nearest certified is {nearest}")
    if N // K > entry.queries_per_head:
        raise ValueError(
            f"{N // K} query heads per key head on {chip}: certified up to {entry.queries_per_head}"
        )

"""Where a token stands: rotations, learned and sinusoidal tables, ALiBi slopes."""

import math

import jax
import jax.numpy as jnp

from batiste.models.config import TransformerConfig

RELATIVE_BUCKETS, RELATIVE_DISTANCE = 32, 128  # Every T5's.
# Every Llama 3's: wavelengths of which this many, or fewer, fit into the original length.
LLAMA3_FACTORS = 1.0, 4.0
# YaRN's beta: pairs that turn so often within the original length are kept, or divided.
YARN_TURNS = 32.0, 1.0


def rope_frequencies(config: TransformerConfig, kind: str = "global") -> jax.Array:
    """Radians per position of each rotated pair in a kind of layer, float32 of shape (H / 2,).

    RoPE (arXiv:2104.09864); "linear" divides all by the factor (arXiv:2306.15595); "llama3"
    divides only wavelengths beyond the original length and blends between (arXiv:2407.21783); "yarn"
    blends along the pairs instead (`_yarn_blend`).
    Local layers with a base of their own are not scaled (Gemma 3, arXiv:2503.19786).
    """
    rotated = config.head_dim if config.rope_dim is None else config.rope_dim
    exponents = jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated
    if kind == "local" and config.local_rope_base is not None:
        return config.local_rope_base**-exponents
    frequencies = config.rope_base**-exponents
    if config.rope_scaling is None:
        return frequencies
    slow = frequencies / config.rope_factor
    if config.rope_scaling == "linear":
        return slow
    if config.rope_scaling == "yarn":
        blend = _yarn_blend(config, rotated)
        return (1 - blend) * slow + blend * frequencies
    turns = config.rope_original_length * frequencies / (2 * math.pi)
    low, high = LLAMA3_FACTORS
    blend = jnp.clip((turns - low) / (high - low), 0, 1)
    return (1 - blend) * slow + blend * frequencies


def _yarn_blend(config: TransformerConfig, rotated: int) -> jax.Array:
    """How much of its own frequency each pair keeps: 1 for the fast ones, 0 for the slow ones.

    A line between the pairs that turn YARN_TURNS times within the original length, rounded outward
    to whole pairs (YaRN, Peng et al. 2023, arXiv:2309.00071, section 3.2; the ramp of its code).
    """
    def pair_of(turns: float) -> float:
        wavelength = config.rope_original_length / (turns * 2 * math.pi)
        return rotated * math.log(wavelength) / (2 * math.log(config.rope_base))

    fast, slow = YARN_TURNS
    first, last = max(math.floor(pair_of(fast)), 0), min(math.ceil(pair_of(slow)), rotated - 1)
    pairs = jnp.arange(rotated // 2, dtype=jnp.float32)
    return 1 - jnp.clip((pairs - first) / max(last - first, 1e-3), 0, 1)


def yarn_length(factor: float) -> float:
    """What YaRN multiplies queries and keys by, for their longer rows (equation 22)."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def rotation(
    config: TransformerConfig, positions_BT: jax.Array, kind: str = "global"
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each position's rotation, float32 of shape (B, T, 1, H / 2).

    Both are longer than 1 by `yarn_length` where YaRN scales, and so are queries and keys.
    """
    frequencies = rope_frequencies(config, kind)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    own = kind == "local" and config.local_rope_base is not None
    if config.rope_scaling != "yarn" or own:
        return jnp.cos(angles), jnp.sin(angles)
    length = yarn_length(config.rope_factor)
    return length * jnp.cos(angles), length * jnp.sin(angles)


def rotate(x_BTNH: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates pairs (h, h + H / 2) of every head, in fp32."""
    cos, sin = cos_sin
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def sinusoids(positions_BT: jax.Array, model_dim: int) -> jax.Array:
    """The fixed table of the 2017 Transformer (arXiv:1706.03762), float32 BTD."""
    exponents = jnp.arange(0, model_dim, 2, dtype=jnp.float32) / model_dim
    angles = positions_BT[:, :, None].astype(jnp.float32) * (10_000.0**-exponents)[None, None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def relative_bias(
    config: TransformerConfig, table_PN: jax.Array, distance_BTS: jax.Array
) -> jax.Array:
    """What is added to the logits, float32 BNTS, by the distance of query and key (T5).

    One half of the buckets has a distance each; the others grow, up to RELATIVE_DISTANCE. An
    encoder has half of all buckets for keys that follow (arXiv:1910.10683; its code's formula).
    """
    buckets, side_BTS = RELATIVE_BUCKETS, 0
    if config.form == "encoder":
        buckets //= 2
        side_BTS = jnp.where(distance_BTS < 0, buckets, 0)
        distance_BTS = jnp.abs(distance_BTS)
    distance_BTS = jnp.maximum(distance_BTS, 0)
    exact = buckets // 2
    ratio = jnp.maximum(distance_BTS, exact).astype(jnp.float32) / exact
    grown = jnp.log(ratio) / math.log(RELATIVE_DISTANCE / exact) * (buckets - exact)
    far_BTS = jnp.minimum(exact + grown.astype(jnp.int32), buckets - 1)
    bucket_BTS = side_BTS + jnp.where(distance_BTS < exact, distance_BTS, far_BTS)
    return jnp.moveaxis(table_PN[bucket_BTS], 3, 1)


def alibi_slopes(num_heads: int) -> jax.Array:
    """One slope per head, float32 of shape (N,) (arXiv:2108.12409).

    A geometric series for a power of two; other counts take every second slope of the next one.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (n + 1) / power) for n in range(power)]
    slopes += [2 ** (-4 * (2 * n + 1) / power) for n in range(num_heads - power)]
    return jnp.asarray(slopes, jnp.float32)

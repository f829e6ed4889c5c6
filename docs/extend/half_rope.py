"""A position scheme: rotates half of each head. --config.model.positions=docs/extend/half_rope.py:HALF"""

import jax
import jax.numpy as jnp

from batiste.models import TransformerConfig, Turn


def of_places(config: TransformerConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angles, computed once for all layers."""
    rotated = config.head_dim // 2
    frequencies = config.rope_base ** -(jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def apply(x_BTNH: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Queries or keys with the first half of each head rotated in pairs."""
    cos, sin = turn
    size = cos.shape[-1]
    x = x_BTNH.astype(jnp.float32)
    first, second, rest = x[..., :size], x[..., size : 2 * size], x[..., 2 * size :]
    turned = (first * cos - second * sin, second * cos + first * sin, rest)
    return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)


HALF = Turn(of_places, apply)

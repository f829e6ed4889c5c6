"""What slices send each other, made small: 8-bit codes and a scale a block, or the largest entries.

Arrays have two dims: rows that are compressed one by one, and what is in a row.
"""

import math

import jax
import jax.numpy as jnp

COMPRESSIONS = ("none", "int8", "top_k")
# Entries that share one fp32 scale: 1.6 % more bytes than the codes alone.
BLOCK = 256


def encode(x: jax.Array, compression: str, kept_fraction: float) -> tuple[jax.Array, ...]:
    """What is sent for a float32 array of two dims; `decode` makes an approximation of it.

    int8: codes, and the fp32 scale of each block; an entry is off by at most half a scale, 1/254 of
    the largest entry of its block. top_k: the ceil(kept_fraction n) entries of each row that are
    largest in absolute value, fp32, and their int32 places. none: the array.
    """
    if compression == "none":
        return (x,)
    if compression == "top_k":
        kept = math.ceil(kept_fraction * x.shape[1])
        places = jax.lax.top_k(jnp.abs(x), kept)[1]
        return jnp.take_along_axis(x, places, axis=1), places
    block = min(BLOCK, x.shape[1])
    blocks = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block))).reshape(x.shape[0], -1, block)
    scales = jnp.max(jnp.abs(blocks), axis=2, keepdims=True) / 127
    codes = jnp.round(blocks / jnp.where(scales == 0, 1, scales)).astype(jnp.int8)
    return codes, scales


def decode(sent: tuple[jax.Array, ...], shape: tuple[int, int], compression: str) -> jax.Array:
    """The float32 array of two dims, of this shape, that `sent` stands for."""
    if compression == "none":
        return sent[0]
    if compression == "top_k":
        values, places = sent
        rows = jnp.arange(shape[0])[:, None]
        return jnp.zeros(shape, jnp.float32).at[rows, places].set(values)
    codes, scales = sent
    return (codes.astype(jnp.float32) * scales).reshape(shape[0], -1)[:, : shape[1]]

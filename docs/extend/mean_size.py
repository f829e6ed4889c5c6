"""A norm: divides by the mean size of the entries. --config.model.norm=docs/extend/mean_size.py:mean_size"""

import jax
import jax.numpy as jnp


def mean_size(x: jax.Array, epsilon: float) -> jax.Array:
    """x over the mean of |x| along the last dim, float32; the scale comes after it."""
    return x / (jnp.abs(x).mean(axis=-1, keepdims=True) + epsilon)

"""Attention over rows that devices share: time exchanged for heads (Ulysses, arXiv:2309.14509)."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from batiste.pallas_kernels import AttentionMask
from batiste.sharding import context_size


def all_to_all_attention(
    attend: Callable,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    arrays: Mapping[str, jax.Array | None],
) -> tuple[jax.Array, jax.Array]:
    """`attend` over whole rows, called by each device with its share of time and of all heads.

    mask: of whole rows. arrays: of all heads, the last dim. Each device attends with its share of
    heads; where the key heads do not divide, each is sent as often as makes them.
    Raises ValueError where the query heads do not divide.
    """
    size, (N, K) = context_size(), (q_BTNH.shape[2], k_BSKH.shape[2])
    if N % size:
        raise ValueError(
            f"mesh.context_exchange='all_to_all' splits {N} heads of a device over mesh.context="
            f"{size}, which does not divide them: choose sizes that do, or 'ring'"
        )
    copies = size // math.gcd(K, size)
    k_BSKH, v_BSKH = (jnp.repeat(x, copies, axis=2) for x in (k_BSKH, v_BSKH))
    whole = (_exchange(x, split=2, join=1) for x in (q_BTNH, k_BSKH, v_BSKH))
    share, first = N // size, jax.lax.axis_index("context") * (N // size)
    arrays = {
        name: None if x is None else jax.lax.dynamic_slice_in_dim(x, first, share, axis=-1)
        for name, x in arrays.items()
    }
    results = attend(*whole, mask, arrays)
    return tuple(_exchange(x, split=1, join=2) for x in results)


def _exchange(x: jax.Array, split: int, join: int) -> jax.Array:
    return jax.lax.all_to_all(x, "context", split, join, tiled=True)

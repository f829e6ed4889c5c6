"""Which probabilities dropout keeps: a function of seed and place, the same in every kernel."""

import jax
import numpy as np


def kept(seed: jax.Array, query: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """Whether the probability of `key` for `query` is kept, with probability 1 - rate.

    seed: int32, one for each row and head. query, key: int32 places among the keys. The three
    broadcast. Nothing but these numbers decides, so block sizes, sharding and the direction of the
    pass cannot matter. The mixing is MurmurHash3's finalizer, once for the query and once for both.
    """
    bits = _mix(_mix(seed + query * _signed(0x9E3779B1)) ^ (key * _signed(0x85EBCA77)))
    return jax.lax.shift_right_logical(bits, 8) < round((1 - rate) * 2**24)


def _mix(bits: jax.Array) -> jax.Array:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ jax.lax.shift_right_logical(bits, shift)) * _signed(factor)
    return bits ^ jax.lax.shift_right_logical(bits, 16)


def _signed(bits: int) -> np.int32:
    """A 32-bit constant as int32, which is what vector units multiply."""
    return np.int32(bits - 2**32 if bits >= 2**31 else bits)

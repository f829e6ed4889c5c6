"""What happens to scores before the softmax: soft cap, ALiBi, mask; and dropout after it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from batiste.pallas_kernels.dropout import kept
from batiste.pallas_kernels.tiles import DIAGONAL, FULL

LOG2_E = math.log2(math.e)
# Finite, because inf - inf is NaN; a running maximum begins above it, so that a hidden logit has
# weight exp2(HIDDEN - LOWEST) = 0 even in a row that sees nothing.
HIDDEN, LOWEST = -1e30, -1e20


class Rules(NamedTuple):
    """What of the options and the mask a kernel is built for; None and False are absent.

    num_keys: the real keys, when some are padding.
    sparsity_shift: log2 of the block of a block-sparse mask.
    """

    causal: bool
    two_sided: bool
    window: int | None
    num_keys: int | None
    prefix: bool
    segments: bool
    sparsity_shift: int | None
    soft_cap: float | None
    alibi: bool
    dropout_rate: float | None

    @property
    def scale(self) -> float:
        """What queries are multiplied by, beside the caller's scale, before the product."""
        return LOG2_E if self.soft_cap is None else 1 / self.soft_cap


class Piece(NamedTuple):
    """A piece of scores, keys on sublanes and queries on lanes, and what is known about its rows.

    query, key: place of the first query and of the first key.
    query_segments, sparsity_bits: (1, queries). key_segments: (keys, 1).
    prefix, slope, seed: scalars of the row and the head.
    """

    shape: tuple[int, int]
    query: jax.Array
    key: jax.Array
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    sparsity_bits: jax.Array | None = None
    first_block: jax.Array | None = None
    prefix: jax.Array | None = None
    slope: jax.Array | None = None
    seed: jax.Array | None = None

    @property
    def queries(self) -> jax.Array:
        """Places of the queries, (1, queries)."""
        return jax.lax.broadcasted_iota(jnp.int32, (1, self.shape[1]), 1) + self.query

    @property
    def keys(self) -> jax.Array:
        """Places of the keys, (keys, 1)."""
        return jax.lax.broadcasted_iota(jnp.int32, (self.shape[0], 1), 0) + self.key

    @property
    def distance(self) -> jax.Array:
        """Place of the query minus place of the key, (keys, queries)."""
        iotas = (jax.lax.broadcasted_iota(jnp.int32, self.shape, dim) for dim in (1, 0))
        return next(iotas) - next(iotas) + (self.query - self.key)


def logits(rules: Rules, piece: Piece, scores: jax.Array, kind: int):
    """Base-2 logits of a piece, hidden ones at `HIDDEN`, and the tanh of a soft cap (or None)."""
    bent = None
    if rules.soft_cap is not None:
        bent = jnp.tanh(scores)
        scores = bent * (rules.soft_cap * LOG2_E)
    if rules.alibi:
        scores = scores - piece.slope * jnp.abs(piece.distance).astype(jnp.float32)
    visible = None if kind == FULL else _visible(rules, piece, kind)
    return scores if visible is None else jnp.where(visible, scores, HIDDEN), bent


def dropped(rules: Rules, piece: Piece, values: jax.Array) -> jax.Array:
    """The values that dropout keeps, scaled up, and zeros."""
    if rules.dropout_rate is None:
        return values
    keep = kept(piece.seed, piece.queries, piece.keys, rules.dropout_rate)
    return jnp.where(keep, values * (1 / (1 - rules.dropout_rate)), 0.0)


def _visible(rules: Rules, piece: Piece, kind: int) -> jax.Array:
    conditions = []
    if rules.causal:
        past = piece.distance >= 0
        if rules.prefix:
            past = past | (piece.keys < piece.prefix)
        conditions.append(past)
    if rules.segments:
        same = piece.query_segments == piece.key_segments
        conditions.append(same & (piece.key_segments > 0))
    if kind != DIAGONAL:
        if rules.window is not None:
            conditions.append(piece.distance < rules.window)
            if rules.two_sided:
                conditions.append(piece.distance > -rules.window)
        if rules.num_keys is not None:
            conditions.append(piece.keys < rules.num_keys)
        if rules.sparsity_shift is not None:
            index = jax.lax.shift_right_logical(piece.keys, rules.sparsity_shift) - piece.first_block
            bits = jax.lax.shift_right_logical(piece.sparsity_bits, index)
            conditions.append((bits & 1) == 1)
    visible = conditions[0]
    for condition in conditions[1:]:
        visible = visible & condition
    return visible

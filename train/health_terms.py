"""What a part of a batch adds to the statistics of a step's health, and how parts come together."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CHECKSUM_BITS = 24  # What float32 holds exactly.


class Added(NamedTuple):
    """Sums over rows, micro-batches and devices; fields as in models.LayerSums, by layer."""

    tokens: jax.Array
    square_L: jax.Array
    entropy_L: jax.Array | None
    queries_L: jax.Array | None
    alive_LF: jax.Array | None


class Largest(NamedTuple):
    """Maxima over the same."""

    activation_L: jax.Array
    logit_L: jax.Array | None


class Rows(NamedTuple):
    """What each row of the batch has: sums as in Terms, and a checksum of its tokens below 2^24."""

    cross_entropy_B: jax.Array
    tokens_B: jax.Array
    checksum_B: jax.Array


class HealthTerms(NamedTuple):
    """What a part of a batch adds to the statistics of the whole."""

    added: Added
    largest: Largest
    rows: Rows


def health_terms(terms: Any, batch: Any) -> HealthTerms:
    """The terms of a batch, or of a micro-batch, whose Terms are still by row."""
    layers = terms.layers
    attention = layers.attention
    real_BT = jnp.ones_like(batch.tokens_BT) if batch.segments_BT is None else batch.segments_BT
    return HealthTerms(
        Added(
            (real_BT != 0).astype(jnp.float32).sum(),
            layers.square_B.sum(axis=1),
            None if attention is None else attention.entropy_B.sum(axis=1),
            None if attention is None else attention.queries_B.sum(axis=1),
            layers.alive_F,
        ),
        Largest(
            layers.largest_B.max(axis=1),
            None if attention is None else attention.logit_B.max(axis=1),
        ),
        Rows(terms.cross_entropy_B, terms.tokens_B, row_checksums(batch.tokens_BT)),
    )


def row_checksums(tokens_BT: jax.Array) -> jax.Array:
    """A weighted sum of each row modulo 2^24, float32 B; int32 overflow is meant."""
    places_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    odd_T = 2 * (places_T * places_T * 40503 + places_T) + 1
    mixed_BT = tokens_BT * 668265263 + 374761393
    mixed_BT = (mixed_BT ^ (mixed_BT >> 15)) * odd_T[None]
    return (mixed_BT.sum(axis=1) & (2**CHECKSUM_BITS - 1)).astype(jnp.float32)


def joined(micro: HealthTerms) -> HealthTerms:
    """The terms of a batch from those of its micro-batches, stacked; micro i has rows i, i + k, ..."""
    return HealthTerms(
        jax.tree.map(lambda leaf: leaf.sum(axis=0), micro.added),
        jax.tree.map(lambda leaf: leaf.max(axis=0), micro.largest),
        jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(-1), micro.rows),
    )


def across(terms: HealthTerms, axes: tuple[str, ...]) -> HealthTerms:
    """The terms of all devices along manual axes; rows stay where they are."""
    return HealthTerms(
        jax.lax.psum(terms.added, axes), jax.lax.pmax(terms.largest, axes), terms.rows)

"""Replaced-token detection (ELECTRA, Clark et al. 2020, arXiv:2003.10555).

A generator fills the hidden tokens, and the discriminator says of every token whether it is another
than the text had. What the generator fills in is drawn and has no gradient: the one learns of the
other only by the tables that they share.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from batiste.models import Transformer
from batiste.sharding import constrain
from batiste.train.health_terms import row_checksums

# Of the discriminator's loss, beside the generator's (appendix A: of 1, 10, 20, 50 and 100).
DISCRIMINATOR_WEIGHT = 50.0


class ReplacedTerms(NamedTuple):
    """Sums over the real tokens of each row, float32.

    nats: the discriminator's cross-entropy. tokens: how many. replaced: how many are not what the
    text had. right: of how many that was said rightly.
    """

    nats_B: jax.Array
    tokens_B: jax.Array
    replaced_B: jax.Array
    right_B: jax.Array


def filled(logits_BTV: jax.Array, batch: Any) -> jax.Array:
    """The batch's tokens with each hidden one drawn from its logits, int32 BT.

    The draw is a function of the row as it is hidden, and so of (seed, epoch, record): it is the
    same in every micro-batch, on every mesh, and in every evaluation.
    """
    def noise(number: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(0), number)
        return jax.random.gumbel(key, logits_BTV.shape[1:], jnp.float32)

    numbers_B = row_checksums(batch.tokens_BT).astype(jnp.uint32)
    noise_BTV = constrain(jax.vmap(noise)(numbers_B), "BTV")
    drawn_BT = jnp.argmax(logits_BTV + noise_BTV, axis=-1).astype(jnp.int32)
    return jax.lax.stop_gradient(jnp.where(batch.weights_BT > 0, drawn_BT, batch.tokens_BT))


def detection(
    odds_BT: jax.Array, filled_BT: jax.Array, batch: Any
) -> tuple[jax.Array, ReplacedTerms]:
    """The discriminator's loss of each row, and what there is to tell of it.

    odds_BT: the logarithm of the odds that a token was replaced, float32. A row's loss is the mean
    over its real tokens, counted as often as it has hidden ones: divided by all hidden tokens, as
    the generator's loss is, that is the mean over rows by their hidden tokens.
    """
    real_BT = (batch.segments_BT > 0).astype(jnp.float32)
    replaced_BT = (filled_BT != batch.targets_BT) & (batch.weights_BT > 0)
    nats_BT = jax.nn.softplus(jnp.where(replaced_BT, -odds_BT, odds_BT))
    right_BT = (odds_BT > 0) == replaced_BT
    terms = ReplacedTerms(*(
        (each_BT.astype(jnp.float32) * real_BT).sum(axis=1)
        for each_BT in (nats_BT, jnp.ones_like(real_BT), replaced_BT, right_BT)))
    hidden_B = batch.weights_BT.sum(axis=1)
    loss_B = terms.nats_B * hidden_B / jnp.maximum(terms.tokens_B, 1)
    return DISCRIMINATOR_WEIGHT * loss_B, jax.lax.stop_gradient(terms)


def detection_metrics(terms: ReplacedTerms) -> dict[str, jax.Array]:
    """Means over tokens, of terms summed over rows; `always_original` is right of the others."""
    tokens = jnp.maximum(terms.tokens_B, 1)
    replaced = terms.replaced_B / tokens
    return {
        "discriminator_loss": terms.nats_B / tokens, "replaced": replaced,
        "discriminator_accuracy": terms.right_B / tokens, "always_original_accuracy": 1 - replaced,
    }


def check_generates(model: Transformer) -> None:
    """Raises ValueError for a discriminator alone, for which nothing replaces tokens."""
    if model.generator is None:
        raise ValueError(
            "model.generator_heads=None: a discriminator (model.discriminator=True) has nothing to "
            "find that no generator has replaced; set model.generator_heads"
        )

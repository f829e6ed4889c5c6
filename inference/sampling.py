"""One token from the logits of each row."""

import jax
import jax.numpy as jnp

from batiste.inference.config import SamplingConfig


def sample(logits_BV: jax.Array, keys_B: jax.Array, config: SamplingConfig) -> jax.Array:
    """Draws a token of each row with that row's key, int32 B; temperature 0 takes the likeliest.

    top_k keeps the k likeliest; top_p the fewest whose probability reaches p (arXiv:1904.09751),
    the token that crosses p included. Both apply after the temperature.
    """
    if config.temperature == 0:
        return logits_BV.argmax(axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / config.temperature
    if config.top_k is not None:
        kept = min(config.top_k, logits_BV.shape[-1])
        least_B1 = jax.lax.top_k(logits_BV, kept)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if config.top_p is not None:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        least_B1 = jnp.where(before_BV < config.top_p, sorted_BV, jnp.inf).min(axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)

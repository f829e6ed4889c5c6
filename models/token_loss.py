"""The loss of a token as a formula of three sums over the vocabulary."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class LossRules(NamedTuple):
    """Label smoothing mixes the target with a uniform distribution (arXiv:1512.00567); z-loss adds
    z_loss * log(Z)^2, which keeps the normalizer near 1 (PaLM, arXiv:2204.02311)."""

    label_smoothing: float
    z_loss: float


class VocabularySums(NamedTuple):
    """log(Z), the target's logit, and the mean of the logits of each token, float32."""

    log_z_BT: jax.Array
    hit_BT: jax.Array
    mean_BT: jax.Array


def vocabulary_sums(
    logits_BTV: jax.Array, targets_BT: jax.Array, axes: tuple[str, ...] = ()
) -> VocabularySums:
    """The sums over float32 logits; axes: each device of these has its own part of them."""
    log_z_BT, mean_BT = jax.nn.logsumexp(logits_BTV, axis=-1), logits_BTV.mean(axis=-1)
    # Compared and not gathered: inside one of several slices, XLA's partitioner dies of a gather
    # from a vocabulary that `tensor` splits. It takes as long.
    is_target_BTV = is_target(logits_BTV, targets_BT, axes)
    hit_BT = jnp.where(is_target_BTV, logits_BTV, 0).sum(axis=-1)
    sums = VocabularySums(log_z_BT, hit_BT, mean_BT)
    if not axes:
        return sums
    parts = VocabularySums(*jax.lax.all_gather(jnp.stack(sums), axes, axis=1))
    return VocabularySums(
        jax.nn.logsumexp(parts.log_z_BT, axis=0), parts.hit_BT.sum(axis=0),
        parts.mean_BT.mean(axis=0),
    )


def is_target(
    logits_BTV: jax.Array, targets_BT: jax.Array, axes: tuple[str, ...] = ()
) -> jax.Array:
    """Whether a logit is its token's target; axes as in `vocabulary_sums`."""
    size = logits_BTV.shape[-1]
    places_V = jnp.arange(size) + (jax.lax.axis_index(axes) * size if axes else 0)
    return jnp.expand_dims(places_V, range(targets_BT.ndim)) == targets_BT[..., None]


def logit_slopes(
    logits_BTV: jax.Array, targets_BT: jax.Array, sums: tuple[VocabularySums, VocabularySums],
    axes: tuple[str, ...] = (),
) -> jax.Array:
    """The derivative by each logit, given the sums and the derivatives by them, float32."""
    total, slopes = sums
    vocabulary = logits_BTV.shape[-1] * math.prod(jax.lax.axis_size(axis) for axis in axes)
    softmax_BTV = jnp.exp(logits_BTV - total.log_z_BT[..., None])
    hit_BTV = jnp.where(is_target(logits_BTV, targets_BT, axes), slopes.hit_BT[..., None], 0)
    return slopes.log_z_BT[..., None] * softmax_BTV + hit_BTV + (
        slopes.mean_BT / vocabulary)[..., None]


def token_losses(sums: VocabularySums, rules: LossRules) -> tuple[jax.Array, jax.Array]:
    """Loss and cross-entropy of each token in nats, both float32 BT."""
    cross_entropy_BT = sums.log_z_BT - sums.hit_BT
    loss_BT = cross_entropy_BT
    if rules.label_smoothing:
        uniform_BT = sums.log_z_BT - sums.mean_BT
        loss_BT = (1 - rules.label_smoothing) * loss_BT + rules.label_smoothing * uniform_BT
    if rules.z_loss:
        loss_BT += rules.z_loss * jnp.square(sums.log_z_BT)
    return loss_BT, cross_entropy_BT

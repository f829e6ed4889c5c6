"""The losses of heads, as sums over what is labelled; the step divides, once for a whole batch."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from batiste.tasks.config import HeadConfig
from batiste.tasks.heads import IMPOSSIBLE
from batiste.tasks.rows import Labels, TaskBatch


def counts_of(batch: TaskBatch) -> dict[str, jax.Array]:
    """How much of a batch each head has labels for, float32: examples, or words of "tags"."""
    return {name: labels.weights.sum() for name, labels in batch.labels.items()}


def loss_sums(
    heads: Sequence[HeadConfig], class_weights: dict[str, tuple[float, ...] | None],
    said: dict[str, jax.Array], batch: TaskBatch,
) -> dict[str, jax.Array]:
    """The summed loss of each head, float32, of what `TaskModel` said."""
    sums = {}
    for head in heads:
        labels, own = batch.labels[head.name], said[head.name]
        if head.kind == "similarity":
            there_B = batch.second.segments_BT.max(axis=1) > 0
            losses = contrastive(own, there_B, head.given("temperature"))
        elif head.kind == "span":
            losses = span_losses(own, labels)
        elif head.kind == "multilabel":
            losses = multilabel_losses(own, labels, head.focal)
        else:
            losses = class_losses(own, labels, class_weights[head.name], head.focal)
        sums[head.name] = (losses * labels.weights).sum()
    return sums


def class_losses(
    logits: jax.Array, labels: Labels, weights: Sequence[float] | None, gamma: float
) -> jax.Array:
    """Cross-entropy of one class each, times its class's weight, in the shape of the labels.

    gamma: of the focal loss, -(1 - p)^gamma log p (Lin et al. 2017, arXiv:1708.02002, eq. 4).
    """
    log_p = jnp.take_along_axis(
        jax.nn.log_softmax(logits, axis=-1), labels.values[..., None], axis=-1)[..., 0]
    losses = -log_p * _focus(log_p, gamma)
    if weights is None:
        return losses
    return losses * jnp.asarray(weights, jnp.float32)[labels.values]


def multilabel_losses(logits_BY: jax.Array, labels: Labels, gamma: float) -> jax.Array:
    """The mean over classes of each one's binary cross-entropy, focal likewise, float32 B."""
    log_p_BY = jax.nn.log_sigmoid(jnp.where(labels.values > 0, logits_BY, -logits_BY))
    return (-log_p_BY * _focus(log_p_BY, gamma)).mean(axis=1)


def _focus(log_p: jax.Array, gamma: float) -> jax.Array | float:
    # The floor is for gamma < 1, whose slope at p = 1 is infinite.
    return 1.0 if gamma == 0 else jnp.maximum(-jnp.expm1(log_p), 1e-6) ** gamma


def span_losses(logits_BTY: jax.Array, labels: Labels) -> jax.Array:
    """The mean of the cross-entropies of an answer's first and last token (BERT's), float32 B."""
    log_p_BTY = jax.nn.log_softmax(logits_BTY, axis=1)
    places_BTY = labels.values[:, None, :]
    return -jnp.take_along_axis(log_p_BTY, places_BTY, axis=1)[:, 0].mean(axis=1)


def contrastive(x_B2D: jax.Array, there_B: jax.Array, temperature: float) -> jax.Array:
    """Cross-entropy of finding each text's own second text among those of the batch, float32 B.

    By cosine / temperature (Henderson et al. 2017, arXiv:1705.00652, section 4). there_B: which
    examples have a second text at all.
    """
    cosines_BS = jnp.einsum("bd,sd->bs", x_B2D[:, 0], x_B2D[:, 1], precision="highest")
    logits_BS = jnp.where(there_B[None], cosines_BS / temperature, IMPOSSIBLE)
    return -jnp.diagonal(jax.nn.log_softmax(logits_BS, axis=1))

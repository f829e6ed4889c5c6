"""Losses as (sum, denominator) pairs, so that they add up over micro-batches; nobody divides here."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from batiste.models import LayerSums, RouterSums, Transformer
from batiste.sharding import constrain, in_time_order
from batiste.train.config import ObjectiveConfig


class RouterTerms(NamedTuple):
    """Sums of a mixture of experts, float32; a row counts as much as it has tokens in the loss.

    balance, z: of all layers, times the row's tokens. load: tokens of each expert of each layer.
    """

    balance_B: jax.Array
    z_B: jax.Array
    load_BLE: jax.Array


class Terms(NamedTuple):
    """Sums over the tokens of each row, float32.

    loss: what is minimized, label smoothing, z-loss and the router's losses included.
    cross_entropy: in nats. tokens: the sum of the loss weights, the denominator of both.
    router: None without experts. layers: what they sum up of each row, if they are measured.
    health: what train/health_statistics.py makes of all this.
    """

    loss_B: jax.Array
    cross_entropy_B: jax.Array
    tokens_B: jax.Array
    router: RouterTerms | None = None
    layers: LayerSums | None = None
    health: Any = None


def token_losses(
    logits_BTV: jax.Array, targets_BT: jax.Array, config: ObjectiveConfig
) -> tuple[jax.Array, jax.Array]:
    """Loss and cross-entropy of each token in nats, both float32 BT, from float32 logits.

    Label smoothing mixes the target with a uniform distribution (arXiv:1512.00567); z-loss adds
    z_loss * log(Z)^2, which keeps the normalizer near 1 (PaLM, arXiv:2204.02311).
    """
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # Compared and not gathered: inside one of several slices, XLA's partitioner dies of a gather
    # from a vocabulary that `tensor` splits. It takes as long.
    places_V = jnp.arange(logits_BTV.shape[-1])
    is_target_BTV = jnp.expand_dims(places_V, range(targets_BT.ndim)) == targets_BT[..., None]
    hit_BT = jnp.where(is_target_BTV, logits_BTV, 0).sum(axis=-1)
    cross_entropy_BT = log_z_BT - hit_BT
    loss_BT = cross_entropy_BT
    if config.label_smoothing:
        uniform_BT = log_z_BT - logits_BTV.mean(axis=-1)
        loss_BT = (1 - config.label_smoothing) * loss_BT + config.label_smoothing * uniform_BT
    if config.z_loss:
        loss_BT += config.z_loss * jnp.square(log_z_BT)
    return loss_BT, cross_entropy_BT


def causal_loss(
    model: Transformer, batch, dropout_key, config: ObjectiveConfig, measured: bool = False
) -> Terms:
    """Next-token prediction over a Batch; with `loss_chunk` or `fused`, never all logits at once.

    measured: whether the layers sum up what they do.
    """
    # Whole over `context`, so that each device takes what it needs of them and nothing is sent.
    batch = jax.tree.map(lambda x_BT: constrain(in_time_order(x_BT), "BS"), batch)
    x_BTD, output = model.features(
        batch.tokens_BT, batch.positions_BT, batch.segments_BT, dropout_key, measured
    )

    def terms(x_BTD, targets_BT, weights_BT):
        if config.fused:
            losses = model.fused_losses(x_BTD, targets_BT, config.z_loss, config.label_smoothing)
        else:
            losses = token_losses(model.logits(x_BTD), targets_BT, config)
        return Terms(*((x * weights_BT).sum(axis=1) for x in (*losses, jnp.ones_like(weights_BT))))

    if config.loss_chunk is None:
        total = terms(x_BTD, batch.targets_BT, batch.weights_BT)
    else:
        arrays = (constrain(x_BTD, "BTD"), batch.targets_BT, batch.weights_BT)
        total = _chunked(terms, arrays, config.loss_chunk)
    if output.router is not None:
        total = _with_router(total, output.router, config)
    return total._replace(layers=output.sums)


def _with_router(terms: Terms, router: RouterSums, config: ObjectiveConfig) -> Terms:
    """Adds the losses of all layers' routers to each row's, in proportion to the row's tokens."""
    summed = RouterTerms(
        terms.tokens_B * router.balance_B.sum(axis=0),
        terms.tokens_B * router.z_B.sum(axis=0),
        router.load_BE.swapaxes(0, 1),
    )
    extra_B = config.balance_loss * summed.balance_B + config.router_z_loss * summed.z_B
    return terms._replace(loss_B=terms.loss_B + extra_B, router=summed)


def _chunked(terms, arrays, chunk: int) -> Terms:
    """Sums `terms` over chunks of time; the backward pass recomputes each chunk's logits.

    Where the mesh splits time, a chunk has an equal share of each part, so that all work on it.
    """
    B, length = arrays[0].shape[:2]
    parts = jax.sharding.get_abstract_mesh().shape.get("context", 1)
    share, length = chunk // parts, length // parts
    whole = length - length % share

    def in_parts(x, start, stop):
        return x.reshape(B, parts, length, *x.shape[2:])[:, :, start:stop]

    def split(x):
        x = in_parts(x, 0, whole).reshape(B, parts, -1, share, *x.shape[2:])
        return jnp.moveaxis(x, 2, 0).reshape(-1, B, chunk, *x.shape[4:])

    def rest(x):
        return in_parts(x, whole, length).reshape(B, -1, *x.shape[2:])

    remat = jax.checkpoint(terms)
    zero = Terms(*(jnp.zeros(arrays[0].shape[:1], jnp.float32),) * 3)
    total, _ = jax.lax.scan(
        lambda total, chunks: (jax.tree.map(jnp.add, total, remat(*chunks)), None),
        zero,
        tuple(split(x) for x in arrays),
    )
    if whole < length:
        total = jax.tree.map(jnp.add, total, remat(*(rest(x) for x in arrays)))
    return total
